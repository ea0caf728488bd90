"""One process of a live session: what it is started with, and what goes in and out of it. process_supervisor.py has the
theory of operation."""

from __future__ import annotations

import _socket  # not socket, which takes as long to import as all the rest
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import sys
from collections import deque
from itertools import pairwise

from processes import execute

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from process_supervisor import ProcessSupervisor

CHUNK = 1 << 16
CHANNEL = 3
MOST_IN_TERMINAL = 1 << 18  # more than the kernel keeps of what was written to a terminal
MOST_ROUNDS = 100  # of looking for what descends from a process, while that makes more

_FIONREAD, _TIOCSCTTY, _TIOCSWINSZ, _TIOCGPTN, _TIOCSPTLCK = 0x541B, 0x540E, 0x5414, 0x80045430, 0x40045431
_PR_SET_DUMPABLE = 4
_EOF, _VEOF_AT, _TCGETS, _TERMIOS_BYTES = 4, 17 + 4, 0x5401, 60

_libc = ctypes.CDLL(None, use_errno=True)


class Output:
    """A descriptor that a process writes to, until its end."""

    def __init__(self, process: GuestProcess, fd: int, kind: bytes) -> None:
        self.process, self.fd, self.kind = process, fd, kind
        self.left: int | None = None
        """Bytes to pass on before the host is told that the process has ended; None as long as it runs."""

    @property
    def is_over(self) -> bool:
        """Whether all has been passed on that the process has written."""
        return self.fd < 0 or self.left == 0

    def go_on(self, _: int = 0) -> None:
        """Read, now or as soon as there is something, where there is room for it."""
        process, supervisor = self.process, self.process.supervisor
        if self.fd < 0:
            return
        if process.is_told:
            supervisor.watch(self.fd, select.EPOLLIN, self.drop)
        elif process.room <= 0:
            supervisor.let_go(self.fd)
        elif not supervisor.has_room():
            supervisor.let_go(self.fd)
            supervisor.held_back[self] = None
        elif self.left is None:
            supervisor.watch(self.fd, select.EPOLLIN, self.read)
        else:
            while self.left and self.fd >= 0 and process.room > 0 and supervisor.has_room():
                self.read()
            if not self.is_over:
                self.go_on()  # once there is room again

    def read(self, _: int = 0) -> None:
        """Read a piece and pass it on."""
        process = self.process
        if process.room <= 0 or not process.supervisor.has_room():
            self.go_on()
            return
        data = self._read(min(CHUNK, process.room, CHUNK if self.left is None else self.left))
        if data is None:
            self.left = None if self.left is None else 0
        elif not data:
            self.close()
        else:
            process.room -= len(data)
            process.supervisor.send(self.kind, process.number, data)
            if self.left is not None:
                self.left -= len(data)

    def end(self) -> None:
        """The process has ended: pass on what it has written, and no more."""
        if self.fd >= 0:
            # A terminal passes on in its own time what was written to it: there, read until there is nothing.
            self.left = MOST_IN_TERMINAL if self.kind == b"P" else self.count()
            self.process.supervisor.let_go(self.fd)
            self.go_on()

    def drop(self, _: int) -> None:
        """Read what is of no interest: the process has ended, and this is what it has started."""
        if self._read(CHUNK) == b"":
            self.close()

    def _read(self, size: int) -> bytes | None:
        """Up to `size` bytes; empty at the end, None where there are none yet."""
        try:
            return os.read(self.fd, size)
        except BlockingIOError:
            return None
        except OSError:  # EIO: nobody has the terminal open. ECONNRESET: what was sent to a channel wasn't read.
            return b""

    def count(self) -> int:
        """How many bytes can be read now."""
        answer = bytearray(4)
        try:
            fcntl.ioctl(self.fd, _FIONREAD, answer)
        except OSError:
            return 0
        return int.from_bytes(answer, sys.byteorder)

    def close(self) -> None:
        if self.fd >= 0:
            self.process.supervisor.let_go(self.fd)
            fd, self.fd = self.fd, -1
            os.close(fd)


