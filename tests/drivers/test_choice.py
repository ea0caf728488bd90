"""The choice of a driver: the one that was asked for, or the strongest that works; never another one instead."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from era.core.models import JsonObject, Language
from era.core.ports import Sandbox
from era.core.program import Ended, Limits, Output, Program
from era.drivers.choice import DriverChoice
from era.drivers.isolation_report import self_test
from era.errors import NoIsolation
from tests.drivers.fake import FakeDriver, FakeSandbox
from tests.drivers.sandboxes import LIMITS


class Driver(FakeDriver):
    """A driver whose self-test has the result `works`, and that notes calls."""

    def __init__(self, directory: Path, name: str, *, works: bool = True) -> None:
        super().__init__(directory, LIMITS, cgroup_name="")
        self.name = name
        self.works = works
        self.calls: list[str] = []

    async def clear(self) -> None:
        self.calls.append("clear")

    async def start(self) -> None:
        self.calls.append("start")
        if not self.works:
            raise NoIsolation(f"{self.name} does not work", hint=f"install {self.name}")

    def isolation(self) -> JsonObject:
        return {"driver": self.name}


@pytest.fixture
def strong(tmp_path: Path) -> Driver:
    return Driver(tmp_path / "strong", "gvisor")


@pytest.fixture
def usual(tmp_path: Path) -> Driver:
    return Driver(tmp_path / "usual", "bubblewrap")


async def test_auto_is_the_strongest_that_works(strong: Driver, usual: Driver) -> None:
    drivers = DriverChoice({"gvisor": strong, "bubblewrap": usual}, "auto")
    await drivers.start()
    assert await drivers.get("auto") is strong
    assert drivers.isolation() == {"driver": "gvisor", "default": "gvisor", "available": ["gvisor"], "missing": {}}
    assert (strong.calls, usual.calls) == (["clear", "start"], ["clear"]), "what isn't needed isn't proved"
    assert await drivers.get("bubblewrap") is usual
    assert await drivers.get("bubblewrap") is usual
    assert usual.calls == ["clear", "start"]


async def test_auto_falls_back_and_says_so(strong: Driver, usual: Driver) -> None:
    strong.works = False
    drivers = DriverChoice({"gvisor": strong, "bubblewrap": usual}, "auto")
    await drivers.start()
    assert await drivers.get("auto") is usual
    assert drivers.isolation()["missing"] == {"gvisor": "gvisor does not work"}
    tested = drivers.tested()
    assert tested["bubblewrap"] == {"driver": "bubblewrap"}
    assert isinstance(tested["gvisor"], NoIsolation)


async def test_what_was_asked_for_is_never_replaced(
    strong: Driver, usual: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    strong.works = False
    drivers = DriverChoice({"gvisor": strong, "bubblewrap": usual}, "bubblewrap")
    await drivers.start()
    for _ in range(2):
        with pytest.raises(NoIsolation, match="gvisor does not work") as refused:
            await drivers.get("gvisor")
        assert refused.value.hint == "install gvisor"
    assert strong.calls == ["clear", "start"], "a driver that doesn't work isn't tried at every run"
    later = time.monotonic() + 60
    monkeypatch.setattr("era.drivers.choice.time.monotonic", lambda: later)
    strong.works = True
    assert await drivers.get("gvisor") is strong, "it may have been installed meanwhile"
    assert drivers.isolation()["missing"] == {}


async def test_a_server_that_is_to_use_one_uses_no_other(strong: Driver, usual: Driver) -> None:
    strong.works = False
    with pytest.raises(NoIsolation, match="gvisor does not work"):
        await DriverChoice({"gvisor": strong, "bubblewrap": usual}, "gvisor").start()
    assert usual.calls == ["clear"], "leftovers go all the same"
    usual.works = False
    with pytest.raises(NoIsolation, match="bubblewrap does not work"):
        await DriverChoice({"gvisor": strong, "bubblewrap": usual}, "auto").start()


class SlowSandbox(FakeSandbox):
    """As on a machine on which a program takes a minute: one that has less time is ended before it says anything."""

    async def run(self, program: Program) -> AsyncIterator[Output | Ended]:
        async for event in super().run(program if program.timeout > 60 else replace(program, code=b"")):
            yield event


class SlowDriver(FakeDriver):
    async def create(
        self, language: Language, limits: Limits, package_set: str | None = None, heir_to: Sandbox | None = None
    ) -> FakeSandbox:
        self._made.append(SlowSandbox(self.directory / "slow", language, limits))
        return self._made[-1]


async def test_a_slow_machine_is_no_driver_that_does_not_work(tmp_path: Path) -> None:
    driver = SlowDriver(tmp_path, LIMITS, cgroup_name="")
    assert (await self_test(driver, "python", LIMITS, lambda _: None))["driver"] == "fake"
