"""Which parts make a service, in groups: a function makes each group of those before it. No logic."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from era import languages
from era.api.guest_api import GuestStorage
from era.api.hosts.other_hosts import OtherHosts, other_hosts
from era.choices import (
    blob_store,
    cluster_homes,
    drivers,
    installer,
    open_store,
    server_addresses,
    signing_secret,
)
from era.core.capsules.service import Capsules
from era.core.cluster.homes import Homes
from era.core.cluster.moves import Moves
from era.core.concurrency.shares import Shares
from era.core.concurrency.tasks import Threads, transfer_threads
from era.core.concurrency.turns import Liveness, Turns
from era.core.execution.active_runs import ActiveRuns
from era.core.files.archives import Archives
from era.core.files.current_files import CurrentFiles
from era.core.files.session_files import SessionFiles
from era.core.limits import Rules
from era.core.live.checkpoints import Checkpoints
from era.core.live.contexts import Contexts
from era.core.live.live_sessions import LiveParts, LiveSessions
from era.core.operation.readiness import Readiness
from era.core.owners.api_keys import ApiKeys, Tickets
from era.core.owners.quotas import Amounts, Quotas
from era.core.owners.usage import Usage
from era.core.owners.webhooks import Webhooks
from era.core.pool.admission import Admission
from era.core.pool.pool import MOVED, SERVICE_STOPPED, SandboxPool
from era.core.ports import ALONE, Cluster
from era.core.public.inbox_worker import Inbox
from era.core.public.live_servers import LiveServers
from era.core.runs.outputs import Outputs
from era.core.runs.runs import Runs
from era.core.runs.session_run import RunParts
from era.core.sessions.expiry import Expiry
from era.core.sessions.idempotency import IdempotencyKeys
from era.core.sessions.versions import HistoryBound
from era.core.setup.commands import Build, Commands
from era.core.setup.package_sets import InstalledPackageSets
from era.core.setup.setups import Setups
from era.core.storage.storage import Storage
from era.core.telemetry import Note
from era.core.trees.live_snapshots import LiveSnapshots
from era.core.trees.pins import Pins
from era.core.trees.snapshots import Snapshots
from era.core.trees.spool import Slots, Spool
from era.drivers.choice import DriverChoice
from era.drivers.preparations import Preparations
from era.network import policy
from era.network.authority import BUNDLE
from era.network.egress import SandboxNetwork
from era.network.indexes import IndexListeners
from era.network.policy import ServerAddresses
from era.network.storage import StorageListeners
from era.network.webhooks import WebhookSender
from era.packages.installer import PackageInstaller
from era.server import server
from era.server.bounds import quotas_by_default, rules
from era.server.directory_locks import alone, shared_directory
from era.settings import Settings
from era.store.blobs.blobs import LocalBlobs
from era.store.blobs.s3_blobs import S3Blobs, check_bucket
from era.store.d1 import d1_databases
from era.store.d1.d1_databases import D1Databases
from era.store.metadata import SqlStore
from era.telemetry.traces import Tracer

_DELIVERIES = 16
"""Deliveries of inboxes that run at a time, where no setting bounds the sandboxes."""


@dataclass(frozen=True)
class Base:
    """What all other parts build on: settings, rows, content, and this host's part in a cluster."""

    settings: Settings
    directory: Path
    rules: Rules
    own_quotas: Amounts
    """Quotas of owners and keys that have none of their own."""

    note: Note
    traces: Tracer
    store: SqlStore
    blobs: LocalBlobs | S3Blobs
    homes: Homes | None
    addresses: ServerAddresses
    reachable: policy.Policy
    turns: Turns
    idempotency: IdempotencyKeys

    @property
    def cluster(self) -> Cluster:
        return self.homes or ALONE

    @property
    def why_stopped(self) -> str:
        """The reason that processes are given when this service stops."""
        return SERVICE_STOPPED if self.homes is None else MOVED


@dataclass(frozen=True)
class Files:
    """Content of sessions: trees of files, outputs, packages, capsules."""

    snapshots: Snapshots
    moments: LiveSnapshots
    outputs: Outputs
    history: HistoryBound
    packages: PackageInstaller
    pins: Pins
    package_sets: InstalledPackageSets
    spool: Spool
    transfers: Threads
    capsules: Capsules


@dataclass(frozen=True)
class Owners:
    """What belongs to owners and keys rather than to sessions."""

    api_keys: ApiKeys
    quotas: Quotas
    webhooks: Webhooks
    databases: D1Databases
    storage: Storage
    usage: Usage


