"""The sandboxes that are ready for sessions which have none yet, and how many sandboxes memory allows.

Theory of operation. They have the server's usual limits and no packages. For each language a few with the usual driver
are always kept; where a language needs a long preparation, only once a session has asked for it. Those of another
driver, which a machine may never need, are made ahead once a session has asked for that driver and language, as long as
all of them together take no more than SHARE of the memory that is available.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from era import languages
from era.core.models import Language, WantedIsolation
from era.core.ports import Sandbox
from era.errors import EraError

log = structlog.get_logger()

FIRST = 32
"""Before anything has been measured."""

_LEAST, _MOST = 8, 4096
_WARM_SHARE = 0.5
_MEASURED = 16
"""Measurements of which the mean is taken."""

_DESCRIPTORS = 16
"""Open files of the service for one sandbox, at most."""


class WarmLimit:
    """Measures sandboxes, and says how many may be warm: as many as memory allows.

    What a warm sandbox takes is measured, one sandbox after the other, since it differs by language and driver. Half of
    the memory that is available, with what sandboxes have of it now, is theirs; the rest is for the programs that run
    in them, and for others on this machine. It is worked out anew all the time: where others need memory, idle
    sandboxes go.
    """

    def __init__(self) -> None:
        self._measured: deque[int] = deque(maxlen=_MEASURED)
        self._next = 0

    def measure(self, sandboxes: Sequence[Sandbox]) -> None:
        """Measure another one of these idle sandboxes."""
        if sandboxes:
            self._next = (self._next + 1) % len(sandboxes)
            if size := sandboxes[self._next].memory_bytes():
                self._measured.append(size)

    def limit(self, count: int) -> int:
        """How many there may be, where there are `count` now."""
        if not self._measured:
            return FIRST
        each = sum(self._measured) / len(self._measured)
        by_memory = int(_WARM_SHARE * (available_memory() + count * each) / each)
        by_descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTORS
        return max(_LEAST, min(by_memory, by_descriptors, _MOST))


def available_memory() -> int:
    """Bytes that this process and its descendants can still have: of the machine (proc_meminfo(5)), and of the control
    groups that it is in."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    available = fields["MemAvailable"]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, limit, usage, cache = (
                "/sys/fs/cgroup/memory",
                "limit_in_bytes",
                "usage_in_bytes",
                "total_inactive_file",
            )
        elif not controllers:
            root, limit, usage, cache = "/sys/fs/cgroup", "max", "current", "inactive_file"
        else:
            continue
        group = Path(root + path)
        for directory in (group, *group.parents):
            if not directory.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):  # no such group here, or "max": it has no limit
                left = int((directory / f"memory.{limit}").read_text())
                left -= int((directory / f"memory.{usage}").read_text())
                held = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                available = min(available, left + int(held.get(cache, 0)))
    return max(available, 0)


SHARE = 0.1

_PAUSE = 5.0
"""Seconds before another try after a sandbox could not be made."""

_FIRST_BYTES = 64 << 20
"""What one takes before any has been measured."""

type _Kind = tuple[WantedIsolation, Language]


@dataclass(slots=True)
class _Ready:
    """Those of one kind."""

    sandboxes: deque[Sandbox] = field(default_factory=deque)
    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when one may have been taken."""


class ReadySandboxes:
    """See the theory of operation. `start` before anything, `stop` when done."""

    def __init__(
        self,
        count: int,
        make: Callable[[WantedIsolation, Language], Awaitable[Sandbox]],
        close: Callable[[Sandbox], Awaitable[None]],
        memory: Callable[[], int] = available_memory,
    ) -> None:
        """`count` are kept of each kind. `make` makes one; it may raise EraError, OSError. `close` closes one that has
        died. `memory` says how many bytes are available."""
        self._count, self._make, self._close, self._memory = count, make, close, memory
        self._kinds: dict[_Kind, _Ready] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopped = False

    def start(self) -> None:
        for language in filter(languages.is_at_hand, languages.runtimes()):
            self._of(("auto", language)).wanted.set()

    async def stop(self) -> None:
        """Close all, and make none any more."""
        self._is_stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(sandbox.close() for sandbox in self.all()), return_exceptions=True)

    async def take(self, isolation: WantedIsolation, language: Language) -> Sandbox | None:
        """One of this kind, where there is one. `auto` is the usual driver, and only `auto`."""
        ready = self._of((isolation, language))
        ready.wanted.set()
        while ready.sandboxes:
            sandbox = ready.sandboxes.popleft()
            if sandbox.alive:
                return sandbox
            await self._close(sandbox)
        return None

    def usual(self) -> int:
        """How many there are of the usual driver."""
        return sum(len(ready.sandboxes) for (isolation, _), ready in self._kinds.items() if isolation == "auto")

    def all(self) -> list[Sandbox]:
        return [sandbox for ready in self._kinds.values() for sandbox in ready.sandboxes]

    def _of(self, kind: _Kind) -> _Ready:
        if kind not in self._kinds:
            self._kinds[kind] = _Ready()
            if not self._is_stopped:
                self._tasks.append(asyncio.create_task(self._keep(kind)))
        return self._kinds[kind]

    async def _keep(self, kind: _Kind) -> None:
        """Make sandboxes of a kind ahead of need, for ever."""
        ready = self._kinds[kind]
        while True:
            await ready.wanted.wait()
            ready.wanted.clear()
            try:
                while len(ready.sandboxes) < self._count and self._may_make(kind):
                    ready.sandboxes.append(await self._make(*kind))
            except Exception as error:
                if self._is_stopped:
                    return
                if not isinstance(error, EraError | OSError):  # the latter also of the look at memory
                    log.exception("bug", where="ready sandboxes")
                ready.wanted.set()
                await asyncio.sleep(_PAUSE)

    def _may_make(self, kind: _Kind) -> bool:
        """Whether there is memory for another one of a kind."""
        if kind[0] == "auto":
            return True
        others = [each for (name, _), ready in self._kinds.items() if name != "auto" for each in ready.sandboxes]
        sizes = [sandbox.memory_bytes() for sandbox in others]
        each = max(sizes, default=0) or _FIRST_BYTES
        return sum(sizes) + each <= SHARE * (self._memory() + sum(sizes))
