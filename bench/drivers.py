"""Cases that measure a driver without the service around it."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from bench.arena import Arena
from bench.cases import Probe
from era.core.models import Language
from era.core.program import CODE_ALONE, Invocation, Limits, Output, Program
from era.drivers.bubblewrap import BubblewrapDriver, BubblewrapSandbox
from era.drivers.gvisor import GvisorDriver

DRIVERS = {"gvisor": GvisorDriver, "bubblewrap": BubblewrapDriver}
_LIMITS = Limits(
    memory_bytes=512 << 20,
    cpus=1.0,
    pids=256,
    disk_bytes=1 << 30,
    files=100_000,
    output_bytes=1 << 20,
    tmp_bytes=64 << 20,
)
_SECONDS = 120.0


class SyncDriver:
    """A driver with an event loop of its own, for calls that block. The arena closes it."""

    def __init__(self, arena: Arena, kind: type[BubblewrapDriver], limits: Limits = _LIMITS) -> None:
        name = f"era-bench-{secrets.token_hex(4)}"
        directory = arena.scratch / name
        directory.mkdir()
        self._limits = limits
        self._runner = asyncio.Runner()
        self._driver = kind(directory / "driver", limits, cgroup_name=name)
        arena.closers.callback(self.close)
        self._runner.run(self._driver.clear())
        self._runner.run(self._driver.start())

    def create(self, language: Language = "python") -> BubblewrapSandbox:
        return self._runner.run(self._driver.create(language, self._limits))

    def run(self, sandbox: BubblewrapSandbox, code: str, invocation: Invocation = CODE_ALONE) -> bytes:
        """Run a program and return its output. Raises RuntimeError if it fails."""

        async def follow() -> bytes:
            output = b""
            program = Program(code.encode(), b"{}", {}, _SECONDS, ephemeral=False, files={}, invocation=invocation)
            async for event in sandbox.run(program):
                if isinstance(event, Output):
                    output += event.data
                elif event.exit_code != 0:
                    raise RuntimeError(f"A program in a sandbox went wrong: {event}, {output!r}")
            return output

        return self._runner.run(follow())

    def command(self, sandbox: BubblewrapSandbox, command: list[str]) -> bytes:
        """The same with a command."""
        return self.run(sandbox, "", Invocation(command=command))

    def discard(self, sandbox: BubblewrapSandbox) -> None:
        self._runner.run(sandbox.close())

    def close(self) -> None:
        self._runner.run(self._driver.stop())
        self._runner.close()


@cache
def shared(arena: Arena, kind: str) -> SyncDriver:
    """A driver that several cases have together, whose sandboxes may use all processors."""
    return SyncDriver(arena, DRIVERS[kind], replace(_LIMITS, cpus=os.cpu_count() or 1))


def warm(code: str, kind: str = "gvisor") -> Callable[[Arena], Probe]:
    """A run in a warm sandbox."""

    def start(arena: Arena) -> Probe:
        driver = SyncDriver(arena, DRIVERS[kind])
        sandbox = driver.create()

        def after(output: bytes) -> None:
            if output != b"1\n":
                raise RuntimeError(f"The program printed {output!r}.")

        return Probe(lambda _: driver.run(sandbox, code), after=after)

    return start


def new(arena: Arena) -> Probe:
    """Creating a gVisor sandbox."""
    driver = SyncDriver(arena, GvisorDriver)
    return Probe(lambda _: driver.create(), after=driver.discard)
