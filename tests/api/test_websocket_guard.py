"""WebSockets pass the guard: that of every call, and below /proxy that of public URLs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from era.api import guard
from era.core.api_keys import ApiKey, ApiKeys
from tests.api.guest_servers import WEBSOCKET_ECHO, serve_in_background
from tests.conftest import MakeSession, Server
from tests.table import table

PATHS = ("/api/sessions/s/terminal", "/mcp", "/elsewhere", "/proxy/s/80/")
SELF = "127.0.0.1:8787"


class NoKeys:
    async def api_keys(self) -> list[tuple[ApiKey, str]]:
        return []


class HttpOnly(guard.Guard):
    """The guard as it was: it knows of HTTP requests only."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await super().__call__(scope, receive, send)
        else:
            await self._app(scope, receive, send)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Accepts a WebSocket, says who the guard takes the caller for, then sends messages back."""
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": str(scope["state"].get("caller"))})
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})


def opened(
    path: str,
    headers: dict[str, str],
    *messages: Any,
    kind: type[guard.Guard] = guard.Guard,
    key: str | None = None,
    extensions: Any = ("websocket.http.response",),
) -> list[Any]:
    """All that a server of this `kind` sends to whoever opens a WebSocket and says `messages`."""
    sent: list[Any] = []
    said = [{"type": "websocket.connect"}, *messages, {"type": "websocket.disconnect", "code": 1000}]

    async def receive() -> Any:
        return said.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    fields = [(name.encode(), value.encode()) for name, value in {"host": SELF, **headers}.items()]
    scope = {"type": "websocket", "path": path, "headers": fields, "extensions": {name: {} for name in extensions}}
    keys = ApiKeys(NoKeys(), key)  # type: ignore[arg-type]  # of which it needs no more
    asyncio.run(kind(echo, keys=keys, names=["era.test"], idle_seconds=5)(scope | {"state": {}}, receive, send))
    return sent


def outcome(*given: Any, **how: Any) -> int | str:
    """The status of a refusal, or who the caller is said to be."""
    first, second = opened(*given, **how)[:2]
    if first["type"] == "websocket.accept":
        return str(second["text"])
    assert first["type"] == "websocket.http.response.start"
    assert json.loads(second["body"])["request_id"] == dict(first["headers"])[b"x-request-id"].decode()
    return int(first["status"])


FOREIGN: list[dict[str, str]] = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": f"http://{SELF}", "sec-fetch-site": "cross-site"},
    {"host": "evil.example", "origin": "http://evil.example"},
]


@table("headers", FOREIGN)
def test_pages_of_others_open_none(headers: dict[str, str]) -> None:
    for path in PATHS:
        public, keyed = path.startswith("/proxy"), path.startswith(("/api", "/mcp"))
        foreign = "host" in headers or (not public and (keyed or headers["origin"] != f"http://{SELF}"))
        assert (outcome(path, headers) == 403) == foreign, path
        assert outcome(path, headers, kind=HttpOnly) == "None"


@table("authorization", ["", "Bearer wrong", "Basic the-key", "Bearer the-key"])
def test_the_key_is_needed_but_for_public_urls(authorization: str) -> None:
    headers = {"authorization": authorization, "origin": "http://evil.example"}
    for path in PATHS:
        found = outcome(path, headers, key="the-key")
        if not path.startswith(("/api", "/mcp")):
            assert found == "None"
        else:
            assert "Caller" in str(found) if authorization == "Bearer the-key" else found == 401
        assert outcome(path, headers, key="the-key", kind=HttpOnly) == "None"


def test_who_is_here_opens_them() -> None:
    for headers in ({}, {"origin": f"http://{SELF}", "sec-fetch-site": "same-origin"}, {"host": "era.test"}):
        for path in PATHS:
            caller = "Caller" if path.startswith(("/api", "/mcp")) else "None"
            assert caller in str(outcome(path, headers))


def test_a_server_that_cannot_answer_closes() -> None:
    """Without the extension of ASGI by which a WebSocket's request gets an answer of its own."""
    sent = opened("/api/x", FOREIGN[0], extensions=())
    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]


@pytest.mark.parametrize("kind", ["text", "bytes"])
def test_messages_are_bounded(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1000)
    whole = b"x" * 1000 if kind == "bytes" else "x" * 1000
    said = [{"type": "websocket.receive", kind: part} for part in (whole, whole * 2, whole)]
    assert [message.get(kind) for message in opened("/api/x", {}, *said)[2:]] == [whole]


def handshake(path: str, host: str, origin: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", f"Origin: {origin}", "Upgrade: websocket", "Connection: Upgrade"]
    return "\r\n".join([*lines, "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==", "", ""]).encode()


def test_the_service_itself_refuses_them(client: httpx.Client, server: Server, session: MakeSession) -> None:
    where = session("node")
    serve_in_background(client, where, WEBSOCKET_ECHO)
    public = f"/proxy/{where}/3000/refused"  # where the program answers 403 in words of its own
    assert server.exchange(handshake(public, "SELF", "http://evil.example")).endswith(b"\r\n\r\nno")
    for path, host, origin in (
        (public, "evil.example", "http://evil.example"),
        (f"/api/sessions/{where}", "SELF", "http://evil.example"),
        (f"/api/sessions/{where}", "SELF", "null"),
        (f"/api/sessions/{where}", "evil.example", "http://evil.example"),
    ):
        answer = server.exchange(handshake(path, host, origin).replace(b"Upgrade\r\nSec", b"Upgrade, close\r\nSec"))
        assert answer.startswith(b"HTTP/1.1 403 "), (path, host, origin)
        assert b'"code":"forbidden"' in answer.replace(b" ", b"")
