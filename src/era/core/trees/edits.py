"""Edits and queries of snapshots, without a working directory.

Theory of operation. `Changes` is the set of edits, as a tree of its own. `apply` walks both trees together and writes
new tree objects only on the way to a change; everything beside it keeps its digest and isn't even read. Nothing but
blobs is ever opened here, so a link is an entry like any other and can't be followed.

Entries keep their kind: a file may replace a file, a link a link, and directories are merged. For anything else the
caller gets an error and must remove the old entry first, since most likely it isn't what the caller takes it for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from era.core.totals import Totals, link_totals
from era.core.trees.blob_store import BlobBatch
from era.core.trees.diffs import ReadTree
from era.core.trees.paths import Parts
from era.core.trees.tree_objects import encode, is_packages, name_bytes, own_entries
from era.core.trees.trees import UPLOADED
from era.errors import BadRequest, Conflict, NotFound

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755

type Entry = list[Any]
"""An entry of a tree object, in the form that trees.py writes:

    ["file", name, digest, size, mode, mtime_ns], followed by 1 if a client has put it
    ["link", name, target, mtime_ns]
    ["dir", name, digest, mode]
"""


@dataclass(frozen=True, slots=True)
class PutFile:
    """Put a file whose content is in the blob store. Without a `mode` it keeps the one it has, or gets FILE_MODE."""

    digest: str
    size: int
    mtime_ns: int
    mode: int | None = None
    uploaded: bool = True
    """Whether its entry says that a client has put it."""


@dataclass(frozen=True, slots=True)
class PutLink:
    """Put a symbolic link."""

    target: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Place:
    """Put an entry of a tree object as it is, under the name that the edit has: a directory with all that is in it."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove an entry; a directory only if `recursive`."""

    recursive: bool = False


@dataclass(slots=True)
class Changes:
    """The edits of a directory, by name. A directory that doesn't exist is made."""

    entries: dict[str, PutFile | PutLink | Place | Remove | Changes] = field(default_factory=dict)
    mode: int | None = None
    """Without one the directory keeps the mode it has, or gets DIRECTORY_MODE."""

    named: bool = False
    """Whether the directory itself was added, not only something in it."""

    def add(self, parts: Parts, change: PutFile | PutLink | Place | Remove) -> int:
        """Add an edit at a path. Returns how many entries there are more by that, directories on the way included.
        Raises BadRequest where it contradicts an earlier one."""
        here, made = self._directory(parts[:-1])
        if parts[-1] in here.entries:
            raise _duplicate(parts)
        here.entries[parts[-1]] = change
        return made + 1

    def add_directory(self, parts: Parts, mode: int | None) -> int:
        """Add a directory. Returns and raises as `add` does."""
        here, made = self._directory(parts)
        if here.named:
            raise _duplicate(parts)
        here.mode, here.named = mode, True
        return made

    def put_bytes(self) -> int:
        """The sizes of all files that are put, together."""
        total = 0
        for change in self.entries.values():
            if isinstance(change, PutFile):
                total += change.size
            elif isinstance(change, Changes):
                total += change.put_bytes()
        return total

    def count(self) -> int:
        """How many entries are edited, directories on the way included."""
        return len(self.entries) + sum(each.count() for each in self.entries.values() if isinstance(each, Changes))

    def _directory(self, parts: Parts) -> tuple[Changes, int]:
        """The edits of the directory at this path, and how many directories had none before. Raises BadRequest where
        the path leads through no directory."""
        here, made = self, 0
        for depth, name in enumerate(parts, start=1):
            below = here.entries.get(name)
            if below is None:
                below = here.entries[name] = Changes()
                made += 1
            if not isinstance(below, Changes):
                raise _duplicate(parts[:depth])
            here = below
        return here, made


type Kind = Literal["file", "link", "dir"]


class FileEntry(NamedTuple):
    """A file, link or directory in a list of files. `path` is relative; bytes that aren't UTF-8 are lone surrogates in
    it."""

    path: str
    kind: Kind
    size: int = 0
    """In bytes; of a link that of its target's path, of a directory 0."""

    mtime_ns: int | None = None
    """None for a directory: trees don't keep its time."""

    mode: int | None = None
    """Permission bits; None for a link."""

    target: str | None = None
    """Where a link points to."""

    uploaded: bool = False
    """Whether a client has put it and no run has changed it since."""

    digest: str | None = None
    """SHA-256 of a file's content."""


