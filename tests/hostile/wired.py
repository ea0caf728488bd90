"""A cluster on a network of its own (wires.py): hosts, PostgreSQL and S3, each at a place of which any may be cut off
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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.cluster import KEY
from tests.conftest import START_SECONDS, STOP_SECONDS, Server, descendants, eventually, is_running
from tests.hostile.wires import Place, Wires, inside
from tests.postgres import Postgres, binaries, directory_of_server
from tests.store.s3 import ACCESS_KEY, SECRET_KEY, Radosgw

_PORT = 8787

_SHIFTED_CLOCK = Path(__file__).parent / "shifted_clock.py"


@dataclass
class WiredHost:
    """A host, which is started anew when it ends."""

    place: Place
    directory: Path
    settings: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    codes: list[int] = field(default_factory=list)
    """With which it has ended, each time."""

    stopping: bool = False

    def __post_init__(self) -> None:
        self.set_clock(0)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://{self.place.address}:{_PORT}"

    @property
    def log(self) -> str:
        return self._beside("log").read_text(errors="replace")

    @property
    def _clock(self) -> Path:
        return self._beside("clock")

    def _beside(self, kind: str) -> Path:
        return self.directory.parent / f"{self.directory.name}.{kind}"

    def set_clock(self, seconds: float) -> None:
        """Have its clock be off by so much."""
        with open(os.open(self._clock, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(struct.pack("d", seconds))

    def watch(self) -> None:
        """Start it again and again, until it is to stop."""
        ends_with_us = ("setpriv", "--pdeathsig", "TERM")
        command = (*ends_with_us, sys.executable, "-P", str(_SHIFTED_CLOCK), str(self._clock), "serve")
        while not self.stopping:
            with self._beside("log").open("ab") as log:
                self.process = subprocess.Popen(
                    self.place.command(*command),
                    env=dict(self.settings),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.codes.append(self.process.wait())
            time.sleep(0.5)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It doesn't go on within the block."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)


@dataclass
class WiredCluster:
    """Also what tests/cluster.py's History asks of a cluster. Its clients are at a place of their own."""

    wires: Wires
    clients: Place
    rows: Place
    content: Place
    hosts: list[WiredHost]
    postgres: Postgres
    s3: Radosgw
    database: str
    lease_seconds: float
    outage_seconds: float = 25.0
    """For which S3 is gone at least, when it is."""

    threads: list[threading.Thread] = field(default_factory=list)

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
def wired(directory: Path, hosts: int, lease_seconds: float = 5) -> Iterator[WiredCluster]:
    """Such a cluster for as long as the block lasts, and this thread at the clients' place."""
    commands = binaries()
    assert commands is not None
    with ExitStack() as stack:
        wires = Wires()
        stack.callback(wires.close)
        clients, rows, content = (wires.place(number) for number in (1, 2, 3))
        stack.enter_context(inside(clients))
        pg_directory = directory_of_server()
        stack.callback(shutil.rmtree, pg_directory)
        postgres = Postgres(commands, pg_directory, address=rows.address, there=rows.command())
        postgres.start()
        stack.callback(postgres.stop)
        database = postgres.make_database(empty=True)
        s3_directory = Path(tempfile.mkdtemp(prefix="era-s3-"))
        stack.callback(shutil.rmtree, s3_directory)
        s3 = Radosgw(s3_directory, content.address, content.command())
        stack.callback(s3.kill)
        s3.start()
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        s3.make_bucket("wired")
        directory.mkdir()
        base = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
        base.pop("PYTHONDONTWRITEBYTECODE", None)
        base |= {
            **keys,
            "ERA_ISOLATION": "bubblewrap",
            "ERA_SPARES": "0",
            "ERA_API_KEY": KEY,
            "ERA_CLUSTER_SECRET": "a secret that hosts on wires know",
            "ERA_SHARED_DIR": str(directory / "shared"),
            "ERA_DATABASE_URL": f"postgresql://postgres@{rows.address}:5432/{database}",
            "ERA_BLOBS": s3.url("wired"),
            "ERA_PORT": str(_PORT),
            "ERA_LEASE_SECONDS": str(lease_seconds),
        }
        made = []
        for number in range(hosts):
            place = wires.place(10 + number)
            own = {"ERA_HOST": place.address, "ERA_DATA_DIR": str(directory / f"host-{number + 1}")}
            made.append(WiredHost(place, directory / f"host-{number + 1}", {**base, **own}))
        cluster = WiredCluster(wires, clients, rows, content, made, postgres, s3, database, lease_seconds)
        stack.callback(_stop, cluster)
        for host in made:
            thread = threading.Thread(target=host.watch, daemon=True)
            thread.start()
            cluster.threads.append(thread)
        assert eventually(cluster.all_ready, 2 * START_SECONDS), made[0].log
        yield cluster


def _stop(cluster: WiredCluster) -> None:
    cluster.wires.mend()
    below: list[int] = []
    for host in cluster.hosts:
        host.stopping = True
        if host.process is not None and host.process.poll() is None:
            below += descendants(host.process.pid)
            host.signal(signal.SIGCONT)
            host.signal(signal.SIGTERM)
    until = time.monotonic() + STOP_SECONDS
    for host, thread in zip(cluster.hosts, cluster.threads, strict=True):
        thread.join(max(until - time.monotonic(), 0.1))
        if thread.is_alive():
            host.signal(signal.SIGKILL)
            thread.join()
    assert eventually(lambda: not any(map(is_running, below))), "a host left processes"
