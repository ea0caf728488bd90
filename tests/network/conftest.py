"""A machine and a world: network namespaces joined by a cable, all of it gone with the tests' processes.

The tests' own thread moves into the machine's namespace, so the servers it starts are in there, and the world is a
process in another one. Nothing of it touches the network of the real machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import httpx
import pytest

from era.drivers.cgroups import cgroup_name
from era.network import interception
from tests.conftest import Process, Server, assert_nothing_left, mounting, mounts
from tests.network import world
from tests.network.lab import GOOD, Lab, trusting

NEEDED = ("ip", "openssl", "unshare")


@dataclass
class Machine:
    """Where ERA runs. `keys` has the world's certificate and `ca.pem`, which has signed it."""

    keys: Path
    resolv: Path
    home: int
    """The real machine's network namespace."""

    made: list[NetServer] = field(default_factory=list)
    world_pid: int = 0

    def in_the_world(self, *words: str) -> None:
        """Run `ip` there."""
        there = ("nsenter", "--net", "--target", str(self.world_pid))
        subprocess.run([*there, "ip", *words], check=True, capture_output=True)

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """In the real network for as long as the block lasts, where the registries are."""
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        os.setns(self.home, os.CLONE_NEWNET)
        try:
            yield
        finally:
            os.setns(here, os.CLONE_NEWNET)
            os.close(here)

    def serve(self, data_dir: Path, *, weakness: str = "", uid: int | None = None, **settings: str) -> NetServer:
        """A server whose resolver is the world's. `weakness` is Python that takes something out of it."""
        settings = {"SSL_CERT_FILE": str(self.keys / "ca.pem"), **settings}
        server = NetServer(data_dir, settings, uid=uid, resolv=self.resolv, weakness=weakness)
        self.made.append(server)
        server.start()
        return server


