"""Backups: taken under load, restored elsewhere, damaged, killed; checks and repairs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from era.operation import contents
from era.operation.backup import held_off
from era.store.blobs import LocalBlobs
from tests.client.command import environment, era
from tests.conftest import Server, eventually

type Kept = tuple[Path, Path, dict[str, Any]]

SESSIONS = ("a", "b")
STEP = """
import json, pathlib
data = json.load(open('.session_data.json')); n = data['n'] = data.get('n', 0) + 1
json.dump(data, open('.session_data.json', 'w'))
pathlib.Path('deep/er').mkdir(parents=True, exist_ok=True)
pathlib.Path('deep/er/n.txt').write_text(str(n)); pathlib.Path('deep/large.bin').write_bytes(bytes([n % 256]) * 500_000)
print(str(n) * 100_000)
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """The data directory of a server that was stopped, a backup that was taken of it under load, and what was known to
    its clients before and after the backup."""
    directory = tmp_path_factory.mktemp("kept")
    server = Server(directory / "data", {"ERA_SPARES": "0"}).start()
    known: dict[str, Any] = {"before": {}, "after": {}}
    done = dict.fromkeys(SESSIONS, 0)
    stop = threading.Event()

    def work(name: str) -> None:
        with server.client() as client:
            while not stop.is_set():
                answer = client.post(f"/api/sessions/{name}/run", json={"code": STEP}).json()
                assert answer["status"] == "ok", answer
                done[name] += 1

    try:
        with server.client() as client:
            for name in SESSIONS:
                assert client.post("/api/sessions", json={"language": "python", "session_id": name}).status_code == 201
                client.post(f"/api/sessions/{name}/run", json={"code": STEP}).raise_for_status()
                done[name] += 1
            sql = {"sql": "CREATE TABLE t (x); INSERT INTO t VALUES (42)"}
            client.post("/api/storage/d1/shop/exec", json=sql).raise_for_status()
            client.put("/api/storage/kv/shop/long", json={"value": "v" * 200_000}).raise_for_status()
            threads = [threading.Thread(target=work, args=(name,)) for name in SESSIONS]
            for thread in threads:
                thread.start()
            assert eventually(lambda: min(done.values()) >= 3)
            known["before"] = dict(done)
            era(None, "backup", "--data-dir", server.data_dir, directory / "backup", "--json", code=0)
            stop.set()
            for thread in threads:
                thread.join()
            known["after"] = dict(done)
            report = json.loads(era(None, "check", "--data-dir", server.data_dir, "--json", code=0).stdout)
            assert report["ok"]
            assert report["blobs"] > 0
            for words in (("gc",), ("check", "--repair")):
                assert "uses" in era(None, *words, "--data-dir", server.data_dir, code=2).stderr
    finally:
        stop.set()
        server.stop()
    return server.data_dir, directory / "backup", known


def test_a_backup_under_load_is_a_server_as_of_one_moment(kept: Kept, tmp_path: Path) -> None:
    _, backup, known = kept
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=backup, check=False).returncode == 0
    assert backup.stat().st_mode & 0o777 == 0o700
    assert json.loads((backup / "backup.json").read_text())["problems"] == {}
    era(None, "restore", backup, "--data-dir", tmp_path / "data", code=0)
    era(None, "check", "--data-dir", tmp_path / "data", code=0)
    server = Server(tmp_path / "data", {"ERA_SPARES": "0"}).start()
    try:
        with server.client() as client:
            for name in SESSIONS:
                session = client.get(f"/api/sessions/{name}").json()
                n = session["data"]["n"]
                assert known["before"][name] <= n <= known["after"][name]
                assert client.get(f"/api/sessions/{name}/files/deep/er/n.txt").text == str(n)
                large = client.get(f"/api/sessions/{name}/files/deep/large.bin").content
                assert large == bytes([n % 256]) * 500_000
                runs = client.get(f"/api/sessions/{name}/runs").json()["runs"]
                committed = [run for run in runs if run["status"] == "ok"]
                assert len(committed) == n
                output = client.get(f"/api/sessions/{name}/runs/{committed[0]['run_id']}/stdout").text
                assert output == str(n) * 100_000 + "\n"
            answer = client.post("/api/storage/d1/shop/query", json={"sql": "SELECT x FROM t"}).json()
            assert answer["results"] == [{"x": 42}]
            assert client.get("/api/storage/kv/shop/long").json()["value"] == "v" * 200_000
            assert client.post("/api/sessions/a/run", json={"code": STEP}).json()["status"] == "ok"
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log


