"""Which entries of a working directory were touched since the last scan, by inotify(7).

Scanning a large working directory takes far longer than most runs. So its directories are watched, and the next scan
goes only to the names that the kernel has reported. That is sound because scans happen while nothing runs:

  - Every write through an open file ends with IN_CLOSE_WRITE, at the latest when the writer is dead; that covers writes
    through a memory map, which no other event reports.
  - A directory that was created or moved is not watched yet, or under its old path: it is scanned completely, which
    also watches it.
  - A file with several names (hard links) is reported only under the name that was used. Such names count as touched
    every time. A partial scan that finds a file with other names than known gives up, and a full scan follows.
  - If the event queue overflowed, or a watch can't be had, everything may have been touched.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass, field

_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_OVERFLOW, _IGNORED = 0x4000, 0x8000
_ONLY_DIRECTORIES, _NOT_UNLINKED, _IS_DIRECTORY = 0x01000000, 0x04000000, 0x40000000
_MASK = (
    _MODIFY | _ATTRIB | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _ONLY_DIRECTORIES | _NOT_UNLINKED
)
_EVENT = struct.Struct("iIII")
_READ_BYTES = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)

type Path = tuple[str, ...]
"""The path of a directory, relative to the working directory, as a tuple of names."""


@dataclass(slots=True)
class Touched:
    """What was touched in a directory (`names`), and in its subdirectories (`below`)."""

    names: set[str] = field(default_factory=set)
    new: set[str] = field(default_factory=set)
    """Those of `names` that may be other directories than at the last scan."""

    below: dict[str, Touched] = field(default_factory=dict)

    def at(self, path: Path) -> Touched:
        """What was touched in the directory at a path below this one; an entry for it is made if need be."""
        here = self
        for name in path:
            here = here.below.setdefault(name, Touched())
        return here


class Watch:
    """An inotify instance with watches on the directories of one working directory.

    Raises OSError where the user's inotify instances are used up.
    """

    def __init__(self) -> None:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1 failed")
        self._paths: dict[int, Path] = {}
        self._linked: set[tuple[Path, str]] = set()
        self._complete = True

    def add(self, fd: int, path: Path) -> None:
        """Watch the directory open as `fd`. To be called before it is scanned."""
        number = _libc.inotify_add_watch(self._fd, f"/proc/self/fd/{fd}".encode(), _MASK)
        if number < 0:
            self._complete = False
        else:
            self._paths[number] = path

    def note_links(self, path: Path, name: str, links: int) -> bool:
        """Note that a file has `links` names. Returns whether it has several now and hadn't at the last scan."""
        known = (path, name) in self._linked
        if links > 1:
            self._linked.add((path, name))
        elif known:
            self._linked.discard((path, name))
        return links > 1 and not known

    def touched(self) -> Touched | None:
        """What was touched since the last call. None if events were lost; this watch is of no use any more then."""
        touched = Touched()
        while self._complete and (events := self._read()):
            offset = 0
            while offset < len(events):
                number, mask, _, length = _EVENT.unpack_from(events, offset)
                offset += _EVENT.size
                name = os.fsdecode(events[offset : offset + length].rstrip(b"\0"))
                offset += length
                self._note(touched, number, mask, name)
        if not self._complete:
            return None
        for path, name in self._linked:
            touched.at(path).names.add(name)
        return touched

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _note(self, touched: Touched, number: int, mask: int, name: str) -> None:
        """Add one event, of the watch `number`, to `touched`."""
        if mask & _OVERFLOW:
            self._complete = False
        elif mask & _IGNORED:
            self._paths.pop(number, None)
        elif number in self._paths and name:
            here = touched.at(self._paths[number])
            here.names.add(name)
            if mask & _IS_DIRECTORY and mask & (_CREATE | _MOVED_TO):
                here.new.add(name)

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return b""
