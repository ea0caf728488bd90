"""Hosts of a cluster whose content is in S3: they have one prefix together, which is backed up as one server's."""

from __future__ import annotations

import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import pytest

from era.app import collect
from era.choices import blob_store
from era.errors import Conflict
from era.operation.backup import restore
from era.operation.check import check
from era.operation.server_data import ServerData
from era.server.directory_locks import sharing
from era.settings import Settings
from tests.client.command import era
from tests.cluster import KEY, LEASE_SECONDS, Cluster, running
from tests.conftest import eventually
from tests.operation.under_load import quiet
from tests.postgres import Postgres
from tests.store.s3 import S3

WRITE = "import pathlib; pathlib.Path('n.bin').write_bytes(bytes([7]) * 300_000); print('x' * 100_000)"


def host(directory: Path, number: int, s3: S3, bucket: str) -> Settings:
    shared = directory / "shared"
    shared.mkdir(exist_ok=True)
    (directory / str(number)).mkdir()
    return Settings(data_dir=directory / str(number), shared_dir=shared, blobs=s3.url(bucket))


def test_hosts_are_one_installation(s3: S3, bucket: str, tmp_path: Path) -> None:
    first, other = (blob_store(host(tmp_path, number, s3, bucket)) for number in range(2))
    try:
        first.open()
        other.open()
        with first.batch() as batch:
            digest = batch.put(b"of the cluster")
        assert other.get(digest) == b"of the cluster"
    finally:
        first.close()
        other.close()
    (tmp_path / "elsewhere").mkdir()
    stranger = blob_store(host(tmp_path / "elsewhere", 0, s3, bucket))
    with pytest.raises(Conflict, match="another installation"):
        stranger.open()
    stranger.close()
    shared = ServerData(tmp_path / "shared", None, s3.url(bucket))
    with shared.content() as content, content.open(digest) as file:
        assert file.read() == b"of the cluster"


def test_nothing_is_collected_while_a_host_runs(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "host", shared_dir=tmp_path / "shared")
    settings.data_dir.mkdir()
    with sharing(settings):
        for stopped in (settings, Settings(data_dir=tmp_path / "shared")):
            with pytest.raises(Conflict, match="uses"):
                asyncio.run(collect(stopped))
    assert asyncio.run(collect(settings)) == 0
    assert (tmp_path / "shared" / "era.sqlite").is_file()
    assert not (tmp_path / "host" / "era.sqlite").exists()


