"""Following a program: its output goes to the host as it comes, until the program has ended, by itself or by us."""

from __future__ import annotations

import _socket  # not socket, which takes as long to import as all the rest
import os
import select
import signal
import time

from processes import kill_everything, reap_orphans, signal_everything, unread
from workspace import write_all

TYPE_CHECKING = False  # as type checkers know it; importing it from typing would cost every sandbox
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from socket_broker import SocketBroker

GRACE = 2.0  # seconds between SIGTERM and SIGKILL at the deadline
CHUNK = 1 << 16
GATHERED = 1 << 12  # bytes from which on a piece isn't small
GATHER = 0.002  # seconds for which a small piece of output is followed by others before the next is read
TICK = 0.1  # seconds between looks at the scratch directories: most runs are over before the first
LOOK, LOOK_SOON = 0.02, 0.001  # seconds between looks whether a program has ended, where there are no pidfds


class Control:
    """Frames to and from the host, over the control socket. Its end is the sandbox's end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.joined = False
        """Whether processes beside the run have come since it began."""

    def note_joined(self) -> None:
        """Take what the host has said of the run that has just ended: at the latest by now it has said whether there
        are processes beside it."""
        sock = _socket.socket(fileno=self.fd)
        try:
            while sock.recv(1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT) not in (b"R", b""):
                self.joined |= self.receive()[0] == b"J"
        except BlockingIOError:
            pass
        finally:
            sock.detach()

    def read_into(self, buffer: bytearray) -> None:
        view = memoryview(buffer)
        while view:
            count = os.readv(self.fd, [view])
            if not count:
                os._exit(0)  # the host is gone
            view = view[count:]

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        self.read_into(buffer)
        return bytes(buffer)

    def receive(self) -> tuple[bytes, bytes]:
        """The next frame's kind and payload."""
        head = self.read(5)
        return head[:1], self.read(int.from_bytes(head[1:], "big"))

    def send(self, kind: bytes, payload: bytes) -> None:
        write_all(self.fd, kind + len(payload).to_bytes(4, "big") + payload)


class Spare:
    """A process that waits for its environment and then is the program `entry`."""

    def __init__(self, pid: int, go: int, stdout: int, stderr: int, entry: str) -> None:
        """`go` is the pipe for the environment, `stdout` and `stderr` those of the program; all three our ends."""
        self.pid = pid
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError:
            self.pidfd = -1  # gVisor has none: follow() looks for the end instead
        self.go = go
        self.stdout = stdout
        self.stderr = stderr
        self.entry = entry

    def start(self, environment: bytearray) -> None:
        """Hand over `environment` (JSON) and zero it. Raises BrokenPipeError if the spare is dead, and so has run
        nothing."""
        try:
            size = len(environment).to_bytes(4, "big")
            os.write(self.go, size)
            view = memoryview(environment)
            while view:
                view = view[os.write(self.go, view) :]
        finally:
            os.close(self.go)
            self.go = -1
        zero(environment)

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def close(self) -> None:
        for fd in (self.pidfd, self.go, self.stdout, self.stderr):
            if fd >= 0:
                os.close(fd)


def zero(secret: bytearray) -> None:
    """Overwrite what must not stay in memory."""
    secret[:] = bytes(len(secret))


def follow(
    control: Control,
    broker: SocketBroker | None,
    spare: Spare,
    deadline: float,
    output_limit: int,
    overfull: Callable[[], str | None],
) -> dict[str, Any]:
    """Pass on what a program writes to `control` until it ends, is killed, is out of time or fills a scratch directory;
    then kill what it left. Returns how it ended. `overfull` says which scratch directory is too full, if one is."""
    end = ProgramEnd(control, spare, deadline, overfull)
    output = OutputPipes(control, end.poller, {spare.stdout: b"O", spare.stderr: b"E"}, output_limit)
    broker_fd = -1 if broker is None else broker.fd
    for fd in (control.fd, broker_fd, spare.pidfd):
        if fd >= 0:
            end.poller.register(fd, select.POLLIN)
    while (left := end.seconds_left()) is not None:
        left = min(left, output.seconds_left())
        if spare.pidfd < 0:  # a program mostly ends when its output does
            left = min(left, LOOK if output.kinds else LOOK_SOON)
        for fd, _ in end.poller.poll(left * 1000):
            if fd in output.kinds:
                output.pass_on(fd)
            elif fd == spare.pidfd:
                end.is_there = True
            elif broker is not None and fd == broker_fd:
                if not broker.answer():
                    end.poller.unregister(fd)
            else:
                end.obey(control.receive()[0])
        if spare.pidfd < 0 and spare.has_ended():
            end.is_there = True
    status, usage, reaped = kill_everything(spare.pid)
    output.pass_on_rest()
    return {
        **end.report(status),
        "stdout_truncated": output.truncated[b"O"],
        "stderr_truncated": output.truncated[b"E"],
        "reaped": reaped,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "cpu_us": int((usage.ru_utime + usage.ru_stime) * 1e6),
    }


