"""Runs: state and files into a sandbox, the program, state and files out, one commit, then the answer.

Theory of operation
===================

`_run` is the whole path of a run in a session, in order. It executes as a task of its own, so a caller that hangs up
neither stops a program halfway nor loses its commit. `stream` hands on what that task reports as it happens; `collect`
is its fold and gives the plain answer.

Where anything between the sandbox and the commit goes wrong, the live working directory is no longer known to be the
committed one. The sandbox is then thrown away, and the next run gets a new one, filled from the last snapshot. So the
session is always what its row says, and the row changes in one transaction or not at all.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from era.core import jsontext
from era.core.active_runs import ActiveRun, ActiveRuns
from era.core.files.allowance import bounded
from era.core.idempotency import IdempotencyKeys, no_answer
from era.core.metadata import MetadataStore
from era.core.models import (
    EMPTY,
    STATE_FILE,
    Answered,
    Claim,
    Claimed,
    JsonObject,
    Language,
    OwnedId,
    RunRecord,
    ServiceCommand,
    Session,
    Snapshot,
    StateOutcome,
    Status,
    WantedIsolation,
    command_of,
    new_id,
    now,
)
from era.core.outputs import STREAMS, Outputs
from era.core.ports import (
    Ended,
    Limits,
    Network,
    Output,
    Program,
    Sandbox,
    SandboxPool,
    SnapshotRefused,
    SnapshotStore,
    StorageAccesses,
    WorkspaceFull,
)
from era.core.secrets import Secret, placeholders
from era.core.setup.requirements import variables
from era.core.turns import Turns
from era.core.views import data_view
from era.errors import (
    CommitFailed,
    EraError,
    Forbidden,
    NoCode,
    NotFound,
    SandboxFailed,
    SessionDeleted,
    SetupUnderWay,
    Unavailable,
)

log = structlog.get_logger()

DEFAULT_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What a caller asks for. `base_url` is how it reached us, for the program's ERA_BASE_URL."""

    base_url: str
    code: str | None = field(default=None, repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout: float | None = None
    atomic: bool = False
    """Keep what the run leaves only if it ends with exit code 0."""

    claim: Claim | None = None
    background: bool = False
    """Whether nobody waits for its end."""

    service: ServiceCommand | None = None
    """What is started instead of code. Such a run ends when somebody else wants the session's turn."""

    public: bool = False
    """Whether it comes through the session's public URL, and so from anybody."""

    session_key: int | None = None
    """The session that is meant, where the id could be another one's by now. Only for stored code."""

    secrets: Sequence[Secret] = ()


@dataclass(frozen=True, slots=True)
class ExecuteRequest:
    """A run outside any session. Its programs get to the storage of `owner`."""

    owner: str
    base_url: str
    language: Language
    code: str = field(repr=False)
    env: Mapping[str, str] = field(repr=False)
    timeout: float | None
    files: Mapping[str, bytes] = field(repr=False)
    isolation: WantedIsolation = "auto"
    limits: Limits | None = None
    """The server's defaults where there are none."""

    allow_internet: bool = True
    secrets: Sequence[Secret] = ()


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended, without its output."""

    run_id: str
    session_id: str
    status: Status
    exit_code: int
    duration: float
    data: JsonObject
    stdout_truncated: bool
    stderr_truncated: bool
    state: StateOutcome
    artifacts: JsonObject = field(default_factory=dict)
    """As on the record."""

    replayed: bool = False
    """This is the answer of an earlier run with the same idempotency key."""


@dataclass(frozen=True, slots=True)
class Collected:
    """A run's result with all of its output."""

    result: RunResult
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run has its turn and is on record."""

    run_id: str


@dataclass(frozen=True, slots=True)
class Begun:
    """A run that goes on in the background."""

    run_id: str
    replayed: bool = False
    """It was begun by an earlier request with the same idempotency key."""


type Progress = RunStarted | Output
type RunEvent = Progress | RunResult


class Runs:
    def __init__(
        self,
        store: MetadataStore,
        pool: SandboxPool,
        network: Network,
        storage: StorageAccesses,
        snapshots: SnapshotStore,
        outputs: Outputs,
        turns: Turns,
        keys: IdempotencyKeys,
        settled: Callable[[OwnedId, float], Awaitable[bool]],
        active_runs: ActiveRuns,
    ) -> None:
        """`settled` waits for a session's setup; see Setups."""
        self._store = store
        self._settled = settled
        self._pool = pool
        self._network = network
        self._storage = storage
        self._snapshots = snapshots
        self._outputs = outputs
        self._turns = turns
        self._keys = keys
        self._active_runs = active_runs
        self._tasks: set[asyncio.Task[RunResult]] = set()

    async def stream(self, session_id: OwnedId, request: RunRequest) -> AsyncIterator[RunEvent]:
        """RunStarted, what the program writes as it writes it, then the RunResult. Raises EraError instead of a result.

        The run goes on when the caller stops listening.
        """
        events: asyncio.Queue[Progress | None] = asyncio.Queue()
        task = self._kept(self._run(session_id, request, events.put_nowait))
        task.add_done_callback(lambda _: events.put_nowait(None))
        while (event := await events.get()) is not None:
            yield event
        yield task.result()

    async def run(self, session_id: OwnedId, request: RunRequest) -> Collected:
        """The plain answer: the fold of `stream`."""
        return await collect(self.stream(session_id, request))

    async def begin(self, session_id: OwnedId, request: RunRequest) -> Begun:
        """Begin a run in the background, once it has its turn and is on record. Raises EraError where it can't."""
        async with AsyncExitStack() as stack:
            if request.claim is not None:
                first = await stack.enter_async_context(self._keys.held(session_id, request.claim))
                if first is not None:
                    if first.run is None:
                        raise no_answer(first)
                    return Begun(first.run.id, replayed=True)
            return Begun((await self.start(session_id, request)).run_id)

    async def start(self, session_id: OwnedId, request: RunRequest) -> ActiveRun:
        """`begin` without regard to a key: the run itself, which may have ended."""
        started: asyncio.Future[ActiveRun] = asyncio.get_running_loop().create_future()

        def emit(event: Progress) -> None:
            if isinstance(event, RunStarted) and (run := self._active_runs.get(event.run_id)):
                started.set_result(run)

        task = self._kept(self._run_now(session_id, request, emit))
        await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]  # it takes both
        if not started.done():
            task.result()
        task.add_done_callback(_log_failure)
        return started.result()

    async def stop(self, session_id: OwnedId, run_id: str) -> RunRecord:
        """End a run, wait until that is on record, and answer its record. Raises NotFound where there is no such run.
        One that has ended stays as it is."""
        record, _ = await self._store.run(session_id, run_id)
        run = self._active_runs.get(run_id)
        if run is None or run.session_key != record.session_key:
            return record
        await run.stop()
        record, _ = await self._store.run(session_id, run_id)
        return record

    async def execute(self, request: ExecuteRequest) -> Collected:
        """A run in a sandbox that is gone when this returns. Nothing of it is stored."""
        return await asyncio.shield(asyncio.create_task(collect(self._execute(request))))

    async def drain(self, seconds: float) -> None:
        """Wait for the runs under way, at most `seconds`."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    def _kept(self, run: Coroutine[Any, Any, RunResult]) -> asyncio.Task[RunResult]:
        """A run as a task of its own, which nobody who hangs up takes along."""
        task = asyncio.create_task(run)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, session_id: OwnedId, request: RunRequest, emit: Callable[[Progress], None]) -> RunResult:
        if request.claim is None:
            return await self._run_now(session_id, request, emit)
        async with self._keys.held(session_id, request.claim) as first:
            if first is not None:
                return await self._replay(session_id.id, first, emit)
            return await self._run_now(session_id, request, emit)

    async def _replay(self, session_id: str, first: Claimed, emit: Callable[[Progress], None]) -> RunResult:
        """Tell the result of an earlier run once more."""
        record = first.run
        if record is None or first.answer is None:
            raise no_answer(first)
        emit(RunStarted(record.id))
        for stream in STREAMS:
            if content := await self._outputs.read(first.outputs, stream):
                emit(Output(stream, content))
        return _result(session_id, record, json.loads(first.answer), replayed=True)

    async def _run_now(self, session_id: OwnedId, request: RunRequest, emit: Callable[[Progress], None]) -> RunResult:
        async with self._turns.take(session_id):
            run_id = new_id("run")
            if request.code is None and request.service is None:
                found = await self._store.session(session_id)
                if request.session_key not in (None, found.key):
                    raise NotFound(f"Session '{session_id}' is another one by now.")
                check_stored(found, public=request.public)
            session = await self._begin(session_id, run_id, request)
            record = RunRecord(run_id, session.key, "running", started_at=now())
            run = ActiveRun(run_id, session_id, session.key, request.background, request.service)
            with self._active_runs.noted(run), self._yielding(run):
                emit(RunStarted(run_id))
                try:
                    try:
                        return await self._attempt(run, session, record, request, emit)
                    except SandboxFailed:
                        # It died before the program began, so nothing has run yet: once more, in a new one.
                        return await self._attempt(run, session, record, request, emit)
                except BaseException as error:
                    await self._end_without_result(record, request, error)
                    raise

    def _yielding(self, run: ActiveRun) -> AbstractContextManager[None]:
        """A service ends when somebody wants the turn."""
        return nullcontext() if run.service is None else self._turns.yielding(run.session_id, run.stop_soon)

    async def _begin(self, session_id: OwnedId, run_id: str, request: RunRequest) -> Session:
        """Record the run, once the session's setup has ended. Raises SetupUnderWay where that takes longer than the run
        may."""
        try:
            return await self._store.begin_run(session_id, run_id, request.claim)
        except SetupUnderWay:
            timeout = request.timeout or (await self._store.session(session_id)).default_timeout
            if not await self._settled(session_id, timeout):
                raise
            return await self._store.begin_run(session_id, run_id, request.claim)

    async def _attempt(
        self,
        run: ActiveRun,
        session: Session,
        record: RunRecord,
        request: RunRequest,
        emit: Callable[[Progress], None],
    ) -> RunResult:
        sandbox = run.sandbox = await self._pool.acquire(session)
        try:
            return await self._run_in(sandbox, run.written, session, record, request, emit)
        except BaseException:
            await self._pool.discard(sandbox)
            raise

    async def _run_in(
        self,
        sandbox: Sandbox,
        written: dict[str, list[bytes]],
        session: Session,
        record: RunRecord,
        request: RunRequest,
        emit: Callable[[Progress], None],
    ) -> RunResult:
        code = request.code if request.code is not None else session.stored.code if session.stored else ""
        before = json.loads(session.data)
        run_egress = self._network.run_egress(
            sandbox, internet=session.allow_internet, egress=session.egress, secrets=request.secrets
        )
        storage = self._storage.access(sandbox, session.owner if session.storage else None)
        program = Program(
            code=code.encode(),
            state=jsontext.state_file(before),
            env=_environment(
                {**variables(session.setup), **request.env, **placeholders(request.secrets)},
                session.id,
                session.language,
                request.base_url,
                (storage.url or request.base_url) if session.storage else None,
            ),
            timeout=request.timeout or session.default_timeout,
            ephemeral=not session.persistent,
            files={},
            command=command_of(request.service),
            certificates=run_egress.certificates,
            supervised=run_egress.supervised,
        )
        ended: Ended | None = None
        async with run_egress, storage:
            async for event in bounded(sandbox, program, session.snapshot):
                if isinstance(event, Ended):
                    ended = event
                else:
                    written[event.stream].append(event.data)
                    emit(event)
        if ended is None:
            raise SandboxFailed("The sandbox did not say how the run ended.")

        data, problem = _read_state(program.state, ended)
        status = _status(ended)
        if request.atomic and status != "ok":
            data, problem = None, f"atomic: {_ending(ended)}; data and files stay as they were."
        snapshot: Snapshot | None = None
        artifacts: JsonObject = {}
        if problem is None and session.persistent:
            try:
                snapshot = await self._snapshots.take(sandbox, session.snapshot)
                artifacts = await self._snapshots.artifacts(session.snapshot, snapshot)
            except SnapshotRefused as error:
                status = "disk_full" if isinstance(error, WorkspaceFull) else status
                data, problem = None, f"{error}; data and files stay as they were."
        stdout, stderr = (b"".join(written[stream]) for stream in STREAMS)
        outputs = await self._outputs.keep(stdout, stderr, always=request.claim is not None)
        shown = data_view(before if data is None else json.loads(data), session.stored)
        answered = Answered(request.claim, jsontext.compact(shown), outputs) if request.claim else None
        record = replace(
            record,
            status=status,
            ended_at=now(),
            exit_code=ended.exit_code,
            duration_us=int(ended.duration * 1e6),
            stdout_bytes=len(stdout),
            stderr_bytes=len(stderr),
            stdout_truncated=ended.stdout_truncated,
            stderr_truncated=ended.stderr_truncated,
            committed=problem is None,
            reason=problem,
            peak_memory_bytes=ended.peak_memory_bytes,
            cpu_us=ended.cpu_us,
            reaped=ended.reaped,
            enforced={**sandbox.enforced, **run_egress.enforced},
            egress=run_egress.report(),
            artifacts=artifacts,
        )
        record = await self._store.end_run(record, data=data, snapshot=snapshot, outputs=outputs, answered=answered)
        if problem is None:
            self._pool.committed(session.key, snapshot or session.snapshot)
        else:
            await self._pool.discard(sandbox)
        return _result(session.id, record, shown)

    async def _end_without_result(self, record: RunRecord, request: RunRequest, error: BaseException) -> None:
        """Record a run of which nothing could be kept. Where that fails too, it is found `running` at the next start
        and recorded as lost."""
        if isinstance(error, SessionDeleted):
            return  # It was recorded when its session was found gone.
        reason = error.message if isinstance(error, EraError) else "The service failed."
        ended = replace(record, status="failed", ended_at=now(), reason=reason)
        # Where no sandbox could be had the program hasn't run, and may be run by the next request with its key.
        has_not_run = isinstance(error, Unavailable) and not isinstance(error, CommitFailed)
        # But one in the background has been answered for.
        free = has_not_run and not request.background
        released = Answered(request.claim) if request.claim and free else None
        try:
            await self._store.end_run(ended, data=None, snapshot=None, answered=released)
        except EraError as second:
            log.warning("run_not_recorded", run=record.id, error=second.message)

    async def _execute(self, request: ExecuteRequest) -> AsyncIterator[RunEvent]:
        run_id = new_id("run")
        sandbox = await self._pool.acquire_temporary(request.language, request.isolation, request.limits)
        run_egress = self._network.run_egress(
            sandbox, internet=request.allow_internet, egress={}, secrets=request.secrets
        )
        storage = self._storage.access(sandbox, request.owner)
        try:
            program = Program(
                code=request.code.encode(),
                state=b"{}",
                env=_environment(
                    {**request.env, **placeholders(request.secrets)},
                    run_id,
                    request.language,
                    request.base_url,
                    storage.url or request.base_url,
                ),
                timeout=request.timeout or DEFAULT_TIMEOUT,
                ephemeral=False,
                files=request.files,
                certificates=run_egress.certificates,
                supervised=run_egress.supervised,
            )
            async with run_egress, storage:
                async for event in bounded(sandbox, program, EMPTY):
                    if isinstance(event, Output):
                        yield event
                    else:
                        yield RunResult(
                            run_id=run_id,
                            session_id=sandbox.id,
                            status=_status(event),
                            exit_code=event.exit_code,
                            duration=event.duration,
                            data={},
                            stdout_truncated=event.stdout_truncated,
                            stderr_truncated=event.stderr_truncated,
                            state=StateOutcome(0, committed=False, reason="This run has no session."),
                        )
        finally:
            await self._pool.discard(sandbox)


def _log_failure(task: asyncio.Task[RunResult]) -> None:
    """Of a run in the background: its record tells why, as far as it could be written."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("run_failed", error=str(error), exc_info=None if isinstance(error, EraError) else error)


