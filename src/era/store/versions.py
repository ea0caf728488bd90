"""Versions: added, listed, read, and rolled back to.

A session's data and snapshot stand in its newest row of `versions` and nowhere else. `next_version` is the only way to
a new one; its statements are on the path of every run, so they are precompiled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from era.core.metadata import Retention
from era.core.models import (
    CHECKPOINTS,
    Cause,
    KeptVersion,
    OwnedId,
    Session,
    Snapshot,
    Trim,
    Version,
    VersionContent,
    now,
)
from era.errors import Conflict, NotFound
from era.store.engine.dialects import Asked, Precompiled, together
from era.store.engine.tables import IS_CHECKPOINT, IS_NO_CHECKPOINT, sessions, versions
from era.store.engine.tables import version_names as names
from era.store.homes import check_home
from era.store.records import snapshot_from_row
from era.store.rows import GROWN, Rows, reads, writes
from era.store.session_lookup import EXPIRES_AT, IS_PRESENT, find_session, note_call, read_session, session_with_key

_ITS_NAME = (names.c.session_key == versions.c.session_key) & (names.c.n == versions.c.n)
_OF_SESSION = versions.c.session_key == bindparam("session")
_NAMED = select(names.c.n).where(names.c.session_key == bindparam("session"))

VERSIONS = (
    select(
        versions.c.n,
        versions.c.created_at,
        versions.c.cause,
        versions.c.run_id,
        names.c.name,
        versions.c.snapshot_root,
        versions.c.file_count,
        versions.c.total_bytes,
    )
    .join_from(versions, names, _ITS_NAME, isouter=True)
    .where(_OF_SESSION)
)
"""A session's versions without their data, as `version_from_row` reads them."""

_NEWEST = VERSIONS.where(versions.c.n < bindparam("before")).order_by(versions.c.n.desc()).limit(bindparam("how_many"))
_WITH_DATA = VERSIONS.add_columns(versions.c.data).where(versions.c.n == bindparam("number"))
_ONE = VERSIONS.where(versions.c.n == bindparam("number"))
_OLDER = (
    select(versions.c.n).where(_OF_SESSION, versions.c.n < bindparam("number"), versions.c.n.not_in(_NAMED)).limit(1)
)
_KEPT = (
    select(versions.c.n, versions.c.snapshot_root, names.c.n.is_not(None), versions.c.cause.in_(CHECKPOINTS))
    .join_from(versions, names, _ITS_NAME, isouter=True)
    .where(_OF_SESSION)
    .order_by(versions.c.n.desc())
)
SNAPSHOT_ROOTS = select(versions.c.snapshot_root).where(versions.c.snapshot_root.is_not(None)).distinct()

_INCREMENT = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"), IS_PRESENT)
    .values(
        version=sessions.c.version + 1,
        updated_at=bindparam("at"),
        expires_at=EXPIRES_AT,
        history_bytes=sessions.c.history_bytes + bindparam("stored", type_=sessions.c.history_bytes.type),
    )
    .returning(sessions.c.version)
)
_increment = Precompiled(_INCREMENT)
_increment_for_run = Precompiled(_INCREMENT.values(last_run_at=bindparam("at")))
_FIRST_CHECKPOINT = select(versions.c.n).where(_OF_SESSION, IS_CHECKPOINT).limit(1)
_first_checkpoint = Precompiled(_FIRST_CHECKPOINT)
_prune = Precompiled(
    delete(versions).where(
        _OF_SESSION,
        versions.c.n <= bindparam("last"),
        versions.c.n.not_in(_NAMED),
        _FIRST_CHECKPOINT.scalar_subquery().is_(None),
    )
)
_TOO_OLD = select(versions.c.n).where(_OF_SESSION).order_by(versions.c.n.desc()).limit(1).offset(bindparam("kept"))
_PRUNE_KIND = delete(versions).where(_OF_SESSION, versions.c.n <= bindparam("last"), versions.c.n.not_in(_NAMED))
_DROP = delete(versions).where(
    _OF_SESSION, versions.c.n.in_(bindparam("numbers", expanding=True)), versions.c.n.not_in(_NAMED)
)
_SET_HISTORY_BYTES = (
    update(sessions).where(sessions.c.key == bindparam("session")).values(history_bytes=bindparam("held"))
)
_WITH_NAME = select(names.c.n).where(names.c.session_key == bindparam("session"), names.c.name == bindparam("name"))
_CLEAR_NAME = delete(names).where(names.c.session_key == bindparam("session"), names.c.n == bindparam("number"))


