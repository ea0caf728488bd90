"""Runs, and processes beside them, that want all descriptors of the service. Each attack is also made on a server that
doesn't count them."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.gvisor import BOTH_KINDS
from tests.network.conftest import Machine, NetServer, Session, new_session
from tests.soaking import soak_the_rest

LIMIT = 600
SMALL = f"""
import resource
from era.server import server
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
server.raise_descriptor_limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, hard))
"""
"""As many descriptors as two greedy runs had in a moment."""

COUNTLESS = """
from era.network.descriptors import RunDescriptors
RunDescriptors.take = lambda self, count=1: None
RunDescriptors.give_back = lambda self, count=1: None
"""
"""Counts nothing."""

ENDLESS = """
from era.core.concurrency.shares import Shares
Shares.left = lambda self, holder: 1 << 30
"""
"""Has as many as anybody wants, of descriptors and of callers' connections."""

DATAGRAMS = """
import errno, socket, time
senders = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(24)]
for port in range(20000, 20060):
    for sender in senders:
        try:
            sender.sendto(b"x", ("203.0.113.10", port))
        except OSError as error:
            assert error.errno == errno.ENOBUFS, error
print("done", flush=True)
last = senders[-1]
last.settimeout(5)
last.sendto(b"hello", ("203.0.113.10", 9000))
print(last.recv(100), flush=True)
time.sleep(600)
"""
CONNECTIONS = """
import errno, socket, time
kept, refused = [], 0
for _ in range(250):
    try:
        kept.append(socket.create_connection(("203.0.113.10", 9000), 5))
    except OSError as error:
        assert error.errno == errno.ENOBUFS, error
        refused += 1
print("done", flush=True)
if refused:
    for sock in kept[:-5]:
        sock.close()
    until = time.monotonic() + 20
    while True:  # until the service knows that they are closed
        try:
            kept.append(socket.create_connection(("203.0.113.10", 9000), 5))
            break
        except OSError as error:
            if error.errno != errno.ENOBUFS or time.monotonic() > until: raise
        time.sleep(0.1)
print(len(kept) >= 10, refused > 0, flush=True)
time.sleep(600)
"""
NAMES = CONNECTIONS.replace('("203.0.113.10", 9000)', '("192.0.2.53", 53)')
ATTACKS = {
    "datagrams": (DATAGRAMS, "b'hello'"),
    "connections": (CONNECTIONS, "True True"),
    "names": (NAMES, "True True"),
    "datagrams of processes": (DATAGRAMS, "b'hello'"),
    "connections of processes": (CONNECTIONS, "True True"),
}
"""Programs, and what they print if they were bounded. Those `of processes` are processes beside runs."""


@dataclass
class Attack:
    """What greedy programs have printed so far."""

    server: NetServer
    said: list[str]
    most: int = 0
    """Descriptors that the server was seen to have."""

    def has_begun(self) -> bool:
        """Whether each has tried everything, or the service has no descriptors left."""
        self.most = max(self.most, descriptors(self.server))
        return all("done" in said for said in self.said) or self.most > LIMIT * 0.9


def descriptors(server: NetServer) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


@pytest.fixture(scope="module")
def few(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetServer]:
    """A server with few descriptors."""
    server = machine.serve(tmp_path_factory.mktemp("few") / "data", weakness=SMALL)
    yield server
    server.stop()


@contextmanager
def attacked(server: NetServer, kind: str, which: str) -> Iterator[Attack]:
    """Two sessions make this attack, until the end of the block."""
    attack, code = Attack(server, ["", ""]), ATTACKS[which][0]
    with server.client() as client:
        sessions = [new_session(client, isolation=kind, limits={"pids": 64}) for _ in attack.said]

    def run(number: int, session: Session) -> None:
        where = f"/api/sessions/{session.id}"
        try:
            with server.client(timeout=60) as own, ExitStack() as following:
                if which.endswith("of processes"):
                    command = {"command": ["python3", "-c", code]}
                    began = own.post(f"{where}/processes", json=command).raise_for_status()
                    call = own.stream("GET", f"{where}/processes/{began.json()['process_id']}/events")
                else:
                    call = own.stream("POST", f"{where}/stream", json={"code": code, "timeout": 50})
                for line in following.enter_context(call).iter_lines():
                    attack.said[number] += line
        except httpx.HTTPError:
            pass

    threads = [threading.Thread(target=run, args=one, daemon=True) for one in enumerate(sessions)]
    for thread in threads:
        thread.start()
    yield attack
    with server.client() as client:
        for session in sessions:
            client.delete(f"/api/sessions/{session.id}?purge=true")
    for thread in threads:
        thread.join(20)


