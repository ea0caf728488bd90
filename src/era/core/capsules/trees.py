"""Validates trees of imported capsules: each must be one that a snapshot of a working directory could have.

Such a tree is later restored on the host's file system, so nothing in it is trusted. Each tree object must be, byte for
byte, what core/trees/trees.py would have written; each name one that a file can have; the whole within the bounds of a
working directory. Objects are parsed entry by entry, since a short hostile text can become large values. A tree that is
part of many others is checked only once, so a few objects can't stand for more than can be counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from era.core.capsules.manifest import bad_capsule, too_large
from era.core.models import STATE_FILE, Snapshot
from era.core.totals import Bounds, Totals, link_totals
from era.core.trees.tree_objects import MAX_LIST_BYTES, PACKAGES, decode, is_packages, name_bytes

_STRING = rb'("(?:[ !#-\[\]-~]|\\["\\bfnrt]|\\u[0-9a-f]{4})*")'
_NUMBER = rb"(0|-?[1-9][0-9]{0,18})"
_TIME = rb"(0|-?[1-9][0-9]{0,27})"
_DIGEST = rb'"([0-9a-f]{64})"'
_ENTRY = re.compile(
    rb'\["file",%(string)s,%(digest)s,%(number)s,%(number)s,%(time)s(?:,1)?\]'
    rb'|\["link",%(string)s,%(string)s,%(time)s\]'
    rb'|\["dir",%(string)s,%(digest)s,%(number)s\]'
    % {b"string": _STRING, b"digest": _DIGEST, b"number": _NUMBER, b"time": _TIME}
)
_MAX_TIME = (1 << 63) * 10**9
"""In nanoseconds: the kernel has 64 bits for the seconds of a file's time. ext4 stores those up to 2446."""


class Objects(NamedTuple):
    """Access to the capsule's objects by digest. Both functions raise BadRequest for one that isn't there."""

    read: Callable[[str], bytes]
    size: Callable[[str], int]


class _CheckedTree(NamedTuple):
    """What matters of a checked tree."""

    totals: Totals
    height: int
    """How deep directories are nested in it."""

    names_state: bool
    """Whether it has an entry with the state file's name, which the root must not have."""

    names_packages: bool
    """Whether it has the entry of packages, which only the root may have."""


@dataclass(slots=True)
class _Contents:
    """A parsed tree object: totals without those of subdirectories, whose digests are in `below`."""

    totals: Totals = field(default_factory=Totals)
    names_state: bool = False
    names_packages: bool = False
    below: list[str] = field(default_factory=list)