def _insert_statement(*, data: bool, snapshot: bool) -> Precompiled:
    """The statement that adds a version. Data or snapshot that isn't given is copied from the version before."""
    given = {"session_key", "n", "created_at", "cause", "run_id"}
    given |= {"data"} if data else set()
    given |= {"snapshot_root", "file_count", "total_bytes"} if snapshot else set()
    values: dict[str, Any] = {
        column.name: bindparam(f"new_{column.name}", type_=column.type) if column.name in given else column
        for column in versions.c
    }
    if data and snapshot:
        return Precompiled(insert(versions).values(values).inline())
    before = (versions.c.session_key == bindparam("new_session_key")) & (versions.c.n == bindparam("n_before"))
    return Precompiled(insert(versions).from_select(list(values), select(*values.values()).where(before)))


_insert = {
    (data, snapshot): _insert_statement(data=data, snapshot=snapshot)
    for data in (False, True)
    for snapshot in (False, True)
}
"""By whether data and whether a snapshot is given."""


def next_version(
    connection: Connection,
    retention: Retention,
    session_key: int,
    cause: Cause,
    at: int,
    *,
    data: str | None,
    snapshot: Snapshot | None,
    run_id: str | None = None,
) -> int | None:
    """Add a session's next version and drop those that are too old and have no name.

    `at` is its time in microseconds; data or snapshot of None is copied from the version before. The answer is its
    number, or None, with nothing changed, where the session isn't present.
    """
    row = together(connection, incrementing(session_key, at, snapshot, of_run=run_id is not None))[0].row
    if row is None:
        return None
    n: int = row[0]
    together(connection, adding_version(session_key, n, cause, at, data=data, snapshot=snapshot, run_id=run_id))
    prune(connection, retention, session_key, n, is_checkpoint=cause in CHECKPOINTS)
    return n


def incrementing(session_key: int, at: int, snapshot: Snapshot | None, *, of_run: bool) -> Asked:
    """The statement that counts a session's version up, and answers with its number. `adding_version` must follow."""
    increment = _increment_for_run if of_run else _increment
    stored = 0 if snapshot is None else snapshot.stored_bytes
    return increment, {"session": session_key, "at": at, "stored": stored}


def prune(connection: Connection, retention: Retention, session_key: int, n: int, *, is_checkpoint: bool) -> None:
    """Drop a session's versions without a name that are too old. `n` is the newest, and `is_checkpoint` whether that
    is one.

    Checkpoints are counted for themselves. So numbers tell nothing where there are some, and rows are counted.
    """
    if not is_checkpoint:
        asked = pruning(retention, session_key, n)
        if not asked or together(connection, *asked)[0].row is None:
            return
    prune_kinds(connection, retention, session_key)


def pruning(retention: Retention, session_key: int, n: int) -> Sequence[Asked]:
    """The statements that drop a session's versions that are too old where it has no checkpoints, after one that says
    whether it has any: then none are dropped, and `prune_kinds` must follow. `n` is the newest, and no checkpoint."""
    if n <= retention.versions:
        return ()
    last = {"session": session_key, "last": n - retention.versions}
    return (_first_checkpoint, {"session": session_key}), (_prune, last)


def prune_kinds(connection: Connection, retention: Retention, session_key: int) -> None:
    """`prune` where there are checkpoints."""
    for kind, kept in ((IS_CHECKPOINT, retention.checkpoints), (IS_NO_CHECKPOINT, retention.versions)):
        last = connection.execute(_TOO_OLD.where(kind), {"session": session_key, "kept": kept}).scalar_one_or_none()
        if last is not None:
            connection.execute(_PRUNE_KIND.where(kind), {"session": session_key, "last": last})


