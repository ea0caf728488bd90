"""The commands of a setup: run in the session's own sandbox, before anything else runs there.

Theory of operation. A command is a program like any other: it has the session's isolation, limits, network, files and
packages. All commands run in one sandbox, one after the other; the sandbox then serves the session's runs. The first
command that fails is the last, and then no file of theirs is kept. Their output goes into the result of the setup and
nowhere else.

While a setup is under way no run begins, so nothing else runs in the session's sandbox. But its files can still be
changed over HTTP. The store accepts the snapshot that the commands left only if the version that they began with is
still in force. If not, they are run once more, with the new files.

Packages are built in a temporary sandbox. For some of them unpacking isn't enough: a Python source distribution runs
its build, a package of npm its install scripts. That is code of strangers, so it runs as a session's programs do: by
the same driver, with the isolation, limits and network of the session that asked for it. But not in the session's own
sandbox, whose files are none of its business. A sandbox is made for one build, and the result is moved out while
nothing runs in there: whatever was started in it is dead by then.

A build reaches the package indexes of the host's tools through the service (ports.Indexes), also where the session has
no internet. So it needs neither credentials nor network access of its own.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from era.core import jsontext
from era.core.execution.execution import Execution, Grants
from era.core.limits import Rules
from era.core.models import Language, Session, Snapshot, Trim, command_of
from era.core.pool.pool import SandboxPool
from era.core.ports import Indexes, Network, Sandbox
from era.core.program import Ended, Invocation, Output, Program
from era.core.sessions.versions import HistoryBound
from era.core.setup.progress import LastWords, Progress, Say
from era.core.trees.snapshots import Snapshots
from era.core.trees.trees import SnapshotRefused
from era.errors import SandboxFailed, Unavailable

_HINT = "Change it with PATCH /api/sessions/{id}, or try again with POST /api/sessions/{id}/setup."


@dataclass(slots=True)
class CommandsResult(LastWords):
    """How the commands of a setup went, with the end of their output."""

    ran: list[str] = field(default_factory=list)
    """The commands that were started."""

    snapshot: Snapshot | None = None
    """The working directory they left; None after an error."""

    error: str | None = None


class Commands:
    def __init__(self, pool: SandboxPool, network: Network, snapshots: Snapshots, history: HistoryBound) -> None:
        self._history = history
        self._pool = pool
        self._network = network
        self._snapshots = snapshots

    async def run(
        self,
        session: Session,
        commands: Sequence[str],
        package_set: str | None,
        deadline: float,
        progress: Progress,
        naming: ExitStack,
    ) -> CommandsResult:
        """Run commands in the session's sandbox, with the packages of the set `package_set` (a digest), until
        `deadline` of the monotonic clock at most. Nothing else may run in that sandbox. The caller then calls `keep` or
        `drop`. What the commands left stays until `naming` closes, and by then a row has to name it. Raises EraError
        where no sandbox can be had."""
        result = CommandsResult()
        if not session.persistent:
            result.error = "This session is not persistent: it keeps no files, so commands could leave none. " + _HINT
            return result
        if self._pool.is_busy(session.key):  # as that of a session whose packages were lost under a run
            raise Unavailable("Something else is under way in the session's sandbox.")
        sandbox = await self._pool.acquire(replace(session, package_set=package_set))
        try:
            for left, command in zip(range(len(commands) - 1, -1, -1), commands, strict=True):
                result.ran.append(command)
                problem = await self._run_one(sandbox, session, command, deadline, (result, progress), is_last=not left)
                progress.flush()
                if problem is not None:
                    result.error = problem
                    return result
            naming.enter_context(self._snapshots.blobs.naming())
            result.snapshot = await self._snapshots.take(sandbox, session.snapshot, session_id=session.owned_id)
            return result
        except SnapshotRefused as problem:
            result.error = f"What the commands left can't be kept: {problem}. Have them leave less, or raise 'limits'."
            return result
        except SandboxFailed as problem:
            result.error = f"The sandbox failed under a command: {problem.message} {_HINT}"
            return result
        except BaseException:
            await self.drop(session.key)
            raise

    async def _run_one(
        self,
        sandbox: Sandbox,
        session: Session,
        command: str,
        deadline: float,
        listeners: Sequence[LastWords | Progress],
        *,
        is_last: bool,
    ) -> str | None:
        """Run one command, and give what it says to `listeners`. Returns the error if it failed."""

        async def write(output: Output) -> None:
            for each in listeners:
                each.say(output.stream, output.data)

        await write(Output("stdout", f"$ {command}\n".encode()))
        program = Program(
            state=jsontext.state_file(session.data),
            timeout=max(0.1, deadline - time.monotonic()),
            keeps_scratch=not is_last,
            invocation=Invocation(command=command_of(command)),
        )
        execution = Execution(sandbox, program, Grants.of(session), self._network, before=session.snapshot)
        return _problem(command, await execution.run(write))

    async def trim(self, session: Session, snapshot: Snapshot | None) -> Trim | None:
        """What must go of the session's history with this snapshot's becoming a version."""
        return await self._history.trim(session, snapshot)

    async def keep(self, session: Session, snapshot: Snapshot) -> None:
        """Keep the sandbox warm, since what the commands left in it is now the session's version, as `snapshot`."""
        self._pool.committed(session.key, snapshot)

    async def drop(self, session_key: int) -> None:
        """Close the sandbox, since what the commands left in it is not committed."""
        await self._pool.release(session_key)


def _problem(command: str, ended: Ended) -> str | None:
    """The error for a command that ended so, None if it succeeded."""
    problem = failure(ended)
    if problem is None:
        return None
    if ended.cause == "exit" and ended.disk_problem is None:
        problem += "; 'stdout' and 'stderr' have its last words"
    shown = command if len(command) <= 200 else f"{command[:200]}…"
    return f"The command {shown!r} {problem}. Nothing of the commands is kept. {_HINT}"


def failure(ended: Ended) -> str | None:
    """How a program of a setup failed, as a predicate ("was out of memory; …"); None if it succeeded."""
    if ended.cause == "exit" and ended.exit_code == 0 and ended.disk_problem is None:
        return None
    match ended.cause:
        case "timeout":
            return "took too long; the server's ERA_SETUP_SECONDS sets the bound"
        case "oom":
            return "was out of memory; the session's 'limits' set the bound"
        case "disk_full":
            return f"was out of disk space ({ended.disk_problem}); the session's 'limits' set the bound"
        case "exit":
            return f"ended with exit code {ended.exit_code}"
        case _:
            return f"was killed (exit code {ended.exit_code})"


class Build:
    """Builds packages for one session, with that session's isolation, limits and network. What was built is used by no
    other session: `owner` says which one it belongs to. `session_owner` is the session's own."""

    def __init__(self, pool: SandboxPool, network: Network, indexes: Indexes, rules: Rules, session: Session) -> None:
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


type Builds = Callable[[Session], Build]
"""Makes the Build of a session that installs packages."""


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
