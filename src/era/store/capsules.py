"""Export and import of whole sessions, for capsules: read at one moment, and present only when complete.

A session may have more rows than one transaction should write, since every other writer would wait for it. So an import
inserts the session's own row first, which nobody sees yet; then versions and runs in small transactions, between which
others write; and the last transaction makes the session present. An import cut short leaves an incomplete session,
which is purged like those that were removed.

The rows of an imported session are as they were elsewhere, with two exceptions. A run whose id is in use here gets the
new session's key behind its id. And each run is marked, in its record for people and in a column for the counts,
because the isolation that its record names isn't this server's.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select

from era.core.concurrency.tasks import to_its_end
from era.core.models import KeptOutputs, KeptRun, OwnedId, RunRecord, Session, VersionContent
from era.errors import BadRequest, Unavailable
from era.store import sessions
from era.store.blobs.condemned import check_alive
from era.store.engine.database import DatabaseAway
from era.store.engine.dialects import raising_if_taken, together
from era.store.engine.tables import outputs, runs, versions
from era.store.outputs import OUTPUT_COLUMNS, insert_outputs
from era.store.records import RUN_FIELDS, RUNS, record_from_row, without_nul
from era.store.rows import MADE, writes
from era.store.session_lookup import find_session
from era.store.sessions import SessionRows
from era.store.versions import VERSIONS, adding_version, insert_name, version_from_row

IMPORTED = {"imported": True}
"""What `enforced` of a run's record says where the run was on another server."""

_BATCH_ROWS = 50
_BATCH_BYTES = 256 << 10
"""A transaction of an import ends after so many rows, or so many bytes of data and outputs: a few milliseconds."""

_VERSIONS = (
    VERSIONS.add_columns(versions.c.data)
    .where(versions.c.n >= bindparam("first"))
    .order_by(versions.c.n)
    .execution_options(stream_results=True)
)
_RUNS = (
    RUNS.add_columns(outputs.c.run_key, *(outputs.c[name] for name in OUTPUT_COLUMNS))
    .join_from(
        runs, outputs, (outputs.c.session_key == runs.c.session_key) & (outputs.c.run_key == runs.c.key), isouter=True
    )
    .where(runs.c.session_key == bindparam("session"), runs.c.status != "running")
    .order_by(runs.c.key)
    .execution_options(stream_results=True)
)
_FOREIGN_FIELDS = [field.name for field in fields(RunRecord) if field.name != "key"]
_SESSION_OF_RUN = select(runs.c.session_key).where(runs.c.id == bindparam("run_id"))


class CapsuleRows(SessionRows):
    async def dump[T](
        self,
        session_id: OwnedId,
        *,
        history: bool,
        take: Callable[[Session, Iterator[VersionContent], Iterator[KeptRun]], T],
    ) -> T:
        await self.session(session_id)  # This is a call, and may have to be noted as one.
        has_begun = False

        def job(connection: Connection) -> T:
            nonlocal has_begun
            session = find_session(connection, self.retention, session_id)
            values = {"session": session.key, "first": 1 if history else session.version}
            contents = (
                VersionContent(version_from_row(header), data)
                for *header, data in connection.execute(_VERSIONS, values)
            )
            kept = map(_kept_run, connection.execute(_RUNS, {"session": session.key})) if history else iter(())
            if has_begun:  # What `take` has taken can't be taken back.
                raise DatabaseAway(may_have_committed=False)
            has_begun = True
            return take(session, contents, kept)

        return await self.database.read_dump(session_id.owner, job)

    async def load(
        self, session: Session, versions: Iterator[VersionContent], runs: Iterator[KeptRun], key_id: str = ""
    ) -> Session:
        keys: list[int] = []
        try:
            await to_its_end(self._begin_import(session, keys))  # or it could note a key after this has ended
            key = keys[-1]  # a transaction that was undone has begun again
            async for some_runs in _batches(runs, _size_of_run):
                await self.database.write(_insert_foreign_runs, key, some_runs)
            async for some_versions in _batches(versions, lambda content: len(content.data)):
                await self.database.write(_insert_foreign_versions, key, some_versions)
            return await self._complete(key, session, key_id)
        except BaseException:
            with suppress(Unavailable):  # A later purge does it, then; in a cluster, once this host has ended.
                for key in keys:
                    await sessions.purge_incomplete(self.database, key)
            raise
        finally:
            self.incomplete.difference_update(keys)

    @writes
    def _begin_import(self, connection: Connection, session: Session, keys: list[int]) -> None:
        """Insert the session's own row, which nobody sees yet. Its key is noted within the transaction: a cancelled
        caller must know it, too, and a purge must at no time see the row without it."""
        key = sessions.insert_incomplete_session(connection, session)
        self.incomplete.add(key)
        keys.append(key)

    @writes
    def _complete(self, connection: Connection, key: int, session: Session, key_id: str) -> Session:
        """Make the session with this key present, once all of it is there."""
        with self.bounded(connection, OwnedId(session.owner, session.id, key_id), session.id, *MADE):
            return sessions.complete_session(connection, key, session, key_id)


