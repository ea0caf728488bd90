"""What a disk may hold after a power cut, from a record of what a process did to it.

Theory of operation. `record` runs a process under strace and reads from its trace every call that changes files below a
directory, in order, and every call that makes such changes durable. `Disk` carries these out on a model in which a
change is at first only pending: a write to a file until that file is synced, a new, renamed or removed name until the
directory that has it is synced. POSIX promises no more than that, whatever a given file system adds.

`Disk.rebuild` then makes a real directory out of what could be on the disk if the power failed now: what is durable,
and any of what is pending. Changes of one name keep their order; apart from that, any may have got there and others
not, and of a write it may have been a part.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

TRACED = (
    "openat,open,creat,close,write,pwrite64,lseek,ftruncate,fsync,fdatasync,syncfs,sync,"
    "rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,rmdir"
)
SECTOR = 512

type Kind = Literal["make", "write", "truncate", "sync", "sync all", "rename", "link", "unlink", "mkdir", "said"]


@dataclass(frozen=True)
class Event:
    """One change. Paths are relative to the recorded directory; the path of `said` is the line that was printed."""

    kind: Kind
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = field(default=b"", repr=False)


def record(directory: Path, command: Sequence[str], trace: Path) -> list[Event]:
    """Run `command`, which must succeed; returns its changes below `directory` in order."""
    strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-xx", "-s", str(1 << 26), "-o", str(trace), "-e", TRACED]
    done = subprocess.run([*strace, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(_events(os.fspath(directory.resolve()), trace))


_CALL = re.compile(rb"(\w+)\((.*)\)\s+= (-?\d+)")
_STRING = re.compile(rb'"((?:\\x[0-9a-f]{2})*)"')


def _calls(trace: Path) -> Iterator[tuple[str, bytes, int]]:
    """Name, arguments and result of each call, in the order in which they ended."""
    halves: dict[bytes, bytes] = {}
    with trace.open("rb") as lines:
        for line in lines:
            pid, _, text = line.rstrip().partition(b" ")
            text = text.lstrip()
            if text.endswith(b"<unfinished ...>"):
                halves[pid] = text.removesuffix(b"<unfinished ...>")
                continue
            if text.startswith(b"<... "):
                text = halves.pop(pid) + text.partition(b"resumed>")[2]
            if found := _CALL.match(text):
                yield found[1].decode(), found[2], int(found[3])


def _events(root: str, trace: Path) -> Iterator[Event]:
    """The changes below `root` that a trace has."""
    names: dict[int, str] = {}
    offsets: dict[int, int] = {}
    for call, arguments, result in _calls(trace):
        if result < 0:
            continue
        strings = [_unhex(found[1]) for found in _STRING.finditer(arguments)]
        numbers = [part.strip() for part in _STRING.sub(b"", arguments).split(b",")]
        paths = [path[len(root) + 1 :] for path in map(os.fsdecode, strings) if f"{path}/".startswith(f"{root}/")]
        fd = int(numbers[0]) if numbers and numbers[0].isdigit() else -1
        match call:
            case "openat" | "open" | "creat" if paths:
                names[result], offsets[result] = paths[0], 0
                if b"O_CREAT" in arguments or call == "creat":
                    yield Event("make", paths[0])
                if b"O_TRUNC" in arguments or call == "creat":
                    yield Event("truncate", paths[0], offset=0)
                assert b"O_APPEND" not in arguments, "not modelled"
            case "close":
                names.pop(fd, None)
            case "write" if fd == 1:
                for line in strings[0].decode().splitlines():
                    yield Event("said", line)
            case "write" if fd in names:
                yield Event("write", names[fd], offset=offsets[fd], data=strings[0][:result])
                offsets[fd] += result
            case "pwrite64" if fd in names:
                yield Event("write", names[fd], offset=int(numbers[-1]), data=strings[0][:result])
            case "lseek" if fd in names:
                offsets[fd] = result
            case "ftruncate" if fd in names:
                yield Event("truncate", names[fd], offset=int(numbers[1]))
            case "fsync" | "fdatasync" if fd in names:
                yield Event("sync", names[fd])
            case "syncfs" if fd in names:
                yield Event("sync all", names[fd])
            case "sync":
                yield Event("sync all", "")
            case "rename" | "renameat" | "renameat2" if paths:
                yield Event("rename", paths[0], paths[1])
            case "link" | "linkat" if paths:
                yield Event("link", paths[0], paths[1])
            case "unlink" | "unlinkat" | "rmdir" if paths:
                yield Event("unlink", paths[0])
            case "mkdir" | "mkdirat" if paths:
                yield Event("mkdir", paths[0])


def _unhex(text: bytes) -> bytes:
    return bytes.fromhex(text.replace(b"\\x", b"").decode())


@dataclass
class _File:
    """A file's content: what is durable, and the writes after it."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Writes by offset; None cuts or extends to that size."""

    def sync(self) -> None:
        self.durable = self.content(lambda _: None)
        self.pending.clear()

    def content(self, how_much: Callable[[int], int | None]) -> bytes:
        """The content, with `how_much(size)` bytes of each pending write of that size; None means all."""
        content = bytearray(self.durable)
        for offset, data in self.pending:
            if data is None:
                if how_much(0) is None:
                    content = content[:offset].ljust(offset, b"\0")
                continue
            part = data[: how_much(len(data))]
            if part:
                content = content.ljust(offset, b"\0")
                content[offset : offset + len(part)] = part
        return bytes(content)


