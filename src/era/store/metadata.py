"""The metadata store: sessions, their versions and the records of their runs, in an SQL database.

`SqlStore` is the adapter of the core's MetadataStore. Its methods are in the module of each noun, in a class whose
methods are transactions (rows.py). Functions there that take a `Connection` do their work within the caller's
transaction.

Rows that share no transaction with sessions and runs have ports of their own in the core, and adapters of their own
here: inboxes, storage items and API keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, literal, select

from era.core.metadata import Retention
from era.store import quotas
from era.store.api_keys import ApiKeyRows, AuditRows
from era.store.blobs.condemned import Condemned, fence_dead_hosts, lose_some_homes
from era.store.capsules import CapsuleRows
from era.store.d1.d1_replicas import DatabaseReplicas
from era.store.engine.database import Database
from era.store.homes import HomeRows
from era.store.inbox import InboxRows
from era.store.outputs import OUTPUT_DIGESTS
from era.store.processes import ProcessRows
from era.store.quota_counts import QuotaCounts
from era.store.rows import reads, writes
from era.store.runs import RunRows, count_runs
from era.store.sessions import count_sessions
from era.store.setups import SetupRows
from era.store.storage_items import StorageItemRows
from era.store.usage import UsageRows
from era.store.versions import VersionRows
from era.store.webhooks import WebhookRows

_DEFAULT_RETENTION = Retention()


class SqlStore(CapsuleRows, VersionRows, RunRows, SetupRows, ProcessRows):
    """A MetadataStore in an SQL database, and the other rows that it holds. `open` before anything, `close` when done.

    What each method does, takes and raises stands in MetadataStore.
    """

    def __init__(
        self,
        url: str,
        retention: Retention = _DEFAULT_RETENTION,
        *,
        alone: bool = True,
        lease_seconds: float | None = None,
    ) -> None:
        """`url` is SQLAlchemy's, such as `sqlite:////path/to/era.db` or `postgresql://user@host/era`; `alone` says that
        no other service may use the database (dialects.py). `lease_seconds` are those of a host of a cluster."""
        # A host that is paused in the middle of a transaction, whose lease ends, must not hold what the others need to
        # notice that: they would wait until theirs had ended, too.
        self._hangs_within = lease_seconds and lease_seconds / 2
        super().__init__(Database(url, alone=alone, hangs_within=self._hangs_within), retention)
        self.inboxes = InboxRows(self.database, retention)
        self.storage_items = StorageItemRows(self.database)
        self.api_keys = ApiKeyRows(self.database)
        self.audit = AuditRows(self.database)
        self._own_database: Database | None = None
        """The connections of homes,"""

        self._beats_database: Database | None = None
        """and those of heartbeats."""

        self._d1_database: Database | None = None
        """Those of programs' SQL databases: a large one keeps no commit waiting."""

        self._quota_database: Database | None = None
        self._alone = alone
        self.usage = UsageRows(self.database)
        self.webhooks = WebhookRows(self.database)
        self._url = url

    async def homes(self) -> HomeRows:
        """The rows of a cluster's hosts and homes, on connections of their own, which notice within half of a lease
        that they are cut off. Call it once, on an open store that isn't `alone`."""
        half = self._hangs_within
        own = beats = Database(self._url, alone=False, notices_within=half, hangs_within=half)
        await own.open()
        if own.engines.writer.dialect.name != "sqlite":  # where another writer would only be one more that waits
            waits = half and half / 2.5
            beats = Database(self._url, alone=False, notices_within=half, hangs_within=half, waits_within=waits)
        self._own_database, self._beats_database = own, beats
        return HomeRows(beats, own, self.database)

    def quota_counts(self, host_id: str) -> QuotaCounts:
        """The rows in which this host of a cluster counts for quotas, on connections of their own, which are made when
        there is something to count. Call it once, on an open store."""
        self._quota_database = Database(self._url, alone=False, hangs_within=self._hangs_within, name=host_id)
        return QuotaCounts(self._quota_database, host_id)

    async def d1_databases(self) -> DatabaseReplicas:
        """The rows of programs' SQL databases. Call it once, on an open store."""
        if self._alone or self.database.engines.writer.dialect.name == "sqlite":
            return DatabaseReplicas(self.database)
        host_id = self.database.fence.host_id
        self._d1_database = Database(self._url, alone=False, hangs_within=self._hangs_within, name=host_id)
        self._d1_database.fence.host_id = host_id
        await self._d1_database.open()
        return DatabaseReplicas(self._d1_database)

    async def open(self) -> None:
        """Connect and bring the schema up to date. Raises NotReady, Unavailable."""
        await self.database.open()

    async def close(self) -> None:
        """Let what has begun finish, then disconnect. May be called twice."""
        await self.usage.close()
        for own in (self._own_database, self._beats_database, self._d1_database, self._quota_database):
            if own is not None:
                await own.close()
        await self.database.close()

    @reads
    def output_digests(self, connection: Connection) -> Sequence[str]:
        return list(connection.execute(OUTPUT_DIGESTS).scalars())

    async def fence_dead_hosts(self) -> bool:
        if self.database.fence.host_id is not None:
            while await self.database.write(lose_some_homes):
                pass
        return await self.database.write(fence_dead_hosts)

    def condemned(self) -> Condemned:
        """The rows by which hosts remove content from a bucket that they share. Call it on the store's loop."""
        return Condemned(self.database)

    @reads
    def ping(self, connection: Connection) -> None:
        connection.execute(select(literal(1)))

    @writes
    def check_writable(self, connection: Connection) -> None:
        connection.execute(select(literal(1)))

    async def counts(self) -> dict[str, Any]:
        def job(connection: Connection) -> dict[str, Any]:
            return {"sessions": count_sessions(connection), "runs": count_runs(connection)}

        # Everybody may ask for metrics, and these go over whole tables: they take one reader at most.
        return await self.database.read_for("", job)

    @reads
    def sizes(self, connection: Connection) -> Mapping[str, tuple[int, int]]:
        return quotas.sizes(connection)
