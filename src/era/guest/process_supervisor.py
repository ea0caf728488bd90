"""The process supervisor: PID 1 of a live session's second PID namespace. It starts processes beside runs, and passes
on what goes in and out of them.

Theory of operation
===================

*Apart from runs.* The supervisor of runs kills all in its PID namespace at the end of each run. Processes stay, since
they aren't in it: this one is PID 1 of another, in the same namespaces else (namespace_entry.py says how it gets
there). Runs and processes can't see, signal or look into each other, and neither can reach the other's supervisor. When
this one ends, the kernel ends all processes.

*One loop.* It never waits but for events. Nothing that a process does or leaves undone can hold up another one: what
goes in and out of processes is read and written without blocking, a little at a time.

*Credit.* The host says how many bytes of a process's output it has room for, and gives that room again as somebody
reads. Without any the process's pipe isn't read, fills up, and the process waits, as under a shell whose terminal is
stopped. The other way round, the host sends input only for as much room as there is here. So the memory of both ends is
bounded by the number of processes. What is not yet sent to the host is bounded, too: beyond OUT_BYTES nothing is read.

*Output is passed on at once.* Processes are used by people and by programs that wait for a prompt.

*Specification.* What a process is to execute, with its environment, goes from the control socket through one buffer,
zeroed at once, into a file in memory that only the child reads. So nothing of it is in our heap when the next process
is forked; some of those never execute anything (`module`). It may come later than the rest: the child is forked, gets
ready and waits for it, while the host puts the process on record.

*Scratch.* As the supervisor of runs, this one bounds the number of files in memory. It can't tell who has made them.
So there may be twice as many: those of processes, and what one run may add. Beyond that all processes end, and what is
there is removed.

*Ending.* A process is over when it has been waited for and what it had written by then has been passed on. What
descends from it may live on, like what a shell has started in the background; its output is read and dropped.

*Failing.* Any surprise ends PID 1, and with it all processes. The host notices.

Wire format. As that of the other supervisor (supervisor.py), but a frame has, behind its kind, the number of a process
(4 bytes), which the host chooses.

  host to guest:  S  JSON, fork a process. It executes nothing before its specification has come
                  E  how many bytes that has (4 bytes). It follows, unframed
                  W  write to its standard input or PTY     X  end its standard input
                  H  write to its channel
                  G  a signal's number (1 byte), and whether the whole group gets it (1 byte)
                  K  kill it and what descends from it
                  Z  columns and rows of its PTY (2 bytes each)
                  A  room for so many more bytes of output (4 bytes)
                  M  say how much memory all processes take, and whether there are any
  guest to host:  N, G  as of the other supervisor, without guest listeners
                  Y  it is ready
                  S  its pid (4 bytes): it is forked
                  O, E, P, C  a piece of stdout, stderr, PTY, channel
                  a, c  so many bytes (4) have been written to its input, its channel: there is room for them again
                  x, y  its input, its channel, takes nothing any more
                  D  JSON, how it ended. It comes last
                  M  so many bytes of memory (8 bytes), and whether no process is left but helpers (1 byte)
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections import deque

import landlock
import startup
import workspace
from guest_process import GuestProcess, Output
from processes import Scheduling, signal_everything

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from socket_broker import SocketBroker

OUT_BYTES = 1 << 18
BUFFER_BYTES = 1 << 17
HEAD_BYTES = 9
CONTROL = 3
TICK = 0.5  # seconds between looks at the scratch directories


class ProcessSupervisor:
    """Starts processes and passes on what goes in and out of them, as the host says."""

    def __init__(self, config: dict[str, Any]) -> None:
        """`config` is drivers/process_supervisor.py's, completed by startup.py."""
        self.broker: SocketBroker | None = config["broker"]
        self.config = config
        self.scheduling = Scheduling()
        self.own_domain = landlock.OwnDomain(scoped=False)
        self.workspace = os.getcwd()
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.processes: dict[int, GuestProcess] = {}
        """By their numbers."""

        self.by_pid: dict[int, GuestProcess] = {}
        """Those that haven't been waited for."""

        self.out: deque[memoryview] = deque()
        self.out_bytes = 0
        self.waits_to_send = False
        self.held_back: dict[Output, None] = {}
        """Outputs that aren't read until `out` has become shorter."""

        self.buffer = bytearray(BUFFER_BYTES)
        self.filled = 0
        self.missing = 0
        """Bytes of a process's specification that are still to come."""

        self.waiting: GuestProcess | None = None
        """The process that waits for them, unless it has ended."""

        self.woken = -1
        """Readable once a child has ended."""

        self.is_overfull = False
        """Whether scratch directories are to be emptied, once everything has ended."""

        self.handled: list[int] = []
        """Signals for which there is something else than the default here."""

        self.is_supervised = False
        """Whether everything started from here on is under the connect filter."""

    # -- the loop -----------------------------------------------------------------------------------------------

    def loop(self) -> NoReturn:
        os.set_blocking(CONTROL, False)
        self.woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the kernel doesn't let a PID 1 die of
        self.handled = [
            number for number in signal.valid_signals() if signal.getsignal(number) not in (signal.SIG_DFL, None)
        ]
        self.watch(CONTROL, select.EPOLLIN, self.on_control)
        self.watch(self.woken, select.EPOLLIN, self.on_child)
        if broker := self.broker:
            self.watch(broker.fd, select.EPOLLIN, lambda _: None if broker.answer() else self.let_go(broker.fd))
        self.send(b"Y", 0)
        next_look = 0.0
        while True:
            ready = self.epoll.poll(TICK if self.by_pid else -1)
            if self.by_pid and time.monotonic() >= next_look:
                next_look = time.monotonic() + TICK
                self.look_at_scratch()
            for fd, events in ready:
                handler = self.handlers.get(fd)
                if handler is not None:  # or it was closed in this very round
                    handler(events)

    def look_at_scratch(self) -> None:
        """End all processes where files in memory are so many that no run can have made them (supervisor.py)."""
        problem = workspace.overfull(workspace.entries(self.config["scratch"]), 2 * self.config["scratch_entries"], {})
        if problem is not None:
            self.is_overfull = True
            signal_everything(signal.SIGKILL)
            for process in self.by_pid.values():
                process.say(f"era: all processes were ended: {problem}\n")

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Have `handler` called with events of a descriptor. Where nothing is wanted of it, it has to be let go:
        that nobody is at its other end is told in any case."""
        if fd in self.handlers:
            self.epoll.modify(fd, events)
        else:
            self.epoll.register(fd, events)
        self.handlers[fd] = handler

    def let_go(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    # -- the host -----------------------------------------------------------------------------------------------

    def send(self, kind: bytes, number: int, payload: bytes = b"") -> None:
        head = kind + number.to_bytes(4, "big") + len(payload).to_bytes(4, "big")
        self.out.append(memoryview(head + payload))
        self.out_bytes += len(head) + len(payload)
        if len(self.out) == 1:
            self.flush()

    def has_room(self) -> bool:
        """Whether more output may be read."""
        return self.out_bytes < OUT_BYTES

    def flush(self) -> None:
        """Send as much as the socket takes."""
        was_full = not self.has_room()
        while self.out:
            piece = self.out[0]
            try:
                count = os.write(CONTROL, piece)
            except BlockingIOError:
                break
            except OSError:
                os._exit(0)  # the host is gone
            self.out_bytes -= count
            if count == len(piece):
                self.out.popleft()
            else:
                self.out[0] = piece[count:]
        if bool(self.out) != self.waits_to_send:
            self.waits_to_send = bool(self.out)
            self.watch(CONTROL, select.EPOLLIN | (select.EPOLLOUT if self.out else 0), self.on_control)
        if was_full and self.has_room():
            held_back, self.held_back = self.held_back, {}
            for output in held_back:
                output.go_on()
                output.process.look_whether_over()

    def on_control(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.flush()
        if not events & ~select.EPOLLOUT:
            return
        view = memoryview(self.buffer)
        try:
            count = os.readv(CONTROL, [view[self.filled :]])
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            os._exit(0)  # the host is gone
        self.filled += count
        at = 0
        while at < self.filled:
            if self.missing:
                size = min(self.missing, self.filled - at)
                self.take_specification(view[at : at + size])
                at += size
                continue
            end = at + HEAD_BYTES
            if self.filled < end:
                break
            end += int.from_bytes(view[at + 5 : at + 9], "big")
            if self.filled < end:
                break
            number, payload = int.from_bytes(view[at + 1 : at + 5], "big"), view[at + HEAD_BYTES : end]
            self.on_frame(bytes(view[at : at + 1]), number, payload)
            at = end
        view[: self.filled - at] = view[at : self.filled]  # a copy within the buffer
        self.filled -= at

    def on_frame(self, kind: bytes, number: int, payload: memoryview) -> None:
        if kind == b"S":
            self.start_process(number, json.loads(bytes(payload)))
            return
        if kind == b"E":
            self.waiting, self.missing = self.processes.get(number), int.from_bytes(payload, "big")
            return
        if kind == b"M":
            self.send(b"M", 0, memory_bytes().to_bytes(8, "big") + bytes([self.is_empty()]))
            return
        process = self.processes.get(number)
        if process is None:
            return  # it has ended, and the host will hear so
        if kind == b"A":
            process.give_room(int.from_bytes(payload, "big"))
        elif kind == b"W":
            process.take_input(bytes(payload))
        elif kind == b"X":
            process.end_input()
        elif kind == b"H":
            process.take_message(bytes(payload))
        elif kind == b"G":
            process.signal(payload[0], group=bool(payload[1]))
        elif kind == b"K":
            process.kill()
        elif kind == b"Z":
            process.resize(int.from_bytes(payload[:2], "big"), int.from_bytes(payload[2:], "big"))

    def take_specification(self, piece: memoryview) -> None:
        """Take a part of a process's specification, and let it execute after the last one. Zeroes `piece`."""
        self.missing -= len(piece)
        if self.waiting is not None:
            self.waiting.specify(piece)
            if not self.missing:
                self.waiting.release()
        piece[:] = bytes(len(piece))

    def start_process(self, number: int, header: dict[str, Any]) -> None:
        self.scheduling.restore()
        if self.is_overfull:
            self.reap(0)  # all were killed, and what they left in memory would be held against the new one
        if header["supervised"] and not self.is_supervised and self.broker is not None:
            import connect_filter

            # It's on us, and on all that we start from here on: the kernel takes one notification descriptor only.
            self.broker.send(b"L", [connect_filter.install()])
            self.is_supervised = True
        process = GuestProcess(self, number, header)
        self.processes[number] = process
        process.begin()

    def is_empty(self) -> bool:
        """Whether no process is left but helpers."""
        helpers = {str(pid) for pid, process in self.by_pid.items() if process.header["helper"]}
        return {name for name in os.listdir("/proc") if name.isdigit()} <= helpers | {"1"}

    # -- processes ----------------------------------------------------------------------------------------------

    def on_child(self, _: int) -> None:
        """Wait for whatever has ended: processes, and what they have left behind."""
        try:
            os.read(self.woken, 1 << 12)
        except BlockingIOError:
            pass
        self.reap(os.WNOHANG)

    def reap(self, options: int) -> None:
        """See to what has ended; without WNOHANG, wait until all has."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, options)
            except ChildProcessError:
                if self.is_overfull:
                    self.is_overfull = False
                    for directory in self.config["scratch"]:
                        workspace.empty_directory(directory, 0o1777)
                return
            if not pid:
                return
            process = self.by_pid.pop(pid, None)
            if process is not None:
                process.on_end(status, usage)


def memory_bytes() -> int:
    """What all processes take together, without this one; what they share counts for each."""
    pages = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/statm", "rb") as statm:
                    pages += int(statm.read().split()[1])
            except (OSError, IndexError):
                pass  # it has ended
    return pages * os.sysconf("SC_PAGE_SIZE")


def serve(config: dict[str, Any]) -> NoReturn:
    """Supervise the processes of this sandbox. Returns never."""
    try:
        ProcessSupervisor(config).loop()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


if __name__ == "__main__":
    serve(startup.prepare())
