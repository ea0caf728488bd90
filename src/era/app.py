"""The composition root: makes the parts of a service, starts and stops them. No logic."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import uvloop
from starlette.types import ASGIApp

from era import languages
from era.api.guest_api import GuestPublicUrls
from era.api.routing.context import Context
from era.choices import (
    blob_store,
    drivers,
    open_store,
    signing_secret,
)
from era.core.cluster.moves import Moves
from era.core.concurrency import meter
from era.core.concurrency.tasks import in_background
from era.core.files.links import Links
from era.core.files.watching import Watching
from era.core.live.session_processes import SessionProcesses
from era.core.models import Isolation, JsonObject
from era.core.operation.garbage import collect_garbage, collect_unneeded, remove_packages
from era.core.owners.audit import Audit
from era.core.public.sites import Sites
from era.core.runs.outputs import History
from era.core.sessions.sessions import Sessions
from era.core.sessions.versions import Versions
from era.core.trees.pages import file_pages
from era.core.trees.pins import Pins
from era.core.trees.snapshots import Snapshots
from era.errors import NoIsolation
from era.parts import (
    Base,
    Files,
    Owners,
    Reached,
    Sandboxes,
    Work,
    build_base,
    build_files,
    build_owners,
    build_reached,
    build_sandboxes,
    build_work,
)
from era.server import doctor, server
from era.server.bounds import settings_in_force
from era.server.directory_locks import exclusive, shared_directory, sharing
from era.settings import Settings
from era.store.blobs.blobs import make_directory
from era.telemetry import logs
from era.telemetry.gauges import KeptText, MeasuredParts, metrics_text
from era.telemetry.metrics import Metrics
from era.telemetry.notes import later, to_all
from era.telemetry.traces import tracing

log = structlog.get_logger()


@asynccontextmanager
async def services(settings: Settings) -> AsyncIterator[Context]:
    """Everything behind the API: started when the block begins, stopped when it ends.

    Raises Conflict where another service uses the data directory, NoIsolation where sandboxes can't be had, BadRequest
    for settings that make no sense, NotReady where the database or the bucket can't be had.
    """
    directory = settings.data_dir.resolve()
    make_directory(directory)
    metrics = Metrics()
    metrics.expect(languages.runtimes())
    with (
        exclusive(directory),
        sharing(settings),
        tracing(settings.traces) as traces,
        later(to_all(logs.write, traces.note)) as write_later,
    ):
        base = await build_base(settings, to_all(metrics.note, write_later), traces)
        files = await build_files(base)
        owners = await build_owners(base, files)
        sandboxes = build_sandboxes(base, files)
        try:
            await start_sandboxes(base, sandboxes)
            work = build_work(base, files, owners, sandboxes)
            reached = build_reached(base, files, sandboxes, work)
            context = build_context(
                base,
                files,
                owners,
                sandboxes,
                work,
                reached,
                build_metrics(base, sandboxes, work, reached, metrics),
            )
            await sandboxes.pool.start()
            await work.setups.start()
            await work.inbox.start()
            await owners.webhooks.start()
            work.live_sessions.start()
            background = in_background(background_jobs(base, files, owners, work))
            try:
                yield context
            finally:
                for task in background:
                    task.cancel()
                await stop(base, files, owners, sandboxes, work)
        finally:
            await close(base, files, owners, sandboxes)


async def start_sandboxes(base: Base, sandboxes: Sandboxes) -> None:
    """Start the drivers, and record as lost what an earlier service on this data directory left under way."""
    store, alone_here = base.store, base.homes is None
    if alone_here and (lost := await store.mark_lost()):
        log.warning("runs_lost", count=lost, why="the service stopped while they were under way")
    await sandboxes.drivers.start()
    sandboxes.preparations.start()
    if alone_here and (lost := await store.mark_processes_lost()):
        log.warning("processes_lost", count=lost, why="the service stopped while they ran")


def background_jobs(base: Base, files: Files, owners: Owners, work: Work) -> Sequence[Coroutine[Any, Any, None]]:
    """What goes on by itself as long as the service runs."""
    return (
        collect_garbage(files.snapshots, base.store, files.pins, base.note, base.cluster),
        work.expiry.run(),
        remove_packages(work.setups),
        owners.usage.keep(),
        base.addresses.keep(),
    )


def build_context(
    base: Base,
    files: Files,
    owners: Owners,
    sandboxes: Sandboxes,
    work: Work,
    reached: Reached,
    metrics: Callable[[], Awaitable[bytes]],
) -> Context:
    """Put together what the API calls."""
    settings, store, places = base.settings, base.store, sandboxes.pool.places
    return Context(
        settings=settings,
        rules=base.rules,
        sessions=build_sessions(base, sandboxes, work, reached.moves),
        runs=work.runs,
        live_sessions=work.live_sessions,
        contexts=work.contexts,
        checkpoints=work.checkpoints,
        processes=SessionProcesses(work.live_sessions, store, base.idempotency),
        watching=Watching(work.live_sessions, store, files.snapshots),
        tickets=reached.tickets,
        live_servers=work.live_servers,
        sites=Sites(signing_secret(settings, "site-key"), store, settings.public_host),
        inbox=work.inbox,
        history=History(store, files.outputs, work.active_runs),
        versions=Versions(store, files.snapshots, base.turns, base.idempotency, files.history, sandboxes.liveness),
        capsules=files.capsules,
        storage=owners.storage,
        idempotency=base.idempotency,
        api_keys=owners.api_keys,
        audit=Audit(store.audit),
        quotas=owners.quotas,
        usage=owners.usage,
        webhooks=owners.webhooks,
        setups=work.setups,
        files=reached.files,
        archives=reached.archives,
        links=Links(signing_secret(settings, "link-key"), store, owners.api_keys),
        turns=base.turns,
        readiness=reached.readiness,
        store=store,
        homes=base.homes,
        moves=reached.moves,
        other_hosts=reached.others,
        list_snapshot=partial(file_pages, files.snapshots),
        isolation=sandboxes.drivers.isolation,
        pool_counts=sandboxes.pool.counts,
        at_a_time=lambda: {"runs": work.admission.places.count, "sandboxes": places.count},
        places=places.counts,
        limits=tuple(settings_in_force(settings)),
        findings=lambda tls: doctor.findings(sandboxes.drivers.tested(), tls),
        end_background=partial(end_background, base, work),
        end_runs=partial(end_runs, base, sandboxes),
        note=base.note,
        trace=base.traces.begin,
        metrics=metrics,
        serves_at=partial(serves_at, base, sandboxes),
    )


def build_sessions(base: Base, sandboxes: Sandboxes, work: Work, moves: Moves | None) -> Sessions:
    return Sessions(
        base.store,
        sandboxes.pool,
        base.turns,
        base.idempotency,
        work.expiry,
        base.rules,
        sandboxes.liveness,
        work.setups.kick,
        None if moves is None else moves.place,
    )


def build_metrics(
    base: Base, sandboxes: Sandboxes, work: Work, reached: Reached, metrics: Metrics
) -> Callable[[], Awaitable[bytes]]:
    measured = MeasuredParts(
        base.store,
        base.store.inboxes,
        base.store.webhooks,
        sandboxes.pool,
        work.admission,
        work.live_sessions,
        reached.readiness,
        base.directory,
        lambda: base.blobs.written,
        lambda: 0 if reached.moves is None else reached.moves.count,
        base.homes,
    )
    return KeptText(lambda: metrics_text(metrics, measured)).get


async def serves_at(base: Base, sandboxes: Sandboxes, port: int, hosts_port: int | None, app: ASGIApp) -> None:
    """Let programs and the other hosts reach this service, which listens now."""
    sandboxes.network.serves_at(port, GuestPublicUrls(app).protocol)
    if base.homes is not None:
        await base.homes.reached_at(server.hosts_url(base.settings, port, hosts_port))


async def end_background(base: Base, work: Work, seconds: float) -> None:
    """Begin no deliveries any more, and end the runs in the background within so many seconds."""
    await work.inbox.stop_new_attempts()
    ending = asyncio.create_task(work.live_sessions.stop(seconds, base.why_stopped))
    await work.active_runs.stop_background(seconds)
    await ending


async def end_runs(base: Base, sandboxes: Sandboxes) -> None:
    """End the runs that are under way, so that their callers are told: also those that wait for a bucket."""
    base.blobs.hurry()
    await sandboxes.pool.stop(base.why_stopped)


async def stop(base: Base, files: Files, owners: Owners, sandboxes: Sandboxes, work: Work) -> None:
    """End all work: what is under way is committed where it can be within ERA_DRAIN_SECONDS."""
    seconds = base.settings.drain_seconds
    await sandboxes.preparations.stop()
    await asyncio.gather(work.setups.stop(seconds), end_background(base, work, seconds))
    await files.packages.stop()
    await work.runs.drain(seconds)
    await end_runs(base, sandboxes)
    await work.live_sessions.close()
    await work.runs.close(server.LAST_ANSWERS_SECONDS)
    await work.inbox.stop()
    await owners.webhooks.stop()
    if base.homes is not None:
        await base.homes.leave()
    await work.setups.stop()  # those that are still putting files back: nobody waits for this host any more


async def close(base: Base, files: Files, owners: Owners, sandboxes: Sandboxes) -> None:
    """Remove all sandboxes, then close files, blobs and the database, of which the sandboxes were made."""
    await sandboxes.preparations.stop()
    await sandboxes.drivers.stop()
    sandboxes.network.stop()
    await owners.databases.close()
    for threads in (files.transfers, owners.storage, files.outputs):
        await threads.close()
    await asyncio.to_thread(base.blobs.close)
    await files.capsules.close()
    await files.snapshots.close()
    await base.store.close()


async def collect(settings: Settings) -> int:
    """Remove what nothing needs any more from the data directory of a stopped service, or from what the hosts of a
    stopped cluster share; how many blobs. Raises Conflict where a service uses it, Unavailable, OSError."""
    directory, shared = settings.data_dir.resolve(), shared_directory(settings)
    settings = settings.model_copy(update={"data_dir": shared, "shared_dir": None})
    with exclusive(shared):
        store = await open_store(settings)
        blobs = blob_store(settings)
        await asyncio.to_thread(blobs.open)
        # Nothing can be about to be named by a row, so nothing needs time for that.
        snapshots = Snapshots(blobs, grace_seconds=0)
        sets = directory / "environments"
        pins = Pins(lambda: os.listdir(sets) if sets.is_dir() else [])
        try:
            return await collect_unneeded(snapshots, store, pins)
        finally:
            await asyncio.to_thread(blobs.close)
            await snapshots.close()
            await store.close()


async def examine() -> tuple[dict[Isolation, JsonObject | NoIsolation], Isolation | None]:
    """What isolation each kind of sandbox really has on this machine, found by making some of every language, or why it
    can't be had; and which kind `auto` stands for, if any works."""
    with tempfile.TemporaryDirectory(prefix="era-doctor-") as directory:
        sandboxes = drivers(Settings(data_dir=Path(directory)))
        try:
            results = await sandboxes.examine()
        finally:
            await sandboxes.stop()
    return results, next((name for name, result in results.items() if not isinstance(result, NoIsolation)), None)


def run_service(settings: Settings, say: Callable[[str], None], listening: Sequence[socket.socket] = ()) -> int:
    """Run the service until SIGINT or SIGTERM, on an event loop of its own; returns the process's exit code. `say` gets
    the lines for the person who started it; for `listening` see server.serve. Raises as that and `services` do."""
    signals = server.Signals()
    server.raise_descriptor_limit()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(settings, say, signals, listening))
    finally:
        signals.ignore()


async def _serve(
    settings: Settings, say: Callable[[str], None], signals: server.Signals, listening: Sequence[socket.socket]
) -> int:
    """Start, serve and stop. A signal during the start undoes what has been started."""
    logs.log_from(settings.log_level, settings.log_format)
    meter.install()
    if (task := asyncio.current_task()) is not None:
        signals.then(task.cancel)
    try:
        async with services(settings) as context:
            await server.serve(settings, context, say, signals, listening)
    except asyncio.CancelledError:
        if signals.received is None:
            raise
        return 128 + signals.received
    return 0
