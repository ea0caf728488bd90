"""The whole service with its blobs in a bucket."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable

from tests.conftest import Server
from tests.store.s3 import S3, SECRET_KEY, FaultyS3

APPEND = "open('log', 'a').write('x'); print(open('log').read(), end='')"


def run(server: Server, session: str, code: str = APPEND) -> tuple[int, dict[str, object]]:
    with server.client() as client:
        answer = client.post(f"/api/sessions/{session}/run", json={"code": code})
        return answer.status_code, answer.json()


def test_files_outlive_the_service_and_its_cache(own_server: Callable[..., Server], s3: S3, bucket: str) -> None:
    server = own_server(blobs=s3.url(bucket))
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
    for count in range(1, 4):
        assert run(server, "s")[1]["stdout"] == "x" * count
        server.stop(signal.SIGKILL if count % 2 else signal.SIGTERM)
        shutil.rmtree(server.data_dir / "blob-cache")
        server.start()
    assert not (server.data_dir / "blobs").exists()
    assert SECRET_KEY not in server.log


def test_a_bucket_that_fails_costs_only_that_run(
    own_server: Callable[..., Server], s3: S3, bucket: str, faulty: FaultyS3
) -> None:
    server = own_server(blobs=s3.url(bucket, endpoint=faulty.endpoint))
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
    assert run(server, "s")[1]["stdout"] == "x"
    faulty.fail_all(True)
    status, told = run(server, "s")
    assert (status, told["code"]) == (503, "commit_failed")
    assert run(server, "s", "print(open('log').read())")[1]["stdout"] == "x\n", "the cache has what it needs"
    faulty.fail_all(False)
    assert run(server, "s")[1]["stdout"] == "xx"
    assert SECRET_KEY not in server.log


def test_another_installations_prefix_is_refused(own_server: Callable[..., Server], s3: S3, bucket: str) -> None:
    server = own_server(blobs=s3.url(bucket))
    other = Server(server.data_dir.parent / "other", {"ERA_BLOBS": s3.url(bucket)})
    try:
        other.start()
    except AssertionError as refused:
        text = str(refused)
    assert "belong to another installation" in text
