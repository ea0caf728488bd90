"""What is being exported is not cleared away, whatever becomes of its rows meanwhile.

An export reads rows and then, for as long as its client takes, what they name. Two steps must not interleave: reading
rows and pinning what they name (an export), and reading what rows need and what is pinned (a collection of garbage).
Then what an export has read was either pinned before the collection looked, or stood in a row when it did, or was put
so recently that its grace period holds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from era.core.metadata import MetadataStore


@dataclass(eq=False, slots=True)
class Pin:
    """Snapshot roots, and blobs beside them, that must stay."""

    roots: set[str] = field(default_factory=set)
    blobs: set[str] = field(default_factory=set)


class Pins:
    def __init__(self, local: Callable[[], Iterable[str]] = tuple) -> None:
        """`local` tells which other blobs are in use, whether rows name them or not."""
        self._local = local
        self._lock = asyncio.Lock()
        self._held: set[Pin] = set()

    @asynccontextmanager
    async def pinning(self) -> AsyncIterator[Pin]:
        """A pin to be filled within the block with what is read there. It holds until `release`, unless the block
        raises."""
        pin = Pin()
        async with self._lock:
            yield pin
            self._held.add(pin)

    def release(self, pin: Pin) -> None:
        self._held.discard(pin)

    async def needed(self, store: MetadataStore) -> tuple[Sequence[str], Sequence[str]]:
        """Every snapshot root and every other blob that must be kept."""
        async with self._lock:
            roots, blobs = set(await store.snapshot_roots()), set(await store.output_digests())
            blobs.update(await store.package_sets(), self._local())
            for pin in self._held:
                roots |= pin.roots
                blobs |= pin.blobs
        return list(roots), list(blobs)
