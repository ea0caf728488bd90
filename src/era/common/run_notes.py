"""What is missing from a run's answer, and what wasn't kept of the run, as lines for whoever reads its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GAP = "[some of the output is missing here: it is no longer kept]"
"""In place of an event `gap` of a run that is followed."""


def run_notes(answer: Mapping[str, Any]) -> list[str]:
    """A line for each thing that is missing. `answer` is that of a run, in a session, in a context or in neither."""
    notes = [
        f"[{stream} went over the session's output limit, and the rest is lost]"
        for stream in ("stdout", "stderr")
        if answer[f"{stream}_truncated"]
    ]
    if answer.get("results_truncated"):
        notes.append("[the cell showed more than is kept]")
    memory = answer.get("memory")
    if memory is not None and not memory["kept"]:
        notes.append(f"[variables of earlier cells are gone: {memory['reason']}]")
    state = answer.get("state")
    if state is not None and not state["committed"]:
        notes.append(f"[nothing was kept of this run: {state['reason']}]")
    return notes
