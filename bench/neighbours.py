"""What others wait while one session keeps the service busy: its event loop with tiny pieces of bodies and output,
heads without an end and pipelined calls, threads with gigabytes of nothing, workers of the storage with endless SQL.
Each waits beside a quiet machine in the same round."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.arena import Arena
from bench.cases import Probe

GOAL_MS = 1000.0
"""However busy a neighbour keeps the service, it answers within a second."""

CONNECTIONS = 8
"""How many connections a neighbour has at a time, where it has any and says nothing else."""

_SETTLE_SECONDS = 0.3

_SERVER = """\
import socket, threading
def serve(connection):
    connection.recv(1 << 16)
    try:
        HEAD
        while True:
            BODY
    except OSError:
        connection.close()
server = socket.create_server(("127.0.0.1", 3000), backlog=128)
print("listening", flush=True)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
_CHUNKED = r'connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")'

TINY_CHUNKS = _SERVER.replace("HEAD", _CHUNKED).replace("BODY", r'connection.sendall(b"1\r\nx\r\n" * 10000)')
"""Answers without end, in chunks of one byte."""

INFORMATIONAL = _SERVER.replace("HEAD", "pass").replace(
    "BODY", r'connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\n" * 2000)'
)
"""Answers that never come to more than a 1xx."""

MANY_HEADERS = b"a:\r\n" * 10_000

LONG_HEADS = _SERVER.replace("HEAD", "pass").replace(
    "BODY", 'connection.sendall(b"HTTP/1.1 200 OK\\r\\n" + b"a:\\r\\n" * 15000 + b"\\r\\n"); connection.recv(1 << 16)'
)
"""Answers with thousands of headers."""

READER = _SERVER.replace("HEAD", "pass").replace("BODY", "assert connection.recv(1 << 20)")
"""Reads requests without end."""

TINY_WRITES = """\
import os
while True:
    os.write(1, b"x")
    os.write(2, b"x")
"""
"""Writes one byte at a time."""

PIPELINED = """\
import os, selectors, socket
from urllib.parse import urlsplit
url = urlsplit(os.environ["ERA_STORAGE_URL"])
call = f"GET /api/storage/kv/n/k HTTP/1.1\\r\\nHost: {url.netloc}\\r\\n\\r\\n".encode() * 2000
chosen = selectors.DefaultSelector()
for _ in range(64):
    connection = socket.create_connection((url.hostname, url.port))
    connection.setblocking(False)
    chosen.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE, [0])
print("listening", flush=True)
while True:
    for key, events in chosen.select():
        if events & selectors.EVENT_READ:
            key.fileobj.recv(1 << 20)
        if events & selectors.EVENT_WRITE:
            key.data[0] = (key.data[0] + key.fileobj.send(call[key.data[0]:])) % len(call)
"""
"""Calls the storage on many connections, without waiting for answers."""

ENDLESS_SQL = """\
import era_storage, threading
sql = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
def go(number):
    while True:
        try: era_storage.d1.query(f"busy{number}", sql)
        except era_storage.StorageError: pass
for number in range(20):
    threading.Thread(target=go, args=(number,)).start()
"""
"""Statements that don't end, 20 at a time."""

SPARSE = """\
import os
for number in range(4):
    with open(f"sparse{number}", "wb") as file:
        file.truncate(1000 << 20)
        file.seek(-8, 2)
        file.write(os.urandom(8))
"""
"""Four files of a gigabyte each that are holes, and others in each run."""

_CALLER = """\
import selectors, socket, sys
port, head, piece, connections = int(sys.argv[1]), *(bytes.fromhex(text) for text in sys.argv[2:4]), int(sys.argv[4])
chosen = selectors.DefaultSelector()
def call():
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head)
    connection.setblocking(False)
    chosen.register(connection, selectors.EVENT_READ | (selectors.EVENT_WRITE if piece else 0), [0])
for _ in range(connections):
    call()
print(flush=True)
while True:
    for key, events in chosen.select():
        try:
            if events & selectors.EVENT_WRITE:
                key.data[0] = (key.data[0] + key.fileobj.send(piece[key.data[0]:])) % len(piece)
            if events & selectors.EVENT_READ and not key.fileobj.recv(1 << 20):
                raise ConnectionError
        except ConnectionError:
            chosen.unregister(key.fileobj)
            key.fileobj.close()
            call()
"""
"""Arguments: the port, the head of a request and what is sent after it again and again, both in hexadecimal, and on how
many connections."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A session's program that keeps the event loop busy, and those who call its public URL."""

    what: str
    """A few words about it, for the report."""
    code: str
    called: bool = True
    upload: bytes = b""
    """What callers send without end."""
    headers: bytes = b""
    """What callers send besides, in one call after the other."""
    connections: int = CONNECTIONS
    again: bool = False
    """Whether the program ends, and is run again and again."""


