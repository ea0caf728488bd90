"""The processes of a sandbox, read from the host's /proc, so that nothing inside needs to be asked."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import re
import select
import signal
import stat
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

from era.core.concurrency.outages import FOR_NOW
from era.core.process import HeldFiles

_BLOCK = 512  # bytes, the unit of st_blocks
_MAPS = "map_files"
_DELETED_MAP = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) .* \(deleted\)$", re.MULTILINE
)
_SHARED_MAP = re.compile(rb"^\S+ ...s \S+ \S+ ([1-9]\d*) ", re.MULTILINE)
_PROCMAP_QUERY = 0xC0686611
_QUERY = struct.Struct("=9Q4I2Q")  # struct procmap_query of linux/fs.h; its fields 0 to 8 are the ones used here
_NEXT_SHARED_FILE = 0x10 | 0x08 | 0x20  # the map at an address or the next one, of those that are shared and of a file
_IN_FLIGHT = re.compile(rb"^scm_fds:\s+[1-9]", re.MULTILINE)
_HOLDING_CALL = {
    "x86_64": re.compile(rb"(?:40|46|275|307) |72 \S+ 0x(?:[0-9a-f]*0{6})?26 "),
    "aarch64": re.compile(rb"(?:71|211|76|269) |25 \S+ 0x(?:[0-9a-f]*0{6})?26 "),
}.get(os.uname().machine)
"""What proc(5) says of a thread that is in sendfile, sendmsg, splice, sendmmsg, or fcntl with F_OFD_SETLKW. These may
wait for ever, and have the files meanwhile whose descriptors they were given, though these are closed by then."""

_INODE = re.compile(rb"^ino:\s+(\d+)", re.MULTILINE)
_FDINFO_BYTES = 1 << 12  # more than is said of any file or socket
_TICKS = os.sysconf("SC_CLK_TCK")
_MOST_THREADS = 64
"""That are looked at for whether one of them wants a processor: each takes some 50 microseconds."""

_ANYTHING = re.compile(rb".")
_INNERMOST_PID = re.compile(rb"^NStgid:.*\t(\d+)$", re.MULTILINE)
_RSS = re.compile(rb"^Rss", re.MULTILINE)
_KCMP = {"x86_64": 312, "aarch64": 272}.get(os.uname().machine)  # its number; the C library has no function for it
_KCMP_FILES = 2

_libc = ctypes.CDLL(None)


class UnseenIsFine(contextlib.AbstractContextManager[None]):
    """A block that is left where a process has ended meanwhile, or may not be looked at. It raises OSError where only
    for now nothing can be asked: else a process would count as ended, with what it has."""

    def __exit__(self, _: object, error: object, trace: object) -> bool:
        return isinstance(error, OSError) and error.errno not in FOR_NOW


def below(pid: int) -> list[int]:
    """`pid` and the pids of all its descendants."""
    pids, pending = [], [pid]
    while pending:
        pids.append(pid := pending.pop())
        with UnseenIsFine():  # it has ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
    return pids


def threads(pid: int) -> list[int]:
    """The ids of a process's threads; none where it has ended. proc(5) has each under its own id as well, and has to be
    asked so: a thread may have descriptors of its own, and under the id of one that has ended nothing is said of its
    process, though other threads go on. Raises OSError."""
    try:
        return sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    except (FileNotFoundError, ProcessLookupError):
        return []


def with_descriptors(pid: int) -> list[int]:
    """Threads that have between them all descriptors of a process. Raises OSError."""
    chosen: list[int] = []
    for tid in threads(pid):
        if not chosen or not _share_descriptors(chosen[-1], tid):
            chosen.append(tid)
    return chosen


def _share_descriptors(one: int, other: int) -> bool:
    """Whether two threads certainly have the same descriptors (kcmp(2))."""
    if _KCMP is None:
        return False
    number, *arguments = map(ctypes.c_long, (_KCMP, one, other, _KCMP_FILES, 0, 0))
    return bool(_libc.syscall(number, *arguments) == 0)


def told(pid: int, name: str, says: re.Pattern[bytes] = _ANYTHING) -> bytes:
    """What a file of proc(5) says of the memory of a process, by the first of its threads of which it says that. Raises
    ProcessLookupError where it has ended, OSError."""
    for tid in chain([pid], (tid for tid in threads(pid) if tid != pid)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            text = Path(f"/proc/{tid}/{name}").read_bytes()
            if says.search(text):
                return text
    raise ProcessLookupError(errno.ESRCH, "It has ended.")


def unnamed(pids: Iterable[int], device: int) -> dict[int, int]:
    """The deleted files on `device` that these processes have open or mapped, run, or are in, if they are directories:
    the bytes that each takes, by inode.

    The kernel shows files that are only mapped to a service with CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE; others have
    none of them here.
    """
    found: dict[int, int] = {}
    for pid in pids:
        with UnseenIsFine():  # it has ended
            for tid in with_descriptors(pid):
                _add_unnamed(f"/proc/{tid}/fd", device, found)
            tids = threads(pid)
            any(_add_unnamed(f"/proc/{tid}/{_MAPS}", device, found) for tid in tids)
            for link in (f"/proc/{tid}/{name}" for tid in tids for name in ("exe", "cwd")):
                with UnseenIsFine():  # it has ended, or this isn't shown to us
                    _add_if_unnamed(os.stat(link), device, found)
    return found


def _add_unnamed(directory: str, device: int, found: dict[int, int]) -> bool:
    """Add what is in one directory of proc(5). Returns whether there is anything."""
    is_told = False
    with UnseenIsFine(), os.scandir(directory) as entries:
        for entry in entries:
            is_told = True
            try:
                status = entry.stat()
            except PermissionError:
                break  # all of them are closed to us
            except OSError:
                continue  # it was closed meanwhile
            _add_if_unnamed(status, device, found)
    return is_told


def _add_if_unnamed(status: os.stat_result, device: int, found: dict[int, int]) -> None:
    if status.st_nlink == 0 and status.st_dev == device:
        found[status.st_ino] = status.st_blocks * _BLOCK


def mapped_ends(pids: Iterable[int], device: int) -> dict[int, int]:
    """The deleted files on `device` that these processes have mapped: the bytes up to the end of what is mapped, by
    inode. What `unnamed` can't tell an ordinary user, roughly: a file may have holes, or go on behind its map."""
    ends: dict[int, int] = {}
    for pid in pids:
        with UnseenIsFine():  # it has ended
            for match in _DELETED_MAP.finditer(told(pid, "maps")):
                first, last, offset, major, minor = (int(text, 16) for text in match.groups()[:5])
                if os.makedev(major, minor) == device:
                    ends[int(match[6])] = max(ends.get(int(match[6]), 0), offset + last - first)
    return ends


