"""Answers of runs of which something is missing, and what is said of them."""

from __future__ import annotations

from typing import Any

CUT_OFF: dict[str, Any] = {
    "run_id": "run_1_a",
    "session_id": "s",
    "status": "ok",
    "exit_code": 0,
    "duration": "0.1s",
    "stdout": "out\n",
    "stderr": "err\n",
    "stdout_truncated": True,
    "stderr_truncated": True,
    "results": [],
    "results_truncated": True,
    "error": None,
    "memory": {"kept": False, "reason": "The session was stopped."},
    "state": {"version": 1, "committed": False, "reason": "The disk was full."},
    "artifacts": [],
}
NOTES = [
    "[stdout went over the session's output limit, and the rest is lost]",
    "[stderr went over the session's output limit, and the rest is lost]",
    "[the cell showed more than is kept]",
    "[variables of earlier cells are gone: The session was stopped.]",
    "[nothing was kept of this run: The disk was full.]",
]
