"""The shortcut of the busiest routes, beside FastAPI's own way to them: the same answers to the same requests."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import tracemalloc
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive, Scope, Send

from era.api import context, runs, sessions
from era.api.context import Context, StrictRoute
from era.api.hot_routes import HotRoutes
from era.core import jsontext
from era.core.api_keys import Caller
from era.core.models import OwnedId
from era.core.run_messages import RunRequest
from era.errors import TooManyWaiting
from era.settings import Settings
from era.wire.runs import RunBody
from era.wire.sessions import CreateSession
from tests.conftest import MakeSession
from tests.table import table

ROUTE = {"Content-Type": "application/json; charset=utf-8"}
SHORTCUT = {"Content-Type": "application/json"}

BODIES: dict[str, bytes] = {
    "plain": b'{"code": "print(1)"}',
    "everything": b'{"code": "import os; print(os.environ[\'A\'])", "env": {"A": "b"}, "timeout": 5, "atomic": true}',
    "a secret": b'{"code": "pass", "secrets": {"T": {"value": "v", "hosts": ["a.example"]}}}',
    "a failure": b'{"code": "raise SystemExit(3)"}',
    "no code": b"{}",
    "unicode": '{"code": "print(\'é☃\')"}'.encode(),
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "an unknown field": b'{"code": "", "codes": ""}',
    "a wrong type": b'{"code": 1}',
    "a timeout that is too long": b'{"code": "", "timeout": 1e9}',
    "a timeout of nothing": b'{"code": "", "timeout": 0}',
    "a bad variable": b'{"code": "", "env": {"A=": "b"}}',
    "a bad secret": b'{"code": "", "secrets": {"T": {"value": "v", "hosts": ["*"]}}}',
    "a lone surrogate": b'{"code": "\\ud800"}',
    "not a number": b'{"code": "", "timeout": NaN}',
    "too deep": b'{"code": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a byte order mark": b'\xef\xbb\xbf{"code": ""}',
}


PROCESSES: dict[str, bytes] = {
    "plain": b'{"command": ["true"]}',
    "everything": b'{"command": "cat", "env": {"A": "b"}, "stdin": true, "pty": {"cols": 9}, "timeout": 5}',
    "no command": b"{}",
    "an empty command": b'{"command": []}',
    "an id as its tag": b'{"command": "true", "tag": "."}',
    "a bad directory": b'{"command": "true", "cwd": "../.."}',
    "no JSON": b"{",
}
SESSIONS: dict[str, bytes] = {
    "plain": b'{"language": "python"}',
    "everything": b'{"language": "py", "data": {"a": 1}, "metadata": {"a": "b"}, "limits": {"memory_mb": 100}}',
    "an unknown language": b'{"language": "cobol"}',
    "a bad id": b'{"language": "python", "session_id": "a/b"}',
    "no JSON": b"{",
}


def answer(
    client: httpx.Client, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> tuple[int, Any, list[str]]:
    """Status, body and names of headers, without what differs from one request to the next."""
    got = client.request(method, f"/api/sessions{path}", content=body, headers=headers)
    unlike = r'"(run|req|proc|sess)_\w+"|"\d+\.\d{3}s"|"\d{4}-\d\d-[^"]*Z"|"(pid|duration_ms)": ?[\d.]+'
    text = re.sub(unlike, '"N"', got.text)
    return got.status_code, text, sorted(got.headers)


def both(client: httpx.Client, method: str, path: str, body: bytes) -> tuple[object, object]:
    """The same request by the shortcut and by the route."""
    return answer(client, method, path, body, SHORTCUT), answer(client, method, path, body, ROUTE)


@table("name", BODIES)
def test_the_shortcut_runs_as_the_route(client: httpx.Client, session: MakeSession, name: str) -> None:
    where = session()
    shortcut, route = both(client, "POST", f"/{where}/run", BODIES[name])
    assert shortcut == route


def test_a_key_is_the_same_by_the_shortcut_and_by_the_route(client: httpx.Client, session: MakeSession) -> None:
    where = f"/api/sessions/{session()}/run"
    code = json.dumps({"code": "import time; print(time.time_ns())"})
    keys = {"Idempotency-Key": "one"}
    first, again = (client.post(where, content=code, headers=kind | keys) for kind in (SHORTCUT, ROUTE))
    third = client.post(where, content=code, headers=SHORTCUT | keys)
    assert first.json() == again.json() == third.json()
    assert [got.headers.get("idempotent-replay") for got in (first, again, third)] == [None, "true", "true"]
    for kind in (SHORTCUT, ROUTE):
        other = client.post(where, content=BODIES["plain"], headers=kind | keys)
        assert (other.status_code, other.json()["code"]) == (409, "idempotency_mismatch")
        assert (
            client.post(where, content=code, headers=kind | {"Idempotency-Key": "k" * 300}).json()["code"] == "bad_key"
        )
        two = [*kind.items(), ("Idempotency-Key", "two"), ("Idempotency-Key", "three")]
        assert client.post(where, content=code, headers=two).json()["code"] == "bad_key"


@table("where", ["nobody", "a%20b", "a" * 200, "%2e%2e"])
@table("method, call", [("POST", "/run"), ("POST", "/processes"), ("GET", ""), ("PUT", "/files/a")])
def test_the_shortcut_finds_no_session_where_the_route_finds_none(
    client: httpx.Client, where: str, method: str, call: str
) -> None:
    body = BODIES["plain"] if call == "/run" else PROCESSES["plain"]
    usual = answer(client, method, f"/{where}{call}", body, SHORTCUT)
    unusual = answer(client, method, f"/{where}{call}?_=1", body, ROUTE)
    assert usual == unusual
    assert usual[0] == 404


def test_the_shortcut_starts_processes_as_the_route(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    for name, body in PROCESSES.items():
        shortcut, route = both(client, "POST", f"/{where}/processes", body)
        assert shortcut == route, name


def test_the_shortcut_makes_sessions_as_the_route(client: httpx.Client) -> None:
    for name, body in SESSIONS.items():
        shortcut, route = both(client, "POST", "", body)
        assert shortcut == route, name


def test_the_shortcut_writes_and_reads_files_as_the_route(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    for path in ("file", "a/b", "..", "a//b", "a%2Fb", "a%00b", "%C3%A9", "", "a/"):
        for method, body in (("PUT", b"1"), ("GET", None)):
            usual = answer(client, method, f"/{where}/files/{path}", body, {})
            assert usual == answer(client, method, f"/{where}/files/{path}?_=1", body, {}), path


async def test_only_usual_requests_take_the_shortcut() -> None:
    """The others reach the application as they are: unread, or in one piece where they had to be read to know."""
    pieces: list[Message] = [
        {"type": "http.request", "body": b'{"code": ', "more_body": True},
        {"type": "http.request", "body": b'"", "codes": true}', "more_body": False},
    ]
    whole: list[Message] = [{"type": "http.request", "body": b'{"code": "", "codes": true}', "more_body": False}]
    gone: list[Message] = [{"type": "http.disconnect"}]
    reached: list[list[Message]] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append([await receive()])
        while reached[-1][-1].get("more_body"):
            reached[-1].append(await receive())

    async def call(given: list[Message] = pieces, **changes: Any) -> None:
        coming = iter(given)

        async def receive() -> Message:
            return next(coming)

        async def send(_: Message) -> None:
            raise AssertionError("the application answers")

        headers = [(b"content-type", b"application/json"), *changes.pop("more", [])]
        scope = {"type": "http", "method": "POST", "path": "/api/sessions/a/run", "query_string": b""}
        scope |= {"headers": headers, **changes}
        routes = cast(list[APIRoute], runs.router.routes)
        hot = HotRoutes(application, routes=routes, context=cast(Context, None), failed=cast(Any, None))
        await hot(scope, receive, send)

    await call()  # with a field that there isn't
    await call([*pieces[:1] * 3, *gone])
    assert reached == [whole, gone]
    reached.clear()
    await call(more=[(b"last-event-id", b"1")])
    await call(more=[(b"content-type", b"text/plain")])
    await call(headers=[])
    await call(method="PUT")
    await call(query_string=b"a=b")
    await call(path="/api/sessions/a/run/")
    await call(path="/api/sessions/a/streams")
    await call(type="websocket", path="/api/sessions/a/run")
    assert reached == [pieces] * 8


@pytest.mark.parametrize("way", ["the shortcut", "the route"])
@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_a_run_that_waits_holds_its_input_once(way: str, is_sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bytes; as text it is four times as long, and then there is the body that it came in."""
    if not is_sound:
        monkeypatch.setattr(runs, "let_go", lambda *_: None)
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
    routes = cast(list[APIRoute], runs.router.routes)
    application.add_middleware(HotRoutes, routes=routes, context=context, failed=failed)
    path = "/api/sessions/a/run"
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"headers": [(b"content-type", b"application/json"), (b"host", b"x")], "state": {"caller": Caller("me")}}
    scope |= {"query_string": b"_x=1" if way == "the route" else b"", "server": ("x", 80), "scheme": "http"}
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
    """In the thread that reads it: 230,000 keys took most of a second of the event loop before they were refused. So it
    is on the shortcut and on the routes."""
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

    application = FastAPI()
    application.include_router(router)
    routes = [cast(APIRoute, each) for each in sessions.router.routes]
    hot = HotRoutes(application, routes=routes, context=cast(Context, None), failed=cast(Any, None))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(hot), base_url="http://era.example") as client:
        answer = await client.post("/api/sessions", content=body, headers=SHORTCUT)
        assert (answer.status_code, looked_at) == (413, [])
        assert re.match(rf"'{field}' is .* bytes as compact JSON, 1048576 are allowed", answer.json()["detail"])
        with monkeypatch.context() as weakened:
            weakened.setattr(context, "check_long_body", lambda _: None)
            await client.post("/api/sessions", content=body, headers=ROUTE)
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
    """700,000 integers took 250 ms of the event loop. So it is on the shortcut, and once: the route, which gets all
    that isn't valid, takes the value that was read."""
    where, loads = [], jsontext.loads

    def noting(text: bytes, known: Any = None) -> Any:
        where.append(threading.current_thread() is threading.main_thread())
        return loads(text, known)

    monkeypatch.setattr(jsontext, "loads", noting)
    router = APIRouter(route_class=StrictRoute)

    @router.post("/api/sessions/a/run")
    async def take(body: RunBody) -> Response:
        raise AssertionError(body)

    application = FastAPI()
    application.include_router(router)
    routes = cast(list[APIRoute], runs.router.routes)
    hot = HotRoutes(application, routes=routes, context=cast(Context, None), failed=cast(Any, None))
    transport = httpx.ASGITransport(hot, raise_app_exceptions=False)  # none is valid, and nobody here says so nicely
    async with httpx.AsyncClient(transport=transport, base_url="http://era.example") as client:
        await client.post("/api/sessions/a/run", content=JSON[kind].encode(), headers=SHORTCUT)
    assert where == [kind == "few values"]
