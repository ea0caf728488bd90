"""What a program may ask of its proxy: how much, how long, and that nothing of it outlives the run."""

from __future__ import annotations

import json
import os
import time

import pytest

from tests.conftest import eventually
from tests.network.conftest import NetServer, NewSession, new_session

OPEN = "http://www.example.test/open"


@pytest.fixture
def served(proxied: NetServer) -> NetServer:
    """All of these are about the proxy."""
    return proxied


def open_requests(session: object) -> int:
    code = f"import urllib.request; print(urllib.request.urlopen({OPEN!r}).read().decode())"
    return int(session.says(code))  # type: ignore[attr-defined]


def descriptors(server: NetServer) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def test_connections_end_with_their_run(session: NewSession) -> None:
    code = """
import os, socket, time
for _ in range(5):
    proxy = socket.create_connection(("127.0.0.1", 18128))
    proxy.sendall(b"GET http://www.example.test/hang HTTP/1.1\\r\\nContent-Length: 9\\r\\n\\r\\n")
    os.dup(proxy.detach())
time.sleep(0.5)
"""
    one = session()
    began = time.monotonic()
    one.says(code)
    assert time.monotonic() - began < 5
    assert open_requests(session()) == 0
    assert one.destinations()[0]["connections"] == 5


def test_a_run_that_is_out_of_time_loses_its_connections_too(session: NewSession) -> None:
    code = """
import urllib.request
urllib.request.urlopen("http://www.example.test/hang").read()
"""
    assert session().run(code, timeout=0.5)["status"] == "timeout"
    assert open_requests(session()) == 0


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
        assert eventually(lambda: open_requests(session()) == 0, 3)


def test_nothing_is_left_of_many_runs(session: NewSession, served: NetServer) -> None:
    code = """
import http.client, socket
for n in range(20):
    proxy = http.client.HTTPConnection("127.0.0.1", 18128)
    proxy.request("GET", "http://www.example.test/hello" if n % 2 else "http://10.0.0.1/")
    if n % 3: proxy.getresponse().read()
    socket.create_connection(("127.0.0.1", 18128)).send(b"GET ")
"""
    one = session()
    one.says(code)
    time.sleep(0.3)
    before = descriptors(served)
    for _ in range(10):
        one.says(code)
    assert eventually(lambda: descriptors(served) <= before + 2, 5), (before, descriptors(served))


def test_more_connections_than_allowed_wait_and_are_served(session: NewSession) -> None:
    code = """
import socket, threading, time
def connect():
    sock = socket.create_connection(("127.0.0.1", 18128))
    return sock
held = [connect() for _ in range(64)]
time.sleep(0.3)
more = connect()
more.sendall(b"GET http://www.example.test/hello HTTP/1.1\\r\\n\\r\\n")
more.settimeout(0.5)
try: print(more.recv(100))
except TimeoutError: print("waits")
for one in held: one.close()
more.settimeout(5)
print(more.recv(15).decode())
"""
    assert session().says(code) == "waits\nHTTP/1.1 200 OK\n"


def test_heads_that_do_not_end_are_cut_off(odd: NetServer) -> None:
    code = """
import socket, time
def said(sock):
    sock.settimeout(8)
    answer = b""
    try:
        while piece := sock.recv(4096): answer += piece
    except ConnectionError: pass
    return answer.split(b"\\r\\n")[0].decode()[:13]
slow = socket.create_connection(("127.0.0.1", 18128))
began = time.monotonic()
try:
    for byte in b"GET http://www.example.test/hello HTTP/1.1\\r\\nA: " + b"x" * 100:
        slow.send(bytes([byte])); time.sleep(0.05)
except OSError: pass
print(said(slow), time.monotonic() - began < 5)
long = socket.create_connection(("127.0.0.1", 18128))
try: long.sendall(b"GET http://www.example.test/ HTTP/1.1\\r\\nA: " + b"x" * (1 << 20))
except OSError: pass
print(said(long))
idle = socket.create_connection(("127.0.0.1", 18128))
idle.sendall(b"CONNECT www.example.test:9000 HTTP/1.1\\r\\n\\r\\n")
began = time.monotonic()
print(said(idle), 0.5 < time.monotonic() - began < 5)
"""
    with odd.client() as client:
        told = new_session(client).says(code)
    first, second, third = told.splitlines()
    assert first == "HTTP/1.1 408  True" or first.endswith("True")
    assert second in ("HTTP/1.1 431 ", "")  # an answer may be lost to the reset
    assert third == "HTTP/1.1 200  True"


def test_what_is_no_request_gets_a_400(session: NewSession) -> None:
    requests = [
        "GET / HTTP/1.1\r\n\r\n",
        "GET ftp://www.example.test/ HTTP/1.1\r\n\r\n",
        "GET http:///x HTTP/1.1\r\n\r\n",
        "GET http://www.example.test:0/ HTTP/1.1\r\n\r\n",
        "GET http://www.example.test:99999/ HTTP/1.1\r\n\r\n",
        "GET http://www.example.test/ HTTP/2\r\n\r\n",
        "GET http://www.example.test/ a HTTP/1.1\r\n\r\n",
        "GET http://[::1/ HTTP/1.1\r\n\r\n",
        "CONNECT www.example.test HTTP/1.1\r\n\r\n",
        "CONNECT http://www.example.test:80 HTTP/1.1\r\n\r\n",
        "GET http://www.example.test/ HTTP/1.1\r\nA b: c\r\n\r\n",
        "GET http://www.example.test/ HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        "GET http://www.example.test/ HTTP/1.1\r\nA: b\nHost: evil\r\n\r\n",
        "\x16\x03\x01 http://x/ HTTP/1.1\r\n\r\n",
    ]
    code = f"""
import json, socket
found = []
for request in {requests!r}:
    sock = socket.create_connection(("127.0.0.1", 18128))
    sock.sendall(request.encode("latin-1"))
    found.append(sock.recv(4096).split()[1].decode())
print(json.dumps(found))
"""
    one = session()
    assert json.loads(one.says(code)) == ["400"] * len(requests)
    assert one.destinations() == []