class Input:
    """A descriptor that is written to for the host, a process's standard input or channel."""

    def __init__(self, process: GuestProcess, fd: int, taken: bytes, broken: bytes) -> None:
        """`taken` and `broken` are the kinds of frames that say so."""
        self.process, self.fd, self.taken, self.broken = process, fd, taken, broken
        self.pending: deque[memoryview] = deque()
        self.is_ending = False

    def take(self, data: bytes) -> None:
        if self.fd >= 0 and not self.is_ending:
            self.pending.append(memoryview(data))
            self.write()

    def end(self) -> None:
        """Close it once all is written."""
        self.is_ending = True
        self.write()

    def write(self, _: int = 0) -> None:
        written = 0
        while self.pending and self.fd >= 0:
            try:
                count = os.write(self.fd, self.pending[0])
            except BlockingIOError:
                break
            except OSError:
                self.close()
                self.process.supervisor.send(self.broken, self.process.number)
                return
            written += count
            self.pending[0] = self.pending[0][count:]
            if not self.pending[0]:
                self.pending.popleft()
        if written:
            self.process.supervisor.send(self.taken, self.process.number, written.to_bytes(4, "big"))
        if self.fd >= 0:
            self.process.wait_to_write(self)
        if self.is_ending and not self.pending:
            self.close()

    def close(self) -> None:
        if self.fd >= 0:
            self.pending.clear()
            self.process.supervisor.let_go(self.fd)
            fd, self.fd = self.fd, -1
            os.close(fd)


