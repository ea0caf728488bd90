"""A download through the gateway, and directly from the same server.

The gateway doesn't let programs reach the machine's own or private addresses, so the server has a public one: a service
of the benchmark's own and that server are each in a network namespace, joined by a cable. Nothing of it touches the
machine's own network.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

from bench.arena import Arena, service_environment
from bench.cases import Probe
from era.drivers import guest

MEGABYTES = 512
_HERE, _THERE = "203.0.113.1", "203.0.113.10"  # of a range for documents, so nobody's
_START_SECONDS = 30.0

_SERVER = f"""\
import os, socket, threading
piece = bytes(1 << 20)
def serve(client):
    with client:
        for _ in range(int(client.makefile("rb").readline())):
            client.sendall(piece)
listener = socket.create_server(("{_THERE}", 80))
print("up", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

_CLIENT = f"""\
import socket
buffer, got = bytearray(1 << 20), 0
with socket.create_connection(("{_THERE}", 80)) as server:
    server.sendall(b"MEGABYTES\\n")
    while count := server.recv_into(buffer):
        got += count
print(got >> 20)
"""


class _Net:
    """The two namespaces, and what serves in them."""

    def __init__(self, arena: Arena) -> None:
        self.code = _CLIENT.replace("MEGABYTES", str(arena.size(MEGABYTES)))
        self.expected = f"{arena.size(MEGABYTES)}\n".encode()
        place = arena.scratch / "net"
        place.mkdir()
        log = place / "log"
        era = str(Path(sys.executable).parent / "era")
        with log.open("wb") as output:
            here = _waiting([era, "serve"], service_environment(place / "data"), output)
        there = _waiting([sys.executable, "-c", _SERVER], dict(os.environ), subprocess.PIPE)
        for process in (here, there):
            arena.closers.callback(process.wait, 30)
            arena.closers.callback(process.terminate)
        self._here = here.pid
        self._ip(here.pid, "link", "add", "out", "type", "veth", "peer", "name", "in", "netns", str(there.pid))
        for pid, link, address in ((here.pid, "out", _HERE), (there.pid, "in", _THERE)):
            self._ip(pid, "addr", "add", f"{address}/24", "dev", link)
            self._ip(pid, "link", "set", link, "up")
            self._ip(pid, "link", "set", "lo", "up")
        for process in (there, here):
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        assert there.stdout is not None
        if there.stdout.readline() != b"up\n":
            raise RuntimeError("The server in its namespace did not start.")
        deadline = time.monotonic() + _START_SECONDS
        while not (found := re.search(r"ERA serves\s+http://\S+:(\d+)", log.read_text())):
            if here.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The service in its namespace did not start:\n{log.read_text()}")
            time.sleep(0.02)
        self._port = int(found[1])
        self._session = json.loads(self._post("/api/sessions", {"language": "python", "default_timeout": 60}))["id"]

    def through_the_gateway(self) -> bytes:
        return self._post(f"/api/sessions/{self._session}/run", {"code": self.code})

    def directly(self) -> bytes:
        command = [*_inside(self._here), guest.PYTHON, "-c", self.code]
        return subprocess.run(command, check=True, capture_output=True).stdout

    def _post(self, path: str, body: object) -> bytes:
        with _network_of(self._here):
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
            connection.connect()  # a socket stays in the network where it was made
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            return connection.getresponse().read()

    def _ip(self, pid: int, *words: str) -> None:
        subprocess.run([*_inside(pid), "ip", *words], check=True, capture_output=True)


_net = cache(_Net)


def gateway(arena: Arena) -> Probe:
    """A program in a session with internet access."""
    net = _net(arena)

    def after(answer: bytes) -> None:
        told = json.loads(answer)
        if told.get("stdout", "").encode() != net.expected:
            raise RuntimeError(f"A download went wrong: {told}")

    return Probe(lambda _: net.through_the_gateway(), after=after)


def direct(arena: Arena) -> Probe:
    """The same program on the host."""
    net = _net(arena)

    def after(said: bytes) -> None:
        if said != net.expected:
            raise RuntimeError(f"A download went wrong: {said!r}")

    return Probe(lambda _: net.directly(), after=after)


def _inside(pid: int) -> list[str]:
    return ["nsenter", "--net", "--target", str(pid)]


def _waiting(command: list[str], environment: dict[str, str], output: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """A process in a new network namespace, which becomes the command once it is told to."""
    wait = ("unshare", "--net", "sh", "-c", 'read -r _ && exec "$@"', "sh")
    process = subprocess.Popen([*wait, *command], stdin=subprocess.PIPE, stdout=output, env=environment)
    deadline = time.monotonic() + _START_SECONDS
    while os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("There is no new network namespace to be had.")
        time.sleep(0.01)
    return process


@contextlib.contextmanager
def _network_of(pid: int) -> Iterator[None]:
    """This thread in the network of a process, for as long as the block lasts."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    other = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.setns(other, os.CLONE_NEWNET)
        yield
    finally:
        os.setns(own, os.CLONE_NEWNET)
        os.close(own)
        os.close(other)