def unnamed_bytes(pids: Iterable[int], device: int) -> int:
    """The bytes that the deleted files on `device` take which these processes have open or mapped."""
    pids = list(pids)
    found = unnamed(pids, device)
    return sum((mapped_ends(pids, device) | found).values())


def hide_files(pids: Iterable[int], device: int) -> bool:
    """Whether these processes may have files on `device` that can't be measured: descriptors lie in queues of sockets
    that they have open (before Linux 5.10 never), or may lie in calls of theirs that wait; or a deleted file is mapped
    of which an ordinary user only sees the map."""
    pids = list(pids)
    for pid in pids:
        with UnseenIsFine():  # it has ended
            if any(map(_thread_has_in_flight, with_descriptors(pid))) or any(map(_is_in_holding_call, threads(pid))):
                return True
    return not mapped_ends(pids, device).keys() <= unnamed(pids, device).keys()


def _is_in_holding_call(tid: int) -> bool:
    """Whether a thread is in a call that may have files of closed descriptors."""
    with UnseenIsFine():  # it has ended, or this isn't shown to us
        return _HOLDING_CALL is not None and _HOLDING_CALL.match(Path(f"/proc/{tid}/syscall").read_bytes()) is not None
    return False


def _thread_has_in_flight(tid: int) -> bool:
    """Whether descriptors lie in queues of sockets that a thread has open."""
    with UnseenIsFine():  # it has ended
        for name in os.listdir(f"/proc/{tid}/fd"):
            with UnseenIsFine():  # it was closed meanwhile
                if os.readlink(f"/proc/{tid}/fd/{name}").startswith("socket:") and _has_in_flight(tid, name):
                    return True
    return False