NEIGHBOURS = {
    "chunks": Neighbour("answers in 1-byte chunks", TINY_CHUNKS),
    "1xx": Neighbour("answers that never come", INFORMATIONAL),
    "uploads": Neighbour("callers with 1-byte chunks", READER, upload=b"1\r\nx\r\n" * 10_000),
    "heads": Neighbour("heads of thousands of headers", LONG_HEADS, headers=MANY_HEADERS, connections=128),
    "writes": Neighbour("writes of 1 byte", TINY_WRITES, called=False),
    "storage": Neighbour("pipelined storage calls", PIPELINED, called=False),
    "sql": Neighbour("endless SQL", ENDLESS_SQL, called=False),
    "sparse": Neighbour("commits of sparse files", SPARSE, called=False, again=True),
}
"""By what it does."""


@contextlib.contextmanager
def beside(port: int, neighbour: Neighbour, session: str, isolation: str = "auto") -> Iterator[None]:
    """Have the neighbour, in a new session of this id, keep the service at this port busy during the block."""
    _call(port, "POST", "/api/sessions", {"language": "python", "session_id": session, "isolation": isolation})
    body = {"code": neighbour.code, "background": not neighbour.again, "timeout": 300}
    run = "" if neighbour.again else _call(port, "POST", f"/api/sessions/{session}/run", body)["run_id"]
    callers: subprocess.Popen[bytes] | None = None
    ended = threading.Event()
    runner = threading.Thread(target=_run_again, args=(port, session, body, ended))
    try:
        if neighbour.again:
            runner.start()
        if neighbour.called:
            while not _stdout(port, session, run):
                time.sleep(0.05)
            callers = _callers(port, f"/proxy/{session}/3000/", neighbour)
        time.sleep(_SETTLE_SECONDS)
        yield
    finally:
        if callers is not None:
            with callers:
                callers.kill()
        ended.set()
        _call(port, "DELETE", f"/api/sessions/{session}", None)
        if neighbour.again:
            runner.join()


def _run_again(port: int, session: str, body: object, ended: threading.Event) -> None:
    """Run a program again and again, until this has `ended`."""
    while not ended.is_set():
        _call(port, "POST", f"/api/sessions/{session}/run", body)


def _stdout(port: int, session: str, run: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", f"/api/sessions/{session}/runs/{run}/stdout")
        return connection.getresponse().read()


def _callers(port: int, path: str, neighbour: Neighbour) -> subprocess.Popen[bytes]:
    """A process that calls a public URL on CONNECTIONS connections, again and again."""
    method, more = ("PUT", b"Transfer-Encoding: chunked\r\n") if neighbour.upload else ("GET", neighbour.headers)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + more + b"\r\n"
    piece = neighbour.upload or (head if neighbour.headers else b"")
    arguments = [str(port), head.hex(), piece.hex(), str(neighbour.connections)]
    callers = subprocess.Popen([sys.executable, "-c", _CALLER, *arguments], stdout=subprocess.PIPE)
    if callers.stdout is not None:
        callers.stdout.readline()
    return callers


def _call(port: int, method: str, path: str, body: object) -> dict[str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer: dict[str, str] = json.loads(connection.getresponse().read())
        return answer


def run_beside(name: str) -> Callable[[Arena], Probe]:
    """A warm run beside a neighbour of this name."""

    def start(arena: Arena) -> Probe:
        session = arena.new_session("python")
        arena.check_run(arena.run(session, "print(1)"))
        return Probe(lambda _: arena.run(session, "print(1)"), after=arena.check_run, around=_around(arena, name))

    return start


def health_beside(name: str) -> Callable[[Arena], Probe]:
    """GET /health beside a neighbour of this name."""
    return lambda arena: Probe(
        lambda _: arena.get("/health"), after=arena.check_status(200), around=_around(arena, name)
    )


def _around(arena: Arena, name: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    return lambda: beside(arena.port, NEIGHBOURS[name], f"neighbour-{time.monotonic_ns()}")
