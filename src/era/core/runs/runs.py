"""Runs: a session's turns, idempotency keys, streaming, background runs, stopping. The path of one run is in
session_run.py.

Theory of operation. A run executes as a task of its own, so a caller that hangs up neither stops a program halfway nor
loses its commit. `stream` hands on what that task reports as it happens; `run` waits for its end.
Output is in neither's memory but for its first bytes (spooled_output.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import structlog

from era.core.concurrency.meter import charge_to
from era.core.concurrency.turns import Turns
from era.core.execution.active_runs import ActiveRun, ActiveRuns
from era.core.execution.execution import Execution, Grants, keep_output, status_of
from era.core.execution.run_messages import (
    Collected,
    Emit,
    ExecuteRequest,
    RunEvent,
    RunRequest,
    RunResult,
    RunStarted,
    recorded_program,
    result_of,
)
from era.core.models import Answered, Claim, Claimed, OwnedId, RunRecord, Session, StateOutcome, new_id, now
from era.core.owners.usage import use_of
from era.core.pool.admission import Admission, Slot
from era.core.ports import Sandbox
from era.core.program import DEFAULT_TIMEOUT, Program
from era.core.runs.session_run import RunParts, SessionRun, record_end
from era.core.sessions.idempotency import IdempotencyKeys, Once, no_answer
from era.core.telemetry import RunEnded, noted
from era.errors import EraError, Forbidden, NoCode, NotFound, SetupUnderWay, Unavailable

log = structlog.get_logger()

_PUT_AWAY_SECONDS = 30.0
"""How long a cell waits for a session to be put away, before it tries again."""

_NO_SESSION = 0
"""In place of a session's key, which are from 1 on."""


type _Starting = tuple[asyncio.Task[Collected], asyncio.Future[RunStarted]]
"""A run that was started, and what its caller is told once it begins."""


