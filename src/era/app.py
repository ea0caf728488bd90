"""The composition root: which concrete parts make a service, in which order they start and stop. No logic."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import structlog
import uvloop
from starlette.types import ASGIApp

from era import doctor, languages, server
from era.api.context import Context
from era.api.guest_api import GuestPublicUrls, GuestStorage
from era.api.other_hosts import other_hosts
from era.bounds import quotas_by_default, retention, rules, settings_in_force
from era.core.active_runs import ActiveRuns
from era.core.admission import Admission
from era.core.api_keys import ApiKeys
from era.core.audit import Audit
from era.core.capsules.service import Capsules
from era.core.expiry import Expiry
from era.core.files.archives import Archives
from era.core.files.blob_store import BlobStore
from era.core.files.live_snapshots import LiveSnapshots
from era.core.files.pages import file_pages
from era.core.files.pins import Pins
from era.core.files.session_files import SessionFiles
from era.core.files.snapshots import Snapshots
from era.core.files.spool import Slots, Spool
from era.core.garbage import collect_garbage, collect_unneeded, remove_packages
from era.core.history import HistoryBound
from era.core.homes import ALONE, Homes
from era.core.idempotency import IdempotencyKeys
from era.core.links import Links, signing_key
from era.core.live.checkpoints import Checkpoints
from era.core.live.contexts import Contexts
from era.core.live.current_files import CurrentFiles
from era.core.live.live_sessions import LiveParts, LiveSessions
from era.core.live.session_processes import SessionProcesses
from era.core.live.tickets import Tickets
from era.core.live.watching import Watching
from era.core.liveness import Liveness
from era.core.models import Isolation, JsonObject
from era.core.moves import Moves
from era.core.outputs import History, Outputs
from era.core.pool import MOVED, SERVICE_STOPPED, SandboxPool
from era.core.public.inbox_worker import Inbox
from era.core.public.live_servers import LiveServers
from era.core.public.sites import Sites
from era.core.quotas import Quotas
from era.core.readiness import Readiness
from era.core.runs import Runs
from era.core.session_run import RunParts
from era.core.sessions import Sessions
from era.core.setup.builds import Builds
from era.core.setup.commands import Commands
from era.core.setup.package_sets import InstalledPackageSets
from era.core.setup.setups import Setups
from era.core.shares import Shares
from era.core.storage import Storage
from era.core.tasks import in_background
from era.core.threads import transfer_threads
from era.core.turns import Turns
from era.core.usage import Usage
from era.core.versions import Versions
from era.core.webhooks import Webhooks
from era.directory_locks import alone, exclusive, shared_directory, sharing
from era.drivers.bubblewrap import BubblewrapDriver
from era.drivers.cgroups import cgroup_name
from era.drivers.choice import DriverChoice
from era.drivers.gvisor import GvisorDriver
from era.drivers.preparations import Preparations
from era.errors import NoIsolation
from era.languages.go import GO
from era.languages.node import NODE
from era.languages.python import base_executable, installation_directory
from era.network import policy
from era.network.authority import BUNDLE
from era.network.connect_supervisor import why_unsupported
from era.network.egress import SandboxNetwork, certificates
from era.network.indexes import IndexListeners
from era.network.server_addresses import ServerAddresses
from era.network.storage import StorageListeners
from era.network.webhooks import WebhookSender
from era.packages.installer import PackageInstaller
from era.settings import Settings
from era.store import d1_databases, place, s3_client
from era.store.blobs import LocalBlobs, make_directory
from era.store.metadata import SqlStore
from era.store.s3_blobs import S3Blobs, check_bucket, installation
from era.telemetry import logs
from era.telemetry.gauges import KeptText, MeasuredParts, metrics_text
from era.telemetry.metrics import Metrics
from era.telemetry.notes import Notes
from era.telemetry.traces import tracing

log = structlog.get_logger()

_DELIVERIES = 16
"""Deliveries of inboxes that run at a time, where no setting bounds the sandboxes."""


def drivers(
    settings: Settings, mounts: Mapping[str, Path] | None = None, preparations: Preparations | None = None
) -> DriverChoice:
    """The drivers of this machine, not started yet. `mounts` are files of the host that sandboxes see besides their
    runtimes and `preparations`, by their path inside."""
    directory = settings.data_dir.resolve()
    limits = rules(settings).defaults
    group = cgroup_name(directory)
    package_sets = directory / "environments"
    return DriverChoice(
        {
            "gvisor": GvisorDriver(
                directory / "gvisor",
                limits,
                cgroup_name=f"{group}-gvisor",
                cgroup_parent=settings.cgroup_parent,
                package_sets=package_sets,
                certificates=certificates(),
                mounts=mounts,
                preparations=preparations,
                why_offline=why_unsupported,
            ),
            "bubblewrap": BubblewrapDriver(
                directory,
                limits,
                cgroup_name=group,
                cgroup_parent=settings.cgroup_parent,
                package_sets=package_sets,
                certificates=certificates(),
                mounts=mounts,
                preparations=preparations,
                why_offline=why_unsupported,
            ),
        },
        settings.isolation,
    )


def installer(settings: Settings, blobs: BlobStore) -> PackageInstaller:
    """What installs packages for sessions."""
    return PackageInstaller(
        settings.data_dir.resolve(),
        blobs,
        shared=shared_directory(settings),
        python=str(base_executable()),
        python_prefix=installation_directory(),
        node=languages.runtime("node").mounts[NODE],
        go=languages.runtimes()["go"].mounts[GO] if "go" in languages.runtimes() else None,
        seconds=settings.setup_seconds,
        most_bytes=settings.disk_mb << 20,
        most_files=settings.files,
        variables=dict(os.environ),
    )


def blob_store(settings: Settings) -> LocalBlobs | S3Blobs:
    """Where content lies: on the local disk, or in an S3 bucket. Raises BadRequest where the setting makes no sense."""
    directory = settings.data_dir.resolve()
    if not settings.blobs:
        host = cgroup_name(directory) + "." if settings.shared_dir else ""
        return LocalBlobs(shared_directory(settings) / "blobs", host)
    cache, owner = directory / "blob-cache", installation(shared_directory(settings) / "store-id")
    return S3Blobs(settings.blobs, cache, cache_bytes=settings.blob_cache_mb << 20, owner=owner)


async def open_store(settings: Settings) -> SqlStore:
    """Where rows are: in the data directory, or in PostgreSQL. Raises NotReady where they can't be had, Unavailable."""
    named = settings.database_url.get_secret_value() if settings.database_url else None
    lease = None if settings.shared_dir is None else settings.lease_seconds
    return await place.open_store(shared_directory(settings), named, retention(settings), lease)


