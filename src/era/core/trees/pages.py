"""Lists of all files of a snapshot, and of all that differ between two, some at a time.

A tree of 200,000 files may have paths of 30 KiB each, since their directories are kept once: a list of all of them
could take more memory than there is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from era.core.models import OwnedId, Snapshot
from era.core.trees import edits, file_threads
from era.core.trees.diffs import FileChange, Kind, file_changes
from era.core.trees.edits import FileEntry
from era.core.trees.snapshots import Snapshots
from era.errors import Unavailable

_PAGE_CHARACTERS = 256 << 10
_ENTRY_CHARACTERS = 250
"""What an entry counts besides its path."""


def file_pages(snapshots: Snapshots, snapshot: Snapshot, session_id: OwnedId) -> AsyncIterator[list[FileEntry]]:
    """All files and links of a snapshot, in order. Raises Unavailable where the disk fails."""
    entries = edits.page(snapshots.read_tree, snapshot.root)
    files = (edits.file_entry(path, entry) for path, entry in entries)
    return _pages(snapshots, [snapshot], files, lambda file: file.path, session_id)


def change_pages(
    snapshots: Snapshots, old: Snapshot, new: Snapshot, session_id: OwnedId, kind: Kind
) -> AsyncIterator[list[FileChange]]:
    """What was added, changed or removed between two snapshots, found without reading a file. Raises Unavailable where
    the disk fails."""
    changes = file_changes(snapshots.read_tree, old.root, new.root, kind)
    return _pages(snapshots, [old, new], changes, lambda change: change.path, session_id)


async def _pages[T](
    snapshots: Snapshots, of: Sequence[Snapshot], items: Iterator[T], path_of: Callable[[T], str], session_id: OwnedId
) -> AsyncIterator[list[T]]:
    """Pages of these items, which are read from the trees of the snapshots `of`."""
    is_large = False
    for snapshot in of:
        is_large |= (await snapshots.totals(snapshot, session_id)).entries > file_threads.LARGE_ENTRIES

    def page() -> list[T]:
        taken: list[T] = []
        room = _PAGE_CHARACTERS
        for item in items:
            taken.append(item)
            room -= len(path_of(item)) + _ENTRY_CHARACTERS
            if room <= 0:
                break
        return taken

    try:
        while taken := await snapshots.threads.by_size(lambda _: page(), session_id, is_large=is_large):
            yield taken
    except OSError as error:
        raise Unavailable(f"the session's files could not be listed: {error.strerror}") from error
