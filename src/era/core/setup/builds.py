"""Building packages: their own code, run in a temporary sandbox.

Theory of operation. For some packages unpacking isn't enough: a Python source distribution runs its build, a package of
npm its install scripts. That is code of strangers, so it runs as a session's programs do: by the same driver, with the
isolation, limits and network of the session that asked for it. But not in the session's own sandbox, whose files are
none of its business. A sandbox is made for one build, and the result is moved out while nothing runs in there: whatever
was started in it is dead by then.

A build reaches the package indexes of the host's tools through the service (ports.Indexes), also where the session has
no internet. So it needs neither credentials nor network access of its own.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from era.core.execution import Execution, Grants
from era.core.limits import Rules
from era.core.models import Language, Session
from era.core.pool import SandboxPool
from era.core.ports import Indexes, Network, Sandbox
from era.core.program import Invocation, Output, Program
from era.core.setup.commands import failure
from era.core.setup.progress import LastWords, Say


class Builds:
    """Makes a Build for each session that installs packages."""

    def __init__(self, pool: SandboxPool, network: Network, indexes: Indexes, rules: Rules) -> None:
        self._pool, self._network, self._indexes, self._rules = pool, network, indexes, rules

    def of(self, session: Session) -> Build:
        return Build(session, self._pool, self._network, self._indexes, self._rules)


class Build:
    """Builds packages for one session, with that session's isolation, limits and network. What was built is used by no
    other session: `owner` says which one it belongs to. `session_owner` is the session's own."""

    def __init__(self, session: Session, pool: SandboxPool, network: Network, indexes: Indexes, rules: Rules) -> None:
        self.owner, self.session_owner = str(session.key), session.owner
        self._session = session
        self._pool, self._network, self._indexes, self._rules = pool, network, indexes, rules

    @asynccontextmanager
    async def sandbox(self, language: Language) -> AsyncIterator[BuildSandbox]:
        """A temporary sandbox to build in, whose limits fit the runtime of this language. It is removed when the block
        is left; the result has to be moved out before. Raises EraError where no sandbox can be had."""
        session = self._session
        limits = self._rules.granted(session.limits)
        sandbox = await self._pool.acquire_temporary(language, session.isolation, limits, owner=session.owner)
        try:
            yield BuildSandbox(sandbox, session, self._network, self._indexes)
        finally:
            await self._pool.discard(sandbox)


class BuildSandbox:
    """A sandbox to build in. The host may touch its working directory while nothing runs."""

    def __init__(self, sandbox: Sandbox, session: Session, network: Network, indexes: Indexes) -> None:
        self._sandbox, self._session, self._network, self._indexes = sandbox, session, network, indexes

    @property
    def directory(self) -> Path:
        """The working directory, as the host sees it."""
        return self._sandbox.workspace

    @property
    def uid(self) -> int | None:
        """Who has to own the files that are put there; None: the service's own user."""
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
        """Run a program until it ends, or until `deadline` of the monotonic clock. Returns how it failed (see
        `failure`), None if it hasn't, and the end of its output. `{N}` in `command` is replaced by the address of the
        Nth of `indexes`. `say` gets the output as it comes. Raises SandboxFailed."""
        session, output = self._session, LastWords()
        access = self._indexes.access(self._sandbox, indexes)
        program = Program(
            env=env,
            timeout=max(0.1, deadline - time.monotonic()),
            invocation=Invocation(command=[access.filled_in(word) for word in command]),
        )
        grants = replace(Grants.of(session), variables={})

        async def keep(piece: Output) -> None:
            output.say(piece.stream, piece.data)
            if say is not None:
                say(piece.stream, piece.data)

        ended = await Execution(self._sandbox, program, grants, self._network, access=access).run(keep)
        return failure(ended), output
