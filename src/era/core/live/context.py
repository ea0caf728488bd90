"""One context: an interpreter that stays, and the cells that it executes one after the other.

Theory of operation
===================

The interpreter is a process of the session's process supervisor, with a channel to a kernel of ours in it
(guest/python_kernel.py, guest/node_kernel.cjs). One task reads what comes out of it as long as it lives, so it never
waits for us. What comes while no cell is under way, from threads and from what cells have started, is kept up to a
bound and belongs to the next cell.

*The end of a cell* is what the kernel says over the channel, once the marks behind the cell's output have come, too.

*Interrupts.* At its deadline, or when somebody wants it stopped, a cell gets SIGINT. If it goes on for GRACE seconds,
the interpreter is killed. That loses the variables, and the answer says so. So seconds don't count in which the machine
was too busy for the sandbox to get on, or for us to hear that the cell had ended. Node loses signals, or even dies of
one, in the moment in which a cell's synchronous part ends. So its kernel is told by a message first, which it takes
whenever the cell waits for something, and gets SIGINT only where the cell goes on computing, or waits without hearing.

*Trust.* All that comes from the process may have been made by a cell. It can end the interpreter, and lie about
results, variables and output: those of its own session. What isn't a message at all ends the interpreter.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import structlog

from era.core import jsontext
from era.core.concurrency.meter import turn
from era.core.concurrency.outages import note_outage
from era.core.concurrency.stall_timeout import stall_timeout
from era.core.concurrency.tasks import log_failure
from era.core.live.kernel_frames import (
    INTERRUPT_FRAME,
    RESULTS_BYTES,
    CellEnd,
    CellOrder,
    CellResults,
    Frames,
    KernelBroken,
    cell_frame,
    parse,
)
from era.core.models import JsonObject, now
from era.core.ports import GuestProcess
from era.core.process import ProcessEnded, ProcessOutput
from era.core.program import STREAMS, CellEvent, Output, Program, Stream, WriteCell
from era.errors import Unavailable

log = structlog.get_logger()

GRACE, _GRACE_MOST = 2.0, 30.0
"""Seconds that an interrupted cell has to end: not counting those in which it didn't get the processors that it wanted,
or in which we weren't up to date with what its interpreter says; and in all."""

_LOOKS = 4
"""How often within GRACE it is looked whether they count."""

_LITTLE = 0.2
"""A sandbox that wants a processor and gets less than this much of one doesn't get on."""

_BACKLOG_BYTES = 1 << 18
"""What comes behind so many bytes was written after the interrupt: pipes and the process supervisor hold less."""

_START_SECONDS = 60.0
"""How long an interpreter that uses no processor is waited for: what it needs may be being prepared."""

_HEAR_SECONDS, _HEAR_CPU_SECONDS = 0.05, 0.02
"""What a kernel that can be told of an interrupt has to take it, before it gets SIGINT: this time, in which its sandbox
uses so much processor time. It takes microseconds of it, which a busy machine may not give it at once."""

_HEAR_MOST, _HEAR_WANTING_MOST = 0.5, 5.0
"""It gets SIGINT after so many seconds in any case: a cell may wait for something without hearing anything. What wants
a processor doesn't wait, but may not get one, and is given longer."""

_MARK_SECONDS, _MARK_MOST_SECONDS = 10.0, 60.0
"""How long marks are waited for while no output comes; and in all, since what a cell has left behind may write for
ever. They come at once, unless output is taken slowly, or a cell has changed what its descriptors are."""

_BETWEEN_BYTES = 64 << 10
"""Of output between cells that is kept, of each stream."""

_GONE = ProcessEnded(128 + signal.SIGKILL, signal.SIGKILL, "sandbox_died")
_UNHEARD = ProcessEnded(128 + signal.SIGKILL, signal.SIGKILL, "signal", with_supervisor=True)
"""The end of an interpreter that isn't heard any more. As with the end of its supervisor, a cell may have begun."""

_FDS: Mapping[int, Stream] = {1: "stdout", 2: "stderr"}


