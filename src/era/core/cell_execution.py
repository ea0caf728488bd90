"""One cell in a context, from its start to its end: what execution.py is for programs that end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from era.core.active_runs import ActiveRun
from era.core.cells import Cell, CellRun, CellRunEnded, Contexts, StopCell, WriteCell
from era.core.models import JsonObject, Session
from era.core.ports import Sandbox
from era.core.program import Ended
from era.core.run_messages import RunRequest
from era.core.secrets import placeholders

_OURS = frozenset({"ERA_SESSION", "ERA_SESSION_ID", "ERA_LANGUAGE", "ERA_BASE_URL", "ERA_PROXY_URL", "ERA_STORAGE_URL"})
"""Variables that a caller can't set."""


class CellExecution:
    """The cell of one request, ready to be executed. `run` may be called once."""

    def __init__(
        self,
        contexts: Contexts,
        active: ActiveRun,
        session: Session,
        sandbox: Sandbox,
        request: RunRequest,
        *,
        code: str,
        state: bytes,
        may_begin: Callable[[], Awaitable[None]],
    ) -> None:
        """`sandbox` is the session's, which the run has acquired. `state` is the content of the state file. `may_begin`
        is waited for before anything is executed."""
        self.sandbox = sandbox
        self.state = state
        self.answer: JsonObject | None = None
        """What the run's answer says of the cell, once that has ended."""

        self.had_interpreter = False
        """Whether it came as far as to an interpreter. Until then nothing of it has been executed."""

        self._contexts = contexts
        self._may_begin = may_begin
        self._active = active
        self._session = session
        self._enforced: JsonObject = {}
        env = {**request.env, **placeholders(request.secrets)}
        invocation = request.invocation
        self._request = CellRun(
            request.context or "",
            request.base_url,
            Cell(
                code,
                {name: value for name, value in env.items() if name not in _OURS},
                invocation.stdin.decode(),
                invocation.cwd,
                request.timeout or session.default_timeout,
                sandbox.limits.output_bytes,
            ),
            state,
            request.secrets,
        )

    @property
    def enforced(self) -> JsonObject:
        """What is in force for the cell besides the sandbox's own, for records."""
        return self._enforced

    def report(self) -> JsonObject:
        """Where it connected isn't known: connections are those of all the session's processes."""
        return {}

    async def run(self, write: WriteCell) -> Ended:
        """Execute the cell; `write` gets its output and events as they come, and is waited for. Raises as Contexts.run
        does."""
        await self._may_begin()
        ended = await self._contexts.run(self._session, self._request, write, self._begun)
        self._enforced = ended.enforced
        self.answer = _answer(self._request.context, ended)
        outcome = ended.outcome
        return Ended(
            exit_code=outcome.exit_code,
            cause=outcome.cause if ended.disk_problem is None else "disk_full",
            duration=outcome.duration,
            state=ended.state,
            state_problem=ended.state_problem,
            stdout_truncated=outcome.stdout_truncated,
            stderr_truncated=outcome.stderr_truncated,
            reaped=0,
            peak_memory_bytes=None,
            cpu_us=None,
            sandbox_alive=outcome.sandbox_alive,
            disk_problem=ended.disk_problem,
        )

    def _begun(self, stop: StopCell) -> None:
        self.had_interpreter = True
        self._active.begun_cell(stop)


def _answer(context: str, ended: CellRunEnded) -> JsonObject:
    """The fields of an answer that only runs in contexts have."""
    outcome = ended.outcome
    return {
        "context": context,
        "results": outcome.results,
        "results_truncated": outcome.results_truncated,
        "error": outcome.error,
        "execution_count": outcome.execution_count,
        "memory": {"kept": ended.lost is None, "reason": ended.lost},
    }
