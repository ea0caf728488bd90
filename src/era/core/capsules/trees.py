"""Trees that come from outside, checked to be ones that a working directory could have become.

Such a tree is later made on the host's file system, so nothing in it is believed: each object must be, byte for byte,
what snapshots.py would have written, each name one that a file can have, and the whole within the bounds that a working
directory has. It is read entry by entry, since a short hostile text can become large values. A tree that is part of
many others is looked at once, so a few objects can't stand for more than can be counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from era.core.capsules.validators import refused, too_large
from era.core.files.trees import Bounds, Totals, name_bytes
from era.core.models import STATE_FILE, Snapshot

MAX_TREE_BYTES = 128 << 20
_STRING = rb'("(?:[ !#-\[\]-~]|\\["\\bfnrt]|\\u[0-9a-f]{4})*")'
_NUMBER = rb"(0|-?[1-9][0-9]{0,18})"
_DIGEST = rb'"([0-9a-f]{64})"'
_ENTRY = re.compile(
    rb'\["file",%(string)s,%(digest)s,%(number)s,%(number)s,%(number)s(?:,1)?\]'
    rb'|\["link",%(string)s,%(string)s,%(number)s\]'
    rb'|\["dir",%(string)s,%(digest)s,%(number)s\]' % {b"string": _STRING, b"digest": _DIGEST, b"number": _NUMBER}
)
_MAX_TIME = 1 << 63


class Objects(NamedTuple):
    """Where objects are had from: both raise BadRequest for one that isn't there."""

    read: Callable[[str], bytes]
    size: Callable[[str], int]


class _Seen(NamedTuple):
    """What is known of a tree that was looked at. `height` is how many directories lie below one another in it."""

    totals: Totals
    height: int
    names_state: bool


@dataclass(slots=True)
class _Contents:
    """What a tree object itself says."""

    totals: Totals = field(default_factory=Totals)
    names_state: bool = False
    below: list[str] = field(default_factory=list)


class TreeCheck:
    """Checks trees. `needed` are all objects that those checked so far consist of."""

    def __init__(self, objects: Objects, bounds: Bounds) -> None:
        self._objects = objects
        self._bounds = bounds
        self._seen: dict[str, _Seen] = {}
        self.needed: set[str] = set()

    def snapshot(self, root: str) -> Snapshot:
        """The snapshot of this root. Raises BadRequest or TooLarge."""
        seen = self._look(root, 0)
        if seen.names_state:
            raise refused(f"has a file '{STATE_FILE}' among the files; that name is the state's")
        return Snapshot(root, seen.totals.files, seen.totals.total_bytes)

    def _look(self, digest: str, depth: int) -> _Seen:
        if digest in self._seen:
            seen = self._seen[digest]
            self._check(seen.totals, depth + seen.height)
            return seen
        self._check(Totals(), depth)
        contents = self._contents(digest)
        totals, height = contents.totals, 0
        for child in contents.below:
            below = self._look(child, depth + 1)
            totals = totals.plus(below.totals)
            height = max(height, below.height + 1)
            self._check(totals, depth)
        seen = self._seen[digest] = _Seen(totals, height, contents.names_state)
        return seen

    def _check(self, totals: Totals, depth: int) -> None:
        if totals.entries > self._bounds.entries:
            raise too_large(f"has a version of more than {self._bounds.entries} files and directories")
        if totals.total_bytes > self._bounds.total_bytes:
            raise too_large(f"has a version of more than {self._bounds.total_bytes} bytes of files")
        if depth > self._bounds.depth:
            raise too_large(f"has directories nested deeper than {self._bounds.depth}")

    def _contents(self, digest: str) -> _Contents:
        if self._objects.size(digest) > MAX_TREE_BYTES:
            raise too_large(f"has a directory whose list is over {MAX_TREE_BYTES} bytes")
        content = self._objects.read(digest)
        if hashlib.sha256(content).hexdigest() != digest:
            raise refused(f"is damaged: object {digest} has other content")
        self.needed.add(digest)
        found, last = _Contents(), b""
        for match in _entries(content):
            name = _name(match)
            if name <= last:
                raise refused("has a directory whose names aren't in order")
            last = name
            found.names_state = found.names_state or name == STATE_FILE.encode()
            found.totals = found.totals.plus(self._entry(match, found.below))
            self._check(found.totals, 0)
        return found

    def _entry(self, match: re.Match[bytes], below: list[str]) -> Totals:
        """What an entry adds; the digest of a directory goes to `below`."""
        _, content, size, file_mode, file_time, _, target, link_time, _, tree, tree_mode = match.groups()
        if tree is not None:
            _check_mode(tree_mode)
            below.append(tree.decode())
            return Totals(1)
        _check_time(file_time or link_time)
        if target is not None:
            return Totals(1, 1, len(_portable(target, longest=4095)))
        _check_mode(file_mode)
        digest = content.decode()
        if self._objects.size(digest) != int(size):
            raise refused(f"has a file of {int(size)} bytes, but object {digest} is not as long")
        self.needed.add(digest)
        return Totals(1, 1, int(size))


def _entries(content: bytes) -> Iterator[re.Match[bytes]]:
    """The entries of a tree object, one at a time."""
    at = 1
    while content != b"[]":
        match = _ENTRY.match(content, at)
        follows = content[match.end() : match.end() + 1] if match else b""
        if match is None or content[:1] != b"[" or follows not in (b",", b"]"):
            raise refused("has a directory that isn't listed as ERA lists one")
        yield match
        at = match.end() + 1
        if follows == b"]":
            if at != len(content):
                raise refused("has a directory with something after its list")
            return


def _name(match: re.Match[bytes]) -> bytes:
    name = _portable(match[1] or match[6] or match[9], longest=255)
    if name in (b".", b"..") or b"/" in name:
        raise refused("has a file name that no file can have")
    return name


def _portable(quoted: bytes, longest: int) -> bytes:
    """The bytes of a name or of a link's target. There is but one way to write each."""
    text = json.loads(quoted)
    try:
        name = name_bytes(text)
    except UnicodeEncodeError:
        name = b""
    if not name or len(name) > longest or b"\0" in name:
        raise refused("has a file name or link that no file can have")
    if name.decode("utf-8", "surrogateescape") != text or json.dumps(text).encode() != quoted:
        raise refused("has a file name or link that isn't written as ERA writes it")
    return name


def _check_mode(mode: bytes) -> None:
    if not 0 <= int(mode) <= 0o777:
        raise refused("has a file with a mode beyond 0777")


def _check_time(time: bytes) -> None:
    if not -_MAX_TIME <= int(time) < _MAX_TIME:
        raise refused("has a file of a time that no file can have")
