"""What was used on each day, by owner and key; and what was set for owners."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy import ColumnElement, Connection, bindparam, delete, func, insert, select, update

from era.core.concurrency.late_ends import LateEnds
from era.core.models import Use, now
from era.core.owners.quotas import Amounts, changed
from era.core.owners.usage import DayOfUsage, day_of
from era.errors import Unavailable
from era.store.engine.database import Database
from era.store.engine.dialects import Answer, Asked, Precompiled, together
from era.store.engine.tables import owners, runs, sessions, usage
from era.store.rows import Rows, reads, writes

log = structlog.get_logger()

_CLOSE_SECONDS = 5.0
"""For what is still to be added at the end."""

_THIS = (
    (usage.c.day == bindparam("of_day"))
    & (usage.c.owner == bindparam("of_owner"))
    & (usage.c.key_id == bindparam("of_key"))
    & (usage.c.host_id == bindparam("of_host"))
)
_add = Precompiled(
    update(usage)
    .where(_THIS)
    .values(
        runs=usage.c.runs + bindparam("new_runs"),
        cpu_us=usage.c.cpu_us + bindparam("new_cpu_us"),
        egress_bytes=usage.c.egress_bytes + bindparam("new_egress_bytes"),
    )
)
_begin = Precompiled(
    insert(usage)
    .values(
        day=bindparam("of_day"),
        owner=bindparam("of_owner"),
        key_id=bindparam("of_key"),
        host_id=bindparam("of_host"),
        runs=bindparam("new_runs"),
        cpu_us=bindparam("new_cpu_us"),
        egress_bytes=bindparam("new_egress_bytes"),
    )
    .inline()
)
_RUNS_BY_OWNER = (
    select(sessions.c.owner, func.count())
    .join_from(runs, sessions, sessions.c.key == runs.c.session_key)
    .group_by(sessions.c.owner)
)


def add_use(connection: Connection, use: Use) -> None:
    """Add to this host's row of a day, which is made if there is none."""
    begin_use(connection, use, together(connection, adding(connection, use))[0])


def _add_all(connection: Connection, uses: Iterable[Use]) -> None:
    for use in uses:
        add_use(connection, use)


def count_lost(connection: Connection, are_lost: ColumnElement[bool]) -> None:
    """Count these runs as their owners', before they are marked as lost. Nobody knows what they have used."""
    for owner, count in connection.execute(_RUNS_BY_OWNER.where(are_lost)).all():
        add_use(connection, Use(owner, "", day_of(now()), count))


def adding(connection: Connection, use: Use) -> Asked:
    """The statement that adds to this host's row of a day. `begin_use` must follow. It is part of the transaction of
    every run: to one row of all hosts only one of them could add at a time."""
    return _add, _values(connection, use)


def begin_use(connection: Connection, use: Use, added: Answer) -> None:
    """Make the day's row where there was none to add to."""
    if not added.count:
        _begin.execute(connection, _values(connection, use))


def _host(connection: Connection) -> str:
    return connection.info["fence"].host_id or ""


def _values(connection: Connection, use: Use) -> Mapping[str, Any]:
    return {
        "of_host": _host(connection),
        "of_day": use.day,
        "of_owner": use.owner,
        "of_key": use.key_id,
        "new_runs": use.runs,
        "new_cpu_us": use.cpu_us,
        "new_egress_bytes": use.egress_bytes,
    }


