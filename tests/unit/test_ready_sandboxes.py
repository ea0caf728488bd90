"""core.ReadySandboxes: which sandboxes are made ahead of need, and how many."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from era.core.models import Language, WantedIsolation
from era.core.pool.ready_sandboxes import SHARE, ReadySandboxes
from era.core.ports import Sandbox
from era.languages import runtimes
from tests.unit.core import until

MB = 1 << 20


class One:
    """A sandbox, as far as it matters here."""

    def __init__(self, isolation: WantedIsolation, language: Language) -> None:
        self.isolation, self.language, self.alive = isolation, language, True

    def memory_bytes(self) -> int:
        return 60 * MB

    async def close(self) -> None:
        self.alive = False


class Ready(ReadySandboxes):
    def __init__(self, count: int = 1) -> None:
        self.made: list[One] = []
        self.closed: list[One] = []
        self.available = int(130 * MB / SHARE)
        super().__init__(count, self.one, self.close, lambda: self.available)

    async def one(self, isolation: WantedIsolation, language: Language) -> Sandbox:
        self.made.append(One(isolation, language))
        return cast("Sandbox", self.made[-1])

    async def close(self, sandbox: Sandbox) -> None:
        await sandbox.close()
        self.closed.append(cast("Any", sandbox))

    def of(self, isolation: WantedIsolation) -> list[One]:
        return [one for one in self.made if one.isolation == isolation and one.alive]


async def test_those_of_another_driver_come_once_they_were_asked_for() -> None:
    ready = Ready()
    ready.start()
    await until(lambda: ready.usual() == len(runtimes()))
    assert {one.isolation for one in ready.made} == {"auto"}
    assert await ready.take("gvisor", "python") is None
    await until(lambda: len(ready.of("gvisor")) == 1)
    assert cast("Any", await ready.take("gvisor", "python")) is ready.of("gvisor")[0]
    await until(lambda: len(ready.of("gvisor")) == 2)
    assert ready.usual() == len(runtimes())
    await ready.stop()
    assert sum(one.alive for one in ready.made) == 1, "only the one that was taken is left"


async def test_they_take_a_share_of_memory_and_no_more() -> None:
    ready = Ready(count=5)
    assert await ready.take("gvisor", "node") is None
    await until(lambda: len(ready.of("gvisor")) == 2)
    assert await ready.take("gvisor", "deno") is None
    await asyncio.sleep(0)
    assert len(ready.of("gvisor")) == 2
    await ready.stop()


async def test_a_dead_one_is_passed_over() -> None:
    ready = Ready()
    assert await ready.take("gvisor", "python") is None
    await until(lambda: len(ready.of("gvisor")) == 1)
    ready.made[0].alive = False
    assert await ready.take("gvisor", "python") is None
    assert ready.closed == [ready.made[0]]
    await ready.stop()
