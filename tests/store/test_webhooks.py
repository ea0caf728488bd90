"""Rows of webhooks and of their notices, in each database."""

from __future__ import annotations

import json
from dataclasses import replace

from era.core.cluster.homes import Host
from era.core.models import now
from era.core.owners.webhooks import EVENTS, Notice, Tried, Webhook
from era.store.homes import LOST
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.store.rows import ended, new, opened

HOOK = Webhook("wh_1", "default", "https://hooks.example/ä", EVENTS, "why", 1)


def told(notice: Notice) -> tuple[str, str, str | None]:
    """Event, session and status of a run of a notice."""
    data = json.loads(notice.body)["data"]
    return notice.event, data["session_id"], data.get("status")


async def test_notices_are_due_one_after_the_other(store: SqlStore) -> None:
    rows = store.webhooks
    await rows.add_webhook(HOOK)
    await rows.add_webhook(replace(HOOK, id="wh_2", events=("run.ended",)))
    session = await store.create_session(new("s"))
    await store.begin_run(mine("s"), "run_1")
    await store.end_run(ended(session, "run_1"), data='{"a": 1}', snapshot=None, who=mine("s"))
    await store.create_session(new("t", ttl=1))
    assert len(await store.expire(now() + 3_600_000_000)) == 1

    second = replace(HOOK, id="wh_2", events=("run.ended",))
    assert await rows.due() == {"wh_1": "default", "wh_2": "default"}
    first, other = await rows.next_due("wh_1"), await rows.next_due("wh_2")
    assert first is not None
    assert first[0] == HOOK
    assert told(first[1]) == ("session.created", "s", None)
    assert other is not None
    assert other[0] == second
    assert told(other[1]) == ("run.ended", "s", "ok")
    await rows.tried(first[1], Tried("pending", 1, 500, "The answer was 500.", now() + 3_600_000_000))
    await rows.tried(first[1], Tried("done", 1, 200))  # by another host, which came too late
    assert await rows.due() == {"wh_2": "default"}
    assert await rows.next_due("wh_1") is None
    *_, again = await rows.notices("default", "wh_1")
    assert (again.status, again.tries, again.http_status, again.reason) == ("pending", 1, 500, "The answer was 500.")
    await rows.tried(again, Tried("failed", 2, None, "Nobody is there."))
    seen = []
    while (found := await rows.next_due("wh_1")) is not None:
        seen.append(told(found[1]))
        await rows.tried(found[1], Tried("done", 1, 204))
    assert seen == [("run.ended", "s", "ok"), ("session.created", "t", None), ("session.expired", "t", None)]
    assert [counts for _, counts in await rows.webhooks("default")] == [{"done": 3, "failed": 1}, {"pending": 1}]
    await rows.drop_webhook("default", "wh_1")
    assert [webhook.id for webhook, _ in await rows.webhooks("default")] == ["wh_2"]


async def test_runs_of_a_dead_host_are_told(postgres_url: str) -> None:

    async with opened(postgres_url, alone=False) as one, opened(postgres_url, alone=False) as two:
        dead, alive = await one.homes(), await two.homes()
        await dead.join(Host("dead", "http://dead"), 60)
        await alive.join(Host("alive", "http://alive"), 60)
        await one.webhooks.add_webhook(HOOK)
        await one.create_session(new("s"))
        await one.begin_run(mine("s"), "run_1")
        await alive.leave("dead")
        record, _ = await two.run(mine("s"), "run_1")
        assert (record.status, record.reason) == ("lost", LOST)
        newest, *_ = await two.webhooks.notices("default", "wh_1")
        assert told(newest) == ("run.ended", "s", "lost")
