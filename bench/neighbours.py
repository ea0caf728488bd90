"""What others wait while one session keeps the service busy: its event loop with tiny pieces of bodies and output,
heads without an end and pipelined calls, output without an end, datagrams, names and changes of files that many follow,
threads with gigabytes of nothing, workers of the storage with endless SQL. Some need no session: they open connections,
or make calls that cost much. Each waits beside a quiet machine in the same round."""

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
from typing import Any

from bench.arena import Arena
from bench.cases import Probe
from bench.world import ADDRESS, ECHO_PORTS, world

GOAL_MS = 500.0
"""However busy a neighbour keeps the service, it answers within half a second."""

CONNECTIONS = 8
"""How many connections a neighbour has at a time, where it has any and says nothing else."""

_SETTLE_SECONDS = 0.3
_PROGRAM_SECONDS = 600
_PATIENCE_SECONDS = 300.0

_CALLERS = "127.0.0.2"
"""The address that callers come from, which isn't that of whoever is measured."""

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

ALL_OUTPUT = "import os\nfor _ in range(176): os.write(1, b'\\x01' * 65536)"
"""Prints a tenth more than a run's answer may have. Each of these bytes is six of JSON."""

ENDLESS_OUTPUT = "import os\nwhile True: os.write(1, b'\\x01' * 65536)"
"""Prints without end. Of a run the service takes as much as an answer may have, of a process everything."""

DATAGRAMS = f"""\
import errno, itertools, socket
first = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
first.settimeout(20)
first.sendto(b"there", ("{ADDRESS}", {ECHO_PORTS.start}))
assert first.recv(100) == b"there"
senders = [first]
try:
    while True:
        senders.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
except OSError as error:
    assert error.errno == errno.EMFILE and len(senders) > 500, (error, len(senders))
print("sending", flush=True)
for port in itertools.cycle(range({ECHO_PORTS.start}, {ECHO_PORTS.stop})):
    for sender in senders:
        try:
            sender.sendto(b"x" * 100, ("{ADDRESS}", port))
        except OSError as error:
            assert error.errno in (errno.EAGAIN, errno.ENOBUFS), error
"""
"""Sends from as many sockets as it gets to 64 ports each, which is far more than a run may have at a time."""

NAMES = """\
import itertools, socket
server = open("/etc/resolv.conf").read().split()[1]
def question():
    number = next(numbers)
    head = (number & 0xFFFF).to_bytes(2) + b"\\1\\0\\0\\1" + bytes(6)
    return head + b"\\x08%08x\\4test\\0\\0\\1\\0\\1" % number
numbers, asking = itertools.count(), []
for _ in range(64):
    asking.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    asking[-1].settimeout(20)
    asking[-1].connect((server, 53))
asking[0].send(question())
answer = asking[0].recv(1000)
assert answer[3] & 15 == 0 and answer[7] == 1, answer
print("asking", flush=True)
for sock in itertools.cycle(asking):
    try:
        sock.send(question(), socket.MSG_DONTWAIT)
        sock.recv(1000, socket.MSG_DONTWAIT)
    except BlockingIOError:
        pass
"""
"""Asks for one new name after the other, without waiting for answers."""

WATCHED = 8
"""How many paths of a session may be watched at a time."""

CHANGES = f"""\
import os
for number in range({WATCHED}):
    for below in range(20):
        os.makedirs(f"d{{number}}/{{below}}", exist_ok=True)
print("changing", flush=True)
while True:
    for below in range(20):
        for number in range({WATCHED}):
            path = f"d{{number}}/{{below}}/file"
            with open(path, "w") as file:
                file.write("x")
            os.rename(path, f"{{path}}s")
            os.remove(f"{{path}}s")
"""
"""Changes files all the time, in each of the directories that are watched."""

