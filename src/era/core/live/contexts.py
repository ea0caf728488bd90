"""The contexts of all sessions: interpreters that stay, by name, and runs in them.

Theory of operation
===================

A run in a context is a run like any other (session_run.py), only that its program is a cell: it has the session's turn,
a record, data before and after, and a commit. The session is live from its first context on (live_sessions.py), and its
contexts end with that.

*Memory.* A client has to know whether the variables of earlier cells are there. A context's name is in the database
from its first cell until it is deleted. Where a run finds no interpreter under a name that is known, what the cells
before had made is lost. Why, is known here as long as the service that saw it end runs.

*The state file* is written and read from inside (file_helper.py), since processes may be at work on the tree.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from era import languages
from era.core.execution.active_runs import ActiveRun
from era.core.execution.execution import OURS
from era.core.execution.run_messages import RunRequest
from era.core.live.context import CellOutcome, Context, NotBegun
from era.core.live.file_helper import read_state, write_state
from era.core.live.live_session import LiveSession
from era.core.live.live_sessions import LiveSessions
from era.core.metadata import MetadataStore
from era.core.models import JsonObject, OwnedId, Session
from era.core.ports import Sandbox
from era.core.process import ProcessSpec
from era.core.program import Ended, Program, StopCell, WriteCell
from era.core.secrets import placeholders
from era.errors import BadRequest, BeingStopped, CommitFailed, NoContext, SandboxFailed, TooManyContexts, Unavailable

MOST = 16
"""Contexts of a session at a time."""

_TRIES = 3
_END_SECONDS = 10.0
"""How long the end of a live session waits for what a cell left to be read."""

_REMEMBERED = 10_000
"""Contexts of which the service remembers why they ended."""

_ENDED = "The service was restarted since, and its interpreter ended with it."
_RESTARTED = "It was restarted on request."
_DELETED = "It was deleted."
_STARTS_ANEW = "The next run in the context starts a new interpreter."


class _NotKept(CommitFailed):
    """The output of a cell can't be kept. So it has been executed, and must not be again."""


class CellExecution:
    """The cell of one run, ready to be executed: what Execution (execution.py) is for programs that end. `run` may be
    called once."""

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
        """The fields of the run's answer that only runs in contexts have, once the cell has ended."""

        self.enforced: JsonObject = {}
        """What is enforced for the cell besides the sandbox's own, for records."""

        self.had_interpreter = False
        """Whether it came as far as to an interpreter. Until then nothing of it has been executed."""

        self.context = request.context or ""
        """The name of its context, which is made if there is none."""

        self.base_url, self.secrets = request.base_url, request.secrets
        env = {**program.env, **placeholders(request.secrets)}
        self.program = replace(program, env={name: value for name, value in env.items() if name not in OURS})
        self._contexts = contexts
        self._active = active
        self._session = session

    def report(self) -> JsonObject:
        """Where it connected isn't known: connections are those of all the session's processes."""
        return {}

    async def run(self, write: WriteCell) -> Ended:
        """Execute the cell; `write` gets its output and events as they come, and is waited for. Raises as Contexts.run
        does."""
        if self.program.may_begin is not None:
            await self.program.may_begin()
        return await self._contexts.run(self._session, self, write)

    def begun(self, stop: StopCell) -> None:
        """It has an interpreter, and is executed now."""
        self.had_interpreter = True
        self._active.stop_cell = stop


class _OfSession:
    """The contexts of one live session."""

    def __init__(self, live: LiveSession) -> None:
        self.live = live
        self.contexts: dict[str, Context] = {}
        self.starting = asyncio.Lock()
        self.running = asyncio.Lock()
        """Held from before a cell to after its state file has been read."""

    def has_any(self) -> bool:
        """Whether an interpreter runs, or is being started."""
        return self.starting.locked() or any(context.alive for context in self.contexts.values())

    async def close(self, why: str) -> None:
        """End all interpreters. `why` is a sentence."""
        await asyncio.gather(*(context.close(why) for context in self.contexts.values()))

    async def end(self, why: str) -> None:
        """The session isn't live any more."""
        await self.close(why)
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS), self.running:
                pass