def _has_in_flight(tid: int, name: str) -> bool:
    """Whether descriptors lie in the queue of a socket. Raises OSError where it was closed meanwhile."""
    return _IN_FLIGHT.search(_information(tid, name)) is not None


def _information(tid: int, name: str) -> bytes:
    """The beginning of what is said of a descriptor. Raises OSError where it was closed meanwhile."""
    fd = os.open(f"/proc/{tid}/fdinfo/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _FDINFO_BYTES)
    finally:
        os.close(fd)


def _shared(pid: int) -> Iterable[int]:
    """The files, of any device, that a process has mapped to share, by inode. Raises OSError."""
    for tid in chain([pid], (tid for tid in threads(pid) if tid != pid)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # this thread has ended
            return _shared_by(tid)
    return ()


def _shared_by(pid: int) -> Iterable[int]:
    """The same, as it is said under the id of one thread. Raises ProcessLookupError where that has ended, OSError."""
    fd = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _asked_for_shared(fd)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        with os.fdopen(os.dup(fd), "rb") as file:  # before Linux 6.11
            text = file.read()
            if not text:
                raise ProcessLookupError(errno.ESRCH, "It has ended.") from None
            return map(int, _SHARED_MAP.findall(text))
    finally:
        os.close(fd)


def _asked_for_shared(fd: int) -> list[int]:
    """The same, by asking for one map after the other: there are few, and the kernel needn't write down all others."""
    inodes, address = list[int](), 0
    while True:
        query = bytearray(_QUERY.pack(_QUERY.size, _NEXT_SHARED_FILE, address, *(0,) * 12))
        try:
            fcntl.ioctl(fd, _PROCMAP_QUERY, query)
        except FileNotFoundError:
            return inodes
        found = _QUERY.unpack(query)
        address = found[4]
        if found[8]:
            inodes.append(found[8])


def held(pids: Iterable[int], device: int) -> HeldFiles | None:
    """The files on `device` that these processes have open or execute, and those that they have mapped to share; of the
    latter also ones of other devices, since file systems don't agree with themselves about what their device is, and of
    the former where an ordinary user's supervisor has them. None where not all of it may be seen."""
    is_open, in_flight = set[int](), False
    pids = list(pids)
    with UnseenIsFine():
        for tid in [tid for pid in pids for tid in with_descriptors(pid)]:
            try:
                with os.scandir(f"/proc/{tid}/fd") as entries:
                    for entry in entries:
                        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                            status = entry.stat()
                            if stat.S_ISREG(status.st_mode) and status.st_dev == device:
                                is_open.add(status.st_ino)
                            elif stat.S_ISSOCK(status.st_mode) and not in_flight:
                                in_flight = _has_in_flight(tid, entry.name)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            except PermissionError:
                # The supervisors can't be dumped, so this directory is root's; what is said of each descriptor isn't.
                by_infos = _told_by_infos(tid)
                if by_infos is None:
                    return None
                is_open |= by_infos[0]
                in_flight = in_flight or by_infos[1]
        for pid in pids:
            is_open |= _executed(pid, device)
        in_maps = mapped(pids)
        return None if in_maps is None else HeldFiles(frozenset(is_open), in_maps, in_flight)
    return None


def _executed(pid: int, device: int) -> set[int]:
    """The inode of what a process executes, if that is on `device`. Raises OSError."""
    for tid in threads(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # this thread has ended
            status = os.stat(f"/proc/{tid}/exe")
            return {status.st_ino} if status.st_dev == device else set()
    return set()


def _told_by_infos(tid: int) -> tuple[set[int], bool] | None:
    """The inodes, of any device, that a thread has open by what proc(5) tells of its descriptors, and whether
    descriptors lie in a queue of a socket; None where that isn't told (before Linux 5.14). Raises OSError."""
    inodes, in_flight = set[int](), False
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for name in os.listdir(f"/proc/{tid}/fdinfo"):
            with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                text = _information(tid, name)
                inode = _INODE.search(text)
                if inode is None:
                    return None
                inodes.add(int(inode[1]))
                in_flight = in_flight or _IN_FLIGHT.search(text) is not None
    return inodes, in_flight


def mapped(pids: Iterable[int]) -> frozenset[int] | None:
    """The files, of any device, that these processes have mapped to share, by inode. None where not all of it may be
    seen."""
    found = set[int]()
    with UnseenIsFine():
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                found.update(_shared(pid))
        return frozenset(found)
    return None


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time that these processes have used, with that of their children that have ended (proc_pid_stat(5))."""
    ticks = 0
    for pid in pids:
        with UnseenIsFine():  # it has ended
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # its name may be any bytes
            ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS


def want_processor(pids: Iterable[int]) -> bool:
    """Whether any thread of these processes has a processor at this moment, or waits for one (proc_pid_stat(5)). Of
    very many threads some are looked at, others each time: a program decides how many it has, and the caller waits."""
    tasks: list[tuple[int, int]] = []
    for pid in pids:
        with UnseenIsFine():  # it has ended
            tasks += ((pid, tid) for tid in threads(pid))
    for pid, tid in random.sample(tasks, min(len(tasks), _MOST_THREADS)):
        with UnseenIsFine():
            if Path(f"/proc/{pid}/task/{tid}/stat").read_bytes().rpartition(b")")[2].startswith(b" R"):
                return True
    return False


def memory_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes that isn't that of files (proc_pid_status(5)). What they share by fork counts for
    each, what they share otherwise once."""
    anonymous = shared = 0
    for pid in pids:
        with UnseenIsFine():  # it has ended
            lines = (line.split() for line in told(pid, "status", _RSS).splitlines())
            sizes = {line[0]: int(line[1]) << 10 for line in lines if line[0] in (b"RssAnon:", b"RssShmem:")}
            anonymous += sizes.get(b"RssAnon:", 0)
            shared = max(shared, sizes.get(b"RssShmem:", 0))
    return anonymous + shared


def kill_largest(pid: int, other: int, size: Callable[[int], int], will_kill: Callable[[int], None]) -> bool:
    """Kill the process below `pid` that has most memory, by `size`, if none below `other` has more. Returns whether it
    was killed. The two themselves are left alone. `will_kill` is called before, as its end may be seen at once, with
    the pid that it has in its own namespace."""
    sizes = {one: size(one) for one in {*below(pid), *below(other)} - {pid, other}}
    largest = max(sizes, key=lambda one: sizes[one], default=0)
    with UnseenIsFine():
        pidfd = os.pidfd_open(largest)
        try:
            if largest in below(pid):  # asked only now: its number could have become another's until we had its pidfd
                will_kill(int(_INNERMOST_PID.findall(told(largest, "status", _INNERMOST_PID))[0]))
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                return True
        finally:
            os.close(pidfd)
    return False


def has_ended(pidfd: int) -> bool:
    """Whether a process has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def wait_for(pidfd: int) -> None:
    """Block until a process has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.poll()


class OutsideView(ABC):
    """The part of ports.Sandbox that looks at processes."""

    @abstractmethod
    def _processes(self) -> list[int]:
        """pids, on the host, of all processes of the sandbox."""

    def memory_bytes(self) -> int:
        return memory_bytes(self._processes())

    def wants_processor(self) -> bool:
        return want_processor(self._processes())

    def unnamed_bytes(self, device: int) -> int:
        return unnamed_bytes(self._processes(), device)

    def hides_files(self, device: int) -> bool:
        return hide_files(self._processes(), device)

    def held_files(self, device: int) -> HeldFiles | None:
        return held(self._processes(), device)
