"""The base of the classes of rows, whose methods are transactions.

A method that is marked with `reads` or `writes` is the body of one transaction: its first argument is the connection,
which callers leave out and await the result. It runs on a thread of the database's, and runs again where Database says
so, so all that it changes is in the database.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from functools import wraps
from typing import Any, Concatenate

from sqlalchemy import Connection, UpdateBase

from era.core.metadata import Retention
from era.core.models import OwnedId
from era.core.owners.quotas import Bound
from era.store import quotas
from era.store.engine.database import Database

MADE = ("sessions", "disk_mb")
"""The quotas that a transaction may reach that makes a session present."""

GROWN = ("disk_mb",)
"""The quotas that a transaction may reach that makes a version."""

_DEFAULT_RETENTION = Retention()


class Rows:
    """Rows in a database. What a method does, takes and raises stands in the core's port."""

    def __init__(self, database: Database, retention: Retention = _DEFAULT_RETENTION) -> None:
        self.database = database
        self.retention = retention
        self.bounds: Callable[..., Sequence[Bound]] = lambda *_: ()
        """Quotas.bounds, once there are quotas."""

    def bounded(
        self, connection: Connection, who: OwnedId | None, changed: str, *names: str
    ) -> AbstractContextManager[None]:
        """A block that changes or makes the session with the id `changed`, for which `who` calls, and may make more of
        what the quotas of these names bound. Without `writes`, it needs `reporting_quotas` around its transaction."""
        bounds = self.bounds(who, *names) if who is not None and names else ()
        return quotas.within(connection, changed, bounds)

    @asynccontextmanager
    async def reporting_quotas(self) -> AsyncIterator[None]:
        """Raises QuotaReached where a transaction in the block has passed a bound; it names what fills the quota."""
        try:
            yield
        except quotas.Passed as passed:
            names = await self.database.read(quotas.filled_by, passed.bound)
            raise passed.bound.reached(passed.used, names) from None

    async def until_none_left(self, statement: UpdateBase, values: Mapping[str, Any]) -> int:
        """Run a statement that changes some rows until there are no more of them, in small transactions, since others
        want to write, too; how many there were."""
        total = 0
        while count := await self.database.write(lambda connection: connection.execute(statement, values).rowcount):
            total += count
        return total


def reads[S: Rows, **P, T](
    body: Callable[Concatenate[S, Connection, P], T],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Make a method a transaction that only reads. See Database.read."""

    @wraps(body)
    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.database.read(lambda connection: body(self, connection, *args, **kwargs))

    return call


def writes[S: Rows, **P, T](
    body: Callable[Concatenate[S, Connection, P], T],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Make a method a transaction that may write. See Database.write."""

    @wraps(body)
    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        async with self.reporting_quotas():
            return await self.database.write(lambda connection: body(self, connection, *args, **kwargs))

    return call
