"""A cluster on a network of its own (network.py): hosts, PostgreSQL and S3, each on a node of which any may be cut off
from any other, and hosts with clocks of their own.

What watches over the hosts starts anew those that end, as `era cluster up` does on one machine. Or Ray does, whose head
is on another node: what watches over Ray's processes does that as systemd would.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from era.cluster.host_process import LOG, NOTE
from tests.cluster import KEY
from tests.conftest import ERA, START_SECONDS, STOP_SECONDS, Server, descendants, eventually, is_running
from tests.hostile.network import Network, Node, inside
from tests.postgres import Postgres, directory_of_server
from tests.store.s3 import ACCESS_KEY, SECRET_KEY, Radosgw

_PORT = 8787

RAY_PACKAGES = Path(__file__).parent.parent.parent / ".tools" / "ray"
RAY_SECONDS = 300.0
"""A busy machine takes minutes to start Ray on all nodes."""

_SHIFTED_CLOCK = Path(__file__).parent / "shifted_clock.py"


@dataclass
class Watched:
    """A command that is started anew when it ends."""

    node: Node
    command: Sequence[str]
    environment: Mapping[str, str]
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    codes: list[int] = field(default_factory=list)
    """With which it has ended, each time."""

    pause: float = 0.5
    """Seconds between its end and its next beginning."""

    turn: threading.Lock | None = None
    """Held from its beginning until it has begun, where several on one machine would keep each other from that."""

    stopping: bool = False
    thread: threading.Thread | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def start(self) -> None:
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def has_begun(self) -> bool:
        """Of a node of Ray."""
        return self._times_begun() > 0

    def _times_begun(self) -> int:
        return self.log.count("Ray runtime started.") if self.log_path.exists() else 0

    def _watch(self) -> None:
        """Start it again and again, until it is to stop."""
        while True:
            with self.turn or nullcontext():
                if self.stopping:
                    return
                process = self._begin()
            self.codes.append(process.wait())
            time.sleep(self.pause)

    def _begin(self) -> subprocess.Popen[bytes]:
        """Start it. Where it takes turns with others, this waits until it has begun or has ended."""
        before = self._times_begun() if self.turn else 0
        command = self.node.command("setpriv", "--pdeathsig", "TERM", *self.command)
        with self.log_path.open("ab") as log:
            process = self.process = subprocess.Popen(
                command, env=dict(self.environment), stdout=log, stderr=log, start_new_session=True
            )
        while self.turn and process.poll() is None and self._times_begun() == before:
            time.sleep(0.1)
        return process

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> list[int]:
        """Tell it to end, and not to begin again; returns the processes that were below it."""
        self.stopping = True
        if self.process is None or self.process.poll() is not None:
            return []
        below = descendants(self.process.pid)
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        return below

    def wait(self, until: float) -> None:
        """Wait for its end, and kill it at that time. It may not have been started."""
        if self.thread is None:
            return
        self.thread.join(max(until - time.monotonic(), 0.1))
        if self.thread.is_alive():
            self.signal(signal.SIGKILL)
            self.thread.join()


class NetworkedHost:
    """A host, which is started anew when it ends. `watched` is what does that, where it isn't Ray."""

    def __init__(self, node: Node, directory: Path, environment: Mapping[str, str], *, under_ray: bool) -> None:
        self.node = node
        self.directory = directory
        self.url = f"http://{node.address}:{_PORT}"
        self.watched: Watched | None = None
        if not under_ray:
            self.set_clock(0)
            command = (sys.executable, "-P", str(_SHIFTED_CLOCK), str(self._clock), "serve")
            self.watched = Watched(node, command, environment, directory.with_suffix(".log"))

    @property
    def pid(self) -> int:
        """0 while there is none."""
        if self.watched is not None:
            return self.watched.pid
        try:
            return int(json.loads((self.directory / NOTE).read_text())["pid"])
        except FileNotFoundError:
            return 0

    @property
    def log(self) -> str:
        if self.watched is not None:
            return self.watched.log
        try:
            return (self.directory / LOG).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    @property
    def _clock(self) -> Path:
        return self.directory.with_suffix(".clock")

    def set_clock(self, seconds: float) -> None:
        """Have its clock be off by so much."""
        with open(os.open(self._clock, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(struct.pack("d", seconds))

    def signal(self, number: int) -> None:
        pid = self.pid
        if pid and is_running(pid):
            os.kill(pid, number)

    @contextmanager
    def paused(self) -> Iterator[int]:
        """It doesn't go on within the block. Its process id."""
        pid = self.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGCONT)


class Ray:
    """Ray's head on a node of its own, a node of Ray on that of each host, and the driver, `era serve --cluster`; each
    is started anew when it ends."""

    def __init__(
        self, node: Node, hosts: Sequence[NetworkedHost], directory: Path, settings: Mapping[str, str]
    ) -> None:
        """`settings` are those of the hosts, which the driver tells them."""
        self._directory = Path(tempfile.mkdtemp(prefix="era-ray-"))  # its sockets' names must be short
        address = f"{node.address}:6379"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("ERA_", "RAY_"))}
        environment |= {
            "HOME": str(self._directory),
            "PYTHONPATH": str(RAY_PACKAGES),
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_AUTH_MODE": "token",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        }
        shared = self._directory / "ray"
        shared.mkdir()
        options = ("--block", "--num-cpus=0", "--object-store-memory=80000000", "--disable-usage-stats")
        start = (sys.executable, "-m", "ray.scripts.scripts", "start", *options)

        def on_machine(name: str, *command: str) -> tuple[str, ...]:
            """All nodes have the head's directory, by its path. Here each has its own there, as machines do."""
            own = self._directory / name
            own.mkdir(exist_ok=True)
            return ("unshare", "--mount", "sh", "-c", f'mount --bind {own} {shared} && exec "$@"', "sh", *command)

        def watched(node: Node, name: str, *words: str, turn: threading.Lock | None = None, **more: str) -> Watched:
            command = on_machine(name, *start, f"--node-ip-address={node.address}", *words)
            return Watched(node, command, {**environment, **more}, directory / f"ray-{name}.log", pause=3, turn=turn)

        of_head = ("--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={shared}")
        self.head = watched(node, "head", *of_head)
        of_node = (f"--address={address}", "--labels=era=host")
        # Nodes that begin at once on one busy machine keep each other from it, each time anew: Ray gives each 30 s.
        turn = threading.Lock()
        self.nodes = [
            watched(host.node, host.directory.name, *of_node, turn=turn, ERA_DATA_DIR=str(host.directory))
            for host in hosts
        ]
        driver = on_machine("head", str(ERA), "serve", "--cluster", address, "--label", "era=host")
        self.driver = Watched(node, driver, {**settings, **environment}, directory / "driver.log")

    def start(self) -> None:
        """Start all, one after the other: each is most of what a small machine can do."""
        self.head.start()
        for each, before in zip((*self.nodes, self.driver), (self.head, *self.nodes), strict=True):
            assert eventually(before.has_begun, RAY_SECONDS), before.log
            each.start()

    def kill(self, program: str, among: Watched) -> None:
        """`kill -9` a program of Ray's, if it is there."""
        for pid in descendants(among.pid):
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0].endswith(f"/{program}"):
                    os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Stop the driver, which stops the hosts, then Ray."""
        self.driver.stop()
        self.driver.wait(time.monotonic() + 2 * STOP_SECONDS)
        below = [pid for each in (*self.nodes, self.head) for pid in each.stop()]
        for each in (*self.nodes, self.head):
            each.wait(time.monotonic() + STOP_SECONDS)
        eventually(lambda: not any(map(is_running, below)), 10)
        for pid in filter(is_running, below):  # Where its head is gone some stay.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._directory, ignore_errors=True)


@dataclass
class NetworkedCluster:
    """Also what tests/cluster.py's History asks of a cluster. Its clients are at a node of their own."""

    network: Network
    clients: Node
    database_node: Node
    s3_node: Node
    hosts: list[NetworkedHost]
    postgres: Postgres
    s3: Radosgw
    database: str
    lease_seconds: float
    outage_seconds: float = 25.0
    """For which S3 is gone at least, when it is."""

    ray: Ray | None = None

    def told(self) -> list[dict[str, Any]]:
        return [{"url": host.url} for host in self.hosts]

    def server(self, number: int) -> Server:
        return Server(self.hosts[number].directory, url=self.hosts[number].url)

    def client(self, number: int, seconds: float = 30) -> httpx.Client:
        return self.server(number).client(headers={"Authorization": f"Bearer {KEY}"}, timeout=seconds)

    def is_ready(self, number: int) -> bool:
        try:
            with self.client(number, 2) as client:
                return client.get("/ready").status_code == 200
        except (httpx.HTTPError, OSError):
            return False

    def all_ready(self) -> bool:
        return all(map(self.is_ready, range(len(self.hosts))))


