"""The shortcut of the run call, beside the route that it is one for: the same answers to the same requests."""

from __future__ import annotations

import json
import re
from typing import Any, cast

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from era.api.context import Context
from era.api.hot_run import HotRun
from tests.conftest import MakeSession

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


def answer(client: httpx.Client, where: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any, list[str]]:
    """Status, body and names of headers, without what differs from one request to the next."""
    got = client.post(f"/api/sessions/{where}/run", content=body, headers=headers)
    text = re.sub(r'"(run|req)_\w+"|"\d+\.\d{3}s"', '"N"', got.text)
    return got.status_code, json.loads(text), sorted(got.headers)


@pytest.mark.parametrize("name", BODIES)
def test_the_shortcut_answers_as_the_route(client: httpx.Client, session: MakeSession, name: str) -> None:
    where = session()
    assert answer(client, where, BODIES[name], SHORTCUT) == answer(client, where, BODIES[name], ROUTE)


@pytest.mark.parametrize("where", ["nobody", "a%20b", "a" * 200, "%2e%2e"])
def test_the_shortcut_finds_no_session_where_the_route_finds_none(client: httpx.Client, where: str) -> None:
    assert answer(client, where, BODIES["plain"], SHORTCUT) == answer(client, where, BODIES["plain"], ROUTE)


async def test_only_usual_requests_take_the_shortcut() -> None:
    """The others reach the application as they are, with the body in the same pieces."""
    pieces: list[Message] = [
        {"type": "http.request", "body": b'{"code": ', "more_body": True},
        {"type": "http.request", "body": b'"", "background": true}', "more_body": False},
    ]
    reached: list[list[Message]] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append([await receive() for _ in pieces])

    async def call(**changes: Any) -> None:
        given = iter(pieces)

        async def receive() -> Message:
            return next(given)

        async def send(_: Message) -> None:
            raise AssertionError("the application answers")

        headers = [(b"content-type", b"application/json"), *changes.pop("more", [])]
        scope = {"type": "http", "method": "POST", "path": "/api/sessions/a/run", "query_string": b""}
        scope |= {"headers": headers, **changes}
        await HotRun(application, context=cast(Context, None), failed=cast(Any, None))(scope, receive, send)

    await call()  # in the background
    await call(more=[(b"idempotency-key", b"k")])
    await call(more=[(b"content-type", b"text/plain")])
    await call(headers=[])
    await call(method="PUT")
    await call(query_string=b"a=b")
    await call(path="/api/sessions/a/run/")
    await call(path="/api/sessions/a/stream")
    await call(type="websocket", path="/api/sessions/a/run")
    assert reached == [pieces] * 9
