"""Cases of drivers, measured without a service around them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from bench.arena import Arena
from bench.cases import Probe
from era.core.ports import Limits, Output, Program
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


class _Bench:
    """A driver of one kind, and an event loop for it."""

    def __init__(self, kind: str, directory: Path) -> None:
        self._runner = asyncio.Runner()
        self._driver = _DRIVERS[kind](directory / "driver", _LIMITS, cgroup_name=f"era-bench-{directory.name}")
        self._runner.run(self._driver.clear())
        self._runner.run(self._driver.start())

    def make(self) -> BubblewrapSandbox:
        return self._runner.run(self._driver.create("python", _LIMITS))

    def run(self, sandbox: BubblewrapSandbox, code: str) -> bytes:
        async def follow() -> bytes:
            program = Program(code.encode(), b"{}", {}, 20, ephemeral=False, files={})
            return b"".join([event.data async for event in sandbox.run(program) if isinstance(event, Output)])

        return self._runner.run(follow())

    def discard(self, sandbox: BubblewrapSandbox) -> None:
        self._runner.run(sandbox.close())

    def close(self) -> None:
        self._runner.run(self._driver.stop())
        self._runner.close()


def _bench(arena: Arena, name: str, kind: str) -> _Bench:
    directory = arena.scratch / name
    directory.mkdir(parents=True)
    made = _Bench(kind, directory)
    arena.closers.callback(made.close)
    return made


def warm(code: str, kind: str = "gvisor") -> Callable[[Arena], Probe]:
    """A run in a live sandbox."""

    def start(arena: Arena) -> Probe:
        bench = _bench(arena, f"warm-{kind}", kind)
        sandbox = bench.make()

        def after(said: bytes) -> None:
            if said != b"1\n":
                raise RuntimeError(f"The program said {said!r}.")

        return Probe(lambda _: bench.run(sandbox, code), after=after)

    return start


def new(arena: Arena) -> Probe:
    """A sandbox made."""
    bench = _bench(arena, "new-gvisor", "gvisor")
    return Probe(lambda _: bench.make(), after=bench.discard)