def apply(read: ReadTree, batch: BlobBatch, root: str | None, changes: Changes) -> tuple[str | None, Totals]:
    """Apply edits to the tree `root` (None: empty). New tree objects go to `batch`.

    Returns the new root, None for an empty tree, and the difference in totals. Raises Conflict where an entry of
    another kind is in the way, NotFound where there is nothing to remove. The caller must bound how deep the changes
    go, since this recurses.
    """
    entries, more = _changed(read, batch, root, changes, ())
    return batch.put(encode(entries)) if entries else None, more


def _changed(
    read: ReadTree, batch: BlobBatch, digest: str | None, changes: Changes, path: Parts
) -> tuple[list[Entry], Totals]:
    """The new entries of the directory at `path`, and the difference in totals."""
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
            uploaded = UPLOADED if change.uploaded else ()
            entries[name] = ["file", name, change.digest, change.size, mode, change.mtime_ns, *uploaded]
            totals = totals.plus(Totals(0, 0, change.size))
        elif isinstance(change, Place):
            if old is not None:
                totals = totals.minus(_removed(read, old, Remove(), here))
            entries[name] = [change.entry[0], name, *change.entry[2:]]
            totals = totals.plus(_entry_totals(read, change.entry))
            continue
        else:
            _check_kind(old, "link", here)
            entries[name] = ["link", name, change.target, change.mtime_ns]
            totals = totals.plus(_entry_totals(read, entries[name])).minus(Totals(1, 1))
        if old is None:
            totals = totals.plus(Totals(1, 0 if isinstance(change, Changes) else 1))
        elif old[0] != "dir":
            totals = totals.minus(_entry_totals(read, old)).plus(Totals(1, 1))
    return list(entries.values()), totals


def _directory(
    read: ReadTree, batch: BlobBatch, old: Entry | None, change: Changes, path: Parts
) -> tuple[Entry, Totals]:
    """The entry of an edited or new directory, and the difference in totals below it."""
    below, more = _changed(read, batch, old[2] if old else None, change, path)
    mode = change.mode if change.mode is not None else old[3] if old else DIRECTORY_MODE
    return ["dir", path[-1], batch.put(encode(below)), mode], more


def _removed(read: ReadTree, old: Entry | None, change: Remove, path: Parts) -> Totals:
    """The totals of an entry that may be removed. Raises NotFound, Conflict."""
    if old is None:
        raise no_file(path)
    if old[0] == "dir" and not change.recursive:
        raise Conflict(
            f"'{display_path(path)}' is a directory.",
            hint="Add ?recursive=true to delete it with all that is in it.",
            code="is_a_directory",
        )
    return _entry_totals(read, old)


def _entry_totals(read: ReadTree, entry: Entry) -> Totals:
    """The totals of an entry with all that is below it."""
    if entry[0] == "dir":
        return Totals(1).plus(count(read, entry[2]))
    return link_totals(entry_size(entry)) if entry[0] == "link" else Totals(1, 1, entry_size(entry))


def count(read: ReadTree, digest: str | None) -> Totals:
    """The totals of a whole tree."""
    totals = Totals()
    for entry in read(digest) if digest else ():
        totals = totals.plus(_entry_totals(read, entry))
    return totals


def own_totals(read: ReadTree, root: str | None) -> Totals:
    """The totals of a root without packages."""
    totals = Totals()
    for entry in own_entries(read, root):
        totals = totals.plus(_entry_totals(read, entry))
    return totals


def depth(read: ReadTree, entry: Entry) -> int:
    """How many directories are nested in an entry, itself included; 0 for what is no directory."""
    if entry[0] != "dir":
        return 0
    return 1 + max((depth(read, child) for child in read(entry[2])), default=0)


def only_packages(read: ReadTree, batch: BlobBatch, root: str | None) -> tuple[ReadTree, str | None]:
    """The root of a tree with nothing but the packages of another one, None where that has none; and before it what
    reads that one, too, as long as the batch hasn't ended."""
    entries = [entry for entry in read(root) if is_packages(read, entry)] if root else []
    made = batch.put(encode(entries)) if entries else None
    return lambda digest: entries if digest == made else read(digest), made


def entry_size(entry: Entry) -> int:
    """The size in bytes of a file, or of a link's target."""
    size: int = entry[3] if entry[0] == "file" else len(name_bytes(entry[2]))
    return size