_CALLER = """\
import selectors, socket, sys, time
address, port, connections, slow = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "slow"
begin, piece, *heads = (bytes.fromhex(text) for text in sys.argv[5:])
chosen = selectors.DefaultSelector()
def call(number):
    connection = socket.create_connection(("127.0.0.1", port), source_address=(address, 0))
    if slow:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(heads[number % len(heads)])
    connection.setblocking(False)
    chosen.register(connection, selectors.EVENT_READ | (selectors.EVENT_WRITE if piece else 0), [0, number, b""])
for number in range(connections):
    call(number)
answered = 0
if not begin:
    print(flush=True)
while True:
    for key, events in chosen.select():
        try:
            if events & selectors.EVENT_WRITE:
                key.data[0] = (key.data[0] + key.fileobj.send(piece[key.data[0]:])) % len(piece)
            if events & selectors.EVENT_READ:
                got = key.fileobj.recv(1000 if slow else 1 << 20)
                if not got:
                    raise ConnectionError
                if len(key.data[2]) < len(begin):
                    key.data[2] = (key.data[2] + got)[:len(begin)]
                    assert begin.startswith(key.data[2]), got[:1000]
                    answered += key.data[2] == begin
                    if answered == connections:
                        print(flush=True)
        except ConnectionError:
            chosen.unregister(key.fileobj)
            key.fileobj.close()
            call(key.data[1])
    if slow:
        time.sleep(0.1)
"""
"""Arguments: the address to come from, the port, on how many connections, and `slow` where they read little at a time;
then in hexadecimal what answers must begin with, what is sent after a head again and again, and the heads of requests,
of which each connection sends one. A line says that all have been sent, or that all answers that must begin have done
so."""

_HALVES = """\
import collections, itertools, resource, socket, sys
address, port, connections, ahead = sys.argv[1], *map(int, sys.argv[2:5])
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
def connect():
    return socket.create_connection(("127.0.0.1", port), source_address=(address, 0))
def wait():
    with connect() as last:
        last.sendall(b"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
        assert last.recv(1000).startswith(b"HTTP/1.1 200 ")
kept = collections.deque()
for number, half in enumerate(itertools.cycle(bytes.fromhex(text) for text in sys.argv[5:]), 1):
    kept.append(connect())
    kept[-1].sendall(half)
    if number > connections:
        kept.popleft().close()
    if number == connections or ahead and number % ahead == 0:
        wait()
        try:
            raise AssertionError(kept[-1].recv(1000, socket.MSG_DONTWAIT))
        except BlockingIOError:
            pass
    if number == connections:
        print(flush=True)
"""
"""Opens connections without end, each with a half of a request, and keeps as many of them as it is told, which a line
says. Arguments: the address to come from, the port, how many, after how many it waits until the service has accepted
them (it has answered one that came after them; 0: only once), and the halves in hexadecimal."""

HALVES = (
    b"GET /health HTTP/1.1\r\nHost: lo",
    b"POST /api/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
)
"""A half of a head, and a half of a body."""


_JSON_ONCE = b"Connection: close\r\nAccept: application/json, text/event-stream\r\nContent-Type: application/json\r\n"

