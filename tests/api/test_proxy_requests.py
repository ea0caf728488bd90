"""What stored code sees of a public call, and requests that reach no run."""

from __future__ import annotations

import base64
import json
import re
import time

import httpx

from tests.api.stored_code import COUNTER, SEEN, Publish
from tests.conftest import Server
from tests.table import table


def test_the_request_is_seen(client: httpx.Client, publish: Publish, server: Server) -> None:
    url = publish(SEEN)
    answer = client.put(
        f"{url}/a%20b/%2e%2e/%2F;c//d?x=1&y=%20+&x=2",
        content="Grüße, {}",
        headers={"Content-Type": "text/x-own", "X-Hub-Signature": "sha1=abc"},
    )
    env = answer.json()
    headers = json.loads(env["ERA_HTTP_HEADERS"])
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    assert env["ERA_REQUEST_MODE"] == "proxy"
    assert env["ERA_HTTP_METHOD"] == "PUT"
    assert env["ERA_HTTP_PATH"] == "/a%20b/%2e%2e/%2F;c//d"
    assert env["ERA_HTTP_QUERY"] == "?x=1&y=%20+&x=2"
    assert env["ERA_HTTP_BODY"] == "Grüße, {}"
    assert env["ERA_HTTP_BODY_ENCODING"] == "utf-8"
    assert env["ERA_PROXY_URL"] == f"{server.url}/proxy/{url.split('/')[2]}"
    assert headers["content-type"] == "text/x-own"
    assert headers["x-hub-signature"] == "sha1=abc"
    assert headers["host"] == server.url.removeprefix("http://")


@table("end", ["/3000/", "/3000", "/", ""])
def test_an_empty_path_is_a_slash(client: httpx.Client, publish: Publish, end: str) -> None:
    where = publish(SEEN).split("/")[2]
    seen = client.get(f"/proxy/{where}{end}").json()
    assert (seen["ERA_HTTP_PATH"], seen["ERA_HTTP_QUERY"], seen["ERA_HTTP_BODY"]) == ("/", "", "")


@table("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
def test_any_method(client: httpx.Client, publish: Publish, method: str) -> None:
    code = 'import os; m = os.environ[\'ERA_HTTP_METHOD\']; print(\'{"headers": {"X-Seen": "%s"}}\' % m)'
    answer = client.request(method, publish(code))
    assert (answer.status_code, answer.headers["X-Seen"]) == (200, method)
    assert (answer.content == b"") == (method == "HEAD")


@table("body", [b"\xff\xfe", b"a\0b", bytes(range(256))])
def test_binary_bodies_are_base64(client: httpx.Client, publish: Publish, body: bytes) -> None:
    seen = client.post(publish(SEEN), content=body).json()
    assert seen["ERA_HTTP_BODY_ENCODING"] == "base64"
    assert base64.b64decode(seen["ERA_HTTP_BODY"]) == body


def test_bodies_too_large_for_environment_variables_are_413(client: httpx.Client, publish: Publish) -> None:
    # A child gets its environment by execve, which bounds each variable to 128 KiB.
    url = publish("import subprocess; print(subprocess.run(['true']).returncode)")
    room = (128 << 10) - len("ERA_HTTP_BODY=") - 1
    assert client.post(url, content=b"x" * room).json() == 0
    assert client.post(url, content=b"\xff" * (room // 4 * 3)).json() == 0
    for body in (b"x" * (room + 1), b"\xff" * (room // 4 * 3 + 1), b"x" * (1 << 20)):
        answer = client.post(url, content=body)
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert "ERA_HTTP_BODY" in answer.json()["error"]
    chunked = client.post(url, content=iter([b"x" * 65536] * 3))
    assert chunked.status_code == 413
    answer = client.get(url, headers={"X-Quotes": '"' * 100_000})  # twice as many once escaped; or too many for HTTP
    assert answer.status_code in (413, 431)
    assert client.get(url, headers={"X-Quotes": '"' * 60_000}).status_code == 200


def test_headers_are_cleaned(server: Server, publish: Publish) -> None:
    url = publish(SEEN).encode()
    request = (
        b"POST " + url + b" HTTP/1.1\r\nHost: SELF\r\nConnection: close, X-Forwarded-For, TE\r\nTE: trailers\r\n"
        b"X-Forwarded-For: 192.0.2.1\r\nKeep-Alive: 5\r\nProxy-Authorization: Basic eDp5\r\nProxy-Connection: x\r\n"
        b"Trailer: x\r\nX-Twice: 1\r\nx-twice: 2\r\nSet-Cookie: a=b\r\nCookie: other=secret; era-session-own=1\r\n"
        b"Cookie: era-session-b=2; more=secret\r\nX-Latin: \xe4\r\nAuthorization: Basic sender\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    )
    seen = json.loads(server.exchange(request).partition(b"\r\n\r\n")[2])
    headers = json.loads(seen["ERA_HTTP_HEADERS"])
    assert seen["ERA_HTTP_BODY"] == "hi"
    assert headers == {
        "host": server.url.removeprefix("http://"),
        "x-forwarded-for": "192.0.2.1",  # naming it in Connection doesn't remove what a proxy in front has set
        "x-twice": "1, 2",
        "cookie": "own=1; b=2",
        "x-latin": "ä",
        "authorization": "Basic sender",
    }


HEAD = b"POST URL HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n"
ENDED = b"Content-Length: 2\r\n\r\nhi"


@table(
    "sent",
    [
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi!",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhi\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-2\r\nhi\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        HEAD + b"X-A: 1\r\n folded\r\n" + ENDED,
        HEAD + b"X-A: 1\0\r\n" + ENDED,
        HEAD + b"Host: evil.example\r\n" + ENDED,
        HEAD.replace(b"SELF", b"evil.example") + ENDED,
        HEAD.replace(b"URL", b"http://SELFURL").replace(b"Host: SELF", b"Host: evil.example") + ENDED,
        HEAD.replace(b"POST URL", b"CONNECT SELF") + b"\r\n",
        HEAD.replace(b"POST URL", b"CONNECT URL") + b"\r\n",
        HEAD.replace(b"HTTP/1.1", b"HTTP/9.9") + ENDED,
        HEAD.replace(b"URL", b"URL/\xff\0") + ENDED,
    ],
)
def test_malformed_requests_start_no_run(client: httpx.Client, publish: Publish, server: Server, sent: bytes) -> None:
    url = publish(COUNTER)
    received = server.exchange(sent.replace(b"URL", url.encode()))
    assert b"HTTP/1.1 4" in received[:10]
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", received)) == 1
    time.sleep(0.05)
    assert client.get(f"/api/sessions/{url.split('/')[2]}/runs").json()["count"] == 0


def test_bytes_after_an_upgrade_are_no_second_request(publish: Publish, server: Server) -> None:
    """The upgrade is answered as an ordinary call, and its connection is closed."""
    request = b"GET " + publish(COUNTER).encode() + b" HTTP/1.1\r\nHost: SELF\r\nConnection: Upgrade\r\n"
    request += b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    received = server.exchange(request + b"\x81\x05hello")
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", received)[:1] in ([b"201"], [b"400"])
    assert b"101 " not in received
