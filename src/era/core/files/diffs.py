"""What changed from one version to the next, in data and in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from era.core.models import Json

type ReadTree = Callable[[str], list[list[Any]]]
"""The entries of a tree object by its digest, as trees.py writes them."""


class DataChange(NamedTuple):
    """One change at `path`, a JSON pointer. Done in order on the old data, all of them give the new."""

    path: str
    op: Literal["add", "remove", "replace"]
    old: Json = None
    new: Json = None


class FileChange(NamedTuple):
    """A file or link of which something changed. `old_size` and `size` are None where there was or is none."""

    path: str
    old_size: int | None
    size: int | None


@dataclass(frozen=True, slots=True)
class FileChanges:
    added: list[FileChange] = field(default_factory=list)
    changed: list[FileChange] = field(default_factory=list)
    removed: list[FileChange] = field(default_factory=list)


def data_changes(old: Any, new: Any, path: str = "") -> Iterator[DataChange]:
    """How `old` becomes `new`."""
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
        # From the end, so that no index shifts.
        for index in range(len(old) - 1, len(new) - 1, -1):
            yield DataChange(f"{path}/{index}", "remove", old=old[index])
        for index in range(len(old), len(new)):
            yield DataChange(f"{path}/{index}", "add", new=new[index])
    elif type(old) is not type(new) or old != new:  # To Python 1 equals true and 1.0, to JSON it doesn't.
        yield DataChange(path, "replace", old, new)


def file_changes(read: ReadTree, old: str | None, new: str | None) -> FileChanges:
    """What changed between two trees, by their digests. Only tree objects that differ are read.

    A file's times don't count: who writes the same content again has changed nothing.
    """
    found = FileChanges()
    _compare(read, old, new, "", found)
    return found


def written_files(read: ReadTree, old: str | None, new: str | None, prefix: str = "") -> Iterator[FileChange]:
    """The files of a tree that were written since it was another one, in the order of their names. Unlike above, who
    writes the same content again has written, too."""
    if new is None or old == new:
        return
    before = {entry[1]: entry for entry in read(old)} if old else {}
    for entry in read(new):
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


def _compare(read: ReadTree, old: str | None, new: str | None, prefix: str, found: FileChanges) -> None:
    if old == new:
        return
    before = _entries(read, old)
    after = _entries(read, new)
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name, _NOTHING), after.get(name, _NOTHING)
        path = prefix + name
        _compare(read, was.tree, now.tree, f"{path}/", found)
        change = FileChange(path, was.size, now.size)
        if was.size is None and now.size is not None:
            found.added.append(change)
        elif was.size is not None and now.size is None:
            found.removed.append(change)
        elif was.content != now.content:
            found.changed.append(change)


class _Entry(NamedTuple):
    tree: str | None = None
    size: int | None = None
    content: tuple[Any, ...] = ()


_NOTHING = _Entry()


def _entries(read: ReadTree, digest: str | None) -> Mapping[str, _Entry]:
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
