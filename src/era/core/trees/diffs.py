"""Differences between versions: of their JSON data, and of their trees of files; and the artifacts among the files that
a run has written: pictures, documents and tables.

An artifact's type is told from the ending of its name, by a table of our own and not the machine's, so that runs are
answered alike wherever they run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple

from era.core.models import Json, JsonObject
from era.core.trees.paths import Parts
from era.core.trees.tree_objects import own_entries

type ReadTree = Callable[[str], list[list[Any]]]
"""Reads a tree object: its entries, in the form that trees.py writes, by its digest."""


_MOST_CHANGES = 10_000
_MOST_PATH_CHARACTERS = 1 << 20
"""Of a list of changes. Data of 1 MiB may have half a million values, below keys of hundreds of KiB."""

_MOST_VALUES = 100_000
"""That are compared one by one, which takes some 0.1 s."""


class DataChange(NamedTuple):
    """A change of the value at `path`, a JSON pointer (RFC 6901). The changes of a list, applied in order to the old
    data, give the new data, as in JSON Patch (RFC 6902)."""

    path: str
    op: Literal["add", "remove", "replace"]
    old: Json = None
    new: Json = None


class FileChange(NamedTuple):
    """A changed file or link. `old_size` and `size` are in bytes, None where it didn't or doesn't exist."""

    path: str
    old_size: int | None
    size: int | None


type EntryChange = tuple[Literal["create", "write", "remove", "chmod"], str]
"""A change of a file, link or directory, and its path."""

type Kind = Literal["added", "changed", "removed"]
KINDS: tuple[Kind, ...] = ("added", "changed", "removed")


def data_changes(old: Any, new: Any) -> list[DataChange]:
    """The changes that turn `old` into `new`. Where there are very many values, or the changes would be very many, or
    their paths very long together, only those of whole values at the top; where these would be, too, a single one of
    all."""
    for depth in (_ALL_LEVELS, 1):
        with suppress(_TooMany):
            comparison = _Comparison(depth)
            comparison.compare(old, new)
            return comparison.changes
    return [DataChange("", "replace", old, new)]


_ALL_LEVELS = 1 << 30


class _TooMany(Exception):
    """A comparison would come to more than it has room for."""


class _Comparison:
    """Finds the changes between two values, those at most `depth` levels below them one by one."""

    def __init__(self, depth: int) -> None:
        self.changes: list[DataChange] = []
        self._depth = depth
        self._path: list[str] = []
        self._values_left = _MOST_VALUES
        self._characters_left = _MOST_PATH_CHARACTERS

    def compare(self, old: Any, new: Any) -> None:
        """Add the changes of the value at the path. Raises _TooMany."""
        self._values_left -= 1
        if self._values_left < 0:
            raise _TooMany
        if type(old) is not type(new) or not isinstance(old, dict | list):
            if type(old) is not type(new) or old != new:  # in Python 1 equals True and 1.0, in JSON it doesn't
                self._add("replace", old, new)
        elif len(self._path) == self._depth:
            if _text(old) != _text(new):
                self._add("replace", old, new)
        elif isinstance(old, dict):
            self._compare_objects(old, new)
        else:
            self._compare_lists(old, new)

    def _compare_objects(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        for name, value in old.items():
            self._path.append(name)
            if name in new:
                self.compare(value, new[name])
            else:
                self._add("remove", old=value)
            self._path.pop()
        for name, value in new.items():
            if name not in old:
                self._add("add", new=value, below=[name])

    def _compare_lists(self, old: Sequence[Any], new: Sequence[Any]) -> None:
        for index, (before, after) in enumerate(zip(old, new, strict=False)):
            self._path.append(str(index))
            self.compare(before, after)
            self._path.pop()
        # From the end, so that removing one doesn't shift the indexes of the next.
        for index in range(len(old) - 1, len(new) - 1, -1):
            self._add("remove", old=old[index], below=[str(index)])
        for index in range(len(old), len(new)):
            self._add("add", new=new[index], below=[str(index)])

    def _add(
        self, op: Literal["add", "remove", "replace"], old: Json = None, new: Json = None, below: Sequence[str] = ()
    ) -> None:
        """Add a change of the value at the path, or below it. The path is written only for a change: to write that of
        every value would take as long as all keys on the way to it. Raises _TooMany."""
        path = _pointer([*self._path, *below])
        self._characters_left -= len(path)
        if self._characters_left < 0 or len(self.changes) == _MOST_CHANGES:
            raise _TooMany
        self.changes.append(DataChange(path, op, old, new))


def _text(value: Any) -> str:
    """What is the same for two values that are the same in JSON: written by C, in a fraction of the time that it takes
    to compare them here."""
    return json.dumps(value, sort_keys=True, check_circular=False)


def _pointer(path: Sequence[str]) -> str:
    """A JSON pointer (RFC 6901)."""
    return "".join(f"/{name.replace('~', '~0').replace('/', '~1')}" for name in path)


def file_changes(read: ReadTree, old: str | None, new: str | None, kind: Kind) -> Iterator[FileChange]:
    """The files and links that were added, changed or removed between two trees, given by their digests, without
    packages. Only differing tree objects are read.

    Modification times don't count: writing the same content again changes nothing.
    """
    for path, was, now in _differing(read, old, new):
        if _kind_of(was, now) == kind:
            yield FileChange(path, _size(was), _size(now))


def written_files(read: ReadTree, old: str | None, new: str | None) -> Iterator[FileChange]:
    """The files of the tree `new` that were written since it was the tree `old`, in the order of their names.

    Packages don't count. Unlike in `file_changes`, writing the same content again counts. Of a directory that is gone
    nothing is read.
    """
    for path, was, now in _differing(read, old, new, removed=False):
        if now is not None and now[0] == "file":
            old_file = was if was is not None and was[0] == "file" else None
            if old_file is None or (old_file[2], old_file[5]) != (now[2], now[5]):
                yield FileChange(path, _size(old_file), now[3])


def _differing(
    read: ReadTree, old: str | None, new: str | None, prefix: str = "", *, removed: bool = True
) -> Iterator[tuple[str, list[Any] | None, list[Any] | None]]:
    """The paths at which two trees differ, in order, with both entries; None for nothing. Packages are left out, and
    without `removed` what was below a directory that is gone."""
    if old == new or (new is None and not removed):
        return
    read_here = read if prefix else partial(own_entries, read)
    before, after = _by_name(read_here, old), _by_name(read_here, new)
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was != now:
            yield from _differing(read, _tree(was), _tree(now), f"{prefix}{name}/", removed=removed)
            yield prefix + name, was, now


def _by_name(read: ReadTree, digest: str | None) -> dict[str, list[Any]]:
    return {entry[1]: entry for entry in read(digest)} if digest else {}


def _tree(entry: list[Any] | None) -> str | None:
    """The digest of a directory's list; None for anything else."""
    return entry[2] if entry is not None and entry[0] == "dir" else None