@asynccontextmanager
async def services(settings: Settings) -> AsyncIterator[Context]:
    """Everything behind the API: started when the block begins, stopped when it ends.

    Raises Conflict where another service uses the data directory, NoIsolation where sandboxes can't be had, BadRequest
    for settings that make no sense, NotReady where the database or the bucket can't be had.
    """
    directory = settings.data_dir.resolve()
    make_directory(directory)
    private = policy.private_ranges(settings.egress_private)
    closed = policy.ranges(settings.egress_refused, "ERA_EGRESS_REFUSED")
    limit_rules, own_quotas = rules(settings), quotas_by_default(settings)
    metrics = Metrics()
    metrics.expect(languages.runtimes())
    with exclusive(directory), sharing(settings), tracing(settings.traces) as traces:
        notes = Notes(metrics.note, logs.write, traces.note)
        note = notes.note
        async with alone(settings):
            if settings.blobs:  # before anything is made of which one would have to know that it is of no use
                await asyncio.to_thread(check_bucket, settings.blobs, shared_directory(settings) / "store-id")
            store = await open_store(settings)
            blobs = blob_store(settings)
            await asyncio.to_thread(blobs.open)
        homes = await cluster_homes(settings, store)
        if homes is not None and isinstance(blobs, S3Blobs):
            blobs.share(store.condemned())
        cluster = homes or ALONE
        servers = server_addresses(settings, homes)
        await servers.look()
        reachable = policy.Policy(private, closed, servers)
        why_stopped = SERVICE_STOPPED if homes is None else MOVED
        uploads, slots, longest = directory / "uploads", Slots(), settings.max_timeout
        spool = Spool(uploads, slots)
        spool.open()
        transfers = transfer_threads()
        snapshots = Snapshots(blobs)
        outputs = Outputs(blobs, settings.outputs_kept, uploads)
        packages = installer(settings, blobs)
        await asyncio.to_thread(packages.open)
        pins = Pins(packages.digests, shared=homes is not None)
        package_sets = InstalledPackageSets(store, packages)
        bound = HistoryBound(store, snapshots, limit_rules, settings.history_mb << 20)
        capsules = Capsules(
            store, snapshots, blobs, pins, package_sets, directory, slots, longest, limit_rules.largest_tree, bound
        )
        descriptors: Shares[str] = Shares(server.descriptor_limit() // 2)
        network = SandboxNetwork(descriptors, reachable, servers.has_host)
        bundle = directory / "certificates.pem"
        network.authority.write(bundle)
        preparations = Preparations(languages.preparations(), directory / "prepared")
        sandboxes = drivers(settings, {BUNDLE: bundle}, preparations)
        turns = Turns()
        idempotency = IdempotencyKeys(store)
        api_keys = ApiKeys(store.api_keys, settings.api_key.get_secret_value() if settings.api_key else None)
        await api_keys.open()
        counts = None if homes is None else store.quota_counts(homes.host_id)
        quotas = Quotas(store.usage, own_quotas, api_keys.quotas_of, counts)
        await quotas.open()
        store.bounds = quotas.bounds
        await store.webhooks.open()
        key = signing_secret(settings, "webhook-key")
        webhooks = Webhooks(store.webhooks, WebhookSender(reachable), key, cluster, quotas.on_reached, note)
        in_rows, as_files = await store.d1_databases(), shared_directory(settings) / "storage"
        copies = directory / "sql-copies" if homes is not None and settings.database_url is not None else None
        most, is_shared = settings.storage_mb << 20, homes is not None
        async with alone(settings):
            databases = await d1_databases.opened(in_rows, as_files, copies, most, is_shared=is_shared)
        storage = Storage(store.storage_items, blobs, databases, most, quotas, is_shared=is_shared, directory=uploads)
        if homes is not None:
            homes.shares(api_keys.open, quotas.open, store.webhooks.open)
            homes.each_beat(databases.measure_all, store.look_again, storage.count_again)
        await storage.open()
        try:
            if homes is None and (lost := await store.mark_lost()):
                log.warning("runs_lost", count=lost, why="the service stopped while they were under way")
            await sandboxes.start()
            preparations.start()
            if homes is None and (lost := await store.processes.mark_lost()):
                log.warning("processes_lost", count=lost, why="the service stopped while they ran")
            liveness = Liveness()
            moments = LiveSnapshots(snapshots, directory / "uploads")
            pool = SandboxPool(
                sandboxes,
                snapshots,
                package_sets.ensure,
                rules=limit_rules,
                liveness=liveness,
                spares=settings.spares,
                max_warm=settings.max_warm,
                idle_seconds=settings.idle_seconds,
                note=note,
            )
            setups = Setups(
                store,
                packages,
                package_sets,
                turns,
                Builds(pool, network, IndexListeners(), limit_rules),
                Commands(pool, network, snapshots, bound),
                liveness,
                settings.setup_seconds,
                note,
                cluster,
            )
            storage_listeners = StorageListeners(GuestStorage(storage).for_run)
            active_runs = ActiveRuns()
            checkpoints = Checkpoints(store, pool, turns, moments, bound)
            live_sessions = LiveSessions(
                LiveParts(
                    store,
                    store.processes,
                    pool,
                    turns,
                    active_runs,
                    network,
                    storage_listeners,
                    checkpoints,
                    setups.settled,
                    quotas,
                    limit_rules,
                ),
                keep_alive=settings.idle_seconds,
            )
            contexts = Contexts(live_sessions, store, store.processes)
            admission = Admission()
            runs = Runs(
                RunParts(
                    store,
                    pool,
                    network,
                    storage_listeners,
                    snapshots,
                    outputs,
                    bound,
                    liveness,
                    contexts,
                    moments,
                    quotas,
                    store.usage,
                    limit_rules,
                    note,
                    settings.trace_programs,
                ),
                turns,
                idempotency,
                active_runs,
                setups.settled,
                admission,
            )
            live_servers = LiveServers(
                runs,
                active_runs,
                live_sessions,
                pool,
                descriptors,
                idle_seconds=settings.idle_seconds,
                service_seconds=settings.max_timeout,
            )
            inbox = Inbox(
                store.inboxes,
                runs,
                at_a_time=_DELIVERIES if settings.max_warm is None else max(1, settings.max_warm // 2),
                note=note,
                begin_trace=traces.begin,
                cluster=cluster,
            )
            expiry = Expiry(store, pool, cluster, quotas)
            files = SessionFiles(store, snapshots, blobs, turns, spool, transfers, limit_rules, bound, liveness)
            await pool.start()
            await setups.start()
            await inbox.start()
            webhooks.start()
            live_sessions.start()
            usage = Usage(store.usage, cluster, partial(storage.stored_bytes, store.sizes))
            jobs = (
                collect_garbage(snapshots, store, pins, note, cluster),
                expiry.run(),
                remove_packages(setups),
                usage.keep(),
                servers.keep(),
            )

            readiness = Readiness(directory / "uploads", store.check_writable)
            looked_at = (store, store.inboxes, store.webhooks, pool, admission, live_sessions, readiness)
            tickets = Tickets()
            moves: Moves | None = None
            measured = MeasuredParts(
                *looked_at,
                directory,
                notes.flush,
                lambda: blobs.written,
                lambda: 0 if moves is None else moves.count,
                homes,
            )

            async def end_background(seconds: float) -> None:
                """Begin no deliveries any more, and end the runs in the background within so many seconds."""
                await inbox.stop_new_attempts()
                ending = asyncio.create_task(live_sessions.stop(seconds, why_stopped))
                await active_runs.stop_background(seconds)
                await ending

            async def end_runs() -> None:
                """End those that are under way, so that their callers are told: also those that wait for a bucket."""
                blobs.hurry()
                await pool.stop(why_stopped)

            async def serves_at(port: int, hosts_port: int | None, app: ASGIApp) -> None:
                network.serves_at(port, GuestPublicUrls(app).protocol)
                if homes is not None:
                    await homes.reached_at(server.hosts_url(settings, port, hosts_port))

            background = in_background(jobs)
            try:
                others = other_hosts(settings, homes)
                if homes is not None and others is not None:
                    moves = Moves(
                        homes,
                        others,
                        turns,
                        store.session,
                        pool,
                        admission.wanted,
                        live_sessions,
                        packages,
                        (inbox.is_working, setups.is_under_way),
                        tickets.has,
                        readiness.is_likely,
                    )
                assign = None if moves is None else moves.place
                yield Context(
                    settings=settings,
                    rules=limit_rules,
                    sessions=Sessions(
                        store, pool, turns, idempotency, expiry, limit_rules, liveness, admission, setups.kick, assign
                    ),
                    runs=runs,
                    live_sessions=live_sessions,
                    contexts=contexts,
                    checkpoints=checkpoints,
                    processes=SessionProcesses(live_sessions, store.processes, store, idempotency),
                    watching=Watching(live_sessions, store, snapshots),
                    tickets=tickets,
                    live_servers=live_servers,
                    sites=Sites(signing_secret(settings, "site-key"), store, settings.public_host),
                    inbox=inbox,
                    inbox_store=store.inboxes,
                    history=History(store, outputs, active_runs),
                    versions=Versions(store, snapshots, turns, idempotency, bound, liveness),
                    capsules=capsules,
                    storage=storage,
                    idempotency=idempotency,
                    api_keys=api_keys,
                    audit=Audit(store.audit),
                    quotas=quotas,
                    usage=usage,
                    webhooks=webhooks,
                    setups=setups,
                    files=CurrentFiles(files, live_sessions, checkpoints, store, turns),
                    archives=Archives(store, snapshots, blobs, turns, spool, transfers, files, pins),
                    links=Links(signing_secret(settings, "link-key"), store, api_keys),
                    turns=turns,
                    readiness=readiness,
                    store=store,
                    homes=homes,
                    moves=moves,
                    other_hosts=others,
                    list_snapshot=partial(file_pages, snapshots),
                    isolation=sandboxes.isolation,
                    pool_counts=pool.counts,
                    at_a_time=lambda: {"runs": admission.places.count, "sandboxes": pool.places.count},
                    places=pool.places.counts,
                    limits=tuple(settings_in_force(settings)),
                    findings=lambda tls: doctor.findings(sandboxes.tested(), tls),
                    end_background=end_background,
                    end_runs=end_runs,
                    note=note,
                    trace=traces.begin,
                    metrics=KeptText(lambda: metrics_text(metrics, measured)).get,
                    serves_at=serves_at,
                )
            finally:
                for task in background:
                    task.cancel()
                await preparations.stop()
                await asyncio.gather(setups.stop(settings.drain_seconds), end_background(settings.drain_seconds))
                await packages.stop()
                await runs.drain(settings.drain_seconds)
                await end_runs()
                await live_sessions.close()
                await runs.close(server.LAST_ANSWERS_SECONDS)
                await inbox.stop()
                await webhooks.stop()
                if homes is not None:
                    await homes.leave()
                await setups.stop()  # those that are still putting files back: nobody waits for this host any more
        finally:
            await preparations.stop()
            await sandboxes.stop()
            network.stop()
            await databases.close()
            for threads in (transfers, storage, outputs):
                await threads.close()
            await asyncio.to_thread(blobs.close)
            await capsules.close()
            await snapshots.close()
            await store.close()
            notes.flush()


async def cluster_homes(settings: Settings, store: SqlStore) -> Homes | None:
    """This host's part in the cluster, which it has joined; None for a single server. Raises NotReady where another
    host is reached at the same URL."""
    if settings.shared_dir is None:
        return None
    rows = await store.homes()
    homes = Homes(rows, settings.lease_seconds, _end_at_once)
    store.answers_while(lambda: homes.has_lease, lambda: homes.is_late, homes.is_another)
    before = settings.data_dir.resolve() / "host-id"
    if before.exists():
        # Whoever holds the data directory's lock knows that the host which had it is gone.
        await rows.leave(before.read_text())
    if (url := server.fixed_hosts_url(settings)) is not None:
        await homes.check_alone_at(url)
    before.write_text(homes.host_id)
    await homes.start()
    return homes


def server_addresses(settings: Settings, homes: Homes | None) -> ServerAddresses:
    """The addresses of PostgreSQL, S3 and the hosts of the cluster, where there are such."""
    database = [] if settings.database_url is None else place.servers_of(settings.database_url.get_secret_value())

    def hosts() -> list[str]:
        return [] if homes is None else [host.url for host in homes.hosts.values()]

    return ServerAddresses([*database, *s3_client.servers_of(settings.blobs)], hosts)


def _end_at_once() -> None:
    """End a host that was declared dead, as `kill -9` would: all that it still does is void, and others do it by now.
    Whoever watches over it starts it anew."""
    os._exit(os.EX_TEMPFAIL)


def signing_secret(settings: Settings, name: str) -> bytes:
    """A key to sign with: a single server's own, in its data directory, or one that all hosts of a cluster have."""
    if settings.shared_dir is None or settings.cluster_secret is None:
        return signing_key(settings.data_dir.resolve() / name)
    return hmac.digest(settings.cluster_secret.get_secret_value().encode(), name.encode(), hashlib.sha256)


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
