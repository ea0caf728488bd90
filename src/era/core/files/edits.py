"""Changing a snapshot without a working directory.

Theory of operation. `Changes` says what is to be different, as a tree of its own. `apply` goes down both trees at a
time and writes anew only the tree objects on the way to a change; everything beside it keeps its digest and isn't even
read. Nothing is ever opened here but blobs, so a link is an entry like any other and can't be followed.

What is there keeps its kind: a file takes the place of a file, a link that of a link, and directories are merged. For
anything else the caller is told to remove the old one first, as it most likely isn't what it takes it for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from era.core.files.diffs import ReadTree
from era.core.files.paths import Parts
from era.core.files.trees import UPLOADED, BlobBatch, Totals, encode, raw
from era.errors import BadRequest, Conflict, NotFound

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755

type Entry = list[Any]
"""One entry of a tree object, as trees.py writes it."""


@dataclass(frozen=True, slots=True)
class PutFile:
    """Content that is in the blob store. Without a mode the file keeps the one it has."""

    digest: str
    size: int
    mtime_ns: int
    mode: int | None = None


@dataclass(frozen=True, slots=True)
class PutLink:
    target: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove what is there; a directory only if that is meant."""

    recursive: bool = False


@dataclass(slots=True)
class Changes:
    """What is to be different in a directory, by name. There where there was none, it is made."""

    entries: dict[str, PutFile | PutLink | Remove | Changes] = field(default_factory=dict)
    mode: int | None = None
    """Without one it keeps the mode it has."""

    named: bool = False
    """Somebody named the directory itself, not only something in it."""

    def at(self, parts: Parts, change: PutFile | PutLink | Remove) -> None:
        """Add a change. Raises BadRequest where it contradicts one that is there already."""
        here = self._directory(parts[:-1])
        if parts[-1] in here.entries:
            raise _twice(parts)
        here.entries[parts[-1]] = change

    def at_directory(self, parts: Parts, mode: int | None) -> None:
        """Add that a directory be there. Raises BadRequest as `at` does."""
        here = self._directory(parts)
        if here.named:
            raise _twice(parts)
        here.mode, here.named = mode, True

    def _directory(self, parts: Parts) -> Changes:
        here = self
        for depth, name in enumerate(parts, start=1):
            below = here.entries.setdefault(name, Changes())
            if not isinstance(below, Changes):
                raise _twice(parts[:depth])
            here = below
        return here


class Listed(NamedTuple):
    """A file or link of a snapshot. `path` is relative; bytes that aren't UTF-8 are lone surrogates in it."""

    path: str
    size: int
    mtime_ns: int
    is_link: bool
    uploaded: bool = False
    """Put by a client and not touched by a run since."""

    digest: str | None = None
    """SHA-256 of its content; None for a link."""


def apply(read: ReadTree, batch: BlobBatch, root: str | None, changes: Changes) -> tuple[str | None, Totals]:
    """The tree that `root` becomes, None where nothing is left, and what that adds to its totals.

    Raises Conflict where something of another kind is in the way, NotFound where there is nothing to remove. How deep
    the changes go is for the caller to bound.
    """
    entries, more = _changed(read, batch, root, changes, ())
    return batch.put(encode(entries)) if entries else None, more


def _changed(
    read: ReadTree, batch: BlobBatch, digest: str | None, changes: Changes, path: Parts
) -> tuple[list[Entry], Totals]:
    entries: dict[str, Entry] = {entry[1]: entry for entry in read(digest)} if digest else {}
    totals = Totals()
    for name, change in changes.entries.items():
        old = entries.get(name)
        here = (*path, name)
        if isinstance(change, Remove):
            totals = totals.minus(_removed(read, old, change, here))
            entries.pop(name, None)
            continue
        if isinstance(change, Changes):
            _check_kind(old, "dir", here)
            entries[name], more = _directory(read, batch, old, change, here)
            totals = totals.plus(more)
        elif isinstance(change, PutFile):
            _check_kind(old, "file", here)
            mode = change.mode if change.mode is not None else old[4] if old else FILE_MODE
            entries[name] = ["file", name, change.digest, change.size, mode, change.mtime_ns, *UPLOADED]
            totals = totals.plus(Totals(0, 0, change.size))
        else:
            _check_kind(old, "link", here)
            entries[name] = ["link", name, change.target, change.mtime_ns]
            totals = totals.plus(Totals(0, 0, len(raw(change.target))))
        if old is None:
            totals = totals.plus(Totals(1, 0 if isinstance(change, Changes) else 1))
        elif old[0] != "dir":
            totals = totals.minus(Totals(0, 0, entry_size(old)))
    return list(entries.values()), totals


