"""Hosts under a real Ray: started by its actors, killed, drained and stopped, with rows in PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from era.cluster.host_process import NOTE
from era.drivers.cgroups import cgroup_name
from tests.cluster import KEY, History
from tests.conftest import ERA, Server, assert_nothing_left, descendants, eventually, free_port, is_running, mounts
from tests.postgres import Postgres

pytestmark = pytest.mark.soak

PACKAGES = Path(__file__).parent.parent.parent / ".tools" / "ray"
RAY_SECONDS = 300.0
"""A busy machine takes a minute to start Ray."""


START = (sys.executable, "-m", "ray.scripts.scripts", "start", "--object-store-memory=80000000")


HEAD_ID = "f" * 51 + "00000"
OF_AUTOSCALER = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


def autoscaler(port: int, directory: Path) -> dict[str, Any]:
    """What Ray's autoscaler is told: where the head listens, and which nodes it may make."""
    head = {"resources": {}, "node_config": {}, "max_workers": 0}
    host = {
        "resources": {"era_host": 1, "object_store_memory": 80_000_000},
        "labels": {"era": "yes"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 3,
    }
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    nothing: dict[str, Any] = {f"{name}_commands": [] for name in commands} | {
        "file_mounts": {},
        "cluster_synced_files": [],
    }
    return nothing | {
        "cluster_name": "era",
        "max_workers": 3,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": "tests.hostile.ray_nodes.Nodes",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "port": port,
            "directory": str(directory),
        },
        "auth": {"ssh_user": "nobody"},
        "available_node_types": {"ray.head.default": head, "host": host},
        "head_node_type": "ray.head.default",
    }


def has_ended(pid: int) -> bool:
    return not is_running(pid)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a node of Ray, and wait for its processes. Where Ray's head is gone some of them stay, and are killed."""
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait(RAY_SECONDS)
    eventually(lambda: not any(map(is_running, below)), 10)
    for pid in filter(is_running, below):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not any(map(is_running, below)))


@dataclass
class RayCluster:
    """A Ray of one node on this machine, and what commands of `era` need for it."""

    directory: Path
    environment: dict[str, str]
    autoscaled: bool = False
    """Whether Ray's autoscaler makes its other nodes, and takes them."""

    directories_of_ray: list[Path] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    """Of the hosts that a history is about."""

    def start_head(self) -> None:
        """Start Ray's head, a new one if there was one before."""
        # Ray gives its node 30 s to begin, which aren't enough on every busy machine.
        for _ in range(5):
            log = self._try_to_start_head()
            if "timed out during startup" not in log:
                break
        assert self.address, log

    def _try_to_start_head(self) -> str:
        """Start Ray's head, and learn its address; what it said, if it has none."""
        # Its sockets' names must be short.
        directory = Path(f"/tmp/era-ray-{os.getpid()}-{len(self.directories_of_ray)}")
        self.directories_of_ray.append(directory)
        port = free_port() if self.autoscaled else 0
        options = ["--head", "--block", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
        options += ["--disable-usage-stats", f"--temp-dir={directory}"]
        # What nodes need of hosts is for their actors only: the driver tells them.
        environment = {name: value for name, value in self.environment.items() if not name.startswith("ERA_")}
        if self.autoscaled:
            config = self.directory / "autoscaler.json"
            config.write_text(json.dumps(autoscaler(port, self.directory)))
            options.append(f"--autoscaling-config={config}")
            environment |= OF_AUTOSCALER
        log = self.directory / f"ray-{len(self.directories_of_ray)}.log"
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*START, *options], env=environment, stdout=out, stderr=out, cwd=self.directory
            )

        def address() -> str:
            found = re.search(r"--address='([0-9.]+:[0-9]+)'", log.read_text())
            return found[1] if found else ""

        assert eventually(lambda: address() or self.process.poll() is not None, RAY_SECONDS), log.read_text()
        self.address = address()
        return "" if self.address else log.read_text()

    def told(self) -> list[dict[str, Any]]:
        """As History asks."""
        return [{"url": url} for url in self.urls]

    def server(self, number: int) -> Server:
        return Server(self.directory, url=self.urls[number])

    def era(self, *words: str, code: int = 0) -> Any:
        """Run a command with --json; what it printed."""
        command = [str(ERA), *words, "--cluster", self.address, "--json"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=RAY_SECONDS)
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    def host(self, url: str) -> dict[str, Any]:
        """What is known of the host at this URL, or at none."""
        (host,) = [host for host in self.era("host", "list")["hosts"] if host["url"] == url]
        assert isinstance(host, dict)
        return host

    def drain_node(self, node: str) -> None:
        """Tell Ray that this node is going to be taken away."""
        command = [*START[:3], "drain-node", f"--address={self.address}", f"--node-id={node}"]
        command += [
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=a test",
            "--deadline-remaining-seconds=600",
        ]
        subprocess.run(command, env=self.environment, check=True, timeout=RAY_SECONDS)

    @contextmanager
    def another_node(self, data_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A second node of Ray, whose host has this directory."""
        environment = {**self.environment, "ERA_DATA_DIR": str(data_dir)}
        with (self.directory / "node.log").open("ab") as log:
            process = subprocess.Popen(
                [*START, f"--address={self.address}", "--block", "--num-cpus=0"],
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            stop(process)

    @contextmanager
    def driver(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """`era serve --cluster` for as long as the block lasts, if it isn't ended before."""
        command = [str(ERA), "serve", "--cluster", self.address, *words]
        with (self.directory / "driver.log").open("ab") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    def log(self) -> str:
        return (self.directory / "driver.log").read_text()

    def serves(self, process: subprocess.Popen[bytes]) -> str:
        """Wait until the driver says where the cluster serves; that URL."""
        before = self.log().count("ERA serves")
        assert eventually(lambda: self.log().count("ERA serves") > before or process.poll() is not None, RAY_SECONDS)
        return str(re.findall(r"ERA serves\s+(http://\S+)", self.log())[-1])

    def client(self, url: str) -> httpx.Client:
        return Server(self.directory, url=url).client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60)


