"""The host's end of a process supervisor: processes of one sandbox, what goes in and out of them.

guest/process_supervisor.py is the other end, and has the wire format and the theory of operation. A sandbox of
bubblewrap starts its process supervisor when it is first needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Literal, Protocol

from era.core.concurrency.meter import turn
from era.core.concurrency.stall_timeout import stall_timeout
from era.core.concurrency.streams import over_socket, write
from era.core.models import JsonObject
from era.core.process import ProcessEnded, ProcessOutput, ProcessSpec, ProcessStream, TerminalSize
from era.drivers.channel import receive_guest_listeners
from era.drivers.forking import TemplateFailed
from era.drivers.guest import with_library
from era.drivers.memory import OutOfMemory
from era.drivers.socket_broker import SocketBroker
from era.drivers.watching import Watching
from era.errors import SandboxFailed

ROOM = 1 << 17
"""Bytes of a process's output that are kept here until somebody reads them, and of input that are kept there."""

_MEMORY_SECONDS = 0.2
"""For it to say what memory processes take, while that may grow."""

_MEMORY_LOOK_SECONDS, _MEMORY_LOOKS = 0.05, 36
"""How much longer at a time, and how often, where there is room for what may be taken meanwhile. A busy machine needs
that."""

_CHUNK = 1 << 15
"""Bytes of input in a frame. Frames of many processes go over one socket."""

_GIVEN_AGAIN = ROOM // 4
"""Room is given again in portions of so many bytes."""

_MOST_IN_FRAME = 1 << 17
_STREAMS: dict[bytes, ProcessStream] = {b"O": "stdout", b"E": "stderr", b"P": "pty", b"C": "channel"}
_USED = ("cpu_us", "peak_memory_bytes")
_KILLED = 128 + signal.SIGKILL


class _InputStream:
    """A way into a process: its standard input or its channel."""

    def __init__(self, *, is_open: bool) -> None:
        self.is_open = is_open
        self._room = ROOM
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()

    async def write(self, data: bytes, send: Callable[[bytes], None]) -> None:
        """Send all of it, as there comes room for it. Raises BrokenPipeError."""
        rest = memoryview(data)
        async with self._turn:
            while True:
                if not self.is_open:
                    raise BrokenPipeError("the process takes no input, or no more")
                if not rest:
                    return
                count = min(len(rest), self._room, _CHUNK)
                if count > 0:
                    self._room -= count
                    send(bytes(rest[:count]))
                    rest = rest[count:]
                else:
                    self._changed.clear()
                    await self._changed.wait()

    def charge(self, count: int) -> None:
        """So many bytes are written that didn't come by `write`."""
        self._room -= count

    def taken(self, count: int) -> None:
        """There is room for so many bytes again. Raises SandboxFailed where there can't be."""
        if self._room + count > ROOM:
            raise SandboxFailed("The process supervisor does not keep to its limits.")
        self._room += count
        self._changed.set()

    def close(self) -> None:
        self.is_open = False
        self._changed.set()