def _size(entry: list[Any] | None) -> int | None:
    """The bytes of a file, or of a link's target; None for anything else."""
    match entry:
        case "file", _, _, size, *_:
            return int(size)
        case "link", _, target, _:
            return len(target.encode("utf-8", "surrogateescape"))
    return None


def _kind_of(was: list[Any] | None, now: list[Any] | None) -> Kind | None:
    """What happened to a file or link; None for nothing."""
    had, has = _size(was), _size(now)
    if was is None or now is None or had is None or has is None:
        return "added" if has is not None else "removed" if had is not None else None
    mode = slice(4, 5 if now[0] == "file" else 4)
    return None if (was[0], was[2], was[mode]) == (now[0], now[2], now[mode]) else "changed"


def entry_changes(
    read: ReadTree, old: str | None, new: str | None, path: Parts, *, recursive: bool
) -> Iterator[EntryChange]:
    """The changes between two trees, given by their digests, of what is at a path, and of what is in that if it is a
    directory; with `recursive` of all below it. Unlike in `file_changes` directories count, too.

    Only differing tree objects are read. Modification times don't count.
    """
    before, after = _found(read, old, path), _found(read, new, path)
    return _entry_changes(read, before, after, path, sys.maxsize if recursive else 1)


def _found(read: ReadTree, root: str | None, path: Parts) -> list[Any] | None:
    """The entry at a path, None for nothing."""
    entry: list[Any] | None = ["dir", "", root, None]
    for name in path:
        entries = read(entry[2]) if entry is not None and entry[0] == "dir" and entry[2] else []
        entry = next((each for each in entries if each[1] == name), None)
    return entry


