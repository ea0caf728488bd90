"""The choice of a driver: the one that a session asks for, or the strongest that works on this machine.

A driver tests itself before it is used, which takes a second or more. So at the start drivers are tested only until
there is one for `auto`; any other is tested when a session first asks for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import structlog

from era.core.models import Isolation, JsonObject, WantedIsolation
from era.core.ports import Driver
from era.errors import NoIsolation

log = structlog.get_logger()

_RETEST_SECONDS = 30.0
"""A driver that failed its test isn't tested again before."""


class DriverChoice:
    """See ports.Drivers."""

    def __init__(self, drivers: Mapping[Isolation, Driver], default: WantedIsolation) -> None:
        """`drivers` are in the order of their strength, the strongest first. `default` is what `auto` is to mean,
        `auto` itself for the strongest that works."""
        self._drivers = drivers
        self._wanted_default = default
        self._started: set[Isolation] = set()
        self._failed: dict[Isolation, tuple[float, NoIsolation]] = {}
        """When a driver failed its test, by the monotonic clock, and why."""

        self._locks = {name: asyncio.Lock() for name in drivers}
        self._default: Isolation = next(iter(drivers))

    async def start(self) -> None:
        """Remove what an earlier process left, and settle what `auto` means. Raises NoIsolation where that is settled
        by the constructor and doesn't work, or where nothing works."""
        for driver in self._drivers.values():
            await driver.clear()
        candidates = list(self._drivers) if self._wanted_default == "auto" else [self._wanted_default]
        for name in candidates:
            try:
                await self._tested(name)
            except NoIsolation as problem:
                if name == candidates[-1]:
                    raise
                log.info("isolation_not_there", isolation=name, why=problem.message, hint=problem.hint)
            else:
                self._default = name
                return

    async def get(self, isolation: WantedIsolation) -> Driver:
        return await self._tested(self._default if isolation == "auto" else isolation)

    async def stop(self) -> None:
        for driver in self._drivers.values():
            await driver.stop()

    def isolation(self) -> JsonObject:
        """What the sandboxes of `auto` have in force, which drivers passed their test, and why others failed."""
        return {
            **self._drivers[self._default].isolation(),
            "default": self._default,
            "available": sorted(self._started),
            "missing": {name: problem.message for name, (_, problem) in self._failed.items()},
        }

    def tested(self) -> dict[Isolation, JsonObject | NoIsolation]:
        """What the sandboxes of each driver have in force that was tested so far, or why its test failed."""
        works: dict[Isolation, JsonObject | NoIsolation] = {
            name: driver.isolation() for name, driver in self._drivers.items() if name in self._started
        }
        return works | {name: problem for name, (_, problem) in self._failed.items()}

    async def examine(self) -> dict[Isolation, JsonObject | NoIsolation]:
        """Test all drivers: what the sandboxes of each have in force, or why it fails. Called instead of `start`."""
        results: dict[Isolation, JsonObject | NoIsolation] = {}
        for name, driver in self._drivers.items():
            try:
                await driver.clear()
                results[name] = (await self._tested(name)).isolation()
            except NoIsolation as problem:
                results[name] = problem
        return results

    async def _tested(self, name: Isolation) -> Driver:
        """A driver that has passed its test. Raises NoIsolation."""
        driver = self._drivers[name]
        if name in self._started:
            return driver
        async with self._locks[name]:
            if name in self._started:
                return driver
            at, problem = self._failed.get(name, (0.0, None))
            if problem is not None and time.monotonic() < at + _RETEST_SECONDS:
                raise NoIsolation(problem.message, hint=problem.hint)
            try:
                await driver.start()
            except NoIsolation as error:
                self._failed[name] = (time.monotonic(), error)
                raise
            self._failed.pop(name, None)
            self._started.add(name)
            return driver
