"""One program in one sandbox, with its egress and its access to the storage, from its start to its end.

A run in a session and one outside of any (`/api/execute`) are the same here. What becomes of the state and the files
that the program leaves is for the caller to decide.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from era.core.cells import CellEvent
from era.core.files.allowance import bounded
from era.core.models import EMPTY, JsonObject, Language, Snapshot, Status
from era.core.ports import Network, Sandbox, StorageAccesses
from era.core.program import CODE_ALONE, Ended, Invocation, Output, Program
from era.core.run_messages import ExecuteRequest, RunRequest
from era.core.secrets import placeholders
from era.core.transcript import Transcript
from era.errors import CommitFailed


class Execution:
    """The program of one request, ready to run in a sandbox. `run` may be called once."""

    def __init__(
        self,
        sandbox: Sandbox,
        network: Network,
        storage: StorageAccesses,
        request: RunRequest | ExecuteRequest,
        *,
        session_id: str,
        owner: str,
        language: Language,
        code: str,
        state: bytes,
        timeout: float,
        internet: bool,
        egress: JsonObject,
        storage_owner: str | None,
        variables: Mapping[str, str] | None = None,
        before: Snapshot = EMPTY,
        ephemeral: bool = False,
        keeps_scratch: bool = False,
        files: Mapping[str, bytes] | None = None,
        invocation: Invocation = CODE_ALONE,
        may_begin: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """The request gives `env`, secrets and the server's URL; the rest is what a session and a request outside of
        any say in different ways.

        `session_id` is what the program is told as ERA_SESSION_ID. `owner` is who has it run. `storage_owner` is whose
        storage it may use, None for nobody's. `variables` are those of the session's setup, which `env` overrides.
        `before` is what the working directory holds already. For the others see Program.
        """
        self.sandbox = sandbox
        self.egress = network.run_egress(
            sandbox, owner=owner, internet=internet, egress=egress, secrets=request.secrets
        )
        self._storage = storage.access(sandbox, storage_owner)
        self._before = before
        self.state = state
        self.answer: JsonObject | None = None
        """What only cells answer (cell_execution.py)."""

        self.program = Program(
            code=code.encode(),
            state=state,
            env=environment(
                {**(variables or {}), **request.env, **placeholders(request.secrets)},
                session_id,
                language,
                request.base_url,
                None if storage_owner is None else self._storage.url or request.base_url,
            ),
            timeout=timeout,
            ephemeral=ephemeral,
            keeps_scratch=keeps_scratch,
            files=files or {},
            invocation=invocation,
            certificates=self.egress.certificates,
            supervised=self.egress.supervised,
            may_begin=may_begin,
        )

    @property
    def enforced(self) -> JsonObject:
        """What network it has, for records."""
        return self.egress.enforced

    def report(self) -> JsonObject:
        """Where it connected, once it has ended."""
        return self.egress.report()

    async def run(self, write: Callable[[Output], Awaitable[None]]) -> Ended:
        """Run the program to its end; `write` gets its output as it comes, and is waited for.

        Raises SandboxFailed if the sandbox was found dead before the program began: it has not run then. Whatever else
        is raised, it may have.
        """
        ended: Ended | None = None
        async with self.egress, self._storage:
            async for event in bounded(self.sandbox, self.program, self._before):
                if isinstance(event, Ended):
                    ended = event
                else:
                    await write(event)
        if ended is None:
            # Not SandboxFailed, after which it would be run once more.
            raise CommitFailed("The sandbox did not say how the run ended.")
        return ended


async def keep_output(transcript: Transcript, output: Output | CellEvent) -> None:
    """Keep what a program has written or a cell has shown. Raises CommitFailed where the disk fails."""
    try:
        if isinstance(output, CellEvent):
            await transcript.append_event(output.content)
        else:
            await transcript.append(output)
    except OSError as error:
        raise CommitFailed(f"the output of this run could not be kept: {error.strerror}") from error


def status_of(ended: Ended) -> Status:
    """The status of a run whose program ended so."""
    if ended.cause == "exit":
        return "ok" if ended.exit_code == 0 else "failed"
    return "killed" if ended.cause == "signal" else ended.cause


def environment(
    variables: Mapping[str, str], session_id: str, language: Language, base_url: str, storage_url: str | None
) -> dict[str, str]:
    """A program's environment: `variables`, and the service's own, which win. Without storage there is no
    ERA_STORAGE_URL, even if `variables` have one."""
    env = {
        **variables,
        "ERA_SESSION": "true",
        "ERA_SESSION_ID": session_id,
        "ERA_LANGUAGE": language,
        "ERA_BASE_URL": base_url,
        "ERA_PROXY_URL": f"{base_url}/proxy/{session_id}",
    }
    if storage_url is None:
        env.pop("ERA_STORAGE_URL", None)
    else:
        env["ERA_STORAGE_URL"] = storage_url
    return env
