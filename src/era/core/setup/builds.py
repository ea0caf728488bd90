"""Building packages: their own code, run in a temporary sandbox.

Theory of operation. Some packages can't be unpacked only: a Python source distribution runs its build, a package of npm
its install scripts. That is code of strangers, so it runs as a session's programs do: by the same driver, with the
isolation, limits and network of the session that asked for it. But not in the session's own sandbox, whose files are
none of its business. The sandbox is made for one build, and what is taken out of it is taken once it is dead: nothing
that was started in there can change it any more.

The registries of the host's tools are reached through the service (ports.Indexes), also where the session has no
internet, so a build needs no credential and no way to them of its own.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from era.core.files.allowance import bounded
from era.core.limits import Rules
from era.core.models import EMPTY, Language, Session
from era.core.ports import Ended, Indexes, Network, Program, Sandbox, SandboxPool
from era.core.setup.commands import how
from era.core.setup.progress import LastWords, Say
from era.errors import SandboxFailed


class Builds:
    """Gives sessions the places where their packages are built."""

    def __init__(self, pool: SandboxPool, network: Network, indexes: Indexes, rules: Rules) -> None:
        self._pool, self._network, self._indexes, self._rules = pool, network, indexes, rules

    def of(self, session: Session) -> Build:
        return Build(session, self._pool, self._network, self._indexes, self._rules)


class Build:
    """What one session may have built. What came of it is nobody else's: `owner` tells whose it is."""

    def __init__(self, session: Session, pool: SandboxPool, network: Network, indexes: Indexes, rules: Rules) -> None:
        self.owner = str(session.key)
        self._session = session
        self._pool, self._network, self._indexes, self._rules = pool, network, indexes, rules

    @asynccontextmanager
    async def place(self, language: Language) -> AsyncIterator[Place]:
        """An empty sandbox, with room for the runtime of this language. It is gone after the block, and what is to be
        kept of it must have been moved out by then. Raises EraError where there is none to be had."""
        session = self._session
        limits = self._rules.granted(session.limits)
        sandbox = await self._pool.acquire_temporary(language, session.isolation, limits)
        try:
            yield Place(sandbox, session, self._network, self._indexes)
        finally:
            await self._pool.discard(sandbox)


class Place:
    """A sandbox to build in. Its working directory may be touched while nothing runs."""

    def __init__(self, sandbox: Sandbox, session: Session, network: Network, indexes: Indexes) -> None:
        self._sandbox, self._session, self._network, self._indexes = sandbox, session, network, indexes

    @property
    def directory(self) -> Path:
        """The working directory, as the host sees it."""
        return self._sandbox.workspace

    @property
    def uid(self) -> int | None:
        """Who is to own what is put there; None: the service's own user."""
        return self._sandbox.uid

    async def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        deadline: float,
        indexes: Sequence[str] = (),
        say: Say | None = None,
    ) -> tuple[str | None, LastWords]:
        """Run a program until `deadline` of the monotonic clock at most: how it failed, None where it hasn't, and the
        end of what it said. `{N}` in `command` becomes the address where it finds the Nth of `indexes`. Raises
        SandboxFailed."""
        sandbox, session, said = self._sandbox, self._session, LastWords()
        run_egress = self._network.run_egress(sandbox, internet=session.allow_internet, egress=session.egress)
        access = self._indexes.access(sandbox, indexes)
        program = Program(
            code=b"",
            state=b"{}",
            env=env,
            timeout=max(0.1, deadline - time.monotonic()),
            ephemeral=False,
            files={},
            certificates=run_egress.certificates,
            supervised=run_egress.supervised,
            command=[access.filled_in(word) for word in command],
        )
        ended: Ended | None = None
        async with run_egress, access:
            async for event in bounded(sandbox, program, EMPTY):
                if isinstance(event, Ended):
                    ended = event
                else:
                    said.say(event.stream, event.data)
                    if say is not None:
                        say(event.stream, event.data)
        if ended is None:
            raise SandboxFailed("The sandbox did not say how a build ended.")
        return how(ended), said
