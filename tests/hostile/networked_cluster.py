"""A cluster on a network of its own (network.py): hosts, PostgreSQL and S3, each on a node of which any may be cut off
from any other, and hosts with clocks of their own.

What watches over the hosts starts anew those that end, as `era cluster up` does on one machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.cluster import KEY
from tests.conftest import START_SECONDS, STOP_SECONDS, Server, descendants, eventually, is_running
from tests.hostile.network import Network, Node, inside
from tests.postgres import Postgres, directory_of_server
from tests.store.s3 import ACCESS_KEY, SECRET_KEY, Radosgw

_PORT = 8787

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

    def _watch(self) -> None:
        """Start it again and again, until it is to stop."""
        while not self.stopping:
            command = self.node.command("setpriv", "--pdeathsig", "TERM", *self.command)
            with self.log_path.open("ab") as log:
                process = self.process = subprocess.Popen(
                    command, env=dict(self.environment), stdout=log, stderr=log, start_new_session=True
                )
            self.codes.append(process.wait())
            time.sleep(0.5)

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
    """A host, which is started anew when it ends."""

    def __init__(self, node: Node, directory: Path, environment: Mapping[str, str]) -> None:
        self.node = node
        self.directory = directory
        self.url = f"http://{node.address}:{_PORT}"
        self.set_clock(0)
        command = (sys.executable, "-P", str(_SHIFTED_CLOCK), str(self._clock), "serve")
        self.watched = Watched(node, command, environment, directory.with_suffix(".log"))

    @property
    def pid(self) -> int:
        return self.watched.pid

    @property
    def log(self) -> str:
        return self.watched.log

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
def networked_cluster(directory: Path, hosts: int, lease_seconds: float = 5) -> Iterator[NetworkedCluster]:
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
            made.append(NetworkedHost(node, data_dir, {**base, **own}))
        cluster = NetworkedCluster(
            network, clients, database_node, s3_node, made, postgres, s3, database, lease_seconds
        )
        stack.callback(_stop, cluster)
        for host in made:
            host.watched.start()
        assert eventually(cluster.all_ready, START_SECONDS), made[0].log
        yield cluster


def _stop(cluster: NetworkedCluster) -> None:
    cluster.network.heal()
    watched = [host.watched for host in cluster.hosts]
    below = [pid for each in watched for pid in each.stop()]
    until = time.monotonic() + STOP_SECONDS
    for each in watched:
        each.wait(until)
    assert eventually(lambda: not any(map(is_running, below))), "a host left processes"