def eventually(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_programs_cant_take_all_descriptors(few: NetServer, kind: str, attack: str) -> None:
    server, answer = few, ATTACKS[attack][1]
    with server.client() as client:
        neighbour = new_session(client, isolation=kind)
        assert neighbour.says("print(1)") == "1\n"
        with attacked(server, kind, attack) as greedy:
            assert eventually(greedy.has_begun, 200)
            assert greedy.most < LIMIT * 3 / 4
            assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
            fetch = "import urllib.request as u; print(u.urlopen('http://www.example.test/hello').status)"
            assert neighbour.says(fetch) == "200\n"
            assert eventually(lambda: all(answer in said for said in greedy.said), 120), greedy.said
        assert eventually(lambda: descriptors(server) < greedy.most / 2 + 50, 60), (greedy.most, descriptors(server))


SERVER = """
import socket, time
listener = socket.create_server(("127.0.0.1", 8000), backlog=300)
print("done", flush=True)
time.sleep(600)
"""


@contextmanager
def called(server: NetServer, kind: str, count: int) -> Iterator[tuple[Session, Counter[int]]]:
    """A session whose live server never answers, with this many callers, and the statuses that these got."""
    with server.client() as client:
        session = new_session(client, isolation=kind)
        run = client.post(f"/api/sessions/{session.id}/run", json={"code": SERVER, "timeout": 600, "background": True})
        assert run.status_code == 202, run.text
        stdout = f"/api/sessions/{session.id}/runs/{run.json()['run_id']}/stdout"
        assert eventually(lambda: client.get(stdout).text == "done\n", 60)
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    statuses: Counter[int] = Counter()

    def wait(caller: socket.socket) -> None:
        with suppress(OSError):
            if answer := caller.recv(100):
                statuses[int(answer.split()[1])] += 1

    callers = [socket.create_connection((host, int(port))) for _ in range(count)]
    threads = [threading.Thread(target=wait, args=(caller,), daemon=True) for caller in callers]
    for caller, thread in zip(callers, threads, strict=True):
        caller.sendall(f"GET /proxy/{session.id}/8000/ HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        thread.start()
    try:
        yield session, statuses
    finally:
        for caller, thread in zip(callers, threads, strict=True):
            with suppress(OSError):
                caller.shutdown(socket.SHUT_RDWR)
            thread.join()
            caller.close()


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_callers_of_one_session_cant_take_all(few: NetServer, kind: str) -> None:
    with few.client() as client:
        neighbour = new_session(client)
        neighbour.says("print(1)")
        with called(few, kind, 70) as (hanging, statuses):  # fewer than one address may open
            assert eventually(lambda: statuses[503] >= 20, 120), statuses
            assert set(statuses) == {503}
            assert neighbour.says("print(1)") == "1\n"
            assert descriptors(few) < LIMIT * 0.75
    with few.client() as client:
        client.delete(f"/api/sessions/{hanging.id}?purge=true")


@pytest.mark.soak
@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_without_shares_callers_of_one_session_take_all(machine: Machine, tmp_path: Path, kind: str) -> None:
    server = machine.serve(tmp_path / "data", weakness=SMALL + ENDLESS, ERA_DRAIN_SECONDS="0")
    with called(server, kind, LIMIT // 2) as (_, statuses):
        assert eventually(lambda: descriptors(server) > LIMIT * 0.9, 120), (descriptors(server), statuses)
        server.stop()


@pytest.mark.parametrize("greedy_kind", BOTH_KINDS)
@pytest.mark.parametrize("attack", soak_the_rest(ATTACKS, ("connections", "datagrams of processes")))
def test_without_counting_they_take_all(machine: Machine, tmp_path: Path, attack: str, greedy_kind: str) -> None:
    server = machine.serve(tmp_path / "data", weakness=SMALL + COUNTLESS, ERA_DRAIN_SECONDS="0")
    with suppress(httpx.HTTPError), attacked(server, greedy_kind, attack) as greedy:
        assert eventually(greedy.has_begun, 200)
        server.stop()
        assert greedy.most > LIMIT * 0.9
