"""Settings that are changed while a session is live: what its processes may from then on. Sandboxes are the fake
driver's."""

from __future__ import annotations

from typing import Any

import pytest

from era.core.metadata import SessionChange
from tests.unit.core import Core
from tests.unit.test_live_sessions import S, start


async def test_its_network_may_be_changed_while_a_session_becomes_live(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    await core.session(allow_internet=True)
    right = core.live_sessions._sandbox

    async def changed_meanwhile(*words: Any) -> Any:
        found = await right(*words)
        await core.store.change_session(S, SessionChange(allow_internet=False))
        await core.live_sessions.follow(S)
        return found

    monkeypatch.setattr(core.live_sessions, "_sandbox", changed_meanwhile)
    await start(core, "exec sleep 100")
    live = core.live_sessions.running(S)
    assert live is not None
    assert not live.session.allow_internet


async def test_a_network_that_cannot_be_made_anew_is_made_by_the_next_process(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    await core.session(allow_internet=False)
    await start(core, "exec sleep 100")
    make, said = core.network.process_egress, list[bool]()

    def fails_once(*words: Any, internet: bool, **more: Any) -> Any:
        said.append(internet)
        if len(said) == 1:
            raise OSError("no descriptors")
        return make(*words, internet=internet, **more)

    monkeypatch.setattr(core.network, "process_egress", fails_once)
    await core.store.change_session(S, SessionChange(allow_internet=True))
    with pytest.raises(OSError, match="no descriptors"):
        await core.live_sessions.follow(S)
    for _ in range(2):
        await start(core, "exec sleep 100")
    assert said == [True, True]


async def test_storage_that_cannot_be_opened_leaves_nothing_of_the_old_network_and_is_opened_by_the_next_process(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    await core.session(allow_internet=True, storage=False)
    await start(core, "exec sleep 100")
    live = core.live_sessions.running(S)
    assert live is not None
    give, make, asked, said = live._storages.access, core.network.process_egress, list[str | None](), list[bool]()

    def fails_once(sandbox: Any, owner: str | None) -> Any:
        asked.append(owner)
        if len(asked) == 1:
            raise OSError("no descriptors")
        return give(sandbox, owner)

    def noted(*words: Any, internet: bool, **more: Any) -> Any:
        said.append(internet)
        return make(*words, internet=internet, **more)

    monkeypatch.setattr(live._storages, "access", fails_once)
    monkeypatch.setattr(core.network, "process_egress", noted)
    await core.store.change_session(S, SessionChange(allow_internet=False, storage=True))
    with pytest.raises(OSError, match="no descriptors"):
        await core.live_sessions.follow(S)
    assert live._egress is None
    for _ in range(2):
        await start(core, "exec sleep 100")
    assert (asked, said) == ([S.owner, S.owner], [False])