def _insert_foreign_runs(connection: Connection, session_key: int, batch: Sequence[KeptRun]) -> None:
    check_alive(connection)
    for record, kept in batch:
        insert_outputs(connection, session_key, _insert_foreign_run(connection, session_key, record), kept)


def _insert_foreign_run(connection: Connection, session_key: int, record: RunRecord) -> int:
    """Insert the record of a run that was on another server; its key. Raises BadRequest where the session has two runs
    of its id."""
    run_id = record.id
    if _session_of_run(connection, run_id) not in (None, session_key):
        run_id = _new_run_id(run_id, session_key)
    record = replace(record, id=run_id, session_key=session_key)
    values = {name: getattr(record, name) for name in _FOREIGN_FIELDS}
    values |= {"enforced": json.dumps({**IMPORTED, **record.enforced, **IMPORTED}), "imported": True}
    values["egress"] = json.dumps(record.egress)
    values["artifacts"] = json.dumps(record.artifacts)
    values["invocation"] = json.dumps(record.invocation)
    values["code"] = without_nul(record.code)
    with raising_if_taken(
        BadRequest(f"The capsule has two runs '{record.id[:80]}'.", hint="Export the session once more.")
    ):
        key: int = connection.execute(insert(runs).values(values).returning(runs.c.key)).scalar_one()
    return key


def _insert_foreign_versions(connection: Connection, session_key: int, batch: Sequence[VersionContent]) -> None:
    check_alive(connection)
    for content in batch:
        version = content.version
        run_id = _run_id_here(connection, session_key, version.run_id)
        inserting = adding_version(
            session_key,
            version.n,
            version.cause,
            version.created_at,
            data=content.data,
            snapshot=version.snapshot,
            run_id=run_id,
        )
        together(connection, inserting)
        if version.name is not None:
            insert_name(connection, session_key, version.n, version.name)


def _run_id_here(connection: Connection, session_key: int, run_id: str | None) -> str | None:
    """The id under which an imported run was inserted; None where it wasn't."""
    if run_id is None:
        return None
    ids = (run_id, _new_run_id(run_id, session_key))
    return next((each for each in ids if _session_of_run(connection, each) == session_key), None)


def _session_of_run(connection: Connection, run_id: str) -> int | None:
    """The key of the session that has a run with this id."""
    return connection.execute(_SESSION_OF_RUN, {"run_id": run_id}).scalar()


async def _batches[T](items: Iterator[T], size_of: Callable[[T], int]) -> AsyncIterator[list[T]]:
    """Split `items` into lists of up to `_BATCH_ROWS` items or about `_BATCH_BYTES`. The iterator runs on a thread, and
    no longer than this: it may read a file that is closed then."""

    def next_batch() -> list[T]:
        batch, size = [], 0
        for item in items:
            batch.append(item)
            size += size_of(item)
            if size >= _BATCH_BYTES or len(batch) == _BATCH_ROWS:
                break
        return batch

    while batch := await to_its_end(asyncio.get_running_loop().run_in_executor(None, next_batch)):
        yield batch


def _size_of_run(run: KeptRun) -> int:
    """Bytes of a run's code, and of its outputs that are kept in its row."""
    record, kept = run
    return len(record.code or "") + (0 if kept is None else len(kept.stdout or b"") + len(kept.stderr or b""))


def _kept_run(row: Sequence[Any]) -> KeptRun:
    """Convert a row of `_RUNS`."""
    count = len(RUN_FIELDS)
    record, run_key, columns = record_from_row(row[:count]), row[count], row[count + 1 :]
    return record, None if run_key is None else KeptOutputs(*columns)


def _new_run_id(run_id: str, session_key: int) -> str:
    """The id for a run whose own is in use: with the session's key behind it, in place of what an earlier import put
    there."""
    return re.sub(r"-\d+$", "", run_id)[:100] + f"-{session_key}"