@dataclass
class NetServer(Server):
    resolv: Path = Path()

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> Process:
        if self.uid is not None:
            script = f"mount --bind '{self.resolv}' /etc/resolv.conf && exec \"$@\""
            command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh", *command]
        return super()._spawn(command, environment, log)

    def _before(self) -> str:
        """Enter the machine's network namespace; what servers are forked from is in the real one."""
        network = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"
        entering = f"with open({network!r}) as network: os.setns(network.fileno(), os.CLONE_NEWNET)"
        return f"import os\n{entering}\n{mounting(self.resolv, '/etc/resolv.conf')}{super()._before()}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="package")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The tests are on this machine from now on, until the last of them is done."""
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces and cables between them")
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"the internet of these tests is made with {', '.join(missing)}")
    directory = tmp_path_factory.mktemp("world")
    make_keys(directory)
    resolv = directory / "resolv.conf"
    resolv.write_text(f"nameserver {world.DNS}\noptions timeout:1 attempts:1\n")
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    os.unshare(os.CLONE_NEWNET)
    process = None
    wait = ("unshare", "--net", "sh", "-c", 'echo here; read -r _ && exec "$@"', "sh")
    made = Machine(directory, resolv, home)
    try:
        process = subprocess.Popen(
            [*wait, sys.executable, str(Path(world.__file__)), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "here\n"
        connect(process.pid)
        made.world_pid = process.pid
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "up\n"
        yield made
    finally:
        for server in made.made:
            if server.process is not None:
                server.stop()
        if process is not None:
            process.kill()
            process.communicate()
        os.setns(home, os.CLONE_NEWNET)
        os.close(home)


def connect(pid: int) -> None:
    """A cable from this namespace to that of a process, and addresses on both ends of it."""

    def there(*words: str) -> None:
        subprocess.run(["nsenter", "--net", "--target", str(pid), "ip", *words], check=True, capture_output=True)

    ip("link", "set", "lo", "up")
    ip("link", "add", "out", "type", "veth", "peer", "name", "in", "netns", str(pid))
    ip("link", "set", "out", "up")
    there("link", "set", "lo", "up")
    there("link", "set", "in", "up")
    for address in (f"{world.OWN}/24", f"{world.OWN_PRIVATE}/24", "169.254.1.1/16"):
        ip("addr", "add", address, "dev", "out")
    for address in (f"{world.OWN_V6}/64", "fd77::1/64"):
        ip("addr", "add", address, "dev", "out", "nodad")
    for address in (world.PUBLIC, world.DNS):
        there("addr", "add", f"{address}/24", "dev", "in")
    for address in (world.OTHER, *world.PRIVATE):
        there("addr", "add", f"{address}/32", "dev", "in")
    for address in (world.PUBLIC_V6, *world.PRIVATE_V6):
        there("addr", "add", f"{address}/64", "dev", "in", "nodad")
    ip("route", "add", "default", "via", world.PUBLIC)
    ip("route", "add", "default", "via", world.PUBLIC_V6)
    there("route", "add", "default", "via", world.OWN)


def make_keys(directory: Path) -> None:
    """A certificate authority nobody knows, and a certificate by it for the world's servers."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)

    usage = "keyUsage=critical,keyCertSign,cRLSign"
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Test CA", *("-addext", usage))
    names = ",".join(f"DNS:{name}" for name in world.NAMES)
    openssl(
        *("req", "-x509", *new, "-keyout", "server.key", "-out", "server.pem", "-subj", "/CN=example.test"),
        *("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", f"subjectAltName={names},IP:{world.PUBLIC}"),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
    )
    openssl(
        *("req", "-x509", *new, "-keyout", "unsigned.key", "-out", "unsigned.pem", "-subj", "/CN=example.test"),
        *("-addext", f"subjectAltName={names}"),
    )
    directory.chmod(0o755)
    (directory / "ca.pem").chmod(0o644)


@pytest.fixture(scope="package")
def served(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetServer]:
    """A sound server in the middle of it. Nothing of it may be left at the end."""
    before, data_dir = mounts(), tmp_path_factory.mktemp("out") / "data"
    server = machine.serve(data_dir)
    yield server
    processes = server.descendants()
    server.stop()
    assert_nothing_left(before, processes, data_dir, cgroup_name(data_dir))


ODD = """
from era.network import egress, splice
splice.IDLE_SECONDS = 1.0
right = egress.SupervisedEgress.__aexit__
async def leave(self, *_):
    if not any(host == "www.example.test" and port == 9000 for host, port, *_ in self._destinations._tried):
        await right(self)
egress.SupervisedEgress.__aexit__ = leave
"""


@pytest.fixture(scope="package")
def odd(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetServer]:
    """A server with less patience, that may reach some private ranges, and that leaves everything open behind a run
    that was at www.example.test:9000."""
    data_dir = tmp_path_factory.mktemp("odd") / "data"
    server = machine.serve(data_dir, weakness=ODD, ERA_EGRESS_PRIVATE="10.77.0.0/24, 192.168.77.2")
    yield server
    server.stop()


@dataclass
class Session:
    """A session on a server, for short tests."""

    client: httpx.Client
    id: str

    def run(self, code: str, **fields: Any) -> dict[str, Any]:
        answer = self.client.post(f"/api/sessions/{self.id}/run", json={"code": code, **fields})
        assert answer.status_code == 200, answer.text
        response: dict[str, Any] = answer.json()
        return response

    def says(self, code: str, **fields: Any) -> str:
        """What a program prints that must succeed."""
        response = self.run(code, **fields)
        assert response["status"] == "ok", response
        printed: str = response["stdout"]
        return printed

    def record(self) -> dict[str, Any]:
        """Of the last run."""
        found: dict[str, Any] = self.client.get(f"/api/sessions/{self.id}/runs").json()["runs"][0]
        return found

    def destinations(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.record()["egress"]["destinations"]
        return found

    def change(self, **fields: Any) -> None:
        assert self.client.patch(f"/api/sessions/{self.id}", json=fields).status_code == 200


type NewSession = Callable[..., Session]


@pytest.fixture
def session(served: NetServer) -> Iterator[NewSession]:
    """Makes sessions that are gone after the test."""
    with served.client() as client:
        made = []

        def new(language: str = "python", **fields: Any) -> Session:
            made.append(new_session(client, language, **fields))
            return made[-1]

        yield new
        for one in made:
            client.delete(f"/api/sessions/{one.id}?purge=true")


NEEDS_GVISOR = pytest.mark.skipif(shutil.which("runsc") is None, reason="there is no gVisor here")
KINDS = ["bubblewrap", pytest.param("gvisor", marks=NEEDS_GVISOR)]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Of sandbox."""
    return str(request.param)


@pytest.fixture
def anywhere(session: NewSession, kind: str) -> NewSession:
    """The same, in each kind of sandbox."""
    return lambda language="python", **fields: session(language, isolation=kind, **fields)


def new_session(client: httpx.Client, language: str = "python", **fields: Any) -> Session:
    answer = client.post("/api/sessions", json={"language": language, **fields})
    assert answer.status_code == 201, answer.text
    return Session(client, answer.json()["id"])


@pytest.fixture
async def lab(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    monkeypatch.setattr(interception, "client_context", lambda: trusting(GOOD))
    bugs: list[object] = []
    monkeypatch.setattr(interception, "log", SimpleNamespace(error=lambda *_, **response: bugs.append(response)))
    made = Lab()
    yield made
    await made.close()
    assert bugs == []
