"""Differences between versions: of their JSON data, and of their trees of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from era.core.files.packages import own_entries
from era.core.models import Json

type ReadTree = Callable[[str], list[list[Any]]]
"""Reads a tree object: its entries, in the form that trees.py writes, by its digest."""


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


@dataclass(frozen=True, slots=True)
class FileChanges:
    added: list[FileChange] = field(default_factory=list)
    changed: list[FileChange] = field(default_factory=list)
    removed: list[FileChange] = field(default_factory=list)


def data_changes(old: Any, new: Any, path: str = "") -> Iterator[DataChange]:
    """The changes that turn `old` into `new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name, value in old.items():
            below = f"{path}/{name.replace('~', '~0').replace('/', '~1')}"
            if name not in new:
                yield DataChange(below, "remove", old=value)
            else:
                yield from data_changes(value, new[name], below)
        for name, value in new.items():
            if name not in old:
                yield DataChange(f"{path}/{name.replace('~', '~0').replace('/', '~1')}", "add", new=value)
    elif isinstance(old, list) and isinstance(new, list):
        for index, (before, after) in enumerate(zip(old, new, strict=False)):
            yield from data_changes(before, after, f"{path}/{index}")
        # From the end, so that removing one doesn't shift the indexes of the next.
        for index in range(len(old) - 1, len(new) - 1, -1):
            yield DataChange(f"{path}/{index}", "remove", old=old[index])
        for index in range(len(old), len(new)):
            yield DataChange(f"{path}/{index}", "add", new=new[index])
    elif type(old) is not type(new) or old != new:  # in Python 1 equals True and 1.0, in JSON it doesn't
        yield DataChange(path, "replace", old, new)


def file_changes(read: ReadTree, old: str | None, new: str | None) -> FileChanges:
    """The files and links that differ between two trees, given by their digests, without packages. Only differing tree
    objects are read.

    Modification times don't count: writing the same content again changes nothing.
    """
    changes = FileChanges()
    _compare(read, old, new, "", changes)
    return changes


def written_files(read: ReadTree, old: str | None, new: str | None, prefix: str = "") -> Iterator[FileChange]:
    """The files of the tree `new` that were written since it was the tree `old`, in the order of their names.

    Packages don't count. Unlike in `file_changes`, writing the same content again counts. `prefix` is put before the
    paths.
    """
    if new is None or old == new:
        return
    # Only at the top there are packages.
    read_here = read if prefix else partial(own_entries, read)
    before = {entry[1]: entry for entry in read_here(old)} if old else {}
    for entry in read_here(new):
        kind, name, content, *rest = entry
        was = before.get(name)
        if was is not None and was[0] != kind:
            was = None
        if kind == "dir":
            yield from written_files(read, was[2] if was else None, content, f"{prefix}{name}/")
        elif kind == "file":
            size, _, mtime_ns, *_ = rest
            if was is None or (was[2], was[5]) != (content, mtime_ns):
                yield FileChange(prefix + name, was[3] if was else None, size)


def _compare(read: ReadTree, old: str | None, new: str | None, prefix: str, changes: FileChanges) -> None:
    """Add the differences of two trees to `changes`."""
    if old == new:
        return
    read_here = read if prefix else partial(own_entries, read)
    before = _entries(read_here, old)
    after = _entries(read_here, new)
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name, _NOTHING), after.get(name, _NOTHING)
        path = prefix + name
        _compare(read, was.tree, now.tree, f"{path}/", changes)
        change = FileChange(path, was.size, now.size)
        if was.size is None and now.size is not None:
            changes.added.append(change)
        elif was.size is not None and now.size is None:
            changes.removed.append(change)
        elif was.content != now.content:
            changes.changed.append(change)


class _Entry(NamedTuple):
    """What matters of an entry in a comparison: a directory has a `tree`, a file or link `size` and `content`."""

    tree: str | None = None
    size: int | None = None
    content: tuple[Any, ...] = ()


_NOTHING = _Entry()


def _entries(read: ReadTree, digest: str | None) -> Mapping[str, _Entry]:
    """The entries of a tree by name."""
    if digest is None:
        return {}
    entries = {}
    for kind, name, *rest in read(digest):
        match kind, rest:
            case "file", (content, size, mode, *_):
                entries[name] = _Entry(size=size, content=("file", content, mode))
            case "link", (target, _):
                size = len(target.encode("utf-8", "surrogateescape"))
                entries[name] = _Entry(size=size, content=("link", target))
            case "dir", (content, _):
                entries[name] = _Entry(tree=content)
    return entries
