"""Which concrete parts the settings choose: sandboxes, installers, database, blobs, this host's part in a cluster."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from era import languages
from era.core.cluster.homes import Homes
from era.core.files.links import signing_key
from era.core.trees.blob_store import BlobStore
from era.drivers.bubblewrap import BubblewrapDriver
from era.drivers.cgroups import cgroup_name
from era.drivers.choice import DriverChoice
from era.drivers.gvisor import GvisorDriver
from era.drivers.preparations import Preparations
from era.languages.go import GO
from era.languages.node import NODE
from era.languages.python import base_executable, installation_directory
from era.network.connect_supervisor import why_unsupported
from era.network.egress import certificates
from era.network.policy import ServerAddresses
from era.packages.installer import PackageInstaller
from era.server import server
from era.server.bounds import retention, rules
from era.server.directory_locks import shared_directory
from era.settings import Settings
from era.store import place
from era.store.blobs import s3_client
from era.store.blobs.blobs import LocalBlobs
from era.store.blobs.s3_blobs import S3Blobs, installation
from era.store.metadata import SqlStore


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
    runtimes = {"node": languages.runtime("node").mounts[NODE]}
    if "go" in languages.runtimes():
        runtimes["go"] = languages.runtime("go").mounts[GO]
    return PackageInstaller(
        settings.data_dir.resolve(),
        blobs,
        shared=shared_directory(settings),
        python=str(base_executable()),
        python_prefix=installation_directory(),
        runtimes=runtimes,
        seconds=settings.setup_seconds,
        most_bytes=settings.disk_mb << 20,
        most_files=settings.files,
        variables=dict(os.environ),
    )


def blob_store(settings: Settings) -> LocalBlobs | S3Blobs:
    """Make the blob store: on the local disk, or in an S3 bucket. Raises BadRequest for an invalid setting."""
    directory = settings.data_dir.resolve()
    if not settings.blobs:
        host = cgroup_name(directory) + "." if settings.shared_dir else ""
        return LocalBlobs(shared_directory(settings) / "blobs", host)
    cache, owner = directory / "blob-cache", installation(shared_directory(settings) / "store-id")
    return S3Blobs(settings.blobs, cache, cache_bytes=settings.blob_cache_mb << 20, owner=owner)


async def open_store(settings: Settings) -> SqlStore:
    """Open the store of rows: in the data directory, or in PostgreSQL. Raises NotReady or Unavailable."""
    named = settings.database_url.get_secret_value() if settings.database_url else None
    lease = None if settings.shared_dir is None else settings.lease_seconds
    return await place.open_store(shared_directory(settings), named, retention(settings), lease)


async def cluster_homes(settings: Settings, store: SqlStore) -> Homes | None:
    """This host's part in the cluster, which it has joined; None for a single server. Raises NotReady where another
    host is reached at the same URL."""
    if settings.shared_dir is None:
        return None
    rows = await store.homes()
    homes = Homes(rows, settings.lease_seconds, _end_at_once)
    store.database.fence.is_another = homes.is_another
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