@dataclass
class _Directory:
    """A directory's names: what is durable, what programs see, and the changes between the two."""

    durable: dict[str, _File | _Directory] = field(default_factory=dict)
    live: dict[str, _File | _Directory] = field(default_factory=dict)
    pending: list[tuple[str, _File | _Directory | None]] = field(default_factory=list)

    def change(self, name: str, to: _File | _Directory | None) -> None:
        self.pending.append((name, to))
        _set(self.live, name, to)

    def sync(self) -> None:
        self.durable = dict(self.live)
        self.pending.clear()


def _set(names: dict[str, _File | _Directory], name: str, to: _File | _Directory | None) -> None:
    if to is None:
        names.pop(name, None)
    else:
        names[name] = to


class Disk:
    """A directory on a disk that may lose power; empty and durable at first."""

    def __init__(self) -> None:
        self._root = _Directory()
        self._unlinked: list[_File] = []

    def carry_out(self, event: Event) -> None:
        """Make a recorded change."""
        parent, name = self._parent(event.path)
        match event.kind:
            case "make":
                if name not in parent.live:
                    parent.change(name, _File())
            case "write":
                self._file(event.path).pending.append((event.offset, event.data))
            case "truncate":
                self._file(event.path).pending.append((event.offset, None))
            case "sync":
                self._find(event.path).sync()
            case "sync all":
                for node in list(self._all(self._root)):
                    node.sync()
            case "rename":
                node = parent.live[name]
                other, new = self._parent(event.other)
                other.change(new, node)
                parent.change(name, None)
            case "link":
                other, new = self._parent(event.other)
                other.change(new, parent.live[name])
            case "unlink":
                parent.change(name, None)
            case "mkdir":
                parent.change(name, _Directory())

    def rebuild(self, target: Path, variant: Literal["synced", "all", "some"], chance: random.Random) -> None:
        """Make `target` what the disk may hold if the power failed now: only what is durable, all, or a random part."""
        share = chance.choice([0.1, 0.5, 0.9])

        def how_much(size: int) -> int | None:
            if variant != "some":
                return 0 if variant == "synced" and size else None if variant == "all" else 0
            if chance.random() > share:
                return 0
            if size > SECTOR and chance.random() < 0.3:
                return chance.randrange(0, size, SECTOR)
            return None

        def names(node: _Directory) -> dict[str, _File | _Directory]:
            entries = dict(node.durable)
            if variant == "all":
                return node.live
            if variant == "some":
                lost: set[str] = set()  # The first change of a name that is lost takes the later ones with it.
                for name, to in node.pending:
                    if name not in lost and chance.random() < share:
                        _set(entries, name, to)
                    else:
                        lost.add(name)
            return entries

        def make(node: _Directory, path: Path) -> None:
            path.mkdir()
            for name, child in names(node).items():
                if isinstance(child, _Directory):
                    make(child, path / name)
                else:
                    (path / name).write_bytes(child.content(how_much))

        make(self._root, target)

    def _parent(self, path: str) -> tuple[_Directory, str]:
        *above, name = path.split("/")
        node: _File | _Directory = self._root
        for part in above:
            assert isinstance(node, _Directory)
            node = node.live[part]
        assert isinstance(node, _Directory)
        return node, name

    def _find(self, path: str) -> _File | _Directory:
        if not path:
            return self._root
        parent, name = self._parent(path)
        return parent.live[name]

    def _file(self, path: str) -> _File:
        found = self._find(path)
        assert isinstance(found, _File)
        return found

    def _all(self, node: _Directory) -> Iterator[_File | _Directory]:
        yield node
        for child in itertools.chain(node.live.values(), node.durable.values()):
            if isinstance(child, _Directory):
                yield from self._all(child)
            else:
                yield child


def workload(directory: Path, count: int = 16, *careless: str) -> list[str]:
    """The command that makes `count` commits below `directory`; see workload.py for `careless`."""
    return [sys.executable, "-m", "tests.hostile.workload", os.fspath(directory), str(count), *careless]
