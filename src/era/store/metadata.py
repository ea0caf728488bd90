"""The metadata store: sessions, their versions and the records of their runs, in an SQL database.

`SqlStore` is the adapter of the core's MetadataStore. Its methods say which transactions there are and nothing else.
What a transaction does is in the module of its noun, in two kinds of functions: those that take a `Connection` do their
work within the caller's transaction, those that take a `Database` make several transactions of their own.

Rows that share no transaction with sessions and runs have ports of their own in the core, and adapters of their own
here: inboxes, storage items, API keys and processes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Concatenate

from sqlalchemy import Connection, literal, select

from era.core.metadata import Retention, RunFilter, SessionChange, SessionFilter, SetupJob
from era.core.models import (
    Answered,
    Cause,
    Claim,
    Claimed,
    KeptOutputs,
    KeptRun,
    KeptVersion,
    NewCopy,
    NewSession,
    OwnedId,
    RunRecord,
    Session,
    Snapshot,
    StoredCode,
    Trim,
    Version,
    VersionContent,
)
from era.core.quotas import Bound
from era.core.run_messages import RecordedProgram, no_program
from era.core.usage import Use
from era.errors import CommitFailed, NotFound, SessionDeleted, Unavailable
from era.store import capsules, idempotency, outputs, quotas, runs, session_pages, sessions, setups, versions
from era.store.api_keys import ApiKeyRows
from era.store.audit import AuditRows
from era.store.condemned import Condemned, fence_dead_hosts, lose_some_homes
from era.store.d1_replicas import DatabaseReplicas
from era.store.database import Database, DatabaseAway
from era.store.homes import HomeRows
from era.store.inbox import InboxRows
from era.store.processes import ProcessRows
from era.store.quota_counts import QuotaCounts
from era.store.session_lookup import read_public_session, read_session, read_session_of_site
from era.store.storage_items import StorageItemRows
from era.store.usage import UsageRows
from era.store.webhooks import WebhookRows
from era.store.whole_tables import Count

_DEFAULT_RETENTION = Retention()
_MADE = ("sessions", "disk_mb")
_GROWN = ("disk_mb",)
"""The quotas that a transaction may reach that makes a session present, or a version."""

OUTCOME_UNKNOWN = "Once the database is back, GET /api/sessions/{id}/runs/{run_id} tells; the session is as that says."


class SqlStore:
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
        self.database = Database(url, alone=alone, hangs_within=self._hangs_within)
        self.inboxes = InboxRows(self.database, retention)
        self.storage_items = StorageItemRows(self.database)
        self.api_keys = ApiKeyRows(self.database)
        self.audit = AuditRows(self.database)
        self.processes = ProcessRows(self.database, retention)
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
        self.bounds: Callable[..., Sequence[Bound]] = lambda *_: ()
        """See Quotas.bounds."""

        self._retention = retention
        self._counts = Count(self.database, _count, lambda counts: counts["sessions"] + sum(counts["runs"].values()))
        self._sizes = Count(self.database, quotas.sizes, lambda sizes: sum(count for count, _ in sizes.values()))
        self._incomplete: set[int] = set()
        """The keys of sessions that this process is importing."""

        self._url = url

    @property
    def retention(self) -> Retention:
        return self._retention

    async def homes(self) -> HomeRows:
        """The rows of a cluster's hosts and homes, on connections of their own, which notice within half of a lease
        that they are cut off. Call it once, on an open store that isn't `alone`."""
        half = self._hangs_within
        own = beats = Database(self._url, alone=False, notices_within=half, hangs_within=half)
        own.listeners = self.database.listeners
        await own.open()
        if own.engines.writer.dialect.name != "sqlite":  # where another writer would only be one more that waits
            waits = half and half / 2.5
            beats = Database(self._url, alone=False, notices_within=half, hangs_within=half, waits_within=waits)
            beats.listeners = own.listeners
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

    async def create_session(self, new: NewSession, claim: Claim | None = None) -> Session:
        session = await self._within(new.id, new.id.id, _MADE, sessions.create_session, new, claim)
        if claim is not None:
            await self._bound_answers(claim, new.id.owner, _bytes_of(session))
        return session

    async def duplicate(self, copy: NewCopy, claim: Claim | None = None) -> Session:
        session = await self._within(
            copy.source_id, copy.id, _MADE, sessions.copy_session, self._retention, copy, claim
        )
        if claim is not None:
            await self._bound_answers(claim, copy.source_id, _bytes_of(session))
        return session

    async def session(self, session_id: OwnedId) -> Session:
        return await self._read(session_id, lambda _, session: session)

    async def public_session(self, session_id: str) -> Session:
        return await read_public_session(self.database, self._retention, session_id)

    async def session_of_site(self, key: int) -> Session:
        return await read_session_of_site(self.database, key)

    async def sessions(self, which: SessionFilter) -> Sequence[Session]:
        return await self.database.read_for(which.owner, session_pages.list_sessions, self._retention, which)

    async def session_page(self, which: SessionFilter, most: int) -> tuple[Sequence[Session], bool]:
        return await self.database.read_for(which.owner, session_pages.session_page, self._retention, which, most)

    async def newest_ids(self, owner: str, limit: int) -> Sequence[str]:
        return await self.database.read(sessions.newest_ids, owner, limit)

    async def present_sessions(self, keys: Sequence[int]) -> Sequence[int]:
        return await self.database.read(sessions.present_sessions, keys)

    async def snapshots_of(self, keys: Sequence[int]) -> Mapping[int, Snapshot]:
        return await self.database.read(sessions.snapshots_of, keys)

    async def change_session(self, session_id: OwnedId, change: SessionChange) -> Session:
        return await self.database.write(sessions.change_session, self._retention, session_id, change)

    async def store_code(self, session_id: OwnedId, code: StoredCode) -> None:
        await self.database.write(sessions.store_code, self._retention, session_id, code)

    async def delete_session(self, session_id: OwnedId, *, key: int | None = None) -> Session:
        return await self.database.write(sessions.delete_session, self._retention, session_id, key)

    async def restore_session(self, session_id: OwnedId) -> Session:
        return await self._within(
            session_id, session_id.id, _MADE, sessions.restore_session, self._retention, session_id
        )

    async def purge_session(
        self, session_id: OwnedId, *, key: int | None = None, only_removed: bool = False
    ) -> Sequence[int]:
        return await self.database.write(sessions.purge_session, self._retention, session_id, key, only_removed)

    async def expire(self, at: int) -> Sequence[int]:
        return await sessions.expire(self.database, at)

    async def purge(self, at: int) -> int:
        return await sessions.purge(self.database, self._retention, at, self._incomplete)

    async def purge_beyond(self, bounds: Callable[[str], tuple[int, int]]) -> int:
        return await sessions.purge_beyond(self.database, bounds)

    async def commit(
        self,
        session_id: OwnedId,
        cause: Cause,
        *,
        data: str | None,
        snapshot: Snapshot | None,
        key: int | None = None,
        trim: Trim | None = None,
    ) -> Session:
        return await self._within(
            session_id,
            session_id.id,
            _GROWN if snapshot is not None else (),
            versions.commit_version,
            self._retention,
            session_id,
            cause,
            data=data,
            snapshot=snapshot,
            key=key,
            trim=trim,
        )

    async def rollback(self, session_id: OwnedId, n: int) -> Session:
        return await self._within(session_id, session_id.id, _GROWN, versions.roll_back, self._retention, session_id, n)

    async def versions(self, session_id: OwnedId, *, limit: int, before: int | None) -> Sequence[Version]:
        return await self._read(
            session_id, lambda connection, session: versions.list_versions(connection, session, limit, before)
        )

    async def version(self, session_id: OwnedId, n: int) -> VersionContent:
        return await self._read(
            session_id, lambda connection, session: versions.version_content(connection, session, self._retention, n)
        )

    async def kept_versions(self, session_key: int) -> Sequence[KeptVersion]:
        return await self.database.read(versions.kept_versions, session_key)

    async def name_version(self, session_id: OwnedId, n: int, name: str, *, named: Collection[int]) -> Version | None:
        return await self.database.write(versions.name_version, self._retention, session_id, n, name, named)

    async def clear_name(self, session_id: OwnedId, n: int) -> None:
        await self.database.write(versions.clear_name, self._retention, session_id, n)

    async def begin_run(
        self,
        session_id: OwnedId,
        run_id: str,
        claim: Claim | None = None,
        *,
        program: Callable[[Session], RecordedProgram] = no_program,
        durably: bool = True,
        known: Callable[[Session], object] | None = None,
    ) -> Session:
        return await self.database.write_once(
            runs.begin_run,
            self._retention,
            session_id,
            run_id,
            claim,
            program,
            syncs=durably,
            patient=False,
            known=known,
        )

    async def end_run(
        self,
        record: RunRecord,
        *,
        data: str | None,
        snapshot: Snapshot | None,
        outputs: KeptOutputs | None = None,
        answered: Answered | None = None,
        trim: Trim | None = None,
        who: OwnedId | None = None,
        use: Use | None = None,
    ) -> RunRecord:
        try:
            bounds = self.bounds(who, *_GROWN) if who is not None and snapshot is not None else ()
            async with self._telling_what_fills_it():
                ended: RunRecord | None = await self.database.write_once(
                    quotas.within,
                    "" if who is None else who.id,
                    bounds,
                    runs.end_run,
                    self._retention,
                    record,
                    patient=True,
                    who=who,
                    data=data,
                    snapshot=snapshot,
                    outputs=outputs,
                    answered=answered,
                    trim=trim,
                    use=use,
                )
        except CommitFailed:
            raise
        except DatabaseAway as error:
            if not error.may_have_committed:
                raise CommitFailed("the run ended, but its result could not be stored") from error
            raise CommitFailed(
                "the run ended, but whether its result was stored is not known", hint=OUTCOME_UNKNOWN
            ) from error
        except Unavailable as error:
            raise CommitFailed("the run ended, but its result could not be stored") from error
        if ended is None:
            raise SessionDeleted(runs.DELETED)
        if answered is not None and answered.data is not None:
            added = idempotency.bytes_of(answered.data, answered.outputs)
            await self._bound_answers(answered.claim, record.session_key, added)
        return ended

    async def runs(self, session_key: int, limit: int, before: int | None = None) -> Sequence[RunRecord]:
        return await self.database.read(runs.list_runs, session_key, limit, before)

    async def runs_of_owner(self, which: RunFilter) -> Sequence[tuple[str, RunRecord]]:
        return await self.database.read_for(which.owner, runs.list_runs_of_owner, which)

    async def run(self, session_id: OwnedId, run_id: str) -> tuple[RunRecord, KeptOutputs | None]:
        return await self._read(session_id, lambda connection, session: runs.find_run(connection, session, run_id))

    async def run_of_any(self, run_id: str) -> RunRecord | None:
        return await self.database.read(runs.run_of_any, run_id)

    async def mark_lost(self) -> int:
        return await self.database.write(runs.mark_lost)

    async def prune_runs(self) -> int:
        return await runs.prune_runs(self.database, self._retention)

    async def find_claim(self, session_id: OwnedId, claim: Claim) -> Claimed | None:
        if not session_id.id:
            return await self.database.read(idempotency.find_claim, claim, session_id.owner)
        finding = idempotency.finding_claim(claim, session_id)
        return await read_session(self.database, self._retention, session_id, idempotency.claimed_in_session, finding)

    async def prune_notices(self) -> None:
        await self.webhooks.prune_notices()

    async def prune_idempotency_keys(self) -> int:
        removed = 0
        while count := await self.database.write(idempotency.prune_some_keys):
            removed += count
        return removed

    async def unfinished_setups(self) -> Sequence[SetupJob]:
        return await self.database.read(setups.unfinished_setups)

    async def begin_setup(self, job: SetupJob) -> bool:
        return await self.database.write(setups.begin_setup, job)

    async def end_setup(
        self,
        job: SetupJob,
        *,
        status: str,
        result: str,
        package_set: str | None,
        left: tuple[int, Snapshot] | None = None,
        trim: Trim | None = None,
    ) -> bool:
        return await self._within(
            job.session_id,
            job.session_id.id,
            _GROWN if left is not None else (),
            setups.end_setup,
            self._retention,
            job,
            status=status,
            result=result,
            package_set=package_set,
            left=left,
            trim=trim,
        )

    async def restart_setup(self, session_id: OwnedId) -> Session:
        return await self.database.write(setups.restart_setup, self._retention, session_id)

    async def package_sets(self) -> Sequence[str]:
        return await self.database.read(setups.package_sets)

    async def package_set_lost(self, digest: str) -> int:
        return await self.database.write(setups.package_set_lost, digest)

    async def snapshot_roots(self) -> Sequence[str]:
        return await self.database.read(versions.snapshot_roots)

    async def output_digests(self) -> Sequence[str]:
        return await self.database.read(outputs.output_digests)

    async def fence_dead_hosts(self) -> bool:
        if self.database.fence.host_id is not None:
            while await self.database.write(lose_some_homes):
                pass
        return await self.database.write(fence_dead_hosts)

    def condemned(self) -> Condemned:
        """The rows by which hosts remove content from a bucket that they share. Call it on the store's loop."""
        return Condemned(self.database)

    async def dump[T](
        self,
        session_id: OwnedId,
        *,
        history: bool,
        take: Callable[[Session, Iterator[VersionContent], Iterator[KeptRun]], T],
    ) -> T:
        await self.session(session_id)  # This is a call, and may have to be noted as one.
        has_begun = False

        def take_once(session: Session, versions: Iterator[VersionContent], runs: Iterator[KeptRun]) -> T:
            nonlocal has_begun
            if has_begun:  # What it has taken can't be taken back.
                raise DatabaseAway(may_have_committed=False)
            has_begun = True
            return take(session, versions, runs)

        dump = partial(capsules.dump_session, history=history, take=take_once)
        return await self.database.read_dump(session_id.owner, dump, self._retention, session_id)

    async def load(
        self,
        session: Session,
        versions: Iterator[VersionContent],
        runs: Iterator[KeptRun],
        key_id: str = "",
    ) -> Session:
        def complete(connection: Connection, key: int) -> Session:
            bounds = self.bounds(OwnedId(session.owner, session.id, key_id), *_MADE)
            return quotas.within(connection, session.id, bounds, sessions.complete_session, key, session, key_id)

        async with self._telling_what_fills_it():
            return await capsules.load_session(self.database, self._incomplete, session, versions, runs, complete)

    async def ping(self) -> None:
        await self.database.read(lambda connection: connection.execute(select(literal(1))).scalar_one())

    async def check_writable(self) -> None:
        await self.database.write(lambda connection: connection.execute(select(literal(1))).scalar_one())

    async def counts(self) -> dict[str, Any]:
        return await self._counts.value()

    async def sizes(self) -> Mapping[str, tuple[int, int]]:
        return await self._sizes.value()

    async def _bound_answers(self, claim: Claim, scope: OwnedId | int | str, added: int) -> None:
        """Drop old answers within the scope of a claim that has been answered with about `added` bytes, if it is time.
        Where the database fails, another time does it."""
        if idempotency.are_counted(added):
            with suppress(NotFound, Unavailable):
                where = await self.session(scope) if isinstance(scope, OwnedId) else scope
                await idempotency.bound_answers(self.database, self._retention.answer_bytes, claim, where)

    async def _within[**P, T](
        self,
        who: OwnedId | None,
        changed: str,
        names: Sequence[str],
        job: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """A transaction that changes or makes the session with the id `changed`, which may make more of what the quotas
        of these names bound. Raises QuotaReached."""
        bounds = self.bounds(who, *names) if who is not None and names else ()
        if not bounds:
            return await self.database.write(job, *args, **kwargs)
        async with self._telling_what_fills_it():
            return await self.database.write(quotas.within, changed, bounds, job, *args, **kwargs)

    @asynccontextmanager
    async def _telling_what_fills_it(self) -> AsyncIterator[None]:
        """Raises QuotaReached where the block has passed a bound."""
        try:
            yield
        except quotas.Passed as passed:
            names = await self.database.read(quotas.filled_by, passed.bound)
            raise passed.bound.reached(passed.used, names) from None

    async def _read[T](self, session_id: OwnedId, job: Callable[[Connection, Session], T]) -> T:
        """A call that reads a session. Raises NotFound or Expired."""
        return await read_session(self.database, self._retention, session_id, job)


def _count(connection: Connection) -> dict[str, Any]:
    return {"sessions": sessions.count_sessions(connection), "runs": runs.count_runs(connection)}


def _bytes_of(session: Session) -> int:
    """What a session takes as an answer, about, without making it JSON once more."""
    return idempotency.bytes_of(session.data) + (0 if session.stored is None else len(session.stored.code))
