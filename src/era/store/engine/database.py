"""Transactions on an SQL database, from asyncio.

Theory of operation. Writes go through one thread and one connection, so they never wait for each other's locks and
SQLite is never asked to arbitrate; reads have a few threads and connections of their own and, thanks to the
write-ahead log, neither block the writer nor are blocked by it. Those that may take long for an owner have a turn of
his (`read_for`). Each job is one transaction: it is durable when it returns, or an error is raised and nothing of it
happened. Only `write_unsynced` leaves out the wait for the disk: what it wrote survives this process, and is durable
once a later transaction is.

Errors of the database become Unavailable here. Their text may hold SQL, so it goes to the log only. The writer's
connection is dropped after each, since nobody knows what state it is in; but not where PostgreSQL has undone the
transaction for the sake of another host's. That is common where hosts have much to do, and the job is run again up to
a hundred times.

A server of PostgreSQL may go and come back. Where a connection is found to be cut off before COMMIT is sent, nothing
has happened: another one is made without a word, and the job run again, once. If none can be made it fails with
DatabaseAway, and the next job tries to connect again. If it was cut off during COMMIT, nobody here can know whether
that happened, and the error says so: who can find out by what it wrote does (`end_run`).

The same goes for SQLite where the disk fails during COMMIT: what it wrote may count once this process was killed. So
nothing else is written until that is settled (`dialects.settle`), and a collection of garbage, which writes first,
removes nothing. Where a service was killed meanwhile, the next start settles it, if no other program reads the database
just then.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Concatenate

from sqlalchemy import Connection, RootTransaction, event
from sqlalchemy.exc import SQLAlchemyError

from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.tasks import to_its_end
from era.errors import BadRequest, OutcomeUnknown, Unavailable
from era.store.engine import dialects
from era.store.engine.owned_totals import OwnedTotals
from era.store.migrations import upgrade

_log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 30.0
PROMPT_SECONDS = 20.0
"""For which a short read waits for a server that hangs."""

_RECONNECT_SECONDS = 0.2
_TRIES, _UNDONE_TRIES = 10, 100
"""Of a transaction that finds a value taken, and of one that others got in the way of otherwise."""

_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.004, 0.2
"""Between two tries: at random, up to the first times the number of tries, and no longer than the second."""

_UNDO = "undo"
"""Where a connection's `info` has what `if_undone` was given."""


class DatabaseAway(Unavailable):
    """The database's server can't be reached, or has cut the connection off.

    `may_have_committed`: it did so during COMMIT, so that what was to be written may have been written; or the disk
    failed SQLite then. Clients see an OutcomeUnknown.
    """

    retry_after: int | None = 2

    def __init__(self, *, may_have_committed: bool) -> None:
        if may_have_committed:
            super().__init__(
                "the database was cut off, or failed, while it stored this: whether it did is not known",
                hint=OutcomeUnknown.hint,
                code=OutcomeUnknown.code,
            )
            self.retry_after = None
        else:
            super().__init__("the database can't be reached")
        self.may_have_committed = may_have_committed


class _CutOffInCommit(Exception):
    """COMMIT was sent, and its answer didn't come; or SQLite's says that the disk failed."""


@dataclass(slots=True)
class Fence:
    """What a host of a cluster knows of itself when it checks what it changes (homes.py)."""

    host_id: str | None = None
    """None outside of a cluster: then nothing is checked."""

    held: dict[int, int] = field(default_factory=dict)
    """The epochs at which sessions were taken, by their keys."""

    is_another: Callable[[str, int], bool] = lambda _id, _key: False
    """Whether a session that was found is another than was at home here under its id (Homes.is_another)."""


