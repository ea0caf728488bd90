"""Lists of all files of a snapshot, and of all that differ between two, some at a time.

A tree of 200,000 files may have paths of 30 KiB each, since their directories are kept once: a list of all of them
could take more memory than there is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice

from era.core.files import edits
from era.core.files.diffs import FileChange, Kind, ReadTree, file_changes
from era.core.files.edits import Entry, FileEntry
from era.core.files.file_threads import Budget
from era.core.files.snapshots import Snapshots
from era.core.models import OwnedId, Snapshot
from era.errors import Unavailable

_PAGE_CHARACTERS = 256 << 10
_ENTRY_CHARACTERS = 250
"""What an entry counts besides its path."""


def file_pages(snapshots: Snapshots, snapshot: Snapshot, session_id: OwnedId) -> AsyncIterator[list[FileEntry]]:
    """All files and links of a snapshot, in order. Raises Unavailable where the disk fails."""

    def files(read: ReadTree) -> Iterator[FileEntry]:
        return (edits.file_entry(path, entry) for path, entry in edits.page(read, snapshot.root))

    return _pages(snapshots, files, lambda file: file.path, session_id)


def change_pages(
    snapshots: Snapshots, old: Snapshot, new: Snapshot, session_id: OwnedId, kind: Kind
) -> AsyncIterator[list[FileChange]]:
    """What was added, changed or removed between two snapshots, found without reading a file. Raises Unavailable where
    the disk fails."""

    def changes(read: ReadTree) -> Iterator[FileChange]:
        return file_changes(read, old.root, new.root, kind)

    return _pages(snapshots, changes, lambda change: change.path, session_id)


async def _pages[T](
    snapshots: Snapshots, listed: Callable[[ReadTree], Iterator[T]], path_of: Callable[[T], str], session_id: OwnedId
) -> AsyncIterator[list[T]]:
    """Pages of what `listed` yields, given a reader of tree objects. Each is small work until one exceeds its budget;
    then the list is begun anew as large work, without what was handed out."""
    budget: Budget | None = None
    count, is_large = 0, False

    def read(digest: str) -> list[Entry]:
        return snapshots.read_tree(digest, budget=budget)

    items = listed(read)

    def page(page_budget: Budget | None) -> list[T]:
        nonlocal items, budget, is_large
        if page_budget is None and not is_large:
            items, is_large = islice(listed(read), count, None), True
        budget = page_budget
        taken: list[T] = []
        room = _PAGE_CHARACTERS
        for item in items:
            taken.append(item)
            room -= len(path_of(item)) + _ENTRY_CHARACTERS
            if room <= 0:
                break
        return taken

    try:
        while taken := await snapshots.threads.by_size(page, session_id, is_large=is_large):
            count += len(taken)
            yield taken
    except OSError as error:
        raise Unavailable(f"the session's files could not be listed: {error.strerror}") from error