def find(read: ReadTree, root: str | None, parts: Parts) -> Entry:
    """The entry at a path. Raises NotFound, and Conflict where the path leads through a link: none is followed."""
    digest = root
    for depth, name in enumerate(parts, start=1):
        entry = next((entry for entry in read(digest) if entry[1] == name), None) if digest else None
        if entry is None:
            raise no_file(parts)
        if depth == len(parts):
            return entry
        if entry[0] == "link":
            raise in_the_way(entry[0], parts[:depth])
        digest = entry[2] if entry[0] == "dir" else None
    raise no_file(parts)


def display_path(parts: Parts) -> str:
    """A path as text for messages, shortened if it is long."""
    path = "/".join(parts).encode(errors="surrogateescape").decode(errors="replace")
    return path if len(path) <= 200 else path[:200] + "…"


def no_file(parts: Parts) -> NotFound:
    """The error for a path at which there is nothing."""
    return NotFound(
        f"There is no file '{display_path(parts)}'.",
        hint="GET /api/sessions/{id}/files lists those there are.",
        code="no_file",
    )


def _check_kind(old: Entry | None, kind: str, path: Parts) -> None:
    """Raises Conflict where an entry of another kind is in the way."""
    if old is not None and old[0] != kind:
        raise in_the_way(old[0], path)


def in_the_way(kind: str, path: Parts) -> Conflict:
    """The error for an entry of another kind."""
    shown, hint = display_path(path), "Choose another path, or delete what is there first."
    match kind:
        case "file":
            return Conflict(f"'{shown}' is a file.", hint=hint, code="is_a_file")
        case "dir":
            return Conflict(f"'{shown}' is a directory.", hint=hint, code="is_a_directory")
        case "link":
            what = "a symbolic link, and those are never followed"
            return Conflict(f"'{shown}' is {what}.", hint=hint, code="is_a_link")
    return Conflict(f"'{shown}' is a pipe, a socket or a device.", hint=hint, code="is_no_file")


def _duplicate(parts: Parts) -> BadRequest:
    """The error for contradicting edits."""
    return BadRequest(
        f"'{display_path(parts)}' is there twice, or as a file and as a directory.",
        hint="Name each file and directory once.",
        code="bad_archive",
    )


def walk(read: ReadTree, digest: str | None, path: Parts = ()) -> Iterator[tuple[Parts, Entry]]:
    """All entries of a tree but packages, with their paths, directories before what is in them."""
    for entry in (read(digest) if path else own_entries(read, digest)) if digest else ():
        here = (*path, entry[1])
        yield here, entry
        if entry[0] == "dir":
            yield from walk(read, entry[2], here)


def page(
    read: ReadTree,
    digest: str | None,
    *,
    after: Parts = (),
    prefix: Parts = (),
    directories: bool = False,
    path: Parts = (),
) -> Iterator[tuple[Parts, Entry]]:
    """The files and links of a tree, with `directories` those too, but no packages, after the path `after` whose path
    begins with `prefix`, in order, with their paths.

    The last part of `prefix` may be the beginning of a name. Subtrees without such paths aren't read. `path` is that of
    the tree itself.
    """
    for entry in (read(digest) if path else own_entries(read, digest)) if digest else ():
        name = entry[1]
        if after and name_bytes(name) < name_bytes(after[0]):
            continue
        if prefix and not (name.startswith(prefix[0]) if len(prefix) == 1 else name == prefix[0]):
            continue
        is_after = not after or name_bytes(name) > name_bytes(after[0])
        if (entry[0] != "dir" or directories) and is_after and len(prefix) <= 1:
            yield (*path, name), entry
        if entry[0] == "dir":
            here, further = (*path, name), after[1:] if after and name == after[0] else ()
            yield from page(read, entry[2], after=further, prefix=prefix[1:], directories=directories, path=here)


def file_entry(path: Parts, entry: Entry) -> FileEntry:
    """An entry of a tree object, as an item of a list of files."""
    where = "/".join(path)
    match entry:
        case "file", _, digest, size, mode, mtime_ns, *uploaded:
            return FileEntry(where, "file", size, mtime_ns, mode, uploaded=bool(uploaded), digest=digest)
        case "link", _, target, mtime_ns:
            return FileEntry(where, "link", entry_size(entry), mtime_ns, target=target)
        case _:
            return FileEntry(where, "dir", mode=entry[3])
