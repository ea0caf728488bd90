"""Quotas of what is in rows: a transaction that makes sessions or files more than its owner may have is undone.

All writes go through one connection, one after the other, so what a transaction counts is all there is: many calls at
once can't pass a quota together. Where no quota of these is in force nothing is counted, and nothing is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Concatenate

from sqlalchemy import ColumnElement, Connection, func, select

from era.core.quotas import Bound
from era.store.session_lookup import IS_PRESENT
from era.store.tables import sessions, versions

_MIB = 1 << 20
_NAMED = 20
"""Sessions that an error names: those that fill a quota most."""

_IN_FORCE = (versions.c.session_key == sessions.c.key) & (versions.c.n == sessions.c.version)


class Passed(Exception):
    """A transaction was undone that would have passed a bound, of which `used` was taken."""

    def __init__(self, bound: Bound, used: float) -> None:
        super().__init__(bound.name)
        self.bound, self.used = bound, used


def within[**P, T](
    connection: Connection,
    bounds: Sequence[Bound],
    job: Callable[Concatenate[Connection, P], T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Do a transaction's job if it passes none of these bounds, each of `sessions` or `disk_mb`. Raises Passed where it
    adds to what is too much then, which undoes it; what only makes less of that is let through."""
    before = [_used(connection, bound) for bound in bounds]
    result = job(connection, *args, **kwargs)
    for bound, used in zip(bounds, before, strict=True):
        after = _used(connection, bound)
        if after > used and after > _most(bound):
            raise Passed(bound, used if bound.name == "sessions" else round(used / _MIB, 3))
    return result


def sizes(connection: Connection) -> Mapping[str, tuple[int, int]]:
    """How many present sessions each owner has, and the bytes of their files."""
    query = (
        select(sessions.c.owner, func.count(), func.sum(versions.c.total_bytes))
        .join(versions, _IN_FORCE)
        .where(IS_PRESENT)
        .group_by(sessions.c.owner)
    )
    return {owner: (int(count), int(size)) for owner, count, size in connection.execute(query)}


def _whose(bound: Bound) -> ColumnElement[bool]:
    return sessions.c.owner == bound.subject if bound.kind == "owner" else sessions.c.api_key_id == bound.subject


def _used(connection: Connection, bound: Bound) -> int:
    """Sessions, or bytes of their files, that count for this bound."""
    if bound.name == "sessions":
        query = select(func.count()).select_from(sessions)
    else:
        query = select(func.coalesce(func.sum(versions.c.total_bytes), 0)).join_from(sessions, versions, _IN_FORCE)
    return int(connection.execute(query.where(_whose(bound), IS_PRESENT)).scalar_one())


def _most(bound: Bound) -> int:
    return bound.most if bound.name == "sessions" else bound.most * _MIB


def filled_by(connection: Connection, bound: Bound) -> Sequence[str]:
    """The ids of the sessions that one would look at first: the oldest, or those with the largest files."""
    query = select(sessions.c.id).join(versions, _IN_FORCE).where(_whose(bound), IS_PRESENT).limit(_NAMED)
    order = sessions.c.key if bound.name == "sessions" else versions.c.total_bytes.desc()
    return list(connection.execute(query.order_by(order)).scalars())
