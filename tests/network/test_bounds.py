"""Connections end with their run, however that ends, and when nothing moves on them."""

from __future__ import annotations

import os
import time

from tests.conftest import eventually
from tests.network.conftest import NetServer, NewSession, new_session

OPEN = "http://www.example.test/open"


def open_requests(session: object) -> int:
    code = f"import urllib.request; print(urllib.request.urlopen({OPEN!r}).read().decode())"
    return int(session.says(code))  # type: ignore[attr-defined]


def descriptors(server: NetServer) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def test_connections_end_with_their_run(session: NewSession) -> None:
    code = """
import os, socket, time
for _ in range(5):
    sock = socket.create_connection(("www.example.test", 80))
    sock.sendall(b"GET /hang HTTP/1.1\\r\\nContent-Length: 9\\r\\n\\r\\n")
    os.dup(sock.detach())
time.sleep(0.5)
"""
    one = session()
    began = time.monotonic()
    one.says(code)
    assert time.monotonic() - began < 15
    assert eventually(lambda: open_requests(session()) == 0)
    assert one.destinations()[0]["connections"] == 5


def test_a_run_that_is_out_of_time_loses_its_connections_too(session: NewSession) -> None:
    code = """
import urllib.request
urllib.request.urlopen("http://www.example.test/hang").read()
"""
    assert session().run(code, timeout=0.5)["status"] == "timeout"
    assert eventually(lambda: open_requests(session()) == 0)


def test_a_deleted_session_loses_its_connections_at_once(session: NewSession, served: NetServer) -> None:
    one = session()
    stream = (
        "import urllib.request; print('go', flush=True); urllib.request.urlopen('http://www.example.test/hang').read()"
    )
    with (
        served.client() as client,
        client.stream("POST", f"/api/sessions/{one.id}/stream", json={"code": stream, "timeout": 60}) as answer,
    ):
        for line in answer.iter_lines():
            if "go" in line:
                break
        assert eventually(lambda: open_requests(session()) == 1)
        with served.client() as other:
            other.delete(f"/api/sessions/{one.id}")
        assert eventually(lambda: open_requests(session()) == 0)


def test_nothing_is_left_of_many_runs(session: NewSession, served: NetServer) -> None:
    code = """
import http.client, socket
for n in range(20):
    connection = http.client.HTTPConnection("www.example.test" if n % 2 else "10.0.0.1")
    try:
        connection.request("GET", "/hello")
        if n % 3: connection.getresponse().read()
    except PermissionError: pass
    socket.create_connection(("www.example.test", 9000)).send(b"GET ")
"""
    one = session()
    one.says(code)
    time.sleep(0.3)
    before = descriptors(served)
    for _ in range(5):
        one.says(code)
    assert eventually(lambda: descriptors(served) <= before + 2), (before, descriptors(served))


def test_a_connection_on_which_nothing_moves_is_closed(odd: NetServer) -> None:
    code = """
import socket, time
idle = socket.create_connection(("www.example.test", 6379), 25)
began = time.monotonic()
print(idle.recv(10), 0.5 < time.monotonic() - began < 20)
"""
    with odd.client() as client:
        assert new_session(client).says(code) == "b'' True\n"