class Runs:
    """Runs code in sessions, one run at a time in each, and outside of any."""

    def __init__(
        self,
        parts: RunParts,
        turns: Turns,
        idempotency: IdempotencyKeys,
        active_runs: ActiveRuns,
        setup_ended: Callable[[OwnedId, float], Awaitable[bool]],
        admission: Admission,
    ) -> None:
        """`setup_ended` waits for a session's setup, at most so many seconds; see Setups.settled."""
        self._parts = parts
        self._store = parts.store
        self._turns = turns
        self._idempotency = idempotency
        self._active_runs = active_runs
        self._setup_ended = setup_ended
        self._admission = admission
        self._tasks: set[asyncio.Task[Collected]] = set()

    async def stream(self, session_id: OwnedId, request: RunRequest) -> AsyncIterator[RunEvent]:
        """RunStarted, what the program writes as it writes it, then the RunResult. Raises EraError instead of a result.

        The run goes on when the caller stops listening.
        """
        task, begun = self._starting_task(partial(self._run, session_id, request, named=True))
        async with aclosing(_told(task, begun)) as events:
            async for event in events:
                yield event

    async def run(
        self, session_id: OwnedId, request: RunRequest, started: Callable[[str], Awaitable[None]] | None = None
    ) -> Collected:
        """The plain answer, which has all that `stream` has. `started` is called with the run's id once that is on
        record; without it nobody hears of the run before its end, unless it has a key. The run goes on when the caller
        is cancelled."""
        named = started is not None or request.claim is not None
        task, beginning = self._starting_task(partial(self._run, session_id, request, named=named))
        if started is not None:
            with _or_unheard(task):
                if (begun := await _begun(task, beginning)) is not None:
                    await started(begun.run_id)
        return await _heard(task)

    async def begin(self, session_id: OwnedId, request: RunRequest) -> Once[str]:
        """Begin a run in the background, once it has its turn and is on record. Returns its id. Raises EraError."""
        async with AsyncExitStack() as stack:
            if request.claim is not None:
                first = await stack.enter_async_context(self._idempotency.held(session_id, request.claim))
                if first is not None:
                    if first.run is None:
                        raise no_answer(first)
                    return Once(first.run.id, replayed=True)
            return Once((await self.start(session_id, request)).run_id)

    async def start(self, session_id: OwnedId, request: RunRequest) -> ActiveRun:
        """`begin` without regard to a key. The run that this returns may have ended already."""
        task, beginning = self._starting_task(partial(self._run_in_turn, session_id, request))
        with _or_unheard(task):
            begun = await _begun(task, beginning)
        if begun is None or begun.run is None:
            task.result()
            raise RuntimeError("a run has ended and never begun")
        task.add_done_callback(_end_unheard)
        return begun.run

    async def stop(self, session_id: OwnedId, run_id: str) -> RunRecord:
        """End a run, wait until that is on record, and return its record. Raises NotFound where there is no such run.
        One that has ended stays as it is."""
        record, _ = await self._store.run(session_id, run_id)
        run = self._active_runs.get(run_id)
        if run is None or run.session_key != record.session_key:
            return record
        await run.stop()
        record, _ = await self._store.run(session_id, run_id)
        return record

    async def execute(self, request: ExecuteRequest) -> Collected:
        """A run in a sandbox that is gone when this returns. Nothing of it is stored. The program is ended where the
        caller is cancelled, and never begins where it has no sandbox by then: nobody else can get at what it writes."""
        with self._executing(request) as (task, _):
            return await _heard(task)

    async def execute_streamed(self, request: ExecuteRequest) -> AsyncGenerator[RunEvent]:
        """`execute`, told as `stream` tells a run, and ended where the caller stops listening, too."""
        with self._executing(request) as (task, begun):
            async with aclosing(_told(task, begun)) as events:
                async for event in events:
                    yield event

    @contextmanager
    def _executing(self, request: ExecuteRequest) -> Iterator[_Starting]:
        """A run without a session, as `_starting_task` starts it, which doesn't outlive the block for long."""
        run = self._temporary_run(request)
        task, begun = self._starting_task(partial(self._execute, request, run))
        try:
            yield task, begun
        finally:
            if not task.done():
                if run.sandbox is None:
                    task.cancel()
                else:
                    run.stop_soon()

    async def drain(self, seconds: float) -> None:
        """Wait for the runs under way, at most `seconds`."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def close(self, seconds: float) -> None:
        """`drain` for the last time: what can't be recorded by then of runs that have ended is left to the next
        start."""
        await self.drain(seconds)
        await self._parts.late_ends.stop()

    def _starting_task(self, run: Callable[[Emit], Coroutine[Any, Any, Collected]]) -> _Starting:
        """Start a run as a task of its own, which goes on when its caller is cancelled, and which `drain` waits for.
        What this returns besides is there once its caller is told of it."""
        begun: asyncio.Future[RunStarted] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(run(begun.set_result))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task, begun

    async def _run(self, session_id: OwnedId, request: RunRequest, emit: Emit, *, named: bool) -> Collected:
        """A run, or the replay of the one that had the same idempotency key."""
        if request.claim is None:
            return await self._run_in_turn(session_id, request, emit, named=named)
        async with self._idempotency.held(session_id, request.claim) as first:
            if first is not None:
                return await self._replay(session_id, first, emit)
            return await self._run_in_turn(session_id, request, emit)

    async def _replay(self, session_id: OwnedId, first: Claimed, emit: Emit) -> Collected:
        """Start an earlier run again, for whoever listens, and return what it came to."""
        record = first.run
        if record is None or not first.answer:
            raise no_answer(first)
        transcript = await self._parts.outputs.transcript(first.outputs, record.pieces)
        emit(RunStarted(record.id, transcript, replayed=True))
        session = await self._store.session(session_id)
        cell = await self._parts.outputs.cell(first.outputs)
        result = result_of(session, record, json.loads(first.answer), cell=cell, replayed=True)
        return Collected(result, transcript.stdout, transcript.stderr)

    async def _run_in_turn(
        self, session_id: OwnedId, request: RunRequest, emit: Emit, *, named: bool = True
    ) -> Collected:
        """A run that counts for its owner's and its key's quotas; see _when_admitted. Raises RateReached,
        QuotaReached."""
        if request.atomic:
            await self._parts.contexts.live_sessions.put_away_if_ended(session_id)
        quotas = self._parts.quotas
        memory = 0
        if quotas.bounds_memory(session_id):
            session = await self._store.session(session_id)
            memory = self._parts.rules.granted(session.limits).memory_bytes
        async with quotas.running(session_id, memory):
            return await self._when_admitted(session_id, request, emit, named=named)

    async def _when_admitted(self, session_id: OwnedId, request: RunRequest, emit: Emit, *, named: bool) -> Collected:
        """Wait for the session's turn and a slot, record the run, and see it through to its commit. Raises NotFound
        where the session is gone by then, TooBusy where too many wait for a slot."""
        told = RunEnded(new_id("run"), session_id.owner, session_id.id, _kind_of(request))
        with noted(self._parts.note, told):
            while True:
                async with self._turns.take(session_id, long=request.service is None):
                    told.stages.end("turn")
                    async with self._admission.admitted(session_id.owner, session_id) as slot:
                        told.stages.end("slot")
                        leaving = await self._being_put_away(session_id, request)
                        if leaving is None:
                            return await self._run_with_slot(session_id, request, emit, slot, told, named=named)
                await self._parts.contexts.live_sessions.settled(leaving, _PUT_AWAY_SECONDS)

    async def _being_put_away(self, session_id: OwnedId, request: RunRequest) -> int | None:
        """The key of the session, if that is being put away and the run is a cell, which can't begin then. Raises
        BadRequest where there are no contexts."""
        if request.context is None:
            return None
        session = await self._store.session(session_id)
        self._parts.contexts.check_language(session)
        return session.key if self._parts.contexts.live_sessions.is_being_put_away(session.key) else None

    async def _run_with_slot(
        self, session_id: OwnedId, request: RunRequest, emit: Emit, slot: Slot, told: RunEnded, *, named: bool
    ) -> Collected:
        """The run, once the session's turn and a slot are its own. Raises as `_run_in_turn` does."""
        run_id = told.run_id
        if request.uses_stored_code or request.session_key is not None:
            session = await self._store.session(session_id)
            if request.session_key not in (None, session.key):
                raise NotFound(f"Session '{session_id}' is another one by now.")
            if request.uses_stored_code:
                check_stored(session, public=request.public)
            elif request.public:
                check_public(session)
        if request.check is not None:
            await request.check()
        if request.atomic:
            session = await self._store.session(session_id)
            self._parts.liveness.check_not(session, "its files can't be put back after a run that fails")
        session, recorded = await self._record(session_id, run_id, request, slot, named=named)
        charge_to(session.owner, session.id)
        told.language = session.language
        told.stages.end("record")
        transcript = self._parts.outputs.new()
        active = ActiveRun(run_id, session_id, session.key, transcript, request.background, request.service)
        active.joinable = request.context is not None or (session.persistent and not request.atomic)
        run = SessionRun(self._parts, active, session, request, slot, emit, told, recorded)
        with self._active_runs.registered(active), self._yielding(active):
            try:
                return Collected(await run.result(), transcript.stdout, transcript.stderr)
            finally:
                with suppress(OSError):
                    await transcript.end()  # or who reads it would wait for more

    async def _record(
        self, session_id: OwnedId, run_id: str, request: RunRequest, slot: Slot, *, named: bool
    ) -> tuple[Session, asyncio.Future[Session]]:
        """Record the run as `running`, once the session's setup has ended, for which it waits without its slot. Raises
        SetupUnderWay where that takes longer than the run may. Returns the session, and what is done once the record is
        kept, which the program's begin waits for.

        The record is there so that a run which was cut off is known to have been lost. Where nobody is told of a run
        before its commit, a power cut may take the record with the run."""
        try:
            return await self._begin(session_id, run_id, request, durably=named)
        except SetupUnderWay:
            slot.give_back()
            timeout = request.timeout or (await self._store.session(session_id)).default_timeout
            if not await self._setup_ended(session_id, timeout):
                raise
            await slot.take()
            return await self._begin(session_id, run_id, request, durably=named)

    async def _begin(
        self, session_id: OwnedId, run_id: str, request: RunRequest, *, durably: bool
    ) -> tuple[Session, asyncio.Future[Session]]:
        """Begin to record the run; see _record. Raises what MetadataStore.begin_run does."""
        known: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
        recorded = asyncio.ensure_future(
            self._store.begin_run(
                session_id,
                run_id,
                request.claim,
                program=partial(recorded_program, request),
                durably=durably,
                known=known.set_result,
            )
        )
        await asyncio.wait({known, recorded}, return_when=asyncio.FIRST_COMPLETED)
        try:
            return known.result() if known.done() else recorded.result(), recorded
        except Unavailable as error:
            if error.may_have_committed:
                end = partial(self._end_never_begun, session_id, run_id, request.claim, error.message)
                self._parts.late_ends.add(end)
            raise

    async def _end_never_begun(self, session_id: OwnedId, run_id: str, claim: Claim | None, why: str) -> bool:
        """Record the end of a run that was never begun, if it is on record, and free its key; whether that needn't be
        tried again."""
        try:
            record = await self._store.run_of_any(run_id)  # its session may be deleted by now, and restored later
        except Unavailable:
            return False
        if record is None or record.status != "running":
            return True
        ended = replace(record, status="failed", ended_at=now(), reason=why)
        return await record_end(self._store, session_id, ended, Answered(claim) if claim else None)

    def _yielding(self, run: ActiveRun) -> AbstractContextManager[None]:
        """A service ends when somebody else waits for the session's turn; other runs don't."""
        return nullcontext() if run.service is None else self._turns.yielding(run.session_id, run.stop_soon)

    def _temporary_run(self, request: ExecuteRequest) -> ActiveRun:
        """A run that has no session: it is its own."""
        run_id = new_id("run")
        who = OwnedId(request.owner, run_id, request.key_id)
        return ActiveRun(run_id, who, _NO_SESSION, self._parts.outputs.new())

    async def _execute(self, request: ExecuteRequest, run: ActiveRun, emit: Emit) -> Collected:
        """Run the program of a request in a temporary sandbox, counted as a session's run is."""
        quotas = self._parts.quotas
        limits = request.limits or self._parts.rules.defaults
        told = RunEnded(run.run_id, request.owner, None, "execute", request.language)
        try:
            async with quotas.running(run.session_id, limits.memory_bytes):
                with noted(self._parts.note, told):
                    return await self._execute_noted(run, request, emit, told)
        finally:
            run.ended.set()
            with suppress(OSError):
                await run.transcript.end()  # or who reads it would wait for more

    def _execution(
        self, request: ExecuteRequest, run: ActiveRun, sandbox: Sandbox, variables: Mapping[str, str]
    ) -> Execution:
        """The program of a request outside any session. It also has `variables`."""
        program = Program(
            code=request.code.encode(),
            env=request.env,
            timeout=request.timeout or DEFAULT_TIMEOUT,
            files=request.files,
            invocation=request.invocation,
        )
        grants = Grants(
            run.run_id,
            request.owner,
            request.language,
            request.allow_internet,
            storage_owner=request.owner,
            base_url=request.base_url,
            secrets=request.secrets,
            variables=variables,
        )
        return Execution(sandbox, program, grants, self._parts.network, self._parts.storage)

    async def _execute_noted(self, run: ActiveRun, request: ExecuteRequest, emit: Emit, told: RunEnded) -> Collected:
        """Raises as SandboxPool.acquire_temporary and Execution.run do, and TooBusy."""
        who, run_id, transcript = run.session_id, run.run_id, run.transcript
        pool = self._parts.pool
        async with self._admission.admitted(request.owner) as slot:
            told.stages.end("slot")
            sandbox = await pool.acquire_temporary(
                request.language, request.isolation, request.limits, owner=request.owner
            )
            slot.use(sandbox)
            told.sandbox_id = sandbox.id
            told.stages.end("sandbox")
            run.sandbox = sandbox
            emit(RunStarted(run_id, transcript))
            try:
                execution = self._execution(request, run, sandbox, self._parts.traceparent(told))
                ended = await execution.run(partial(keep_output, transcript))
                told.stages.end("program")
                told.ended(status_of(ended), ended, None, execution.report())
            finally:
                run.ended.set()  # nothing is left to be told to end
                await pool.discard(sandbox)
        with suppress(OSError):
            await transcript.end()  # which may be one more piece
        use = use_of(who, ended.cpu_us, execution.report())
        self._parts.quotas.used(use)
        await self._parts.usage.add_use(use)
        result = RunResult(
            run_id=run_id,
            session_id=sandbox.id,
            status=status_of(ended),
            exit_code=ended.exit_code,
            duration=ended.duration,
            data={},
            stdout_truncated=ended.stdout_truncated,
            stderr_truncated=ended.stderr_truncated,
            state=StateOutcome(0, committed=False, reason="This run has no session."),
            pieces=transcript.count,
        )
        return Collected(result, transcript.stdout, transcript.stderr)


