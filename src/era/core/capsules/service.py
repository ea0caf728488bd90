"""The service of capsules: exports and imports sessions, on threads of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from era.core.capsules.exports import Export, Exporter
from era.core.capsules.imports import Importer
from era.core.concurrency.fair_limiter import FairLimiter
from era.core.metadata import MetadataStore
from era.core.models import OwnedId, Session
from era.core.sessions.versions import HistoryBound
from era.core.setup.package_sets import InstalledPackageSets
from era.core.totals import Bounds
from era.core.trees.blob_store import BlobStore
from era.core.trees.pins import Pins
from era.core.trees.snapshots import Snapshots
from era.core.trees.spool import Slots
from era.errors import TooBusy

_THREADS = 2
_EXPORTS = 32
_EXPORTS_OF_OWNER = 8
"""At a time. Each has temporary files, for as long as its client reads."""

_WAIT_SECONDS = 30.0


class Capsules:
    """Exports and imports sessions. `close` it at the end.

    They have threads of their own, so that no run waits for them. `directory` is for temporary files; they are unnamed,
    so none is left behind, whatever happens.
    """

    def __init__(
        self,
        store: MetadataStore,
        snapshots: Snapshots,
        blobs: BlobStore,
        pins: Pins,
        package_sets: InstalledPackageSets,
        directory: Path,
        slots: Slots,
        max_timeout: float,
        bounds: Bounds,
        history: HistoryBound | None = None,
    ) -> None:
        """`directory` is for temporary files. `max_timeout`, in seconds, and `bounds` are the most that a session of
        this server may have."""
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="era-capsules")
        self._exporter = Exporter(store, snapshots, blobs, pins, package_sets, self._threads, directory)
        self._exports = FairLimiter(_EXPORTS, of_owner=_EXPORTS_OF_OWNER)
        self._slots = slots
        self._importer = Importer(
            store, blobs, self._threads, directory, bounds=bounds, max_timeout=max_timeout, history=history
        )

    async def open(self, session_id: OwnedId, *, history: bool = True) -> Export:
        """Export a session as it is now; without `history`, with its current version only and without runs. Waits for a
        while where its owner, or all, have as many exports open as may be.

        Raises TooBusy, and as Exporter.open does.
        """
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                release = await self._exports.take(session_id.owner, session_id)
        except TimeoutError:
            raise TooBusy(
                f"{_EXPORTS_OF_OWNER} exports of one owner, or {_EXPORTS} of all, are being read already."
            ) from None
        try:
            export = await self._exporter.open(session_id, history=history)
        except BaseException:
            release()
            raise
        export.when_closed = release
        return export

    async def load(
        self, chunks: AsyncIterator[bytes], caller: OwnedId, new_id: str | None = None, *, public: bool = False
    ) -> Session:
        """Import a capsule as a session of the caller's owner; `caller` has no id. Raises TooManyUploads, and as
        Importer.load does."""
        with self._slots.take(caller.owner):
            return await self._importer.load(chunks, caller, new_id, public=public)

    async def close(self) -> None:
        """Wait for what is under way."""
        await asyncio.to_thread(self._threads.shutdown)
