"""The composition root: which concrete parts make a service, in which order they start and stop. No logic."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from ipaddress import ip_address
from pathlib import Path

import structlog
import uvicorn
import uvloop

from era import languages
from era.api.context import Context
from era.api.guest_api import GuestPublicUrls, GuestStorage
from era.api.http import build
from era.api.protocol import Protocol
from era.core.active_runs import ActiveRuns
from era.core.api_keys import ApiKeys
from era.core.capsules.pins import Pins
from era.core.capsules.service import Capsules
from era.core.expiry import Expiry
from era.core.files.archives import Archives
from era.core.files.session_files import SessionFiles
from era.core.files.snapshots import BlobStore, Snapshots
from era.core.files.spool import Slots, Spool, Threads
from era.core.idempotency import IdempotencyKeys
from era.core.limits import Rules
from era.core.metadata import Retention
from era.core.models import Isolation, JsonObject
from era.core.outputs import History, Outputs
from era.core.pool import SandboxPool
from era.core.ports import Limits
from era.core.public.inbox import Inbox
from era.core.public.live_servers import LiveServers
from era.core.runs import Runs
from era.core.sessions import Sessions
from era.core.setup.builds import Builds
from era.core.setup.commands import Commands
from era.core.setup.setups import InstalledPackageSets, Setups
from era.core.storage import Storage
from era.core.turns import Turns
from era.core.versions import Versions
from era.drivers.bubblewrap import BubblewrapDriver
from era.drivers.choice import DriverChoice
from era.drivers.gvisor import GvisorDriver
from era.errors import Conflict, EraError, Forbidden, NoIsolation
from era.languages.go import GO
from era.languages.node import NODE
from era.network import policy
from era.network.authority import BUNDLE
from era.network.connect_supervisor import why_unsupported
from era.network.egress import SandboxNetwork, certificates
from era.network.indexes import IndexListeners
from era.network.storage import StorageListeners
from era.packages.installer import UvAndNpm
from era.settings import Settings
from era.store.blobs import LocalBlobs, make_directory
from era.store.d1_databases import D1Databases
from era.store.metadata import SqlStore
from era.store.s3_blobs import S3Blobs, installation

log = structlog.get_logger()

_GARBAGE_SECONDS = 3600.0
_DESCRIPTORS = 1 << 16
_TRANSFER_THREADS = 8
_LAST_ANSWERS_SECONDS = 5


def rules(settings: Settings) -> Rules:
    """What sessions get and may ask for. A default is never over its maximum: that is raised then."""
    defaults = Limits(
        memory_bytes=settings.memory_mb << 20,
        cpus=settings.cpus,
        pids=settings.pids,
        disk_bytes=settings.disk_mb << 20,
        files=settings.files,
        output_bytes=settings.output_bytes,
        tmp_bytes=settings.tmp_mb << 20,
        write_bytes_per_second=settings.disk_write_mbps << 20,
    )
    maxima = Limits(
        memory_bytes=max(settings.max_memory_mb << 20, defaults.memory_bytes),
        cpus=max(settings.max_cpus, defaults.cpus),
        pids=max(settings.max_pids, defaults.pids),
        disk_bytes=max(settings.max_disk_mb << 20, defaults.disk_bytes),
        files=max(settings.max_files, defaults.files),
        output_bytes=max(settings.max_output_bytes, defaults.output_bytes),
        tmp_bytes=defaults.tmp_bytes,
        write_bytes_per_second=defaults.write_bytes_per_second,
    )
    return Rules(defaults, maxima)


def retention(settings: Settings) -> Retention:
    return Retention(
        versions=settings.versions_kept,
        outputs=settings.outputs_kept,
        grace_seconds=settings.grace_seconds,
        runs=settings.runs_kept,
    )


def cgroup_name(data_dir: Path) -> str:
    """The control group of the service on this data directory: the same after every start, and no other's."""
    return "era-" + hashlib.sha256(bytes(data_dir.resolve())).hexdigest()[:12]


def drivers(settings: Settings, mounts: Mapping[str, Path] | None = None) -> DriverChoice:
    """`mounts` is what sandboxes have of the machine besides runtimes."""
    directory = settings.data_dir.resolve()
    limits = rules(settings).defaults
    group = cgroup_name(directory)
    environments = directory / "environments"
    return DriverChoice(
        {
            "gvisor": GvisorDriver(
                directory / "gvisor",
                limits,
                cgroup_name=f"{group}-gvisor",
                environments=environments,
                certificates=certificates(),
                mounts=mounts,
                why_offline=why_unsupported,
            ),
            "bubblewrap": BubblewrapDriver(
                directory,
                limits,
                cgroup_name=group,
                environments=environments,
                certificates=certificates(),
                mounts=mounts,
                why_offline=why_unsupported,
            ),
        },
        settings.isolation,
    )