@dataclass(frozen=True, slots=True)
class CellOutcome:
    """How a cell ended."""

    cause: Literal["exit", "signal", "timeout", "oom", "killed"]
    exit_code: int
    duration: float
    """Seconds."""

    results: list[JsonObject]
    """In order: `data` by MIME type, `metadata`, and whether it is the value of the last expression (`main`)."""

    results_truncated: bool
    error: JsonObject | None
    """`name`, `value`, `traceback`."""

    execution_count: int
    stdout_truncated: bool
    stderr_truncated: bool
    lost: str | None
    """Why the interpreter has ended, if it has: a sentence."""

    sandbox_alive: bool


class NotBegun(Exception):
    """The interpreter had surely ended before it began the cell."""


@dataclass(slots=True)
class _Running:
    """The cell under way."""

    timeout: float
    """Seconds until it is interrupted."""

    write: WriteCell
    order: CellOrder
    results: CellResults
    done: asyncio.Future[None]
    """Ends once the cell has ended or the interpreter has, or with the error that output couldn't be kept for."""

    room: dict[Stream, int]
    truncated: set[Stream] = field(default_factory=set)
    end: CellEnd | None = None
    timed_out: bool = False
    interrupted: bool = False
    """By somebody else than itself."""

    begun: bool = False
    """It can be interrupted: SIGINT does nothing before, or kills."""

    signalled: bool = False
    """It is to be, as soon as it has begun."""

    told: bool = False
    """Its kernel was told of an interrupt by a message."""

    stopping: bool = False
    """It is killed if it goes on."""

    marks_until: float = 0.0
    """When, by the loop's clock, marks aren't waited for any more, whatever comes."""

    marks_timer: asyncio.TimerHandle | None = None
    """Ends the wait for marks."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended, and only the rest of its output is awaited."""
        return self.end is not None and not self.end.ends

    def is_awaited(self, fd: int) -> bool:
        """Whether a mark is to come behind the output of a descriptor."""
        return self.end is not None and fd in self.end.marked and not self.order.has_ended(fd)


