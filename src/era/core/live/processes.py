"""The processes of one live session: started, followed, fed, signalled, ended, and put on record.

Theory of operation. What a process writes goes into its log as it comes (output_log.py), so that nobody who reads it
can hold it up. Its record is in the database from before it executes anything until its end; whatever is `running`
there at the next start of the service was lost. A process that has ended stays here with its output as long as its
session is live; after that its row has the end of it.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import structlog

from era.core.concurrency.late_ends import LateEnds
from era.core.concurrency.meter import turn
from era.core.live.output_log import OutputLog
from era.core.metadata import MetadataStore
from era.core.models import Claim, ServiceCommand, new_id, now
from era.core.ports import GuestProcess
from era.core.process import KEPT, SHOWN_BYTES, TAIL_BYTES, ProcessEnded, ProcessRecord, TerminalSize
from era.core.secrets import Secret
from era.errors import BadRequest, CommitFailed, EraError, InputClosed, TagInUse, TooManyProcesses, Unavailable

log = structlog.get_logger()

GRACE = 2.0
"""Seconds between telling a process to end and killing it."""

MOST = 64
"""Processes of a session at a time, where its `pids` allow that."""

_ENDED_BYTES = 8 << 20
"""Of output of ended processes, that a live session keeps besides the newest one's."""

ID = re.compile(r"proc_[0-9]+_[a-z0-9]{9}")
STOPPED = "It was ended on request."


@dataclass(frozen=True, slots=True)
class ProcessRequest:
    """A process to be started in a session."""

    base_url: str
    """This server's, for its ERA_BASE_URL."""

    command: ServiceCommand = field(repr=False)
    cwd: str = ""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: Sequence[Secret] = ()
    stdin: bool = False
    pty: TerminalSize | None = None
    tag: str | None = None
    timeout: float | None = None
    """Seconds; None is without end."""

    claim: Claim | None = None


class LiveProcess:
    """A process of a live session, running or ended."""

    def __init__(self, record: ProcessRecord) -> None:
        self.record = record
        self.log = OutputLog()
        self.ended = asyncio.Event()
        """It is dead, and that is told: it is on record, or the database has failed to take it."""

        self.settled = asyncio.Event()
        """It is dead, and there is nothing left to record of it."""

        self._begun = asyncio.Event()
        """It runs, or never will."""

        self._guest: GuestProcess | None = None
        self._takes_input = record.stdin or record.pty
        self._why: str | None = None
        self._timed_out = False

    @property
    def never_began(self) -> bool:
        """Whether it couldn't be started."""
        return self.record.status != "running" and self.record.pid is None

    async def shown(self) -> ProcessRecord:
        """Its record as things are at this moment. That it has ended is told once it is on record: who has heard that
        hears nothing else after a restart, unless the database is away."""
        if self.record.status != "running":
            await self.ended.wait()
        return replace(self.record, output_bytes=self.log.total)

    def started(self, guest: GuestProcess) -> None:
        self._guest = guest
        self.record = replace(self.record, pid=guest.pid)
        self._begun.set()

    async def follow(self, guest: GuestProcess, why_gone: Callable[[], str | None]) -> None:
        """Take its output until it has ended, and say how in `record` and log. `why_gone` tells why the sandbox was
        closed, if it was."""
        ended: ProcessEnded | None = None
        async for event in guest.events():
            if isinstance(event, ProcessEnded):
                ended = event
            else:
                self.log.append(event.stream, event.data)
                await turn()
        if ended is None or ended.cause == "sandbox_died":
            self._because(why_gone() or "The session's sandbox failed.")
        elif ended.signal == signal.SIGKILL and (why := why_gone()):
            self._because(why)
        elif ended.cause == "oom":
            self._because("It was out of memory.")
        code = None if ended is None else 124 if self._timed_out else ended.exit_code
        self.finish(code, None if ended is None else ended.signal)

    def fail(self, why: str) -> None:
        """It couldn't be started."""
        self._because(why)
        self.finish(None, None)
        self._begun.set()

    def finish(self, exit_code: int | None, signal: int | None) -> None:
        """It is dead. Nobody is told before that is on record."""
        self.log.flush()
        self.record = replace(
            self.record,
            status="ended",
            ended_at=now(),
            exit_code=exit_code,
            signal=signal,
            reason=self._why,
            output_bytes=self.log.total,
        )

    def tell_end(self) -> None:
        """It is dead, and that is on record, or can't be for now."""
        self.log.finish(self.record.exit_code, self.record.signal, self.record.reason)
        self.ended.set()

    def _because(self, why: str) -> None:
        self._why = self._why or why

    async def write(self, data: bytes) -> None:
        """Write to its standard input or terminal. Raises InputClosed."""
        guest = self._taking_input()
        try:
            await guest.write(data)
        except BrokenPipeError:
            self._takes_input = False
            self._taking_input()

    async def close_stdin(self) -> None:
        """End its standard input; at a terminal that is what Ctrl-D does. Raises InputClosed."""
        guest = self._taking_input()
        if not self.record.pty:
            self._takes_input = False
        try:
            await guest.close_stdin()
        except BrokenPipeError:
            self._takes_input = False
            self._taking_input()

    def _running(self) -> GuestProcess:
        """The process itself. Raises InputClosed where it has ended, or has just begun to begin."""
        if self.record.status != "running" or self._guest is None:
            raise InputClosed(f"Process '{self.record.id}' has ended.", code="process_ended", hint="Start another one.")
        return self._guest

    def check_input(self) -> None:
        """Raises InputClosed where it takes no input now."""
        self._taking_input()

    def _taking_input(self) -> GuestProcess:
        guest = self._running()
        if not self._takes_input:
            why = "no more" if self.record.stdin or self.record.pty else "no"
            raise InputClosed(f"Process '{self.record.id}' takes {why} input.")
        return guest

    async def signal(self, number: int) -> None:
        """Send a signal to its process group. Raises Conflict where it has ended."""
        await self._running().signal(number)

    async def resize(self, size: TerminalSize) -> None:
        """Give its terminal another size. Raises BadRequest where it has none, Conflict where it has ended."""
        if not self.record.pty:
            raise BadRequest(f"Process '{self.record.id}' has no terminal.", hint='Start it with a "pty".')
        await self._running().resize(size)

    async def end(self, why: str, *, timed_out: bool = False) -> None:
        """Tell it to end, kill it two seconds later, and return once it is dead and that is on record."""
        await self._begun.wait()
        if self.record.status == "running" and self._guest is not None:
            self._because(why)
            self._timed_out |= timed_out
            await self._guest.signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(GRACE):
                    await self.ended.wait()
            except TimeoutError:
                await self._guest.kill()
        await self.ended.wait()


