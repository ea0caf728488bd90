"""Capsules out and in, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from era.core.capsules.exports import Export, Exporter
from era.core.capsules.imports import Importer
from era.core.capsules.pins import Pins
from era.core.files.snapshots import BlobStore, Snapshots
from era.core.files.spool import Slots
from era.core.files.trees import Bounds
from era.core.metadata import MetadataStore
from era.core.models import OwnedId, Session
from era.core.setup.locks import Locks

_THREADS = 2


class Capsules:
    """Exports and imports sessions. They have threads of their own, so that no run waits for them. `close` when done.

    `directory` is for temporary files; they have no names, so whatever happens none is left.
    """

    def __init__(
        self,
        store: MetadataStore,
        snapshots: Snapshots,
        blobs: BlobStore,
        pins: Pins,
        locks: Locks,
        directory: Path,
        *,
        max_timeout: float,
        slots: Slots,
        bounds: Bounds | None = None,
    ) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="era-capsules")
        self._exporter = Exporter(store, snapshots, blobs, pins, locks, self._threads, directory)
        self._slots = slots
        self._importer = Importer(
            store, blobs, self._threads, directory, bounds=bounds or Bounds(), max_timeout=max_timeout
        )

    async def open(self, session_id: OwnedId, *, history: bool = True) -> Export:
        """A session as it is now, to be sent. Without history there are no runs and but the current version."""
        return await self._exporter.open(session_id, history=history)

    async def load(self, chunks: AsyncIterator[bytes], owner: str, new_id: str | None = None) -> Session:
        """Make the session that a capsule holds, for `owner`. Raises TooManyUploads."""
        with self._slots.take():
            return await self._importer.load(chunks, owner, new_id)

    async def close(self) -> None:
        """Let what is under way finish."""
        await asyncio.to_thread(self._threads.shutdown)
