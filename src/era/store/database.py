"""Transactions on an SQL database, from asyncio.

Theory of operation. Writes go through one thread and one connection, so they never wait for each other's locks and
SQLite is never asked to arbitrate; reads have a few threads and connections of their own and, thanks to the
write-ahead log, neither block the writer nor are blocked by it. Each job is one transaction: it is durable when it
returns, or an error is raised and nothing of it happened. Only `write_unsynced` leaves out the wait for the disk: what
it wrote survives this process, and is durable once a later transaction is.

Errors of the database become Unavailable here. Their text may hold SQL, so it goes to the log only. The writer's
connection is dropped after each, since nobody knows what state it is in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Concatenate

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from era.errors import Unavailable
from era.store import dialects
from era.store.migrations import upgrade

_log = logging.getLogger(__name__)


class Database:
    """Runs jobs, functions that take a connection first, as transactions. `open` before anything, `close` when done."""

    def __init__(self, url: str) -> None:
        """`url` is SQLAlchemy's. Raises ValueError where it can't hold a store; see `dialects.connect`."""
        self.engines = dialects.connect(url)
        self._errors = (SQLAlchemyError, dialects.driver_error(self.engines.writer))
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="era-write")
        self._readers = ThreadPoolExecutor(dialects.READERS, thread_name_prefix="era-read")
        self._connection: Connection | None = None
        self._syncs = True
        """Whether that connection syncs its commits. Both are used by the writer's thread only."""

    async def open(self) -> None:
        """Connect and bring the schema up to date. Raises Unavailable."""
        await self._on(self._writer, lambda: upgrade(self.engines.writer))

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

    async def read[**P, T](self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `job(connection, …)` in a transaction that only reads, and sees the database at one moment.

        Raises Unavailable where the database failed.
        """
        return await self._on(self._readers, lambda: self._in_reader(job, *args, **kwargs))

    async def _on[T](self, executor: ThreadPoolExecutor, job: Callable[[], T]) -> T:
        """Run a job on a thread. Raises Unavailable where the database fails or is closed."""
        try:
            future = asyncio.get_running_loop().run_in_executor(executor, job)
        except RuntimeError as error:  # After `close`.
            raise Unavailable("the service is shutting down") from error
        try:
            return await future
        except self._errors as error:
            _log.error("the database failed: %s", getattr(error, "orig", None) or error)
            raise Unavailable("the database failed") from error

    def _in_writer[**P, T](
        self, syncs: bool, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if self._connection is None:
            self._connection, self._syncs = self.engines.writer.connect(), True
        try:
            if syncs != self._syncs:
                dialects.set_synced(self._connection, syncs)
                self._syncs = syncs
            with self._connection.begin():
                return job(self._connection, *args, **kwargs)
        except self._errors:
            self._disconnect()
            raise

    def _in_reader[**P, T](self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self.engines.reader.begin() as connection:
            return job(connection, *args, **kwargs)

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.invalidate()
            connection.close()
