"""Processes as callers ask for them: by session, and by id or tag, whether the session is live or was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress

from era.core.live.live_session import LiveSession
from era.core.live.live_sessions import LiveSessions
from era.core.live.output_log import OutputLog
from era.core.live.processes import LiveProcess, ProcessRequest
from era.core.metadata import MetadataStore
from era.core.models import OwnedId
from era.core.process import ProcessRecord
from era.core.sessions.idempotency import IdempotencyKeys, Once
from era.errors import Conflict, InputClosed, NotFound, Unavailable

_TRIES = 3
"""How often a process is tried to be started while others stop its session."""

_PATIENCE = 10.0
"""Seconds for which a request that comes again waits for its key: until that is on record of which nothing came."""


class SessionProcesses:
    """The processes of all sessions."""

    def __init__(self, live_sessions: LiveSessions, store: MetadataStore, idempotency: IdempotencyKeys) -> None:
        self._live_sessions = live_sessions
        self._store = store
        self._idempotency = idempotency

    async def start(self, session_id: OwnedId, request: ProcessRequest) -> Once[ProcessRecord]:
        """Start a process; the session becomes live. Raises as LiveSessions.opened and Processes.start do."""
        if request.claim is None:
            return Once((await self._start(session_id, request)).record)
        async with self._idempotency.held(session_id, request.claim) as first:
            if first is not None and first.answer is not None:
                id = json.loads(first.answer)
                process = await self.find(session_id, id)
                if process is None or not process.never_began:
                    return Once(await self.get(session_id, id), replayed=True)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE):
                        await process.settled.wait()  # which frees the key
            return Once((await self._start(session_id, request)).record)

    async def _start(self, session_id: OwnedId, request: ProcessRequest) -> LiveProcess:
        """Start it, in a session that is live anew where it was put away or lost in the middle of that."""
        for _ in range(_TRIES):
            live = None
            try:
                async with self._live_sessions.opened(session_id) as live:
                    return await live.processes.start(request)
            except Unavailable:
                session = await self._store.session(session_id)  # raises where it was deleted meanwhile
                if live is None or live.is_open:
                    raise
                if session.key != live.session_key:
                    raise NotFound(f"Session '{session_id}' was deleted meanwhile.") from None
        error = Conflict(f"Session '{session_id}' is being stopped again and again.", hint="Send it again in a moment.")
        error.retry_after = 1
        raise error

    async def list(self, session_id: OwnedId) -> Sequence[ProcessRecord]:
        """Those that run and those that ended last, newest first."""
        recorded = await self._store.processes(session_id)
        session = await self._store.session(session_id)
        live = self._live_sessions.known(session.key)
        with nullcontext() if live is None else live.in_use():
            here = {} if live is None else {each.record.id: await each.shown() for each in live.processes.all}
            # One that has just begun may not be among the rows that were read.
            new = [here[id] for id in here.keys() - {record.id for record in recorded}]
            return [*sorted(new, key=lambda record: -record.started_at), *(here.get(r.id, r) for r in recorded)]

    async def get(self, session_id: OwnedId, name: str) -> ProcessRecord:
        """The process with this id or tag. Raises NoProcess."""
        live = await self.find(session_id, name)
        return await live.shown() if live is not None else await self._store.process(session_id, name)

    async def log(self, session_id: OwnedId, name: str) -> OutputLog:
        """What a process has written, as far as that is kept. Raises NoProcess."""
        live = await self.find(session_id, name)
        if live is not None:
            return live.log
        record = await self._store.process(session_id, name)
        return OutputLog.unpacked(record.tail, record.output_bytes, record.exit_code, record.signal, record.reason)

    async def followed(self, session_id: OwnedId, name: str) -> tuple[OutputLog, AbstractContextManager[object]]:
        """What a process has written and writes, and what to enter while it is followed, so that its session counts as
        in use. Raises NoProcess."""
        live = await self._live(session_id)
        if live is not None and (process := live.processes.find(name)) is not None:
            return process.log, live.in_use()
        return await self.log(session_id, name), nullcontext()

    async def end(self, session_id: OwnedId, name: str, why: str) -> None:
        """End a process, and return once it is dead and that is on record. One that has ended stays as it is. Raises
        NoProcess."""
        process = await self.find(session_id, name)
        if process is None:
            await self._store.process(session_id, name)
        else:
            await process.end(why)

    @asynccontextmanager
    async def running(self, session_id: OwnedId, name: str) -> AsyncIterator[LiveProcess]:
        """A process of a live session, with that in use within the block. It may have ended. Raises NoProcess, and
        InputClosed where its session isn't live any more."""
        session = await self._store.session(session_id)
        with self._live_sessions.in_use(session.key) as live:
            process = None if live is None else live.processes.find(name)
            if process is None:
                record = await self._store.process(session_id, name)
                raise InputClosed(f"Process '{record.id}' has ended.", code="process_ended", hint="Start another one.")
            yield process

    async def find(self, session_id: OwnedId, name: str) -> LiveProcess | None:
        """The process, if its session is live and knows it. Raises NotFound or Expired."""
        live = await self._live(session_id)
        return None if live is None else live.processes.find(name)

    async def _live(self, session_id: OwnedId) -> LiveSession | None:
        """The session, if it is live. Raises NotFound or Expired."""
        if (live := self._live_sessions.running(session_id)) is not None:
            return live
        session = await self._store.session(session_id)
        return self._live_sessions.known(session.key)
