"""Jobs that remove what nothing needs any more: old rows, content that no row names, packages that no session has."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress

import structlog

from era.core.metadata import MetadataStore
from era.core.models import now
from era.core.ports import ALONE, Cluster
from era.core.setup.setups import Setups
from era.core.telemetry import GarbageCollected, Note, ignore
from era.core.trees.pins import Pins
from era.core.trees.snapshots import CollectionPutOff, Snapshots
from era.errors import EraError

log = structlog.get_logger()

_PERIOD_SECONDS = 3600.0
_LOOK_SECONDS = 2.0
_MARGIN_SECONDS = 5.0
"""How much longer than until it could be removed it takes until something counts as settled."""

_REST = 3.0
"""After an early collection there is none for this many times as long as it took."""

_AGAIN_SECONDS = 60.0
"""Nor is there one so soon after a collection that removed nothing since it failed or was put off."""

_FENCE_TRIES = 12
_FENCE_PAUSE_SECONDS = 5.0
"""A minute in all: a host that hangs is declared dead by then, unless leases are longer."""


async def collect_garbage(
    snapshots: Snapshots, store: MetadataStore, pins: Pins, note: Note = ignore, cluster: Cluster = ALONE
) -> None:
    """Remove old rows and unneeded content once an hour, for ever; where another host leads, that does it. Earlier
    where so much has been written meanwhile that the disk could fill with what is named no more."""
    written = _Written(snapshots)
    collected = written.settled
    while True:
        began, settled = time.monotonic(), written.settled
        rest = 0.0
        if not cluster.leads or await collect_once(snapshots, store, pins, note):
            collected = settled
        else:  # what it was to remove counts on
            rest = _AGAIN_SECONDS
        ended = time.monotonic()
        earliest = ended + max(rest, (ended - began) * _REST)
        while time.monotonic() < ended + _PERIOD_SECONDS:
            await asyncio.sleep(_LOOK_SECONDS)
            written.look()
            if time.monotonic() > earliest and await asyncio.to_thread(
                snapshots.blobs.is_crowded, written.settled - collected
            ):
                break


class _Written:
    """How much has been written that a collection now could remove, and nothing that it would have to leave."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._seen: deque[tuple[float, int]] = deque()
        self.settled = snapshots.blobs.written_bytes
        """In bytes."""

    def look(self) -> None:
        """To be called again and again."""
        self._seen.append((self._snapshots.blobs.time(), self._snapshots.blobs.written_bytes))
        settled = self._snapshots.sweepable_before() - _MARGIN_SECONDS
        while self._seen and self._seen[0][0] < settled:
            self.settled = self._seen.popleft()[1]


async def collect_once(snapshots: Snapshots, store: MetadataStore, pins: Pins, note: Note = ignore) -> bool:
    """Drop rows that nobody can get back, then the content that no row needs any more. Returns whether that is done:
    failures are noted, and what is put off."""
    began = time.monotonic()
    try:
        removed = await collect_unneeded(snapshots, store, pins)
    except Exception as error:
        if not isinstance(error, EraError | OSError):  # the latter as while all file descriptors are taken
            log.exception("bug", where="garbage")  # there are more collections all the same
        message = error.message if isinstance(error, EraError) else str(error)
        put_off = isinstance(error, CollectionPutOff)
        note(GarbageCollected(time.monotonic() - began, message=message, put_off=put_off))
        return False
    note(GarbageCollected(time.monotonic() - began, removed))
    return True


async def collect_unneeded(snapshots: Snapshots, store: MetadataStore, pins: Pins) -> int:
    """Drop rows that nobody can get back, then the content that no row needs any more; how many blobs. Raises
    Unavailable."""
    # Sessions too: what an import left that was killed would else name its content until the next collection.
    while await store.purge(now()):
        pass
    await store.prune_idempotency_keys()
    await store.prune_runs()
    # Not later: whatever is paused from here on has put what it names since then, or nearly.
    older_than = snapshots.sweepable_before()
    # Whose block has ended by then may have left its commit to the thread that writes. It is done before this, which is
    # a write too, and so before the rows are read.
    for _ in range(_FENCE_TRIES):
        if await store.fence_dead_hosts():
            break
        await asyncio.sleep(_FENCE_PAUSE_SECONDS)
    else:
        raise CollectionPutOff("a host hangs, and hasn't been declared dead, or a transaction does")
    return await snapshots.collect_garbage(*await pins.needed(store), older_than=older_than)


async def remove_packages(setups: Setups) -> None:
    """Remove installed packages that no session has, once an hour and as some were installed, for ever. Failures are
    logged."""
    while True:
        try:
            await setups.sweep()
        except (EraError, OSError) as error:
            log.warning("package_sets_not_removed", error=str(error))
        await asyncio.sleep(_LOOK_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout(_PERIOD_SECONDS):
                await setups.has_installed()