@pytest.fixture
def ray(tmp_path: Path, postgres_url: str) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path, postgres_url) as cluster:
        yield cluster


@pytest.fixture
def autoscaled_ray(tmp_path: Path, postgres_url: str) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path, postgres_url, autoscaled=True) as cluster:
        yield cluster


@contextmanager
def ray_cluster(tmp_path: Path, postgres_url: str, *, autoscaled: bool = False) -> Iterator[RayCluster]:
    if not (PACKAGES / "ray").is_dir():
        pytest.skip("there is no Ray here: scripts/setup --soak")
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ERA_", "RAY_", "PYTHON"))}
    environment |= {
        "HOME": str(home),
        "PYTHONPATH": f"{PACKAGES}:{PACKAGES.parent.parent}",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_AUTH_MODE": "token",
        "ERA_ISOLATION": "bubblewrap",
        "ERA_SPARES": "0",
        "ERA_API_KEY": KEY,
        "ERA_PORT": "0",
        "ERA_DATA_DIR": str(tmp_path / "host"),
        "ERA_SHARED_DIR": str(tmp_path / "shared"),
        "ERA_CLUSTER_SECRET": "a secret of the cluster's own, long enough",
        "ERA_DATABASE_URL": postgres_url,
    }
    (tmp_path / "driver.log").touch()
    before = mounts()
    cluster = RayCluster(tmp_path, environment, autoscaled)
    try:
        cluster.start_head()
        yield cluster
    finally:
        below = descendants(cluster.process.pid)
        stop(cluster.process)
        # A test that failed may have left its hosts; their actors would start them again.
        for note in tmp_path.glob(f"*/{NOTE}"):
            pid = json.loads(note.read_text())["pid"]
            if pid and is_running(pid):
                os.kill(pid, signal.SIGTERM)
                assert eventually(partial(has_ended, pid))
        for directory in cluster.directories_of_ray:
            shutil.rmtree(directory, ignore_errors=True)
    assert_nothing_left(before, below, tmp_path / "host", cgroup_name(tmp_path / "host"))