class GuestProcess:
    """See ports.GuestProcess."""

    def __init__(self, supervisor: ProcessSupervisor, number: int, spec: ProcessSpec) -> None:
        self.pid = 0
        self.started = asyncio.Event()
        self._supervisor, self._number = supervisor, number
        self._has_terminal = spec.pty is not None
        self._stdin = _InputStream(is_open=spec.stdin or self._has_terminal)
        self._channel = _InputStream(is_open=spec.channel)
        self._events: deque[ProcessOutput | ProcessEnded] = deque()
        self._more = asyncio.Event()
        self._room = ROOM
        """What the supervisor may still send."""

        self._read = 0
        """Bytes that were read since room was given again."""

        self._is_abandoned = False
        self._ended: ProcessEnded | None = None
        self._was_killed = False
        """Whether we have sent a signal that it can't have survived."""

    async def events(self) -> AsyncIterator[ProcessOutput | ProcessEnded]:
        while True:
            while not self._events:
                self._more.clear()
                await self._more.wait()
            event = self._events.popleft()
            yield event
            if isinstance(event, ProcessEnded):
                return
            self._read += len(event.data)
            if self._read >= _GIVEN_AGAIN:
                self._room += self._read
                self._send(b"A", self._read.to_bytes(4, "big"))
                self._read = 0

    async def write(self, data: bytes) -> None:
        self._supervisor.awaited()
        await self._stdin.write(data, lambda piece: self._send(b"W", piece))

    async def close_stdin(self) -> None:
        if self._stdin.is_open:
            self._send(b"X")
            if self._has_terminal:
                self._stdin.charge(1)  # its end-of-file character
            else:
                self._stdin.close()

    async def send(self, data: bytes) -> None:
        self._supervisor.awaited()
        await self._channel.write(data, lambda piece: self._send(b"H", piece))

    async def signal(self, number: int, *, group: bool = True) -> None:
        self._supervisor.awaited()  # it may have to handle it soon
        self._was_killed |= number == signal.SIGKILL
        self._send(b"G", bytes([number, group]))

    async def kill(self) -> None:
        self._was_killed = True
        self._send(b"K")
        if self._ended is None:
            self._supervisor.expect_answer()

    def abandon(self) -> None:
        """Kill it, and keep nothing of what it says."""
        self._is_abandoned = True
        self._send(b"K")

    async def resize(self, size: TerminalSize) -> None:
        self._send(b"Z", size.cols.to_bytes(2, "big") + size.rows.to_bytes(2, "big"))

    def _send(self, kind: bytes, payload: bytes = b"") -> None:
        if self._ended is None or kind == b"K":  # what has descended from it may live on
            self._supervisor.send(kind, self._number, payload)

    def on_frame(self, kind: bytes, payload: bytes) -> None:
        """Take a frame of the supervisor's. Raises SandboxFailed where that is not what it was."""
        if kind in _STREAMS:
            if len(payload) > self._room:
                raise SandboxFailed("The process supervisor does not keep to its limits.")
            if self._is_abandoned:
                self._send(b"A", len(payload).to_bytes(4, "big"))
                return
            self._room -= len(payload)
            self._add(ProcessOutput(_STREAMS[kind], payload))
        elif kind == b"S":
            self.pid = int.from_bytes(payload, "big")
            self.started.set()
        elif kind in (b"a", b"c"):
            (self._stdin if kind == b"a" else self._channel).taken(int.from_bytes(payload, "big"))
        elif kind in (b"x", b"y"):
            (self._stdin if kind == b"x" else self._channel).close()
        elif kind == b"D":
            self.end(self._parse_ended(json.loads(payload)))

    def _parse_ended(self, report: JsonObject) -> ProcessEnded:
        """Parse the payload of a D frame. Raises ValueError, KeyError, TypeError, OverflowError."""
        number = None if report["signal"] is None else int(report["signal"])
        cause: Literal["exit", "signal", "oom"] = "exit" if number is None else "signal"
        if number == signal.SIGKILL and not self._was_killed and self._supervisor.out_of_memory.has_killed(self.pid):
            cause = "oom"
        cpu, memory = (None if (value := report[name]) is None else int(value) for name in _USED)
        return ProcessEnded(int(report["exit_code"]), number, cause, cpu, memory)

    def end(self, ended: ProcessEnded) -> None:
        if self._ended is None:
            self._ended = ended
            self._add(ended)
            self._stdin.close()
            self._channel.close()
            self.started.set()

    def _add(self, event: ProcessOutput | ProcessEnded) -> None:
        self._events.append(event)
        self._more.set()


class Life(Protocol):
    """A process supervisor, as what can be ended."""

    @property
    def pid(self) -> int:
        """On the host; 0 where it is no process there."""
        ...

    def kill(self) -> None:
        """Kill it, and so all processes. Does nothing once it has ended."""
        ...

    async def ended(self) -> None:
        """Wait until nothing of it is left. Called once, and nothing after it."""
        ...


