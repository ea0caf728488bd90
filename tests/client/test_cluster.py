"""`era cluster`, and what a host of a cluster is refused; what a cluster does is in tests/api/test_cluster.py."""

from __future__ import annotations

import os
import signal
import sqlite3
import ssl
import subprocess
import sys
from argparse import Namespace
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from era.client import cluster as command
from era.client.output import Failure
from era.cluster import local
from era.cluster.host_process import SERVE
from era.errors import NotReady
from era.server.preflight import check_cluster
from era.settings import Settings
from tests.client.command import era
from tests.cluster import running
from tests.conftest import eventually

SECRET = "a secret of thirty-two characters"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cluster_secret": SECRET}, "ERA_SHARED_DIR"),
        ({"shared_dir": "shared"}, "ERA_CLUSTER_SECRET"),
        ({"shared_dir": "data", "cluster_secret": SECRET}, "ERA_DATA_DIR"),
        ({"shared_dir": "shared", "cluster_secret": SECRET, "host": "0.0.0.0"}, "ERA_HOST_URL"),
    ],
)
def test_a_host_that_the_others_could_not_use(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(NotReady, match=said):
        check_cluster(Settings(**{"data_dir": Path("data"), **settings}))
    check_cluster(Settings())


def test_what_cannot_be_started_or_stopped(tmp_path: Path) -> None:
    where = ("--dir", str(tmp_path))
    assert "No cluster runs in" in era(None, "cluster", "down", *where, code=2).stderr
    assert "--hosts" in era(None, "cluster", "up", *where, "--hosts", "0", code=2).stderr
    # Also one that isn't up yet can be told to stop.
    takes = f"from era.client import cluster as c; c._take_lock(c.Path({str(tmp_path)!r})); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", takes], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert f"by process {process.pid}" in era(None, "cluster", "up", *where, code=2).stderr
        era(None, "cluster", "down", *where)
        assert process.wait() == -signal.SIGTERM
    assert "No cluster runs in" in era(None, "cluster", "down", *where, code=2).stderr


def test_down_ends_hosts_that_nobody_watches_over(tmp_path: Path) -> None:
    """Hosts are left so when Ray's driver or head is killed, and then the command."""
    data = tmp_path / "host-2"
    data.mkdir()
    settings = {"ERA_DATA_DIR": str(data), "ERA_PORT": "0", "ERA_ISOLATION": "bubblewrap", "ERA_SPARES": "0"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")} | settings
    with (tmp_path / "log").open("w+b") as log, subprocess.Popen(SERVE, env=environment, stdout=log) as host:
        try:
            assert eventually(lambda: b"ERA serves" in (tmp_path / "log").read_bytes())
            era(None, "cluster", "down", "--dir", str(tmp_path))
            assert host.wait(60) is not None
        finally:
            host.kill()
    assert "No cluster runs in" in era(None, "cluster", "down", "--dir", str(tmp_path), code=2).stderr


def test_down_names_hosts_that_it_could_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "has_hosts", lambda _: True)
    monkeypatch.setattr(local, "end_hosts", lambda _: {"host-1": 4711, "host-3": 4713})
    with pytest.raises(Failure, match=r"host-1 \(process 4711\), host-3 .*kill -9 4711 4713"):
        command.down(Namespace(dir=tmp_path))


@pytest.mark.slow
def test_hosts_on_one_machine_talk_over_tls(tmp_path: Path) -> None:
    directory = tmp_path / "cluster"

    def ports_of_hosts() -> list[str]:
        """Where the hosts that are alive are called by each other."""
        with closing(sqlite3.connect(directory / "shared" / "era.sqlite")) as database:
            return [url for (url,) in database.execute("SELECT url FROM hosts WHERE NOT dead ORDER BY started_at")]

    with running(directory, 2, "--tls") as cluster:
        files = sorted((directory / "tls").iterdir())
        assert [file.name for file in files] == [
            "authority.pem",
            "host-1.key",
            "host-1.pem",
            "host-2.key",
            "host-2.pem",
        ]
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
        with cluster.clients() as [home, other]:
            assert home.post("/api/sessions", json={"session_id": "s", "language": "python"}).status_code == 201
            for client in (home, other):
                assert client.post("/api/sessions/s/run", json={"code": "print(1)"}).status_code == 200
        urls = ports_of_hosts()
        assert len(urls) == 2
        trusting = ssl.create_default_context(cafile=str(directory / "tls" / "authority.pem"))
        for url in urls:
            assert url.startswith("https://")
            with pytest.raises(httpx.HTTPError):  # whoever shows no certificate gets no answer
                httpx.get(f"{url}/health", verify=trusting)

        # One that is started anew has its certificate again.
        pid = cluster.pid(1)
        cluster.kill(1)
        assert eventually(lambda: cluster.pid(1) != pid and cluster.is_ready(1))
        with cluster.clients() as [_, again]:
            assert eventually(lambda: again.post("/api/sessions/s/run", json={"code": "print(1)"}).status_code == 200)
        # Where it is called its row says from the first heartbeat on.
        assert eventually(lambda: all(url.startswith("https://") for url in ports_of_hosts()))
        assert len(set(ports_of_hosts()) - set(urls)) <= 1
