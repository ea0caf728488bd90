"""Long results of cells, with a real interpreter and without a sandbox."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from era.core.live import kernel_frames
from tests.core.interpreters import Cells

pytestmark = pytest.mark.usefixtures("staged_ipython")


async def test_long_results_are_parsed_beside_the_event_loop_and_come_in_order(
    cells: Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their values may be many, and whoever else is served would wait for each."""
    parsed, parse, loop_thread = list[tuple[bool, bool]](), kernel_frames.parse, threading.current_thread()

    def noted(payload: bytes) -> Any:
        parsed.append((len(payload) > 64 << 10, threading.current_thread() is loop_thread))
        return parse(payload)

    monkeypatch.setattr(kernel_frames, "parse", noted)
    outcome, _ = await cells.run(
        "from IPython.display import JSON, display\n"
        "for many in ([1] * 50_000, [2], [3] * 50_000, [4]):\n"
        "    display(JSON(many))\n"
        "raise ValueError('x' * 100_000)"
    )
    assert outcome.error is not None
    assert [result["data"]["application/json"][0] for result in outcome.results] == [1, 2, 3, 4]
    assert parsed == [(True, False), (False, True)] * 2 + [(True, False)]
