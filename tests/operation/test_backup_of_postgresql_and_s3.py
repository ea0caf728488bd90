"""Backups and checks of a server whose rows are in PostgreSQL and whose content is in S3: taken under load, restored to
either kind of place."""

from __future__ import annotations

import errno
import shutil
import time
from functools import partial
from pathlib import Path

import obstore
import pytest

from era.errors import BadRequest, Conflict, NotReady
from era.operation.backup import back_up, restore
from era.operation.check import check
from era.operation.server_data import ServerData
from era.operation.server_data import bucket as opened_bucket
from era.store.blobs.s3_blobs import S3Blobs
from era.store.blobs.s3_client import Patience
from tests.client.command import era
from tests.conftest import Server
from tests.operation.test_migrate import rows_of
from tests.operation.under_load import Known, assert_as_of_one_moment, quiet, under_load
from tests.postgres import Postgres
from tests.store.s3 import S3, SECRET_KEY


class Backed:
    """A server in PostgreSQL and S3 that was backed up under load, and stopped."""

    def __init__(self, directory: Path, postgres: Postgres, s3: S3) -> None:
        s3.make_bucket("backed")
        self.s3, self.postgres = s3, postgres
        self.data = ServerData(
            directory / "data", postgres.url(postgres.make_database(empty=True)), s3.url("backed", "of/this")
        )
        self.backup = directory / "backup"
        self.known = Known()
        env = {"ERA_DATABASE_URL": str(self.data.database_url), "ERA_BLOBS": self.data.blobs_url}
        server = Server(self.data.directory, env).start()
        try:
            with under_load(server, self.known):
                era(None, "backup", "--data-dir", self.data.directory, self.backup, code=0, env=env)
            era(None, "check", "--data-dir", self.data.directory, code=0, env=env)
            refused = era(None, "check", "--repair", "--data-dir", self.data.directory, code=2, env=env)
            assert "uses" in refused.stderr
        finally:
            assert server.stop() == 0
        assert SECRET_KEY not in server.log

    def elsewhere(self, directory: Path) -> ServerData:
        """Another database and another prefix, both empty."""
        database = self.postgres.url(self.postgres.make_database(empty=True))
        return ServerData(directory, database, self.s3.url("backed", directory.parent.name))


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def backed(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, s3: S3) -> Backed:
    return Backed(tmp_path_factory.mktemp("backed"), postgres, s3)


def test_a_backup_under_load_is_restored_to_one_machine(backed: Backed, tmp_path: Path) -> None:
    era(None, "restore", backed.backup, "--data-dir", tmp_path / "data", code=0)
    assert (tmp_path / "data" / "blobs").is_dir()
    assert not (tmp_path / "data" / "store-id").exists()
    assert check(ServerData(tmp_path / "data"), quiet).problems == []
    server = Server(tmp_path / "data").start()
    try:
        assert_as_of_one_moment(server, backed.known)
    finally:
        assert server.stop() == 0


def test_it_is_restored_to_another_database_and_bucket_and_is_the_same(backed: Backed, tmp_path: Path) -> None:
    target = backed.elsewhere(tmp_path / "data")
    restore(backed.backup, target, quiet)
    assert sorted(path.name for path in target.directory.iterdir()) == [
        "link-key",
        "rows-in",
        "site-key",
        "storage",
        "store-id",
        "webhook-key",
    ]
    before = rows_of(f"sqlite:///{backed.backup}/era.sqlite")
    assert rows_of(str(target.database_url)) == before
    assert sum(map(bool, before.values())) >= 6
    report = check(target, quiet)
    assert (report.problems, report.content) == ([], "s3")
    assert report.blobs == len(list((backed.backup / "blobs").glob("*/*")))

    back_up(target, tmp_path / "again", quiet)
    for file in ("era.sqlite", "blobs"):
        assert (tmp_path / "again" / file).exists()
    assert rows_of(f"sqlite:///{tmp_path}/again/era.sqlite") == before

    for taken, why in (
        (ServerData(tmp_path / "new", target.database_url, backed.s3.url("backed", "nothing")), "has rows already"),
        (ServerData(tmp_path / "new", None, target.blobs_url), "something at ERA_BLOBS"),
    ):
        with pytest.raises(Conflict, match=why):
            restore(backed.backup, taken, quiet)
        assert not (tmp_path / "new").exists()
    assert backed.s3.names("backed", "nothing") == [], "content of a restore that failed was left"
    assert check(target, quiet).problems == []