class Context:
    """An interpreter. `start` it before anything else."""

    def __init__(
        self,
        name: str,
        language: str,
        process: GuestProcess,
        cpu_seconds: Callable[[], float],
        wants_processor: Callable[[], bool],
    ) -> None:
        """`cpu_seconds` is how much processor time the sandbox has used, and `wants_processor` whether it wants some at
        this moment."""
        self.name = name
        self.language = language
        self.kernel = ""
        """What the interpreter is, with its version."""

        self.started_at = now()
        self.used_at = time.monotonic()
        self.execution_count = 0
        self.memory_bytes: int | None = None
        self.lost: str | None = None
        """Why it has ended, as a sentence; None as long as it lives."""

        self._process = process
        self._cpu_seconds, self._wants_processor = cpu_seconds, wants_processor
        self._ready = asyncio.Event()
        self._hears = False
        """Whether the kernel takes interrupts as messages."""

        self._frames = Frames()
        self._running: _Running | None = None
        self._ended: ProcessEnded | None = None
        self._between = {stream: bytearray() for stream in STREAMS}
        self._between_truncated: set[Stream] = set()
        self._why: str | None = None
        """Why it is being ended."""

        self._is_taking = False
        """Whether something that has come from the process is being taken, behind which there may be more."""

        self._taken_bytes = 0
        self._stopping: list[asyncio.Task[None]] = []
        """What kills the interpreter if the cell under way goes on."""

        self._following = asyncio.create_task(self._follow())
        self._following.add_done_callback(lambda task: log_failure(task, "context_failed"))

    @property
    def alive(self) -> bool:
        return self._ended is None

    @property
    def busy(self) -> bool:
        return self._running is not None

    async def ready(self) -> None:
        """Wait until it can take cells. Raises Unavailable, and then it has ended."""
        waiting = asyncio.create_task(self._ready.wait())
        try:
            with contextlib.suppress(TimeoutError):
                async with stall_timeout(self._cpu_seconds, _START_SECONDS):
                    await asyncio.wait([waiting, self._following], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if not self._ready.is_set():
            said = bytes(self._between["stderr"][-500:]).decode(errors="replace").strip()
            ended = self.lost
            await self.close("It did not start.")
            raise Unavailable(
                f"The interpreter of context '{self.name}' did not start: {said or ended or 'it took too long.'}",
                hint="A new server first prepares what contexts need, once. Try again in a minute.",
            )

    async def execute(self, cell: Program, output_bytes: int, write: WriteCell) -> CellOutcome:
        """Execute a cell; `write` gets its output and events as they come, up to `output_bytes` of stdout, of stderr
        and of results. One at a time. Raises NotBegun, or what `write` does."""
        if not self.alive:
            raise NotBegun
        event_mark, end_mark = (f"\0era:{secrets.token_hex(16)}\0" for _ in range(2))
        running = self._running = _Running(
            cell.timeout,
            write,
            CellOrder(_FDS, event_mark.encode(), end_mark.encode()),
            CellResults(min(output_bytes, RESULTS_BYTES)),
            asyncio.get_running_loop().create_future(),
            dict.fromkeys(STREAMS, output_bytes),
            self._between_truncated,
        )
        self._between_truncated = set()
        try:
            for stream, content in self._between.items():
                if content:
                    await self._give(running, Output(stream, bytes(content)))
                    content.clear()
            frame = {**_described(cell), "event_mark": event_mark, "mark": end_mark, "limit": running.results.limit}
            begun = time.monotonic()
            sending = asyncio.create_task(self._process.send(cell_frame(frame)))
            was_sent = False
            try:
                await self._end_of(running)
            finally:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, BrokenPipeError):
                    await sending
                    was_sent = True
            # All that an interpreter has written comes before its end, so also that the cell has begun. Only the end of
            # its supervisor may hide that.
            is_sure = not was_sent or self._ended is None or not self._ended.with_supervisor
            if is_sure and running.end is None and not (running.begun or running.timed_out or running.interrupted):
                raise NotBegun
            for fd, stream in _FDS.items():
                if running.is_over and running.is_awaited(fd):
                    running.truncated.add(stream)  # what still comes will be taken for the next cell's
            for item in running.order.rest():
                await self._give(running, item)
            if running.end is not None and (error := running.end.event) is not None:
                await self._give(running, error)
            return self._outcome(running, time.monotonic() - begun)
        finally:
            self._running = None
            self.used_at = time.monotonic()
            for stopping in self._stopping:
                stopping.cancel()
            self._stopping.clear()
            self._stop_waiting_for_marks(running)

    async def interrupt(self) -> bool:
        """Interrupt the cell under way, which may go on all the same. Whether there is one."""
        running = self._running
        if running is None or running.done.done():
            return False
        running.interrupted = True
        self._signal(running)
        return True

    async def stop_cell(self) -> None:
        """Interrupt the cell under way, and kill the interpreter if it goes on. May be called again."""
        running = self._running
        if running is not None and not running.done.done() and not running.stopping and not running.is_over:
            running.interrupted = True
            self._stop(running, "a cell did not end when it was stopped")

    async def close(self, why: str) -> None:
        """End the interpreter. `why` is a sentence."""
        self._why = self._why or why
        await self._process.kill()
        await asyncio.wait([self._following])

    # -- a cell -----------------------------------------------------------------------------------------------------

    async def _end_of(self, running: _Running) -> None:
        """Wait for the end of a cell, and see to it that it has one."""
        await asyncio.wait([running.done], timeout=running.timeout)
        if not running.done.done() and not running.is_over:
            running.timed_out = True
            self._stop(running, "a cell went on after its timeout")
        await running.done

    def _stop(self, running: _Running, why: str) -> None:
        """Interrupt it, and send SIGKILL if it goes on for GRACE."""
        running.stopping = True
        self._signal(running)
        self._stopping.append(asyncio.create_task(self._kill_unless_over(running, why)))

    def _signal(self, running: _Running) -> None:
        """Interrupt it, now or once the cell has begun."""
        running.signalled = True
        if running.begun:
            self._signalling = asyncio.create_task(self._have_interrupted(running))

    async def _have_interrupted(self, running: _Running) -> None:
        """Tell the kernel, if it can be told and hasn't been; send SIGINT where that isn't enough."""
        if self._hears and not running.told:
            running.told = True
            with contextlib.suppress(OSError):  # it can't be told, or what it uses can't be read
                await self._process.send(INTERRUPT_FRAME)
                told_at, used = time.monotonic(), self._cpu_seconds()
                while not running.done.done():
                    await asyncio.sleep(_HEAR_SECONDS)
                    waited = time.monotonic() - told_at
                    if self._cpu_seconds() - used >= _HEAR_CPU_SECONDS or waited >= _HEAR_WANTING_MOST:
                        break
                    if waited >= _HEAR_MOST and not self._wants_processor():
                        break
        if self._running is running and not running.done.done():
            await self._process.signal(signal.SIGINT)

    async def _kill_unless_over(self, running: _Running, why: str) -> None:
        """Send SIGKILL after GRACE in which the cell could have ended, and its end could have been heard."""
        try:
            await self._give_grace(running)
        except Exception:  # a bug, and no reason to let a cell go on
            log.exception("cell_not_followed")
        if self._running is running and not running.done.done() and not running.is_over:
            self._why = self._why or f"It was killed, since {why}."
            self._killing = asyncio.create_task(self._process.kill())  # whose end is the end of this task

    async def _give_grace(self, running: _Running) -> None:
        began = time.monotonic()
        give_up_at, backlog_end = began + GRACE, self._taken_bytes + _BACKLOG_BYTES
        at, used = began, self._used()
        while at < give_up_at and not running.is_over:
            await asyncio.sleep(GRACE / _LOOKS)
            before, at = at, time.monotonic()
            used_before, used = used, self._used()
            is_late = at - before > 2 * GRACE / _LOOKS  # and so is what tells of the end, where there is one
            is_behind = self._is_taking and self._taken_bytes < backlog_end
            if is_late or is_behind or self._gets_little(used_before, used, at - before):
                give_up_at = min(at + GRACE, began + _GRACE_MOST)

    def _used(self) -> float | None:
        """How much processor time the sandbox has used; None where that can't be told for now."""
        try:
            return self._cpu_seconds()
        except OSError as error:
            note_outage("processor_time_not_followed", error)
            return None

    def _gets_little(self, before: float | None, used: float | None, seconds: float) -> bool:
        """Whether the sandbox wants a processor and hasn't got on for so many seconds, as far as that is known."""
        if before is None or used is None or used - before >= _LITTLE * seconds:
            return False
        try:
            return self._wants_processor()
        except OSError as error:
            note_outage("processor_time_not_followed", error)
            return False

    def _outcome(self, running: _Running, duration: float) -> CellOutcome:
        end, ended = running.end, self._ended
        cause: Literal["exit", "signal", "timeout", "oom", "killed"] = "exit"
        if end is not None:
            exit_code = end.exit_code
            self.memory_bytes = end.memory_bytes
            if running.interrupted and end.interrupted:
                cause, exit_code = "killed", 128 + signal.SIGINT
        else:
            ended = ended or _GONE
            cause, exit_code = ("killed" if ended.cause == "sandbox_died" else ended.cause), ended.exit_code
            if self._why is not None:
                cause = "killed"
        if running.timed_out:
            cause, exit_code = "timeout", 124
        self.execution_count += 1
        if end is not None and end.execution_count is not None:
            self.execution_count = end.execution_count
        return CellOutcome(
            cause,
            exit_code,
            duration,
            running.results.results,
            running.results.truncated or (end is not None and end.truncated),
            end.error if end is not None else None,
            self.execution_count,
            "stdout" in running.truncated,
            "stderr" in running.truncated,
            self.lost,
            ended is None or ended.cause != "sandbox_died",
        )

    # -- what comes from the process --------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Take what the process writes, until it has ended."""
        try:
            async for event in self._process.events():
                if isinstance(event, ProcessEnded):
                    self._on_end(event)
                    return
                self._is_taking = True
                if self._why is None or event.stream != "channel":
                    await self._on_output(event)
                await turn()
                self._taken_bytes += len(event.data)
                self._is_taking = False
        finally:
            if self._ended is None:  # a bug, and no reason to have a cell waited for without end
                self._why = self._why or "It was killed, since the service failed to follow it."
                self._on_end(_UNHEARD)
                await self._process.kill()

    async def _on_output(self, event: ProcessOutput) -> None:
        running = self._running
        if event.stream == "channel":
            try:
                for kind, payload in self._frames.feed(event.data):
                    await self._on_frame(kind, payload)
                    await turn()
            except KernelBroken as broken:
                self._why = f"It was killed, since its interpreter {broken}."
                await self._process.kill()
            return
        fd = 2 if event.stream == "stderr" else 1
        after = event.data
        if running is not None and not running.done.done():
            self._stop_waiting_for_marks(running)  # while this is taken, however long that takes
            after = running.order.write(fd, event.data)
            if not await self._give_in_order(running):
                return
            self._look_whether_done(running)
        self._keep(_FDS[fd], after)

    async def _on_frame(self, kind: bytes, payload: bytes) -> None:
        """Raises KernelBroken."""
        running = self._running
        if kind == b"Y":
            told = await _beside(parse, payload)
            self.kernel = str(told.get("kernel", ""))[:100]
            self._hears = told.get("hears") is True
            self._ready.set()
        elif running is None or running.end is not None:
            if kind in (b"P", b"C"):
                return  # of a thread or a fork that shows something once its cell has ended
            raise KernelBroken("wrote about a cell while there was none")
        elif kind == b"B" and running.begun:
            raise KernelBroken("wrote twice that a cell had begun")
        elif kind == b"B":
            running.begun = True
            if running.signalled:
                self._signal(running)
        elif kind in (b"P", b"C"):
            take = running.results.add if kind == b"P" else running.results.clear
            event, marked = await _beside(take, payload)
            if not running.done.done():
                running.order.show(event, marked)
                await self._give_in_order(running)
        elif kind == b"D":
            running.end = await _beside(CellEnd.parsed, payload)
            if running.end.ends:
                self._why = "The program ended the interpreter."
            running.marks_until = asyncio.get_running_loop().time() + _MARK_MOST_SECONDS
            self._look_whether_done(running)

    def _look_whether_done(self, running: _Running) -> None:
        """Finish the cell if its end and all marks have come; wait for those a while longer if only its end has."""
        if not running.is_over:  # where it ends the interpreter, it is done with that
            return
        if not any(map(running.is_awaited, _FDS)):
            _finish(running.done)
            return
        loop = asyncio.get_running_loop()
        until = min(loop.time() + _MARK_SECONDS, running.marks_until)
        running.marks_timer = loop.call_at(until, _finish, running.done)

    def _stop_waiting_for_marks(self, running: _Running) -> None:
        if running.marks_timer is not None:
            running.marks_timer.cancel()

    def _on_end(self, ended: ProcessEnded) -> None:
        self._ended = ended
        self.lost = self._why or _how(ended)
        if self._running is not None:
            _finish(self._running.done)

    async def _give_in_order(self, running: _Running) -> bool:
        """Pass on what is in its place by now. Returns whether it could be kept. If not, the cell is done with that
        error."""
        try:
            for item in running.order.take():
                await self._give(running, item)
        except BaseException as error:
            running.done.set_exception(error)
            return False
        return True

    async def _give(self, running: _Running, item: Output | CellEvent) -> None:
        """Pass on an event of the cell, or output, as much as it may have."""
        if isinstance(item, CellEvent):
            await running.write(item)
            return
        stream, data = item.stream, item.data
        room = running.room[stream]
        if len(data) > room:
            running.truncated.add(stream)
            data = data[:room]
        if data:
            running.room[stream] -= len(data)
            await running.write(Output(stream, data))

    def _keep(self, stream: Stream, data: bytes) -> None:
        """Keep output for the next cell."""
        room = _BETWEEN_BYTES - len(self._between[stream])
        self._between[stream] += data[:room]
        if len(data) > room:
            self._between_truncated.add(stream)


def _described(cell: Program) -> JsonObject:
    """What a kernel is told of a cell."""
    invocation = cell.invocation
    return {
        "code": cell.code.decode(),
        "env": dict(cell.env),
        "cwd": invocation.cwd,
        "stdin": invocation.stdin.decode(),
    }


async def _beside[T](take: Callable[[bytes], T], payload: bytes) -> T:
    """Take a payload: in a thread where it is long, since its values may be many. The next frame is taken only then."""
    return await jsontext.aside(take, payload) if len(payload) > jsontext.IN_THREAD else take(payload)


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _how(ended: ProcessEnded) -> str:
    """How an interpreter ended, as a sentence."""
    match ended.cause:
        case "oom":
            return "Its interpreter was out of memory."
        case "sandbox_died":
            return "The session's sandbox died."
        case "signal":
            return f"Its interpreter was killed by signal {ended.signal}."
        case _:
            return f"The program ended the interpreter with exit code {ended.exit_code}."