async def collect(events: AsyncIterator[RunEvent]) -> Collected:
    """The plain answer that a run's events come to."""
    parts: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    async for event in events:
        if isinstance(event, Output):
            parts[event.stream].append(event.data)
        elif isinstance(event, RunResult):
            result = event
    return Collected(result, b"".join(parts["stdout"]), b"".join(parts["stderr"]))


def check_public(session: Session) -> None:
    """Raises Forbidden where the session isn't for anybody."""
    if not session.allow_public:
        raise Forbidden("This session is not public.", hint="Its owner may set allowPublicAccess.", code="not_public")


def check_stored(session: Session, *, public: bool) -> None:
    """Raises NoCode where there is no stored code, Forbidden where the caller may be anybody and the session is not
    for them."""
    if public:
        check_public(session)
    if session.stored is None:
        raise NoCode(f"Session '{session.id}' stores no code and this run brings none.")


def _read_state(before: bytes, ended: Ended) -> tuple[str | None, str | None]:
    """The new data as stored, None where it stays as it is; and why the state can't be committed, if it can't."""
    if ended.disk_problem is not None:
        return None, f"{ended.disk_problem}; data and files stay as they were."
    if ended.state_problem is not None:
        told = ended.state_problem
        return None, told if not ended.sandbox_alive else f"{STATE_FILE} {told}; data and files stay as they were."
    if ended.state is None or ended.state == before:
        return None, None
    try:
        return jsontext.read_state(ended.state), None
    except jsontext.JsonProblem as error:
        return None, f"{STATE_FILE} {error}; data and files stay as they were."


def _result(session_id: str, record: RunRecord, data: JsonObject, *, replayed: bool = False) -> RunResult:
    """How a run ended, from its record."""
    return RunResult(
        run_id=record.id,
        session_id=session_id,
        status=record.status,
        exit_code=record.exit_code or 0,
        duration=(record.duration_us or 0) / 1e6,
        data=data,
        stdout_truncated=record.stdout_truncated,
        stderr_truncated=record.stderr_truncated,
        state=StateOutcome(record.version or 0, record.committed, record.reason),
        artifacts=record.artifacts,
        replayed=replayed,
    )


def _status(ended: Ended) -> Status:
    if ended.cause == "exit":
        return "ok" if ended.exit_code == 0 else "failed"
    return "killed" if ended.cause == "signal" else ended.cause


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


def _environment(
    given: Mapping[str, str], session_id: str, language: Language, base_url: str, storage_url: str | None
) -> dict[str, str]:
    """What a program has: the caller's variables, and the service's, which win. Without storage there is no word of
    one, whatever the caller gives."""
    env = {
        **given,
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