@pytest.mark.soak
def test_a_cluster_in_postgresql_and_s3(tmp_path: Path, s3: S3, bucket: str, postgres: Postgres) -> None:
    database, blobs = postgres.url(postgres.make_database(empty=True)), s3.url(bucket)
    env = {"ERA_DATABASE_URL": database, "ERA_BLOBS": blobs}
    shared = tmp_path / "cluster" / "shared"
    with running(tmp_path / "cluster", 2, **env) as cluster, cluster.clients() as hosts:
        for session, client in zip("ab", hosts, strict=True):
            made = {"session_id": session, "language": "python"}
            assert client.post("/api/sessions", json=made).status_code == 201
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda n: written(hosts[n % 2], "ab"[n // 2 % 2]), range(16)))
        era(None, "backup", "--data-dir", shared, tmp_path / "backup", code=0, env=env)
        cluster.kill(0)
        assert eventually(lambda: is_served(cluster, "a"))
        era(None, "check", "--data-dir", shared, code=0, env=env)
        refused = era(None, "gc", "--data-dir", shared, code=2, env=env)
        assert "uses" in refused.stderr
        assert eventually(lambda: cluster.is_ready(0)), "what the killed one left goes when it starts anew"
    era(None, "gc", "--data-dir", shared, code=0, env=env)
    era(None, "check", "--data-dir", shared, code=0, env=env)
    restore(tmp_path / "backup", ServerData(tmp_path / "alone"), quiet)
    assert check(ServerData(tmp_path / "alone"), quiet).problems == []


QUICK = """
import era.core.trees.snapshots, era.core.operation.garbage, era.store.blobs.s3_blobs, era.store.blobs.s3_shared
era.core.operation.garbage._PERIOD_SECONDS = era.core.operation.garbage._FENCE_PAUSE_SECONDS = 0.3
era.core.trees.snapshots.Snapshots.__init__.__kwdefaults__["grace_seconds"] = 10.0
era.store.blobs.s3_blobs._FRESH_SECONDS = 0.0
era.store.blobs.s3_shared._SIGNED_SECONDS, era.store.blobs.s3_shared._REMOVAL_SECONDS = 3.0, 6.0
"""
"""Collections of garbage come one after the other, and find old what was put ten seconds ago."""


@dataclass
class Writer:
    """Somebody who writes a file in a session, again and again, and looks whether it is there."""

    session: str
    cluster: Cluster
    possible: set[int] = field(default_factory=lambda: {0})
    """What the file may hold: what was acknowledged last, and what was sent since then."""

    acknowledged: int = 0
    failures: int = 0

    def write(self, over: threading.Event) -> None:
        number = 0
        while not over.is_set():
            number += 1
            self.possible.add(number)
            try:
                with self.client(number) as client:
                    code = f"open('n', 'w').write('{number:09d}' * 5000)"
                    done = client.post(f"/api/sessions/{self.session}/run", json={"code": code})
                    if done.status_code == 200 and done.json()["status"] == "ok":
                        self.possible, self.acknowledged = {number}, self.acknowledged + 1
                    if number % 5 == 0:
                        self.look(client)
            except (httpx.HTTPError, OSError):  # the host was killed, or is paused
                self.failures += 1
                over.wait(0.3)

    def look(self, client: httpx.Client) -> None:
        found = client.get(f"/api/sessions/{self.session}/files/n")
        if found.status_code != 503:
            assert found.status_code == 200, found.text
            assert found.text in {f"{number:09d}" * 5000 for number in self.possible}

    def client(self, number: int) -> httpx.Client:
        server = self.cluster.server(number % 2)
        return server.client(headers={"Authorization": "Bearer " + KEY}, timeout=30)


@pytest.mark.soak
def test_garbage_goes_while_hosts_work(tmp_path: Path, s3: S3, bucket: str) -> None:
    """While one of them is paused past its lease, and goes on, and the one that collects is killed."""
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "sitecustomize.py").write_text(QUICK)
    env = {"ERA_BLOBS": s3.url(bucket), "ERA_VERSIONS_KEPT": "1"}
    shared, over = tmp_path / "cluster" / "shared", threading.Event()
    with running(tmp_path / "cluster", 2, **env, PYTHONPATH=str(tmp_path / "quick")) as cluster:
        writers = [Writer(name, cluster) for name in "abcd"]
        with cluster.server(0).client(headers={"Authorization": "Bearer " + KEY}) as client:
            for writer in writers:
                made = {"session_id": writer.session, "language": "python"}
                assert client.post("/api/sessions", json=made).status_code == 201
        with ThreadPoolExecutor(len(writers)) as threads:
            writing = [threads.submit(writer.write, over) for writer in writers]
            try:
                assert eventually(lambda: collected(cluster) > 20, 60), "garbage goes"
                with cluster.paused(1):
                    over.wait(LEASE_SECONDS * 1.5)
                leading = 0 if collected(cluster, 0) else 1
                cluster.kill(leading)
                before = collected(cluster)
                assert eventually(lambda: collected(cluster) > before + 20, 90), "and goes on to"
            finally:
                over.set()
            for each in writing:
                each.result()
        assert all(cluster.is_ready(number) or eventually(partial(cluster.is_ready, number)) for number in range(2))
        for writer in writers:
            assert writer.acknowledged > 5
            with writer.client(0) as client:
                assert eventually(partial(served, client, writer.session))
                writer.look(client)
        assert eventually(lambda: len(s3.names(bucket)) < 40, 60), "all of it went"
    era(None, "check", "--data-dir", shared, code=0, env=env)


def collected(cluster: Cluster, *hosts: int) -> int:
    """How many blobs these hosts, or all, say that they have removed."""
    logs = "".join(cluster.log(number) for number in hosts or range(2))
    return sum(int(found[1]) for found in re.finditer(r"garbage_collected.*?blobs=(\d+)", logs))


def served(client: httpx.Client, session: str) -> bool:
    return client.get(f"/api/sessions/{session}/files/n").status_code == 200


def written(client: httpx.Client, session: str) -> None:
    answer = client.post(f"/api/sessions/{session}/run", json={"code": WRITE}).json()
    assert answer["status"] == "ok", answer


def is_served(cluster: Cluster, session: str) -> bool:
    """Whether the host that wasn't killed has the session's files, and runs in it."""
    with cluster.server(1).client(headers={"Authorization": "Bearer " + KEY}) as client:
        found = client.get(f"/api/sessions/{session}/files/n.bin")
        if found.status_code != 200:
            return False
        assert found.content == bytes([7]) * 300_000
        return bool(client.post(f"/api/sessions/{session}/run", json={"code": WRITE}).status_code == 200)
