"""The path of one run in a session: sandbox, program, files, commit.

Theory of operation. `SessionRun.result` is the whole path, and each step is a method; they stand in the order in which
they are taken. The session's turn is held, and the run is on record as `running`, before it begins (runs.py).

Where anything between the sandbox and the commit goes wrong, the working directory is no longer known to be the
committed one. The sandbox is then thrown away, and the next run gets a new one, filled from the last snapshot. So the
session is always what its row says, and the row changes in one transaction or not at all.

The sandbox of a live session is held for its processes (live/). A run gets it as it is, and what it commits is the tree
of one moment, in which processes stand still. Where that sandbox has to be thrown away, its processes are told why.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from functools import partial

import structlog

from era.core import jsontext
from era.core.concurrency.late_ends import LateEnds
from era.core.concurrency.turns import Liveness
from era.core.execution.active_runs import ActiveRun
from era.core.execution.execution import Execution, Grants, keep_output, status_of
from era.core.execution.run_messages import (
    Emit,
    RunRequest,
    RunResult,
    RunStarted,
    recorded_program,
    result_of,
    setup_error,
)
from era.core.limits import Rules
from era.core.live.contexts import CellExecution, Contexts
from era.core.metadata import MetadataStore
from era.core.models import (
    STATE_FILE,
    Answered,
    JsonObject,
    OwnedId,
    RunRecord,
    Session,
    Snapshot,
    Status,
    command_of,
    now,
)
from era.core.owners.quotas import Quotas
from era.core.owners.usage import UsageStore, use_of
from era.core.pool.admission import Slot
from era.core.pool.pool import NEVER_BEGUN, SandboxPool
from era.core.ports import Network, Sandbox, StorageAccesses
from era.core.program import Ended, Invocation, Program
from era.core.runs.outputs import Outputs
from era.core.sessions.versions import HistoryBound
from era.core.telemetry import Note, RunEnded, ignore
from era.core.trees.live_snapshots import LiveSnapshots
from era.core.trees.snapshots import Snapshots
from era.core.trees.trees import SnapshotRefused, WorkspaceFull
from era.errors import (
    BeingStopped,
    CommitFailed,
    EraError,
    QuotaReached,
    SandboxFailed,
    SessionDeleted,
    TooBusy,
    Unavailable,
)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RunParts:
    """The parts of the service that a run works with."""

    store: MetadataStore
    pool: SandboxPool
    network: Network
    storage: StorageAccesses
    snapshots: Snapshots
    outputs: Outputs
    history: HistoryBound
    liveness: Liveness
    contexts: Contexts
    moments: LiveSnapshots
    quotas: Quotas
    usage: UsageStore
    rules: Rules
    note: Note = ignore
    trace_programs: bool = False
    """Whether programs get TRACEPARENT."""

    late_ends: LateEnds = field(default_factory=LateEnds)

    def traceparent(self, told: RunEnded) -> dict[str, str]:
        """The variable by which a run's program learns where it is in a trace, if it is to learn it."""
        return {"TRACEPARENT": told.trace.traceparent} if self.trace_programs and told.trace else {}


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What is to be committed of a run."""

    status: Status
    data: str | None = None
    """The session's new data as JSON text, None where it stays as it is."""

    snapshot: Snapshot | None = None
    """The session's new files, None where they stay as they are."""

    artifacts: JsonObject = field(default_factory=dict)
    problem: str | None = None
    """Why the run makes no version, if it can't."""

    goes_on: bool = False
    """Whether the sandbox can stay, though the run makes no version."""


_HOST_STOPPED = "The host was stopped or drained while the run was under way, which ended it."


