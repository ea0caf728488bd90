"""What the hosts of a cluster count together: for quotas of runs a minute, and of sandboxes and memory in use.

All who count for an owner do so one after the other, in whichever host: a transaction begins by waiting for that
owner's turn, and then sees what those before it have committed. So as many as may get through, to the last one, and
none fails because of another. It is on a connection of its own, so no commit of a run waits behind it. A host that is
stopped in the middle keeps an owner's others waiting for some seconds: then PostgreSQL ends its transaction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, exists, func, insert, select, update

from era.core.models import now
from era.core.owners.quotas import Bound, Held, Kind, Meter, Refusal, Window
from era.core.owners.usage import day_of
from era.store.engine.database import Database
from era.store.engine.dialects import database_time, insert_if_absent, one_after_the_other
from era.store.engine.tables import hosts, quota_runs, quota_sandboxes, usage

_RUNS = (quota_runs.c.kind == bindparam("of_kind")) & (quota_runs.c.subject == bindparam("of_subject"))
_BEGUN = select(quota_runs.c.begun).where(_RUNS)
_SET_BEGUN = update(quota_runs).where(_RUNS).values(begun=bindparam("new_begun"))
_SANDBOXES = (quota_sandboxes.c.kind == bindparam("of_kind")) & (quota_sandboxes.c.subject == bindparam("of_subject"))
_IN_USE = (
    select(quota_sandboxes.c.session_id, quota_sandboxes.c.memory)
    .where(_SANDBOXES)
    .where(exists().where(hosts.c.id == quota_sandboxes.c.host_id, ~hosts.c.dead))
)
_DROP = delete(quota_sandboxes).where(
    _SANDBOXES,
    quota_sandboxes.c.session_id == bindparam("session"),
    quota_sandboxes.c.host_id == bindparam("host"),
)


class QuotaCounts:
    """A SharedCounts in an SQL database."""

    def __init__(self, database: Database, host_id: str) -> None:
        """`database` is for nothing else."""
        self._database = database
        self._host_id = host_id

    async def take(
        self, owner: str, session: str, bounds: Sequence[Bound], memory: int, *, run: bool
    ) -> tuple[Bound, Refusal] | None:
        return await self._database.write_unsynced(self._take, owner, session, bounds, memory, run=run)

    async def correct(self, add: Mapping[Held, int], drop: Sequence[Held]) -> None:
        def job(connection: Connection) -> None:
            for held, memory in add.items():
                self._add(connection, held, memory)
            for held in drop:
                values = {"of_kind": held.kind, "of_subject": held.subject, "session": held.session}
                connection.execute(_DROP, {**values, "host": self._host_id})

        await self._database.write_unsynced(job)

    def _take(
        self, connection: Connection, owner: str, session: str, bounds: Sequence[Bound], memory: int, *, run: bool
    ) -> tuple[Bound, Refusal] | None:
        one_after_the_other(connection, f"quotas of {owner}")
        at = connection.execute(select(database_time())).scalar_one()
        names: dict[tuple[Kind, str], set[str]] = {}
        for bound in bounds:
            names.setdefault((bound.kind, bound.subject), set()).add(bound.name)
        meters = {whose: _meter(connection, *whose, of_names) for whose, of_names in names.items()}
        for bound in bounds:
            refusal = meters[bound.kind, bound.subject].refusal(bound.name, bound.most, session, memory, at)
            if refusal is not None:
                return bound, refusal
        for (kind, subject), meter in meters.items():
            if run and "runs_per_minute" in names[kind, subject]:
                meter.runs.add(at)
                _set_begun(connection, kind, subject, meter.runs)
            if names[kind, subject] & {"sandboxes", "memory_mb"}:
                self._add(connection, Held(kind, subject, session), memory)
        return None

    def _add(self, connection: Connection, held: Held, memory: int) -> None:
        row = {"kind": held.kind, "subject": held.subject, "session_id": held.session, "host_id": self._host_id}
        insert_if_absent(connection, quota_sandboxes, {**row, "memory": memory})


def _meter(connection: Connection, kind: Kind, subject: str, names: set[str]) -> Meter:
    """What the rows say of quotas of these names."""
    meter, of = Meter(), {"of_kind": kind, "of_subject": subject}
    if "runs_per_minute" in names:
        begun = connection.execute(_BEGUN, of).scalar_one_or_none()
        meter.runs = Window(json.loads(begun) if begun else ())
    if names & {"sandboxes", "memory_mb"}:
        meter.sandboxes = {str(row.session_id): int(row.memory) for row in connection.execute(_IN_USE, of)}
    if names & {"cpu_seconds_per_day", "egress_mb_per_day"}:
        today = day_of(now())
        whose = usage.c.owner == subject if kind == "owner" else usage.c.key_id == subject
        query = select(
            func.coalesce(func.sum(usage.c.cpu_us), 0), func.coalesce(func.sum(usage.c.egress_bytes), 0)
        ).where(usage.c.day == today, whose)
        cpu_us, egress_bytes = connection.execute(query).one()
        meter.day, meter.cpu_us, meter.egress_bytes = today, int(cpu_us), int(egress_bytes)
    return meter


def _set_begun(connection: Connection, kind: Kind, subject: str, runs: Window) -> None:
    values: dict[str, Any] = {"of_kind": kind, "of_subject": subject, "new_begun": json.dumps(runs.entries)}
    if not connection.execute(_SET_BEGUN, values).rowcount:
        connection.execute(insert(quota_runs).values(kind=kind, subject=subject, begun=values["new_begun"]))