class Contexts:
    """Contexts by session and name. There is one of these a service."""

    def __init__(self, live_sessions: LiveSessions, store: MetadataStore) -> None:
        self.live_sessions = live_sessions
        self._store = store
        self._of: dict[int, _OfSession] = {}
        """By the key of the session."""

        self._lost: dict[tuple[int, str], str] = {}
        """Why contexts ended of which no later cell has been told."""

    # -- runs -------------------------------------------------------------------------------------------------------

    def check_language(self, session: Session) -> None:
        """Raises BadRequest where the session's language has no contexts."""
        if languages.runtime(session.language).kernel is None:
            title = languages.DEFINITIONS[session.language].title
            missing = languages.contexts_missing(session.language)
            raise BadRequest(
                f"There are no contexts in {title}{'.' if missing is None else f' on this server: {missing.reason}'}",
                hint=f"{', '.join(_with_contexts())} have contexts. Leave out 'context' for an ordinary run."
                if missing is None
                else f"{missing.hint}, then restart it. `era doctor` lists what is missing.",
                code="no_contexts",
            )

    async def run(self, session: Session, cell: CellExecution, write: WriteCell) -> Ended:
        """Execute a cell, for the holder of the session's turn, which has the session's sandbox already. `write` gets
        its output and events as they come. Raises as LiveSessions.opened does, TooManyContexts, Unavailable where there
        is no interpreter, CommitFailed."""
        async with self.live_sessions.opened(session.owned_id, in_turn=True) as live:
            of = self._of_session(live)
            async with of.running:
                live.watch_disk()
                try:
                    outcome, lost = await self._begin_and_execute(of, session, cell, write)
                except Unavailable as error:
                    if live.is_open or live.why_lost is not None or isinstance(error, _NotKept):
                        raise
                    raise BeingStopped(f"Session '{session.id}' was stopped before the cell began.") from error
                # From here on the cell has been executed, and nothing may be raised after which it would be once more.
                state: bytes | None = None
                state_problem: str | None = None
                problem = live.why_lost if outcome.sandbox_alive else (live.why_lost or "The sandbox died.")
                if problem is None:
                    try:
                        state, state_problem = await read_state(live.files)
                    except SandboxFailed as error:
                        problem = error.message
                    except Unavailable as error:
                        state_problem = f"can't be read: {error.message.rstrip('.')}"
                if problem is not None:
                    outcome = replace(outcome, sandbox_alive=False)
                    state_problem = f"{problem} Data and files stay as they were."
                cell.enforced, cell.answer = dict(live.enforced), _answer(cell.context, outcome, lost)
                return _ended(outcome, state, state_problem, live.disk_problem)

    async def _begin_and_execute(
        self, of: _OfSession, session: Session, cell: CellExecution, write: WriteCell
    ) -> tuple[CellOutcome, str | None]:
        """See `_execute`; with the state file and the secrets in place."""
        await write_state(of.live.files, cell.program.state)
        await of.live.remember(cell.secrets)
        try:
            return await self._execute(of, session, cell, write)
        finally:
            of.live.forget(cell.secrets)

    async def _execute(
        self, of: _OfSession, session: Session, cell: CellExecution, write: WriteCell
    ) -> tuple[CellOutcome, str | None]:
        """Execute the cell, in a new interpreter where the one there is has ended just before. Returns why memory was
        lost, too."""
        lost: str | None = None
        for _ in range(_TRIES):
            context, why = await self._context(of, session, cell.context, cell.base_url)
            lost = why or lost
            cell.begun(context.stop_cell)
            try:
                outcome = await context.execute(cell.program, cell.sandbox.limits.output_bytes, write)
            except NotBegun:
                continue
            except CommitFailed as error:
                raise _NotKept(error.message) from error
            if outcome.lost is None or not of.live.is_open or outcome.lost in (_RESTARTED, _DELETED):
                return outcome, outcome.lost or lost
            return outcome, f"{outcome.lost} {_STARTS_ANEW}"
        raise Unavailable(f"The interpreter of context '{cell.context}' ends before it takes a cell.")

    async def _context(self, of: _OfSession, session: Session, name: str, base_url: str) -> tuple[Context, str | None]:
        """The context of this name, which is started if there is none; and why what it had is lost, if it had any."""
        async with of.starting:
            context = of.contexts.get(name)
            if context is not None and context.alive:
                return context, self._lost.pop((session.key, name), None)
            alive = sorted(one.name for one in of.contexts.values() if one.alive)
            if len(alive) >= MOST:
                raise TooManyContexts(
                    f"Session '{session.id}' has {MOST} contexts, as many as it may.", details={"contexts": alive}
                )
            started = await self._started(of, session, name, base_url)
            try:
                was_known = await self._store.note_context(session.key, name)
            except BaseException:
                await started.close("Its name could not be stored.")
                raise
            lost = self._lost.pop((session.key, name), None) or (context.lost if context else None)
            of.contexts[name] = started
            return started, lost or (_ENDED if was_known else None)

    async def _started(self, of: _OfSession, session: Session, name: str, base_url: str) -> Context:
        """A new interpreter. Raises Unavailable, SandboxFailed."""
        kernel = languages.runtime(session.language).kernel
        if kernel is None:
            raise Unavailable(f"There are no contexts in {session.language}.")
        spec = ProcessSpec(kernel.command, kernel.environment, channel=True)
        process, sandbox = await of.live.start(spec, base_url), of.live.sandbox
        context = Context(name, session.language, process, sandbox.cpu_seconds, sandbox.wants_processor)
        await context.ready()
        return context

    def _of_session(self, live: LiveSession) -> _OfSession:
        of = self._of.get(live.session_key)
        if of is None or of.live is not live:
            of = self._of[live.session_key] = _OfSession(live)
            live.at_end.append(partial(self._end_all, of))
            live.has_contexts, live.end_contexts = of.has_any, of.close
        return of

    async def _end_all(self, of: _OfSession, why: str) -> None:
        """Its session isn't live any more."""
        for name, context in of.contexts.items():
            self._remember((of.live.session_key, name), context.lost or why)
        if self._of.get(of.live.session_key) is of:
            del self._of[of.live.session_key]
        await of.end(why)

    def _remember(self, which: tuple[int, str], why: str) -> None:
        self._lost[which] = why
        while len(self._lost) > _REMEMBERED:
            del self._lost[next(iter(self._lost))]

    # -- what clients ask for ---------------------------------------------------------------------------------------

    async def list(self, session_id: OwnedId) -> Sequence[Context]:
        """Those that have an interpreter, in the order in which they were started."""
        session = await self._store.session(session_id)
        return [context for context in self._all(session.key).values() if context.alive]

    async def interrupt(self, session_id: OwnedId, name: str) -> bool:
        """Interrupt its cell; whether one was under way. Raises NoContext."""
        session = await self._store.session(session_id)
        return await self._alive(session, name).interrupt()

    async def delete(self, session_id: OwnedId, name: str) -> None:
        """End it, and forget that it was. A run in it ends, too. Raises NoContext."""
        session = await self._store.session(session_id)
        # First, so that a call that is repeated after this has failed finds the interpreter.
        known = await self._store.forget_context(session.key, name)
        context = self._all(session.key).pop(name, None)
        if context is not None:
            await context.close(_DELETED)
        elif not known:
            raise _no_context(session, name)
        self._lost.pop((session.key, name), None)

    async def restart(self, session_id: OwnedId, name: str, base_url: str) -> Context:
        """End its interpreter and start another one, also where it has ended by itself. A run in it ends, too. Raises
        NoContext, NotFound also where the session is deleted or stopped meanwhile, and as `run` does."""
        session = await self._store.session(session_id)
        try:
            return await self._restart(session_id, session, name, base_url)
        except SandboxFailed:
            if (await self._store.session(session_id)).key != session.key:
                raise _no_context(session, name) from None
            raise

    async def _restart(self, session_id: OwnedId, session: Session, name: str, base_url: str) -> Context:
        old = self._all(session.key).get(name)
        if old is None:
            raise _no_context(session, name)
        async with self.live_sessions.opened(session_id) as live:
            of = self._of_session(live)  # Later it may be lost, and its working directory gone.
            await old.close(_RESTARTED)
            async with of.starting:
                context = of.contexts.get(name)
                if context is None or not context.alive:
                    try:
                        context = of.contexts[name] = await self._started(of, session, name, base_url)
                    except Unavailable:
                        is_there = (await self._store.session(session_id)).key == session.key
                        if is_there and (live.is_open or live.why_lost is not None):
                            raise
                        raise _no_context(session, name) from None
                self._remember((session.key, name), _RESTARTED)
            return context

    def _all(self, session_key: int) -> dict[str, Context]:
        of = self._of.get(session_key)
        return {} if of is None else of.contexts

    def _alive(self, session: Session, name: str) -> Context:
        """Raises NoContext."""
        context = self._all(session.key).get(name)
        if context is None or not context.alive:
            raise _no_context(session, name)
        return context


