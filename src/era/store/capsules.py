"""Whole sessions: read at one moment, and made all at once.

A session may have more rows than one transaction should write, since everybody else's would wait for it. So its own row
comes first, hidden; versions and runs follow in small transactions, which they share with nobody but which let others
in between; and the last one shows it. Whatever ends that on the way leaves a session that is gone for everybody, and is
purged like others that are gone.

The rows of an imported session are as they were elsewhere, with three exceptions. What this server wouldn't keep any
more is dropped. A run whose id is in use here gets the new session's key behind its id. And each run is marked, in its
record for people and in a column for the numbers, because the isolation it tells of isn't this server's.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial

from sqlalchemy import Connection, bindparam, insert, select

from era.core.metadata import Retention
from era.core.models import KeptOutputs, KeptRun, OwnedId, RunRecord, Session, VersionContent, now
from era.errors import BadRequest, Unavailable
from era.store import dialects
from era.store.commits import VERSIONS, version_of
from era.store.outputs import COLUMNS
from era.store.records import RUN_FIELDS, RUNS, record_of
from era.store.runs import RunRows
from era.store.sessions import SessionRows
from era.store.tables import outputs, runs, versions

IMPORTED = {"imported": True}
"""What `enforced` says of a run that was elsewhere."""

_BATCH_ROWS = 50
_BATCH_BYTES = 256 << 10
"""A transaction of an import has so many rows, or data and outputs of so many bytes, and then the others' turn comes:
it takes a few milliseconds."""

_VERSIONS = (
    VERSIONS.add_columns(versions.c.data)
    .where(versions.c.n >= bindparam("first"))
    .order_by(versions.c.n)
    .execution_options(stream_results=True)
)
_RUNS = (
    RUNS.add_columns(outputs.c.run_key, *(outputs.c[name] for name in COLUMNS))
    .join_from(
        runs, outputs, (outputs.c.session_key == runs.c.session_key) & (outputs.c.run_key == runs.c.key), isouter=True
    )
    .where(runs.c.session_key == bindparam("session"), runs.c.status != "running")
    .order_by(runs.c.key)
    .execution_options(stream_results=True)
)
_FOREIGN_FIELDS = [field.name for field in fields(RunRecord) if field.name != "key"]
_NEW_RUN = (
    insert(runs)
    .values({name: bindparam(f"new_{name}") for name in (*_FOREIGN_FIELDS, "imported")})
    .returning(runs.c.key)
)
_SESSION_OF_RUN = select(runs.c.session_key).where(runs.c.id == bindparam("run_id"))


class CapsuleRows(SessionRows, RunRows):
    """The part of SqlStore that deals in whole sessions."""

    def __init__(self, url: str, retention: Retention = Retention()) -> None:  # noqa: B008 - it is frozen
        super().__init__(url, retention)
        self._foreign_run = self._prepared(_NEW_RUN)
        self._session_of_run = self._prepared(_SESSION_OF_RUN)

    async def dump[T](
        self,
        session_id: OwnedId,
        *,
        history: bool,
        take: Callable[[Session, Iterator[VersionContent], Iterator[KeptRun]], T],
    ) -> T:
        def job(connection: Connection) -> T:
            session = self._live(connection, session_id)
            values = {"session": session.key, "first": 1 if history else session.version}
            contents = (
                VersionContent(version_of(header), data) for *header, data in connection.execute(_VERSIONS, values)
            )
            kept = map(_kept_run, connection.execute(_RUNS, {"session": session.key})) if history else iter(())
            return take(session, contents, kept)

        await self.session(session_id)  # This is a call, and may have to be noted as one.
        return await self._read(job)

    async def load(
        self,
        session: Session,
        versions: Callable[[], Iterator[VersionContent]],
        runs: Callable[[], Iterator[KeptRun]],
    ) -> Session:
        keys: list[int] = []
        try:
            await self._write(lambda connection: keys.append(self._insert_hidden(connection, session)))
            key = keys[0]
            async for some_runs in _batches(runs(), _size_of_run):
                await self._write(partial(self._add_foreign_runs, session_key=key, some=some_runs))
            oldest = session.version - self._retention.versions
            kept = (content for content in versions() if content.version.n > oldest)
            async for some in _batches(kept, lambda content: len(content.data)):
                await self._write(partial(self._add_foreign_versions, session_key=key, some=some))
            return await self._write(lambda connection: self._show(connection, key, session, now()))
        except BaseException:
            with suppress(Unavailable):  # It is purged with the others that are gone, then.
                for key in keys:
                    await self._purge_one(key)
            raise
        finally:
            self._hidden.difference_update(keys)

    def _add_foreign_runs(self, connection: Connection, session_key: int, some: Sequence[KeptRun]) -> None:
        for record, kept in some:
            self._add_foreign_run(connection, session_key, record, kept)
        self._prune_outputs.count(connection, {"session": session_key, "kept": self._retention.outputs})

    def _add_foreign_versions(self, connection: Connection, session_key: int, some: Sequence[VersionContent]) -> None:
        for content in some:
            self._add_foreign_version(connection, session_key, content)

    def _add_foreign_version(self, connection: Connection, session_key: int, content: VersionContent) -> None:
        version = content.version
        run_id = version.run_id
        if run_id is not None:
            names = (run_id, _new_run_id(run_id, session_key))
            run_id = next((name for name in names if self._owner(connection, name) == session_key), None)
        self._add_version(
            connection,
            session_key,
            version.n,
            version.cause,
            version.created_at,
            data=content.data,
            snapshot=version.snapshot,
            run_id=run_id,
        )

    def _add_foreign_run(
        self, connection: Connection, session_key: int, record: RunRecord, kept: KeptOutputs | None
    ) -> None:
        run_id = record.id
        owner = self._owner(connection, run_id)
        if owner is not None and owner != session_key:
            run_id = _new_run_id(run_id, session_key)
        record = replace(record, id=run_id, session_key=session_key)
        values = {f"new_{name}": getattr(record, name) for name in _FOREIGN_FIELDS}
        values |= {"new_enforced": json.dumps({**IMPORTED, **record.enforced, **IMPORTED}), "new_imported": True}
        values["new_egress"] = json.dumps(record.egress)
        values["new_artifacts"] = json.dumps(record.artifacts)
        try:
            run_key = self._foreign_run.one(connection, values)[0]
        except self._errors as error:
            if dialects.is_taken(error):
                raise BadRequest(
                    f"The capsule has two runs '{record.id[:80]}'.", hint="Export the session once more."
                ) from None
            raise
        if self._retention.outputs:
            self._add_outputs(connection, session_key, run_key, kept)

    def _owner(self, connection: Connection, run_id: str) -> int | None:
        """The key of the session that has had this run."""
        row = self._session_of_run.one(connection, {"run_id": run_id})
        return None if row is None else int(row[0])


async def _batches[T](items: Iterator[T], size_of: Callable[[T], int]) -> AsyncIterator[list[T]]:
    """`items`, read on a thread, in lists that are written quickly."""

    def next_batch() -> list[T]:
        batch, size = [], 0
        for item in items:
            batch.append(item)
            size += size_of(item)
            if size >= _BATCH_BYTES or len(batch) == _BATCH_ROWS:
                break
        return batch

    while batch := await asyncio.to_thread(next_batch):
        yield batch


def _size_of_run(run: KeptRun) -> int:
    kept = run[1]
    return 0 if kept is None else len(kept.stdout or b"") + len(kept.stderr or b"")


def _kept_run(row: tuple[object, ...]) -> KeptRun:
    """A row of `_RUNS`."""
    count = len(RUN_FIELDS)
    record, run_key, columns = record_of(row[:count]), row[count], row[count + 1 :]
    return record, None if run_key is None else KeptOutputs(*columns)  # type: ignore[arg-type]


def _new_run_id(run_id: str, session_key: int) -> str:
    """Another id for a run: the same without what an earlier import put behind it."""
    return re.sub(r"-\d+$", "", run_id)[:100] + f"-{session_key}"
