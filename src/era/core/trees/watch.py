"""Which entries of a working directory were touched since the last scan, by inotify(7).

Theory of operation. Scanning a large working directory takes far longer than most runs. So its directories are watched,
and the next scan goes only to the names that the kernel has reported. Scans happen while nothing runs, and a program
may want to be overlooked, so this has to be sound against any sequence of system calls:

  - A file is changed through a descriptor or by its path. Each open is reported (IN_OPEN), and so is each change by
    path (IN_MODIFY, IN_ATTRIB). Every name that was opened counts as touched: no event but the last close reports a
    write through a shared memory map, and that close can come after the scan, since the kernel collects descriptors in
    flight in a cycle of sockets when it likes.
  - Events carry the name that was used. So names of files with several links count as touched every time, and a partial
    scan that finds a link which is new gives up: a full scan follows, which finds the other names. A link is new where
    its file had one name at the last scan, and where the name has been created or renamed since: it may have been a
    link to another file before.
  - A link that is gone again can't be found. A name that was created (IN_CREATE reports new files and new links alike)
    and then deleted or replaced may have been a link to any file: a full scan follows. Renames pass that on.
  - A file that a process had at the last scan, be it open or executed, can be opened by proc(5) under the name that it
    was opened by. If that is gone, nothing is reported. So such files are looked at in any case (live_snapshots.py).
  - A directory that was created since the last scan wasn't watched, so links may have come and gone in it: a full scan
    follows. One that was moved keeps its watch under its old path: it is scanned completely.
  - If the event queue overflowed, or a watch can't be had, everything may have been touched.

Watches are a user's, of whom other programs may need some, and each directory takes one. So sessions share half of them
(WatchBudget), and what doesn't fit in there isn't watched: each scan is full. The same holds for inotify instances, of
which each session takes one.

Where programs have a kernel of their own that keeps files open (gVisor), nothing is watched, and each scan is full.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock, RLock

from era.core.concurrency.shares import Shares

_MODIFY, _ATTRIB, _CLOSE_WRITE, _OPEN = 0x2, 0x4, 0x8, 0x20
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_OVERFLOW, _IGNORED = 0x4000, 0x8000
_ONLY_DIRECTORIES, _NOT_UNLINKED, _IS_DIRECTORY = 0x01000000, 0x04000000, 0x40000000
_CHANGES = _MODIFY | _ATTRIB | _CLOSE_WRITE | _OPEN | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_MASK = _CHANGES | _ONLY_DIRECTORIES | _NOT_UNLINKED
_EVENT = struct.Struct("iIII")
_READ_BYTES = 1 << 16

MAX_WATCHES = 16_384
"""Directories of one session."""

_LIMITS = "/proc/sys/fs/inotify"

_libc = ctypes.CDLL(None, use_errno=True)

type Path = tuple[str, ...]
"""The path of a directory, relative to the working directory, as a tuple of names."""


@dataclass(slots=True)
class Touched:
    """What was touched in a directory (`names`), and in its subdirectories (`below`)."""

    names: set[str] = field(default_factory=set)
    new: set[str] = field(default_factory=set)
    """Those of `names` that may be other directories than at the last scan."""

    arrived: set[str] = field(default_factory=set)
    """Those of `names` that may be other files than at the last scan."""

    below: dict[str, Touched] = field(default_factory=dict)

    def at(self, path: Path) -> Touched:
        """What was touched in the directory at a path below this one; an entry for it is made if need be."""
        here = self
        for name in path:
            here = here.below.setdefault(name, Touched())
        return here


class _CreatedNames:
    """The names that were created between two scans, and whether one may have been a link that is gone again."""

    def __init__(self, entry: tuple[int, str] | None) -> None:
        """`entry` is the place of a file that the supervisor created and removed: that much is expected of it. A place
        is the watch descriptor of a directory, and a name."""
        self.may_have_been_links = False
        self._entry = entry
        self._created: set[tuple[int, str]] = set()
        """Names stay here when they are renamed, because an exchange of two names looks like two renames."""

        self._renamed: set[int] = set()
        """Cookies of renames of such names, until their new names are reported."""

    def note(self, directory: int, mask: int, name: str, cookie: int) -> None:
        """Add one event."""
        place = (directory, name)
        if mask & _CREATE:
            self.may_have_been_links |= bool(mask & _IS_DIRECTORY) or (place == self._entry and place in self._created)
            self._created.add(place)
        elif mask & _DELETE and place == self._entry:
            pass  # had it been a link, the name would have been created twice
        elif mask & _MOVED_FROM and place in self._created:
            self._renamed.add(cookie)
        elif mask & (_DELETE | _MOVED_TO):
            self.may_have_been_links |= place in self._created
            if mask & _MOVED_TO and cookie in self._renamed:
                self._renamed.discard(cookie)
                self._created.add(place)


class WatchBudget:
    """How many directories may be watched, of one session and of all, and how many sessions' are."""

    def __init__(self, most: int | None = None, instances: int | None = None) -> None:
        """`most` and `instances` are half of what this user may have, where they aren't given."""
        self._shares: Shares[Watch] = Shares(_limit("max_user_watches", 8192) // 2 if most is None else most)
        self._instances = _limit("max_user_instances", 128) // 2 if instances is None else instances
        """That are left."""

        self._lock = Lock()

    @property
    def room(self) -> int:
        """How many directories of one more session may be watched."""
        return min(self._shares.most - self._shares.taken, 2 * MAX_WATCHES) // 2

    def take_instance(self) -> bool:
        """Take one, or return False."""
        with self._lock:
            if self._instances <= 0:
                return False
            self._instances -= 1
            return True

    def give_instance_back(self) -> None:
        with self._lock:
            self._instances += 1

    def take(self, watch: Watch, held: int) -> bool:
        """Take one more for a watch that holds so many, or return False."""
        with self._lock:
            return held < MAX_WATCHES and self._shares.take(watch)

    def give_back(self, watch: Watch, count: int) -> None:
        with self._lock:
            self._shares.give_back(watch, count)


class Watch:
    """An inotify instance with watches on the directories of one working directory. It may be closed from any thread,
    also while it is used: after that it knows nothing.

    Raises OSError where sessions have as many inotify instances as they may have, or the user has.
    """

    def __init__(self, budget: WatchBudget, linked: Iterable[tuple[Path, str]] = ()) -> None:
        """`linked` are the files with several names, as far as that is known already."""
        self._budget = budget
        if not budget.take_instance():
            raise OSError(errno.EMFILE, "too many directories are watched")
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            budget.give_instance_back()
            raise OSError(ctypes.get_errno(), "inotify_init1 failed")
        self._using = RLock()
        """Held while the descriptor is used: closed meanwhile, its number could be another file's already."""

        self._paths: dict[int, Path] = {}
        self._linked = set(linked)
        self._complete = True
        """Whether every event since the watch began was read."""

        self._noted: tuple[Touched, _CreatedNames] | None = None
        """What was touched since the last `skip`, as far as that was read."""

        self._needs_full_scan = False

    def add(self, fd: int, path: Path) -> None:
        """Watch the directory open as `fd`. To be called before it is scanned."""
        with self._using:
            if self._fd < 0:
                return
            number = _libc.inotify_add_watch(self._fd, f"/proc/self/fd/{fd}".encode(), _MASK)
            if number >= 0 and (number in self._paths or self._budget.take(self, len(self._paths))):
                self._paths[number] = path
            else:
                self.close()  # the others are of no use without it

    def note_links(self, path: Path, name: str, links: int, *, arrived: bool) -> bool:
        """Note that a file has `links` names. `arrived` says that another file may have had this one at the last scan.
        Returns whether it has several now and, as far as is known, hadn't then."""
        known = (path, name) in self._linked
        if links > 1:
            self._linked.add((path, name))
        elif known:
            self._linked.discard((path, name))
        return links > 1 and (arrived or not known)

    def need_full_scan(self) -> None:
        """Have `touched` say so until the next `skip`, also where the scan that has found it is given up."""
        self._needs_full_scan = True

    @property
    def works(self) -> bool:
        """Whether no event was lost. If one was, or it is closed, this watch is of no use any more."""
        return self._complete and self._fd >= 0

    def touched(self, entry: str | None = None) -> Touched | None:
        """What was touched since the last `skip`, as scans may be given up before that; None if that can be anything,
        so that a full scan is needed.

        `entry` is the name of the program's file at the top, if the supervisor has created and removed it.
        """
        with self._using:
            if self._noted is None:
                root = next((number for number, path in self._paths.items() if not path), -1)
                self._noted = Touched(), _CreatedNames(None if entry is None else (root, entry))
            touched, created = self._noted
            while self._complete and (events := self._read()):
                offset = 0
                while offset < len(events):
                    number, mask, cookie, length = _EVENT.unpack_from(events, offset)
                    offset += _EVENT.size
                    name = os.fsdecode(events[offset : offset + length].rstrip(b"\0"))
                    offset += length
                    self._note(touched, number, mask, name)
                    created.note(number, mask, name, cookie)
            if not self.works or created.may_have_been_links or self._needs_full_scan:
                self._linked.clear()  # the full scan notes them anew
                return None
        for path, name in self._linked:
            touched.at(path).names.add(name)
        return touched

    @property
    def linked(self) -> frozenset[tuple[Path, str]]:
        """The files that had several names at the last scan, by directory and name."""
        return frozenset(self._linked)

    def skip(self) -> None:
        """Drop the events so far: they have been looked at, and else there are the service's own opens. Nothing runs
        meanwhile."""
        while self._read():
            pass
        self._noted, self._needs_full_scan = None, False

    def close(self) -> None:
        with self._using:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                self._budget.give_instance_back()
                self._budget.give_back(self, len(self._paths))
                self._paths.clear()

    def _note(self, touched: Touched, number: int, mask: int, name: str) -> None:
        """Add one event, of the watch `number`, to `touched`."""
        if mask & _OVERFLOW:
            self._complete = False
        elif mask & _IGNORED:
            if self._paths.pop(number, None) is not None:
                self._budget.give_back(self, 1)
        elif number in self._paths and name and not (mask & _IS_DIRECTORY and mask & _OPEN):
            here = touched.at(self._paths[number])
            here.names.add(name)
            if mask & (_CREATE | _MOVED_TO):
                (here.new if mask & _IS_DIRECTORY else here.arrived).add(name)

    def _read(self) -> bytes:
        with self._using:
            if self._fd < 0:
                return b""
            try:
                return os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                return b""


def _limit(name: str, default: int) -> int:
    """How many this user may have, or what it was by default for many years."""
    try:
        with open(f"{_LIMITS}/{name}") as file:
            return int(file.read())
    except (OSError, ValueError):
        return default