class UsageRows(Rows):
    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._not_added: dict[tuple[str, str, int], Use] = {}
        """What is still to be added, by owner, key and day."""

        self._adding = asyncio.Lock()
        self._is_late = False
        """Whether the last try to add failed: then nobody waits for the next."""

        self._late_tries = LateEnds()

    async def close(self) -> None:
        """Add what is still to be added, if that can be done soon. May be called twice."""
        await self._late_tries.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS), self._adding:  # behind a late try under way
                await self._add_noted()

    @reads
    def owners(self, connection: Connection) -> Mapping[str, Amounts]:
        query = select(owners.c.owner, owners.c.quotas)
        return {owner: json.loads(quotas) for owner, quotas in connection.execute(query)}

    @writes
    def set_owner(self, connection: Connection, owner: str, change: Mapping[str, int | None]) -> Amounts:
        is_it = owners.c.owner == owner
        before = connection.execute(select(owners.c.quotas).where(is_it)).scalar_one_or_none()
        quotas = changed(json.loads(before or "{}"), change)
        connection.execute(delete(owners).where(is_it))
        connection.execute(insert(owners).values(owner=owner, quotas=json.dumps(quotas)))
        connection.info["owned_totals"].forget(owner)
        return quotas

    @reads
    def used_on(self, connection: Connection, day: int) -> Sequence[tuple[str, str, int, int]]:
        query = (
            select(usage.c.owner, usage.c.key_id, func.sum(usage.c.cpu_us), func.sum(usage.c.egress_bytes))
            .where(usage.c.day == day, (usage.c.cpu_us > 0) | (usage.c.egress_bytes > 0))
            .group_by(usage.c.owner, usage.c.key_id)
        )
        return [(owner, key, int(cpu), int(egress)) for owner, key, cpu, egress in connection.execute(query)]

    async def add_use(self, use: Use) -> None:
        self._note(use)
        if self._is_late:
            return
        async with self._adding:  # what others have noted meanwhile is added with this
            if not self._is_late and not await self._add_noted():
                self._is_late = True
                # Shielded: a try that was cancelled between its notes and its write would lose them.
                self._late_tries.add(lambda: asyncio.shield(self._add_late()))

    async def _add_late(self) -> bool:
        """Add what is still to be added, and what is noted meanwhile; whether that needn't be tried again."""
        async with self._adding:
            while self._not_added:
                if not await self._add_noted():
                    return False
            self._is_late = False
            return True

    async def _add_noted(self) -> bool:
        """Add what is still to be added; whether that needn't be tried again."""
        uses, self._not_added = self._not_added, {}
        try:
            if uses:
                await self.database.write_unsynced(_add_all, list(uses.values()))
        except Unavailable as error:
            if not self._is_late:  # else the log has it
                log.warning("use_not_added", error=error.message, then="it is added once the database takes it")
            if not error.may_have_committed:
                for each in uses.values():
                    self._note(each)
                return False
        return True

    def _note(self, use: Use) -> None:
        """Note what is to be added, together with what else is for the same row."""
        row = (use.owner, use.key_id, use.day)
        more = self._not_added.get(row, replace(use, runs=0, cpu_us=0, egress_bytes=0))
        self._not_added[row] = replace(
            use,
            runs=use.runs + more.runs,
            cpu_us=use.cpu_us + more.cpu_us,
            egress_bytes=use.egress_bytes + more.egress_bytes,
        )

    @writes
    def note_sizes(self, connection: Connection, sizes: Mapping[str, tuple[int, int]]) -> None:
        day = day_of(now())
        for owner, (storage_bytes, disk_bytes) in sizes.items():
            add_use(connection, Use(owner, "", day, runs=0))
            row = (usage.c.day == day) & (usage.c.owner == owner) & (usage.c.key_id == "")
            row &= usage.c.host_id == _host(connection)
            for column, size in ((usage.c.storage_bytes, storage_bytes), (usage.c.disk_bytes, disk_bytes)):
                larger = func.coalesce(column, 0) <= size
                connection.execute(update(usage).where(row, larger).values({column.name: size}))

    async def days(self, owner: str | None, first: int, last: int) -> Sequence[DayOfUsage]:
        query = (
            select(
                usage.c.owner,
                usage.c.day,
                func.sum(usage.c.runs),
                func.sum(usage.c.cpu_us),
                func.sum(usage.c.egress_bytes),
                func.max(usage.c.storage_bytes),
                func.max(usage.c.disk_bytes),
            )
            .where(usage.c.day >= first, usage.c.day <= last)
            .group_by(usage.c.owner, usage.c.day)
            .order_by(usage.c.day.desc(), usage.c.owner)
        )
        if owner is not None:
            query = query.where(usage.c.owner == owner)

        def job(connection: Connection) -> Sequence[DayOfUsage]:
            return [
                DayOfUsage(name, day, int(runs), int(cpu_us), int(egress), storage, disk)
                for name, day, runs, cpu_us, egress, storage, disk in connection.execute(query)
            ]

        return await self.database.read_for(owner or "", job)

    @writes
    def prune(self, connection: Connection, days: int) -> int:
        return connection.execute(delete(usage).where(usage.c.day < day_of(now()) - days)).rowcount
