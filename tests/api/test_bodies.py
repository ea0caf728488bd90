"""Bodies of requests: read in one piece, in a thread if they are long, and held no longer than needed."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.types import Message

from era.api.routes import runs
from era.api.routing import context
from era.api.routing.context import StrictRoute
from era.core import jsontext
from era.core.execution.run_messages import RunRequest
from era.core.models import OwnedId
from era.core.owners.api_keys import Caller
from era.errors import EraError, TooManyWaiting
from era.settings import Settings
from era.wire.runs import RunBody
from era.wire.sessions import CreateSession
from tests.conftest import MakeSession

JSON_TYPE = {"Content-Type": "application/json"}
BROWSER = {"Sec-Fetch-Site": "same-origin"}


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, EraError)
    return Response(error.message, error.status)


REFUSED: dict[str, tuple[bytes, dict[str, str], tuple[int, str]]] = {
    "empty list": (b"[]", JSON_TYPE, (400, "invalid_field")),
    "no JSON": (b"{", JSON_TYPE, (400, "invalid_json")),
    "too deep": (b'{"code": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", JSON_TYPE, (413, "too_large")),
    "not a number": (b'{"code": "", "timeout": NaN}', JSON_TYPE, (400, "invalid_json")),
    "lone surrogate": (b'{"code": "\\ud800"}', JSON_TYPE, (400, "invalid_json")),
    "unknown field": (b'{"code": "", "codes": ""}', JSON_TYPE, (400, "invalid_field")),
    "wrong type": (b'{"code": 1}', JSON_TYPE, (400, "invalid_field")),
    "other type from a browser": (b'{"code": ""}', BROWSER | {"Content-Type": "text/plain"}, (400, "invalid_field")),
    "no type from a browser": (b'{"code": ""}', BROWSER, (400, "invalid_field")),
}
ACCEPTED: dict[str, tuple[bytes, dict[str, str]]] = {
    "plain": (b'{"code": ""}', JSON_TYPE),
    "with a charset": (b'{"code": ""}', {"Content-Type": "application/json; charset=utf-8"}),
    "other type": (b'{"code": ""}', {"Content-Type": "text/plain"}),
    "JSON from a browser": (b'{"code": ""}', BROWSER | JSON_TYPE),
}


def test_body_that_is_not_json_or_does_not_fit_is_refused(client: httpx.Client, session: MakeSession) -> None:
    where = f"/api/sessions/{session()}/run"
    for name, (body, headers, expected) in REFUSED.items():
        answer = client.post(where, content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == expected, name
    for name, (body, headers) in ACCEPTED.items():
        assert client.post(where, content=body, headers=headers).status_code == 200, name


async def test_body_in_many_pieces_takes_no_more_memory_than_its_bytes() -> None:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/x")
    async def take(body: RunBody) -> Response:
        assert body.code == "ab" * 100_000
        return Response()

    application = FastAPI()
    application.include_router(router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://era.example") as client:

        async def pieces() -> AsyncIterator[bytes]:
            yield b'{"code": "'
            for _ in range(100_000):
                yield b"%s" % b"ab"  # an object for each, as from a socket
            yield b'"}'

        tracemalloc.start()
        try:
            answer = await client.post("/x", content=pieces(), headers=JSON_TYPE)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert answer.status_code == 200
    assert most < 2_000_000


@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_waiting_run_holds_its_input_once(is_sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the input as bytes: as text it takes four times as much, and the body would come on top."""
    if not is_sound:
        monkeypatch.setattr(runs, "_let_go", lambda *_: None)
    size, held = 4 << 20, 0

    async def wait(session_id: OwnedId, asked: RunRequest) -> None:
        nonlocal held
        assert len(asked.invocation.stdin) == size + 4
        for _ in range(200):  # the thread that has parsed it may still be about to let go
            await asyncio.sleep(0.001)
            held, _ = tracemalloc.get_traced_memory()
            if held < 1.5 * size:
                break
        raise TooManyWaiting("It has waited.")

    async def receive() -> Message:
        body = {"code": "pass", "stdin": "x" * size + "\N{GRINNING FACE}"}
        return {"type": "http.request", "body": json.dumps(body, ensure_ascii=False).encode(), "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 429

    async def failed(request: Request, error: Exception) -> Response:
        return Response(status_code=429)

    context = Mock(settings=Settings(), runs=Mock(run=wait), audit=Mock(secrets=AsyncMock()))
    application = FastAPI(exception_handlers={TooManyWaiting: failed})
    application.state.context = context
    application.include_router(runs.router)
    path = "/api/sessions/a/run"
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"headers": [(b"content-type", b"application/json"), (b"host", b"x")], "state": {"caller": Caller("me")}}
    scope |= {"query_string": b"", "server": ("x", 80), "scheme": "http"}
    scope["http_version"] = "1.1"
    await application({**scope, "headers": [], "path": "/", "raw_path": b"/"}, receive, AsyncMock())  # which builds it
    tracemalloc.start()
    try:
        await application(scope, receive, send)
    finally:
        tracemalloc.stop()
    assert (size < held < 1.5 * size) is is_sound, held


