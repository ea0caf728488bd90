"""Rows by which hosts of a cluster remove content from a bucket that they share, and miss none that they need.

Theory of operation. A bucket has no locks: between the moment when a host finds content old and unneeded and the one
when it is deleted, another host may put the same content again, and name it in a row. So that stands here first. A
collection *condemns* what it is about to delete, and then looks at its age once more. Whoever puts content looks here
afterwards, before anything names it: what is condemned then isn't any more. So a put is seen by the second look if it
came before it, and has seen the row if it came after it. What is still condemned in the end is *removed*: a
transaction says until when that may go on (`gone_at`), then it is deleted, and then the row says when that was over. A
put that began before that time may be lost with it, and is made again.

Rows of what was removed stay for a day. Whoever relies on content that he put half a day ago, or longer, puts it again.
All times are the database's, so a host that was paused errs on the safe side.

Content that no row names yet is safe for an hour from its put (`Snapshots.grace_seconds`). Where most of that is over
when a batch of puts ends, a row keeps it for longer. A paused host could name it later still. So before a collection
reads what rows name, it sees to it that hosts which were declared dead can commit nothing any more
(`fence_dead_hosts`).

Why nothing is removed that a row names:

- *It was named when the collection read rows.* Then it is kept.
- *It is named only since then.* Its batch ended 20 minutes before the commit at most, if the host wasn't paused. If it
  was, it was alive at the fence, so it has put it hardly longer before that. What was put less than an hour before the
  fence is left alone, however long it takes to read rows, and so is what a row keeps, where a batch took long. A
  collection that goes on after another host has taken the lead may do so: nothing of that gets older for it.
- *A row has it from another one.* `copy_session` keeps the first until its end, so whoever reads rows sees one of them.
- *It was put at any time*, as a package set was. First a row keeps it, then it is looked for, then it is named
  (`S3Blobs.renew`, `keep_named`).
- *An import names it whose host is dead.* Its purge takes its home first, so it isn't completed with rows missing.
- *A process is killed, or an answer doesn't come.* A put without an answer is named by no row. No row that is condemned
  outlasts the next collection, and no removal its `gone_at`, which stays where an answer to a request was lost.
- *Clocks differ.* The bucket's is compared with the host's before each removal, for how long requests are good.

It takes for granted that a host whose heartbeats come commits within 20 minutes what it has put, and that the database
neither loses commits nor sets its clock back.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from itertools import batched
from typing import Any, Concatenate, NamedTuple

from sqlalchemy import Connection, bindparam, delete, exists, func, literal, select, update

from era.errors import EraError, HostLost
from era.store.engine.database import Database
from era.store.engine.dialects import Answer, Asked, Precompiled, database_time, insert_if_absent, others_hang, together
from era.store.engine.tables import condemned, homes, hosts

RELY_US = 12 * 3600 * 1_000_000
"""For how long after a put content may be relied on."""

LONG_AGO_US = 2400 * 1_000_000
"""A put this long ago doesn't keep content for long any more. More than `_FRESH_SECONDS` of s3_blobs.py."""

_KEPT_US = 6 * 3600 * 1_000_000
_REMEMBERED_US = 2 * RELY_US
_MOST_STALE_SECONDS = 30.0
_FENCED_AT_ONCE = 500
_AT_ONCE = 1000
_HANGS_SECONDS = 600.0
"""A transaction that takes longer may name content that was put long ago."""

_NOBODY = ""
"""The home of sessions that were taken from their host: no host has this id."""

LOSE_HOME = update(homes).values(host_id=_NOBODY, epoch=homes.c.epoch + 1)

_c = condemned.c
_OF = _c.digest.in_(bindparam("digests", expanding=True))
_FIND = select(database_time().label("now"), _c.digest, _c.gone_at).select_from(
    select(literal(1)).subquery().join(condemned, _OF, isouter=True)
)  # in one question, since a run waits for the answer
_IS_ALIVE = select(hosts.c.id).where(hosts.c.id == bindparam("host"), ~hosts.c.dead)
_alive = Precompiled(_IS_ALIVE.with_for_update(read=True, key_share=True))
"""This lock is in nobody's way but the fence's."""

