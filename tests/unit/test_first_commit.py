"""The record that a run has begun waits for the disk only where somebody may hear of the run before it has ended."""

from __future__ import annotations

from typing import Any

import pytest

from tests.owners import mine
from tests.unit.core import Core, Listener, request


@pytest.fixture
def durably(core: Core, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each record of a run that began, whether it was made durable."""
    kept: list[bool] = []
    begin_run = core.store.begin_run

    async def noted(*args: Any, durably: bool = True) -> Any:
        kept.append(durably)
        return await begin_run(*args, durably=durably)

    monkeypatch.setattr(core.store, "begin_run", noted)
    return kept


async def test_a_run_that_is_answered_at_its_end(core: Core, durably: list[bool]) -> None:
    await core.session()
    await core.run("pass")
    await core.run("pass", claim=core.claim("key"))
    assert durably == [False, True]


async def test_a_run_that_is_streamed_or_in_the_background(core: Core, durably: list[bool]) -> None:
    await core.session()
    await Listener(core.runs.stream(mine("s"), request("pass"))).task
    await core.runs.begin(mine("s"), request("pass", background=True))
    await core.runs.drain(10)
    await core.runs.start(mine("s"), request("pass"))
    await core.runs.drain(10)
    assert durably == [True, True, True]