def installer(settings: Settings, blobs: BlobStore) -> UvAndNpm:
    python = languages.runtime("python")
    return UvAndNpm(
        settings.data_dir.resolve(),
        blobs,
        python=python.cold[0],
        python_prefix=next(iter(python.mounts.values()), None),
        node=languages.runtime("node").mounts[NODE],
        go=languages.runtimes()["go"].mounts[GO] if "go" in languages.runtimes() else None,
        seconds=settings.setup_seconds,
        most_bytes=settings.disk_mb << 20,
        most_files=settings.files,
        variables=dict(os.environ),
    )


def blob_store(settings: Settings) -> LocalBlobs | S3Blobs:
    """Raises BadRequest where the setting makes no sense."""
    directory = settings.data_dir.resolve()
    if not settings.blobs:
        return LocalBlobs(directory / "blobs")
    return S3Blobs(
        settings.blobs,
        directory / "blob-cache",
        cache_bytes=settings.blob_cache_mb << 20,
        owner=installation(directory / "store-id"),
    )


@asynccontextmanager
async def services(settings: Settings) -> AsyncIterator[Context]:
    """Everything behind the API, started; stopped again on the way out.

    Raises Conflict where another service uses the data directory, NoIsolation where sandboxes can't be had, BadRequest
    for settings that make no sense.
    """
    directory = settings.data_dir.resolve()
    make_directory(directory)
    private = policy.ranges(settings.egress_private)
    with _only_user_of(directory):
        blobs = blob_store(settings)
        await asyncio.to_thread(blobs.open)
        store = SqlStore(f"sqlite:///{directory / 'era.sqlite'}", retention(settings))
        await store.open()
        slots = Slots(settings.max_uploads)
        spool = Spool(directory / "uploads", slots)
        spool.open()
        transfers = Threads(_TRANSFER_THREADS, "era-transfer")
        snapshots = Snapshots(blobs)
        outputs = Outputs(blobs, settings.outputs_kept)
        packages = installer(settings, blobs)
        await asyncio.to_thread(packages.open)
        pins = Pins(packages.digests)
        environments = InstalledPackageSets(store, packages)
        capsules = Capsules(
            store, snapshots, blobs, pins, environments, directory, max_timeout=settings.max_timeout, slots=slots
        )
        network = SandboxNetwork(private)
        bundle = directory / "certificates.pem"
        network.authority.write(bundle)
        sandboxes = drivers(settings, {BUNDLE: bundle})
        bounds = rules(settings)
        turns = Turns(settings.max_waiting)
        keys = IdempotencyKeys(store)
        api_keys = ApiKeys(store, settings.api_key.get_secret_value() if settings.api_key else None)
        await api_keys.open()
        databases = D1Databases(
            directory / "storage" / "sql",
            settings.storage_database_mb << 20,
            before=directory / "storage" / "d1",
        )
        databases.open()
        storage = Storage(store, blobs, databases, settings.storage_mb << 20)
        await storage.open()
        try:
            if lost := await store.mark_lost():
                log.warning("runs_lost", count=lost, why="the service stopped while they were under way")
            await sandboxes.start()
            host = SandboxPool(
                sandboxes,
                snapshots,
                environments,
                rules=bounds,
                spares=settings.spares,
                max_warm=settings.max_warm,
                idle_seconds=settings.idle_seconds,
            )
            setups = Setups(
                store,
                packages,
                environments,
                turns,
                Builds(host, network, IndexListeners(), bounds),
                Commands(host, network, snapshots),
                settings.setup_seconds,
            )
            guest_listeners = StorageListeners(GuestStorage(storage, settings.body_idle_seconds).for_run)
            active_runs = ActiveRuns()
            runs = Runs(
                store, host, network, guest_listeners, snapshots, outputs, turns, keys, setups.settled, active_runs
            )
            live_servers = LiveServers(
                runs,
                active_runs,
                host,
                idle_seconds=settings.idle_seconds,
                service_seconds=settings.max_timeout,
            )
            inbox = Inbox(store, runs, at_a_time=max(1, settings.max_warm // 2))
            expiry = Expiry(store, host)
            files = SessionFiles(store, snapshots, blobs, turns, spool, transfers, bounds)
            await host.start()
            await setups.start()
            await inbox.start()
            jobs = (_collect_garbage(snapshots, store, pins), expiry.run(), _remove_environments(setups))

            async def end_background(seconds: float) -> None:
                inbox.begin_nothing()
                await active_runs.stop_background(seconds)

            background = [asyncio.create_task(job) for job in jobs]
            try:
                yield Context(
                    settings=settings,
                    rules=bounds,
                    sessions=Sessions(store, host, turns, keys, expiry, bounds, setups.kick),
                    runs=runs,
                    live_servers=live_servers,
                    inbox=inbox,
                    deliveries=store,
                    history=History(store, outputs, active_runs),
                    versions=Versions(store, snapshots, turns, keys),
                    capsules=capsules,
                    storage=storage,
                    keys=keys,
                    api_keys=api_keys,
                    setups=setups,
                    session_files=files,
                    archives=Archives(store, snapshots, blobs, turns, spool, transfers, files, slots),
                    turns=turns,
                    store=store,
                    files=snapshots.entries,
                    isolation=sandboxes.isolation,
                    pool_counts=host.counts,
                    end_background=end_background,
                    end_runs=host.stop,
                    serves_at=lambda port, app: network.serves_at(port, GuestPublicUrls(app).protocol),
                )
            finally:
                for task in background:
                    task.cancel()
                await setups.stop()
                await packages.stop()
                await end_background(settings.drain_seconds)
                await runs.drain(settings.drain_seconds)
                await host.stop()
                await runs.drain(_LAST_ANSWERS_SECONDS)
                await inbox.stop()
        finally:
            await sandboxes.stop()
            network.stop()
            await databases.close()
            await transfers.close()
            await asyncio.to_thread(blobs.close)
            await capsules.close()
            await snapshots.close()
            await store.close()


async def examine() -> tuple[dict[Isolation, JsonObject | NoIsolation], Isolation | None]:
    """What each kind of sandbox has in force on this machine, from real ones of every language, or why it can't be had;
    and which one `auto` is, if any works."""
    with tempfile.TemporaryDirectory(prefix="era-doctor-") as directory:
        sandboxes = drivers(Settings(data_dir=Path(directory)))
        try:
            found = await sandboxes.examine()
        finally:
            await sandboxes.stop()
    return found, next((name for name, seen in found.items() if not isinstance(seen, NoIsolation)), None)


async def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. `say` gets the lines for the person who started it."""
    if not _is_loopback(settings.host) and settings.api_key is None and not settings.allow_no_key:
        raise Forbidden(
            f"Without an API key ERA serves loopback only, not {settings.host}: whoever reaches it could run code.",
            hint="Set ERA_API_KEY, or insist with --allow-no-key.",
        )
    _log_at(settings.log_level)
    async with services(settings) as context:
        app = build(settings, context)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            http=Protocol,
            ws="none",
            timeout_graceful_shutdown=int(settings.drain_seconds) + _LAST_ANSWERS_SECONDS,
        )

        def ready(port: int) -> None:
            context.serves_at(port, app)
            _announce(settings, context, port, say)

        server = _Server(config, settings.drain_seconds, context, ready)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        await server.serve()


def run_service(settings: Settings, say: Callable[[str], None]) -> None:
    """`serve` on an event loop of its own."""
    _allow_descriptors()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, say))


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to us, since it would end the process before our services are stopped, and that ends
    the runs still under way in time for their callers to be told."""

    def __init__(
        self, config: uvicorn.Config, drain_seconds: float, context: Context, ready: Callable[[int], None]
    ) -> None:
        super().__init__(config)
        self._drain_seconds = drain_seconds
        self._context = context
        self._ready = ready

    def stop(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_runs())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_runs(self) -> None:
        background = asyncio.create_task(self._context.end_background(self._drain_seconds))
        await asyncio.sleep(self._drain_seconds)
        await background
        await self._context.end_runs()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready(self.servers[0].sockets[0].getsockname()[1])


async def _remove_environments(setups: Setups) -> None:
    while True:
        try:
            await setups.sweep()
        except (EraError, OSError) as error:
            log.warning("environments_not_removed", error=str(error))
        await asyncio.sleep(_GARBAGE_SECONDS)


async def _collect_garbage(snapshots: Snapshots, store: SqlStore, pins: Pins) -> None:
    while True:
        await clear_away(snapshots, store, pins)
        await asyncio.sleep(_GARBAGE_SECONDS)


async def clear_away(snapshots: Snapshots, store: SqlStore, pins: Pins) -> None:
    """Drop what is too old, then the content that nothing needs any more."""
    try:
        await store.forget_keys()
        await store.prune_runs()
        await snapshots.collect_garbage(*await pins.needed(store))
    except EraError as error:
        log.warning("garbage_not_collected", error=error.message)


def _announce(settings: Settings, context: Context, port: int, say: Callable[[str], None]) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    isolation = context.isolation()
    say(f"ERA serves   http://{host}:{port}   (/docs tells how to call it)")
    say(f"data         {settings.data_dir.resolve()}")
    say(f"isolation    {isolation['summary']}")
    if settings.api_key is not None:
        say("access       with the API key")
    elif context.api_keys.wanted:
        say("access       with a stored key; start with ERA_API_KEY set to make or revoke any")
    elif _is_loopback(settings.host):
        say("access       no API key: this machine only, and no web page in its browsers")
    else:
        say("access       ANYBODY who reaches this address can run code: there is no API key")


@contextmanager
def _only_user_of(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"Another ERA service uses {directory}.", hint="Stop it, or choose another directory with --data-dir."
            ) from None
        yield


def _allow_descriptors() -> None:
    """Let this process hold as many as it may, up to what many runs with many connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _log_at(level: str) -> None:
    """Plain lines on stderr. Tracebacks come without local variables: those hold code, data and env of users."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper("iso", utc=True),
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
