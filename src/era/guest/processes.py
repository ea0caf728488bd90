"""Processes and pipes of a sandbox, as the supervisor and what it forks need them."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import time

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    import resource

PIPE_BYTES = 1 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; older kernels and gVisor answer EINVAL, and the pages are written to one by one
PAGE = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def wide_pipe() -> tuple[int, int]:
    """A pipe for output, with room for 1 MiB: Node drops what finds no room when a program calls process.exit()."""
    read, write = os.pipe()
    try:
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        pass  # this user's pipes have used up their bound, so it has room for 64 KiB
    return read, write


def signal_everything(number: int) -> bool:
    """Signal every process of this PID namespace but ourselves. False when there is none."""
    try:
        os.kill(-1, number)
    except ProcessLookupError:
        return False
    return True


def kill_everything(main_pid: int) -> tuple[int, resource.struct_rusage, int]:
    """Kill and reap until no process is left. Returns the wait status and resource usage of process `main_pid`, and how
    many others there were."""
    main: tuple[int, resource.struct_rusage] | None = None
    reaped = 0
    pid, status, usage = os.wait4(main_pid, os.WNOHANG)  # it may have ended by itself: its own status counts
    if pid:
        main = status, usage
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


def populate_pages() -> None:
    """Take the copy-on-write faults of this fork now, while nobody waits."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, permissions, _ = line.split(None, 2)
            if permissions == "rw-p":
                start, end = (int(part, 16) for part in span.split("-"))
                if end - start < 64 << 20:
                    populated = _libc.madvise(start, end - start, MADV_POPULATE_WRITE) == 0
                    for page in () if populated else range(start, end, PAGE):
                        ctypes.memmove(page, page, 1)


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
