"""The whole service with its blobs in an S3 bucket."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from era.errors import NotReady
from era.store.blobs.s3_blobs import check_bucket
from tests.conftest import MakeServer, Server
from tests.store.s3 import S3, SECRET_KEY, FaultyS3

APPEND = "open('log', 'a').write('x'); print(open('log').read(), end='')"


def run(server: Server, session: str, code: str = APPEND) -> tuple[int, dict[str, object]]:
    """Run code in a session; returns status and body of the answer."""
    with server.client(timeout=120) as client:
        answer = client.post(f"/api/sessions/{session}/run", json={"code": code})
        return answer.status_code, answer.json()


def test_files_outlive_the_service_and_its_cache(own_server: MakeServer, s3: S3, bucket: str) -> None:
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


IMPATIENT = "from era.store.blobs import s3_blobs; object.__setattr__(s3_blobs._PATIENCE, 'total', 5.0)"
"""So many seconds in place of 45 pass before a bucket is given up: the test waits for all of them."""


def test_a_bucket_that_fails_costs_only_that_run(own_server: MakeServer, s3: S3, bucket: str, faulty: FaultyS3) -> None:
    server = own_server(blobs=s3.url(bucket, endpoint=faulty.endpoint), weakness=IMPATIENT)
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
    assert run(server, "s")[1]["stdout"] == "x"
    faulty.fail_all(True)
    status, body = run(server, "s")
    assert (status, body["code"]) == (503, "commit_failed")
    assert run(server, "s", "print(open('log').read())")[1]["stdout"] == "x\n", "the cache has what it needs"
    faulty.fail_all(False)
    assert run(server, "s")[1]["stdout"] == "xx"
    assert SECRET_KEY not in server.log


def test_a_bucket_that_does_not_answer_one_owner_keeps_no_other_waiting(
    own_server: MakeServer, s3: S3, bucket: str, faulty: FaultyS3
) -> None:
    """What is in the cache is read while another owner waits for a dozen files, and an archive, that aren't."""
    server = own_server(blobs=s3.url(bucket, endpoint=faulty.endpoint), api_key="operator")
    keys = {}
    with server.client(headers={"Authorization": "Bearer operator"}) as client:
        for owner in ("mina", "noor"):
            made = client.post("/api/keys", json={"owner": owner, "description": ""}).json()["key"]
            keys[owner] = {"Authorization": f"Bearer {made}"}
    with server.client(headers=keys["mina"]) as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "m"})
        for number in range(12):
            assert client.put(f"/api/sessions/m/files/{number}", content=str(number)).is_success
    server.stop()
    shutil.rmtree(server.data_dir / "blob-cache")
    server.start()
    with server.client(headers=keys["noor"]) as client, server.client(headers=keys["mina"]) as other:
        client.post("/api/sessions", json={"language": "python", "session_id": "n"})
        client.put("/api/sessions/n/files/a", content="hello")
        assert client.get("/api/sessions/n/files/a").text == "hello"
        assert other.get("/api/sessions/m/files/0").text == "0"
        faulty.answering.clear()
        with ThreadPoolExecutor(12) as threads:
            calls = [threads.submit(other.get, f"/api/sessions/m/files/{number}") for number in range(1, 12)]
            calls.append(threads.submit(other.get, "/api/sessions/m/archive"))
            try:
                time.sleep(1)
                assert not any(call.done() for call in calls)
                assert client.get("/api/sessions/n/files/a", timeout=10).text == "hello"
            finally:
                faulty.answering.set()
        assert [call.result().status_code for call in calls] == [200] * 12


def test_another_installations_prefix_is_refused(own_server: MakeServer, s3: S3, bucket: str) -> None:
    server = own_server(blobs=s3.url(bucket))
    other = Server(server.data_dir.parent / "other", {"ERA_BLOBS": s3.url(bucket)})
    try:
        other.start()
    except AssertionError as refused:
        text = str(refused)
    assert "belong to another installation" in text