class OutputPipes:
    """The pipes of a program's output, up to a limit."""

    def __init__(self, control: Control, poller: select.poll, kinds: dict[int, bytes], limit: int) -> None:
        """`kinds` are those of the frames that each pipe's content goes into, `limit` is in bytes of each."""
        self.kinds = kinds
        self.truncated = dict.fromkeys(kinds.values(), False)
        self._control, self._poller = control, poller
        self._room = dict.fromkeys(kinds.values(), limit)
        self._gathering: dict[int, float] = {}
        """Until when small pieces are let come, by pipe."""

        for fd in kinds:
            poller.register(fd, select.POLLIN)

    def pass_on(self, fd: int) -> int:
        """Pass on a piece. Returns how long it is."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:  # a process of the sandbox has read it
            return 0
        if not data:
            self._poller.unregister(fd)
            del self.kinds[fd]
            self._gathering.pop(fd, None)
            return 0
        if len(data) < GATHERED:
            if fd not in self._gathering:
                self._poller.modify(fd, 0)  # which still reports POLLHUP
            self._gathering[fd] = time.monotonic() + GATHER
        kind, size = self.kinds[fd], len(data)
        if size > self._room[kind]:
            self.truncated[kind] = True
            data = data[: self._room[kind]]
        if data:
            self._room[kind] -= len(data)
            self._control.send(kind, data)
        return size

    def seconds_left(self) -> float:
        """Seconds until a pipe is to be read again that gathers small pieces; infinite where none does."""
        left, now = float("inf"), time.monotonic()
        for fd, until in list(self._gathering.items()):
            if until <= now:
                self._poller.modify(fd, select.POLLIN)
                del self._gathering[fd]
            else:
                left = min(left, until - now)
        return left

    def pass_on_rest(self) -> None:
        """Pass on what is there by now: a process beside the run may have got the pipe, and write for ever."""
        for fd in list(self.kinds):
            left = unread(fd)
            while left > 0 and (size := self.pass_on(fd)):
                left -= size


class ProgramEnd:
    """When and why a program ends."""

    def __init__(self, control: Control, spare: Spare, deadline: float, overfull: Callable[[], str | None]) -> None:
        self.poller = select.poll()
        self.is_there = False
        self._control, self._spare, self._deadline, self._overfull = control, spare, deadline, overfull
        self._cause = "exit"
        self._disk_problem: str | None = None
        self._next_look = time.monotonic() + TICK

    def seconds_left(self) -> float | None:
        """Seconds until this is to be asked again; None once the program has ended or is to be killed."""
        if self.is_there:
            return None
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + TICK
            reap_orphans(self._spare.pid)
            self._disk_problem = self._overfull()
            if self._disk_problem is not None and self._cause == "exit":
                self._cause = "disk_full"
                return None
        if self._deadline <= now:
            if self._cause != "exit":
                return None
            self._cause = "timeout"
            self._deadline += GRACE
            signal_everything(signal.SIGTERM)
            return 0.0
        return min(self._deadline, self._next_look) - now

    def obey(self, kind: bytes) -> None:
        """Take a frame of the host's."""
        if kind == b"J":
            self._control.joined = True
        elif kind == b"K":
            self._cause = "killed" if self._cause == "exit" else self._cause  # what came first counts
            self.is_there = True
        elif kind == b"T" and self._cause == "exit":
            self._cause = "killed"
            self._deadline = time.monotonic() + GRACE
            signal_everything(signal.SIGTERM)

    def report(self, status: int) -> dict[str, Any]:
        """Its exit code and cause, by the status of the program's process."""
        code, cause = os.waitstatus_to_exitcode(status), self._cause
        if cause == "timeout":
            code = 124
        elif code < 0:
            cause = "signal" if cause == "exit" else cause
            code = 128 - code
        elif cause == "disk_full":
            cause = "exit"  # it came first
        return {
            "exit_code": code,
            "cause": cause,
            "disk_problem": self._disk_problem if cause == "disk_full" else None,
        }
