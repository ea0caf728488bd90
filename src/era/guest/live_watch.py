"""The helper that tells what changes in the files of a live session, from inside its sandbox.

Theory of operation
===================

inotify(7) watches directories, each by its inode. So one watch is added for the directory asked for, and with
`recursive` one for each below it, of which this keeps the present paths. Directories are opened by descriptor, never
through a link (live_files.py), and watched by that descriptor.

*A directory that is new* may have got entries before its watch was added. They are told as created when it is; some may
be told twice.

*What can't be told.* The kernel's queue is bounded, and so is what is sent in a moment (MOST_EVENTS). Where either is
not enough, events are dropped and an `overflow` is sent in their place: whoever watches has to look again.

Wire format. The service sends one frame as to live_files.py: `path`, `recursive`. Back come lines of JSON: `error` (a
word) and then the end; or `type`, with `path` and for a rename `to`, as lists of names.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import stat
import struct
import time

from live_files import DIRECTORY, Parent, Refused, is_draft, portable
from workspace import STATE_FILE, read_exactly, write_all

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from typing import Any

    type Path = tuple[str, ...]

MOST_DIRECTORIES = 10_000
MOST_DEPTH = 200
MOST_EVENTS = 500
"""In one moment, of PAUSE seconds."""

PAUSE = 0.03
_EVENT = struct.Struct("iIII")
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_OVERFLOW, _IGNORED, _ISDIR = 0x4000, 0x8000, 0x40000000
_MASK = _MODIFY | _ATTRIB | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_NONBLOCK = os.O_NONBLOCK | os.O_CLOEXEC


class Watch:
    """One watch of a directory, or of a name in it."""

    def __init__(self, root: int, path: list[str], *, recursive: bool) -> None:
        """Raises Refused, OSError."""
        self.root = root
        self.recursive = recursive
        self.only: str | None = None
        self.top: Path = tuple(path)
        self.directories: dict[int, Path] = {}
        self.found: list[dict[str, Any]] = []
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.queue = self.libc.inotify_init1(_NONBLOCK)
        if self.queue < 0:
            raise Refused("many")
        if path:
            with Parent(root, path) as parent:
                if not stat.S_ISDIR(os.stat(parent.name, dir_fd=parent.fd, follow_symlinks=False).st_mode):
                    self.only, self.top, self.recursive = path[-1], tuple(path[:-1]), False
        if not self.add(self.top, tell=False):
            raise Refused("ENOENT")

    def add(self, path: Path, *, tell: bool) -> bool:
        """Watch a directory, and with `recursive` those below it. `tell`: tell of what is in them. Returns whether it
        is there. Raises Refused beyond the bounds."""
        try:
            fd = self.opened(path)
        except (OSError, Refused):
            return False
        try:
            number = self.libc.inotify_add_watch(self.queue, b"/proc/self/fd/%d" % fd, ctypes.c_uint32(_MASK))
            if number < 0:
                if ctypes.get_errno() == errno.ENOSPC:
                    raise Refused("many")
                return False
            self.directories[number] = path
            if len(self.directories) > MOST_DIRECTORIES:
                raise Refused("many")
            if not self.recursive or len(path) > MOST_DEPTH:
                return True
            with os.scandir(fd) as entries:
                names = sorted((os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError:
            return True
        finally:
            os.close(fd)
        for name, is_directory in names:
            if tell:
                self.tell("create", (*path, portable(name)))
            if is_directory:
                self.add((*path, portable(name)), tell=tell)
        return True

    def opened(self, path: Path) -> int:
        if not path:
            return os.dup(self.root)
        with Parent(self.root, list(path)) as parent:
            return os.open(parent.name, DIRECTORY, dir_fd=parent.fd)

    def forget(self, path: Path) -> None:
        """A directory is gone from where it was."""
        for number, each in list(self.directories.items()):
            if each[: len(path)] == path:
                del self.directories[number]
                self.libc.inotify_rm_watch(self.queue, number)

    def moved(self, path: Path, to: Path) -> None:
        """A directory is somewhere else now."""
        for number, each in self.directories.items():
            if each[: len(path)] == path:
                self.directories[number] = (*to, *each[len(path) :])

    def tell(self, kind: str, path: Path, to: Path | None = None) -> None:
        """Note an event, unless it is the same as the last one of its path."""
        if any(each[-1:] and is_draft(each[-1]) for each in (path, to or ())) or path == (STATE_FILE,):
            return
        if self.only is not None and self.only not in (path[-1], to[-1] if to else None):
            return
        event = {"type": kind, "path": list(path), **({} if to is None else {"to": list(to)})}
        if kind == "write" and event in self.found[-20:]:
            return
        self.found.append(event)

    def take(self) -> list[dict[str, Any]]:
        """The events of one moment. Waits for the first."""
        select.select([self.queue], [], [])
        time.sleep(PAUSE)
        self.found = []
        lost = False
        source: tuple[int, Path, int] | None = None
        for number, mask, cookie, name in self.read():
            if mask & _OVERFLOW:
                lost = True
                continue
            if mask & _IGNORED:
                self.directories.pop(number, None)
                continue
            if number not in self.directories or not name:
                continue
            path = (*self.directories[number], portable(name))
            if source is not None and not (mask & _MOVED_TO and cookie == source[0]):
                self.left(source[1], source[2])
                source = None
            if mask & _MOVED_FROM:
                source = (cookie, path, mask)
            elif mask & _MOVED_TO:
                self.arrived(source[1] if source is not None else None, path, mask)
                source = None
            elif mask & _CREATE:
                self.arrived(None, path, mask)
            elif mask & _DELETE:
                self.left(path, mask)
            elif mask & (_MODIFY | _CLOSE_WRITE):
                self.tell("write", path)
            elif mask & _ATTRIB:
                self.tell("chmod", path)
        if source is not None:
            self.left(source[1], source[2])
        if lost:
            self.add(self.top, tell=False)
        if lost or len(self.found) > MOST_EVENTS:
            self.found[MOST_EVENTS:] = []
            self.found.append({"type": "overflow"})
        return self.found

    def arrived(self, source: Path | None, path: Path, mask: int) -> None:
        if source is not None and not is_draft(source[-1]):
            self.tell("rename", source, path)
            if mask & _ISDIR and self.recursive:
                self.moved(source, path)
                if path not in self.directories.values():  # it was gone from there before it could be watched
                    self.add(path, tell=True)
            return
        self.tell("create", path)
        if mask & _ISDIR and self.recursive:
            self.add(path, tell=True)

    def left(self, path: Path, mask: int) -> None:
        self.tell("remove", path)
        if mask & _ISDIR:
            self.forget(path)

    def read(self) -> list[tuple[int, int, int, bytes]]:
        """What lies in the kernel's queue. A rename's second half comes with the first."""
        events: list[tuple[int, int, int, bytes]] = []
        while len(events) < 4 * MOST_EVENTS or (events and events[-1][1] & _MOVED_FROM):
            try:
                content = os.read(self.queue, 1 << 16)
            except BlockingIOError:
                if events and events[-1][1] & _MOVED_FROM and select.select([self.queue], [], [], PAUSE)[0]:
                    continue
                break
            at = 0
            while at < len(content):
                number, mask, cookie, size = _EVENT.unpack_from(content, at)
                at += _EVENT.size
                events.append((number, mask, cookie, content[at : at + size].rstrip(b"\0")))
                at += size
        return events


def serve(channel: int) -> None:
    """Tell what changes until the service has gone."""
    lengths = read_exactly(channel, 8)
    head = None if lengths is None else read_exactly(channel, int.from_bytes(lengths[:4], "big"))
    if head is None:
        return
    request = json.loads(head)
    try:
        watch = Watch(os.open(".", DIRECTORY), request["path"], recursive=request["recursive"])
        _say(channel, [{"type": "watching"}])
        while True:
            _say(channel, watch.take())
    except Refused as refused:
        _say(channel, [{"error": str(refused)}])
    except OSError as problem:
        _say(channel, [{"error": errno.errorcode.get(problem.errno or 0, "EIO")}])


def _say(channel: int, events: list[dict[str, Any]]) -> None:
    write_all(channel, b"".join(json.dumps(event).encode() + b"\n" for event in events))
