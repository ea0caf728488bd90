"""Deliveries of an inbox whose attempts come to nothing through no fault of theirs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from era.core.models import OwnedId, Session, StoredCode, new_id, now
from era.core.owners import deliveries
from era.core.ports import Alone
from era.core.public.inbox import Content, Delivery
from era.core.public.inbox_worker import Inbox
from era.store.inbox import InboxRows
from tests.owners import mine
from tests.unit.core import SETTINGS, Core, until

MINE = mine("s")
CONTENT = Content("POST", "/", "", [], b"", "http://era.test")


async def delivered(
    core: Core, code: str, owned_id: OwnedId = MINE, *, persistent: bool = True, retries: int = 0
) -> Session:
    """A session with this code, which has got a delivery that isn't to be retried, or so often."""
    settings = replace(SETTINGS, id=owned_id, persistent=persistent, allow_public=True, default_timeout=60.0)
    session = await core.store.create_session(settings)
    await core.store.store_code(owned_id, StoredCode(code, None, now()))
    await core.store.inboxes.put_inbox(owned_id, None, retries)
    await core.store.inboxes.add_delivery(session.key, new_id("dlv"), None, CONTENT)
    return session


async def delivery(core: Core, *statuses: str) -> Delivery:
    """The delivery, once it has one of these statuses."""
    async with asyncio.timeout(30):
        while True:
            (found,) = await core.store.inboxes.deliveries(mine("s"), status=None, limit=2, before=None)
            if found.status in statuses:
                return found
            await asyncio.sleep(0.01)


async def stopped_and_started(core: Core, monkeypatch: pytest.MonkeyPatch) -> Delivery:
    """What becomes of a delivery during whose attempt the service is stopped, and ends without recording that."""
    monkeypatch.setattr(Inbox, "stop_seconds", 0.01)
    code, go = core.paused()
    await delivered(core, code)
    before = Inbox(core.store.inboxes, core.runs, at_a_time=1)
    await before.start()
    await delivery(core, "running")
    await before.stop()
    go.touch()
    await core.runs.drain(30)
    after = Inbox(core.store.inboxes, core.runs, at_a_time=1)
    await after.start()
    ended = await delivery(core, "done", "failed")
    await after.stop()
    return ended


async def test_an_attempt_that_a_stop_cuts_off_does_not_count(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = await stopped_and_started(core, monkeypatch)
    assert (ended.status, ended.attempts, ended.reason) == ("done", 2, None)


async def test_it_would_count_if_that_were_not_written_beforehand(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_: InboxRows) -> None:
        return None

    monkeypatch.setattr(InboxRows, "count_none_running", nothing)
    ended = await stopped_and_started(core, monkeypatch)
    assert (ended.status, ended.attempts) == ("failed", 1)


async def test_an_attempt_without_a_sandbox_does_not_count(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "delay", lambda tries: 0.01)
    await delivered(core, "print('fine')")
    core.driver.refusals = 4
    inbox = Inbox(core.store.inboxes, core.runs, at_a_time=1)
    await inbox.start()
    ended = await delivery(core, "done", "failed")
    await inbox.stop()
    assert (ended.status, ended.attempts, ended.tries) == ("done", 1, 1), "an attempt begins with its sandbox"
    assert [record.status for record in await core.records()] == ["failed", "failed", "ok"]


BAD_AT_FIRST = """
import json, os
def keep(text):
    with open("file", "a") as file: file.write(text[0])
    with open(".session_data.json", "w") as file: file.write(text)
keep('{"kept": 1}' if os.environ["ERA_DELIVERY_ATTEMPT"] == "2" else "oops")
print(json.dumps({"status": 200, "body": "thanks"}))
"""


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("retries", [0, 1])
async def test_a_delivery_whose_run_could_not_be_kept_has_failed(
    core: Core, monkeypatch: pytest.MonkeyPatch, retries: int, persistent: bool
) -> None:
    """All that it had done is thrown away, so it is retried like others. One in whose session no files are kept anyway,
    or which has changed nothing, was kept."""
    monkeypatch.setattr(deliveries, "delay", lambda tries: 0.01)
    session = await delivered(core, BAD_AT_FIRST, persistent=persistent, retries=retries)
    inbox = Inbox(core.store.inboxes, core.runs, at_a_time=1)
    await inbox.start()
    ended = await delivery(core, "done", "failed")
    kept = await core.store.session(MINE)
    if retries:
        assert (ended.status, ended.attempts, ended.answer_status, ended.reason) == ("done", 2, 200, None)
        assert (json.loads(kept.data), kept.snapshot.file_count) == ({"kept": 1}, int(persistent))
        await core.store.store_code(MINE, StoredCode("pass", None, now()))
        await inbox.replay(MINE, ended.id)
        ended = await delivery(core, "done", "failed")
        assert (ended.status, ended.attempts) == ("done", 3)
    else:
        assert (ended.status, ended.attempts, ended.answer_status) == ("failed", 1, 200)
        assert ended.reason is not None
        assert ended.reason.startswith(".session_data.json is not JSON")
        assert kept.version == session.version
    await inbox.stop()


async def test_sessions_that_nobody_has_do_not_wait_for_all_others(core: Core) -> None:
    """Where all that may run at a time are run, or wait for that."""

    class OneOfTwo(Alone):
        async def owned(self, session_keys: Sequence[int], most_new: int) -> Sequence[int]:
            homeless = [key for key in session_keys if key != busy.key]
            return [key for key in session_keys if key == busy.key] + homeless[: max(most_new, 0)]

    code, go = core.paused()
    await delivered(core, code)
    busy = await core.store.session(mine("s"))
    inbox = Inbox(core.store.inboxes, core.runs, at_a_time=1, cluster=OneOfTwo())
    await inbox.start()
    await delivery(core, "running")
    other = await delivered(core, "pass", mine("other"))
    await until(lambda: inbox.is_working(other.key))
    go.touch()
    await until(lambda: not inbox.is_working(other.key))
    (found,) = await core.store.inboxes.deliveries(mine("other"), status=None, limit=2, before=None)
    assert found.status == "done"
    await inbox.stop()


async def test_a_delivery_that_is_deleted_while_it_waits_for_its_turn_is_not_run(core: Core) -> None:
    session = await delivered(core, "print('delivered')")
    code, go = core.paused()
    long = asyncio.create_task(core.run(code))
    await until(lambda: core.turns.taken(mine("s")))
    inbox = Inbox(core.store.inboxes, core.runs, at_a_time=1)
    await inbox.start()
    await until(lambda: core.turns._long.get(mine("s")) == 2)
    await core.store.inboxes.delete_inbox(mine("s"))
    go.touch()
    await long
    await until(lambda: not inbox.is_working(session.key))
    await inbox.stop()
    assert len(await core.records()) == 1
