"""Webhooks on the core: told with the commit, sent in order, signed, tried again, bounded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, func, select

from era.core.models import now
from era.core.owners import deliveries
from era.core.owners import webhooks as of_webhooks
from era.core.owners.webhooks import EVENTS, Unsent, Webhook, Webhooks
from era.core.ports import ALONE, Cluster
from era.core.signatures import Verify, is_genuine
from era.core.telemetry import Event, Note, NoticeTried, ignore
from era.errors import Conflict, NotFound
from era.store import webhooks as rows
from era.store.engine.tables import webhook_notices
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.unit.core import Core, until

URL = "https://hooks.example/era"
KEY = b"the server's own key"


class Sent:
    """A sender that sends nothing. It answers with what is left of `answers`, then 200; a text is why it can't."""

    def __init__(self) -> None:
        self.answers: list[int | str] = []
        self.tried: list[tuple[str, Mapping[str, str], bytes]] = []

    async def check(self, url: str) -> None:
        pass

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        self.tried.append((url, headers, body))
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, str):
            raise Unsent(answer)
        return answer

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, _, body in self.tried]

    @property
    def events(self) -> list[tuple[str, str]]:
        return [(body["event"], body["data"].get("session_id", "")) for body in self.bodies]


class Follower:
    """A host of a cluster that doesn't lead."""

    leads = False

    async def owned(self, session_keys: Sequence[int], most_new: int) -> Sequence[int]:
        return []


async def until_ended(webhooks: Webhooks, count: int, owner: str = "default") -> None:
    """Wait until so many notices of an owner's were sent or given up."""
    async with asyncio.timeout(60):
        while True:
            found = await webhooks.store.webhooks(owner)
            if sum(counts.get("done", 0) + counts.get("failed", 0) for _, counts in found) >= count:
                return
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(deliveries, "delay", lambda tries: 0.0)


@asynccontextmanager
async def sending(core: Core, cluster: Cluster = ALONE, note: Note = ignore) -> AsyncIterator[tuple[Webhooks, Sent]]:
    sent = Sent()
    webhooks = Webhooks(core.store.webhooks, sent, KEY, cluster, core.quotas.on_reached, note)
    await webhooks.start()
    try:
        yield webhooks, sent
    finally:
        await webhooks.stop()


async def test_what_happens_is_told_and_signed(core: Core) -> None:
    async with sending(core) as (webhooks, sent):
        await core.session("before")
        webhook = await webhooks.create("default", URL, EVENTS, "all")
        other = await webhooks.create("default", URL, ["session.expired"], "")
        await webhooks.create("ada", URL, EVENTS, "somebody else's")
        await core.session("s", metadata={"team": "x"})
        ran = await core.run("raise SystemExit(3)", "s")
        await core.session("short", ttl=1)
        assert len(await core.store.expire(now() + 3_600_000_000)) == 1
        await core.quotas.set("default", {"sessions": 1})
        for _ in range(3):
            with pytest.raises(Conflict):
                await core.session("more")
        await until_ended(webhooks, 6)
        told = sent.bodies
        assert sorted(sent.events) == [
            ("quota.reached", ""),
            ("run.ended", "s"),
            ("session.created", "s"),
            ("session.created", "short"),
            ("session.expired", "short"),
            ("session.expired", "short"),
        ]
        assert [body["event"] for body in told if body["data"].get("session_id") == "s"] == [
            "session.created",
            "run.ended",
        ]
        assert {body["owner"] for body in told} == {"default"}
        by_event = {body["event"]: body["data"] for body in told}
        assert by_event["run.ended"] == {
            "run_id": ran.result.run_id,
            "session_id": "s",
            "status": "failed",
            "exit_code": 3,
            "duration_ms": by_event["run.ended"]["duration_ms"],
            "committed": True,
            "version": ran.result.state.version,
        }
        assert (by_event["quota.reached"]["quota"], by_event["quota.reached"]["code"]) == ("sessions", "quota_reached")
        assert {"session_id": "s", "language": "python", "metadata": {"team": "x"}} in [body["data"] for body in told]
        # Each has a signature of its own webhook's, which our own inbox takes for genuine.
        secrets = [webhooks.secret(each) for each in (webhook, other)]
        assert len(set(secrets)) == 2
        for _, headers, body in sent.tried:
            assert json.loads(body)["id"] == headers["X-Era-Delivery"]
            assert json.loads(body)["event"] == headers["X-Era-Event"]
            assert [genuine(secret, headers, body) for secret in secrets].count(True) == 1
            assert not any(genuine(secret, headers, body + b" ") for secret in secrets)
        assert await webhooks.store.webhooks("ada") != []
        assert [counts for _, counts in await webhooks.store.webhooks("ada")] == [{}]


def genuine(secret: str, headers: Mapping[str, str], body: bytes) -> bool:
    received = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return is_genuine(Verify("stripe", secret, "x-era-signature"), received, body, now() / 1e6)


async def test_what_is_undone_is_not_told(core: Core) -> None:
    webhooks = Webhooks(core.store.webhooks, Sent(), KEY, ALONE, [])
    webhook = await webhooks.create("default", URL, EVENTS, "")
    await core.session("s")
    with pytest.raises(Conflict):
        await core.session("s")
    await core.quotas.set("default", {"sessions": 1})
    with pytest.raises(Conflict):
        await core.session("t")
    assert [notice.event for notice in await webhooks.store.notices("default", webhook.id)] == ["session.created"]