class SessionRun:
    """One run, for the session whose turn the caller holds. It is used once."""

    def __init__(
        self,
        parts: RunParts,
        active: ActiveRun,
        session: Session,
        request: RunRequest,
        slot: Slot,
        emit: Emit,
        told: RunEnded,
        recorded: asyncio.Future[Session],
    ) -> None:
        """`session` is its row as it was when the run was recorded. `emit` is called once there is a sandbox and the
        record is kept: `recorded` says so, or raises. `told` is what operators will be told of the run, and is filled
        in."""
        self._parts = parts
        self._active = active
        self._session = session
        self._request = request
        self._slot = slot
        self._emit = emit
        self._told = told
        self._recorded = recorded
        self._started = False
        """Whether the caller has been told of this run."""

        program = recorded_program(request, session)
        self._record = RunRecord(
            active.run_id,
            session.key,
            "running",
            started_at=now(),
            setup_error=setup_error(session),
            code=program.code,
            invocation=program.invocation,
        )
        self._has_ended = False
        """Its program has, and what it left has been given to the store."""

        self._was_refused = False
        """Its cell got no interpreter, and the session is as it was."""

    async def result(self) -> RunResult:
        """Run the program and commit what it leaves; durable when this returns. Raises EraError where nothing of the
        run could be kept."""
        try:
            try:
                return await self._attempt()
            except SandboxFailed:
                # It died before the program began, so nothing has run yet: once more, in a new one. But it may have
                # been closed because the session was deleted.
                if not await self._parts.store.present_sessions([self._session.key]):
                    raise SessionDeleted(NEVER_BEGUN) from None
                return await self._attempt()
        except BaseException as error:
            await self._end_without_result(error)
            raise

    async def _attempt(self) -> RunResult:
        """All steps, in one sandbox. Raises SandboxFailed where the program has not begun."""
        session, pool = self._session, self._parts.pool
        sandbox = self._active.sandbox = await pool.acquire(session)
        self._slot.use(sandbox)
        self._told.sandbox_id = sandbox.id
        self._told.stages.end("sandbox")
        execution: Execution | CellExecution | None = None
        try:
            execution = self._execution(sandbox)
            ended = await execution.run(partial(keep_output, self._active.transcript))
            self._told.stages.end("program")
            with self._parts.snapshots.blobs.naming():
                outcome = await self._outcome(execution, ended)
                if pool.was_released(sandbox):
                    # The session may be restored by now, but its files may have been read while they went.
                    raise SessionDeleted("The session was deleted while this run was under way.")
                self._told.stages.end("files")
                try:
                    result = await self._commit(execution, ended, outcome)
                except QuotaReached as error:
                    outcome = _Outcome("disk_full", problem=_nothing_kept(error.message.rstrip(".")))
                    result = await self._commit(execution, ended, outcome)
            if outcome.problem is None or outcome.goes_on:
                pool.committed(session.key, outcome.snapshot or session.snapshot)
            else:
                await pool.discard(sandbox, self._remade(outcome.problem))
            return result
        except BaseException as error:
            if _is_refusal(execution, error):
                self._was_refused = True
                pool.committed(session.key, session.snapshot)  # the sandbox, and all that runs in it, goes on
                raise
            await pool.discard(sandbox, self._remade(error.message if isinstance(error, EraError) else "it failed."))
            if isinstance(error, SandboxFailed):
                await self._may_begin()  # a run that is on record and had a sandbox is told of, however it ends
            raise

    async def _may_begin(self) -> None:
        """Wait until the run is on record, and tell its caller. The sandbox makes all ready meanwhile."""
        if not self._recorded.done():
            await asyncio.wait({self._recorded})
        self._recorded.result()
        if not self._started:
            self._started = True
            self._active.begun_at = time.monotonic()
            self._emit(RunStarted(self._active.run_id, self._active.transcript, self._active))

    def _remade(self, why: str) -> str:
        """What processes of the session are told that end with the sandbox."""
        return f"The session's sandbox was made anew, since run '{self._active.run_id}' could not be kept: {why}"

    def _execution(self, sandbox: Sandbox) -> Execution | CellExecution:
        """The program, with the session's settings."""
        session, request, parts = self._session, self._request, self._parts
        code = request.code if request.code is not None else session.stored.code if session.stored else ""
        live = session.key in parts.liveness
        command = command_of(request.service)
        program = Program(
            code=code.encode(),
            state=jsontext.state_file(session.data),
            env=request.env,
            timeout=request.timeout or session.default_timeout,
            ephemeral=not session.persistent and not live,
            keeps_scratch=live,
            invocation=Invocation(command=command) if command else request.invocation,
            may_begin=self._may_begin,
        )
        if request.context is not None:
            return CellExecution(parts.contexts, self._active, session, sandbox, request, program)
        grants = Grants.of(session, request.base_url, request.secrets)
        grants = replace(grants, variables={**parts.traceparent(self._told), **grants.variables})
        return Execution(sandbox, program, grants, parts.network, parts.storage, before=session.snapshot)

    async def _outcome(self, execution: Execution | CellExecution, ended: Ended) -> _Outcome:
        """What can be kept of the run. Its files are durable when this returns, but no row names them yet."""
        session, snapshots = self._session, self._parts.snapshots
        status = status_of(ended)
        if not ended.sandbox_alive and self._parts.pool.is_stopped:
            return _Outcome(status, problem=_HOST_STOPPED)
        if self._request.atomic and status != "ok":
            return _Outcome(status, problem=_nothing_kept(f"atomic: {_ending(ended)}"))
        if ended.disk_problem is not None:
            return _Outcome(status, problem=_nothing_kept(ended.disk_problem))
        data, problem = await _new_data(execution.state, session.data, ended)
        if problem is not None:
            return self._without_data(status, problem, ended)
        if not session.persistent:
            return _Outcome(status, data)
        try:
            snapshot = await self._taken(execution.sandbox, ended.entry)
            artifacts = await snapshots.artifacts(session.snapshot, snapshot, session.owned_id)
        except SnapshotRefused as error:
            status = "disk_full" if isinstance(error, WorkspaceFull) else status
            return _Outcome(status, problem=_nothing_kept(str(error)))
        return _Outcome(status, data, None if snapshot.root == session.snapshot.root else snapshot, artifacts)

    def _without_data(self, status: Status, problem: str, ended: Ended) -> _Outcome:
        """What is to be committed of a run whose state file can't be used. In a live session the tree is the truth, the
        run's files included, so nothing has to be undone and its processes go on."""
        if not ended.sandbox_alive:
            return _Outcome(status, problem=problem)
        if self._session.key not in self._parts.liveness:
            return _Outcome(status, problem=_nothing_kept(problem))
        files = "files are in the live session's tree, which its next checkpoint keeps"
        return _Outcome(status, problem=f"{problem}; data stays as it was, {files}.", goes_on=True)

    async def _taken(self, sandbox: Sandbox, entry: str | None) -> Snapshot:
        """What the working directory holds, durable. In a live session processes go on in it. Raises as Snapshots.take
        does."""
        before = self._session.snapshot
        if self._session.key in self._parts.liveness:
            return (await self._parts.moments.take(sandbox, before, entry, session_id=self._session.owned_id)).snapshot
        self._active.joinable = False  # nothing may begin there while it is looked at as if nothing could
        return await self._parts.snapshots.take(sandbox, before, entry, session_id=self._session.owned_id)

    async def _commit(self, execution: Execution | CellExecution, ended: Ended, outcome: _Outcome) -> RunResult:
        """Record the run, and move the session to its next version if it changed anything, in one transaction. Raises
        CommitFailed, SessionDeleted, and QuotaReached where nothing was stored."""
        session, claim = self._session, self._request.claim
        transcript = self._active.transcript
        outputs = await self._parts.outputs.keep(transcript, execution.answer, always=claim is not None)
        data = session.data if outcome.data is None else outcome.data
        answered = Answered(claim, data, outputs) if claim else None
        record = replace(
            self._record,
            status=outcome.status,
            ended_at=now(),
            exit_code=ended.exit_code,
            duration_us=int(ended.duration * 1e6),
            stdout_bytes=transcript.stdout.size,
            stderr_bytes=transcript.stderr.size,
            pieces=transcript.count,
            stdout_truncated=ended.stdout_truncated,
            stderr_truncated=ended.stderr_truncated,
            committed=outcome.problem is None,
            reason=outcome.problem,
            peak_memory_bytes=ended.peak_memory_bytes,
            cpu_us=ended.cpu_us,
            reaped=ended.reaped,
            enforced={**execution.sandbox.enforced, **execution.enforced},
            egress=execution.report(),
            artifacts=outcome.artifacts,
        )
        trim = await self._parts.history.trim(session, outcome.snapshot)
        self._told.stages.end("outputs")
        self._has_ended = True
        use = use_of(self._active.session_id, record.cpu_us, record.egress)
        record = await self._parts.store.end_run(
            record,
            data=outcome.data,
            snapshot=outcome.snapshot,
            outputs=outputs,
            answered=answered,
            trim=trim,
            who=self._active.session_id,
            use=use,
        )
        self._told.stages.end("transaction")
        self._told.ended(record.status, ended, record.committed, record.egress)
        self._parts.quotas.used(use)
        return result_of(session, record, await jsontext.stored(data), cell=execution.answer)

    async def _end_without_result(self, error: BaseException) -> None:
        """Record a run of which nothing could be kept. Where the database is away, that is tried until it is there;
        where the service stops before, the run is found `running` at the next start and recorded as lost."""
        await asyncio.wait({self._recorded})
        unknown = self._recorded.exception()
        if unknown is not None and not (isinstance(unknown, Unavailable) and unknown.may_have_committed):
            return
        if isinstance(error, SessionDeleted) and self._has_ended:
            return  # It was recorded when its session was found gone.
        reason = error.message if isinstance(error, EraError) else "The service failed."
        ended = replace(self._record, status="failed", ended_at=now(), reason=reason)
        # Where no sandbox could be had the program hasn't run, and may be run by the next request with its key.
        refused = isinstance(error, Unavailable | TooBusy) and not isinstance(error, CommitFailed)
        has_not_run = refused or self._was_refused
        # But a caller who has been told of a background run finds it by its key.
        told = self._started and self._request.background
        claim = self._request.claim if has_not_run and not told else None
        released = Answered(claim) if claim else None
        record = partial(record_end, self._parts.store, self._active.session_id, ended, released)
        if unknown is not None or not await record(is_first=True):
            self._parts.late_ends.add(record)