def test_a_bucket_that_can_not_be_used_is_told_at_the_start(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, and nothing is written: neither rows nor the id by which a bucket would know the directory."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and doesn't listen
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        refused = Server(tmp_path / "data", {"ERA_BLOBS": s3.url(bucket, endpoint=nowhere)})
        with pytest.raises(AssertionError, match="The server did not start"):
            refused.start()
    assert refused.stop() == 2, "it hadn't ended by itself"
    assert "Traceback" not in refused.log, refused.log
    assert [line for line in refused.log.splitlines() if line[:4] == "era:"] == [
        f"era: s3://{bucket}/some/prefix at {nowhere} can't be used (the blob store failed: it could not be reached): "
        "correct ERA_BLOBS and AWS_…, or start the S3 server."
    ]
    assert [path.name for path in refused.data_dir.iterdir()] == ["lock"]
    with pytest.raises(NotReady, match="there is no such bucket"):
        check_bucket(s3.url("nothing"), tmp_path / "store-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(NotReady, match="the blob store refused"):
        check_bucket(s3.url(bucket), tmp_path / "store-id")


FURNISH = """
import json, os
os.makedirs('a/b'); open('a/b/large', 'wb').write(os.urandom(9_000_000)); os.symlink('b', 'a/link')
for n in range(20): open(f'a/{n}', 'w').write(str(n) * 100)
json.dump({'n': 1}, open('.session_data.json', 'w')); print('o' * 50_000)
"""
LOOK = """
import hashlib, json, os
print(json.load(open('.session_data.json')), os.readlink('a/link'))
for directory, _, files in sorted(os.walk('a')):
    for name in sorted(files):
        print(directory, name, hashlib.sha256(open(f'{directory}/{name}', 'rb').read()).hexdigest())
"""


def test_a_session_moves_from_disk_to_a_bucket_and_back(own_server: MakeServer, s3: S3, bucket: str) -> None:
    """By capsules, with files, data, versions and runs; and the session works there."""
    disk, remote = own_server(), own_server(blobs=s3.url(bucket))
    with disk.client() as client:
        body = {"language": "python", "session_id": "s", "metadata": {"who": "me"}}
        assert client.post("/api/sessions", json=body).status_code == 201
        client.put("/api/sessions/s/code", json={"code": LOOK})
    assert run(disk, "s", FURNISH)[1]["status"] == "ok"
    assert run(disk, "s")[1]["stdout"] == "x"
    seen = looks(disk, "s")
    move(disk, "s", remote, "there")
    assert looks(remote, "there") == seen
    assert run(remote, "there")[1]["stdout"] == "xx", "it goes on"
    move(remote, "there", disk, "back")
    assert looks(disk, "back") == seen
    assert run(disk, "back")[1]["stdout"] == "xxx"
    assert run(disk, "s")[1]["stdout"] == "xx", "it stayed as it was"


def looks(server: Server, session: str) -> list[object]:
    """What a session is, its older versions included, as it must be after every move."""
    with server.client() as client:
        shown = client.get(f"/api/sessions/{session}").json()
        versions = client.get(f"/api/sessions/{session}/versions").json()["versions"]
        runs = client.get(f"/api/sessions/{session}/runs").json()["runs"]
        copy = client.post(f"/api/sessions/{session}/duplicate", json={"from_version": 3}).json()["id"]
        outcome = client.post(f"/api/sessions/{copy}/run", json={}).json()
        client.delete(f"/api/sessions/{copy}?purge=true")
        first = next(each for each in runs if each["state"]["version"] == 2)["run_id"]
        output = client.get(f"/api/sessions/{session}/runs/{first}/stdout").text
    assert output == "o" * 50_000 + "\n"
    at_three = [[each["version"], each["cause"], each["file_count"]] for each in versions if each["version"] <= 3]
    return [shown["metadata"], shown["language"], at_three, outcome["stdout"]]


def move(source: Server, session: str, target: Server, name: str) -> None:
    """Move a session by a capsule; it stays where it was, too."""
    with source.client() as client:
        capsule = client.get(f"/api/sessions/{session}/capsule").content
    with target.client() as client:
        headers = {"Content-Type": "application/x-tar"}
        answer = client.post(f"/api/sessions/import?id={name}", content=capsule, headers=headers)
        assert answer.status_code == 201, answer.text
