"""Settings that are changed while a session is live: what its processes may from then on. Sandboxes are the fake
driver's."""

from __future__ import annotations

from typing import Any

import pytest

from era.core.metadata import SessionChange
from tests.unit.core import Core
from tests.unit.test_live_sessions import S, start


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
