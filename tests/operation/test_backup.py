"""Backups: taken under load, restored elsewhere, damaged, killed; checks and repairs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection, event

from era.errors import BadRequest, Conflict, NotFound, Unavailable
from era.operation import check as checking
from era.operation import server_data
from era.operation.backup import _undo_rows, back_up, restore
from era.operation.check import check
from era.operation.server_data import LocalContent, ServerData, blob_path
from era.store.blobs.blobs import LocalBlobs
from tests.client.command import environment, era
from tests.conftest import Server
from tests.operation.under_load import Known, assert_as_of_one_moment, quiet, under_load

type Kept = tuple[Path, Path, Known]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """The data directory of a server that was stopped, a backup that was taken of it under load, and what was known to
    its clients before and after the backup."""
    directory, known = tmp_path_factory.mktemp("kept"), Known()
    server = Server(directory / "data").start()
    try:
        with under_load(server, known):
            era(None, "backup", "--data-dir", server.data_dir, directory / "backup", "--json", code=0)
        report = json.loads(era(None, "check", "--data-dir", server.data_dir, "--json", code=0).stdout)
        assert report["ok"]
        assert report["blobs"] > 0
        for words in (("gc",), ("check", "--repair")):
            assert "uses" in era(None, *words, "--data-dir", server.data_dir, code=2).stderr
    finally:
        server.stop()
    return server.data_dir, directory / "backup", known


def test_a_backup_under_load_is_a_server_as_of_one_moment(kept: Kept, tmp_path: Path) -> None:
    _, backup, known = kept
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=backup, check=False).returncode == 0
    assert backup.stat().st_mode & 0o777 == 0o700
    assert json.loads((backup / "backup.json").read_text())["problems"] == {}
    era(None, "restore", backup, "--data-dir", tmp_path / "data", code=0)
    assert check(ServerData(tmp_path / "data"), quiet).problems == []
    server = Server(tmp_path / "data").start()
    try:
        assert_as_of_one_moment(server, known)
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log


def restored(backup: Path, data: Path) -> ServerData:
    """The data directory that a backup becomes."""
    server = ServerData(data)
    restore(backup, server, quiet)
    return server


def copied(backup: Path, target: Path) -> Path:
    """A copy of a backup, of which files may be replaced, but not changed in place: they are the same."""
    return shutil.copytree(backup, target, copy_function=os.link)


def replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def test_nothing_is_put_where_something_is(kept: Kept, tmp_path: Path) -> None:
    data, backup, _ = kept
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in (tmp_path / "there", tmp_path / "there" / "mine", tmp_path / "link"):
        with pytest.raises(Conflict, match="there already"):
            back_up(ServerData(data), place, quiet)
        with pytest.raises(Conflict, match="there already"):
            restored(backup, place)
    assert (tmp_path / "there" / "mine").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(BadRequest, match="data directory itself"):
        back_up(ServerData(data), data / "backup", quiet)
    none = tmp_path / "none"
    assert "no data directory" in era(None, "backup", "--data-dir", none, tmp_path / "b", code=2).stderr
    assert "no data directory" in era(None, "gc", "--data-dir", none, code=2).stderr
    with pytest.raises(NotFound, match="no data directory"):
        check(ServerData(none), quiet)
    with pytest.raises(BadRequest, match="no backup"):
        restored(tmp_path / "there", tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


def test_a_damaged_backup_is_named_file_by_file(kept: Kept, tmp_path: Path) -> None:
    backup = copied(kept[1], tmp_path / "backup")
    first, second, third = sorted(path for path in (backup / "blobs").rglob("*") if path.is_file())[:3]
    first.unlink()
    replace(second, b"x" + second.read_bytes()[1:])
    third.unlink()
    third.symlink_to("/etc/passwd")
    replace(backup / "link-key", b"")
    done = era(None, "restore", backup, "--data-dir", tmp_path / "data", "--json", code=2)
    problem = json.loads(done.stderr)
    bad = {str(path.relative_to(backup)) for path in (first, second, third, backup / "link-key")}
    assert problem["code"] == "damaged_backup"
    assert set(problem["details"]) == bad
    assert all(name in problem["error"] for name in bad)
    assert [path.name for path in tmp_path.iterdir()] == ["backup"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("SHA256SUMS", b""),
        ("SHA256SUMS", None),
        ("backup.json", b"{"),
        ("backup.json", b"[" * 200_000),
        ("backup.json", b'{"format": 1}'),
        ("backup.json", None),
        ("era.sqlite", None),
    ],
)
def test_a_backup_without_its_lists_is_refused(kept: Kept, tmp_path: Path, file: str, content: bytes | None) -> None:
    backup = copied(kept[1], tmp_path / "backup")
    (backup / file).unlink() if content is None else replace(backup / file, content)
    with pytest.raises(BadRequest, match=file):
        restored(backup, tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["backup"]


def test_a_list_that_is_hostile_itself_is_refused(kept: Kept, tmp_path: Path) -> None:
    backup = copied(kept[1], tmp_path / "backup")
    about = json.loads((backup / "backup.json").read_text())
    others: list[dict[str, object]] = [
        {"problems": {"blobs/\x1b[2J": "is missing"}},
        {"problems": []},
        {"blobs": "x"},
        {"files": "many"},
    ]
    for other in others:
        replace(backup / "backup.json", json.dumps({**about, **other}).encode())
        with pytest.raises(BadRequest, match=r"backup\.json says what no backup says"):
            restored(backup, tmp_path / "data")
    replace(backup / "backup.json", json.dumps(about).encode())
    for make in (lambda file: file.symlink_to("/dev/zero"), os.mkfifo, Path.mkdir):
        (backup / "SHA256SUMS").unlink()
        make(backup / "SHA256SUMS")
        with pytest.raises(BadRequest, match="SHA256SUMS isn't a file"):
            restored(backup, tmp_path / "data")
    (backup / "SHA256SUMS").rmdir()
    with (backup / "SHA256SUMS").open("wb") as long:
        long.truncate(1 << 40)
    with pytest.raises(BadRequest, match="SHA256SUMS is too long"):
        restored(backup, tmp_path / "data")


@pytest.mark.parametrize(
    "path",
    ["../evil", "/tmp/evil", "blobs/../../evil", "storage/sql/../x.sqlite", "storage/sql/a/\x1b[2J.sqlite", "lock"],
)
def test_a_hostile_backup_gets_nowhere_else(kept: Kept, tmp_path: Path, path: str) -> None:
    backup = copied(kept[1], tmp_path / "backup")
    sums = (backup / "SHA256SUMS").read_bytes() + f"{'0' * 64}  {path}\n".encode()
    replace(backup / "SHA256SUMS", sums)
    about = json.loads((backup / "backup.json").read_text())
    about["sums"] = hashlib.sha256(sums).hexdigest()
    replace(backup / "backup.json", json.dumps(about).encode())
    with pytest.raises(BadRequest, match="damaged"):
        restored(backup, tmp_path / "data")
    assert [each.name for each in tmp_path.iterdir()] == ["backup"]


KILLED = """
import os, signal, sys
from pathlib import Path
from era.operation import check as checking
from era.operation import server_data
from era.operation.backup import back_up, restore
from era.operation.server_data import ServerData
real = server_data.copy
def kill_after(left, job, *args):
    def copy(*what):
        nonlocal left
        left -= 1
        done = real(*what)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    if os.fork() == 0:
        server_data.copy = copy
        job(*args, lambda _: lambda _: None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
data, backup, b, d = map(Path, sys.argv[1:])
kill_after(1, back_up, ServerData(data), b)
kill_after(4, restore, backup, ServerData(d))
"""


def test_a_killed_command_leaves_nothing_at_the_place(kept: Kept, tmp_path: Path) -> None:
    data, backup, _ = kept
    places = tmp_path / "b", tmp_path / "d"
    subprocess.run([sys.executable, "-c", KILLED, data, backup, *places], env=environment(None), check=True)
    for place in places:
        assert not place.exists()
        assert place.with_name(f".{place.name}.partial").exists()
    back_up(ServerData(data), places[0], quiet)
    restored(backup, places[1])
    for place in places:
        assert not place.with_name(f".{place.name}.partial").exists()
    assert check(ServerData(places[1]), quiet).problems == []


def test_a_backup_gets_into_nobody_elses_directory(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".b.partial").mkdir(0o777)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(Conflict, match="another user's"):
        back_up(ServerData(kept[0]), tmp_path / "b", quiet)
    monkeypatch.undo()
    (tmp_path / ".b.partial").chmod(0o777)
    back_up(ServerData(kept[0]), tmp_path / "b", quiet)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o700


def test_what_is_no_database_any_more_is_said(kept: Kept, tmp_path: Path) -> None:
    data = restored(kept[1], tmp_path / "data").directory
    broken = data / "storage" / "sql" / "default" / "broken.sqlite"
    broken.write_bytes(b"no database" * 1000)
    made = back_up(ServerData(data), tmp_path / "backup", quiet)
    assert set(made.problems) == {"storage/sql/default/broken.sqlite"}
    assert (tmp_path / "backup" / "storage" / "sql" / "default" / "shop.sqlite").is_file()
    assert check(restored(tmp_path / "backup", tmp_path / "again"), quiet).problems == []

    (data / "era.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(Unavailable, match="not a database"):
        check(ServerData(data), quiet)


def test_nothing_is_swept_while_a_backup_reads(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    blobs.open()
    with blobs.batch() as batch:
        digest = batch.put(b"unneeded")
    future = os.stat(tmp_path / blob_path(digest)).st_mtime + 3600
    with LocalContent(tmp_path).held_off(), pytest.raises(BlockingIOError, match="backup"):
        blobs.sweep(set(), future)
    assert blobs.get(digest) == b"unneeded"
    with ThreadPoolExecutor(4) as threads:  # sweeps don't take each other for a backup
        assert sum(threads.map(lambda _: blobs.sweep(set(), 0.0), range(100))) == 0
    assert blobs.sweep(set(), future) == 1


def test_check_names_what_is_wrong_and_who_needs_it(kept: Kept, tmp_path: Path) -> None:
    _, backup, _ = kept
    data = restored(backup, tmp_path / "data").directory
    with closing(sqlite3.connect(data / "era.sqlite")) as connection:
        root = connection.execute("SELECT snapshot_root FROM versions WHERE snapshot_root IS NOT NULL").fetchone()[0]
        output = connection.execute("SELECT stdout_digest FROM outputs WHERE stdout_digest IS NOT NULL").fetchone()[0]
        value = connection.execute("SELECT digest FROM storage_items").fetchone()[0]
    (data / blob_path(root)).write_bytes(b"[7]")
    (data / blob_path(output)).unlink()
    (data / blob_path(value)).write_bytes(b"")
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

    assert check(ServerData(data), quiet, repair=True).problems
    assert {path.name for path in (data / "damaged").iterdir()} == {root, value}
    era(None, "check", "--data-dir", data, "--repair", "--from", backup, code=0)
    assert check(ServerData(data), quiet).problems == []


def test_a_check_of_much_that_is_missing_asks_no_more_often(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question reads whole tables, and what is above a blob takes a look at all trees."""
    data, asked, turned = restored(kept[1], tmp_path / "data").directory, list[str](), list[int]()
    names, above = checking._named_by, server_data.Walk.above

    def counted(rows: Connection, digests: set[str]) -> dict[str, list[str]]:
        event.listen(rows, "before_cursor_execute", lambda *given: asked.append(given[2]))
        return names(rows, digests)

    def counted_above(walk: server_data.Walk) -> dict[str, list[str]]:
        turned.append(1)
        return above(walk)

    monkeypatch.setattr(checking, "_named_by", counted)
    monkeypatch.setattr(server_data.Walk, "above", counted_above)
    files = [path for path in (data / "blobs").rglob("*") if path.is_file()]
    for path in files:
        path.unlink()
    report = check(ServerData(data), quiet, repair=True)
    assert len(report.problems) > 3
    assert all(problem.affects for problem in report.problems)
    assert len(asked) == len(checking._WHO)
    assert turned == [1]
    assert check(ServerData(data), quiet, repair=True, backup=kept[1]).problems == []
    assert len(turned) == 2, "for the report only, however many passes there were"


def test_a_damaged_tree_of_a_right_name_is_named(tmp_path: Path) -> None:
    content = b'[["file","a","../../etc/passwd",1,1,1]]'
    digest = hashlib.sha256(content).hexdigest()
    path = tmp_path / blob_path(digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    found = server_data.walk(server_data.Named(frozenset({digest}), frozenset()), LocalContent(tmp_path))
    assert found.problems == {digest: "is no list of a directory"}


def test_a_repair_ends_where_a_tree_of_a_right_name_is_no_list(kept: Kept, tmp_path: Path) -> None:
    data, backup = restored(kept[1], tmp_path / "data").directory, copied(kept[1], tmp_path / "backup")
    digest = hashlib.sha256(b"[7]").hexdigest()
    for directory in (data, backup):
        (directory / blob_path(digest)).parent.mkdir(exist_ok=True)
        (directory / blob_path(digest)).write_bytes(b"[7]")
    with closing(sqlite3.connect(data / "era.sqlite")) as connection, connection:
        connection.execute("UPDATE versions SET snapshot_root = ? WHERE snapshot_root IS NOT NULL", (digest,))
    passes = iter(range(5))

    def few_times(size: int) -> server_data.Advance:
        next(passes)
        return quiet(size)

    report = check(ServerData(data), few_times, repair=True, backup=backup)
    assert [problem.what for problem in report.problems] == [blob_path(digest)]
    assert report.repaired == []
    assert (data / blob_path(digest)).read_bytes() == b"[7]"


COPIES = """
import sys, pathlib
from era.operation.backup import copy_database
copy_database(*map(pathlib.Path, sys.argv[1:]))
"""


@pytest.mark.usefixtures("strace")
def test_programs_wait_for_no_disk_while_their_database_is_copied(kept: Kept, tmp_path: Path) -> None:
    source, target = kept[0] / "storage" / "sql" / "default" / "shop.sqlite", tmp_path / "copy.sqlite"
    command = ["strace", "-f", "-e", "trace=fsync,fdatasync", sys.executable, "-c", COPIES, str(source), str(target)]
    done = subprocess.run(command, env=environment(None), capture_output=True, text=True, check=True)
    assert "exited with 0" in done.stderr
    assert "sync(" not in done.stderr
    with closing(sqlite3.connect(target)) as connection:
        assert connection.execute("SELECT x FROM t").fetchall() == [(42,)]


def test_a_restore_that_leaves_rows_says_so() -> None:
    with pytest.raises(Unavailable, match="the disk is full") as failed:
        _undo_rows("postgresql://127.0.0.1:1/nowhere", None, OSError("the disk is full"))
    assert "ERA_DATABASE_URL" in failed.value.hint


def test_gc_removes_what_nothing_needs(kept: Kept, tmp_path: Path) -> None:
    data = restored(kept[1], tmp_path / "data").directory
    stray = data / blob_path("ab" * 32)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"stray")
    os.utime(stray, (0, 0))
    removed = json.loads(era(None, "gc", "--data-dir", data, "--json", code=0).stdout)["removed_blobs"]
    assert removed >= 1
    assert not stray.exists()
    assert check(ServerData(data), quiet).problems == []


def test_without_content_in_s3_a_backup_says_that_it_lacks_it(kept: Kept, tmp_path: Path) -> None:
    data = restored(kept[1], tmp_path / "data").directory
    shutil.rmtree(data / "blobs")
    (data / "store-id").write_text("0" * 32)
    with pytest.raises(Conflict, match="is in S3"):
        back_up(ServerData(data), tmp_path / "backup", quiet)
    made = era(None, "backup", "--data-dir", data, tmp_path / "backup", "--without-content", code=0)
    assert "in S3, and not in this backup" in made.stderr
    assert not (tmp_path / "backup" / "blobs").exists()
    assert "same ERA_BLOBS" in era(None, "restore", tmp_path / "backup", "--data-dir", tmp_path / "d", code=0).stderr
    assert (tmp_path / "d" / "store-id").read_text() == "0" * 32
    assert "not looked at" in era(None, "check", "--data-dir", tmp_path / "d", "--without-content", code=0).stderr
    assert not (data / "blobs").exists()
