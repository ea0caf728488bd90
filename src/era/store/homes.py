"""Hosts and homes: the rows of a cluster, and the check that each change of a session makes in its own transaction.

Theory of operation. `check` is called by whatever changes a session, with the connection of that change. It reads the
session's home, and on PostgreSQL holds that row until the transaction ends (SQLite lets one transaction write at a
time anyway). So a home is either taken before the change, which then fails, or after it, and then the new home starts
from what was changed. Outside of a cluster it is one look at an attribute.

Which host a connection is of stands in its `info`, as a `Fence` that all connections of a `Database` share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, bindparam, delete, exists, func, insert, select, update

from era.core.cluster.homes import Home, Host, HostRecord, Place, View
from era.errors import Fenced, HostLost, SessionMoved
from era.store.engine.database import Database, Fence, if_undone
from era.store.engine.dialects import (
    Answer,
    Asked,
    Precompiled,
    cut_off,
    database_time,
    insert_if_absent,
    see_each_commit,
    together,
)
from era.store.engine.tables import deliveries, has_status, homes, hosts, leader, processes, runs, sessions
from era.store.migrations import check_revision
from era.store.session_lookup import IS_PRESENT
from era.store.usage import count_lost
from era.store.webhooks import tell_lost

LOST = "the host that ran it is dead"

_LATE = 0.5
"""Part of a lease without a heartbeat after which the host that sends one is patient with the others."""

_FORGOTTEN_US = 3600 * 1_000_000
"""How long the rows of dead hosts are kept, for people to look at. A host without a row is dead, too."""

_ALIVE = select(hosts.c.id, hosts.c.url).where(~hosts.c.dead)
_AT_URL = select(hosts.c.id, hosts.c.heartbeat_at).where(
    hosts.c.url == bindparam("at_url"), ~hosts.c.dead, hosts.c.heartbeat_at + hosts.c.lease_us > database_time()
)
_HOLD = select(homes.c.epoch).where(homes.c.session_key == bindparam("session"), homes.c.host_id == bindparam("host"))
_hold = Precompiled(_HOLD.with_for_update(read=True))
_IS_THERE = select(sessions.c.key).where(sessions.c.key == bindparam("session"))
_HOME = select(homes.c.host_id, homes.c.epoch).where(homes.c.session_key == bindparam("session")).with_for_update()
_HOST = select(hosts.c.url).where(hosts.c.id == bindparam("host"), ~hosts.c.dead)
_HOSTS_OF = (
    select(homes.c.session_key, hosts.c.id, hosts.c.url)
    .join(hosts, (hosts.c.id == homes.c.host_id) & ~hosts.c.dead)
    .where(homes.c.session_key.in_(bindparam("keys", expanding=True)))
)
_AT_ONCE = 1000
"""Sessions of which one query finds the hosts."""

_MOVE = (
    update(homes)
    .where(homes.c.session_key == bindparam("session"))
    .values(host_id=bindparam("new_host"), epoch=homes.c.epoch + 1)
)
_IS_ALIVE = exists().where(hosts.c.id == bindparam("new_host"), ~hosts.c.dead)
_GIVE = _MOVE.where(homes.c.host_id == bindparam("host"), _IS_ALIVE)
_PLACE = (
    select(sessions.c.key, sessions.c.package_set, homes.c.epoch, hosts.c.id, hosts.c.url)
    .select_from(sessions)
    .join(homes, homes.c.session_key == sessions.c.key, isouter=True)
    .join(hosts, (hosts.c.id == homes.c.host_id) & ~hosts.c.dead, isouter=True)
    .where(IS_PRESENT)
)
_BY_ID = _PLACE.where(sessions.c.id == bindparam("session"))
_BY_KEY = _PLACE.where(sessions.c.key == bindparam("session"))

_SINCE = select(
    database_time().label("now"),
    (database_time() - hosts.c.heartbeat_at).label("since"),
    hosts.c.lease_us,
    hosts.c.dead,
).where(hosts.c.id == bindparam("host"))
_RENEW = (
    update(hosts)
    .where(hosts.c.id == bindparam("host"), ~hosts.c.dead)
    .values(heartbeat_at=database_time(), url=bindparam("new_url"))
)
_IS_OVERDUE = (
    ~hosts.c.dead & (hosts.c.heartbeat_at + hosts.c.lease_us < bindparam("at")) & (hosts.c.id != bindparam("host"))
)
_FORGET = delete(hosts).where(
    hosts.c.id.in_(
        select(hosts.c.id)
        .where(hosts.c.dead, hosts.c.heartbeat_at + _FORGOTTEN_US < database_time())
        # A transaction of the dead host may still hold its row: heartbeats of other hosts must not wait for its end.
        .with_for_update(skip_locked=True)
    )
)
_LEADER = select(leader.c.host_id)
_RECORDS = select(hosts.c.id, hosts.c.url, hosts.c.started_at, hosts.c.heartbeat_at, hosts.c.dead).order_by(
    hosts.c.started_at, hosts.c.id
)
_AT_HOME = (
    select(homes.c.host_id, func.count())
    .join(sessions, (sessions.c.key == homes.c.session_key) & IS_PRESENT)
    .group_by(homes.c.host_id)
)


def _homeless(session_key: Any) -> Any:
    """Whether the host of the session with this key is dead, or it has none."""
    home = homes.c.session_key == session_key
    return ~exists().where(home, hosts.c.id == homes.c.host_id, ~hosts.c.dead)


_LOST_RUNS = has_status(runs, "running") & _homeless(runs.c.session_key)
_LOST_PROCESSES = has_status(processes, "running") & _homeless(processes.c.session_key)
_LOST_DELIVERIES = has_status(deliveries, "running") & _homeless(deliveries.c.session_key)
_ANY_LOST = select(
    select(runs.c.key).where(_LOST_RUNS).exists()
    | select(processes.c.key).where(_LOST_PROCESSES).exists()
    | select(deliveries.c.key).where(_LOST_DELIVERIES).exists()
)


class HomeRows:
    """See core.homes.HomeStore."""

    def __init__(self, beats: Database, database: Database, checked: Database) -> None:
        """`beats` is for heartbeats, which wait for nobody's turn and for no lock for long; `database` for all else of
        hosts and homes. `checked` is the one whose changes of sessions are checked."""
        self._database = database
        self._beats = beats
        self._checked = checked
        self._patient_until = -math.inf
        """Until when nobody is declared dead from here, by the monotonic clock."""

    async def join(self, host: Host, lease_seconds: float) -> View:
        lease_us = int(lease_seconds * 1e6)

        def job(connection: Connection) -> View:
            values = {"id": host.id, "url": host.url, "lease_us": lease_us, "dead": False}
            times = {"started_at": database_time(), "heartbeat_at": database_time()}
            check_revision(connection)
            connection.execute(insert(hosts).values(values | times))
            return _look(connection, host, declares=False)

        view = await self._database.write(job)
        self._checked.fence.host_id = host.id
        for database in {self._beats, self._database, self._checked}:
            await database.call_writer(host.id)
        return view

    async def beat(self, host: Host, renewed: Callable[[], None] = lambda: None) -> View:
        # Apart: a transaction that changes one host's row and looks at all would be in the way of those of all others.
        # A heartbeat that a power cut undoes went together with the host.
        since_us, lease_us = await self._beats.write_unsynced(_renew, host)
        renewed()
        lease, at = lease_us / 1e6, time.monotonic()
        if since_us > _LATE * lease_us and at >= self._patient_until + lease:
            # Perhaps the database was away for all: whoever comes back to it first may not take what is the others'.
            # But one that is late again and again, on a machine with too much to do, isn't patient for ever.
            self._patient_until = at + lease
        return await self._beats.write_unsynced(_look, host, declares=time.monotonic() >= self._patient_until)

    async def leave(self, host_id: str) -> None:
        def job(connection: Connection) -> None:
            connection.execute(update(hosts).where(hosts.c.id == host_id).values(dead=True))
            _mark_lost(connection)

        await self._database.write(job)

    async def heartbeats_at(self, url: str) -> Mapping[str, int]:
        def job(connection: Connection) -> Mapping[str, int]:
            return {row.id: row.heartbeat_at for row in connection.execute(_AT_URL, {"at_url": url})}

        return await self._database.read(job)

    async def records(self) -> Sequence[HostRecord]:
        def job(connection: Connection) -> Sequence[HostRecord]:
            counts = {row[0]: row[1] for row in connection.execute(_AT_HOME)}
            leading = connection.execute(_LEADER).scalar_one_or_none()
            return [
                HostRecord(
                    Host(row.id, row.url),
                    row.started_at,
                    row.heartbeat_at,
                    row.dead,
                    not row.dead and row.id == leading,
                    counts.get(row.id, 0),
                )
                for row in connection.execute(_RECORDS)
            ]

        return await self._database.read(job)

    async def find(self, session: str | int) -> Place | None:
        query = _BY_ID if isinstance(session, str) else _BY_KEY

        def job(connection: Connection) -> Place | None:
            row = connection.execute(query, {"session": session}).one_or_none()
            if row is None:
                return None
            home = None if row.id is None else Home(Host(row.id, row.url), row.epoch)
            return Place(row.key, home, row.package_set)

        return await self._database.read_promptly(job)

    async def hosts_of(self, session_keys: Sequence[int]) -> Mapping[int, Host]:
        def job(connection: Connection) -> Mapping[int, Host]:
            found = {}
            for start in range(0, len(session_keys), _AT_ONCE):
                for row in connection.execute(_HOSTS_OF, {"keys": session_keys[start : start + _AT_ONCE]}):
                    found[row.session_key] = Host(row.id, row.url)
            return found

        return await self._database.read(job)

    async def take(self, session_key: int) -> Home:
        return await self._database.write(take_home, self._checked.fence, session_key)

    async def give(self, session_key: int, host_id: str) -> bool:
        values = {"session": session_key, "host": self._checked.fence.host_id, "new_host": host_id}

        def job(connection: Connection) -> bool:
            return connection.execute(_GIVE, values).rowcount > 0

        return await self._database.write(job)

    def forget(self, session_key: int) -> None:
        self._checked.fence.held.pop(session_key, None)


def take_home(connection: Connection, fence: Fence, session_key: int) -> Home:
    """See HomeStore.take."""
    own = connection.execute(_HOST, {"host": fence.host_id}).one_or_none()
    if own is None or fence.host_id is None:
        raise HostLost
    first = {"session_key": session_key, "host_id": fence.host_id, "epoch": 1}
    row = connection.execute(_HOME, {"session": session_key}).one_or_none()
    if row is None and not insert_if_absent(connection, homes, first):
        row = connection.execute(_HOME, {"session": session_key}).one()
    if row is not None and row.host_id != fence.host_id:
        other = connection.execute(_HOST, {"host": row.host_id}).one_or_none()
        if other is not None:
            return Home(Host(row.host_id, other.url), row.epoch)
        # What its dead host began is found by that host's home, so before it moves.
        _mark_lost(connection, session_key)
        connection.execute(_MOVE, {"session": session_key, "new_host": fence.host_id})
    epoch: int = connection.execute(_HOME, {"session": session_key}).one().epoch
    if_undone(connection, partial(_held_before, fence, session_key, fence.held.get(session_key)))
    fence.held[session_key] = epoch
    while len(fence.held) > _MOST_HELD:
        fence.held.pop(next(iter(fence.held)))
    return Home(Host(fence.host_id, own.url), epoch)


def _held_before(fence: Fence, session_key: int, epoch: int | None) -> None:
    """Know again what was known before a session was taken."""
    if epoch is None:
        fence.held.pop(session_key, None)
    else:
        fence.held[session_key] = epoch


_MOST_HELD = 200_000
"""Sessions whose epochs are remembered; of any other it is read anew."""


def check_home(connection: Connection, session_key: int, *asked: Asked, goes_on: bool = False) -> Sequence[Answer]:
    """See to it that the session is at home here until this transaction ends. Takes it where nobody else has it, unless
    what is to be written `goes_on` with something that began while it was at home here.

    `asked` are the transaction's next statements, which go together with the question; returns their answers.
    Raises SessionMoved, or Fenced where the session was at home here and isn't any more: then what they did is undone
    with the transaction.
    """
    fence: Fence = connection.info["fence"]
    if fence.host_id is None:
        return together(connection, *asked)
    epoch = fence.held.get(session_key)
    if epoch is not None or goes_on:
        held, *answers = together(connection, (_hold, {"session": session_key, "host": fence.host_id}), *asked)
        if held.row is not None and epoch in (None, held.row[0]):
            return answers
        fence.held.pop(session_key, None)
        if connection.execute(_IS_THERE, {"session": session_key}).first() is None:
            return answers  # It was purged, and its home with it: whoever writes finds that out.
        raise Fenced("This session has another home by now, and nothing of this was kept.")
    if take_home(connection, fence, session_key).host.id != fence.host_id:
        raise SessionMoved("This session is at home at another host by now.")
    return together(connection, *asked)


def _renew(connection: Connection, host: Host) -> tuple[int, int]:
    """Renew the lease and note the URL; the microseconds since it was renewed before, and those of a lease. Raises
    HostLost."""
    see_each_commit(connection)
    before = connection.execute(_SINCE, {"host": host.id}).one_or_none()
    if before is None or not connection.execute(_RENEW, {"host": host.id, "new_url": host.url}).rowcount:
        raise HostLost
    return before.since, before.lease_us


def _look(connection: Connection, host: Host, *, declares: bool) -> View:
    """Declare dead the hosts whose leases are over, if it `declares` any, and take the lead if nobody alive has it; see
    HomeStore.beat."""
    own = connection.execute(_SINCE, {"host": host.id}).one_or_none()
    if own is None or own.dead:  # it was paused since it renewed its lease
        raise HostLost
    declared = 0
    # A commit that took that long, or a lock, may have kept the others' heartbeats waiting, too.
    if declares and own.since <= _LATE * own.lease_us:
        overdue = {"host": host.id, "at": own.now}
        gone = connection.execute(select(hosts.c.id).where(_IS_OVERDUE), overdue).scalars().all()
        if gone:
            # What they have locked is to be changed now, and they may be paused at any point.
            cut_off(connection, gone)
            declared = connection.execute(update(hosts).where(_IS_OVERDUE).values(dead=True), overdue).rowcount
    connection.execute(_FORGET)
    alive: Mapping[str, Host] = {row.id: Host(row.id, row.url) for row in connection.execute(_ALIVE)}
    leading = connection.execute(_LEADER).scalar_one_or_none()
    if leading is None:
        insert_if_absent(connection, leader, {"only": 1, "host_id": host.id})
        leading = connection.execute(_LEADER).scalar_one()
    if leading not in alive:
        connection.execute(update(leader).values(host_id=host.id))
        leading = host.id
    found = declared or (leading == host.id and connection.execute(_ANY_LOST).scalar_one())
    lost = _mark_lost(connection) if found else 0
    return View(alive, leading, own.now, lost)


def _mark_lost(connection: Connection, only: int | None = None) -> int:
    """Record as lost what dead hosts were doing, in one session where its key is given; how many runs. Their deliveries
    are pending again."""

    def lost(table: Table, which: ColumnElement[bool]) -> ColumnElement[bool]:
        return which if only is None else which & (table.c.session_key == only)

    tell_lost(connection, lost(runs, _LOST_RUNS))
    count_lost(connection, lost(runs, _LOST_RUNS))
    at = {"ended_at": database_time(), "reason": LOST, "status": "lost"}
    count = connection.execute(update(runs).where(lost(runs, _LOST_RUNS)).values(at)).rowcount
    connection.execute(update(processes).where(lost(processes, _LOST_PROCESSES)).values(at))
    connection.execute(update(deliveries).where(lost(deliveries, _LOST_DELIVERIES)).values(status="pending"))
    return count
