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
    kinds = {spare.stdout: b"O", spare.stderr: b"E"}
    room = {b"O": output_limit, b"E": output_limit}
    truncated = {b"O": False, b"E": False}
    cause = "exit"
    poller = select.poll()
    broker_fd = -1 if broker is None else broker.fd
    for fd in (control.fd, broker_fd, spare.pidfd, *kinds):
        if fd >= 0:
            poller.register(fd, select.POLLIN)

    gathering: dict[int, float] = {}  # until when

    def pass_on(fd: int) -> int:
        """Pass on a piece. Returns how long it is."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:  # a process of the sandbox has read it
            return 0
        if not data:
            poller.unregister(fd)
            del kinds[fd]
            gathering.pop(fd, None)
            return 0
        if len(data) < GATHERED:
            if fd not in gathering:
                poller.modify(fd, 0)  # which still reports POLLHUP
            gathering[fd] = time.monotonic() + GATHER
        kind, size = kinds[fd], len(data)
        if size > room[kind]:
            truncated[kind] = True
            data = data[: room[kind]]
        if data:
            room[kind] -= len(data)
            control.send(kind, data)
        return size

    running = True
    next_look = time.monotonic() + TICK
    disk_problem: str | None = None
    while running:
        now = time.monotonic()
        if now >= next_look:
            next_look = now + TICK
            reap_orphans(spare.pid)
            disk_problem = overfull()
            if disk_problem is not None and cause == "exit":
                cause = "disk_full"
                break
        left = deadline - now
        if left <= 0:
            if cause != "exit":
                break
            cause = "timeout"
            deadline += GRACE
            signal_everything(signal.SIGTERM)
            continue
        left = min(left, next_look - now)
        for fd, until in list(gathering.items()):
            if until <= now:
                poller.modify(fd, select.POLLIN)
                del gathering[fd]
            else:
                left = min(left, until - now)
        if spare.pidfd < 0:  # a program mostly ends when its output does
            left = min(left, LOOK if kinds else LOOK_SOON)
        for fd, _ in poller.poll(left * 1000):
            if fd in kinds:
                pass_on(fd)
            elif fd == spare.pidfd:
                running = False
            elif broker is not None and fd == broker_fd:
                if not broker.answer():
                    poller.unregister(fd)
            else:
                kind = control.receive()[0]
                if kind == b"J":
                    control.joined = True
                elif kind == b"K":
                    cause = "killed" if cause == "exit" else cause  # what came first counts
                    running = False
                elif kind == b"T" and cause == "exit":
                    cause = "killed"
                    deadline = time.monotonic() + GRACE
                    signal_everything(signal.SIGTERM)
        if spare.pidfd < 0 and spare.has_ended():
            running = False
    status, usage, reaped = kill_everything(spare.pid)
    for fd in list(kinds):  # what is there by now: a process beside the run may have got the pipe, and write for ever
        left = unread(fd)
        while left > 0 and (size := pass_on(fd)):
            left -= size
    code = os.waitstatus_to_exitcode(status)
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
        "disk_problem": disk_problem if cause == "disk_full" else None,
        "stdout_truncated": truncated[b"O"],
        "stderr_truncated": truncated[b"E"],
        "reaped": reaped,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "cpu_us": int((usage.ru_utime + usage.ru_stime) * 1e6),
    }
