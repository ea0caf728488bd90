"""Quotas of what is in rows: a transaction that makes sessions or files more than its owner may have is undone.

All writes go through one connection, one after the other, so what a transaction counts is all there is: many calls at
once can't pass a quota together. Where no quota of these is in force nothing is counted, and nothing is slower; where
one is, what the session in question had before and has afterwards is looked at, and all of its owner's sessions only if
it isn't known that they leave room for what it adds (owned_totals.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from sqlalchemy import ColumnElement, Connection, func, select

from era.core.owners.quotas import Bound
from era.store.engine.owned_totals import OwnedTotals
from era.store.engine.tables import sessions, versions
from era.store.session_lookup import IN_FORCE, IS_PRESENT

_MIB = 1 << 20
_NAMED = 20
"""Sessions that an error names: those that fill a quota most."""


class Passed(Exception):
    """A transaction was undone that would have passed a bound, of which `used` was taken."""

    def __init__(self, bound: Bound, used: float) -> None:
        super().__init__(bound.name)
        self.bound, self.used = bound, used


@contextmanager
def within(connection: Connection, changed: str, bounds: Sequence[Bound]) -> Iterator[None]:
    """A part of a transaction that changes or makes the session with the id `changed`, and passes none of these bounds,
    each of `sessions` or `disk_mb`. Raises Passed where it adds to what is too much then, which undoes the transaction;
    what only makes less of that is let through."""
    before = [_used(connection, bound, changed) for bound in bounds]
    yield
    totals: OwnedTotals = connection.info["owned_totals"]
    for bound, used in zip(bounds, before, strict=True):
        growth = _used(connection, bound, changed) - used
        # A key's sessions also grow by calls with other keys, which its bound isn't asked for.
        is_owners = bound.kind == "owner"
        if growth <= 0 or (is_owners and totals.add(bound.subject, bound.name, growth, _most(bound))):
            continue
        total = _used(connection, bound)
        if total > _most(bound):
            had = total - growth
            raise Passed(bound, had if bound.name == "sessions" else round(had / _MIB, 3))
        if is_owners:
            totals.count(bound.subject, bound.name, total)


def sizes(connection: Connection) -> Mapping[str, tuple[int, int]]:
    """How many present sessions each owner has, and the bytes of their files."""
    query = (
        select(sessions.c.owner, func.count(), func.sum(versions.c.total_bytes))
        .join(versions, IN_FORCE)
        .where(IS_PRESENT)
        .group_by(sessions.c.owner)
    )
    return {owner: (int(count), int(size)) for owner, count, size in connection.execute(query)}


def _whose(bound: Bound) -> ColumnElement[bool]:
    return sessions.c.owner == bound.subject if bound.kind == "owner" else sessions.c.api_key_id == bound.subject


def _used(connection: Connection, bound: Bound, only: str | None = None) -> int:
    """Sessions, or bytes of their files, that count for this bound; those of one session where an id is given."""
    if bound.name == "sessions":
        query = select(func.count()).select_from(sessions)
    else:
        query = select(func.coalesce(func.sum(versions.c.total_bytes), 0)).join_from(sessions, versions, IN_FORCE)
    if only is not None:
        query = query.where(sessions.c.id == only)
    return int(connection.execute(query.where(_whose(bound), IS_PRESENT)).scalar_one())


def _most(bound: Bound) -> int:
    return bound.most if bound.name == "sessions" else bound.most * _MIB


def filled_by(connection: Connection, bound: Bound) -> Sequence[str]:
    """The ids of the sessions that one would look at first: the oldest, or those with the largest files."""
    query = select(sessions.c.id).join(versions, IN_FORCE).where(_whose(bound), IS_PRESENT).limit(_NAMED)
    order = sessions.c.key if bound.name == "sessions" else versions.c.total_bytes.desc()
    return list(connection.execute(query.order_by(order)).scalars())
