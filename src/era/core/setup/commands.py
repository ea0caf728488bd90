"""The commands of a setup: run in the session's own sandbox, before anything else runs there.

Theory of operation. A command is a program like any other: it has the session's isolation, limits and network, its
files and packages. One after the other they run in one sandbox, which is then the session's; the first that fails ends
it, and then nothing of theirs is kept. Their output goes to the session's own result and nowhere else.

While a setup is under way no run begins, so the session's sandbox is ours; but its files can be changed over HTTP all
the same. The store takes what commands have left only if they began with the version that is in force then. If not,
they are run once more, with the new files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from era.core import jsontext
from era.core.files.allowance import bounded
from era.core.models import Session, Snapshot, command_of
from era.core.ports import Ended, Network, Program, SandboxPool, SnapshotRefused, SnapshotStore
from era.core.setup.progress import LastWords, Progress
from era.core.setup.requirements import variables
from era.errors import SandboxFailed

_HINT = "Change it with PATCH /api/sessions/{id}, or try again with POST /api/sessions/{id}/setup."


@dataclass(slots=True)
class Commanded(LastWords):
    """How a setup's commands went: those that were run, the end of what they said, what they left in the working
    directory, and why it isn't kept, where it isn't."""

    ran: list[str] = field(default_factory=list)
    snapshot: Snapshot | None = None
    error: str | None = None


class Commands:
    def __init__(self, pool: SandboxPool, network: Network, snapshots: SnapshotStore) -> None:
        self._pool = pool
        self._network = network
        self._snapshots = snapshots

    async def run(
        self, session: Session, commands: Sequence[str], environment: str | None, deadline: float, progress: Progress
    ) -> Commanded:
        """Run them in the session's sandbox, with the packages of `environment`, until `deadline` of the monotonic
        clock at most. Nobody else may be in that sandbox. Call `kept` or `dropped` then. Raises EraError where there is
        no sandbox to be had."""
        told = Commanded()
        if not session.persistent:
            told.error = "This session is not persistent: it keeps no files, so commands could leave none. " + _HINT
            return told
        sandbox = await self._pool.acquire(replace(session, environment=environment))
        try:
            for command in commands:
                told.ran.append(command)
                shown = f"$ {command}\n".encode()
                told.say("stdout", shown)
                progress.say("stdout", shown)
                run_egress = self._network.run_egress(sandbox, internet=session.allow_internet, egress=session.egress)
                program = Program(
                    code=b"",
                    state=jsontext.state_file(jsontext.loads(session.data.encode())),
                    env={
                        **variables(session.setup),
                        "ERA_SESSION": "true",
                        "ERA_SESSION_ID": session.id,
                        "ERA_LANGUAGE": session.language,
                    },
                    timeout=max(0.1, deadline - time.monotonic()),
                    ephemeral=False,
                    files={},
                    certificates=run_egress.certificates,
                    supervised=run_egress.supervised,
                    command=command_of(command),
                )
                ended: Ended | None = None
                async with run_egress:
                    async for event in bounded(sandbox, program, session.snapshot):
                        if isinstance(event, Ended):
                            ended = event
                        else:
                            told.say(event.stream, event.data)
                            progress.say(event.stream, event.data)
                progress.flush()
                if ended is None:
                    raise SandboxFailed("The sandbox did not say how a command ended.")
                told.error = _problem(command, ended)
                if told.error is not None:
                    return told
            told.snapshot = await self._snapshots.take(sandbox, session.snapshot)
            return told
        except SnapshotRefused as problem:
            told.error = f"What the commands left can't be kept: {problem}. Have them leave less, or raise 'limits'."
            return told
        except SandboxFailed as problem:
            told.error = f"The sandbox failed under a command: {problem.message} {_HINT}"
            return told
        except BaseException:
            await self.dropped(session.key)
            raise

    async def kept(self, session: Session, snapshot: Snapshot) -> None:
        """What commands left is the session's now."""
        self._pool.committed(session.key, snapshot)

    async def dropped(self, session_key: int) -> None:
        """What commands left must not be used."""
        await self._pool.release(session_key)


def _problem(command: str, ended: Ended) -> str | None:
    """Why a command that ended so has failed, None where it hasn't."""
    problem = how(ended)
    if problem is None:
        return None
    if ended.cause == "exit" and ended.disk_problem is None:
        problem += "; 'stdout' and 'stderr' have its last words"
    shown = command if len(command) <= 200 else f"{command[:200]}…"
    return f"The command {shown!r} {problem}. Nothing of the commands is kept. {_HINT}"


def how(ended: Ended) -> str | None:
    """How a program of a setup has failed, to complete a sentence; None where it hasn't."""
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
