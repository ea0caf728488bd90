"""core.outages: what fails again and again is logged once, and goes on once it doesn't fail any more."""

from __future__ import annotations

import asyncio
import errno
import time

import pytest
from structlog.testing import capture_logs

from era.core.concurrency import outages
from era.core.concurrency.outages import note_outage
from era.core.concurrency.stall_timeout import stall_timeout

FULL = OSError(errno.EMFILE, "Too many open files")


def test_an_outage_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "_noted_at", {})
    times = iter([0.0, 30.0, 80.0, 130.0, 130.0, 200.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    with capture_logs() as logs:
        for event in ("one", "one", "one", "one", "other", "one"):
            note_outage(event, FULL)
    assert [each["event"] for each in logs] == ["one", "other", "one"]


async def test_a_stall_timeout_outlasts_one() -> None:
    """What a sandbox uses that can't be asked for a moment."""
    asked = 0

    def cpu_seconds() -> float:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise FULL
        return time.monotonic()

    async with stall_timeout(cpu_seconds, 0.3):
        await asyncio.sleep(0.8)
