"""Rows of the audit log."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from era.core.concurrency import meter
from era.core.owners.api_keys import Caller
from era.core.owners.audit import Action, Audit, AuditEntry, AuditFilter
from era.store.metadata import SqlStore


def entry(owner: str, action: Action = "session.create", target: str = "s", at: int = 1) -> AuditEntry:
    return AuditEntry(at, owner, "key_1", action, target, "req_1", {"purge": True, "names": ["ä"]})


async def test_each_owners_newest_entries_are_kept(store: SqlStore) -> None:
    await store.audit.add_audit_entries([entry("quiet", target="first")], 3)
    for number in range(10):
        await store.audit.add_audit_entries([entry("loud", target=f"s{number}")], 3)
    everything = await store.audit.audit_entries(AuditFilter(100))
    assert [each.target for each in everything] == ["s9", "s8", "s7", "first"]
    await store.audit.add_audit_entries([entry("loud", target=f"t{number}") for number in range(5)], 3)
    assert [each.target for each in await store.audit.audit_entries(AuditFilter(100, "loud"))] == ["t4", "t3", "t2"]
    await store.audit.add_audit_entries([entry("loud", target="last")], 1)
    assert [each.target for each in await store.audit.audit_entries(AuditFilter(100, "loud"))] == ["last"]


async def test_entries_come_back_as_they_were_and_are_filtered(store: SqlStore) -> None:
    first, second = entry("a", "key.create", "key_9", at=5), entry("b", "session.delete", "s", at=7)
    for each in (first, second):
        await store.audit.add_audit_entries([each], 10)
    newest, oldest = await store.audit.audit_entries(AuditFilter(10))
    assert (replace(newest, key=0), replace(oldest, key=0)) == (second, first)

    async def found(**which: object) -> list[str]:
        return [each.owner for each in await store.audit.audit_entries(AuditFilter(10, **which))]  # type: ignore[arg-type]

    assert await found(owner="a") == ["a"]
    assert await found(action="session.delete") == ["b"]
    assert await found(target="key_9") == ["a"]
    assert (await found(since=6), await found(until=6), await found(since=7), await found(until=7)) == (
        ["b"],
        ["a"],
        ["b"],
        ["a"],
    )
    assert await found(before_key=newest.key) == ["a"]
    assert [each.owner for each in await store.audit.audit_entries(AuditFilter(1))] == ["b"]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_very_many_targets_are_recorded_by_and_by(store: SqlStore, is_cancelled: bool) -> None:
    """Others go on between, and nothing is lost where the caller doesn't wait for it."""
    meter.install()
    targets = [f"s{number}" for number in range(1050)]
    audit, sizes = Audit(store.audit, 5000), [0]
    with capture_logs() as lines:
        recording = asyncio.create_task(audit.record(Caller("a"), "session.delete", *targets, purge=True))
        while not recording.done():
            if is_cancelled and lines:
                recording.cancel()
            await asyncio.sleep(0)
            sizes.append(len(lines))
    assert recording.cancelled() is is_cancelled
    assert [line["target"] for line in lines] == targets
    assert max(after - before for before, after in pairwise(sizes)) < len(targets)
    found = await store.audit.audit_entries(AuditFilter(5000, "a"))
    assert [each.target for each in reversed(found)] == targets
