"""The metadata store: sessions, their versions and the records of their runs, in an SQL database.

Each public method is one transaction. database.py tells how they get there, commits.py how versions come about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, func, literal, select, union

from era.store.api_keys import ApiKeyRows
from era.store.capsules import CapsuleRows
from era.store.commits import IS_LIVE
from era.store.inbox import InboxRows
from era.store.runs import LOST
from era.store.setups import SetupRows
from era.store.storage_items import StorageItemRows
from era.store.tables import idempotency_keys, outputs, runs, sessions, storage_items, versions
from era.store.versions import VersionRows

__all__ = ["LOST", "SqlStore"]

_SNAPSHOT_ROOTS = select(versions.c.snapshot_root).where(versions.c.snapshot_root.is_not(None)).distinct()
_OUTPUT_DIGESTS = union(
    *(
        select(table.c[name]).where(table.c[name].is_not(None))
        for table in (outputs, idempotency_keys)
        for name in ("stdout_digest", "stderr_digest")
    ),
    select(storage_items.c.digest).where(storage_items.c.digest.is_not(None)),
)
_COUNT_SESSIONS = select(func.count()).select_from(sessions).where(IS_LIVE)
_COUNT_RUNS = select(runs.c.status, func.count()).where(~runs.c.imported).group_by(runs.c.status)


class SqlStore(CapsuleRows, VersionRows, SetupRows, StorageItemRows, InboxRows, ApiKeyRows):
    """A MetadataStore in an SQL database. `open` before anything, `close` when done."""

    async def snapshot_roots(self) -> Sequence[str]:
        return await self._read(lambda connection: list(connection.execute(_SNAPSHOT_ROOTS).scalars()))

    async def output_digests(self) -> Sequence[str]:
        return await self._read(lambda connection: list(connection.execute(_OUTPUT_DIGESTS).scalars()))

    async def ping(self) -> None:
        await self._read(lambda connection: connection.execute(select(literal(1))).scalar_one())

    async def counts(self) -> dict[str, Any]:
        """`{"sessions": n, "runs": {status: n}}`, the runs that were here; both counted in an index alone."""

        def job(connection: Connection) -> dict[str, Any]:
            by_status = {row[0]: row[1] for row in connection.execute(_COUNT_RUNS)}
            return {"sessions": connection.execute(_COUNT_SESSIONS).scalar_one(), "runs": by_status}

        return await self._read(job)
