"""Migrations of the schema, by alembic: shipped with the package and applied at every start."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, Select, String, column, inspect, select, table, update

from era.errors import NotReady, Unavailable
from era.store.dialects import begin_migration, database_time
from era.store.tables import hosts

HEAD = "0030"
"""The newest revision; a test compares it with the files in versions/."""

ROLLING = frozenset({"0027", "0028", "0029", "0030"})
"""Revisions that hosts of the version before can go on beside, as these need know nothing of what is added. For any
other all hosts of a cluster must have been stopped."""

_LOOK_SECONDS = 0.2
_MOST_SECONDS = 15.0
"""For which the end of a lease is waited for."""

_REVISION: Select[str] = select(column("version_num", String)).select_from(table("alembic_version"))


def upgrade(engine: Engine) -> None:
    """Bring the database to `HEAD` in one transaction. Raises Unavailable where a newer ERA has migrated it, NotReady
    where hosts are at work that couldn't go on afterwards."""
    revision = _revision(engine)
    if revision == HEAD:
        return  # The usual start, without the 0.3 s that importing alembic costs.
    if _must_be_alone(revision):
        _wait_for_hosts_that_are_gone(engine)

    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with _without_foreign_keys(engine) as connection:
        config.attributes["connection"] = connection
        if revision is not None and _must_be_alone(connection.execute(_REVISION.with_for_update()).scalar()):
            # Nobody joins any more until this transaction ends (`check_revision`).
            if _heartbeats(connection):
                raise _at_work()
            if inspect(connection).has_table(hosts.name):  # whose heartbeat hasn't come may send it yet
                connection.execute(update(hosts).where(~hosts.c.dead).values(dead=True))
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise Unavailable(
                f"the database can't be brought to revision {HEAD}: {error}",
                hint="It was last used by a newer version of ERA; start that version instead.",
            ) from error


def check_revision(connection: Connection) -> None:
    """See to it that the database isn't migrated until this transaction ends. For a host that joins. Raises Unavailable
    where it was since this process opened it."""
    if (revision := connection.execute(_REVISION.with_for_update(read=True)).scalar()) != HEAD:
        raise Unavailable(
            f"the database was brought to revision {revision} while this host started",
            hint="A newer version of ERA uses it; start that version instead.",
        )


@contextmanager
def _without_foreign_keys(engine: Engine) -> Iterator[Connection]:
    """A connection in a transaction. On SQLite foreign keys are off in it and checked at its end: there a table may
    have to be recreated to be changed, and dropping the old one would delete all rows that refer to it."""
    with engine.connect() as connection:
        if engine.dialect.name != "sqlite":
            with connection.begin():
                begin_migration(connection)
                yield connection
            return
        pragma = connection.connection.cursor()  # The driver's own: it begins no transaction.
        pragma.execute("PRAGMA foreign_keys = OFF")
        try:
            with connection.begin():
                yield connection
                if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
                    raise Unavailable(f"the database's rows do not fit together: {broken[0][0]} lacks {broken[0][2]}")
        finally:
            pragma.execute("PRAGMA foreign_keys = ON")
            pragma.close()


def _must_be_alone(revision: str | None) -> bool:
    """Whether hosts that are at work with this revision can't go on with `HEAD`."""
    return revision is not None and not ROLLING.issuperset(_between(revision, HEAD))


def _between(revision: str, newest: str) -> list[str]:
    """The revisions after the first, up to the second."""
    return [f"{number:04}" for number in range(int(revision) + 1, int(newest) + 1)]


def _wait_for_hosts_that_are_gone(engine: Engine) -> None:
    """Wait until the leases are over of hosts that haven't left a cluster, but send no heartbeat any more. Raises
    NotReady where one does, or has a lease for too long to wait."""
    first: dict[str, int] = {}
    until = time.monotonic() + _MOST_SECONDS
    while True:
        with engine.begin() as connection:
            found = _heartbeats(connection)
        if not found:
            return
        if time.monotonic() > until or any(first.setdefault(host, at) != at for host, at in found.items()):
            raise _at_work()
        time.sleep(_LOOK_SECONDS)


def _at_work() -> NotReady:
    return NotReady(
        "Hosts of this cluster are at work that can't go on with the tables of this version of ERA: stop all of them, "
        "then start this version."
    )


def _heartbeats(connection: Connection) -> Mapping[str, int]:
    """The last heartbeats of hosts that have a lease, from a table that may be an older version's."""
    if not inspect(connection).has_table(hosts.name):
        return {}
    has_lease = ~hosts.c.dead & (hosts.c.heartbeat_at + hosts.c.lease_us > database_time())
    beats = select(hosts.c.id, hosts.c.heartbeat_at).where(has_lease)
    return {row.id: row.heartbeat_at for row in connection.execute(beats)}


def _revision(engine: Engine) -> str | None:
    """The revision of the database; None for a new one."""
    with engine.begin() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(_REVISION).scalar()
