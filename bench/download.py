"""A download by a program in a session, and by the same program on the host, from the same server.

Programs in sessions can't reach the machine's own or private addresses, so the server has a public one. A second `era
serve` and that server each have a network namespace, joined by a veth pair. The machine's own network isn't touched.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

from bench.arena import Arena, service_environment, wait_for_port
from bench.cases import Probe
from era.drivers import guest

MEGABYTES = 512
_ERA, _SERVER = "203.0.113.1", "203.0.113.10"  # of TEST-NET-3 (RFC 5737), which nobody has
_START_SECONDS = 30.0

_SERVE = f"""\
import os, socket, threading
piece = bytes(1 << 20)
def serve(client):
    with client:
        for _ in range(int(client.makefile("rb").readline())):
            client.sendall(piece)
listener = socket.create_server(("{_SERVER}", 80))
print("up", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

_DOWNLOAD = f"""\
import socket
buffer, got = bytearray(1 << 20), 0
with socket.create_connection(("{_SERVER}", 80)) as server:
    server.sendall(b"MEGABYTES\\n")
    while count := server.recv_into(buffer):
        got += count
print(got >> 20)
"""


class _Network:
    """`era serve` and a server, each in a network namespace of its own, joined by a veth pair."""

    def __init__(self, arena: Arena) -> None:
        self.code = _DOWNLOAD.replace("MEGABYTES", str(arena.size(MEGABYTES)))
        self.expected = f"{arena.size(MEGABYTES)}\n".encode()
        directory = arena.scratch / "net"
        directory.mkdir()
        log = directory / "log"
        command = str(Path(sys.executable).parent / "era")
        with log.open("wb") as output:
            era = _waiting([command, "serve"], service_environment(directory / "data"), output)
        server = _waiting([sys.executable, "-c", _SERVE], dict(os.environ), subprocess.PIPE)
        for process in (era, server):
            arena.closers.callback(process.wait, 30)
            arena.closers.callback(process.terminate)
        self._pid = era.pid
        self._ip(era.pid, "link", "add", "out", "type", "veth", "peer", "name", "in", "netns", str(server.pid))
        for pid, link, address in ((era.pid, "out", _ERA), (server.pid, "in", _SERVER)):
            self._ip(pid, "addr", "add", f"{address}/24", "dev", link)
            self._ip(pid, "link", "set", link, "up")
            self._ip(pid, "link", "set", "lo", "up")
        for process in (server, era):
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        assert server.stdout is not None
        if server.stdout.readline() != b"up\n":
            raise RuntimeError("The server in its namespace did not start.")
        self._port = wait_for_port(era, log)
        self._session = json.loads(self._post("/api/sessions", {"language": "python", "default_timeout": 60}))["id"]

    def in_session(self) -> bytes:
        """Download in a session, and return the run's answer."""
        return self._post(f"/api/sessions/{self._session}/run", {"code": self.code})

    def on_host(self) -> bytes:
        """Download outside of sandboxes, in the namespace of `era serve`, and return the program's output."""
        command = [*_inside(self._pid), guest.PYTHON, "-c", self.code]
        return subprocess.run(command, check=True, capture_output=True).stdout

    def _post(self, path: str, body: object) -> bytes:
        with _network_of(self._pid):
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
            connection.connect()  # a socket stays in the namespace in which it was made
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            return connection.getresponse().read()

    def _ip(self, pid: int, *words: str) -> None:
        subprocess.run([*_inside(pid), "ip", *words], check=True, capture_output=True)


_network = cache(_Network)


def in_session(arena: Arena) -> Probe:
    """A download by a program in a session."""
    network = _network(arena)

    def after(answer: bytes) -> None:
        run = json.loads(answer)
        if run.get("stdout", "").encode() != network.expected:
            raise RuntimeError(f"A download went wrong: {run}")

    return Probe(lambda _: network.in_session(), after=after)


def direct(arena: Arena) -> Probe:
    """The same download on the host."""
    network = _network(arena)

    def after(output: bytes) -> None:
        if output != network.expected:
            raise RuntimeError(f"A download went wrong: {output!r}")

    return Probe(lambda _: network.on_host(), after=after)


def _inside(pid: int) -> list[str]:
    return ["nsenter", "--net", "--target", str(pid)]


def _waiting(command: list[str], environment: dict[str, str], output: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """A process in a new network namespace, which executes `command` once a line comes on its stdin."""
    wait = ("unshare", "--net", "sh", "-c", 'read -r _ && exec "$@"', "sh")
    process = subprocess.Popen([*wait, *command], stdin=subprocess.PIPE, stdout=output, env=environment)
    deadline = time.monotonic() + _START_SECONDS
    while os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("No new network namespace could be made.")
        time.sleep(0.01)
    return process


@contextlib.contextmanager
def _network_of(pid: int) -> Iterator[None]:
    """Within the block, this thread is in the network namespace of process `pid`."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    other = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.setns(other, os.CLONE_NEWNET)
        yield
    finally:
        os.setns(own, os.CLONE_NEWNET)
        os.close(own)
        os.close(other)