class GuestProcess:
    """A process, from its start until the host has been told its end."""

    def __init__(self, supervisor: ProcessSupervisor, number: int, header: dict[str, Any]) -> None:
        """`header` is the payload of an S frame."""
        self.supervisor, self.number, self.header = supervisor, number, header
        self.specification = -1
        """A file in memory, for `be_child`; -1 where that needs none any more."""

        self.starting = -1
        """What is written to once all of it is there, and closed where it never will be."""

        self.room: int = header["room"]
        """Bytes of output that the host has room for."""

        self.pid = 0
        self.is_told = False
        """Whether the host knows its end."""

        self.ended: dict[str, Any] | None = None
        self.outputs: list[Output] = []
        self.terminal = -1
        self.input: Input | None = None
        self.channel: Input | None = None

    # -- starting -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start it. Where there can't be one more process, it ends at once, and says why as a shell would."""
        ours: list[int] = []
        theirs: list[int] = []
        try:
            stdin, stdout, stderr, channel = self.make_descriptors(ours, theirs)
            self.specification = os.memfd_create("era")
            ours.append(self.specification)
            start, self.starting = os.pipe2(os.O_CLOEXEC)
            theirs.append(start)
            ours.append(self.starting)
            # A signal that comes before the child has set its handlers waits until it has.
            unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                pid = os.fork()
                if not pid:
                    self.be_child(stdin, stdout, stderr, channel, start, unblocked)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        except OSError as problem:
            for fd in (*ours, *theirs):
                os.close(fd)
            self.outputs, self.input, self.channel, self.terminal = [], None, None, -1
            self.specification = self.starting = -1
            self.supervisor.send(b"S", self.number, bytes(4))
            self.say(f"era: {problem.strerror}\n")
            self.tell({"exit_code": 126, "signal": None, "cpu_us": 0, "peak_memory_bytes": None})
            return
        for fd in theirs:
            os.close(fd)
        for fd in ours:
            os.set_blocking(fd, False)
        self.pid = pid
        self.supervisor.by_pid[pid] = self
        self.supervisor.send(b"S", self.number, pid.to_bytes(4, "big"))
        for output in self.outputs:
            output.go_on()

    def specify(self, piece: memoryview) -> None:
        """Take a part of its specification, unless it has ended."""
        while piece and self.specification >= 0:
            piece = piece[os.write(self.specification, piece) :]

    def release(self) -> None:
        """Let the child execute what it is to, as its whole specification is there."""
        if self.starting >= 0:
            try:
                os.write(self.starting, b"1")
            except BrokenPipeError:
                pass  # it has ended
        self.forget_specification()

    def forget_specification(self) -> None:
        for fd in (self.specification, self.starting):
            if fd >= 0:
                os.close(fd)
        self.specification = self.starting = -1

    def make_descriptors(self, ours: list[int], theirs: list[int]) -> tuple[int, int, int, int]:
        """Make what it is connected by. Returns the child's standard streams and channel. Raises OSError."""

        def pipe() -> tuple[int, int]:
            return os.pipe2(os.O_CLOEXEC)

        channel = -1
        if self.header["channel"]:
            near, far = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
            fd, channel = near.detach(), far.detach()
            ours.append(fd)
            theirs.append(channel)
            # Of one descriptor both directions are watched, so each has its own.
            written = os.dup(fd)
            ours.append(written)
            self.outputs.append(Output(self, fd, b"C"))
            self.channel = Input(self, written, b"c", b"y")
        if self.header["pty"]:
            self.terminal = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            ours.append(self.terminal)
            number = bytearray(4)
            fcntl.ioctl(self.terminal, _TIOCSPTLCK, bytes(4))
            fcntl.ioctl(self.terminal, _TIOCGPTN, number)
            self.resize(*self.header["pty"])
            path = f"/dev/pts/{int.from_bytes(number, sys.byteorder)}"
            slave = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            theirs.append(slave)
            written = os.dup(self.terminal)
            ours.append(written)
            self.outputs.append(Output(self, self.terminal, b"P"))
            self.input = Input(self, written, b"a", b"x")
            return slave, slave, slave, channel
        if self.header["stdin"]:
            stdin, written = pipe()
            theirs.append(stdin)
            ours.append(written)
            self.input = Input(self, written, b"a", b"x")
        else:
            stdin = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            theirs.append(stdin)
        ends = [stdin]
        for kind in (b"O", b"E"):
            read, write = pipe()
            ours.append(read)
            theirs.append(write)
            ends.append(write)
            self.outputs.append(Output(self, read, kind))
        return ends[0], ends[1], ends[2], channel

    def be_child(
        self, stdin: int, stdout: int, stderr: int, channel: int, start: int, unblocked: set[signal.Signals | int]
    ) -> NoReturn:
        """Become the process, once there is something to read at `start`. Its specification is JSON: `command` or
        `module`, `environment`, `cwd`. Its mask of signals is to be `unblocked`."""
        code = 126
        try:
            signal.set_wakeup_fd(-1)
            for number in (*self.supervisor.handled, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            for fd, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
                os.dup2(fd, target)
            if self.terminal >= 0:
                fcntl.ioctl(0, _TIOCSCTTY, 0)
            self.supervisor.own_domain.enter()  # before its descriptor is closed
            if channel >= 0:
                os.dup2(channel, CHANNEL)
            kept = sorted((self.specification, start))
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            for first, end in pairwise([CHANNEL if channel < 0 else CHANNEL + 1, *kept, most]):
                os.closerange(first + (first in kept), end)
            if not os.read(start, 1):
                os._exit(code)  # it isn't wanted any more
            specification = json.loads(os.pread(self.specification, os.fstat(self.specification).st_size, 0))
            for fd in kept:
                os.close(fd)
            _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
            score = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
            os.write(score, b"1000")  # out of memory: processes go, not their supervisor
            os.close(score)
            for name, value in self.supervisor.config["rlimits"].items():
                resource.setrlimit(getattr(resource, name), (value, value))
            directory = specification["cwd"]
            if directory:
                os.chdir(f"{self.supervisor.workspace}/{directory}")
            if specification["module"] is None:
                execute(specification["command"], specification["environment"])
            code = _call(specification["module"], specification["environment"])
        except OSError as problem:
            name = f"{problem.filename}: " if problem.filename else ""
            os.write(2, f"era: {name}{problem.strerror}\n".encode(errors="surrogateescape"))
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    # -- what the host wants ------------------------------------------------------------------------------------

    def give_room(self, size: int) -> None:
        self.room += size
        for output in self.outputs:
            output.go_on()
        self.look_whether_over()

    def take_input(self, data: bytes) -> None:
        if self.input is not None:
            self.input.take(data)

    def end_input(self) -> None:
        if self.input is None:
            return
        if self.terminal >= 0:
            attributes = bytearray(_TERMIOS_BYTES)
            try:
                fcntl.ioctl(self.terminal, _TCGETS, attributes)
            except OSError:
                attributes[_VEOF_AT] = _EOF
            self.input.take(bytes(attributes[_VEOF_AT : _VEOF_AT + 1]))
        else:
            self.input.end()

    def take_message(self, data: bytes) -> None:
        if self.channel is not None:
            self.channel.take(data)

    def wait_to_write(self, stream: Input) -> None:
        """Go on with an input once something can be written to it, or its reader has gone."""
        if stream.pending:
            self.supervisor.watch(stream.fd, select.EPOLLOUT, stream.write)
        else:
            self.supervisor.let_go(stream.fd)

    def signal(self, number: int, *, group: bool) -> None:
        if self.ended is None and self.pid:
            try:
                if group:
                    try:
                        os.killpg(self.pid, number)
                    except ProcessLookupError:  # it has just been forked, and leads no group yet
                        os.kill(self.pid, number)
                else:
                    os.kill(self.pid, number)
            except OSError:
                pass  # it has just ended, or number isn't a signal

    def kill(self) -> None:
        """Kill it, and what descends from it or is in its session. Each is stopped first, so that it can't make more
        while others are looked for."""
        if not self.pid:
            return
        found: set[int] = set()
        for _ in range(MOST_ROUNDS):
            new = _descendants(self.pid, alive=self.ended is None) - found
            if not new:
                break
            for pid in new:
                _kill(pid, signal.SIGSTOP)
            found |= new
        for pid in found:
            _kill(pid, signal.SIGKILL)

    def resize(self, columns: int, rows: int) -> None:
        if self.terminal >= 0:
            size = b"".join(number.to_bytes(2, sys.byteorder) for number in (rows, columns, 0, 0))
            try:
                fcntl.ioctl(self.terminal, _TIOCSWINSZ, size)
            except OSError:
                pass
            if self.pid and not self.supervisor.config["kernel_tells_of_sizes"]:
                for pid in _descendants(self.pid, alive=self.ended is None):
                    _kill(pid, signal.SIGWINCH)

    def say(self, text: str) -> None:
        """Say something on its stderr, or terminal, as far as there is room."""
        data = text.encode()
        if self.room >= len(data):
            self.room -= len(data)
            self.supervisor.send(b"P" if self.header["pty"] else b"E", self.number, data)

    # -- ending -------------------------------------------------------------------------------------------------

    def on_end(self, status: int, usage: resource.struct_rusage) -> None:
        """It has been waited for. The host is told once it has what was written until now."""
        code = os.waitstatus_to_exitcode(status)
        self.ended = {
            "exit_code": 128 - code if code < 0 else code,
            "signal": -code if code < 0 else None,
            "cpu_us": int((usage.ru_utime + usage.ru_stime) * 1e6),
            "peak_memory_bytes": usage.ru_maxrss * 1024,
        }
        for output in self.outputs:
            output.end()
        self.look_whether_over()

    def look_whether_over(self) -> None:
        if self.ended is not None and not self.is_told and all(output.is_over for output in self.outputs):
            self.tell(self.ended)

    def tell(self, ended: dict[str, Any]) -> None:
        """Tell the host of the end."""
        self.ended, self.is_told = ended, True
        self.forget_specification()
        self.supervisor.send(b"D", self.number, json.dumps(ended).encode())
        self.supervisor.processes.pop(self.number, None)
        for stream in (self.input, self.channel):
            if stream is not None:
                stream.close()
        for output in self.outputs:
            if output.kind in (b"P", b"C"):
                output.close()  # which hangs up the terminal
            else:
                output.go_on()


def _call(name: str, environment: dict[str, str]) -> int:
    """Have a module of the guest's serve the channel. Returns the exit code. Whether `site` has been imported depends
    on where the supervisor comes from (template.py): what wants packages of the session's adds them by itself."""
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        __import__(name)
        sys.modules[name].serve(CHANNEL)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    return 0


def _descendants(pid: int, *, alive: bool) -> set[int]:
    """The processes that descend from this one or are in its session, itself if it is `alive`: not those that have
    ended and wait to be waited for."""
    parents: dict[int, int] = {}
    found = {pid} if alive else set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent, _, session = file.read().rpartition(b")")[2].split()[:4]
            except OSError:
                continue
            if state not in b"ZX":
                parents[int(name)] = int(parent)
                if int(session) == pid:
                    found.add(int(name))
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found & (parents.keys() | {pid})


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError as problem:
        if problem.errno not in (errno.ESRCH, errno.EPERM):
            raise