class ProcessSupervisor:
    """See ports.ProcessSupervisor."""

    def __init__(
        self,
        life: Life,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        broker: SocketBroker | None,
        variables: Mapping[str, str],
        out_of_memory: OutOfMemory,
        progress: Callable[[], float],
        awaited: Callable[[], None],
    ) -> None:
        """`variables` are those of every process, unless its own are others. `progress` says how far the sandbox
        got (see Freezer), and `awaited` is called when somebody waits for what a process does."""
        self.enforced: JsonObject = {"separated_by": "pid_namespace"}
        self.broker = broker
        self._own_broker: SocketBroker | None = None
        self.life = life
        self._reader, self._writer = reader, writer
        self._variables = variables
        self.out_of_memory = out_of_memory
        self._progress = progress
        self.awaited = awaited
        self._numbers = itertools.count(1)
        self._processes: dict[int, GuestProcess] = {}
        self._is_closing = False
        self._cause: Literal["oom", "signal"] | None = None
        """Why all processes end at once, where that is known."""

        self._asked: deque[asyncio.Future[tuple[int, bool]]] = deque()
        """How much memory all processes take, and whether there is none but helpers, as it is to say."""

        self._expecting: set[asyncio.Task[None]] = set()

        self.on_end: Callable[[], None] = lambda: None
        """Called when it has ended."""

        self._following: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def over(
        cls,
        sock: socket.socket,
        life: Life,
        variables: Mapping[str, str],
        out_of_memory: OutOfMemory,
        progress: Callable[[], float],
        awaited: Callable[[], None],
        *,
        sandbox_broker: SocketBroker | None = None,
    ) -> ProcessSupervisor:
        """Take over a control socket, once the supervisor at its other end is ready; then `life` is its own, too. It
        brings a broker of its own unless it shares `sandbox_broker`. Raises SandboxFailed, OSError."""
        own = (await receive_guest_listeners(sock, names=()))[1] if sandbox_broker is None else None
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await over_socket(sock, 1 << 18)
            made = cls(life, reader, writer, own or sandbox_broker, variables, out_of_memory, progress, awaited)
            kind, *_ = await made._receive()
            if kind != b"Y":
                raise SandboxFailed("The process supervisor did not start.")
        except BaseException:
            if writer is not None:  # or the event loop would go on with a descriptor that others get
                writer.close()
            if own is not None:
                own.close()
            raise
        made._own_broker = own
        made._following = asyncio.create_task(made._follow())
        return made

    @property
    def alive(self) -> bool:
        is_ending = self._is_closing or self._cause is not None
        return self._following is not None and not self._following.done() and not is_ending

    async def start(self, spec: ProcessSpec, may_begin: Callable[[], Awaitable[None]] | None = None) -> GuestProcess:
        if not self.alive:
            raise SandboxFailed("The processes of this sandbox are gone.")
        self.awaited()
        number = next(self._numbers)
        process = self._processes[number] = GuestProcess(self, number, spec)
        terminal = {"TERM": "xterm-256color"} if spec.pty else {}
        specification = json.dumps(
            {
                "command": list(spec.command),
                "module": spec.module,
                "environment": with_library({**self._variables, **terminal, **spec.env}),
                "cwd": spec.cwd,
            }
        ).encode()
        header = {
            "room": ROOM,
            "stdin": spec.stdin,
            "pty": [spec.pty.cols, spec.pty.rows] if spec.pty else None,
            "channel": spec.channel,
            "supervised": spec.supervised,
            "helper": spec.module is not None,
        }
        self.send(b"S", number, json.dumps(header).encode())
        try:
            if may_begin is not None:
                await may_begin()
            self.send(b"E", number, len(specification).to_bytes(4, "big"), specification)
            await self._wait_for_start(process)
        except BaseException:
            process.abandon()  # nobody has it
            raise
        if not process.pid and not self.alive:
            raise SandboxFailed("The processes of this sandbox are gone.")
        return process

    async def _wait_for_start(self, process: GuestProcess) -> None:
        """Wait until it runs, or has failed to. Raises SandboxFailed where the supervisor stands still."""
        try:
            async with stall_timeout(self._progress):
                await process.started.wait()
        except TimeoutError:
            self.life.kill()  # in gVisor processes can have it stand still
            raise SandboxFailed("The process supervisor does not answer.") from None

    async def wait(self) -> None:
        if self._following is not None:
            await asyncio.wait([self._following])

    async def close(self) -> None:
        if self._closing is None:
            self._is_closing = True
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def memory_bytes(self, may_wait: Callable[[], bool]) -> int | None:
        """How much memory all processes take, as it says itself; None where it says nothing soon. It gets more time
        while `may_wait` says so."""
        answer, goes_on = self._ask(), True
        for seconds in (_MEMORY_SECONDS, *[_MEMORY_LOOK_SECONDS] * _MEMORY_LOOKS):
            await asyncio.wait({answer}, timeout=seconds)
            if answer.done():
                return answer.result()[0]
            if not goes_on:
                break
            # There is one more look in any case: an event loop that stood still hears of a timeout before it hears of
            # an answer that has come meanwhile.
            goes_on = self.alive and may_wait()
        answer.cancel()
        return None

    async def is_empty(self) -> bool:
        if not self.alive:
            return False  # its last processes may just be ending
        answer = self._ask()
        await asyncio.wait({answer}, timeout=_MEMORY_SECONDS)
        return answer.result()[1] if answer.done() else not answer.cancel()

    def expect_answer(self) -> None:
        """End all processes unless it answers: in gVisor they can have it stand still, and who waits for an end would
        wait for ever."""
        self._expecting.add(task := asyncio.create_task(self._expect_answer()))
        task.add_done_callback(self._expecting.discard)

    async def _expect_answer(self) -> None:
        try:
            async with stall_timeout(self._progress):
                await self._ask()
        except TimeoutError:
            self.life.kill()

    def _ask(self) -> asyncio.Future[tuple[int, bool]]:
        self._asked.append(answer := asyncio.get_running_loop().create_future())
        self.send(b"M", 0)
        return answer

    def end_for_want_of_memory(self) -> None:
        """End all processes."""
        self._cause = "oom"
        self.life.kill()

    def send(self, kind: bytes, number: int, payload: bytes = b"", unframed: bytes = b"") -> None:
        with contextlib.suppress(OSError):
            head = kind + number.to_bytes(4, "big") + len(payload).to_bytes(4, "big")
            write(self._writer, b"".join([head, payload, unframed]))

    async def _follow(self) -> None:
        """Take what the supervisor sends, until it has ended."""
        try:
            while True:
                kind, number, payload = await self._receive()
                if kind == b"M" and self._asked and not (answer := self._asked.popleft()).done():
                    answer.set_result((int.from_bytes(payload[:8], "big"), payload[8:] == b"\1"))
                process = self._processes.get(number)
                if process is not None:
                    process.on_frame(kind, payload)
                    if kind == b"D":
                        del self._processes[number]
                await turn()
        except (
            SandboxFailed,
            ValueError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
        ):  # it has ended, or isn't what it was any more
            pass
        finally:
            self._writer.close()
            for expecting in self._expecting:
                expecting.cancel()
            self.life.kill()
            cause = self._cause if self._cause or not self._is_closing else "signal"
            for process in self._processes.values():
                process.end(ProcessEnded(_KILLED, signal.SIGKILL, cause or "sandbox_died", with_supervisor=True))
            self._processes.clear()
            if self._own_broker is not None:
                self._own_broker.close()
            self.on_end()

    async def _receive(self) -> tuple[bytes, int, bytes]:
        """Receive a frame: its kind, the number of its process, and its payload. Raises SandboxFailed at the end."""
        try:
            head = await self._reader.readexactly(9)
            size = int.from_bytes(head[5:], "big")
            if size > _MOST_IN_FRAME:
                raise SandboxFailed("A frame of the process supervisor is too long.")
            return head[:1], int.from_bytes(head[1:5], "big"), await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise SandboxFailed("The process supervisor has ended.") from error

    async def _close(self) -> None:
        self.life.kill()
        if self._following is not None:
            await asyncio.wait([self._following])
        await self.life.ended()