@dataclass(frozen=True)
class Sandboxes:
    """The sandboxes and their network."""

    network: SandboxNetwork
    descriptors: Shares[str]
    preparations: Preparations
    drivers: DriverChoice
    liveness: Liveness
    pool: SandboxPool


@dataclass(frozen=True)
class Work:
    """What runs in sandboxes: setups, runs, live sessions, public servers, deliveries."""

    setups: Setups
    admission: Admission
    active_runs: ActiveRuns
    checkpoints: Checkpoints
    live_sessions: LiveSessions
    contexts: Contexts
    runs: Runs
    live_servers: LiveServers
    inbox: Inbox
    expiry: Expiry


@dataclass(frozen=True)
class Reached:
    """What only calls of the API, or other hosts, make use of."""

    tickets: Tickets
    readiness: Readiness
    others: OtherHosts | None
    moves: Moves | None
    files: CurrentFiles
    archives: Archives


async def build_base(settings: Settings, note: Note, traces: Tracer) -> Base:
    """Open the database and the blobs, and join the cluster if there is one."""
    private = policy.private_ranges(settings.egress_private)
    closed = policy.ranges(settings.egress_refused, "ERA_EGRESS_REFUSED")
    limit_rules, own_quotas = rules(settings), quotas_by_default(settings)
    async with alone(settings):
        if settings.blobs:  # before anything is made of which one would have to know that it is of no use
            await asyncio.to_thread(check_bucket, settings.blobs, shared_directory(settings) / "store-id")
        store = await open_store(settings)
        blobs = blob_store(settings)
        await asyncio.to_thread(blobs.open)
    homes = await cluster_homes(settings, store)
    if homes is not None and isinstance(blobs, S3Blobs):
        blobs.share(store.condemned())
    addresses = server_addresses(settings, homes)
    await addresses.look()
    return Base(
        settings,
        settings.data_dir.resolve(),
        limit_rules,
        own_quotas,
        note,
        traces,
        store,
        blobs,
        homes,
        addresses,
        policy.Policy(private, closed, addresses),
        Turns(),
        IdempotencyKeys(store),
    )


async def build_files(base: Base) -> Files:
    settings, directory, store, blobs = base.settings, base.directory, base.store, base.blobs
    uploads, slots = directory / "uploads", Slots()
    spool = Spool(uploads, slots)
    spool.open()
    snapshots = Snapshots(blobs)
    packages = installer(settings, blobs)
    await asyncio.to_thread(packages.open)
    pins = Pins(packages.digests, shared=base.homes is not None)
    package_sets = InstalledPackageSets(store, packages)
    history = HistoryBound(store, snapshots, base.rules, settings.history_mb << 20)
    return Files(
        snapshots,
        LiveSnapshots(snapshots, uploads),
        Outputs(blobs, settings.outputs_kept, uploads),
        history,
        packages,
        pins,
        package_sets,
        spool,
        transfer_threads(),
        Capsules(
            store,
            snapshots,
            blobs,
            pins,
            package_sets,
            directory,
            slots,
            settings.max_timeout,
            base.rules.largest_tree,
            history,
        ),
    )


async def build_owners(base: Base, files: Files) -> Owners:
    settings, store, homes = base.settings, base.store, base.homes
    api_keys = ApiKeys(store.api_keys, settings.api_key.get_secret_value() if settings.api_key else None)
    await api_keys.open()
    counts = None if homes is None else store.quota_counts(homes.host_id)
    quotas = Quotas(store.usage, base.own_quotas, api_keys.quotas_of, counts)
    await quotas.open()
    store.bounds = quotas.bounds
    key, sender = signing_secret(settings, "webhook-key"), WebhookSender(base.reachable)
    webhooks = Webhooks(store.webhooks, sender, key, base.cluster, quotas.on_reached, base.note)
    in_rows, as_files = await store.d1_databases(), shared_directory(settings) / "storage"
    copies = base.directory / "sql-copies" if homes is not None and settings.database_url is not None else None
    most, is_shared = settings.storage_mb << 20, homes is not None
    async with alone(settings):
        databases = await d1_databases.opened(in_rows, as_files, copies, most, is_shared=is_shared)
    storage = Storage(
        store.storage_items,
        base.blobs,
        databases,
        most,
        quotas,
        is_shared=is_shared,
        directory=base.directory / "uploads",
    )
    if homes is not None:
        homes.shares(api_keys.open, quotas.open)
        homes.each_beat(databases.measure_all, storage.count_again)
    await storage.open()
    usage = Usage(store.usage, base.cluster, partial(storage.stored_bytes, store.sizes))
    return Owners(api_keys, quotas, webhooks, databases, storage, usage)