def _directory(
    read: ReadTree, batch: BlobBatch, old: Entry | None, change: Changes, path: Parts
) -> tuple[Entry, Totals]:
    below, more = _changed(read, batch, old[2] if old else None, change, path)
    mode = change.mode if change.mode is not None else old[3] if old else DIRECTORY_MODE
    return ["dir", path[-1], batch.put(encode(below)), mode], more


def _removed(read: ReadTree, old: Entry | None, change: Remove, path: Parts) -> Totals:
    if old is None:
        raise no_file(path)
    if old[0] != "dir":
        return Totals(1, 1, entry_size(old))
    if not change.recursive:
        raise Conflict(
            f"'{shown(path)}' is a directory.",
            hint="Add ?recursive=true to delete it with all that is in it.",
            code="is_a_directory",
        )
    return Totals(1).plus(count(read, old[2]))


def count(read: ReadTree, digest: str | None) -> Totals:
    """What a tree holds, all the way down."""
    totals = Totals()
    for entry in read(digest) if digest else ():
        if entry[0] == "dir":
            totals = totals.plus(Totals(1)).plus(count(read, entry[2]))
        else:
            totals = totals.plus(Totals(1, 1, entry_size(entry)))
    return totals


def entry_size(entry: Entry) -> int:
    """Of a file or link."""
    size: int = entry[3] if entry[0] == "file" else len(raw(entry[2]))
    return size


def find(read: ReadTree, root: str | None, parts: Parts) -> Entry:
    """The entry of a path. Raises NotFound, and Conflict where a link is on the way: none is followed."""
    digest = root
    for depth, name in enumerate(parts, start=1):
        entry = next((entry for entry in read(digest) if entry[1] == name), None) if digest else None
        if entry is None:
            raise no_file(parts)
        if depth == len(parts):
            return entry
        if entry[0] == "link":
            raise _in_the_way(entry, parts[:depth])
        digest = entry[2] if entry[0] == "dir" else None
    raise no_file(parts)


def shown(parts: Parts) -> str:
    """A path for a sentence."""
    path = "/".join(parts).encode(errors="surrogateescape").decode(errors="replace")
    return path if len(path) <= 200 else path[:200] + "…"


def no_file(parts: Parts) -> NotFound:
    return NotFound(
        f"There is no file '{shown(parts)}'.",
        hint="GET /api/sessions/{id}/files lists those there are.",
        code="no_file",
    )


def _check_kind(old: Entry | None, kind: str, path: Parts) -> None:
    if old is not None and old[0] != kind:
        raise _in_the_way(old, path)


def _in_the_way(old: Entry, path: Parts) -> Conflict:
    kind, code = {
        "file": ("a file", "is_a_file"),
        "dir": ("a directory", "is_a_directory"),
        "link": ("a symbolic link, and those are never followed", "is_a_link"),
    }[old[0]]
    return Conflict(
        f"'{shown(path)}' is {kind}.", hint="Choose another path, or delete what is there first.", code=code
    )


def _twice(parts: Parts) -> BadRequest:
    return BadRequest(
        f"'{shown(parts)}' is there twice, or as a file and as a directory.",
        hint="Name each file and directory once.",
        code="bad_archive",
    )


def walk(read: ReadTree, digest: str | None, path: Parts = ()) -> Iterator[tuple[Parts, Entry]]:
    """Every entry of a tree with its path, directories before what is in them."""
    for entry in read(digest) if digest else ():
        here = (*path, entry[1])
        yield here, entry
        if entry[0] == "dir":
            yield from walk(read, entry[2], here)


def page(
    read: ReadTree, digest: str | None, *, after: Parts = (), prefix: Parts = (), path: Parts = ()
) -> Iterator[tuple[Parts, Entry]]:
    """The files and links of a tree that come after the path `after` and whose path begins with `prefix`, of which the
    last part may be the beginning of a name. Subtrees that have none aren't read."""
    for entry in read(digest) if digest else ():
        name = entry[1]
        if after and raw(name) < raw(after[0]):
            continue
        if prefix and not (name.startswith(prefix[0]) if len(prefix) == 1 else name == prefix[0]):
            continue
        if entry[0] != "dir":
            if (not after or raw(name) > raw(after[0])) and len(prefix) <= 1:
                yield (*path, name), entry
        else:
            further = after[1:] if after and name == after[0] else ()
            yield from page(read, entry[2], after=further, prefix=prefix[1:], path=(*path, name))


def listed(path: Parts, entry: Entry) -> Listed:
    """A file or link as lists show it."""
    match entry:
        case "file", _, digest, size, _, mtime_ns, *uploaded:
            return Listed("/".join(path), size, mtime_ns, is_link=False, uploaded=bool(uploaded), digest=digest)
        case _:
            return Listed("/".join(path), entry_size(entry), entry[3], is_link=True)