def _entry_changes(
    read: ReadTree, was: list[Any] | None, now: list[Any] | None, path: Parts, levels: int
) -> Iterator[EntryChange]:
    """The changes of an entry, and of those in so many levels of directories below it."""
    is_same_kind = was is not None and now is not None and was[0] == now[0]
    old_tree, new_tree = _tree(was), _tree(now)

    def below() -> Iterator[EntryChange]:
        if not levels or old_tree == new_tree:
            return
        read_here = read if path else partial(own_entries, read)
        before, after = _by_name(read_here, old_tree), _by_name(read_here, new_tree)
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                yield from _entry_changes(read, before.get(name), after.get(name), (*path, name), levels - 1)

    if not is_same_kind and old_tree:
        yield from below()
    where = "/".join(path)
    if was is not None and now is not None and is_same_kind:
        if was[0] != "dir" and was[2] != now[2]:
            yield "write", where
        elif path and was[0] != "link" and was[_MODE[was[0]]] != now[_MODE[now[0]]]:
            yield "chmod", where
    else:
        if was is not None:
            yield "remove", where
        if now is not None:
            yield "create", where
    if is_same_kind or not old_tree:
        yield from below()


_MODE = {"file": 4, "dir": 3}
"""The position of the permissions in an entry of a tree object."""


TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "webp": "image/webp",
    "avif": "image/avif",
    "svg": "image/svg+xml",
    "bmp": "image/bmp",
    "tif": "image/tiff",
    "tiff": "image/tiff",
    "pdf": "application/pdf",
    "html": "text/html",
    "htm": "text/html",
    "csv": "text/csv",
    "tsv": "text/tab-separated-values",
    "parquet": "application/vnd.apache.parquet",
    "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
}
"""Media types by the ending of a name, in lower case."""

MOST = 100
_MAX_PATH_CHARACTERS = 32 << 10
"""What all paths of a list may take together, as JSON: each run's record holds such a list."""


def list_artifacts(files: Iterable[FileChange]) -> JsonObject:
    """The artifacts among `files`, as a run's record holds them.

    Returns `{"files": [{"type", "path", "size"}, …], "more": N}`, where N counts those beyond the bounds; without any
    artifact, `{}`. Hidden files and those in hidden directories don't count.
    """
    artifacts: list[JsonObject] = []
    more, room = 0, _MAX_PATH_CHARACTERS
    for file in files:
        kind = _type_of(file.path)
        if kind is None:
            continue
        path = file.path.encode(errors="surrogateescape").decode(errors="replace")
        needed = len(json.dumps(path))
        if len(artifacts) == MOST or needed > room:
            more += 1
            continue
        room -= needed
        artifacts.append({"type": kind, "path": path, "size": file.size})
    return {"files": artifacts, "more": more} if artifacts or more else {}


def _type_of(path: str) -> str | None:
    """The media type of an artifact; None for a file that is none."""
    name, dot, ending = path.rpartition(".")
    if not dot or not name or name.endswith("/") or path.startswith(".") or "/." in path:
        return None
    return TYPES.get(ending.lower())
