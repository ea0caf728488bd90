"""Processes and pipes of a sandbox, as the supervisor and what it forks need them; how a run's program is called."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import sys
import time

from workspace import write_all

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    import resource
    from collections.abc import Mapping
    from typing import Any, NoReturn

PIPE_BYTES = 1 << 20
_FIONREAD = 0x541B


class Scheduling:
    """How this process is scheduled, which is inherited by whatever it starts. On Linux programs can't change it: the
    filter of system calls sees to that. In gVisor, which has no such filter, they can, though only in what it tells."""

    def __init__(self) -> None:
        self._usual = self._now()

    def restore(self) -> None:
        """Make it what it was at first."""
        if self._now() != self._usual:
            niceness, processors = self._usual
            os.setpriority(os.PRIO_PROCESS, 0, niceness)
            os.sched_setaffinity(0, processors)

    @staticmethod
    def _now() -> tuple[int, set[int]]:
        return os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)


def wide_pipe() -> tuple[int, int]:
    """A pipe for output, with room for 1 MiB: Node drops what finds no room when a program calls process.exit(). Our
    end doesn't block: a program may open its pipe and read it empty before us."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    try:
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        pass  # this user's pipes have used up their bound, so it has room for 64 KiB
    return read, write


def renew_streams() -> None:
    """Make sys.stdout and sys.stderr anew, as Python makes them of pipes, which programs have: those that it started
    with are of files, and remember that one can seek in them."""
    read, write = os.pipe()
    for fd, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        own = os.dup(fd)
        os.dup2(write, fd)
        buffer: Any = open(fd, "wb", closefd=False)  # noqa: SIM115  it stays
        buffer.raw.name = f"<{name}>"
        stream: Any = io.TextIOWrapper(
            buffer,
            encoding=before.encoding,
            errors=before.errors,
            newline="\n",
            line_buffering=True,  # what was printed before a kill is not lost
            write_through=before.write_through,
        )
        stream.mode = "w"
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
        os.dup2(own, fd)
        os.close(own)
    os.close(read)
    os.close(write)


def signal_everything(number: int) -> bool:
    """Signal every process of this PID namespace but ourselves. False when there is none."""
    try:
        os.kill(-1, number)
    except ProcessLookupError:
        return False
    return True


def unread(pipe: int) -> int:
    """How many bytes a pipe holds."""
    count = bytearray(4)
    fcntl.ioctl(pipe, _FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


def reap_orphans(main_pid: int) -> None:
    """Wait for what has ended and has nobody else to do so, except for process `main_pid`: until then each counts as a
    process."""
    try:
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != main_pid:
            os.waitpid(ended.si_pid, 0)
    except ChildProcessError:
        pass


def kill_everything(main_pid: int) -> tuple[int, resource.struct_rusage, int]:
    """Kill and reap until no process is left. Returns the wait status and resource usage of process `main_pid`, and how
    many others there were."""
    main: tuple[int, resource.struct_rusage] | None = None
    reaped = 0
    pid, status, usage = os.wait4(main_pid, os.WNOHANG)  # it may have ended by itself: its own status counts
    if pid:
        main = status, usage
    reap_orphans(main_pid)
    while signal_everything(signal.SIGKILL) or main is None:
        try:
            pid, status, usage = os.wait4(-1, 0)
        except ChildProcessError:
            time.sleep(0.0005)  # an orphan not yet handed to us
            continue
        if pid == main_pid:
            main = status, usage
        else:
            reaped += 1
    # Linux also signals processes that are dead and not yet reaped, so none is left here. gVisor doesn't.
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            reaped += 1
    except ChildProcessError:
        pass
    return *main, reaped


def reset_signals() -> None:
    """Set the handlers that a program started from a shell has. The service may have been started with others: nohup,
    and a shell's background jobs, ignore some signals."""
    for number in signal.valid_signals():
        if signal.getsignal(number) == signal.SIG_IGN and number not in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def restore_signals() -> None:
    """Set the default handlers of signals that Python ignores: an exec would pass that on."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def read_environment() -> dict[str, str]:
    """Read the environment from the pipe at descriptor 3. Ends this process where the supervisor closes that."""

    def read(size: int) -> bytes:
        parts = b""
        while len(parts) < size:
            part = os.read(3, size - len(parts))
            if not part:
                os._exit(0)
            parts += part
        return parts

    environment: dict[str, str] = json.loads(read(int.from_bytes(read(4), "big")))
    return environment


class Invocation:
    """Fields of the header of a run, and its standard input. The default is what a spare is made for."""

    def __init__(self, header: Mapping[str, Any] | None = None, stdin: bytes = b"") -> None:
        header = header or {}
        self.args: list[str] = header.get("args", [])
        self.command: list[str] = header.get("command", [])
        self.directory: str = header.get("cwd", "")
        self.stdin = -1
        """A descriptor of a file in memory; -1 where the input is empty. A file, not a pipe, since nobody has to feed
        it, and since sys.stdin of a forked program was made for one."""

        if stdin:
            self.stdin = os.memfd_create("stdin")
            write_all(self.stdin, stdin)
            os.lseek(self.stdin, 0, os.SEEK_SET)

    @property
    def is_usual(self) -> bool:
        return not self.args and not self.command and not self.directory and self.stdin < 0

    def close(self) -> None:
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1


def execute(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Become `command`. Where that can't be, end as a shell does: 127 if there is no such program, else 126."""
    try:
        try:
            os.execvpe(command[0], command, environment)
        except OSError as problem:
            if problem.errno != errno.ENOEXEC:
                raise
            # A script without a first line that names its interpreter: a shell takes it for one of its own.
            os.execve("/bin/sh", ["/bin/sh", _found(command[0], environment), *command[1:]], environment)
    except OSError as problem:
        os.write(2, f"era: {command[0]}: {problem.strerror}\n".encode(errors="surrogateescape"))
        os._exit(127 if isinstance(problem, FileNotFoundError) else 126)


def _found(program: str, environment: dict[str, str]) -> str:
    """The path of a program that is there."""
    if "/" in program:
        return program
    paths = (f"{directory}/{program}" for directory in environment.get("PATH", os.defpath).split(":"))
    return next((path for path in paths if os.access(path, os.X_OK)), program)