class Database:
    """Runs jobs, functions that take a connection first, as transactions. `open` before anything, `close` when done."""

    def __init__(
        self,
        url: str,
        *,
        alone: bool = True,
        notices_within: float | None = None,
        hangs_within: float | None = None,
        waits_within: float | None = None,
        name: str | None = None,
    ) -> None:
        """Raises ValueError where the URL can't hold a store; see `dialects.connect`, also for the rest. The writer's
        connection has this `name` for `dialects.cut_off`."""
        self.engines = dialects.connect(
            url, alone=alone, notices_within=notices_within, hangs_within=hangs_within, waits_within=waits_within
        )
        self._waits_within = waits_within
        self._name = name
        self.fence = Fence()
        self.owned_totals = OwnedTotals(alone=alone)
        """These two are in the `info` of each connection that writes."""

        @event.listens_for(self.engines.reader, "connect")
        def began_to_read(_: Any, record: Any) -> None:
            record.info["fence"] = self.fence

        @event.listens_for(self.engines.writer, "connect")
        def connected(connection: Any, record: Any) -> None:
            record.info.update(fence=self.fence, owned_totals=self.owned_totals)
            if self._name is not None and self.engines.writer.dialect.name != "sqlite":
                dialects.name_driver_connection(connection, self._name)

        self._errors = (SQLAlchemyError, dialects.driver_error(self.engines.writer))
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="era-write")
        self._readers = ThreadPoolExecutor(self.engines.readers, thread_name_prefix="era-read")
        self._long_reads = FairLimiter(self.engines.readers - 2, of_owner=1)
        self._dumps = FairLimiter(1)
        self._connection: Connection | None = None
        self._syncs = True
        """Whether that connection syncs its commits."""

        self._is_unsettled = False
        """Whether a COMMIT of SQLite's failed, so that `dialects.settle` comes before anything else. All three are used
        by the writer's thread only."""

    async def call_writer(self, name: str) -> None:
        """Name the writer's connection, and those that come after it. Raises Unavailable."""

        def job() -> None:
            self._name = name
            self._disconnect()
            self.engines.writer.dispose()  # and what has been used before it had a name

        await self._on(self._writer, job)

    async def open(self) -> None:
        """Connect and bring the schema up to date. Raises NotReady, Unavailable."""

        def connect() -> None:
            dialects.check_server(self.engines.writer)
            try:
                dialects.settle_log(self.engines.writer)
            except dialects.LogIsRead:  # by another program, for which nobody shall wait
                _log.warning("The log of the database can't be emptied while another program reads it.")
            upgrade(self.engines.writer)

        await self._on(self._writer, connect)

    async def close(self) -> None:
        """Let jobs that have begun finish, then disconnect. May be called twice."""
        with suppress(RuntimeError):  # Closed before.
            await asyncio.get_running_loop().run_in_executor(self._writer, self._disconnect)
        for executor, engine in ((self._writer, self.engines.writer), (self._readers, self.engines.reader)):
            await asyncio.to_thread(executor.shutdown)
            engine.dispose()

    async def write[**P, T](self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `job(connection, …)` in a transaction that may write; its result, once that is committed.

        An exception of the job's own is raised on, and rolls back. Raises Unavailable where the database failed.
        """
        return await self._on(self._writer, lambda: self._in_writer(True, job, *args, **kwargs))

    async def write_unsynced[**P, T](
        self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`write`, but a power cut may undo it until another `write` returns: no answer may depend on it before."""
        return await self._on(self._writer, lambda: self._in_writer(False, job, *args, **kwargs))

    async def write_once[T](
        self,
        job: Callable[..., T],
        *args: Any,
        patient: bool,
        syncs: bool = True,
        known: Callable[[T], object] | None = None,
        **kwargs: Any,
    ) -> T:
        """`write` a job that can tell whether it was committed before, and is told with `again` that it may have been.

        So a COMMIT whose answer didn't come is resolved as soon as the database is back. It is waited for, as
        `_PATIENCE_SECONDS` says, then, and for a `patient` caller whenever it is away.

        `known` gets the job's first result before the commit, where only a failure can come of that any more: on
        SQLite. PostgreSQL may undo the transaction at its COMMIT, and have the job find something else.
        """
        again, deadline = False, None
        if known is not None and self.engines.writer.dialect.name == "sqlite":
            job = partial(_telling, asyncio.get_running_loop(), known, job)
        while True:
            try:
                return await self._on(self._writer, partial(self._in_writer, syncs, job, *args, again=again, **kwargs))
            except DatabaseAway as error:
                again |= error.may_have_committed
                deadline = deadline or time.monotonic() + _PATIENCE_SECONDS
                if not (patient or again) or time.monotonic() >= deadline:
                    raise DatabaseAway(may_have_committed=again) from error
            except Unavailable as error:
                if again and type(error) is Unavailable:  # of the database, not of what the job has found there
                    raise DatabaseAway(may_have_committed=True) from error
                raise
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def read[**P, T](self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `job(connection, …)` in a transaction that only reads, and sees the database at one moment. Where its
        connection was cut off it is run again.

        Raises Unavailable where the database failed.
        """
        return await self._on(self._readers, lambda: self._in_reader(job, *args, **kwargs))

    async def read_promptly[**P, T](
        self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`read` what takes milliseconds. Raises DatabaseAway besides where a server that hangs doesn't answer within
        `PROMPT_SECONDS`."""
        try:
            async with asyncio.timeout(PROMPT_SECONDS):
                return await self.read(job, *args, **kwargs)
        except TimeoutError:
            raise DatabaseAway(may_have_committed=False) from None

    async def read_for[**P, T](
        self, owner: str, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`read` what takes longer the more an owner has, and is asked for as often as he likes. One of his is done at
        a time, so that others have theirs meanwhile, and of all owners' two fewer than there are readers: they keep no
        short reads waiting, such as that of GET /health. One whose caller is gone counts until it has ended."""
        async with self._long_reads.slot(owner):
            return await to_its_end(self.read(job, *args, **kwargs))

    async def read_dump[**P, T](
        self, owner: str, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`read` a whole session, which may take minutes, so that one reader is for that alone, for owners in turn."""
        async with self._dumps.slot(owner):
            return await to_its_end(self.read(job, *args, **kwargs))

    async def _on[T](self, executor: ThreadPoolExecutor, job: Callable[[], T]) -> T:
        """Run a job on a thread. Raises Unavailable where the database fails or is closed."""
        try:
            future = asyncio.get_running_loop().run_in_executor(executor, job)
        except RuntimeError as error:  # After `close`.
            raise Unavailable("the service is shutting down") from error
        try:
            return await future
        except _CutOffInCommit as error:
            _log.error("the database was cut off, or failed, during a commit: %s", dialects.message(error.__cause__))
            raise DatabaseAway(may_have_committed=True) from error
        except self._errors as error:
            if dialects.refuses_nul(self.engines.writer, error):
                raise BadRequest("Text with a NUL character can't be stored.", hint="Leave the NUL out.") from error
            _log.error("the database failed: %s", dialects.message(error))
            if self._waits_within is None and dialects.is_taken(error):
                raise Unavailable("another ERA service has taken over the database") from error
            if isinstance(error, dialects.LogIsRead) or dialects.is_away(self.engines.writer, error):
                raise DatabaseAway(may_have_committed=False) from error
            raise Unavailable("the database failed") from error

    def _in_writer[**P, T](
        self, syncs: bool, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        may_be_cut_off = self._connection is not None
        for tries in itertools.count(1):
            try:
                return self._try_to_write(syncs, job, *args, **kwargs)
            except self._errors as error:
                if not dialects.may_run_again(self.engines.writer, error):
                    self._disconnect()
                    if may_be_cut_off and dialects.is_away(self.engines.writer, error):
                        may_be_cut_off = False
                        continue
                    raise
                if tries >= (_TRIES if dialects.violates_unique(error) else _UNDONE_TRIES):
                    raise
            time.sleep(random.uniform(0, min(_PAUSE_SECONDS * tries, _LONGEST_PAUSE_SECONDS)))  # noqa: S311  no secret
        raise AssertionError

    def _try_to_write[**P, T](
        self, syncs: bool, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        connection, transaction = self._begin_to_write(syncs)
        undo = connection.info[_UNDO] = list[Callable[[], None]]()
        try:
            result = job(connection, *args, **kwargs)
        except BaseException:
            _all(undo)
            transaction.rollback()
            raise
        try:
            transaction.commit()
        except self._errors as error:
            _all(undo)
            if dialects.was_undone(error):
                transaction.rollback()
                raise
            self._is_unsettled = connection.dialect.name == "sqlite"
            self._disconnect()
            raise _CutOffInCommit from error
        return result

    def _begin_to_write(self, syncs: bool) -> tuple[Connection, RootTransaction]:
        """The writer's connection, in a transaction."""
        if self._connection is None:
            self._connection, self._syncs = self.engines.writer.connect(), True
        if self._is_unsettled:
            dialects.settle(self._connection)
            self._is_unsettled = False
        if syncs != self._syncs:
            dialects.set_synced(self._connection, syncs)
            self._syncs = syncs
        return self._connection, self._connection.begin()

    def _in_reader[**P, T](self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        for may_be_cut_off in (True, False):
            with self.engines.reader.connect() as connection:
                connection.begin()
                try:
                    return job(connection, *args, **kwargs)
                except self._errors as error:
                    if not dialects.is_away(self.engines.reader, error):
                        raise
                    with suppress(*self._errors):  # SQLAlchemy finds it so itself, and gives up the pool's others, too.
                        connection.exec_driver_sql("SELECT 1")
                    connection.invalidate()
                    if not may_be_cut_off:
                        raise
        raise AssertionError

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.invalidate()
            connection.close()


def if_undone(connection: Connection, undo: Callable[[], None]) -> None:
    """Have this called, on the writer's thread, if the transaction under way isn't committed, or may not be."""
    connection.info[_UNDO].append(undo)


def _all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _telling[T](
    loop: asyncio.AbstractEventLoop,
    known: Callable[[T], object],
    job: Callable[..., T],
    *args: Any,
    again: bool,
    **kwargs: Any,
) -> T:
    """What the job returns, after telling `known` of it on its loop; but not `again`, as an earlier try has."""
    result = job(*args, again=again, **kwargs)
    if not again:
        loop.call_soon_threadsafe(known, result)
    return result
