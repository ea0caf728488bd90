"""Cases of many sessions that do nothing: pages of them, and what they cost others. A small arena has a hundredth."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import cache

from sqlalchemy import Table, create_engine, make_url, text

from bench import postgres
from bench.arena import Answer, Arena, with_settings
from bench.cases import Probe
from era.store.engine.tables import session_pairs, sessions, versions

IN_SQLITE, IN_POSTGRESQL = 100_000, 1_000_000
FEW = 100
"""So many of them have the label `few`; they are the oldest. Every second one has the label `half`."""

_PAGE = 50


def page_of_sqlite(arena: Arena) -> Probe:
    """A page of 50 of 100,000 sessions, by a label that half of them have."""
    make(arena, f"sqlite:///{arena.data_dir / 'era.sqlite'}", arena.size(IN_SQLITE))
    return _page(arena, "half")


def page_of_postgresql(label: str) -> Callable[[Arena], Probe]:
    """A page of 50 of 1,000,000 sessions in PostgreSQL, by one of the labels."""
    return lambda arena: _page(_in_postgresql(arena), label)


@cache
def _in_postgresql(arena: Arena) -> Arena:
    url = postgres.new_database(arena)
    other = with_settings(arena, "many", database_url=url)
    make(other, url, arena.size(IN_POSTGRESQL))
    return other


def _page(arena: Arena, label: str) -> Probe:
    path = f"/api/sessions?limit={_PAGE}&metadata.{label}=1"

    def before() -> None:
        arena.keep_open()

    def after(answer: Answer) -> None:
        arena.check_status(200)(answer)
        if json.loads(answer[1])["count"] != _PAGE:
            raise RuntimeError(f"That is no page of {_PAGE}: {answer[1][:500]!r}")

    return Probe(lambda _: arena.get(path), before, after)


def make(arena: Arena, database: str, count: int) -> None:
    """Make `count` sessions of a service whose database has this URL: one by a call, the others by copying its rows,
    which is quicker."""
    body = {"language": "python", "session_id": "bench-seed", "metadata": {"few": "1", "half": "1"}}
    arena.check_created(arena.post("/api/sessions", body))
    url = make_url(database)
    engine = create_engine(url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url)
    with engine.begin() as connection:
        seed = connection.execute(text("SELECT key FROM sessions WHERE id = 'bench-seed'")).scalar_one()

        def copy(table: Table, own: Mapping[str, str], others: str, which: str) -> None:
            """Insert a copy of the seed's rows for each of `others`, with values of its own in some columns."""
            columns = [column.name for column in table.columns if column.name not in own and column.name != "key"]
            values = ", ".join([*own.values(), *(f't."{name}"' for name in columns)])
            names = ", ".join([*own, *(f'"{name}"' for name in columns)])
            statement = (
                f"INSERT INTO {table.name} ({names}) SELECT {values} FROM {table.name} t, {others} WHERE {which}"
            )
            connection.execute(text(statement), {"seed": seed, "count": count})

        numbers = (
            "(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count - 1) SELECT i FROM n) n"
        )
        copy(sessions, {"id": "'bench-' || i"}, numbers, "t.key = :seed")
        for table, which in (
            (versions, ""),
            (session_pairs, f"AND t.pair = '{_pair('half')}' AND s.key % 2 = 0"),
            (session_pairs, f"AND t.pair = '{_pair('few')}' AND s.key < :seed + {FEW}"),
        ):
            copy(table, {"session_key": "s.key"}, "sessions s", f"t.session_key = :seed AND s.key > :seed {which}")
    engine.dispose()
    time.sleep(0.5)  # SQLite writes its log of so many rows back now


def _pair(label: str) -> str:
    """How a label with the value "1" is kept."""
    return hashlib.sha256(json.dumps([label, "1"]).encode()).hexdigest()