class LazyProcessSupervisor:
    """The process supervisor of one sandbox."""

    def __init__(
        self,
        enter: Callable[[int], Awaitable[Life]],
        variables: Mapping[str, str],
        out_of_memory: OutOfMemory,
        watching: Watching,
        log: Callable[[], str],
        before: Callable[[], None],
        progress: Callable[[], float],
        *,
        sandbox_broker: SocketBroker | None = None,
    ) -> None:
        """`enter` has the supervisor started in the sandbox, given the descriptor of its control socket; it may raise
        OSError, SandboxFailed, TemplateFailed. `variables` are those of every process. `watching` is told when there
        are processes and when somebody waits for one; `before` is called when a supervisor is about to be made. `log`
        is what it has said to its stderr, and `progress` says how far the sandbox got; see Freezer.
        `sandbox_broker` is that of the sandbox, where the supervisor brings none of its own."""
        self._enter, self._variables, self._out_of_memory, self._log = enter, variables, out_of_memory, log
        self._watching, self._before, self._sandbox_broker = watching, before, sandbox_broker
        self._progress = progress
        self._supervisor: ProcessSupervisor | None = None
        self._turn = asyncio.Lock()
        self._making: asyncio.Task[ProcessSupervisor] | None = None
        self._is_closed = False

    @property
    def supervisor(self) -> ProcessSupervisor | None:
        """None where there is none alive."""
        return self._supervisor if self._supervisor is not None and self._supervisor.alive else None

    @property
    def is_used(self) -> bool:
        """Whether there is one alive, or about to be."""
        return self.supervisor is not None or (self._making is not None and not self._making.done())

    async def get(self) -> ProcessSupervisor:
        """The supervisor, made anew where there is none alive. Raises SandboxFailed."""
        async with self._turn:
            await self._wait_for_making()
            if self.supervisor is not None:
                return self.supervisor
            if self._supervisor is not None:
                await self._supervisor.close()
                self._supervisor = None
            if self._is_closed:
                raise SandboxFailed("The sandbox is gone.")
            self._before()
            # What has been started must be known here, also where whoever waits is cancelled.
            self._making = asyncio.create_task(self._make())
            return await asyncio.shield(self._making)

    async def close(self) -> None:
        """End all processes, for good."""
        self._is_closed = True
        await self._wait_for_making()
        if self._supervisor is not None:
            await self._supervisor.close()

    async def _wait_for_making(self) -> None:
        """Wait until none is being made, as for somebody who was cancelled."""
        if self._making is not None:
            await asyncio.wait([self._making])
            self._making.exception()  # told to whoever wanted it, if that waits for it still

    async def _make(self) -> ProcessSupervisor:
        ours: socket.socket | None = None
        life: Life | None = None
        try:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            with theirs:
                life = await self._enter(theirs.fileno())
            self._out_of_memory.begin_processes()
            async with stall_timeout(self._progress):
                made = await ProcessSupervisor.over(
                    ours,
                    life,
                    self._variables,
                    self._out_of_memory,
                    self._progress,
                    self._watching.begin_anew,
                    sandbox_broker=self._sandbox_broker,
                )
            made.on_end = lambda: self._watching.set_processes(False)
            self._watching.set_processes(True)
            self._supervisor = made
            return made
        except BaseException as error:
            if ours is not None:
                ours.close()
            if life is not None:
                life.kill()
                await life.ended()
            if not isinstance(error, OSError | TimeoutError | SandboxFailed | TemplateFailed):
                raise
            raise SandboxFailed(f"The process supervisor did not start: {self._log() or error}") from error
