"""Hosts of a cluster whose content is in S3: they have one prefix together, which is backed up as one server's."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from era.app import blob_store, collect
from era.directory_locks import sharing
from era.errors import Conflict
from era.operation.backup import restore
from era.operation.check import check
from era.operation.server_data import ServerData
from era.settings import Settings
from tests.client.command import era
from tests.cluster import KEY, Cluster, running
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
        with pytest.raises(BlockingIOError, match="era gc"):
            other.sweep(set(), 0.0)
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
    era(None, "gc", "--data-dir", shared, code=0, env=env)
    era(None, "check", "--data-dir", shared, code=0, env=env)
    restore(tmp_path / "backup", ServerData(tmp_path / "alone"), quiet)
    assert check(ServerData(tmp_path / "alone"), quiet).problems == []


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