def test_a_restore_that_fails_leaves_no_row_and_no_object(
    backed: Backed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(backed.backup, tmp_path / "backup")
    first = next((copy / "blobs").glob("*/*"))
    first.write_bytes(b"other")
    target = backed.elsewhere(tmp_path / "data")
    with pytest.raises(BadRequest, match=first.name):
        restore(copy, target, quiet)
    assert not target.directory.exists()
    assert backed.s3.names("backed", tmp_path.name) == []
    shutil.copy(backed.backup / "blobs" / first.parent.name / first.name, first)
    with monkeypatch.context() as full:
        full.setattr("era.operation.backup.sync_file_system", no_space)  # the rows are committed by then
        with pytest.raises(OSError, match="No space"):
            restore(copy, target, quiet)
    assert not target.directory.exists()
    assert backed.s3.names("backed", tmp_path.name) == []
    restore(copy, target, quiet)
    assert check(target, quiet).problems == []


def test_what_is_wrong_in_a_bucket_is_named_put_aside_and_brought_back(
    backed: Backed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is damaged is fetched again, with pauses of seconds.
    monkeypatch.setattr("era.operation.server_data.S3Blobs", partial(S3Blobs, patience=Patience(pause=0.02)))
    target = backed.elsewhere(tmp_path / "data")
    restore(backed.backup, target, quiet)
    blobs = sorted((backed.backup / "blobs").glob("*/*"))
    # No trees: what only a missing one names isn't known to be needed.
    missing, other, *_ = (file.name for file in blobs if not file.read_bytes().startswith(b"["))
    there = backed.s3.bucket("backed", tmp_path.name)
    obstore.delete(there, missing)
    obstore.put(there, other, b"other", use_multipart=False)
    assert missing not in backed.s3.names("backed", tmp_path.name)
    report = check(target, quiet)
    assert {(problem.what.rpartition("/")[2], problem.why) for problem in report.problems} == {
        (missing, "is missing"),
        (other, "has other content than its name says"),
    }
    assert all(problem.affects for problem in report.problems)
    made = back_up(target, tmp_path / "partial", quiet)
    assert {path.rpartition("/")[2] for path in made.problems} == {missing, other}

    report = check(target, quiet, repair=True)
    assert (target.directory / "damaged" / other).read_bytes() == b"other"
    assert {problem.why for problem in report.problems} == {"is missing"}
    report = check(target, quiet, repair=True, backup=backed.backup)
    assert (report.problems, len(report.repaired)) == ([], 2)
    assert check(target, quiet).problems == []


def test_nothing_is_swept_from_a_bucket_while_a_backup_reads(
    backed: Backed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened_bucket(backed.s3.url("backed", tmp_path.name), "this-one") as blobs:
        blobs.open()
        with blobs.batch() as batch:
            digest = batch.put(b"unneeded")
        with opened_bucket(backed.s3.url("backed", tmp_path.name), "this-one") as reader:
            reader.open(take=False)
            with reader.held_off(), pytest.raises(BlockingIOError, match="backup"):
                blobs.sweep(set(), time.time() + 3600)
        assert blobs.get(digest) == b"unneeded"
        killed = reader.held_off()
        killed.__enter__()  # and it never ends
        with pytest.raises(BlockingIOError):
            blobs.sweep(set(), time.time() + 3600)
        monkeypatch.setattr("era.store.blobs.s3_holds._HOLD_SECONDS", -3600.0)
        assert blobs.sweep(set(), 0.0) == 0
        assert [name for name in backed.s3.names("backed", tmp_path.name) if name.startswith("held")] == []


def test_what_is_elsewhere_must_be_named(backed: Backed, tmp_path: Path) -> None:
    data = backed.data
    with pytest.raises(NotReady, match="set ERA_DATABASE_URL to that"):
        back_up(ServerData(data.directory), tmp_path / "backup", quiet)
    with pytest.raises(NotReady, match="correct ERA_DATABASE_URL"):
        check(ServerData(data.directory, "postgresql://nobody@127.0.0.1:1/other", data.blobs_url), quiet)
    rows_only = ServerData(data.directory, data.database_url)
    with pytest.raises(Conflict, match="is in S3") as caught:
        back_up(rows_only, tmp_path / "backup", quiet)
    assert "--without-content" in str(caught.value.hint)
    with pytest.raises(Conflict, match="is in S3"):
        check(rows_only, quiet)
    with pytest.raises(Conflict, match="another installation"):
        check(ServerData(data.directory, data.database_url, backed.s3.url("backed", "nobodys")), quiet)
    assert backed.s3.names("backed", "nobodys") == [], "a check has written"
    assert not list(tmp_path.iterdir())

    made = back_up(ServerData(data.directory, data.database_url), tmp_path / "rows", quiet, without_content=True)
    assert made.blobs == "s3"
    assert not (tmp_path / "rows" / "blobs").exists()
    with pytest.raises(BadRequest, match="without the content"):
        restore(tmp_path / "rows", backed.elsewhere(tmp_path / "data"), quiet)
    restore(tmp_path / "rows", ServerData(tmp_path / "data"), quiet)
    assert check(ServerData(tmp_path / "data", None, data.blobs_url), quiet).problems == []
    assert (tmp_path / "data" / "era.sqlite").is_file()