class TreeCheck:
    """Checks trees. `needed` are the digests of all objects that the trees checked so far consist of."""

    def __init__(self, objects: Objects, bounds: Bounds) -> None:
        self._objects = objects
        self._bounds = bounds
        self._checked: dict[str, _CheckedTree] = {}
        self._snapshots: dict[str, Snapshot] = {}
        """By root: a capsule may have any number of versions of one tree."""

        self.needed: set[str] = set()

    def snapshot(self, root: str) -> Snapshot:
        """Check the tree with this root, and return its snapshot. Raises BadRequest or TooLarge."""
        if root in self._snapshots:
            return self._snapshots[root]
        checked = self._check_tree(root, 0)
        if checked.names_state:
            raise bad_capsule(f"has a file '{STATE_FILE}' among the files; that name is the state's")
        totals = checked.totals
        for entry in self._read_tree(root):
            if is_packages(self._read_tree, entry):
                totals = totals.minus(self._checked[entry[2]].totals)
        snapshot = self._snapshots[root] = Snapshot(root, totals.files, totals.total_bytes)
        return snapshot

    def _read_tree(self, digest: str) -> list[list[Any]]:
        """The entries of a tree that was checked."""
        return decode(self._objects.read(digest))

    def _check_tree(self, digest: str, depth: int) -> _CheckedTree:
        """Check a tree that is `depth` directories below a root."""
        if digest in self._checked:
            checked = self._checked[digest]
            self._check_bounds(checked.totals, depth + checked.height)
            _check_place(checked, depth)
            return checked
        self._check_bounds(Totals(), depth)
        contents = self._contents(digest)
        totals, height = contents.totals, 0
        for child in contents.below:
            below = self._check_tree(child, depth + 1)
            totals = totals.plus(below.totals)
            height = max(height, below.height + 1)
            self._check_bounds(totals, depth)
        checked = _CheckedTree(totals, height, contents.names_state, contents.names_packages)
        _check_place(checked, depth)
        self._checked[digest] = checked
        return checked

    def _check_bounds(self, totals: Totals, depth: int) -> None:
        """Raises TooLarge."""
        if totals.entries > self._bounds.entries:
            raise too_large(f"has a version of more than {self._bounds.entries} files and directories")
        if totals.total_bytes > self._bounds.total_bytes:
            raise too_large(f"has a version of more than {self._bounds.total_bytes} bytes of files")
        if depth > self._bounds.depth:
            raise too_large(f"has directories nested deeper than {self._bounds.depth}")

    def _contents(self, digest: str) -> _Contents:
        """Parse and check a tree object, without what is below it."""
        if self._objects.size(digest) > MAX_LIST_BYTES:
            raise too_large(f"has a directory whose list is over {MAX_LIST_BYTES} bytes")
        content = self._objects.read(digest)
        if hashlib.sha256(content).hexdigest() != digest:
            raise bad_capsule(f"is damaged: object {digest} has other content")
        self.needed.add(digest)
        contents, last = _Contents(), b""
        for match in _entries(content):
            name = _name(match)
            if name <= last:
                raise bad_capsule("has a directory whose names aren't in order")
            last = name
            contents.names_state = contents.names_state or name == STATE_FILE.encode()
            contents.names_packages = contents.names_packages or name == PACKAGES.encode()
            contents.totals = contents.totals.plus(self._entry(match, contents.below))
            self._check_bounds(contents.totals, 0)
        return contents

    def _entry(self, match: re.Match[bytes], below: list[str]) -> Totals:
        """Check an entry, and return its share of the totals. The digest of a directory is appended to `below`."""
        _, content, size, file_mode, file_time, _, target, link_time, _, tree, tree_mode = match.groups()
        if tree is not None:
            _check_mode(tree_mode)
            below.append(tree.decode())
            return Totals(1)
        _check_time(file_time or link_time)
        if target is not None:
            return link_totals(len(_portable(target, longest=4095)))
        _check_mode(file_mode)
        digest = content.decode()
        if self._objects.size(digest) != int(size):
            raise bad_capsule(f"has a file of {int(size)} bytes, but object {digest} is not as long")
        self.needed.add(digest)
        return Totals(1, 1, int(size))


def _entries(content: bytes) -> Iterator[re.Match[bytes]]:
    """The entries of a tree object, as matches of _ENTRY. Raises BadRequest."""
    at = 1
    while content != b"[]":
        match = _ENTRY.match(content, at)
        follows = content[match.end() : match.end() + 1] if match else b""
        if match is None or content[:1] != b"[" or follows not in (b",", b"]"):
            raise bad_capsule("has a directory that isn't listed as ERA lists one")
        yield match
        at = match.end() + 1
        if follows == b"]":
            if at != len(content):
                raise bad_capsule("has a directory with something after its list")
            return


def _check_place(tree: _CheckedTree, depth: int) -> None:
    """Raises BadRequest for packages elsewhere than in a root."""
    if depth and tree.names_packages:
        raise bad_capsule("has a file name that no file can have")


def _name(match: re.Match[bytes]) -> bytes:
    """The name of an entry. Raises BadRequest for one that no file can have."""
    name = _portable(match[1] or match[6] or match[9], longest=255)
    if match[9] and name == PACKAGES.encode():
        return name
    if name in (b".", b"..") or b"/" in name:
        raise bad_capsule("has a file name that no file can have")
    return name


def _portable(quoted: bytes, longest: int) -> bytes:
    """The bytes of a JSON string, a name or a link's target. Raises BadRequest unless it is in canonical form."""
    text = json.loads(quoted)
    try:
        name = name_bytes(text)
    except UnicodeEncodeError:
        name = b""
    if not name or len(name) > longest or b"\0" in name:
        raise bad_capsule("has a file name or link that no file can have")
    if name.decode("utf-8", "surrogateescape") != text or json.dumps(text).encode() != quoted:
        raise bad_capsule("has a file name or link that isn't written as ERA writes it")
    return name


def _check_mode(mode: bytes) -> None:
    if not 0 <= int(mode) <= 0o777:
        raise bad_capsule("has a file with a mode beyond 0777")


def _check_time(time: bytes) -> None:
    if not -_MAX_TIME <= int(time) < _MAX_TIME:
        raise bad_capsule("has a file of a time that no file can have")
