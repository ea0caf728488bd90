"""What snapshots hold: the digests and sizes of their tree objects and files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import batched

from era.core.files.blob_store import BlobStore
from era.core.files.file_threads import Budget
from era.core.files.tree_objects import decode

_AHEAD = 16
"""How many tree objects are fetched together, where blobs come from elsewhere. Until they are read, nobody knows how
long they are."""


class Holdings:
    """What some snapshots hold, added one by one."""

    def __init__(
        self, blobs: BlobStore, tree_object: Callable[[str, Budget | None], bytes], budget: Budget | None = None
    ) -> None:
        """`tree_object` reads a tree object, and spends it of the budget, if there is one."""
        self.sizes: dict[str, int] = {}
        """Of all tree objects and files in bytes, by digest. What the last snapshot has added is at the end."""

        self._blobs = blobs
        self._tree_object = tree_object
        self._budget = budget
        # `sizes` alone couldn't tell which trees were visited: a file may have the very content of a tree object.
        self._visited: set[str] = set()

    def add(self, root: str) -> None:
        """Add a snapshot: level by level, so that the lists of many directories are fetched together. Raises OSError,
        and TreeNotSmall beyond the budget."""
        level = [] if root in self._visited else [root]
        while level:
            self._visited.update(level)
            if self._budget is not None:
                self._budget.check_room(len(level))
            below: dict[str, None] = {}
            for digest in self.ahead(level):
                content = self._tree_object(digest, self._budget)
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