def _answer(context: str, outcome: CellOutcome, lost: str | None) -> JsonObject:
    """The fields of an answer that only runs in contexts have. `lost` is why memory was lost, if it was."""
    return {
        "context": context,
        "results": outcome.results,
        "results_truncated": outcome.results_truncated,
        "error": outcome.error,
        "execution_count": outcome.execution_count,
        "memory": {"kept": lost is None, "reason": lost},
    }


def _ended(outcome: CellOutcome, state: bytes | None, state_problem: str | None, disk_problem: str | None) -> Ended:
    """Return a cell's end in the form of a program's. `disk_problem` is the disk limit that ended it, if one did."""
    return Ended(
        exit_code=outcome.exit_code,
        cause=outcome.cause if disk_problem is None else "disk_full",
        duration=outcome.duration,
        state=state,
        state_problem=state_problem,
        stdout_truncated=outcome.stdout_truncated,
        stderr_truncated=outcome.stderr_truncated,
        reaped=0,
        peak_memory_bytes=None,
        cpu_us=None,
        sandbox_alive=outcome.sandbox_alive,
        disk_problem=disk_problem,
    )


def _with_contexts() -> list[str]:
    return [name for name, runtime in languages.runtimes().items() if runtime.kernel is not None]


def _no_context(session: Session, name: str) -> NoContext:
    return NoContext(f"Session '{session.id}' has no context '{name[:64]}'.")