@contextmanager
def networked_cluster(
    directory: Path, hosts: int, lease_seconds: float = 5, *, under_ray: bool = False
) -> Iterator[NetworkedCluster]:
    """Such a cluster for as long as the block lasts, and this thread on the clients' node."""
    with ExitStack() as stack:
        network = Network()
        stack.callback(network.close)
        clients, database_node, s3_node = (network.node(number) for number in (1, 2, 3))
        stack.enter_context(inside(clients))
        pg_directory = directory_of_server()
        stack.callback(shutil.rmtree, pg_directory)
        postgres = Postgres(pg_directory, address=database_node.address, prefix=database_node.command())
        postgres.start()
        stack.callback(postgres.stop)
        database = postgres.make_database(empty=True)
        s3_directory = Path(tempfile.mkdtemp(prefix="era-s3-"))
        stack.callback(shutil.rmtree, s3_directory)
        s3 = Radosgw(s3_directory, s3_node.address, s3_node.command())
        stack.callback(s3.kill)
        s3.start()
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        s3.make_bucket("cluster")
        directory.mkdir()
        base = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
        base.pop("PYTHONDONTWRITEBYTECODE", None)
        base |= {
            **keys,
            "ERA_ISOLATION": "bubblewrap",
            "ERA_SPARES": "0",
            "ERA_API_KEY": KEY,
            "ERA_CLUSTER_SECRET": "a secret that hosts on a network know",
            "ERA_SHARED_DIR": str(directory / "shared"),
            "ERA_DATABASE_URL": f"postgresql://postgres@{database_node.address}:5432/{database}",
            "ERA_BLOBS": s3.url("cluster"),
            "ERA_PORT": str(_PORT),
            "ERA_LEASE_SECONDS": str(lease_seconds),
        }
        made = []
        for number in range(hosts):
            node, data_dir = network.node(10 + number), directory / f"host-{number + 1}"
            own = {"ERA_HOST": node.address, "ERA_DATA_DIR": str(data_dir)}
            made.append(NetworkedHost(node, data_dir, {**base, **own}, under_ray=under_ray))
        cluster = NetworkedCluster(
            network, clients, database_node, s3_node, made, postgres, s3, database, lease_seconds
        )
        if under_ray:
            cluster.ray = Ray(network.node(4), made, directory, base)
            stack.callback(_end_hosts, cluster)
            stack.callback(cluster.ray.stop)
            stack.callback(network.heal)
            cluster.ray.start()
        else:
            stack.callback(_stop, cluster)
            for host in made:
                assert host.watched is not None
                host.watched.start()
        assert eventually(cluster.all_ready, RAY_SECONDS if under_ray else START_SECONDS), made[0].log
        yield cluster


def _stop(cluster: NetworkedCluster) -> None:
    cluster.network.heal()
    watched = [host.watched for host in cluster.hosts if host.watched is not None]
    below = [pid for each in watched for pid in each.stop()]
    until = time.monotonic() + STOP_SECONDS
    for each in watched:
        each.wait(until)
    assert eventually(lambda: not any(map(is_running, below))), "a host left processes"


def _end_hosts(cluster: NetworkedCluster) -> None:
    """End the hosts that Ray was to end, and couldn't any more."""
    for host in cluster.hosts:
        host.signal(signal.SIGTERM)
    assert eventually(lambda: not any(host.pid and is_running(host.pid) for host in cluster.hosts))
