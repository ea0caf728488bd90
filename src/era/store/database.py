"""Transactions on an SQL database, from asyncio.

Theory of operation. Writes go through one thread and one connection, so they never wait for each other's locks and
SQLite is never asked to arbitrate; reads have a few threads and connections of their own and, thanks to the
write-ahead log, neither block the writer nor are blocked by it. Each job is one transaction: it is durable when it
returns, or an error is raised and nothing of it happened.

Errors of the database are translated here, at the edge. Their text may hold SQL, so it goes to the log only. The
writer's connection is dropped after each, since what state it is in is anybody's guess.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from sqlalchemy import Connection, Executable
from sqlalchemy.exc import SQLAlchemyError

from era.core.metadata import Retention
from era.errors import Unavailable
from era.store import dialects
from era.store.migrations import upgrade

_log = logging.getLogger(__name__)
_DEFAULT_RETENTION = Retention()


class Database:
    """What the parts of SqlStore have in common. `open` before anything, `close` when done."""

    def __init__(self, url: str, retention: Retention = _DEFAULT_RETENTION) -> None:
        self._retention = retention
        self._engines = dialects.connect(url)
        self._errors = (SQLAlchemyError, dialects.driver_error(self._engines.writer))
        self._connection: Connection | None = None
        """The writer thread's own."""

        self._writer = ThreadPoolExecutor(1, thread_name_prefix="era-write")
        self._readers = ThreadPoolExecutor(dialects.READERS, thread_name_prefix="era-read")

    async def open(self) -> None:
        """Connect and bring the schema up to date."""
        await self._on(self._writer, lambda: upgrade(self._engines.writer))

    async def close(self) -> None:
        """Let what is under way finish, then disconnect."""
        with suppress(RuntimeError):  # Closed before.
            await asyncio.get_running_loop().run_in_executor(self._writer, self._disconnect)
        for executor, engine in ((self._writer, self._engines.writer), (self._readers, self._engines.reader)):
            await asyncio.to_thread(executor.shutdown)
            engine.dispose()

    def _prepared(self, statement: Executable) -> dialects.Prepared:
        return dialects.Prepared(statement, self._engines.writer.dialect)

    async def _write[T](self, job: Callable[[Connection], T]) -> T:
        return await self._on(self._writer, lambda: self._in_writer(job))

    async def _read[T](self, job: Callable[[Connection], T]) -> T:
        return await self._on(self._readers, lambda: self._in_reader(job))

    async def _on[T](self, executor: ThreadPoolExecutor, job: Callable[[], T]) -> T:
        try:
            future = asyncio.get_running_loop().run_in_executor(executor, job)
        except RuntimeError as error:  # After `close`.
            raise Unavailable("the service is shutting down") from error
        try:
            return await future
        except self._errors as error:
            _log.error("the database failed: %s", getattr(error, "orig", None) or error)
            raise Unavailable("the database failed") from error

    def _in_writer[T](self, job: Callable[[Connection], T]) -> T:
        if self._connection is None:
            self._connection = self._engines.writer.connect()
        try:
            with self._connection.begin():
                return job(self._connection)
        except self._errors:
            self._disconnect()
            raise

    def _in_reader[T](self, job: Callable[[Connection], T]) -> T:
        with self._engines.reader.begin() as connection:
            return job(connection)

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.invalidate()
            connection.close()
