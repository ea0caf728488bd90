"""One cell in a context, from its start to its end: what execution.py is for programs that end."""

from __future__ import annotations

from dataclasses import replace

from era.core.active_runs import ActiveRun
from era.core.cells import CellRun, CellRunEnded, Contexts, StopCell, WriteCell
from era.core.execution import OURS
from era.core.models import JsonObject, Session
from era.core.ports import Sandbox
from era.core.program import Ended, Program
from era.core.run_messages import RunRequest
from era.core.secrets import placeholders


class CellExecution:
    """The cell of one request, ready to be executed. `run` may be called once."""

    def __init__(
        self,
        contexts: Contexts,
        active: ActiveRun,
        session: Session,
        sandbox: Sandbox,
        request: RunRequest,
        program: Program,
    ) -> None:
        """`sandbox` is the session's, which the run has acquired. `program` has the variables of its own only."""
        self.sandbox = sandbox
        self.state = program.state
        self.answer: JsonObject | None = None
        """What the run's answer says of the cell, once that has ended."""

        self.had_interpreter = False
        """Whether it came as far as to an interpreter. Until then nothing of it has been executed."""

        self._contexts = contexts
        self._active = active
        self._session = session
        self._enforced: JsonObject = {}
        env = {**program.env, **placeholders(request.secrets)}
        self._request = CellRun(
            request.context or "",
            request.base_url,
            replace(program, env={name: value for name, value in env.items() if name not in OURS}),
            sandbox.limits.output_bytes,
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
        if self._request.program.may_begin is not None:
            await self._request.program.may_begin()
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