def has_checkpoints(connection: Connection, session_key: int) -> bool:
    """Whether any version of the session is a checkpoint; found in an index of those alone."""
    return _first_checkpoint.first(connection, {"session": session_key}) is not None


def adding_version(
    session_key: int,
    n: int,
    cause: Cause,
    at: int,
    *,
    data: str | None,
    snapshot: Snapshot | None,
    run_id: str | None = None,
) -> Asked:
    """The statement that inserts the row of version `n`. Data or snapshot of None is copied from version `n - 1`, which
    must exist."""
    values: dict[str, Any] = {
        "new_session_key": session_key,
        "new_n": n,
        "new_created_at": at,
        "new_cause": cause,
        "new_run_id": run_id,
        "n_before": n - 1,
    }
    if data is not None:
        values["new_data"] = data
    if snapshot is not None:
        values["new_snapshot_root"] = snapshot.root
        values["new_file_count"] = snapshot.file_count
        values["new_total_bytes"] = snapshot.total_bytes
    return _insert[data is not None, snapshot is not None], values


def trim_history(connection: Connection, session_key: int, trim: Trim | None) -> int:
    """Drop versions so that a session's history stays within its bound; how many went.

    Versions that have got a name meanwhile stay. What is held isn't known then, and is counted by the next commit.
    """
    if trim is None:
        return 0
    named = set(connection.execute(_NAMED, {"session": session_key}).scalars())
    held = trim.held if named.isdisjoint(trim.drop) else None
    connection.execute(_SET_HISTORY_BYTES, {"session": session_key, "held": held})
    if not trim.drop:
        return 0
    return connection.execute(_DROP, {"session": session_key, "numbers": list(trim.drop)}).rowcount


class VersionRows(Rows):
    @writes
    def commit(
        self,
        connection: Connection,
        session_id: OwnedId,
        cause: Cause,
        *,
        data: str | None,
        snapshot: Snapshot | None,
        key: int | None = None,
        trim: Trim | None = None,
    ) -> Session:
        session = find_session(connection, self.retention, session_id)
        if key is not None and session.key != key:
            raise NotFound(f"Session '{session_id}' was deleted, and another has its id.")
        check_home(connection, session.key)
        if data in (None, session.data) and snapshot in (None, session.snapshot):
            note_call(connection, session.key, now())
        else:
            with self.bounded(connection, session_id, session_id.id, *(GROWN if snapshot is not None else ())):
                next_version(connection, self.retention, session.key, cause, now(), data=data, snapshot=snapshot)
            trim_history(connection, session.key, trim)
        return session_with_key(connection, session.key)

    @writes
    def rollback(self, connection: Connection, session_id: OwnedId, n: int) -> Session:
        session = find_session(connection, self.retention, session_id)
        check_home(connection, session.key)
        old = version_content(connection, session, self.retention, n)
        snapshot = old.version.snapshot
        with self.bounded(connection, session_id, session_id.id, *GROWN):
            next_version(connection, self.retention, session.key, "rollback", now(), data=old.data, snapshot=snapshot)
        return session_with_key(connection, session.key)

    async def versions(self, session_id: OwnedId, *, limit: int, before: int | None) -> Sequence[Version]:
        def job(connection: Connection, session: Session) -> Sequence[Version]:
            values = {"session": session.key, "before": session.version + 1 if before is None else before}
            return [version_from_row(row) for row in connection.execute(_NEWEST, values | {"how_many": limit})]

        return await read_session(self.database, self.retention, session_id, job)

    async def version(self, session_id: OwnedId, n: int) -> VersionContent:
        def job(connection: Connection, session: Session) -> VersionContent:
            return version_content(connection, session, self.retention, n)

        return await read_session(self.database, self.retention, session_id, job)

    @reads
    def kept_versions(self, connection: Connection, session_key: int) -> Sequence[KeptVersion]:
        return [
            KeptVersion(n, root, bool(named), bool(is_checkpoint))
            for n, root, named, is_checkpoint in connection.execute(_KEPT, {"session": session_key})
        ]

    @writes
    def name_version(
        self, connection: Connection, session_id: OwnedId, n: int, name: str, *, named: Collection[int]
    ) -> Version | None:
        session = find_session(connection, self.retention, session_id)
        check_home(connection, session.key)
        _check_kept(connection, session, self.retention, n)
        if set(connection.execute(_NAMED, {"session": session.key}).scalars()) != set(named):
            return None
        other = connection.execute(_WITH_NAME, {"session": session.key, "name": name}).scalar_one_or_none()
        if other not in (None, n):
            raise Conflict(
                f"Version {other} of session '{session_id}' has the name '{name}' already.",
                hint="Choose another name, or take it from that version first.",
            )
        connection.execute(_CLEAR_NAME, {"session": session.key, "number": n})
        insert_name(connection, session.key, n, name)
        note_call(connection, session.key, now())
        return version_from_row(connection.execute(_ONE, {"session": session.key, "number": n}).one())

    @writes
    def clear_name(self, connection: Connection, session_id: OwnedId, n: int) -> None:
        session = find_session(connection, self.retention, session_id)
        check_home(connection, session.key)
        _check_kept(connection, session, self.retention, n)
        if not connection.execute(_CLEAR_NAME, {"session": session.key, "number": n}).rowcount:
            raise NotFound(f"Version {n} of session '{session_id}' has no name.", code="no_such_name")
        note_call(connection, session.key, now())
        if n == session.version:
            return
        # Where newer versions have gone, this one was kept for its name only. So a gap is always behind a named
        # version. Or it is where checkpoints were, which go before all others: then there is an older version without
        # a name, too.
        newer = connection.execute(_ONE, {"session": session.key, "number": n + 1}).first()
        older = connection.execute(_OLDER, {"session": session.key, "number": n}).first()
        if has_checkpoints(connection, session.key):
            # Checkpoints leave gaps, too; what is too old goes here, and what holds too much with the next commit.
            prune(connection, self.retention, session.key, session.version, is_checkpoint=True)
        elif n <= session.version - self.retention.versions or (newer is None and older is None):
            connection.execute(_DROP, {"session": session.key, "numbers": [n]})

    @reads
    def snapshot_roots(self, connection: Connection) -> Sequence[str]:
        return list(connection.execute(SNAPSHOT_ROOTS).scalars())


