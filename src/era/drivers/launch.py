"""Starting bubblewrap: as which user, with which options, files and descriptors.

*Survivor.* This process outlives the service for a moment and kills what the service's bubblewraps leave behind.
bubblewrap is two processes. The first is killed with the service (`--die-with-parent`). The second waits for the first
before it does anything, on an eventfd, which never says that nobody is there any more. If the service is killed in that
millisecond, the second would wait for ever, with all namespaces that have been made. So this process knows the groups
of those that have been started, and learns of the service's end as its pipe is closed.

*User ids.* Each sandbox has one of its own, from a range that belongs to one driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any

from era.drivers.options import Plan
from era.errors import SandboxFailed

_CALLS = {
    "x86_64": {"setgroups": 116, "setresuid": 117, "setresgid": 119},
    "aarch64": {"setgroups": 159, "setresuid": 147, "setresgid": 149},
}
_OOM_SCORE = 500
"""What programs have is twice that: they go before their supervisors."""

_LOG_BYTES = 8 << 10
"""Size of the log of a sandbox's own processes."""

_libc = ctypes.CDLL(None, use_errno=True)

DESCRIPTORS = 1024 << 4
"""Bound for the open files of a sandbox's processes, before the supervisor sets that of a program."""


class Bubblewrap(subprocess.Popen[bytes]):
    """bubblewrap's own process, in a group with what it has cloned; `survivor` knows that until it is waited for."""

    survivor: Survivor

    def wait(self, timeout: float | None = None) -> int:
        with self._noticed():
            return super().wait(timeout)

    def poll(self) -> int | None:
        """Also called by `kill`, which thus waits for one that has ended."""
        with self._noticed():
            return super().poll()

    def end(self, seconds: float = 0) -> None:
        """Let nothing be left: kill it, unless it ends by itself in so many seconds, with what it has cloned, which
        would wait for it for ever if it hasn't begun yet."""
        if self.returncode is not None:
            return  # its group may be somebody else's by now
        with contextlib.suppress(subprocess.TimeoutExpired):
            if seconds:
                self.wait(seconds)
                return
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    @contextlib.contextmanager
    def _noticed(self) -> Iterator[None]:
        """Tell the survivor, if it is in this block that the process has been waited for: then its number is free."""
        had_ended = self.returncode is not None
        yield
        if not had_ended and self.returncode is not None:
            self.survivor.remove(self.pid)


@dataclass(frozen=True, slots=True)
class Launched:
    """What has been started."""

    process: Bubblewrap
    """bubblewrap's own process, which ends after the other one."""

    child: int
    """The pid of the process that it has put inside."""


def launch(
    bwrap: Path,
    plan: Plan,
    survivor: Survivor,
    *,
    user: int | None = None,
    filters: Iterable[bytes] = (),
    pass_fds: Iterable[int] = (),
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    bound: Callable[[int], None] = lambda _: None,
) -> Launched:
    """Start what a plan says. It sees `pass_fds`, and is under `filters` of system calls. `user` is the uid and gid it
    gets, None for this process's own. `bound` is called with the pid of bubblewrap's process before that has read its
    options, so that what it does to that process holds for all that follow. Blocks until namespaces are there, not
    until the program is. Raises OSError, SandboxFailed."""
    with contextlib.ExitStack() as stack:

        def pipe() -> tuple[FileIO, FileIO]:
            """A pipe's ends, to read and to write, closed when the block is left."""
            read, write = os.pipe()
            return stack.enter_context(FileIO(read, "rb")), stack.enter_context(FileIO(write, "wb"))

        options_read, options_write = pipe()
        info_read, info_write = pipe()

        def filled(content: bytes) -> int:
            """A descriptor from which `content` can be read, which must fit into a pipe."""
            read, write = pipe()
            write.write(content)
            write.close()
            return read.fileno()

        data = {path: filled(content) for path, content in plan.files.items()}
        loaded = [filled(content) for content in filters]
        options = [*plan.options(data), "--info-fd", str(info_write.fileno())]
        for descriptor in loaded:
            options += ["--add-seccomp-fd", str(descriptor)]
        with contextlib.nullcontext() if user is None else _as_user(user):
            process = Bubblewrap(
                [str(bwrap), "--args", str(options_read.fileno()), "--", *plan.command],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env={},
                pass_fds=(options_read.fileno(), info_write.fileno(), *pass_fds, *data.values(), *loaded),
                start_new_session=True,
            )
        process.survivor = survivor
        try:
            survivor.add(process.pid)
            offer_to_oom_killer(process.pid)
            info_write.close()
            with contextlib.suppress(PermissionError):  # the service's own limit is higher, which slows forks
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
            bound(process.pid)
            options_write.write("\0".join([*options, ""]).encode())
            options_write.close()
            info = info_read.readall()
            if not info:
                raise SandboxFailed("bubblewrap did not make the sandbox.")
        except BaseException:
            process.end()
            raise
        return Launched(process, json.loads(info)["child-pid"])


