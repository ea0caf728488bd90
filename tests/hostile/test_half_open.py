"""Thousands of requests that never come to their end, sent without a key. They cost those who send them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.api.owners import OPERATOR_KEY, client_with_key
from tests.conftest import Server, eventually
from tests.gvisor import BOTH_KINDS
from tests.soaking import soak_the_rest

LIMIT = 600
SMALL = f"""
import resource
from era.server import server
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
server.raise_descriptor_limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, hard))
"""
"""As many descriptors as can be had by as many connections."""

UNCOUNTED = """
from era.api.protocol.protocol import Callers
Callers.opened = lambda self, connection, address: True
"""
"""Lets everybody connect."""


BODILESS = """
from era.api.protocol.protocol import Protocol
Protocol.is_half_open = property(lambda self: self._is_idle)
"""
"""Takes a request whose head is there for one that is."""

BODY = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
HALF = {
    "nothing": b"",
    "a part of a head": b"GET /health HTTP/1.1\r\nHost: lo",
    "a part of a body": BODY % b"/api/sessions",
    "a part of a body for a public URL": BODY % b"/proxy/public/1/",
}
CODE = "import sys; print('hello')"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server with few descriptors."""
    made: list[Server] = []

    def start(weakness: str = "", kind: str = "bubblewrap") -> Server:
        settings = {"ERA_API_KEY": OPERATOR_KEY, "ERA_DRAIN_SECONDS": "0"}
        made.append(Server(tmp_path / "data", settings, weakness=SMALL + weakness))
        made[-1].start()
        with client_with_key(made[-1], OPERATOR_KEY) as client:
            public = {"language": "python", "session_id": "public", "isolation": kind}
            answer = client.post("/api/sessions", json=public)
            assert answer.status_code == 201
            client.put("/api/sessions/public/code", json={"code": CODE})
            assert run(client) == "hello\n"
        return made[-1]

    yield start
    for server in made:
        server.stop()


def run(client: httpx.Client) -> str:
    answer = client.post("/api/sessions/public/run", json={"code": CODE})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


@contextmanager
def flood(server: Server, sent: bytes, count: int = 1500) -> Iterator[None]:
    """So many connections, each with the begin of a request."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    connections = []
    for _ in range(count):
        sock = socket.create_connection((host, int(port)))
        connections.append(sock)
        with suppress(OSError):
            sock.sendall(sent)
    try:
        yield
    finally:
        for sock in connections:
            sock.close()


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("half", soak_the_rest(HALF, ("a part of a head", "a part of a body")))
def test_half_open_requests_harm_nobody_else(serve: Callable[..., Server], half: str, kind: str) -> None:
    server = serve(kind=kind)
    with flood(server, HALF[half]):
        assert eventually(lambda: descriptors(server) < LIMIT / 2), descriptors(server)
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        with client_with_key(server, OPERATOR_KEY) as client:
            assert run(client) == "hello\n"
            assert httpx.get(f"{server.url}/proxy/public/1/", timeout=60).text == "hello\n"


@pytest.mark.parametrize("half", soak_the_rest(HALF, ["a part of a head"]))
def test_without_a_bound_they_take_all_descriptors(serve: Callable[..., Server], half: str) -> None:
    server = serve(UNCOUNTED)
    with flood(server, HALF[half]):
        # On a busy machine the last ones are accepted late.
        assert eventually(lambda: descriptors(server) > LIMIT * 0.9 and not answers(server))


def test_where_half_a_body_counts_as_all_of_it_nobody_else_connects(serve: Callable[..., Server]) -> None:
    """Elsewhere than at a public URL who has no key has his answer before the rest of the body comes."""
    server = serve(BODILESS)
    with flood(server, HALF["a part of a body for a public URL"]):
        assert eventually(lambda: descriptors(server) < LIMIT * 0.9 and not answers(server))


def answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False
