"""How many sandboxes may be warm: what memory allows, and what follows when others need it."""

from __future__ import annotations

from pathlib import Path

import pytest

from era.core.pool import ready_sandboxes as warm_limit
from era.core.pool.ready_sandboxes import FIRST, WarmLimit
from tests.unit.core import Core, until

SIZE = 10 << 20
"""What a sandbox of the fake driver says that it takes."""


async def test_half_of_what_is_available(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = WarmLimit()
    assert limit.limit(0) == FIRST, "nothing is measured"
    sandbox = await core.pool.acquire(await core.session())
    limit.measure([sandbox])
    monkeypatch.setattr(warm_limit, "available_memory", lambda: 100 * SIZE)
    assert limit.limit(0) == 50
    assert limit.limit(60) == 80, "what sandboxes have now counts as available"
    monkeypatch.setattr(warm_limit, "available_memory", lambda: 0)
    assert limit.limit(0) == warm_limit._LEAST
    monkeypatch.setattr(warm_limit, "available_memory", lambda: 1 << 60)
    assert FIRST < limit.limit(0) <= warm_limit._MOST


async def test_idle_sandboxes_go_when_memory_is_short(
    directory: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("era.core.pool.pool._SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(warm_limit, "_LEAST", 2)
    async with Core.opened(directory, template, max_warm=None) as core:
        await core.pool.start()
        sessions = [await core.session(f"s{number}") for number in range(6)]
        for session in sessions:
            await core.pool.acquire(session)
        for session in sessions[1:]:
            core.pool.committed(session.key, session.snapshot)
        monkeypatch.setattr(warm_limit, "available_memory", lambda: 0)
        await until(lambda: core.pool.counts()["live"] == 2)
        assert core.pool.counts()["busy"] == 1, "one that is busy stays"
        assert core.idle() == [session.key for session in sessions[-1:]]