def bounded_log() -> int:
    """Make a file in memory for what a sandbox's own processes write to stderr. Its size is fixed, because in gVisor a
    program can open its supervisor's stderr, and could fill memory that counts for later runs. It begins as zeros.

    Returns:
        Its descriptor, which the caller closes.

    Raises:
        OSError: No file can be made.
    """
    log = os.memfd_create("era-sandbox-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(log, _LOG_BYTES)
    fcntl.fcntl(log, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return log


def offer_to_oom_killer(pid: int) -> None:
    """Have the kernel end a process of ours before others where the machine is out of memory, and with it all that it
    starts from now on. Where this one is root, none of these can undo it (CAP_SYS_RESOURCE): proc_pid_oom_score_adj(5).
    """
    own = int(Path("/proc/self/oom_score_adj").read_text())
    with contextlib.suppress(OSError):  # a root that may not, or it has ended
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(max(own, _OOM_SCORE)))


@contextlib.contextmanager
def _as_user(uid: int) -> Iterator[None]:
    """Root's thread has this uid and gid, and no other group, as long as the block lasts: what it starts there is that
    user, once it has executed a program, and can't be root again. Other threads aren't concerned.

    `Popen(user=…)` does the same in the child. But for that it has to copy the service's page tables, where it can do
    with a vfork otherwise; that is several milliseconds of two processors.
    """
    groups = os.getgroups()
    _call("setgroups", 0, None)
    try:
        # A saved uid and gid of 0 lets this thread come back. Executing a program sets them, too.
        _call("setresgid", uid, uid, 0)
        _call("setresuid", uid, uid, 0)
        yield
    finally:
        _call("setresuid", 0, 0, 0)
        _call("setresgid", 0, 0, 0)
        _call("setgroups", len(groups), (ctypes.c_uint32 * len(groups))(*groups))


def _call(name: str, *arguments: Any) -> None:
    """Make a system call, which holds for this thread only; the C library's functions change all threads. Raises
    OSError."""
    if _libc.syscall(_CALLS[os.uname().machine][name], *arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


# A stop of a whole control group is for the service to carry out: signals that ask for an end are ignored.
_SCRIPT = """
trap '' HUP INT TERM
groups=' '
while read -r sign group; do
  case $sign in
    +) groups="$groups$group " ;;
    -) groups="${groups%% $group *} ${groups#* $group }" ;;
  esac
done
for group in $groups; do
  kill -s KILL -- "-$group"
done
"""


class Survivor:
    """That process, as the service sees it. It is started for the first group."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stdin: IO[bytes] | None = None

    def add(self, group: int) -> None:
        """Have this process group killed when the service ends. Called on the thread that starts sandboxes. Raises
        OSError."""
        if self._process is None:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                bufsize=0,
                start_new_session=True,
            )
            self._stdin = self._process.stdin
        self._tell(f"+ {group}\n")

    def remove(self, group: int) -> None:
        """Nothing is left of a process group that was added; its number may soon be another's. Any thread may call
        this."""
        self._tell(f"- {group}\n")

    def stop(self) -> None:
        """End it. Groups that it has still are killed."""
        self._stdin = None
        if self._process is not None:
            self._process.communicate()

    def _tell(self, line: str) -> None:
        stdin = self._stdin
        if stdin is not None:
            # Somebody has killed it, and what it is for happens once in many kills; or it is being stopped.
            with suppress(BrokenPipeError, ValueError):
                stdin.write(line.encode())


FIRST_UID = 1_900_000_000
"""Sandboxes of a root service take uids from here on: above those of people, containers and systemd."""

UIDS, _RANGES = 100_000, 2_400
"""The uids of one driver, and the number of such ranges. The data directory decides which range a driver has, so that
two services on one machine share none. All are below 2**31, since bubblewrap takes no larger ones."""


class Uids:
    """The uids of one driver's sandboxes."""

    def __init__(self, directory: Path) -> None:
        """`directory` is the service's."""
        self.are_own = os.geteuid() == 0
        """Whether sandboxes have uids of their own."""

        first = FIRST_UID + int(hashlib.sha256(bytes(directory)).hexdigest(), 16) % _RANGES * UIDS
        self._unused = iter(range(first, first + UIDS))
        self._free: list[int] = []

    def take(self) -> int | None:
        """A uid that no sandbox and no file has; None for a service that isn't root, whose sandboxes have its own."""
        if not self.are_own:
            return None
        return self._free.pop() if self._free else next(self._unused)

    def give_back(self, uid: int | None) -> None:
        """Nothing is left of what had this uid."""
        if uid is not None:
            self._free.append(uid)
