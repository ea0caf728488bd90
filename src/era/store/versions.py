"""Versions: added, listed, read, and rolled back to.

A session's data and snapshot stand in its newest row of `versions` and nowhere else. `next_version` is the only way to
a new one; its statements are on the path of every run, so they are precompiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from era.core.metadata import Retention
from era.core.models import Cause, OwnedId, Session, Snapshot, Version, VersionContent, now
from era.errors import NotFound
from era.store.dialects import Precompiled
from era.store.records import snapshot_from_row
from era.store.session_lookup import EXPIRES_AT, IS_PRESENT, find_session, session_with_key
from era.store.tables import sessions, versions

VERSIONS = select(
    versions.c.n,
    versions.c.created_at,
    versions.c.cause,
    versions.c.run_id,
    versions.c.snapshot_root,
    versions.c.file_count,
    versions.c.total_bytes,
).where(versions.c.session_key == bindparam("session"))
"""A session's versions without their data, as `version_from_row` reads them."""

_NEWEST = VERSIONS.where(versions.c.n < bindparam("before")).order_by(versions.c.n.desc()).limit(bindparam("how_many"))
_WITH_DATA = VERSIONS.add_columns(versions.c.data).where(versions.c.n == bindparam("number"))
_SNAPSHOT_ROOTS = select(versions.c.snapshot_root).where(versions.c.snapshot_root.is_not(None)).distinct()

_INCREMENT = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"), IS_PRESENT)
    .values(version=sessions.c.version + 1, updated_at=bindparam("at"), expires_at=EXPIRES_AT)
    .returning(sessions.c.version)
)
_increment = Precompiled(_INCREMENT)
_increment_for_run = Precompiled(_INCREMENT.values(last_run_at=bindparam("at")))
_prune = Precompiled(
    delete(versions).where(versions.c.session_key == bindparam("session"), versions.c.n <= bindparam("last"))
)


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
    """Add a session's next version and drop those that are too old.

    `at` is its time in microseconds; data or snapshot of None is copied from the version before. The answer is its
    number, or None, with nothing changed, where the session isn't present.
    """
    increment = _increment if run_id is None else _increment_for_run
    row = increment.first(connection, {"session": session_key, "at": at})
    if row is None:
        return None
    n: int = row[0]
    insert_version(connection, session_key, n, cause, at, data=data, snapshot=snapshot, run_id=run_id)
    if n > retention.versions:
        _prune.execute(connection, {"session": session_key, "last": n - retention.versions})
    return n


def insert_version(
    connection: Connection,
    session_key: int,
    n: int,
    cause: Cause,
    at: int,
    *,
    data: str | None,
    snapshot: Snapshot | None,
    run_id: str | None = None,
) -> None:
    """Insert the row of version `n`. Data or snapshot of None is copied from version `n - 1`, which must exist."""
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
    _insert[data is not None, snapshot is not None].execute(connection, values)


def commit_version(
    connection: Connection,
    retention: Retention,
    session_id: OwnedId,
    cause: Cause,
    *,
    data: str | None,
    snapshot: Snapshot | None,
    key: int | None,
) -> Session:
    """See MetadataStore.commit."""
    session = find_session(connection, retention, session_id)
    if key is not None and session.key != key:
        raise NotFound(f"Session '{session_id}' was deleted, and another has its id.")
    next_version(connection, retention, session.key, cause, now(), data=data, snapshot=snapshot)
    return session_with_key(connection, session.key)


def roll_back(connection: Connection, retention: Retention, session_id: OwnedId, n: int) -> Session:
    """See MetadataStore.rollback."""
    session = find_session(connection, retention, session_id)
    old = version_content(connection, session, retention, n)
    snapshot = old.version.snapshot
    next_version(connection, retention, session.key, "rollback", now(), data=old.data, snapshot=snapshot)
    return session_with_key(connection, session.key)


def list_versions(connection: Connection, session: Session, limit: int, before: int | None) -> Sequence[Version]:
    """The `limit` newest versions older than version `before`, newest first."""
    values = {"session": session.key, "before": session.version + 1 if before is None else before, "how_many": limit}
    return [version_from_row(row) for row in connection.execute(_NEWEST, values)]


def version_content(connection: Connection, session: Session, retention: Retention, n: int) -> VersionContent:
    """Version `n` with its data. Raises NotFound where there never was one or it is no longer kept."""
    row = connection.execute(_WITH_DATA, {"session": session.key, "number": n}).one_or_none()
    if row is not None:
        *header, data = row
        return VersionContent(version_from_row(header), data)
    if not 0 < n <= session.version:
        raise NotFound(
            f"Session '{session.id}' has no version {n}.",
            hint="GET /api/sessions/{id}/versions lists those there are.",
            code="no_such_version",
        )
    raise NotFound(
        f"Version {n} of session '{session.id}' is no longer kept.",
        hint=f"The newest {retention.versions} versions of a session are kept (ERA_VERSIONS_KEPT).",
        code="version_gone",
    )


def snapshot_roots(connection: Connection) -> Sequence[str]:
    """The root of every snapshot that a version names, those of removed sessions included."""
    return list(connection.execute(_SNAPSHOT_ROOTS).scalars())


def version_from_row(row: Iterable[Any]) -> Version:
    """Convert a row of `VERSIONS`."""
    n, created_at, cause, run_id, *snapshot = row
    return Version(n, created_at, cause, run_id, snapshot_from_row(*snapshot))