def version_content(connection: Connection, session: Session, retention: Retention, n: int) -> VersionContent:
    """Version `n` with its data. Raises NotFound where there never was one or it is no longer kept."""
    row = connection.execute(_WITH_DATA, {"session": session.key, "number": n}).one_or_none()
    if row is None:
        raise _not_kept(session, retention, n)
    *header, data = row
    return VersionContent(version_from_row(header), data)


def _check_kept(connection: Connection, session: Session, retention: Retention, n: int) -> None:
    """Raises NotFound where there never was a version `n` or it is no longer kept."""
    if connection.execute(_ONE, {"session": session.key, "number": n}).first() is None:
        raise _not_kept(session, retention, n)


def _not_kept(session: Session, retention: Retention, n: int) -> NotFound:
    """The error for a version that isn't there."""
    if not 0 < n <= session.version:
        return NotFound(
            f"Session '{session.id}' has no version {n}.",
            hint="GET /api/sessions/{id}/versions lists those there are.",
            code="no_such_version",
        )
    return NotFound(
        f"Version {n} of session '{session.id}' is no longer kept.",
        hint=f"The newest {retention.versions} versions of a session are kept (ERA_VERSIONS_KEPT), and the newest "
        f"{retention.checkpoints} checkpoints, or fewer if they would hold too much (ERA_HISTORY_MB). One that has a "
        "name stays.",
        code="version_gone",
    )


def insert_name(connection: Connection, session_key: int, n: int, name: str) -> None:
    """Give a name to a version that has none."""
    connection.execute(insert(names).values(session_key=session_key, n=n, name=name))


def version_from_row(row: Iterable[Any]) -> Version:
    """Convert a row of `VERSIONS`."""
    n, created_at, cause, run_id, name, *snapshot = row
    return Version(n, created_at, cause, run_id, snapshot_from_row(*snapshot), name)