MCP_LIST = b'{"jsonrpc": "2.0", "id": 1, "method": "tools/list"}'
UNKNOWN_FIELDS = json.dumps({f"f{number}": 0 for number in range(5000)}, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A session's program that keeps the service busy, and those who call its public URL or what else of it."""

    what: str
    """A few words about it, for the report."""
    code: str
    """Nothing where callers do all of it."""
    called: bool = True
    paths: tuple[str, ...] = ("/proxy/{session}/3000/",)
    """What callers call, each connection one of them. May name the session, and in `{run}` its run or process."""
    body: bytes = b""
    """What callers POST, as JSON, in place of a GET. Each call has a connection of its own."""
    begin: bytes = b""
    """What answers to callers must begin with."""
    slow: bool = False
    """Whether callers read a kilobyte in a tenth of a second."""
    halves: tuple[bytes, ...] = ()
    """What callers send in place of requests, on ever more connections. Others call on new ones then, too."""
    ahead: int = 0
    """How many such connections there are at most that the service hasn't accepted; 0 for as many as there may be."""
    upload: bytes = b""
    """What callers send without end."""
    headers: bytes = b""
    """What callers send besides, in one call after the other."""
    connections: int = CONNECTIONS
    pause: float = 0.0
    """Seconds of rest before each measured call, where what it does comes and goes."""
    again: bool = False
    """Whether the program ends, and is run again and again."""
    process: bool = False
    """Whether the program is a process beside runs."""
    outside: bool = False
    """Whether the program reaches a world (world.py)."""


NEIGHBOURS = {
    "chunks": Neighbour("answers in 1-byte chunks", TINY_CHUNKS),
    "1xx": Neighbour("answers that never come", INFORMATIONAL),
    "uploads": Neighbour("callers with 1-byte chunks", READER, upload=b"1\r\nx\r\n" * 10_000),
    "heads": Neighbour("heads of thousands of headers", LONG_HEADS, headers=MANY_HEADERS, connections=128),
    "writes": Neighbour("writes of 1 byte", TINY_WRITES, called=False),
    "storage": Neighbour("pipelined storage calls", PIPELINED, called=False),
    "sql": Neighbour("endless SQL", ENDLESS_SQL, called=False),
    "sparse": Neighbour("commits of sparse files", SPARSE, called=False, again=True),
    "output": Neighbour(
        "answers of 60 MB",
        "",
        paths=("/api/sessions/{session}/run",),
        body=json.dumps({"code": ALL_OUTPUT}).encode(),
        begin=b"HTTP/1.1 200 ",
        connections=2,
        pause=0.1,
    ),
    "readers": Neighbour(
        "endless output of a process",
        ENDLESS_OUTPUT,
        paths=("/api/sessions/{session}/processes/{run}/events",),
        begin=b"HTTP/1.1 200 ",
        process=True,
    ),
    "slow": Neighbour(
        "endless output, slow readers",
        ENDLESS_OUTPUT,
        paths=("/api/sessions/{session}/runs/{run}/events",),
        begin=b"HTTP/1.1 200 ",
        slow=True,
        connections=64,
    ),
    "watches": Neighbour(
        "changes that 32 follow",
        CHANGES,
        paths=tuple(f"/api/sessions/{{session}}/watch?recursive=true&path=d{number}" for number in range(WATCHED)),
        begin=b"HTTP/1.1 200 ",
        process=True,
        connections=32,
    ),
    "mcp lists": Neighbour("lists of MCP's tools", "", paths=("/mcp",), body=MCP_LIST, begin=b"HTTP/1.1 200 "),
    "fields": Neighbour(
        "bodies of 5,000 unknown fields",
        "",
        paths=("/api/sessions",),
        body=UNKNOWN_FIELDS,
        begin=b"HTTP/1.1 400 ",
    ),
    "metrics": Neighbour(
        "calls of /metrics", "", paths=("/metrics",), headers=b"Accept: */*\r\n", begin=b"HTTP/1.1 200 "
    ),
    "halves": Neighbour("2,000 half requests", "", halves=HALVES, ahead=100, connections=2000),
    "connects": Neighbour("connections without end", "", halves=HALVES, connections=2000),
    "datagrams": Neighbour("datagrams of 1,000 sockets", DATAGRAMS, called=False, outside=True),
    "names": Neighbour("endless questions for names", NAMES, called=False, outside=True),
}
"""By what it does."""


@contextlib.contextmanager
def beside(port: int, neighbour: Neighbour, session: str, isolation: str = "auto") -> Iterator[None]:
    """Have the neighbour, in a new session of this id, keep the service at this port busy during the block. Raises
    RuntimeError where it has stopped before the end."""
    _call(port, "POST", "/api/sessions", {"language": "python", "session_id": session, "isolation": isolation})
    running = ""
    callers: subprocess.Popen[bytes] | None = None
    ended = threading.Event()
    answers: list[dict[str, Any]] = []
    runner = threading.Thread(target=_run_again, args=(port, session, neighbour.code, ended, answers))
    try:
        if neighbour.again:
            runner.start()
        elif neighbour.code:
            running = _start(port, session, neighbour)
        if neighbour.called:
            callers = _callers(port, session, running.rpartition("/")[2], neighbour)
        time.sleep(_SETTLE_SECONDS)
        yield
        if callers is not None:
            if callers.poll() is not None:
                raise RuntimeError("A neighbour's callers have stopped.")
            callers.kill()
        if running and (record := _call(port, "GET", running, None))["status"] != "running":
            raise RuntimeError(f"A neighbour has stopped: {record}")
        if failed := [answer for answer in answers if answer.get("status") != "ok"]:
            raise RuntimeError(f"A neighbour's runs have failed: {failed}")
    finally:
        if callers is not None:
            with callers:
                callers.kill()
        ended.set()
        _call(port, "DELETE", f"/api/sessions/{session}", None)
        if neighbour.again:
            runner.join()


def _start(port: int, session: str, neighbour: Neighbour) -> str:
    """Start its program, and wait until that has said something, if it says anything. The path of its record."""
    at, body = f"/api/sessions/{session}", {"timeout": _PROGRAM_SECONDS}
    if neighbour.process:
        made = _call(port, "POST", f"{at}/processes", {"command": ["python3", "-c", neighbour.code], **body})
        running = f"{at}/processes/{made['process_id']}"
    else:
        made = _call(port, "POST", f"{at}/run", {"code": neighbour.code, "background": True, **body})
        running = f"{at}/runs/{made['run_id']}"
    if neighbour.called or neighbour.outside:
        while not _has_said(port, running, neighbour):
            time.sleep(0.05)
    return running


def _has_said(port: int, running: str, neighbour: Neighbour) -> bool:
    """Whether a program has written anything. Raises RuntimeError where it has ended before."""
    record = _call(port, "GET", running, None)
    if record["status"] != "running":
        raise RuntimeError(f"A neighbour hasn't begun: {record}")
    if neighbour.process:
        return int(record["output_bytes"]) > 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", f"{running}/stdout")
        return bool(connection.getresponse().read(1))


def _run_again(port: int, session: str, code: str, ended: threading.Event, answers: list[dict[str, Any]]) -> None:
    """Run a program again and again, until this has `ended`. Adds the answers."""
    body = {"code": code, "timeout": _PROGRAM_SECONDS}
    while not ended.is_set():
        answers.append(_call(port, "POST", f"/api/sessions/{session}/run", body))


def _callers(port: int, session: str, running: str, neighbour: Neighbour) -> subprocess.Popen[bytes]:
    """A process that calls what the neighbour's callers call, on its number of connections, again and again. `running`
    is the id of the program's run or process."""
    if neighbour.halves:
        sent = [half.hex() for half in neighbour.halves]
        argv = [_HALVES, _CALLERS, str(port), str(neighbour.connections), str(neighbour.ahead), *sent]
    else:
        heads = [_request(path.format(session=session, run=running), neighbour) for path in neighbour.paths]
        piece = neighbour.upload or (heads[0] if neighbour.headers else b"")
        pace = "slow" if neighbour.slow else "at once"
        sent = [part.hex() for part in (neighbour.begin, piece, *heads)]
        argv = [_CALLER, _CALLERS, str(port), str(neighbour.connections), pace, *sent]
    callers = subprocess.Popen([sys.executable, "-c", *argv], stdout=subprocess.PIPE)
    assert callers.stdout is not None
    if not callers.stdout.readline():
        with callers:
            callers.kill()
        raise RuntimeError("A neighbour's callers could not call.")
    return callers


def _request(path: str, neighbour: Neighbour) -> bytes:
    """What a caller sends on a new connection."""
    method, more = "GET", neighbour.headers
    if neighbour.upload:
        method, more = "PUT", b"Transfer-Encoding: chunked\r\n"
    elif neighbour.body:
        method, more = "POST", _JSON_ONCE + b"Content-Length: %d\r\n" % len(neighbour.body)
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + more + b"\r\n" + neighbour.body


def _call(port: int, method: str, path: str, body: object) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer


def run_beside(name: str) -> Callable[[Arena], Probe]:
    """A warm run beside a neighbour of this name."""

    def start(arena: Arena) -> Probe:
        there = _there(arena, name)
        session = there.new_session("python")
        there.check_run(there.run(session, "print(1)"))
        return Probe(
            lambda _: there.run(session, "print(1)"), _before(there, name), there.check_run, around=_around(arena, name)
        )

    return start


def health_beside(name: str) -> Callable[[Arena], Probe]:
    """GET /health beside a neighbour of this name."""

    def start(arena: Arena) -> Probe:
        there = _there(arena, name)
        return Probe(
            lambda _: there.get("/health"), _before(there, name), there.check_status(200), around=_around(arena, name)
        )

    return start


def _before(there: Arena, name: str) -> Callable[[], None]:
    """What comes before a measured call."""
    return there.hang_up if NEIGHBOURS[name].halves else there.keep_open


def _there(arena: Arena, name: str) -> Arena:
    """The arena of the service that the neighbour is at, with a connection that is open."""
    there = world(arena).arena if NEIGHBOURS[name].outside else arena
    there.keep_open()
    return there


def _around(arena: Arena, name: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    neighbour = NEIGHBOURS[name]

    @contextlib.contextmanager
    def outside() -> Iterator[None]:
        there = world(arena)
        with contextlib.ExitStack() as stack:
            with there.entered():
                stack.enter_context(beside(there.arena.port, neighbour, _session()))
            try:
                yield
            finally:
                with there.entered():
                    stack.close()

    return outside if neighbour.outside else lambda: beside(arena.port, neighbour, _session())


def _session() -> str:
    return f"neighbour-{time.monotonic_ns()}"
