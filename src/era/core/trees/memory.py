"""What is remembered of sandboxes' working directories from one scan to the next, within a bound.

Theory of operation. A scanned tree takes half a kilobyte for each entry, and is remembered as long as its sandbox is
warm. So trees are remembered of so many entries together (`Memories`). Beyond that the largest are forgotten first: a
small session never pays for a neighbour's large tree. The next scan of one that was forgotten reads all of its files
again, and finds the same. What a scan or a restore works with just now stays, since its watch must not end meanwhile.

A watch takes what a user has few of, and is made on a thread long before it is remembered. Until then the call owns it
for which that was done: whatever becomes of that call, its end closes each watch that isn't remembered
(`Memories.in_use`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from era.core.models import Snapshot
from era.core.trees import file_threads
from era.core.trees.paths import Parts
from era.core.trees.trees import Tree
from era.core.trees.watch import Watch

MOST_ENTRIES = 1_000_000
"""Of all trees that are remembered."""

_SMALL_SHARE = 4
"""A tree is small beside one that has more than so many times its entries."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The snapshot that a working directory holds, the scanned tree, and the watch on it, if any."""

    snapshot: Snapshot
    tree: Tree
    watch: Watch | None = None
    linked: frozenset[tuple[Parts, str]] | None = None
    """The files with several names, where the directory was watched and may be again."""

    held: frozenset[tuple[Parts, str]] | None = frozenset()
    """The files that processes held at the scan (HeldFiles), by directory and name: these may change without the watch
    noting it. None where they aren't known, so that a full scan is needed."""

    ahead_bytes: int = 0
    """How much was stored of the tree that the snapshot hasn't: the next snapshot must count it (versions.py)."""

    is_recalled: bool = False
    """Whether it is only what the snapshot says: each file has to be read (restoring.py)."""


def has_many_entries(memory: Memory | None) -> bool:
    """Whether to look at all that there is would be large work, as far as is known."""
    return memory is not None and memory.tree.totals.entries > file_threads.LARGE_ENTRIES


def is_large_scan(memory: Memory | None) -> bool:
    """Whether the next scan will be large work, as far as is known: nothing tells what was touched of much."""
    return memory is not None and memory.watch is None and has_many_entries(memory)


class Memories:
    """What is remembered of each sandbox, by its id. To be used on the event loop, but for `note_watch`."""

    def __init__(self, close: Callable[[Watch], object]) -> None:
        """`close` has a watch closed on a thread: that takes the kernel 10 ms."""
        self._close = close
        self.most = MOST_ENTRIES
        self._memories: dict[str, Memory] = {}
        self._sizes: dict[str, int] = {}
        """As they were counted."""

        self._in_use: Counter[str] = Counter()
        self._made: dict[str, list[Watch]] = {}
        """The watches that were made for sandboxes in use."""

        self.entries = 0
        """Of all trees that are remembered."""

    def get(self, sandbox_id: str) -> Memory | None:
        return self._memories.get(sandbox_id)

    def size(self, sandbox_id: str) -> int:
        """How many entries are remembered of a sandbox."""
        return self._sizes.get(sandbox_id, 0)

    def put(self, sandbox_id: str, memory: Memory) -> None:
        """Remember this of a sandbox. Others may be forgotten for it, or this at once."""
        before = self.take(sandbox_id)
        if before is not None and before.watch is not None and before.watch is not memory.watch:
            self._close(before.watch)
        self._memories[sandbox_id] = memory
        self._sizes[sandbox_id] = memory.tree.totals.entries
        self.entries += self._sizes[sandbox_id]
        self._fit()

    def take(self, sandbox_id: str) -> Memory | None:
        """Take out what is remembered of a sandbox."""
        memory = self._memories.pop(sandbox_id, None)
        if memory is not None:
            self.entries -= self._sizes.pop(sandbox_id)
        return memory

    def forget(self, sandbox_id: str) -> None:
        """Drop what is remembered of a sandbox, if anything."""
        memory = self.take(sandbox_id)
        if memory is not None and memory.watch is not None:
            self._close(memory.watch)

    def forget_all(self) -> None:
        for sandbox_id in list(self._memories):
            self.forget(sandbox_id)

    @contextmanager
    def in_use(self, sandbox_id: str) -> Iterator[None]:
        """Within the block what is remembered of a sandbox is forgotten for no other one's sake. At its end the watches
        are closed that were made for the sandbox and aren't remembered."""
        self._in_use[sandbox_id] += 1
        try:
            yield
        finally:
            self._in_use[sandbox_id] -= 1
            if not self._in_use[sandbox_id]:
                self._close_what_isnt_remembered(sandbox_id)
            self._fit()

    def note_watch(self, sandbox_id: str, watch: Watch) -> None:
        """Note that a watch was made for a sandbox, which is in use. To be called on any thread: the use ends after the
        job on that."""
        self._made.setdefault(sandbox_id, []).append(watch)

    def _close_what_isnt_remembered(self, sandbox_id: str) -> None:
        """The end of a sandbox's use."""
        del self._in_use[sandbox_id]
        memory = self.get(sandbox_id)
        for watch in self._made.pop(sandbox_id, []):
            if memory is None or watch is not memory.watch:
                self._close(watch)

    def _fit(self) -> None:
        """Forget the largest trees until the others have no more entries than they may. One that is in use may be the
        largest: it goes as soon as it isn't any more, rather than small ones now."""
        while self.entries > self.most:
            unused = {each: size for each, size in self._sizes.items() if each not in self._in_use}
            largest = max(unused, key=unused.__getitem__, default=None)
            if largest is None:
                return
            is_small = unused[largest] * _SMALL_SHARE < max(self._sizes.values())
            if is_small and sum(unused.values()) <= self.most:
                return
            self.forget(largest)