def test_a_host_under_ray(ray: RayCluster, postgres: Postgres) -> None:
    with ray.driver() as driver:
        url = ray.serves(driver)
        with ray.client(url) as client:
            assert client.post("/api/sessions", json={"session_id": "s", "language": "python"}).status_code == 201
            written = client.post("/api/sessions/s/run", json={"code": "open('f', 'w').write('kept')"})
            assert written.status_code == 200, written.text

            # A host that is killed is started anew, with its address, and has its sessions.
            first = ray.host(url)
            assert (first["state"], first["url"]) == ("ready", url)
            os.kill(first["pid"], signal.SIGKILL)
            killed = time.monotonic()
            body = {"code": "print(open('f').read())"}
            assert eventually(lambda: answers(client, body) == "kept\n")
            print(f"usable again {time.monotonic() - killed:.2f} s after kill -9")
            again = ray.host(url)
            assert again["pid"] != first["pid"]
            assert again["restarts"] == 1

            # An actor that is killed is restarted, and adopts the host. So does a new driver.
            (actor,) = [pid for pid in descendants(ray.process.pid) if "HostActor" in command_of(pid)]
            os.kill(actor, signal.SIGKILL)
            assert eventually(lambda: not is_running(actor))
            assert answers(client, body) == "kept\n"
            driver.kill()
            driver.wait()
            assert answers(client, body) == "kept\n"

    with ray.driver() as driver:
        assert ray.serves(driver) == url
        assert ray.host(url)["pid"] == again["pid"]

        # Its programs are kept from all nodes of Ray.
        variables = Path(f"/proc/{ray.host(url)['pid']}/environ").read_bytes().split(b"\0")
        assert f"ERA_EGRESS_REFUSED={ray.address.rpartition(':')[0]}".encode() in variables

        # Programs can't reach Ray, by any of the machine's addresses, though others can.
        with ray.client(url) as client:
            port = int(ray.address.rpartition(":")[2])
            for address in (ray.address.rpartition(":")[0], "127.0.0.1"):
                program = f"import socket; socket.create_connection(({address!r}, {port}), 5).close()"
                subprocess.run([sys.executable, "-c", program], check=True)
                tried = client.post("/api/execute", json={"code": program, "language": "python"})
                assert tried.status_code == 200, tried.text
                assert tried.json()["exit_code"] == 1, tried.text

        # Drained: it ends, and isn't started again before it is told to.
        assert ray.era("host", "drain")["hosts"][0]["state"] == "drained"
        time.sleep(3)
        assert ray.host("")["state"] == "drained"
        assert not is_running(again["pid"])
        ray.era("host", "start")
        assert eventually(lambda: answers_at(ray, url) == "kept\n", RAY_SECONDS)

        last = ray.host(url)["pid"]
        below = [last, *descendants(last)]
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(RAY_SECONDS) == 0, ray.log()
    assert not any(map(is_running, below))
    assert ray.era("host", "list") == {"hosts": []}

    # The secrets of the hosts are in nothing that Ray or we have written.
    for file in (*ray.directories_of_ray[0].rglob("*"), *ray.directory.glob("*/*.log*")):
        if file.is_file() and not file.is_symlink():
            assert KEY.encode() not in file.read_bytes(), file


def test_nodes_come_and_go(ray: RayCluster) -> None:
    data_dir = ray.directory / "second"
    with ray.driver() as driver:
        url = ray.serves(driver)
        with ray.another_node(data_dir) as node:
            found = eventually(lambda: ready(ray.log()) - {url}, RAY_SECONDS)
            assert found, ray.log()
            (second,) = found
            with ray.client(second) as client:
                assert client.post("/api/sessions", json={"session_id": "s", "language": "python"}).status_code == 201
                written = client.post("/api/sessions/s/run", json={"code": "open('f', 'w').write('kept')"})
                assert written.status_code == 200, written.text
            host = ray.host(second)

            # Its node's Ray dies, and the host doesn't.
            (raylet,) = [pid for pid in descendants(node.pid) if command_of(pid).split("\0")[0].endswith("/raylet")]
            os.kill(raylet, signal.SIGKILL)
            assert eventually(lambda: "its node is gone" in ray.log(), RAY_SECONDS), ray.log()
        assert is_running(host["pid"])
        assert answers_at(ray, second) == answers_at(ray, url) == "kept\n"

        # It comes back as another node of Ray, which adopts the host.
        with ray.another_node(data_dir):
            assert eventually(lambda: ready(ray.log().rpartition("node is gone")[2]), RAY_SECONDS), ray.log()
            again = ray.host(second)
            assert again["pid"] == host["pid"]
            assert again["node"] != host["node"]

            # Drained before it is taken away, its sessions are at another host at once.
            assert ray.era("host", "drain", again["node"])["hosts"][0]["state"] == "drained"
            assert answers_at(ray, url) == "kept\n"
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(RAY_SECONDS) == 0, ray.log()
    assert not is_running(host["pid"])


