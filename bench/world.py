"""A service whose programs reach a world outside, all of it on this machine.

Programs in sessions can't reach the machine's own or private addresses, so the world has a public one. An `era serve`
and the world are each in a network namespace, joined by a veth pair, and the service's nameserver is the world's. The
machine's own network isn't touched, and nothing is asked of its nameservers.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

from bench.arena import ERA, Arena, service_environment, wait_for_port

IS_THERE = os.geteuid() == 0 and all(map(shutil.which, ("ip", "mount", "nsenter", "unshare")))
"""Whether one can be made here."""

ADDRESS = "203.0.113.10"  # of TEST-NET-3 (RFC 5737), which nobody has
_OWN = "203.0.113.1"
ECHO_PORTS = range(9000, 9064)
_START_SECONDS = 30.0

_SERVE = f"""\
import selectors, socket, threading
piece = bytes(1 << 20)
def serve(client):
    with client:
        for _ in range(int(client.makefile("rb").readline())):
            client.sendall(piece)
def name(query):
    question = query[12 : query.index(0, 12) + 5]
    record = b"\\xc0\\x0c\\0\\1\\0\\1" + bytes(4) + b"\\0\\4" + address
    return query[:2] + b"\\x81\\x80\\0\\1\\0\\1" + bytes(4) + question + record
def datagrams():
    while True:
        for key, _ in chosen.select():
            datagram, sender = key.fileobj.recvfrom(1 << 16)
            key.fileobj.sendto(name(datagram) if key.data == 53 else datagram, sender)
address = socket.inet_aton("{ADDRESS}")
listener = socket.create_server(("{ADDRESS}", 80))
chosen = selectors.DefaultSelector()
for port in (53, *range({ECHO_PORTS.start}, {ECHO_PORTS.stop})):
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    bound.bind(("{ADDRESS}", port))
    chosen.register(bound, selectors.EVENT_READ, port)
threading.Thread(target=datagrams, daemon=True).start()
print("up", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
"""TCP port 80 sends as many MiB as it is asked for, UDP port 53 answers each query with ADDRESS, and UDP ports 9000 to
9063 send back what comes."""


class World:
    """An `era serve` and a world, and the arena of that service. Both end with another arena."""

    def __init__(self, arena: Arena) -> None:
        directory = arena.scratch / "world"
        directory.mkdir()
        log, resolv = directory / "log", directory / "resolv.conf"
        resolv.write_text(f"nameserver {ADDRESS}\n")
        with log.open("wb") as output:
            era = _waiting([str(ERA), "serve"], service_environment(directory / "data"), output, resolv)
        server = _waiting([sys.executable, "-c", _SERVE], dict(os.environ), subprocess.PIPE, resolv)
        for process in (era, server):
            arena.closers.callback(process.wait, 30)
            arena.closers.callback(process.terminate)
        self._pid = era.pid
        self._ip(era.pid, "link", "add", "out", "type", "veth", "peer", "name", "in", "netns", str(server.pid))
        for pid, link, address in ((era.pid, "out", _OWN), (server.pid, "in", ADDRESS)):
            self._ip(pid, "addr", "add", f"{address}/24", "dev", link)
            self._ip(pid, "link", "set", link, "up")
            self._ip(pid, "link", "set", "lo", "up")
        for process in (server, era):
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        assert server.stdout is not None
        if server.stdout.readline() != b"up\n":
            raise RuntimeError("The world in its namespace did not start.")
        port = wait_for_port(era, log)
        connection = _Connection("127.0.0.1", port, timeout=60)
        connection.pid = era.pid
        self.arena = Arena(port, era.pid, directory, small=arena.small, connection=connection)
        arena.closers.callback(self.arena.close)
        self.arena.wait_for_pool()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within the block, this thread and what it starts are in the network namespace of the service."""
        with _network_of(self._pid):
            yield

    def inside(self) -> list[str]:
        """The begin of a command that is to run there."""
        return _inside(self._pid)

    def _ip(self, pid: int, *words: str) -> None:
        subprocess.run([*_inside(pid), "ip", *words], check=True, capture_output=True)


world = cache(World)
"""That of an arena."""


class _Connection(http.client.HTTPConnection):
    """One that is made in the network namespace of process `pid`, in which its socket stays."""

    pid: int

    def connect(self) -> None:
        with _network_of(self.pid):
            super().connect()


def _inside(pid: int) -> list[str]:
    return ["nsenter", "--net", "--target", str(pid)]


def _waiting(
    command: list[str], environment: dict[str, str], output: IO[bytes] | int, resolv: Path
) -> subprocess.Popen[bytes]:
    """A process in a new network namespace, which executes `command` once a line comes on its stdin. `resolv` is its
    /etc/resolv.conf."""
    apart = ("unshare", "--net", "--mount", "--propagation", "slave")
    script = 'resolv=$1 && shift && read -r _ && mount --bind "$resolv" /etc/resolv.conf && exec "$@"'
    argv = [*apart, "sh", "-c", script, "sh", str(resolv), *command]
    errors = None if output == subprocess.PIPE else output
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=output, stderr=errors, env=environment)
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