async def record_end(
    store: MetadataStore, who: OwnedId, ended: RunRecord, released: Answered | None, *, is_first: bool = False
) -> bool:
    """Record the end of a run of which nothing was kept; whether that needn't be tried again."""
    try:
        await store.end_run(ended, data=None, snapshot=None, answered=released, who=who, use=use_of(who, None, {}))
    except SessionDeleted:
        return True  # Its record is all that was written.
    except EraError as error:
        # Those that are more than that say that it isn't on record as running, or is at home elsewhere.
        is_over = type(error) is not CommitFailed
        if is_first or is_over:  # else the log has it
            log.warning("run_not_recorded", run=ended.id, error=error.message)
        return is_over
    return True


def _is_refusal(execution: Execution | CellExecution | None, error: BaseException) -> bool:
    """Whether this is the refusal of a cell of which nothing has been executed, in a sandbox that is as it was."""
    if isinstance(error, BeingStopped):
        return True
    refused = isinstance(execution, CellExecution) and not execution.had_interpreter
    return refused and isinstance(error, EraError) and not isinstance(error, SandboxFailed)


async def _new_data(given: bytes, before: str, ended: Ended) -> tuple[str | None, str | None]:
    """The session's new data as JSON text, None where it stays as it is; and why the state file can't be used, if it
    can't. `given` is the state file as the program got it, `before` the session's data as JSON text."""
    if ended.state_problem is not None:
        return None, f"{STATE_FILE} {ended.state_problem}" if ended.sandbox_alive else ended.state_problem
    if ended.state is None or ended.state == given:
        return None, None
    try:
        data = await jsontext.read_state(ended.state)
    except jsontext.JsonProblem as error:
        return None, f"{STATE_FILE} {error}"
    return (None if data == before else data), None


def _nothing_kept(why: str) -> str:
    return f"{why}; data and files stay as they were."


def _ending(ended: Ended) -> str:
    """How a run that is not ok ended, in words."""
    match ended.cause:
        case "timeout":
            return "the run reached its timeout"
        case "oom":
            return "the run was out of memory"
        case "disk_full":
            return "the run was out of disk space"
        case "exit":
            return f"the run ended with exit code {ended.exit_code}"
        case _:
            return "the run was killed"
