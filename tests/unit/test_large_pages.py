"""Pages of lists have a bound for how many items they have, and each may be large: others go on while one is made."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from era.api.protocol.answers import json_bytes
from era.api.routes import inbox, owners, storage
from era.api.routes import runs as run_routes
from era.api.routing.context import Context
from era.core.concurrency import meter
from era.core.models import OwnedId, RunRecord, timestamp
from era.core.owners.api_keys import Caller
from era.core.owners.audit import AuditEntry
from era.core.public.inbox import Delivery
from era.core.storage.storage import Item, Namespaces
from era.errors import BadRequest
from era.wire.inbox import delivery_answer
from era.wire.runs import record_answer
from era.wire.storage import PutObject
from era.wire.usage import audit_answer

COUNT = 300
LARGE = {"numbers": [0.5] * 2000}
"""8 KiB, of which the most can be in each item."""

SESSION = OwnedId("o", "s")
RECORDS = [RunRecord(f"r{n}", 1, "ok", n, enforced=LARGE, key=COUNT + 9 - n) for n in range(COUNT + 1)]
ENTRIES = [AuditEntry(n, "o", "k", "secret.use", "s", "r", LARGE, COUNT + 9 - n) for n in range(COUNT + 1)]
_PATH = "/proxy/s/inbox/" + "a" * 8000
DELIVERIES = [
    Delivery(COUNT + 9 - n, f"d{n}", None, n, "pending", 0, 0, (), None, None, None, None, "POST", _PATH, 1)
    for n in range(COUNT + 1)
]
ITEMS = [Item("o", "kv", "n", f"k{n}", 1, n, n, LARGE) for n in range(COUNT)]


def source(**methods: Any) -> Any:
    """What a route reads from: each method returns this."""

    def method(result: Any) -> Any:
        async def returning(*_: Any, **__: Any) -> Any:
            return result

        return returning

    return SimpleNamespace(**{name: method(result) for name, result in methods.items()})


_APP = SimpleNamespace(state=SimpleNamespace(storage=SimpleNamespace(directory=None)))
REQUEST = cast(Request, SimpleNamespace(state=SimpleNamespace(caller=Caller("o")), app=_APP))


def context(**parts: Any) -> Context:
    return cast(Context, SimpleNamespace(**parts))


def runs() -> Coroutine[Any, Any, Response]:
    return run_routes.list_runs(SESSION, context(history=source(list=RECORDS)), COUNT)


def all_runs() -> Coroutine[Any, Any, Response]:
    pairs = [("s", record) for record in RECORDS]
    return run_routes.list_all_runs("o", context(history=source(of_owner=pairs)), limit=COUNT)


def entries() -> Coroutine[Any, Any, Response]:
    return owners.list_audit(REQUEST, context(audit=source(list=ENTRIES)), limit=COUNT)


def deliveries() -> Coroutine[Any, Any, Response]:
    return inbox.list_deliveries(
        SESSION, context(inbox=SimpleNamespace(store=source(deliveries=DELIVERIES))), limit=COUNT
    )


def keys() -> Coroutine[Any, Any, Response]:
    page = SimpleNamespace(items=ITEMS, more=False)
    return storage.list_keys("n", storage=cast(Namespaces, source(page=page)), request=REQUEST, limit=COUNT)


def resources() -> Coroutine[Any, Any, Response]:
    page = [{"type": "kv", "metadata": LARGE, "created_at": n, "updated_at": n} for n in range(COUNT)]
    stored = cast(Namespaces, source(resources=(page, COUNT)))
    return storage.list_resources(stored, request=REQUEST, limit=COUNT, offset=0)


_REST = {"count": COUNT, "next_cursor": base64.urlsafe_b64encode(b"10").decode().rstrip("=")}
_RUNS = {"runs": [record_answer(record, "s") for record in RECORDS[:COUNT]], **_REST}
PAGES = {
    "runs": (runs, _RUNS),
    "runs of all sessions": (all_runs, _RUNS),
    "audit": (entries, {"entries": [audit_answer(entry) for entry in ENTRIES[:COUNT]], **_REST}),
    "inbox": (deliveries, {"deliveries": [delivery_answer(each) for each in DELIVERIES[:COUNT]], **_REST}),
    "kv": (
        keys,
        {"keys": [{"name": item.key, "metadata": LARGE} for item in ITEMS], "list_complete": True, "cursor": None},
    ),
    "resources": (
        resources,
        {
            "resources": [
                {"type": "kv", "metadata": LARGE, "created_at": timestamp(n), "updated_at": timestamp(n)}
                for n in range(COUNT)
            ],
            "total": COUNT,
            "limit": COUNT,
            "offset": 0,
            "has_more": False,
        },
    ),
}


SHORT = 5e-5
"""Seconds of a slice in which no more than an item or two are made, however fast this machine is."""


async def turns_of_others[T](call: Coroutine[Any, Any, T]) -> tuple[T, int]:
    """What a call returns, and how often others had their turn meanwhile."""
    meter.install()
    task, turns = asyncio.create_task(call), 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    return task.result(), turns


async def whole(answer: Coroutine[Any, Any, Response]) -> bytes:
    response = await answer
    if not isinstance(response, StreamingResponse):
        return bytes(response.body)
    pieces = cast(AsyncIterator[bytes], response.body_iterator)
    return b"".join([piece async for piece in pieces])


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAGES)
async def test_a_page_of_large_items_is_made_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "SLICE", SHORT)
    answer, expected = PAGES[kind]
    longest, dumps = 0, json.dumps

    def noting(value: Any, **options: Any) -> str:
        nonlocal longest
        text = dumps(value, **options)
        longest = max(longest, len(text))
        return text

    monkeypatch.setattr(json, "dumps", noting)
    body, turns = await turns_of_others(whole(answer()))
    assert longest < 10_000
    assert turns > COUNT // 4
    monkeypatch.undo()
    assert body == json_bytes(expected)


async def test_a_page_for_programs_has_its_length() -> None:
    """The client in sandboxes reads no answer without."""
    for answer in (keys, resources):
        response = await answer()
        assert int(response.headers["content-length"]) == len(await whole(answer())) > 1 << 20


async def test_short_and_empty_pages_are_as_they_were() -> None:
    short = replace(RECORDS[0], enforced={})
    for records in ([], [short], [short] * 3):
        response = await run_routes.list_runs(SESSION, context(history=source(list=records)), COUNT)
        shown = [record_answer(record, "s") for record in records]
        assert response.body == json_bytes({"runs": shown, "count": len(records), "next_cursor": None})
        assert response.headers["content-type"] == "application/json"


async def test_a_large_object_is_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """To decode 10 MiB at once takes 80 ms."""
    monkeypatch.setattr(meter, "SLICE", SHORT)
    kept: list[bytes] = []

    class Kept:
        async def put(self, _: str, __: str, ___: str, content: bytes, ____: Any) -> None:
            kept.append(content)

    content = random.Random(1).randbytes((10 << 20) - 1)
    body = PutObject(content=base64.b64encode(content).decode())
    put = storage.put_object("n", "k", body, request=REQUEST, storage=cast(Namespaces, Kept()))
    answer, turns = await turns_of_others(put)
    assert json.loads(bytes(answer.body)) == {"success": True, "size": len(content)}
    assert kept == [content]
    assert turns > 50
    with pytest.raises(BadRequest, match="not base64"):
        await storage.put_object(
            "n", "k", PutObject(content=f"{body.content}="), request=REQUEST, storage=cast(Namespaces, Kept())
        )


ENDS = ["", "=", "==", "===", "A", "AA", "AAA", "AA=", "AA==", "AAA=", "A=AA", "AA==AAAA", "AAA=AAAA", "A\n", "é"]


@pytest.mark.parametrize("before", [0, 4, 65_528, 65_532, 65_536, 65_540, 131_076])
async def test_what_is_base64_and_what_is_not(before: int) -> None:
    """The same as where it is decoded at once, wherever the pieces end."""
    for end in ENDS:
        for content in ("A" * before + end, "A" * before + end + "A" * 4, "A" * before + end + "A" * 100_000):
            try:
                expected: bytes | None = base64.b64decode(content, validate=True)
            except ValueError:
                expected = None
            try:
                found: bytes | None = await storage._decoded(content)
            except ValueError:
                found = None
            assert found == expected, (before, end)
