"""What goes on in a session beside runs: processes, terminals, contexts, and files of a live session."""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count

from bench import rivals
from bench.arena import Answer, Arena
from bench.cases import Case, Probe, Ratio

_STAY = "exec sleep 100000"
"""A process that keeps its session live."""


def process(arena: Arena) -> Probe:
    """A process of a live session, from the request that starts it until its first byte is there."""
    session = _live_session(arena)
    path = f"/api/sessions/{session}/processes"

    def before() -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", arena.port, timeout=60)
        connection.connect()
        return connection

    def call(connection: http.client.HTTPConnection) -> tuple[http.client.HTTPConnection, dict[str, object]]:
        connection.request("POST", path, json.dumps({"command": "echo 1"}), {"Content-Type": "application/json"})
        started = json.loads(connection.getresponse().read())
        connection.request("GET", f"{path}/{started['process_id']}/events")
        events = connection.getresponse()
        while not (line := events.readline()).startswith(b"data:"):
            if not line:
                raise RuntimeError("A process said nothing.")
        return connection, json.loads(line.removeprefix(b"data:"))

    def after(answer: tuple[http.client.HTTPConnection, dict[str, object]]) -> None:
        answer[0].close()
        if answer[1].get("content") != "1\n":
            raise RuntimeError(f"A process said {answer[1]}.")

    return Probe(call, before, after)


def bwrap_shell(arena: Arena) -> Probe:
    """The same line for `sh -c` in a new bubblewrap sandbox."""
    argv = rivals.bwrap("echo 1", interpreter="/bin/sh")(arena.scratch)

    def call(_: object) -> tuple[subprocess.Popen[bytes], bytes]:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert process.stdout is not None
        return process, process.stdout.read(2)

    def after(answer: tuple[subprocess.Popen[bytes], bytes]) -> None:
        process, said = answer
        with process:
            pass
        if process.returncode or said != b"1\n":
            raise RuntimeError(f"bwrap said {said!r}, and ended with {process.returncode}.")

    return Probe(call, after=after)


class _Terminal:
    """A client's end of a WebSocket to a process's terminal (RFC 6455)."""

    def __init__(self, port: int, path: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}", "", ""]
        self._socket.sendall("\r\n".join(lines).encode())
        status = self._file.readline()
        if b" 101 " not in status:
            raise RuntimeError(f"There is no terminal: {status!r}")
        while self._file.readline().strip():
            pass

    def type(self, keys: bytes) -> None:
        """Send keys in one frame, of 125 bytes at most."""
        mask = secrets.token_bytes(4)
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(keys))
        self._socket.sendall(bytes([0x82, 0x80 | len(keys)]) + mask + masked)

    def until(self, end: bytes) -> bytes:
        """What it shows next, until that ends so."""
        shown = b""
        while not shown.endswith(end):
            opcode, size = self._file.read(2)
            if size == 126:
                (size,) = struct.unpack("!H", self._file.read(2))
            content = self._file.read(size)
            if opcode & 15 == 8:
                raise RuntimeError(f"The terminal was closed: {content!r}")
            if opcode & 15 == 2:
                shown += content
        return shown

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def keystroke(arena: Arena) -> Probe:
    """A key pressed at a terminal, until its echo is there."""
    path = f"/api/sessions/{_live_session(arena)}/processes"
    open_now: list[_Terminal] = []

    @contextmanager
    def at_a_terminal() -> Iterator[None]:
        """Each round has a terminal of its own: the server gives up who answers no ping for a minute."""
        arena.keep_open()
        status, answer = arena.post(path, {"command": "cat", "pty": {}})
        if status != 201:
            raise RuntimeError(f"There is no terminal: {answer!r}")
        started = f"{path}/{json.loads(answer)['process_id']}"
        with closing(_Terminal(arena.port, f"{started}/attach")) as terminal:
            open_now[:] = [terminal]
            yield
        arena.keep_open()
        arena.check_status(200)(arena.delete(started))

    def call(_: object) -> bytes:
        open_now[0].type(b"x")
        return open_now[0].until(b"x")

    def after(shown: bytes) -> None:
        if shown != b"x":
            raise RuntimeError(f"The terminal showed {shown!r}.")
        open_now[0].type(b"\n")  # its line has room for so many characters only
        open_now[0].until(b"\r\nx\r\n")

    return Probe(call, after=after, around=at_a_terminal)


def context(arena: Arena) -> Probe:
    """`1+1` in a warm context of Python, committed like every run."""
    path = f"/api/sessions/{arena.new_session('python')}/run"
    body = {"code": "1+1", "context": "main"}

    def after(answer: Answer) -> None:
        cell = json.loads(answer[1])
        if answer[0] != 200 or cell["results"][0]["data"]["text/plain"] != "2" or not cell["state"]["committed"]:
            raise RuntimeError(f"A cell went wrong: {answer}")

    after(arena.post(path, body))
    return Probe(lambda _: arena.post(path, body), after=after)


def put(*, live: bool) -> Callable[[Arena], Probe]:
    """A small file changed over HTTP, in a live session or in one that isn't."""

    def start(arena: Arena) -> Probe:
        session = _live_session(arena) if live else arena.new_session("python")
        path, numbers = f"/api/sessions/{session}/files/file", count()
        arena.check_status(200)(arena.put(path, next(numbers)))
        return Probe(lambda _: arena.put(path, next(numbers)), after=arena.check_status(200))

    return start


def _live_session(arena: Arena) -> str:
    session = arena.new_session("python")
    arena.check_status(201)(arena.post(f"/api/sessions/{session}/processes", {"command": _STAY}))
    return session


CASES = [
    Case("process", "a process of a live session, until its first byte", process, 0.05),
    Case("process bwrap", "sh -c in a new bubblewrap sandbox, until its first byte", bwrap_shell, 0.05),
    Case("keystroke", "a key at a terminal, until its echo", keystroke, 0.05, burst=20, goal=5.0),
    Case("context", "1+1 in a warm context of Python", context, 0.05),
    Case("live put", "a small file changed in a live session", put(live=True), 0.05),
    Case("plain put", "the same in a session that isn't live", put(live=False), 0.05),
]
RATIOS = [
    Ratio("process", "process bwrap", goal=0.5),
    Ratio("context", "python warm"),
    Ratio("live put", "plain put", goal=1.3),
]
