"""Rows of idempotency keys."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import replace

import pytest

from era.core.metadata import Retention
from era.core.models import Answered, Claim, KeptOutputs, NewCopy, Route, Session, StoredCode
from era.core.sessions.idempotency import IdempotencyKeys, create_once, no_answer, session_from_json
from era.errors import Conflict, KeyReused
from era.store import idempotency
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.store.rows import ended, execute, new, opened


async def test_a_key_is_claimed_with_its_run_and_answered_with_its_end(store: SqlStore) -> None:
    claim = Claim("run", "k", "h" * 64, "mark")
    session = await store.create_session(new("a"))
    assert await store.find_claim(mine("a"), claim) is None
    await store.begin_run(mine("a"), "r1", claim)
    with pytest.raises(Conflict):
        await store.begin_run(mine("a"), "r2", claim)
    assert [run.id for run in await store.runs(session.key, 9)] == ["r1"], "a run began without its claim"
    claimed = await store.find_claim(mine("a"), claim)
    assert claimed is not None
    assert claimed.run is not None
    assert (claimed.request_hash, claimed.answer, claimed.run.status) == ("h" * 64, None, "running")
    outputs = KeptOutputs(b"out", None, None, "d" * 64, b"order")
    await store.end_run(ended(session, "r1"), data="{}", snapshot=None, answered=Answered(claim, '{"n": 1}', outputs))
    claimed = await store.find_claim(mine("a"), claim)
    assert claimed is not None
    assert (claimed.answer, claimed.outputs) == ('{"n": 1}', outputs)
    assert list(await store.output_digests()) == ["d" * 64]
    assert await store.find_claim(mine(""), claim) is None
    assert await store.find_claim(mine("a"), replace(claim, key="K")) is None

    await store.begin_run(mine("a"), "r3", replace(claim, key="other"))
    released = Answered(replace(claim, key="other"))
    await store.end_run(ended(session, "r3", committed=False), data=None, snapshot=None, answered=released)
    assert await store.find_claim(mine("a"), replace(claim, key="other")) is None


async def test_the_oldest_answers_go_where_all_take_too_much(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "_COUNTED_BYTES", 1)  # each time
    monkeypatch.setattr(idempotency, "_ROW_BYTES", 0)
    async with opened(url, Retention(answer_bytes=100)) as store:
        session = await store.create_session(new("a"))
        other = await store.create_session(new("b"))

        async def run(number: int, size: int, where: Session = session) -> Claim:
            claim = Claim("run", f"k{number}", "h" * 64, "mark")
            which, run_id = mine("a" if where is session else "b"), f"r{number}"
            await store.begin_run(which, run_id, claim)
            if size > 50:
                kept = KeptOutputs(None, b"", stderr_digest=f"{number}" * 64, blob_bytes=size - 66)
            else:
                kept = KeptOutputs(b"." * (size - 2), b"")
            answered = Answered(claim, "{}", kept)
            await store.end_run(ended(where, run_id), data=None, snapshot=None, answered=answered)
            return claim

        async def gone(*claims: Claim, who: str = "a") -> list[bool]:
            found = [await store.find_claim(mine(who), claim) for claim in claims]
            for claimed in found:
                assert claimed is not None
                assert claimed.answer is not None
                assert bool(claimed.answer) == (claimed.outputs != KeptOutputs(None, None)), "part of an answer is kept"
            return [claimed is not None and not claimed.answer for claimed in found]

        elsewhere = await run(9, 90, other)
        first, short, second = await run(1, 70), await run(2, 2), await run(3, 28)
        assert await gone(first, short, second) == [False, False, False]
        third = await run(4, 2)
        assert await gone(first, short, second, third) == [True, False, False, False]
        large = await run(5, 1000)
        assert await gone(first, short, second, third, large) == [True, True, True, True, False]
        assert await gone(elsewhere, who="b") == [False]
        assert sorted(await store.output_digests()) == ["5" * 64, "9" * 64]


async def test_the_oldest_answers_of_new_sessions_go_where_all_take_too_much(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "_COUNTED_BYTES", 1)
    async with opened(url, Retention(answer_bytes=20_000)) as store:
        source = await store.create_session(new("source", data=f'{{"long": "{"x" * 5000}"}}'))
        claims = [Claim(route, f"k{number}", "h" * 64, "m") for route in ("create", "duplicate") for number in range(6)]
        for number, claim in enumerate(claims):
            if claim.route == "create":
                await store.create_session(new(f"s{number}", data=source.data), claim)
            else:
                await store.duplicate(NewCopy(mine("source"), f"s{number}"), claim)
        found = [
            await store.find_claim(mine("source" if claim.route == "duplicate" else ""), claim) for claim in claims
        ]
        kept = [claimed is not None and bool(claimed.answer) for claimed in found]
        assert kept == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3
        with pytest.raises(Conflict, match="isn't kept any more"):
            await create_once(IdempotencyKeys(store), mine(""), claims[0], lambda: pytest.fail("it is made again"))


async def test_the_record_of_a_run_goes_once_its_answer_is_gone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "_COUNTED_BYTES", 1)
    async with opened(url, Retention(answer_bytes=1, runs=1)) as store:
        session = await store.create_session(new("a"))
        claims = [Claim("run", f"k{number}", "h" * 64, "mark") for number in range(3)]
        for number, claim in enumerate(claims):
            await store.begin_run(mine("a"), f"r{number}", claim)
            answered = Answered(claim, "{}", KeptOutputs(b"", b""))
            await store.end_run(ended(session, f"r{number}"), data=None, snapshot=None, answered=answered)
        await store.begin_run(mine("a"), "last")
        await store.prune_runs()
        assert [run.id for run in await store.runs(session.key, 9)] == ["last", "r2"]
        gone = await store.find_claim(mine("a"), claims[0])
        assert gone is not None
        assert (gone.run, gone.answer) == (None, "")
        assert getattr(no_answer(gone), "code", "") == "answer_gone"


async def test_a_session_is_made_and_its_key_answered_together(store: SqlStore) -> None:
    claim = Claim("create", "k", "h" * 64, "mark")
    session = await store.create_session(new("a", data='{"n": 1}'), claim)
    await store.store_code(mine("a"), StoredCode("1", None, 7))
    with pytest.raises(Conflict):
        await store.create_session(new("b"), claim)
    with pytest.raises(Conflict):
        await store.create_session(new("a"), replace(claim, key="free"))
    assert await store.find_claim(mine(""), replace(claim, key="free")) is None
    claimed = await store.find_claim(mine(""), claim)
    assert claimed is not None
    assert claimed.answer is not None
    assert session_from_json(claimed.answer) == session
    source = await store.session(mine("a"))
    copying = replace(claim, route="duplicate")
    copy = await store.duplicate(NewCopy(mine("a"), "b"), copying)
    claimed = await store.find_claim(mine("a"), copying)
    assert claimed is not None
    assert claimed.answer is not None
    assert session_from_json(claimed.answer) == copy
    assert copy.stored == source.stored


@pytest.mark.parametrize("route", ["create", "duplicate"])
async def test_what_another_host_makes_at_the_same_time_is_answered_at_both(
    url: str, store: SqlStore, route: Route
) -> None:
    """Each looks whether there is such a request before either has made its session."""
    claim = Claim(route, "k", "h" * 64, "mark")
    await store.create_session(new("source"))
    scope = mine("" if route == "create" else "source")

    def create(session_id: str, claim: Claim) -> Awaitable[Session]:
        copy = NewCopy(mine("source"), session_id)
        return store.create_session(new(session_id), claim) if route == "create" else store.duplicate(copy, claim)

    async def at_both(session_id: str, first: Claim) -> Session:
        await create("first", first)
        return await create(session_id, claim)

    made = await create_once(IdempotencyKeys(store), scope, claim, lambda: at_both("second", claim))
    assert (made.value.id, made.replayed) == ("first", True)
    execute(url, "DELETE FROM idempotency_keys")
    await store.delete_session(mine("first"))
    other = replace(claim, request_hash="g" * 64)
    with pytest.raises(KeyReused):
        await create_once(IdempotencyKeys(store), scope, claim, lambda: at_both("second", other))


async def test_keys_are_dropped_after_a_day(url: str, store: SqlStore) -> None:
    claim = Claim("create", "k", "h" * 64, "mark")
    await store.create_session(new("a"), claim)
    await store.create_session(new("b"), replace(claim, key="young"))
    execute(url, "UPDATE idempotency_keys SET created_at = created_at - 86400000000 WHERE key = 'k'")
    assert await store.find_claim(mine(""), claim) is None
    await store.create_session(new("c"), claim)
    assert await store.find_claim(mine(""), claim) is not None
    assert await store.prune_idempotency_keys() == 0
    execute(url, "UPDATE idempotency_keys SET created_at = created_at - 86400000000 WHERE key = 'k'")
    assert await store.prune_idempotency_keys() == 1