def _kind_of(request: RunRequest) -> str:
    """What operators are told of a run's kind."""
    if request.service is not None:
        return "service"
    if request.public:
        return "public"
    if request.context is not None:
        return "cell"
    return "background" if request.background else "run"


async def _begun(task: asyncio.Task[Collected], begun: asyncio.Future[RunStarted]) -> RunStarted | None:
    """Wait until the caller of a run is told of it; None where it has ended before."""
    either: set[asyncio.Future[Any]] = {task, begun}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    return begun.result() if begun.done() else None


async def _told(task: asyncio.Task[Collected], beginning: asyncio.Future[RunStarted]) -> AsyncGenerator[RunEvent]:
    """What a run that is starting is told as: see Runs.stream."""
    with _or_unheard(task):
        if (begun := await _begun(task, beginning)) is not None:
            transcript = begun.transcript.share()
            yield begun
            async for piece in transcript.pieces():
                yield piece
    done = await _heard(task)
    done.close()
    yield done.result


async def _heard(task: asyncio.Task[Collected]) -> Collected:
    """The end of a run, which goes on where this is cancelled, and then ends unheard. Raises what the run does."""
    with _or_unheard(task):
        await asyncio.wait({task})
    return task.result()


@contextmanager
def _or_unheard(task: asyncio.Task[Collected]) -> Iterator[None]:
    """Have a run end unheard whose caller, or listener, leaves within the block."""
    try:
        yield
    except BaseException:
        task.add_done_callback(_end_unheard)
        raise


def _end_unheard(task: asyncio.Task[Collected]) -> None:
    """The end of a run in the background, for which nobody waits. Why it has no result is logged; its record says so
    too, if it could be written."""
    if task.cancelled():
        return
    if (error := task.exception()) is None:
        task.result().close()
    else:
        log.warning("run_failed", error=str(error), exc_info=None if isinstance(error, EraError) else error)


def check_public(session: Session) -> None:
    """Raises Forbidden where the session is not open to anybody."""
    if not session.allow_public:
        raise Forbidden("This session is not public.", hint="Its owner may set allowPublicAccess.", code="not_public")


def check_stored(session: Session, *, public: bool, port: int = 0) -> None:
    """Raises NoCode where there is no stored code. Where the caller may be anybody (`public`), also raises Forbidden
    for a session that is not open to anybody. `port` is where nothing listened, for a call that asked for one."""
    if public:
        check_public(session)
    if session.stored is None and port:
        raise NoCode(
            f"Nothing listens on port {port} of session '{session.id}' now, and it stores no code that could answer."
        )
    if session.stored is None:
        raise NoCode(f"Session '{session.id}' stores no code and this run brings none.")