def test_a_history_while_rays_head_is_gone(ray: RayCluster) -> None:
    """Its GCS is killed, which ends all of Ray that is on that node, and with it, sooner or later, the other node's."""
    sessions = [f"s{number}" for number in range(8)]
    history = History(ray, sessions, patience=30, pause=0.05)

    def goes_on() -> None:
        before = len(history.answered)
        assert eventually(lambda: len(history.answered) > before + 20), "nothing goes on"

    threads: list[threading.Thread] = []
    try:
        with ray.driver() as driver:
            first = ray.serves(driver)
            with ray.another_node(ray.directory / "second"):
                found = eventually(lambda: ready(ray.log()) - {first}, RAY_SECONDS)
                assert found, ray.log()
                ray.urls = [first, *found]
                pids = {ray.host(url)["pid"] for url in ray.urls}
                with ray.client(first) as client:
                    for session in sessions:
                        made = client.post("/api/sessions", json={"session_id": session, "language": "python"})
                        assert made.status_code == 201, made.text
                threads += [
                    threading.Thread(target=history.append, args=(3 * each,), kwargs={"again": each % 2 == 0})
                    for each in range(4)
                ]
                for thread in threads:
                    thread.start()
                goes_on()
                (gcs,) = [pid for pid in descendants(ray.process.pid) if "gcs_server" in command_of(pid).split("\0")[0]]
                os.kill(gcs, signal.SIGKILL)
                goes_on()
                ray.process.wait(RAY_SECONDS)
                goes_on()
            assert all(map(is_running, pids)), "a host ended with Ray"

        # Another Ray, and a driver of it, which finds the host that is there.
        ray.start_head()
        goes_on()
        with ray.driver() as driver:
            assert ray.serves(driver) == first
            assert ray.host(first)["pid"] in pids
            goes_on()
            history.stop.set()
            for thread in threads:
                thread.join(60)
            with ray.client(ray.urls[1]) as client:
                history.check(client)
                assert client.get("/api/runs", params={"status": "running"}).json()["runs"] == []
            assert history.lost == []
            assert history.unknown == 0, "Ray's end was noticed by a caller"
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(RAY_SECONDS) == 0, ray.log()
    finally:
        history.stop.set()


def test_nodes_are_made_for_load_and_go_without(autoscaled_ray: RayCluster) -> None:
    """By Ray's own autoscaler, whose machines are processes here (ray_nodes.py)."""
    ray = autoscaled_ray
    # The lease is one that a busy machine keeps; what follows its end is tried elsewhere.
    ray.environment |= {"ERA_MAX_WARM": "4", "ERA_IDLE_SECONDS": "15", "ERA_LEASE_SECONDS": "20"}
    sessions = [f"s{number}" for number in range(4)]
    history = History(ray, ["s0"], patience=30, pause=0.2)
    appends = threading.Thread(target=history.append, args=(0,), kwargs={"again": True})
    write = {"code": "open('f', 'w').write('kept')"}
    read = {"code": "print(open('f').read())"}
    bounds = ("--max-hosts", "2", "--scale-down-seconds", "5", "--label", "era=yes")
    try:
        with ray.driver(*bounds) as driver:
            # There is no node for a host yet, and one is to be.
            first = ray.serves(driver)
            ray.urls = [first]
            with ray.client(first) as client:
                for session in sessions:
                    made = client.post("/api/sessions", json={"session_id": session, "language": "python"})
                    assert made.status_code == 201, made.text
                    assert client.post(f"/api/sessions/{session}/run", json=write).status_code == 200
                appends.start()

                # It is full, so another node comes. What is called now has a place there.
                found = eventually(lambda: ready(ray.log()) - {first}, RAY_SECONDS)
                assert found, ray.log()
                ray.urls += found
                pids = {url: ray.host(url)["pid"] for url in ray.urls}

                # Once it isn't needed a node goes, after its host. Its sessions are at the other, with all they had.
                assert eventually(lambda: "isn't needed" in ray.log(), RAY_SECONDS), ray.log()
                assert eventually(lambda: "its node is gone" in ray.log(), RAY_SECONDS), ray.log()
                (left,) = [url for url in ray.urls if is_running(pids[url])]
            with ray.client(left) as client:
                for session in sessions:
                    assert client.post(f"/api/sessions/{session}/run", json=read).json()["stdout"] == "kept\n"

                # Ray is told to drain the last node: its host drains, and another node comes for one.
                ray.drain_node(ray.host(left)["node"])
                replaced = eventually(lambda: ready(ray.log()) - set(ray.urls), RAY_SECONDS)
                assert replaced, ray.log()
                ray.urls = list(replaced)
                assert eventually(lambda: not is_running(pids[left])), ray.log()
            with ray.client(ray.urls[0]) as client:
                for session in sessions:
                    assert client.post(f"/api/sessions/{session}/run", json=read).json()["stdout"] == "kept\n"
                history.stop.set()
                appends.join(60)
                history.check(client)
            assert len(history.answered) > 20
            assert history.lost == []
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(RAY_SECONDS) == 0, ray.log()
    finally:
        history.stop.set()


def ready(log: str) -> set[str]:
    """Where hosts were ready at some time."""
    return set(re.findall(r"^\S+   ready   (http://\S+)", log, re.MULTILINE))


def answers_at(ray: RayCluster, url: str) -> str | None:
    with ray.client(url) as client:
        return answers(client, {"code": "print(open('f').read())"})


def answers(client: httpx.Client, body: dict[str, str]) -> str | None:
    """What a program prints, None where the call isn't answered by a run."""
    try:
        answer = client.post("/api/sessions/s/run", json=body)
    except httpx.HTTPError:
        return None
    return str(answer.json()["stdout"]) if answer.status_code == 200 else None


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
