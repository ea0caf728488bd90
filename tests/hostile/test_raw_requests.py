"""Bad requests made of raw bytes: the service answers in the contract's shape or hangs up, and it serves on."""

from __future__ import annotations

import re
import socket
import time
from contextlib import suppress
from itertools import product

import pytest

from tests.conftest import MakeServer, Server, at_best
from tests.table import table

CREATE = b'{"language":"python"}'
SERVED, REFUSED = "served", "refused"
PATIENCE = 25.0
GET = b"GET /api/sessions HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n"
POST = b"POST /api/sessions HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SIZED = b"Content-Length: 21\r\n"


def target(text: bytes) -> bytes:
    """A GET request of this target."""
    return b"GET " + text + b" HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n\r\n"


# SELF becomes the server's own host and port.
REQUESTS: dict[str, tuple[bytes, str]] = {
    # valid ones, so that the others are refused for what is wrong with them
    "a right one": (GET + b"\r\n", SERVED),
    "a right one with a body": (POST + SIZED + b"\r\n" + CREATE, SERVED),
    "a right one in chunks": (CHUNKED + b"15\r\n" + CREATE + b"\r\n0\r\n\r\n", SERVED),
    # length of the body
    "length and chunks": (POST + SIZED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", REFUSED),
    "chunks and length": (POST + b"Transfer-Encoding: chunked\r\n" + SIZED + b"\r\n0\r\n\r\n", REFUSED),
    "two lengths": (POST + SIZED + b"Content-Length: 22\r\n\r\n" + CREATE, REFUSED),
    "a list of lengths": (POST + b"Content-Length: 21, 21\r\n\r\n" + CREATE, REFUSED),
    "negative length": (POST + b"Content-Length: -21\r\n\r\n" + CREATE, REFUSED),
    "length with a sign": (POST + b"Content-Length: +21\r\n\r\n" + CREATE, REFUSED),
    "length in hex": (POST + b"Content-Length: 0x15\r\n\r\n" + CREATE, REFUSED),
    "length in other digits": (POST + b"Content-Length: \xb2\r\n\r\n" + CREATE, REFUSED),
    "length beyond 64 bits": (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + CREATE, REFUSED),
    "a terabyte": (POST + b"Content-Length: 1000000000000\r\n\r\n" + CREATE, REFUSED),
    "blank before the colon": (POST + b"Content-Length : 21\r\n\r\n" + CREATE, REFUSED),
    "unknown encoding": (POST + b"Transfer-Encoding: xchunked\r\n\r\n15\r\n" + CREATE + b"\r\n0\r\n\r\n", REFUSED),
    "chunked and more": (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", REFUSED),
    "chunked, hidden": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", REFUSED),
    # chunks
    "chunk without a number": (CHUNKED + b"zz\r\n" + CREATE + b"\r\n0\r\n\r\n", REFUSED),
    "negative chunk": (CHUNKED + b"-15\r\n" + CREATE + b"\r\n0\r\n\r\n", REFUSED),
    "chunk beyond 64 bits": (CHUNKED + b"f" * 17 + b"\r\n" + CREATE + b"\r\n0\r\n\r\n", REFUSED),
    "chunk longer than its size": (CHUNKED + b"3\r\n" + CREATE + b"\r\n0\r\n\r\n", REFUSED),
    "chunks without CR": (CHUNKED + b"15\n" + CREATE + b"\n0\n\n", REFUSED),
    "chunk that is not JSON": (CHUNKED + b"5;" + b"x" * 100_000 + b"\r\nhello\r\n0\r\n\r\n", REFUSED),
    # headers
    "folded header": (GET + b"X-A: 1\r\n 2\r\n\r\n", REFUSED),
    "CR in a header": (GET + b"X-A: 1\rX-B: 2\r\n\r\n", REFUSED),
    "NUL in a header": (GET + b"X-A: 1\x002\r\n\r\n", REFUSED),
    "no colon": (GET + b"garbage\r\n\r\n", REFUSED),
    "no name": (GET + b": x\r\n\r\n", REFUSED),
    "name not ASCII": (GET + b"X-\xc3\x9c: x\r\n\r\n", REFUSED),
    "two hosts, ours first": (GET + b"Host: evil.example\r\n\r\n", REFUSED),
    "two hosts, ours last": (b"GET /api/sessions HTTP/1.1\r\nHost: evil.example\r\n" + GET[28:] + b"\r\n", REFUSED),
    "no host": (b"GET /api/sessions HTTP/1.1\r\nConnection: close\r\n\r\n", REFUSED),
    "host with a path": (b"GET /api/sessions HTTP/1.1\r\nHost: SELF/@x\r\nConnection: close\r\n\r\n", REFUSED),
    "host not ASCII": (b"GET /api/sessions HTTP/1.1\r\nHost: \xff\r\nConnection: close\r\n\r\n", REFUSED),
    "origin that is no URL": (GET + b"Origin: http://[::1\r\n\r\n", REFUSED),
    "origin not ASCII": (GET + b"Origin: http://\xe2\x84\x80\r\n\r\n", REFUSED),
    "only LF": (GET.replace(b"\r", b"") + b"\n", REFUSED),
    # targets
    "absolute": (target(b"http://SELF/api/sessions"), SERVED),
    "absolute, with another host": (
        b"GET http://SELF/api/sessions HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        REFUSED,
    ),
    "of a proxy": (b"CONNECT evil.example:80 HTTP/1.1\r\nHost: SELF\r\n\r\n", REFUSED),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n\r\n", REFUSED),
    "no slash": (target(b"health"), REFUSED),
    "NUL": (target(b"/api/sessions/a\0b"), REFUSED),
    "not ASCII": (target(b"/api/sessions/\xff"), REFUSED),
    "blank": (target(b"/health x"), REFUSED),
    "100 KB": (target(b"/" + b"a" * 100_000), REFUSED),
    "escaped NUL": (target(b"/api/sessions/a%00b"), REFUSED),
    "escaped slash": (target(b"/api/sessions/a%2Fb"), REFUSED),
    "escaped dots": (target(b"/assets/..%2Findex.html"), REFUSED),
    "escaped dots out of the pages": (target(b"/assets/%2e%2e%2f%2e%2e%2fwire.py"), REFUSED),
    "escaped line break": (target(b"/api/sessions/a%0d%0aX-A:%201"), REFUSED),
    "escapes that are none": (target(b"/api/sessions/%zz"), REFUSED),
    "escaped bytes that are not UTF-8": (target(b"/api/sessions/%ff%fe"), REFUSED),
    "query that is not UTF-8": (target(b"/api/sessions?cursor=%ff&metadata.%00=%ed%a0%80"), REFUSED),
    # other protocols and methods
    "method with a bracket": (b"G(T / HTTP/1.1\r\nHost: SELF\r\n\r\n", REFUSED),
    "method of 100 KB": (b"A" * 100_000 + b" / HTTP/1.1\r\nHost: SELF\r\n\r\n", REFUSED),
    "HTTP/9.9": (b"GET / HTTP/9.9\r\nHost: SELF\r\n\r\n", REFUSED),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", REFUSED),
    "TLS": (bytes.fromhex("16030100c8010000c40303") + b"\0" * 190, REFUSED),
    "a second one that is none": (GET.replace(b"close", b"keep-alive") + b"\r\ngarbage\r\n\r\n", REFUSED),
}


class Connection:
    """A connection that sends bytes as they are."""

    def __init__(self, url: str) -> None:
        self.host = url.removeprefix("http://").encode()
        name, _, port = self.host.decode().rpartition(":")
        self.socket = socket.create_connection((name, int(port)), timeout=PATIENCE)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send as much as the server accepts: it may hang up in the middle."""
        with suppress(ConnectionError):
            self.socket.sendall(data.replace(b"SELF", self.host))

    def end(self) -> None:
        """Shut down the sending side."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def receive(self, seconds: float = PATIENCE) -> bytes:
        """All that comes until the server hangs up. Raises TimeoutError if it does not."""
        self.socket.settimeout(seconds)
        received = b""
        with suppress(ConnectionError):
            while data := self.socket.recv(1 << 16):
                received += data
        return received


def statuses(received: bytes) -> list[int]:
    """The statuses of the answers received."""
    return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", received, re.MULTILINE)]


def assert_serves(server: Server) -> None:
    """Assert that the server answers others at once."""

    def ask() -> float:
        began = time.monotonic()
        assert client.get("/health").json()["status"] == "ok"
        return time.monotonic() - began

    with server.client() as client:
        assert at_best(2, ask) < 2


@table("name", REQUESTS)
def test_a_malformed_request_is_refused_and_its_connection_closed(server: Server, name: str) -> None:
    request, expected = REQUESTS[name]
    with server.client() as client:
        before = client.get("/api/sessions").json()["count"]
    with Connection(server.url) as connection:
        connection.send(request)
        received = connection.receive()
    if expected == SERVED:
        assert statuses(received) in ([200], [201]), received
    else:
        assert all(400 <= status < 500 for status in statuses(received)), received
        assert statuses(received), "it hung up without a word"
        with server.client() as client:
            assert client.get("/api/sessions").json()["count"] == before
    assert_serves(server)


def test_two_hosts_are_refused_with_a_key_too(own_server: MakeServer) -> None:
    server = own_server(api_key="the-key")
    both_orders = b"Host: SELF\r\nHost: evil.example\r\n", b"Host: evil.example\r\nHost: SELF\r\n"
    for path, hosts in product((b"/api/sessions", b"/health", b"/openapi.json"), both_orders):
        with Connection(server.url) as connection:
            head = b"GET " + path + b" HTTP/1.1\r\nAuthorization: Bearer the-key\r\nConnection: close\r\n"
            connection.send(head + hosts + b"\r\n")
            assert statuses(connection.receive()) == [400]


@pytest.mark.parametrize("path", [b"/api/sessions", b"/health", b"/proxy/s/3000/"])
def test_two_authorizations_or_no_host_are_refused_with_a_key(own_server: MakeServer, path: bytes) -> None:
    server = own_server(api_key="the-key")
    own, other = b"Authorization: Bearer the-key\r\n", b"Authorization: Bearer other\r\n"
    for lines in (b"Host: SELF\r\n" + own + other, b"Host: SELF\r\n" + other + own, own):
        with Connection(server.url) as connection:
            connection.send(b"GET " + path + b" HTTP/1.1\r\nConnection: close\r\n" + lines + b"\r\n")
            assert statuses(connection.receive()) == [400], lines
    assert server.exchange(b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200"), "HTTP/1.0 knows no Host"


TRAILERS_MERGED = """
import era.api.protocol.protocol as protocol
protocol.Protocol.on_header = protocol.HttpToolsProtocol.on_header
"""
AUTHORIZED = b"Authorization: Bearer the-key\r\n"


@pytest.mark.parametrize("weakness", ["", TRAILERS_MERGED], ids=["", "weakened"])
def test_trailers_are_no_headers(own_server: MakeServer, weakness: str) -> None:
    """The one weakened build merges them, and takes all three for headers."""
    server = own_server(api_key="the-key", weakness=weakness)
    with server.client(headers={"Authorization": "Bearer the-key"}) as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"}).raise_for_status()
        code = "import os; print(os.environ['ERA_HTTP_HEADERS'])"
        client.put("/api/sessions/s/code", json={"code": code}).raise_for_status()
    end = b"15\r\n" + CREATE + b"\r\n0\r\n"
    answer = server.exchange(CHUNKED + end + AUTHORIZED + b"\r\n")
    assert statuses(answer) == [201 if weakness else 401], answer
    call = CHUNKED.replace(b"/api/sessions", b"/proxy/s/3000/")
    seen = server.exchange(call + end + b"X-GitHub-Delivery: forged\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n")
    assert statuses(seen) == [200], seen
    assert (b"forged" in seen, b"192.0.2.1" in seen) == (bool(weakness), bool(weakness)), seen
    if not weakness:
        head = CHUNKED.removesuffix(b"\r\n") + AUTHORIZED + b"\r\n"
        assert statuses(server.exchange(head + end + b"\r\n")) == [201]


def test_bad_heads_and_trailers_of_programs_are_not_heeded(server: Server) -> None:
    code = """
import os, socket
host, port = os.environ['ERA_STORAGE_URL'].removeprefix('http://').split(':')
def call(*lines, body=b''):
    with socket.create_connection((host, int(port)), 5) as s:
        s.sendall('\\r\\n'.join([*lines, 'Connection: close', '', '']).encode() + body)
        return s.makefile('rb').readline().split()[1].decode()
get, own = 'GET /api/storage/kv/heads HTTP/1.1', f'Host: {host}:{port}'
print(call(get, own), call(get), call(get, own, 'Authorization: Bearer a', 'Authorization: Bearer b'))
put, chunked = 'PUT /api/storage/kv/heads/trailed HTTP/1.1', 'Transfer-Encoding: chunked'
body = b'd\\r\\n{"value":"1"}\\r\\n0\\r\\nHost: other\\r\\nOrigin: http://evil.example\\r\\n\\r\\n'
print(call(put, own, chunked, 'Content-Type: application/json', body=body))
"""
    with server.client() as client:
        session_id = client.post("/api/sessions", json={"language": "python"}).json()["id"]
        outcome = client.post(f"/api/sessions/{session_id}/run", json={"code": code}).json()
    assert outcome["stdout"].split() == ["200", "400", "400", "200"], outcome


@table(
    "request_",
    [
        b"",
        b"\r\n" * 1000,
        b"GET /health HT",
        GET,
        POST + SIZED + b"\r\n",
        POST + SIZED + b"\r\n" + CREATE[:9],
        POST + SIZED + b"Expect: 100-continue\r\n\r\n",
        CHUNKED,
        CHUNKED + b"15\r\n" + CREATE[:9],
        CHUNKED + b"15\r\n" + CREATE + b"\r\n",
    ],
)
@table("how", ["shut down", "abrupt"])
def test_half_a_request_changes_nothing(server: Server, request_: bytes, how: str) -> None:
    with Connection(server.url) as connection:
        connection.send(request_)
        if how == "shut down":
            connection.end()
            assert set(statuses(connection.receive())) <= {100, 400}
    assert_serves(server)
    with server.client() as client:
        assert client.get("/api/sessions").json()["count"] == 0


@table("header", [b"X-A: " + b"a" * (1 << 20) + b"\r\n", b"X-A: a\r\n" * 20_000])
def test_huge_headers_do_no_harm(server: Server, header: bytes) -> None:
    with Connection(server.url) as connection:
        connection.send(GET + header + b"\r\n")
        assert all(status < 500 for status in statuses(connection.receive()))
    assert_serves(server)
