"""Which requests of programs get to this server's public URLs, and what of them."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from era.api.guest_api import GuestPublicUrls


async def exchanged(request: bytes) -> tuple[bytes, list[Scope], tuple[int, int]]:
    """The answer to these bytes, the scopes of requests that got through, and how many bytes were counted."""
    scopes: list[Scope] = []
    counted, ended = [0, 0], asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def count(received: int, sent: int) -> None:
        counted[0] += received
        counted[1] += sent

    ours, theirs = socket.socketpair()
    urls = GuestPublicUrls(app)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: urls.protocol(count, ended.set), ours)
    reader, writer = await asyncio.open_connection(sock=theirs)
    writer.write(request)
    async with asyncio.timeout(60):
        said = await reader.read()
        await ended.wait()
    writer.close()
    await writer.wait_closed()
    return said, scopes, (counted[0], counted[1])


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET /api HTTP/1.1", 403),
        ("GET / HTTP/1.1", 403),
        ("GET /proxy HTTP/1.1", 403),
        ("GET /proxyx/a HTTP/1.1", 403),
        ("GET /proxy/../api HTTP/1.1", 403),
        ("GET /proxy/%2E./api HTTP/1.1", 403),
        ("GET /proxy/a/%2e%2e HTTP/1.1", 403),
        ("GET /health/ready HTTP/1.1", 403),
        ("GET http://x/proxy/a HTTP/1.1", 403),
        ("CONNECT localhost:1 HTTP/1.1", 403),
        ("GET /proxy/a HTTP/2", 400),
        ("GET /proxy/a b HTTP/1.1", 400),
        ("GET /proxy/a HTTP/1.1\r\nContent-Length: -1", 400),
        ("GET /proxy/a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1", 400),
        ("GET /proxy/a HTTP/1.1\r\nTransfer-Encoding: chunked", 411),
        ("GET /proxy/a HTTP/1.1\r\nA : b", 400),
    ],
)
async def test_only_requests_for_what_is_public_get_through(request_: str, status: int) -> None:
    said, scopes, _ = await exchanged(f"{request_}\r\n\r\n".encode())
    assert said.startswith(f"HTTP/1.1 {status} ".encode())
    assert scopes == []


async def test_what_gets_through_says_nothing_of_where_it_comes_from() -> None:
    lines = (
        "GET /proxy/a?b=/../c HTTP/1.0\r\nHost: h\r\nX-Forwarded-For: 1.2.3.4\r\nForwarded: for=1\r\nContent-Length: 3"
    )
    request = f"{lines}\r\nX-Mine: 1\r\nConnection: keep-alive\r\n\r\nabc".encode()
    said, scopes, counted = await exchanged(request)
    (scope,) = scopes
    forwarded: dict[str, Any] = {key: scope[key] for key in ("path", "query_string", "client")}
    assert forwarded == {"path": "/proxy/a", "query_string": b"b=/../c", "client": ("127.0.0.1", 0)}
    assert {name for name, _ in scope["headers"]} == {b"host", b"content-length", b"x-mine", b"connection"}
    assert counted == (len(request), len(said))


async def test_one_request_is_answered_on_a_connection() -> None:
    request = b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n"
    said, scopes, _ = await exchanged(request * 3)
    assert said.count(b"HTTP/1.1 ") == len(scopes) == 1
    assert b"\r\nconnection: close\r\n" in said


async def test_a_websocket_is_handed_on() -> None:
    """Whatever follows its request is bytes to the session's server, and no request to this one."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope["extensions"]["era.connection"]
        assert connection.upgrading
        later = connection.open_tunnel([(b"upgrade", b"websocket"), (b"connection", b"Upgrade")])
        while data := await later.read(100):
            await connection.send_raw(data)
        await connection.hang_up()

    ours, theirs = socket.socketpair()
    ended, urls = asyncio.Event(), GuestPublicUrls(app)
    loop = asyncio.get_running_loop()
    await loop.connect_accepted_socket(lambda: urls.protocol(lambda *_: None, ended.set), ours)
    reader, writer = await asyncio.open_connection(sock=theirs)
    hidden = b"GET /api/sessions HTTP/1.1\r\nHost: h\r\n\r\n"
    head = b"GET /proxy/s/1/ HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    writer.write(head + hidden)
    async with asyncio.timeout(60):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert await reader.readexactly(len(hidden)) == hidden
        writer.close()
        await writer.wait_closed()
        await ended.wait()