class Processes:
    """The processes of one live session."""

    def __init__(
        self,
        session_key: int,
        store: MetadataStore,
        most: int,
        start: Callable[[ProcessRequest, Callable[[], Awaitable[None]]], Awaitable[GuestProcess]],
        *,
        ended: Callable[[ProcessRequest], None],
        why_gone: Callable[[], str | None],
        late_ends: LateEnds,
    ) -> None:
        """`most` run at a time. `start` starts one in the sandbox, and waits by its second argument until that is
        on record before it executes anything; `ended` is called when one has ended. `late_ends` records what can't be
        recorded at once."""
        self._session_key = session_key
        self._store = store
        self._most = most
        self._start = start
        self._ended = ended
        self._why_gone = why_gone
        self._late_ends = late_ends
        self._all: dict[str, LiveProcess] = {}
        """By id, oldest first."""

        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> Sequence[LiveProcess]:
        return [process for process in self._all.values() if process.record.status == "running"]

    @property
    def all(self) -> Sequence[LiveProcess]:
        """Those that run and those that ended while the session was live, oldest first."""
        return list(self._all.values())

    def find(self, name: str) -> LiveProcess | None:
        """The process with this id, or else the one with this tag that runs, or else the newest with it."""
        if name in self._all:
            return self._all[name]
        tagged = [process for process in self._all.values() if process.record.tag == name]
        return next((each for each in tagged if each.record.status == "running"), tagged[-1] if tagged else None)

    async def start(self, request: ProcessRequest) -> LiveProcess:
        """Start a process. Raises TooManyProcesses, TagInUse, SandboxFailed."""
        # Those whose ends are yet to be recorded, too: they are kept for as long as the database takes none.
        counted = [process for process in self._all.values() if not process.settled.is_set()]
        if len(counted) >= self._most:
            raise TooManyProcesses(
                f"This session runs {self._most} processes, as many as it may.",
                details=[{"process_id": each.record.id, "tag": each.record.tag} for each in counted],
            )
        if request.tag is not None and any(each.record.tag == request.tag for each in self.running):
            raise TagInUse(f"A process with the tag '{request.tag}' runs.")
        record = ProcessRecord(
            id=new_id("proc"),
            session_key=self._session_key,
            command=_shown(request.command),
            started_at=now(),
            tag=request.tag,
            stdin=request.stdin,
            pty=request.pty is not None,
        )
        process = self._all[record.id] = LiveProcess(record)
        recording = asyncio.create_task(self._store.begin_process(record, request.claim))
        try:
            guest = await self._start(request, lambda: asyncio.shield(recording))
        except BaseException as error:
            await asyncio.wait({recording})
            failure = recording.exception()
            if failure is not None:
                process.fail("It could not be put on record.")
            else:
                process.fail(error.message if isinstance(error, EraError) else "The service failed.")
            if failure is None or (isinstance(failure, Unavailable) and failure.may_have_committed):
                self._begin(self._record_end(process, request.claim))
            else:
                del self._all[record.id]
                process.tell_end()  # to who has found it meanwhile
            raise
        process.started(guest)
        self._begin(self._follow(process, guest, request))
        if request.timeout is not None:
            self._begin(self._time_out(process, request.timeout))
        return process

    async def end_all(self, why: str) -> None:
        """End all that run. Returns once they are dead and on record."""
        await asyncio.gather(*(process.end(why) for process in self.running if process.record.pid is not None))

    @property
    def are_settled(self) -> bool:
        """Whether nothing runs any more, and all that has ended is on record."""
        return all(process.settled.is_set() for process in self._all.values())

    async def settled(self, seconds: float) -> None:
        """Wait until all that has ended is on record, at most so many seconds. Nothing runs any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while tasks := [task for task in self._tasks if not task.done()]:
                    await asyncio.wait(tasks)
                for process in self.all:
                    await process.settled.wait()

    async def close(self, seconds: float) -> None:
        """Wait until all that has ended is on record, at most so many seconds. Nothing is recorded any more then."""
        await self.settled(seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, process: LiveProcess, guest: GuestProcess, request: ProcessRequest) -> None:
        try:
            await process.follow(guest, self._why_gone)
        except Exception:
            log.exception("process_not_followed", process=process.record.id)
            process.finish(None, None)
        self._ended(request)
        await self._record_end(process)

    async def _record_end(self, process: LiveProcess, freed: Claim | None = None) -> None:
        """Record that it has ended, now or once the database takes it. The end is told in either case."""

        async def attempt() -> bool:
            is_settled, is_first = True, not process.ended.is_set()
            try:
                await self._store.end_process(replace(process.record, tail=process.log.packed(TAIL_BYTES)), freed)
            except EraError as error:
                # Where the session has another home (Fenced), whoever took it has recorded it as lost.
                is_settled = not isinstance(error, Unavailable) or isinstance(error, CommitFailed)
                if is_first or is_settled:  # else the log has it
                    log.warning("process_not_recorded", process=process.record.id, error=error.message)
            finally:
                if is_settled:
                    process.settled.set()
                process.tell_end()
                self._forget()
            return is_settled

        if not await attempt():
            self._late_ends.add(attempt)

    async def _time_out(self, process: LiveProcess, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await process.ended.wait()
        except TimeoutError:
            await process.end(f"It reached its timeout of {seconds:g} seconds.", timed_out=True)

    def _forget(self) -> None:
        """Forget the oldest ended ones that are too many, or have too much output. Their rows stay."""
        ended = [each for each in self._all.values() if each.settled.is_set()]
        size = sum(each.log.kept_bytes for each in ended[:-1])
        while len(ended) > KEPT or (size > _ENDED_BYTES and len(ended) > 1):
            size -= ended[0].log.kept_bytes
            del self._all[ended.pop(0).record.id]


def _shown(command: ServiceCommand) -> ServiceCommand:
    """A command as it is put on record."""
    if isinstance(command, str):
        return command if len(command.encode()) <= SHOWN_BYTES else f"{command[: SHOWN_BYTES // 4]}…"
    shown: list[str] = []
    left = SHOWN_BYTES
    for word in command:
        left -= len(word.encode()) + 8
        if left < 0:
            return [*shown, "…"]
        shown.append(word)
    return shown