def test_nothing_is_put_where_something_is(kept: Kept, tmp_path: Path) -> None:
    data, backup, _ = kept
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in (tmp_path / "there", tmp_path / "there" / "mine", tmp_path / "link"):
        assert "there already" in era(None, "backup", "--data-dir", data, place, code=2).stderr
        assert "there already" in era(None, "restore", backup, "--data-dir", place, code=2).stderr
    assert (tmp_path / "there" / "mine").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()
    assert "data directory itself" in era(None, "backup", "--data-dir", data, data / "backup", code=2).stderr
    assert "no data directory" in era(None, "backup", "--data-dir", tmp_path / "none", tmp_path / "b", code=2).stderr
    assert "no data directory" in era(None, "check", "--data-dir", tmp_path / "none", code=2).stderr
    assert "no data directory" in era(None, "gc", "--data-dir", tmp_path / "none", code=2).stderr
    assert "no backup" in era(None, "restore", tmp_path / "there", "--data-dir", tmp_path / "d", code=2).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


def test_a_damaged_backup_is_named_file_by_file(kept: Kept, tmp_path: Path) -> None:
    backup = shutil.copytree(kept[1], tmp_path / "backup")
    first, second, third = sorted(path for path in (backup / "blobs").rglob("*") if path.is_file())[:3]
    first.unlink()
    second.write_bytes(b"x" + second.read_bytes()[1:])
    third.unlink()
    third.symlink_to("/etc/passwd")
    (backup / "link-key").write_bytes(b"")
    done = era(None, "restore", backup, "--data-dir", tmp_path / "data", "--json", code=2)
    problem = json.loads(done.stderr)
    bad = {str(path.relative_to(backup)) for path in (first, second, third, backup / "link-key")}
    assert problem["code"] == "damaged_backup"
    assert set(problem["details"]) == bad
    assert all(name in problem["error"] for name in bad)
    assert [path.name for path in tmp_path.iterdir()] == ["backup"]


@pytest.mark.parametrize(
    ("file", "content"),
    [("SHA256SUMS", b""), ("SHA256SUMS", None), ("backup.json", b"{"), ("backup.json", None), ("era.sqlite", None)],
)
def test_a_backup_without_its_lists_is_refused(kept: Kept, tmp_path: Path, file: str, content: bytes | None) -> None:
    backup = shutil.copytree(kept[1], tmp_path / "backup")
    (backup / file).unlink() if content is None else (backup / file).write_bytes(content)
    assert file in era(None, "restore", backup, "--data-dir", tmp_path / "data", code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["backup"]


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "blobs/../../evil", "storage/sql/../x.sqlite", "lock"])
def test_a_hostile_backup_gets_nowhere_else(kept: Kept, tmp_path: Path, path: str) -> None:
    backup = shutil.copytree(kept[1], tmp_path / "backup")
    sums = (backup / "SHA256SUMS").read_text() + f"{'0' * 64}  {path}\n"
    (backup / "SHA256SUMS").write_text(sums)
    about = json.loads((backup / "backup.json").read_text())
    about["sums"] = hashlib.sha256(sums.encode()).hexdigest()
    (backup / "backup.json").write_text(json.dumps(about))
    assert "damaged" in era(None, "restore", backup, "--data-dir", tmp_path / "data", code=2).stderr
    assert [each.name for each in tmp_path.iterdir()] == ["backup"]


KILLED = """
import os, signal, sys
from era.client import cli
from era.operation import contents
real, left = contents.copy, int(sys.argv.pop(1))
def copy(*args):
    global left
    left -= 1
    done = real(*args)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
contents.copy = copy
cli.main()
"""


def test_a_killed_command_leaves_nothing_at_the_place(kept: Kept, tmp_path: Path) -> None:
    data, backup, _ = kept
    for copies, place, words in (
        (1, tmp_path / "b", ("backup", "--data-dir", str(data), str(tmp_path / "b"))),
        (4, tmp_path / "d", ("restore", str(backup), "--data-dir", str(tmp_path / "d"))),
    ):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(copies), *words], env=environment(None), check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not place.exists()
        assert place.with_name(f".{place.name}.partial").exists()
        era(None, *words, code=0)
        assert place.is_dir()
        assert not place.with_name(f".{place.name}.partial").exists()
    era(None, "check", "--data-dir", tmp_path / "d", code=0)