_NOW = select(database_time())
_KEEP = update(condemned).where(_OF).values(kept_until=bindparam("until"))
_SPARE = update(condemned).where(_OF, _c.collection.is_not(None)).values(collection=None)
_CONDEMN = (
    update(condemned)
    .where(_OF, _c.gone_at < database_time(), _c.kept_until < bindparam("began"))
    .values(collection=bindparam("of"))
)
_CONDEMNED = select(_c.digest).where(_OF, _c.collection == bindparam("of"))
_BEGIN = (
    update(condemned)
    .where(_OF, _c.collection == bindparam("of"))
    .values(collection=None, gone_at=bindparam("until"))
    .returning(_c.digest)
)
_END = update(condemned).where(_OF, _c.gone_at == bindparam("until")).values(gone_at=database_time())
_FORGET = delete(condemned).where(_c.gone_at < bindparam("since"), _c.kept_until < bindparam("since"))

_dead = select(hosts.c.id).where(hosts.c.dead)
_OVERDUE = exists().where(~hosts.c.dead, hosts.c.heartbeat_at + hosts.c.lease_us < database_time())
_DEAD_HOMES = homes.c.host_id.not_in(select(hosts.c.id).where(~hosts.c.dead)) & (homes.c.host_id != _NOBODY)


class GarbageCollection(NamedTuple):
    """One collection of garbage, by which rows say who has condemned content."""

    id: str
    began: int
    """In microseconds since 1970, by the database's clock."""


