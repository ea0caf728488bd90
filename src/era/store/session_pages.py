"""Pages of sessions: which of an owner's sessions pass a filter, newest first.

Theory of operation. What a page costs must not depend on how many sessions there are, nor on what the database believes
about its tables: right after a server was moved to PostgreSQL that is nothing, and a list of a million sessions that
were read one by one took half a minute. So the query says itself how it is to be done.

First the keys of a page are found, in indexes alone; their rows are read by a second query, since SQLite would find
the keys of all pages for a query that does both. Keys of an owner's present sessions are in one, those of sessions
with a label in another, both in order. From the newest on, each index in turn is asked for its next key that is no
newer than that of the index before. Where all have named the same, that session passes; else the search goes on at the
key that the last one named. So the shortest of the lists decides how many steps there are, and the page's own length
where most sessions pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import CTE, ColumnElement, Connection, Integer, ScalarSelect, Select, case, cast, literal, null, select

from era.core.metadata import Retention, SessionFilter
from era.core.models import Session
from era.store.engine.dialects import up_to
from era.store.engine.tables import session_pairs, sessions
from era.store.session_lookup import IS_PRESENT, SESSIONS, restorable_since, session_from_row

_NEWEST = 1 << 62
_READ_AT_ONCE = 8
"""Rows. Each may have some MiB, and what is read and not shown shouldn't be much."""


def list_sessions(connection: Connection, retention: Retention, which: SessionFilter) -> Sequence[Session]:
    """The sessions that pass, newest first."""
    since = restorable_since(retention)
    query = SESSIONS.order_by(sessions.c.key.desc())
    if which.limit is None:
        query = query.where(*_all_conditions(which, since))
    else:
        query = query.where(sessions.c.key.in_(list(connection.execute(page_query(which, since)).scalars())))
    return [session_from_row(row) for row in connection.execute(query)]


def session_page(
    connection: Connection, retention: Retention, which: SessionFilter, most: int
) -> tuple[Sequence[Session], bool]:
    """See MetadataStore.session_page."""
    asked = replace(which, limit=(which.limit or 0) + 1)
    keys = list(connection.execute(page_query(asked, restorable_since(retention))).scalars())
    query = SESSIONS.where(sessions.c.key.in_(keys[: which.limit])).order_by(sessions.c.key.desc())
    found: list[Session] = []
    with connection.execute(query, execution_options={"yield_per": _READ_AT_ONCE}) as rows:
        for row in rows:
            found.append(session_from_row(row))
            most -= sum(len(value) for value in row if isinstance(value, str))
            if most <= 0:
                break
    return found, 0 < len(found) < len(keys)


def page_query(which: SessionFilter, since: int) -> Select[Any]:
    """The keys of the sessions on a page. Those removed before `since`, in microseconds, can't be restored."""
    if which.metadata and which.removed is None and which.ids is None:
        return _search(which, _conditions(which, since)).limit(which.limit)
    keys = select(sessions.c.key).where(*_all_conditions(which, since))
    return keys.order_by(sessions.c.key.desc()).limit(which.limit)


def pair(name: str, text: str) -> str:
    """The digest that stands for a metadata name with a value; see `session_pairs` in tables.py."""
    return hashlib.sha256(json.dumps([name, text]).encode()).hexdigest()


def _conditions(which: SessionFilter, since: int) -> list[ColumnElement[bool]]:
    """All but the owner, the labels and where the page begins."""
    found: list[ColumnElement[bool]] = [IS_PRESENT]
    if which.removed is not None:
        is_expired = sessions.c.expired.is_(which.removed == "expired")
        found = [~IS_PRESENT, sessions.c.deleted_at > since, is_expired]
    if which.language is not None:
        found.append(sessions.c.language == which.language)
    if which.ids is not None:
        # By the index of ids: they are few, and an owner's sessions may be a million.
        is_own = sessions.c.owner + "" == which.owner
        found.append(sessions.c.key.in_(select(sessions.c.key).where(sessions.c.id.in_(which.ids), IS_PRESENT, is_own)))
    if which.without_ids:
        found.append(sessions.c.id.not_in(which.without_ids))
    return found


def _all_conditions(which: SessionFilter, since: int) -> list[ColumnElement[bool]]:
    found = [sessions.c.owner == which.owner, *_conditions(which, since)]
    if which.before_key is not None:
        found.append(sessions.c.key < which.before_key)
    for label in (which.metadata or {}).items():
        labelled = select(session_pairs.c.session_key).where(session_pairs.c.pair == pair(*label))
        if which.ids is None:
            found.append(sessions.c.key.in_(labelled))
        else:  # few sessions are looked at, and many may have the label
            found.append(labelled.where(session_pairs.c.session_key == sessions.c.key).exists())
    return found


def _search(which: SessionFilter, conditions: Sequence[ColumnElement[bool]]) -> Select[Any]:
    """The keys of sessions that have all labels and meet the conditions, newest first.

    Each step is a row: which index is asked next, the key that was named, the one before it, and how many before that
    were the same. Once all indexes have named a key it is found, and the search goes on below.
    """
    of, number, kind = session_pairs.c, Integer(), sessions.c.key.type
    indexes: list[tuple[ColumnElement[str], ColumnElement[int], str, Sequence[ColumnElement[bool]]]]
    indexes = [(of.pair, of.session_key, pair(*label), ()) for label in (which.metadata or {}).items()]
    indexes.append((sessions.c.owner, sessions.c.key, which.owner, conditions))
    # As if the session before the page's first had just been found.
    start = cast(_NEWEST if which.before_key is None else which.before_key, kind)
    before = select(
        cast(0, number).label("turn"),
        start.label("key"),
        start.label("before"),
        cast(len(indexes) - 2, number).label("same"),
    )
    steps = before.cte("steps", recursive=True)
    is_found, same = _agreeing(steps, len(indexes))
    last = case((is_found, steps.c.key - 1), else_=steps.c.key)
    asked = [(steps.c.turn == turn, _named(*index, last, steps)) for turn, index in enumerate(indexes)]
    step = select(
        (steps.c.turn + 1) % len(indexes),
        case(*asked),
        case((is_found, null()), else_=steps.c.key),
        case((is_found, 0), else_=same),
    )
    steps = steps.union_all(step.where(steps.c.key.is_not(None)))
    return select(steps.c.key).where(_agreeing(steps, len(indexes))[0], steps.c.key < start)


def _agreeing(steps: CTE, all_of_them: int) -> tuple[ColumnElement[bool], ColumnElement[int]]:
    """Whether all indexes have named this step's key, and how many before it have."""
    same = case((steps.c.key == steps.c.before, steps.c.same + 1), else_=0)
    return same == all_of_them - 1, same


def _named(
    of: ColumnElement[str],
    key: ColumnElement[int],
    value: str,
    conditions: Sequence[ColumnElement[bool]],
    last: ColumnElement[int],
    steps: CTE,
) -> ScalarSelect[int]:
    """The newest key up to `last` of the rows where `of` has this value, by the index on both."""
    found = select(key).where(up_to(of, literal(value), key, last), *conditions)
    return found.order_by(of.desc(), key.desc()).limit(1).correlate(steps).scalar_subquery()
