"""Which driver makes a sandbox: the one that was asked for, or the strongest that works here.

A driver is proved before it is used, which takes a second and more. So at the start only those are proved that are
needed to know what `auto` is; another one is proved when a session asks for it.
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

_REFUSED_SECONDS = 30.0
"""For so long a driver that did not work isn't tried again."""


class DriverChoice:
    """See ports.Drivers. `drivers` are those there are, the strongest first; `wanted` says what `auto` is to be."""

    def __init__(self, drivers: Mapping[Isolation, Driver], wanted: WantedIsolation) -> None:
        self._drivers = drivers
        self._wanted = wanted
        self._started: set[Isolation] = set()
        self._refused: dict[Isolation, tuple[float, NoIsolation]] = {}
        self._turns = {name: asyncio.Lock() for name in drivers}
        self._default: Isolation = next(iter(drivers))

    async def start(self) -> None:
        """Clear away what an earlier process left, and find what `auto` is. Raises NoIsolation where nothing works, or
        not what this server is to use."""
        for driver in self._drivers.values():
            await driver.clear()
        candidates = list(self._drivers) if self._wanted == "auto" else [self._wanted]
        for name in candidates:
            try:
                await self._proved(name)
            except NoIsolation as problem:
                if name == candidates[-1]:
                    raise
                log.info("isolation_not_there", isolation=name, why=problem.message, hint=problem.hint)
            else:
                self._default = name
                return

    async def get(self, isolation: WantedIsolation) -> Driver:
        return await self._proved(self._default if isolation == "auto" else isolation)

    async def stop(self) -> None:
        for driver in self._drivers.values():
            await driver.stop()

    def isolation(self) -> JsonObject:
        """What `auto` gives, and what else has been used or found missing."""
        return {
            **self._drivers[self._default].isolation(),
            "default": self._default,
            "available": sorted(self._started),
            "missing": {name: problem.message for name, (_, problem) in self._refused.items()},
        }

    async def examine(self) -> dict[Isolation, JsonObject | NoIsolation]:
        """Prove all of them: what each has in force, or why it can't be had. Instead of `start`."""
        found: dict[Isolation, JsonObject | NoIsolation] = {}
        for name, driver in self._drivers.items():
            await driver.clear()
            try:
                found[name] = (await self._proved(name)).isolation()
            except NoIsolation as problem:
                found[name] = problem
        return found

    async def _proved(self, name: Isolation) -> Driver:
        driver = self._drivers[name]
        if name in self._started:
            return driver
        async with self._turns[name]:
            if name in self._started:
                return driver
            at, problem = self._refused.get(name, (0.0, None))
            if problem is not None and time.monotonic() < at + _REFUSED_SECONDS:
                raise NoIsolation(problem.message, hint=problem.hint)
            try:
                await driver.start()
            except NoIsolation as error:
                self._refused[name] = (time.monotonic(), error)
                raise
            self._refused.pop(name, None)
            self._started.add(name)
            return driver
