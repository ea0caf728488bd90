"""Cases of drivers, measured without a service around them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from bench.arena import Arena
from bench.cases import Probe
from era.core.models import Language
from era.core.program import Limits, Output, Program
from era.drivers.bubblewrap import BubblewrapDriver, BubblewrapSandbox
from era.drivers.gvisor import GvisorDriver

_DRIVERS = {"gvisor": GvisorDriver, "bubblewrap": BubblewrapDriver}
_LIMITS = Limits(
    memory_bytes=512 << 20,
    cpus=1.0,
    pids=256,
    disk_bytes=1 << 30,
    files=100_000,
    output_bytes=1 << 20,
    tmp_bytes=64 << 20,
)


class Bench:
    """A driver of one kind, and an event loop for it. The arena closes it."""

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

    def make(self, language: Language = "python") -> BubblewrapSandbox:
        return self._runner.run(self._driver.create(language, self._limits))

    def run(self, sandbox: BubblewrapSandbox, code: str) -> bytes:
        """What a program wrote. Raises RuntimeError where it did not end well."""

        async def follow() -> bytes:
            said = b""
            async for event in sandbox.run(Program(code.encode(), b"{}", {}, 20, ephemeral=False, files={})):
                if isinstance(event, Output):
                    said += event.data
                elif event.exit_code != 0:
                    raise RuntimeError(f"A program in a sandbox went wrong: {event}, {said!r}")
            return said

        return self._runner.run(follow())

    def discard(self, sandbox: BubblewrapSandbox) -> None:
        self._runner.run(sandbox.close())

    def close(self) -> None:
        self._runner.run(self._driver.stop())
        self._runner.close()


def warm(code: str, kind: str = "gvisor") -> Callable[[Arena], Probe]:
    """A run in a live sandbox."""

    def start(arena: Arena) -> Probe:
        bench = Bench(arena, _DRIVERS[kind])
        sandbox = bench.make()

        def after(said: bytes) -> None:
            if said != b"1\n":
                raise RuntimeError(f"The program said {said!r}.")

        return Probe(lambda _: bench.run(sandbox, code), after=after)

    return start


def new(arena: Arena) -> Probe:
    """A sandbox made."""
    bench = Bench(arena, GvisorDriver)
    return Probe(lambda _: bench.make(), after=bench.discard)