def test_nothing_is_swept_while_a_backup_reads(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    blobs.open()
    with blobs.batch() as batch:
        digest = batch.put(b"unneeded")
    future = os.stat(tmp_path / contents.blob_path(digest)).st_mtime + 3600
    with held_off(tmp_path), pytest.raises(BlockingIOError, match="backup"):
        blobs.sweep(set(), future)
    assert blobs.get(digest) == b"unneeded"
    with ThreadPoolExecutor(4) as threads:  # sweeps don't take each other for a backup
        assert sum(threads.map(lambda _: blobs.sweep(set(), 0.0), range(100))) == 0
    assert blobs.sweep(set(), future) == 1


def test_check_names_what_is_wrong_and_who_needs_it(kept: Kept, tmp_path: Path) -> None:
    _, backup, _ = kept
    data = tmp_path / "data"
    era(None, "restore", backup, "--data-dir", data, code=0)
    with closing(sqlite3.connect(data / "era.sqlite")) as connection:
        root = connection.execute("SELECT snapshot_root FROM versions WHERE snapshot_root IS NOT NULL").fetchone()[0]
        output = connection.execute("SELECT stdout_digest FROM outputs WHERE stdout_digest IS NOT NULL").fetchone()[0]
        value = connection.execute("SELECT digest FROM storage_items").fetchone()[0]
    (data / contents.blob_path(root)).write_bytes(b"[7]")
    (data / contents.blob_path(output)).unlink()
    (data / contents.blob_path(value)).write_bytes(b"")
    report = json.loads(era(None, "check", "--data-dir", data, "--json", code=1).stdout)
    found = {problem["what"].rpartition("/")[2]: problem for problem in report["problems"]}
    assert set(found) == {root, output, value}
    assert any("version" in who for who in found[root]["affects"])
    assert any("output of run_" in who for who in found[output]["affects"])
    assert found[value]["affects"] == ["storage of default, kv shop"]

    bad = era(None, "backup", "--data-dir", data, tmp_path / "partial", code=1)
    assert root in bad.stderr
    assert "is missing" in bad.stderr
    assert root in era(None, "restore", tmp_path / "partial", "--data-dir", tmp_path / "again", code=0).stderr

    era(None, "check", "--data-dir", data, "--repair", code=1)
    assert {path.name for path in (data / "damaged").iterdir()} == {root, value}
    era(None, "check", "--data-dir", data, "--repair", "--from", backup, code=0)
    era(None, "check", "--data-dir", data, code=0)


def test_a_damaged_tree_of_a_right_name_is_named(tmp_path: Path) -> None:
    content = b'[["file","a","../../etc/passwd",1,1,1]]'
    digest = hashlib.sha256(content).hexdigest()
    path = tmp_path / contents.blob_path(digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    found = contents.walk(contents.Named(frozenset({digest}), frozenset()), tmp_path)
    assert found.problems == {digest: "is no list of a directory"}


def test_gc_removes_what_nothing_needs(kept: Kept, tmp_path: Path) -> None:
    data = tmp_path / "data"
    era(None, "restore", kept[1], "--data-dir", data, code=0)
    stray = data / contents.blob_path("ab" * 32)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"stray")
    os.utime(stray, (0, 0))
    removed = json.loads(era(None, "gc", "--data-dir", data, "--json", code=0).stdout)["removed_blobs"]
    assert removed >= 1
    assert not stray.exists()
    era(None, "check", "--data-dir", data, code=0)


def test_with_content_in_s3_a_backup_says_that_it_lacks_it(kept: Kept, tmp_path: Path) -> None:
    data = tmp_path / "data"
    era(None, "restore", kept[1], "--data-dir", data, code=0)
    shutil.rmtree(data / "blobs")
    (data / "store-id").write_text("0" * 32)
    made = era(None, "backup", "--data-dir", data, tmp_path / "backup", code=0)
    assert "in S3, and not in this backup" in made.stderr
    assert not (tmp_path / "backup" / "blobs").exists()
    assert "same ERA_BLOBS" in era(None, "restore", tmp_path / "backup", "--data-dir", tmp_path / "d", code=0).stderr
    assert (tmp_path / "d" / "store-id").read_text() == "0" * 32
    assert "not looked at" in era(None, "check", "--data-dir", tmp_path / "d", code=0).stderr
    assert not (data / "blobs").exists()