class Condemned:
    """The rows of condemned content, for the threads on which content is put and removed: methods block, and are not to
    be called on the loop on which this was made. They raise OSError where the database fails. Times are in microseconds
    since 1970."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._known, self._read_at = 0, float("-inf")

    def now(self) -> int:
        """A time by the database's clock: half a minute ago at most, and never later than now."""
        with self._lock:
            if time.monotonic() - self._read_at < _MOST_STALE_SECONDS:
                return self._known
        return self.find(())[1]

    def find(self, digests: Collection[str]) -> tuple[Mapping[str, int], int]:
        """The rows of these digests, each with the time until which a removal may have gone on; and what time it is."""
        found, now = self._wait(self._database.read(_find, list(digests)))
        with self._lock:
            self._known, self._read_at = now, time.monotonic()
        return found, now

    def spare(self, digests: Collection[str], keep: Collection[str] = ()) -> tuple[Mapping[str, int], int]:
        """Condemn none of these any more, and none of `keep` for some hours; what `find` says of all of them."""

        def job(connection: Connection) -> tuple[Mapping[str, int], int]:
            _keep(connection, keep)
            concerned = sorted({*digests, *keep})
            for some in batched(concerned, _AT_ONCE):
                connection.execute(_SPARE, {"digests": some})
            return _find(connection, concerned)

        return self._write(job)

    def begin_collection(self) -> GarbageCollection:
        """Begin a collection. What others had condemned isn't any more."""

        def job(connection: Connection) -> GarbageCollection:
            now: int = connection.execute(_NOW).scalar_one()
            connection.execute(update(condemned).where(_c.collection.is_not(None)).values(collection=None))
            connection.execute(_FORGET, {"since": now - _REMEMBERED_US})
            return GarbageCollection(secrets.token_hex(16), now)

        return self._write(job)

    def condemn(self, collection: GarbageCollection, digests: Sequence[str]) -> Sequence[str]:
        """Condemn up to a thousand digests, but for those that somebody is removing or keeping; which are condemned."""

        def job(connection: Connection) -> Sequence[str]:
            insert_if_absent(connection, condemned, [_row(digest) for digest in digests])
            connection.execute(_CONDEMN, {"digests": digests, "of": collection.id, "began": collection.began})
            return list(connection.execute(_CONDEMNED, {"digests": digests, "of": collection.id}).scalars())

        return self._write(job)

    def begin_removal(
        self, collection: GarbageCollection, digests: Sequence[str], seconds: float
    ) -> tuple[Sequence[str], int]:
        """Begin to remove those of the digests that are still condemned; which these are, and until when they may be
        deleted, which is so many seconds from now."""

        def job(connection: Connection) -> tuple[Sequence[str], int]:
            until: int = connection.execute(_NOW).scalar_one() + int(seconds * 1e6)
            values = {"digests": digests, "of": collection.id, "until": until}
            return list(connection.execute(_BEGIN, values).scalars()), until

        return self._write(job)

    def end_removal(self, digests: Sequence[str], until: int) -> None:
        """Note that these are deleted, and that no request to delete them is under way any more."""

        def job(connection: Connection) -> None:
            connection.execute(_END, {"digests": digests, "until": until})

        self._write(job)

    def _write[T](self, job: Callable[Concatenate[Connection, ...], T]) -> T:
        return self._wait(self._database.write(job))

    def _wait[T](self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except EraError as error:
            raise OSError(5, error.message) from error


def _row(digest: str) -> Mapping[str, Any]:
    return {"digest": digest, "collection": None, "gone_at": 0, "kept_until": 0}


def _find(connection: Connection, digests: Sequence[str]) -> tuple[Mapping[str, int], int]:
    answers = [
        row for some in batched(digests or [""], _AT_ONCE) for row in connection.execute(_FIND, {"digests": some})
    ]
    return {row.digest: row.gone_at for row in answers if row.digest is not None}, answers[-1].now


def _keep(connection: Connection, digests: Collection[str]) -> None:
    until = connection.execute(_NOW).scalar_one() + _KEPT_US
    for some in batched(digests, _AT_ONCE):
        insert_if_absent(connection, condemned, [_row(digest) for digest in some])
        connection.execute(_KEEP, {"digests": some, "until": until})


def keep_named(connection: Connection, digest: str | None) -> None:
    """Within a transaction that names content which was put at any time: no collection that has begun removes it."""
    if digest is not None and connection.info["fence"].host_id is not None:
        _keep(connection, [digest])
        connection.execute(_SPARE, {"digests": [digest]})


def check_alive(connection: Connection, *asked: Asked) -> Sequence[Answer]:
    """See to it that this host isn't declared dead and fenced before this transaction has ended. For transactions that
    write what others share and don't check a session's home. `asked` are their next statements, which go together with
    the question; returns their answers. Raises HostLost."""
    host_id = connection.info["fence"].host_id
    if host_id is None:
        return together(connection, *asked)
    alive, *answers = together(connection, (_alive, {"host": host_id}), *asked)
    if alive.row is None:
        raise HostLost
    return answers


def lose_some_homes(connection: Connection) -> int:
    """Have dead hosts lose some of their sessions; how many. Until none is left, before `fence_dead_hosts`: whoever
    takes one of them waits for this transaction."""
    some = select(homes.c.session_key).where(_DEAD_HOMES).limit(_FENCED_AT_ONCE).with_for_update(skip_locked=True)
    keys = connection.execute(some).scalars().all()
    return connection.execute(LOSE_HOME.where(homes.c.session_key.in_(keys))).rowcount if keys else 0


def fence_dead_hosts(connection: Connection) -> bool:
    """Whether no host that is dead or hangs can commit anything any more that names content: it has no sessions, and no
    transaction under way, nor has any other host one that hangs. Outside of a cluster that is so."""
    if connection.info["fence"].host_id is None:
        return True
    lose_some_homes(connection)  # of hosts that were declared dead since
    left = connection.execute(select(func.count()).select_from(homes).where(_DEAD_HOMES)).scalar_one()
    dead = len(connection.execute(_dead.with_for_update(skip_locked=True)).all())
    at_work = connection.execute(select(func.count()).select_from(hosts).where(hosts.c.dead)).scalar_one() - dead
    if left or at_work or others_hang(connection, _HANGS_SECONDS):
        return False
    return not connection.execute(select(_OVERDUE)).scalar_one()
