"""Tree objects as text: JSON that lists the entries of a directory, sorted by name (snapshots.py, edits.py).

A list may have hundreds of thousands of entries, and nothing else in the process goes on while JSON is written or read.
So that is done some entries at a time.

Installed packages are in a session's tree, kept with its files, but none of them. What programs install, with pip or
npm, has to last as files do: with the same commit, the same versions, rollbacks, copies, capsules and limits. So it is
part of the tree. But nobody wants to see it in a list of files, and nobody should have to move it with them. So these
entries of a root are packages:

  - PACKAGES, the directory that a sandbox has as its Python prefix. It lies beside the working directory.
  - `node_modules` in the working directory, if npm has made it: programs expect it there. One that a client has put is
    made of files like any other; npm's own list of what it has installed tells the two apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import batched
from typing import Any

from era.core.trees.blob_store import BlobStore

MAX_LIST_BYTES = 128 << 20
"""Of a tree object, which is in memory several times while it is made. There is room in it for 400,000 files with names
of 200 letters, and for 80,000 with names of 255 bytes that aren't UTF-8."""

_SLICE_ENTRIES, _SLICE_BYTES = 1000, 256 << 10

_NEXT_ENTRY = re.compile(rb'\],\["(?:file|link|dir)",')
"""Where an entry ends and another follows. No name can look like that: in it, a backslash is before each quote."""


_AHEAD = 16
"""How many tree objects are fetched together, where blobs come from elsewhere. Until they are read, nobody knows how
long they are."""


class TreeNotSmall(Exception):
    """There is more to look at, to read or to write than a small tree may have."""


class ListTooLong(Exception):
    """A tree object would be over MAX_LIST_BYTES."""

    def __init__(self) -> None:
        super().__init__(f"a directory whose list of names takes over {MAX_LIST_BYTES} bytes")


def encode(entries: list[Any]) -> bytes:
    """The tree object of these entries, in its canonical form: sorted by name, compact. Sorts `entries` in place.

    Raises ListTooLong.
    """
    entries.sort(key=lambda entry: name_bytes(entry[1]))
    slices, size = [], 1
    for start in range(0, len(entries), _SLICE_ENTRIES):
        some = json.dumps(entries[start : start + _SLICE_ENTRIES], separators=(",", ":"))
        slices.append(some[1:-1].encode())
        size += len(slices[-1]) + 1
        if size > MAX_LIST_BYTES:
            raise ListTooLong
    return b"".join((b"[", b",".join(slices), b"]"))


def decode(content: bytes) -> list[Any]:
    """The entries of a tree object."""
    entries: list[Any] = []
    start = 1
    while len(content) - start > _SLICE_BYTES and (found := _NEXT_ENTRY.search(content, start + _SLICE_BYTES)):
        end = found.start() + 1
        entries += json.loads(b"[%b]" % content[start:end])
        start = end + 1
    entries += json.loads(b"[%b" % content[start:] if entries else content)
    return entries


def name_bytes(name: str) -> bytes:
    """The bytes of a name in the form that tree objects use."""
    return name.encode("utf-8", "surrogateescape")


PACKAGES = "/packages"
"""The name of the entry in a root's tree object. No file can have it."""

NODE_MODULES = "node_modules"
NPM_LIST = ".package-lock.json"

type _ReadTree = Callable[[str], list[list[Any]]]


def on_disk(name: str) -> str:
    """The path of an entry, relative to the directory that has it."""
    return "../packages" if name == PACKAGES else name


def is_packages(read: _ReadTree, entry: list[Any]) -> bool:
    """Whether an entry of a root is packages."""
    kind, name, content, *_ = entry
    if name == PACKAGES:
        return True
    return kind == "dir" and name == NODE_MODULES and any(map(_is_npm_list, read(content)))


def own_entries(read: _ReadTree, root: str | None) -> list[list[Any]]:
    """The entries of a root that aren't packages."""
    return [entry for entry in read(root) if not is_packages(read, entry)] if root else []


def _is_npm_list(entry: list[Any]) -> bool:
    kind, name, *_ = entry
    return kind == "file" and name == NPM_LIST and len(entry) == 6  # a client's would have a seventh element


class Holdings:
    """What some snapshots hold, added one by one."""

    def __init__(self, blobs: BlobStore, tree_object: Callable[[str], bytes], most: int | None = None) -> None:
        """`tree_object` reads a tree object. `most` is how many objects there may be."""
        self.sizes: dict[str, int] = {}
        """Of all tree objects and files in bytes, by digest. What the last snapshot has added is at the end."""

        self._blobs = blobs
        self._tree_object = tree_object
        self._most = most
        # `sizes` alone couldn't tell which trees were visited: a file may have the very content of a tree object.
        self._visited: set[str] = set()

    def add(self, root: str) -> None:
        """Add a snapshot: level by level, so that the lists of many directories are fetched together. Raises OSError,
        and TreeNotSmall."""
        level = [] if root in self._visited else [root]
        while level:
            self._visited.update(level)
            if self._most is not None and len(self.sizes) + len(level) > self._most:
                raise TreeNotSmall
            below: dict[str, None] = {}
            for digest in self.ahead(level):
                content = self._tree_object(digest)
                self.sizes[digest] = len(content)
                for kind, _, *rest in decode(content):
                    if kind == "file":
                        self.sizes[rest[0]] = rest[1]
                    elif kind == "dir":
                        below[rest[0]] = None
            level = [digest for digest in below if digest not in self._visited]

    def ahead(self, digests: Iterable[str]) -> Iterator[str]:
        """The same tree objects, which are about to be read, fetched some at a time. Raises OSError."""
        for some in batched(digests, _AHEAD):
            with suppress(FileNotFoundError):  # whoever reads it is told; it may not be needed
                self._blobs.expect(some)
            yield from some