OVER_A_MIB: dict[str, dict[str, Any]] = {
    "keys": {f"{n:060}": 0 for n in range(40_000)},
    "numbers": {"n": [0] * 600_000},
    "one text": {"n": "a" * 1_100_000},
    "text of two bytes": {"n": "é" * 600_000},
    "beside stored code": {"code": "x" * 1_000_000, "n": "a" * 1_100_000},
    "no stored code": {"code": ["x" * 1_100_000]},
}


@pytest.mark.parametrize("field", ["data", "metadata"])
@pytest.mark.parametrize("kind", OVER_A_MIB)
async def test_data_that_is_too_large_is_refused_as_it_is_read(
    field: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread that reads it: 230,000 keys took most of a second of the event loop before they were refused."""
    body = json.dumps({"language": "python", field: OVER_A_MIB[kind]}, ensure_ascii=False).encode()
    looked_at = list[Any]()
    few = CreateSession._without_most_unknown

    def noting(value: Any) -> Any:
        looked_at.append(len(value))
        return few(value)

    monkeypatch.setattr(CreateSession, "_without_most_unknown", noting)
    router = APIRouter(route_class=StrictRoute)

    @router.post("/api/sessions")
    async def take(body: CreateSession) -> Response:
        return Response(status_code=204)

    application = FastAPI(exception_handlers={EraError: refused})
    application.include_router(router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://era.example") as client:
        answer = await client.post("/api/sessions", content=body, headers=JSON_TYPE)
        assert (answer.status_code, looked_at) == (413, [])
        assert re.match(rf"'{field}' is .* bytes as compact JSON, 1048576 are allowed", answer.text)
        with monkeypatch.context() as weakened:
            weakened.setattr(context, "check_long_body", lambda _: None)
            await client.post("/api/sessions", content=body, headers=JSON_TYPE)
        assert looked_at == [2]


def test_data_may_come_back_with_the_stored_code_that_it_was_shown_with(
    client: httpx.Client, session: MakeSession
) -> None:
    """Together they are over 1 MiB."""
    where = session(data={"a": "x" * 1_000_000})
    client.put(f"/api/sessions/{where}/code", json={"code": "#" * 1_000_000})
    shown = client.get(f"/api/sessions/{where}").json()["data"]
    assert len(shown["code"]) == 1_000_000
    answer = client.patch(f"/api/sessions/{where}", json={"data": {**shown, "b": 1}})
    assert answer.status_code == 200
    assert answer.json()["metadata"]["data"] == {**shown, "b": 1}
    answer = client.patch(f"/api/sessions/{where}", json={"data": {**shown, "c": "x" * 50_000}})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


JSON = {"few values": '{"code": 1}', "many values": json.dumps({"code": [0] * 40_000}), "long": "a" * 2_000_000}


@pytest.mark.parametrize("kind", JSON)
async def test_large_json_is_read_in_a_thread(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """700,000 integers took 250 ms of the event loop."""
    where, loads = [], jsontext.loads

    def noting(text: bytes) -> Any:
        where.append(threading.current_thread() is threading.main_thread())
        return loads(text)

    monkeypatch.setattr(jsontext, "loads", noting)
    router = APIRouter(route_class=StrictRoute)

    @router.post("/api/sessions/a/run")
    async def take(body: RunBody) -> Response:
        raise AssertionError(body)

    application = FastAPI()
    application.include_router(router)
    transport = httpx.ASGITransport(application, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://era.example") as client:
        await client.post("/api/sessions/a/run", content=JSON[kind].encode(), headers=JSON_TYPE)
    assert where == [kind == "few values"]
