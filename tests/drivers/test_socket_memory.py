"""What lies unread in sockets and counts in no control group has a bound all the same, which honest programs keep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from era.core.program import Ended
from era.drivers import memory
from tests.drivers import process_steps as steps
from tests.drivers.sandboxes import Sandboxes, Weakness
from tests.gvisor import needs_gvisor

NETLINK = """
import socket, struct, time
ask = struct.pack('IHHIIBBHiII', 32, 18, 1, 1, 0, 0, 0, 0, 1, 0, 0)  # RTM_GETLINK of loopback
kept = []
for _ in range({sockets}):
    kept.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
    kept[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, {buffer})
    kept[-1].setblocking(False)
    try:
        for _ in range(20_000): kept[-1].send(ask)
    except OSError: pass
time.sleep(25)
"""
MANY, LARGE = NETLINK.format(sockets=900, buffer=1 << 20), NETLINK.format(sockets=50, buffer=4 << 20)
"""Netlink sockets with answers that nobody reads."""

BACKLOG = """
import socket, time
server = socket.create_server(('127.0.0.1', 0), backlog=900)
kept = []
for _ in range(900):
    kept.append(socket.create_connection(server.getsockname()))
    kept[-1].setblocking(False)
    try:
        while True: kept[-1].send(bytes(1 << 16))
    except OSError: pass
time.sleep(25)
"""
"""Connections that nobody accepts."""

HONEST = r"""
import socket, time
server = socket.create_server(('127.0.0.1', 0), backlog=300)
kept = [socket.create_connection(server.getsockname()) for _ in range(300)]
for each in kept: each.sendall(b'GET / HTTP/1.1\r\nHost: x\r\n\r\n')
time.sleep(2)
for _ in range(2000):  # ends of connections are no connections that wait
    with socket.create_connection(server.getsockname()), server.accept()[0]: pass
    if len(kept) > 1: kept.pop().close()
print('there')
"""
"""A server that doesn't get to what it is asked for two seconds, and afterwards is asked often."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's sandboxes have no cgroup to leave it out")


@pytest.fixture
def gvisors(tmp_path: Path) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path / "own", Weakness(), "gvisor")
    yield made
    made.stop()


@pytest.mark.parametrize("code", [MANY, LARGE, BACKLOG], ids=["many", "large", "backlog"])
def test_it_is_bounded(sandboxes: Sandboxes, code: str) -> None:
    result = sandboxes.run(sandboxes.make(), code, timeout=60)
    assert result.ended.cause == "oom", result.stderr


@needs_gvisor
def test_it_is_bounded_where_the_sentry_has_it(gvisors: Sandboxes) -> None:
    result = gvisors.run(gvisors.make(), BACKLOG, timeout=60)
    assert result.ended.cause == "oom", result.stderr


@pytest.mark.soak
def test_nobody_ends_it_without_the_watch(sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_sockets", lambda _pid: 0)
    assert sandboxes.run(sandboxes.make(), LARGE, timeout=60).ended.cause == "exit"


def test_programs_as_there_are_keep_it(sandboxes: Sandboxes) -> None:
    assert sandboxes.run(sandboxes.make(), HONEST, timeout=60).stdout == "there\n"


async def beside_a_large_process(sandbox: Any) -> tuple[Ended, object]:
    """How a run ends that takes too much, and whether a process has ended that has more memory, but no sockets."""
    waits = "kept = bytearray(100 << 20); print('there', flush=True); import time; time.sleep(1000)"
    async with steps.running(sandbox, steps.spec("python3", "-c", waits)) as process:
        await process.until(b"there")
        _, ended = await steps.run(sandbox, MANY)
        return ended, process.ended


def test_who_has_the_sockets_is_ended(sandboxes: Sandboxes) -> None:
    ended, other = sandboxes.do(sandboxes.make(), beside_a_large_process)
    assert (ended.cause, other) == ("oom", None)
