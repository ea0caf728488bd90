"""Pins: content that is being exported is kept from garbage collection, whatever becomes of its rows meanwhile. So is
that of archives as they are downloaded, from the collections of this process.

An export reads rows and then, for as long as its client takes, the content that they name. Two steps must not
interleave: reading rows and pinning what they name (an export), and reading what rows need and what is pinned (a
garbage collection). A lock sees to that. So what an export has read was pinned before the collection looked, or was
named by a row when it did, or was put so recently that the grace period protects it.

Hosts of a cluster share content, and one collects garbage for all: it knows of no other host's pins. So where content
is `shared`, an export counts all that it will read as put now, before it answers, and again before the grace period is
over; in a bucket it has a hold on it from before it reads rows. What was removed since the rows were read is found
missing then, and the export fails before its first byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from era.core.metadata import MetadataStore


@dataclass(eq=False, slots=True)
class Pin:
    """Snapshot roots and other blobs that must be kept."""

    roots: set[str] = field(default_factory=set)
    blobs: set[str] = field(default_factory=set)


class Pins:
    """All pins that are held, and what garbage collection must keep."""

    def __init__(self, local: Callable[[], Iterable[str]] = tuple, *, shared: bool = False) -> None:
        """`local` returns blobs that are in use on this machine, whether rows name them or not. `shared` says that
        other hosts may collect garbage, too."""
        self._local = local
        self.shared = shared
        self._lock = asyncio.Lock()
        self._held: set[Pin] = set()

    @asynccontextmanager
    async def pinning(self) -> AsyncIterator[Pin]:
        """A new pin. Within the block the caller reads rows and adds what they name; no collection can look meanwhile.

        The pin is held from the end of the block until `release`; not at all if the block raises.
        """
        pin = Pin()
        async with self._lock:
            yield pin
            self._held.add(pin)

    def release(self, pin: Pin) -> None:
        self._held.discard(pin)

    async def needed(self, store: MetadataStore) -> tuple[Sequence[str], Sequence[str]]:
        """All snapshot roots, and all other blobs, that garbage collection must keep."""
        async with self._lock:
            roots, blobs = set(await store.snapshot_roots()), set(await store.output_digests())
            blobs.update(await store.package_sets(), self._local())
            for pin in list(self._held):  # archives are released by whatever thread drops them
                roots |= pin.roots
                blobs |= pin.blobs
        return list(roots), list(blobs)