async def test_a_notice_that_fails_is_tried_again_in_its_place_and_then_given_up(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_webhooks, "RETRIES", 2)
    async with sending(core) as (webhooks, sent):
        sent.answers = [500, "There is nobody.", 302, 200]
        webhook = await webhooks.create("default", URL, ["session.created"], "")
        await core.session("a")
        await core.session("b")
        await until_ended(webhooks, 2)
        assert [session for _, session in sent.events] == ["a", "a", "a", "b"]
        ids = [headers["X-Era-Delivery"] for _, headers, _ in sent.tried]
        assert len(set(ids[:3])) == 1
        done, failed = await webhooks.store.notices("default", webhook.id)
        assert (failed.status, failed.tries, failed.http_status) == ("failed", 3, 302)
        assert "Redirects aren't followed" in (failed.reason or "")
        assert (done.status, done.http_status, done.reason) == ("done", 200, None)


async def test_a_notice_is_sent_once_more_when_its_owner_asks(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "delay", lambda tries: 3600.0)
    tries: list[tuple[str, str, int]] = []

    def note(event: Event) -> None:
        assert isinstance(event, NoticeTried)
        assert event.lag_seconds >= event.seconds >= 0
        tries.append((event.event, event.outcome, event.tries))

    async with sending(core, note=note) as (webhooks, sent):
        webhook = await webhooks.create("default", URL, ["session.created"], "")
        await core.session("a")
        await core.session("b")
        await until_ended(webhooks, 2)
        _, first = await webhooks.store.notices("default", webhook.id)
        for owner, webhook_id, notice_id in (
            ("ada", webhook.id, first.id),
            ("default", "wh_none", first.id),
            ("default", webhook.id, "evt_none"),
        ):
            with pytest.raises(NotFound):
                await webhooks.replay(owner, webhook_id, notice_id)
        again = await webhooks.replay("default", webhook.id, first.id)
        assert (again.id, again.status, again.tries, again.body) == (first.id, "pending", 0, first.body)
        await until_ended(webhooks, 2)
        assert [session for _, session in sent.events] == ["a", "b", "a"], "after what came before it was asked for"
        assert len({headers["X-Era-Delivery"] for _, headers, _ in sent.tried}) == 2
        # One that would wait for an hour doesn't any more.
        sent.answers = [500]
        await core.session("c")
        await until(lambda: len(sent.tried) == 4 and not webhooks._workers)
        waiting, *_ = await webhooks.store.notices("default", webhook.id)
        assert (waiting.status, waiting.tries) == ("pending", 1)
        assert await core.store.webhooks.pending() == 1
        await webhooks.replay("default", webhook.id, waiting.id)
        await until_ended(webhooks, 3)
        assert [session for _, session in sent.events] == ["a", "b", "a", "c", "c"]
        assert await core.store.webhooks.pending() == 0
    told = "session.created"
    assert tries == [(told, "done", 1)] * 3 + [(told, "pending", 1), (told, "done", 1)]


async def test_what_waits_and_what_is_kept_is_bounded(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_PENDING", 3)
    webhooks = Webhooks(core.store.webhooks, Sent(), KEY, ALONE, [])
    for n in range(of_webhooks.MAX_WEBHOOKS):
        await webhooks.create("default", URL, ["session.created"], str(n))
    with pytest.raises(Conflict):
        await webhooks.create("default", URL, ["session.created"], "one more")
    for n in range(5):
        await core.session(f"s{n}")
    for webhook, counts in await webhooks.store.webhooks("default"):
        assert (webhook.dropped, counts) == (2, {"pending": 3})
    [(first, _), *others] = await webhooks.store.webhooks("default")
    for webhook, _ in others:
        await webhooks.store.drop_webhook("default", webhook.id)
    for owner in ("ada", "default"):
        with pytest.raises(NotFound):
            await webhooks.store.drop_webhook(owner, others[0][0].id)
        with pytest.raises(NotFound):
            await webhooks.store.notices(owner, others[0][0].id)
    with pytest.raises(NotFound):
        await webhooks.store.drop_webhook("ada", first.id)
    assert await core.store.database.read(_notices) == 3


def _notices(connection: Connection) -> int:
    count: int = connection.execute(select(func.count()).select_from(webhook_notices)).scalar_one()
    return count


async def test_notices_outlive_the_process_and_only_the_leader_sends(core: Core) -> None:
    quiet = Webhooks(core.store.webhooks, Sent(), KEY, ALONE, [])
    webhook = await quiet.create("default", URL, ["session.created"], "")
    await core.session("s")
    other = SqlStore(f"sqlite:///{Path(core.directory) / 'era.sqlite'}")
    await other.open()
    try:
        ours, theirs = Sent(), Sent()
        follower = Webhooks(other.webhooks, theirs, KEY, Follower(), [])
        leader = Webhooks(other.webhooks, ours, KEY, ALONE, [])
        await follower.start()
        await leader.start()
        await until_ended(leader, 1)
        await follower.stop()
        await leader.stop()
        assert (len(ours.tried), theirs.tried) == (1, [])
        assert leader.secret(webhook) == quiet.secret(webhook)
    finally:
        await other.close()


async def test_a_run_that_was_lost_is_told(core: Core) -> None:
    await core.session()
    webhooks = Webhooks(core.store.webhooks, Sent(), KEY, ALONE, [])
    webhook: Webhook = await webhooks.create("default", URL, ["run.ended"], "")
    await core.store.begin_run(mine("s"), "run_1_a")
    assert await core.store.mark_lost() == 1
    assert await core.store.mark_lost() == 0
    [notice] = await webhooks.store.notices("default", webhook.id)
    assert json.loads(notice.body)["data"] == {
        "run_id": "run_1_a",
        "session_id": "s",
        "status": "lost",
        "exit_code": None,
        "duration_ms": None,
        "committed": False,
        "version": None,
    }
