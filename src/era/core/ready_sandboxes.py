"""The sandboxes that are ready for sessions which have none yet.

Theory of operation. They have the server's usual limits and no packages. For each language a few with the usual driver
are always kept; where a language needs a long preparation, only once a session has asked for it. Those of another
driver, which a machine may never need, are made ahead once a session has asked for that driver and language, as long as
all of them together take no more than SHARE of the memory that is available.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from era import languages
from era.core.models import Language, WantedIsolation
from era.core.ports import Sandbox
from era.core.warm_limit import available_memory
from era.errors import EraError

log = structlog.get_logger()

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