def build_sandboxes(base: Base, files: Files) -> Sandboxes:
    settings, directory = base.settings, base.directory
    descriptors: Shares[str] = Shares(server.descriptor_limit() // 2)
    network = SandboxNetwork(descriptors, base.reachable, base.addresses.has_host)
    bundle = directory / "certificates.pem"
    network.authority.write(bundle)
    preparations = Preparations(languages.preparations(), directory / "prepared")
    choice, liveness = drivers(settings, {BUNDLE: bundle}, preparations), Liveness()
    pool = SandboxPool(
        choice,
        files.snapshots,
        files.package_sets.ensure,
        rules=base.rules,
        liveness=liveness,
        spares=settings.spares,
        max_warm=settings.max_warm,
        idle_seconds=settings.idle_seconds,
        note=base.note,
    )
    return Sandboxes(network, descriptors, preparations, choice, liveness, pool)


def build_work(base: Base, files: Files, owners: Owners, sandboxes: Sandboxes) -> Work:
    settings, pool, active_runs, admission = base.settings, sandboxes.pool, ActiveRuns(), Admission()
    storage = StorageListeners(GuestStorage(owners.storage).for_run)
    setups = build_setups(base, files, sandboxes)
    checkpoints = Checkpoints(base.store, pool, base.turns, files.moments, files.history)
    live_parts = LiveParts(
        base.store,
        pool,
        base.turns,
        active_runs,
        sandboxes.network,
        storage,
        checkpoints,
        setups.settled,
        owners.quotas,
        base.rules,
    )
    live_sessions = LiveSessions(live_parts, keep_alive=settings.idle_seconds)
    contexts = Contexts(live_sessions, base.store)
    run_parts = build_run_parts(base, files, owners, sandboxes, storage, contexts)
    runs = Runs(run_parts, base.turns, base.idempotency, active_runs, setups.settled, admission)
    live_servers = LiveServers(
        runs,
        active_runs,
        live_sessions,
        pool,
        sandboxes.descriptors,
        idle_seconds=settings.idle_seconds,
        service_seconds=settings.max_timeout,
    )
    inbox = Inbox(
        base.store.inboxes,
        runs,
        at_a_time=_DELIVERIES if settings.max_warm is None else max(1, settings.max_warm // 2),
        note=base.note,
        begin_trace=base.traces.begin,
        cluster=base.cluster,
    )
    expiry = Expiry(base.store, pool, base.cluster, owners.quotas)
    return Work(setups, admission, active_runs, checkpoints, live_sessions, contexts, runs, live_servers, inbox, expiry)


def build_setups(base: Base, files: Files, sandboxes: Sandboxes) -> Setups:
    pool, network = sandboxes.pool, sandboxes.network
    return Setups(
        base.store,
        files.packages,
        files.package_sets,
        base.turns,
        partial(Build, pool, network, IndexListeners(), base.rules),
        Commands(pool, network, files.snapshots, files.history),
        sandboxes.liveness,
        base.settings.setup_seconds,
        base.note,
        base.cluster,
    )


def build_run_parts(
    base: Base, files: Files, owners: Owners, sandboxes: Sandboxes, storage: StorageListeners, contexts: Contexts
) -> RunParts:
    return RunParts(
        base.store,
        sandboxes.pool,
        sandboxes.network,
        storage,
        files.snapshots,
        files.outputs,
        files.history,
        sandboxes.liveness,
        contexts,
        files.moments,
        owners.quotas,
        base.store.usage,
        base.rules,
        base.note,
        base.settings.trace_programs,
    )


def build_reached(base: Base, files: Files, sandboxes: Sandboxes, work: Work) -> Reached:
    store, turns = base.store, base.turns
    tickets, readiness = Tickets(), Readiness(base.directory / "uploads", store.check_writable)
    others = other_hosts(base.settings, base.homes)
    moves: Moves | None = None
    if base.homes is not None and others is not None:
        moves = Moves(
            base.homes,
            others,
            turns,
            store.session,
            sandboxes.pool,
            work.live_sessions,
            files.packages,
            (work.inbox.is_working, work.setups.is_under_way),
            tickets.has,
            readiness.is_likely,
        )
    content = SessionFiles(
        store,
        files.snapshots,
        base.blobs,
        turns,
        files.spool,
        files.transfers,
        base.rules,
        files.history,
        sandboxes.liveness,
    )
    archives = Archives(store, files.snapshots, base.blobs, turns, files.spool, files.transfers, content, files.pins)
    current_files = CurrentFiles(content, work.live_sessions, work.checkpoints, store, turns)
    return Reached(tickets, readiness, others, moves, current_files, archives)
