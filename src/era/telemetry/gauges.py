"""What is read from the service's parts when somebody asks for the metrics."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from era import __version__
from era.core.cluster.homes import Homes
from era.core.live.live_sessions import LiveSessions
from era.core.metadata import MetadataStore
from era.core.models import MICROS, now
from era.core.operation.readiness import Readiness
from era.core.owners.webhooks import WebhookStore
from era.core.pool.admission import Admission
from era.core.pool.pool import SandboxPool
from era.core.public.inbox import InboxStore
from era.errors import EraError
from era.telemetry.metrics import Gauge, Metrics

_KEPT_SECONDS = 1.0
"""Seconds for which the metrics are kept once they were made, which takes 5 ms. Anybody may ask for them."""


class KeptText:
    """A text that is made at most once a second, however often it is asked for."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, bytes]]) -> None:
        self._make = make
        self._made: asyncio.Task[bytes] | None = None
        self._begun_at = 0.0

    async def get(self) -> bytes:
        """Return the text, which may be a second old. Raises whatever making it has raised."""
        now_seconds = asyncio.get_running_loop().time()
        if self._made is None or (self._made.done() and now_seconds - self._begun_at >= _KEPT_SECONDS):
            self._made, self._begun_at = asyncio.create_task(self._make()), now_seconds
        return await asyncio.shield(self._made)


@dataclass(frozen=True, slots=True)
class MeasuredParts:
    """The parts of the service that are looked at."""

    store: MetadataStore
    inboxes: InboxStore
    webhooks: WebhookStore
    pool: SandboxPool
    admission: Admission
    live_sessions: LiveSessions
    readiness: Readiness
    data_dir: Path
    blobs_written: Callable[[], int]
    """How many blobs this process has written."""

    sessions_moved: Callable[[], int]
    """How many sessions have moved from here to a host with more room."""

    homes: Homes | None
    """In a cluster."""


async def metrics_text(metrics: Metrics, parts: MeasuredParts) -> bytes:
    """All metrics. Where the database fails those that are read from it are missing, and `era_ready` is 0."""
    pool, admission = parts.pool, parts.admission
    gauges = [
        Gauge("era_build_info", "The version that runs.", {__version__: 1}, "version"),
        Gauge("era_ready", "Whether the service can take runs (1) or not (0).", await _is_ready(parts.readiness)),
        Gauge("era_sandboxes", "Sandboxes by use.", pool.counts(), "state"),
        Gauge("era_sandbox_places", "Sandboxes that sessions may have at a time.", pool.places.count),
        Gauge("era_sandbox_places_taken", "Sandboxes that sessions have.", pool.places.taken),
        Gauge("era_sandbox_places_waiting", "Sessions that wait for a sandbox.", pool.places.waiting),
        Gauge("era_admission_slots", "Runs that may work at a time.", admission.places.count),
        Gauge("era_admission_slots_taken", "Runs that work now.", admission.places.taken),
        Gauge("era_admission_waiting", "Runs that wait for a slot.", admission.places.waiting),
        Gauge("era_live_sessions", "Sessions with processes beside runs.", parts.live_sessions.count()),
        Gauge("era_processes_running", "Processes of live sessions.", parts.live_sessions.running_processes()),
        *await asyncio.to_thread(_of_disk, parts.data_dir),
    ]
    if parts.homes is not None:
        gauges += [
            Gauge("era_hosts", "Hosts of the cluster that are alive, as this one sees it.", len(parts.homes.hosts)),
            Gauge("era_lease_seconds", "What is left of this host's lease.", parts.homes.lease_left),
        ]
    if parts.homes is None or parts.homes.leads:  # what all hosts share is counted by one of them
        with suppress(EraError):  # the alert on era_ready says so
            gauges += await _of_rows(parts)
    written = Gauge("era_blobs_written", "Blobs that were stored.", parts.blobs_written())
    moved = Gauge("era_sessions_moved", "Sessions that moved to a host with more room.", parts.sessions_moved())
    return metrics.text(gauges, [written, moved])


async def _is_ready(readiness: Readiness) -> int:
    try:
        await readiness.check()
    except EraError:
        return 0
    return 1


def _of_disk(directory: Path) -> list[Gauge]:
    """The disk that has the data directory. What can't be read is missing."""
    try:
        disk = os.statvfs(directory)
        rows = sum(path.stat().st_size for path in directory.glob("era.sqlite*"))
    except OSError:
        return []
    return [
        Gauge("era_disk_size_bytes", "Size of the data directory's disk.", disk.f_blocks * disk.f_frsize),
        Gauge("era_disk_free_bytes", "Free space on the data directory's disk.", disk.f_bavail * disk.f_frsize),
        Gauge("era_disk_files_free", "Files that still fit on the data directory's disk.", disk.f_favail),
        Gauge("era_database_size_bytes", "Size of the rows' database.", rows),
    ]


async def _of_rows(parts: MeasuredParts) -> list[Gauge]:
    """What is read from the database. Raises Unavailable."""
    counts = await parts.store.counts()
    backlog = await parts.inboxes.backlog()
    age = 0.0 if backlog.oldest is None else max(now() - backlog.oldest, 0) / MICROS
    return [
        Gauge("era_sessions", "Sessions there are.", counts["sessions"]),
        Gauge("era_runs", "Runs on record by status.", counts["runs"], "status"),
        Gauge("era_inbox_pending", "Deliveries that wait to be run.", backlog.pending),
        Gauge("era_webhook_pending", "Notices that wait to be sent to webhooks.", await parts.webhooks.pending()),
        Gauge("era_inbox_oldest_seconds", "Age of the oldest delivery that is due and could be run.", age),
    ]
