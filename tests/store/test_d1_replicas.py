"""Programs' SQL databases that several hosts share by rows: each call sees all before it, whichever host it reaches."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from era.core.models import DEFAULT_OWNER
from era.errors import BadRequest, SqlUnknown, Unavailable
from era.store.d1 import d1_databases, d1_replicas
from era.store.d1.d1_databases import D1Databases
from era.store.d1.d1_replicas import CHUNK, MOVED, DatabaseReplicas
from era.store.engine.database import DatabaseAway
from tests.store.d1 import run
from tests.store.rows import execute, opened

NAME = (DEFAULT_OWNER, "n")
ROOM = 1 << 30


@dataclass
class OneHost:
    databases: D1Databases
    kept: DatabaseReplicas
    directory: Path

    async def run(self, sql: str, params: Any = ()) -> list[dict[str, Any]]:
        answer = await run(self.databases, *NAME, sql, params, many=";" in sql, room=ROOM)
        rows: list[dict[str, Any]] = answer["results"]
        return rows


@pytest.fixture
async def hosts(url: str, tmp_path: Path) -> AsyncIterator[list[OneHost]]:
    """Two hosts, each with copies of its own."""
    async with AsyncExitStack() as stack:
        made = []
        for number in range(2):
            store = await stack.enter_async_context(opened(url, alone=False))
            kept, directory = await store.d1_databases(), tmp_path / f"host{number}"
            databases = D1Databases(directory, 64 << 20, kept=kept)
            databases.open()
            stack.push_async_callback(databases.close)
            made.append(OneHost(databases, kept, directory))
        yield made


async def test_each_host_sees_what_the_other_has_stored(hosts: list[OneHost], url: str) -> None:
    a, b = hosts
    await a.run("CREATE TABLE t (n)")
    await b.run("INSERT INTO t VALUES (1)")
    await a.run("INSERT INTO t VALUES (2)")
    assert await b.run("SELECT sum(n) AS n FROM t") == [{"n": 3}]
    with pytest.raises(BadRequest):
        await b.run("INSERT INTO t VALUES (4); INSERT INTO nothing VALUES (1)")
    assert await a.run("SELECT sum(n) AS n FROM t") == [{"n": 3}]
    await b.databases.measure_all()
    assert b.databases.sizes(DEFAULT_OWNER) == {"n": (a.directory / DEFAULT_OWNER / "n.sqlite").stat().st_size}
    # What is only read is stored by nobody.
    assert execute(url, "UPDATE d1_databases SET mark = mark WHERE version = 3") == 1


async def test_calls_of_all_hosts_come_one_after_the_other(hosts: list[OneHost]) -> None:
    await hosts[0].run("CREATE TABLE t (n)")
    await hosts[0].run("INSERT INTO t VALUES (0)")
    await asyncio.gather(*(hosts[n % 2].run("UPDATE t SET n = n + 1") for n in range(40)))
    for host in hosts:
        assert await host.run("SELECT n FROM t") == [{"n": 40}]


async def test_only_chunks_that_changed_are_stored_and_fetched(hosts: list[OneHost], url: str) -> None:
    a, b = hosts
    await a.run("CREATE TABLE t (n INTEGER PRIMARY KEY, blob)")
    await a.run(
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 64) "
        "INSERT INTO t SELECT x, randomblob(60000) FROM c"
    )
    size = (a.directory / DEFAULT_OWNER / "n.sqlite").stat().st_size
    assert size > 50 * CHUNK
    await b.run("SELECT count(*) FROM t")
    await a.run("UPDATE t SET blob = randomblob(60000) WHERE n = 32")
    newest = "(SELECT max(version) FROM d1_chunks)"
    assert 0 < execute(url, f"UPDATE d1_chunks SET number = number WHERE version = {newest}") < 5
    # Both have it, and the database is whole.
    for host in hosts:
        assert await host.run("SELECT count(*) AS n FROM t WHERE length(blob) = 60000") == [{"n": 64}]
    contents = {(host.directory / DEFAULT_OWNER / "n.sqlite").read_bytes() for host in hosts}
    assert len(contents) == 1
    with closing(sqlite3.connect(b.directory / DEFAULT_OWNER / "n.sqlite")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_a_call_that_did_not_count_leaves_nothing_behind(hosts: list[OneHost]) -> None:
    """The other host is quicker each time, while the file here has grown, and has changes that aren't to stay."""
    a, b = hosts
    await a.run("CREATE TABLE t (n, blob)")
    path = a.directory / DEFAULT_OWNER / "n.sqlite"
    for count in range(1, 6):
        await a.kept.pull(NAME, path)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("INSERT INTO t VALUES (-1, randomblob(?))", [count * CHUNK])
        await b.run("INSERT INTO t VALUES (1, randomblob(?))", [1000 * count])
        assert await a.kept.push(NAME, path) is False
        assert await a.run("SELECT count(*) AS c, sum(n) AS s FROM t") == [{"c": count, "s": count}]
    assert path.read_bytes() == (b.directory / DEFAULT_OWNER / "n.sqlite").read_bytes()


async def test_a_database_that_was_dropped_is_another_one_afterwards(hosts: list[OneHost]) -> None:
    a, b = hosts
    await a.run("CREATE TABLE t (n)")
    assert await b.run("SELECT count(*) AS n FROM t") == [{"n": 0}]
    assert await a.databases.drop(*NAME)
    assert not await a.databases.drop(*NAME)
    await a.run("CREATE TABLE u (n)")
    assert await b.run("SELECT name FROM sqlite_schema") == [{"name": "u"}]
    assert await b.databases.drop(*NAME)
    assert await a.run("SELECT name FROM sqlite_schema") == []


async def test_a_killed_call_changes_nothing(hosts: list[OneHost], monkeypatch: pytest.MonkeyPatch) -> None:
    a = hosts[0]
    await a.run("CREATE TABLE t (n)")
    call = a.databases._call_worker

    async def killed(request: dict[str, Any]) -> None:
        await call(request)
        raise BadRequest("as for a worker that is killed when it has just committed")

    monkeypatch.setattr(a.databases, "_call_worker", killed)
    with pytest.raises(BadRequest):
        await a.run("INSERT INTO t VALUES (1)")
    monkeypatch.undo()
    for host in hosts:
        assert await host.run("SELECT count(*) AS n FROM t") == [{"n": 0}]


async def test_a_worker_killed_after_its_commit_has_changed_nothing(
    hosts: list[OneHost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is a copy, of which nothing is stored."""
    await hosts[0].run("CREATE TABLE t (n)")
    await hosts[0].databases.close()
    commit = 'connection.execute("COMMIT")'
    worker = tmp_path / "worker.py"
    worker.write_text(d1_databases._WORKER.read_text().replace(commit, f"({commit}, time.sleep(60))"))
    with monkeypatch.context() as patched:
        patched.setattr(d1_databases, "_WORKER", worker)
        patched.setattr(d1_databases, "_COMMIT_SECONDS", 2.0)
        with pytest.raises(BadRequest) as caught:
            await hosts[0].run("INSERT INTO t VALUES (1)")
    assert (caught.value.code, "undone" in caught.value.message) == ("sql_timeout", True)
    for host in hosts:
        assert await host.run("SELECT count(*) AS n FROM t") == [{"n": 0}]


async def test_a_commit_to_a_copy_that_the_disk_failed_has_changed_nothing(
    hosts: list[OneHost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be there, so the copy is made anew: else the next call would store it, too."""
    await hosts[0].run("CREATE TABLE t (n)")
    await hosts[0].databases.close()
    commit = 'connection.execute("COMMIT")'
    failing = "error = sqlite3.OperationalError(); error.sqlite_errorcode = sqlite3.SQLITE_IOERR; raise error"
    worker = tmp_path / "worker.py"
    worker.write_text(d1_databases._WORKER.read_text().replace(commit, f"({commit}, exec({failing!r}))"))
    with monkeypatch.context() as patched:
        patched.setattr(d1_databases, "_WORKER", worker)
        with pytest.raises(Unavailable) as caught:
            await hosts[0].run("INSERT INTO t VALUES (1)")
    assert caught.value.code == "unavailable"
    await hosts[0].databases.close()
    await hosts[0].run("INSERT INTO t VALUES (2)")
    for host in hosts:
        assert await host.run("SELECT n FROM t") == [{"n": 2}]


@pytest.mark.parametrize("may_have_committed", [True, False])
async def test_where_the_rows_were_cut_off_in_their_commit_nobody_knows(
    hosts: list[OneHost], monkeypatch: pytest.MonkeyPatch, may_have_committed: bool
) -> None:
    async def cut_off(*_: object) -> bool:
        raise DatabaseAway(may_have_committed=may_have_committed)

    monkeypatch.setattr(hosts[0].kept, "push", cut_off)
    with pytest.raises(Unavailable) as caught:
        await hosts[0].run("CREATE TABLE t (n)")
    assert caught.value.code == ("sql_unknown" if may_have_committed else "unavailable")
    assert (caught.value.retry_after is None) is may_have_committed


@pytest.mark.parametrize("meanwhile", ["nothing", "change", "drop"])
async def test_a_commit_without_an_answer_counts_once_whatever_others_do(
    hosts: list[OneHost], monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """The call isn't made again where it may have been stored, and another host has changed the rows since."""
    a, b = hosts
    await a.run("CREATE TABLE t (n); INSERT INTO t VALUES (0)")
    write = a.kept._database._in_writer
    committed, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def cut_off(*args: Any, **how: Any) -> Any:
        if how["again"]:
            assert go_on.wait(60)
            return write(*args, **how)
        write(*args, **how)
        loop.call_soon_threadsafe(committed.set)
        raise DatabaseAway(may_have_committed=True)

    monkeypatch.setattr(a.kept._database, "_in_writer", cut_off)
    call = asyncio.create_task(a.run("UPDATE t SET n = n + 1"))
    await committed.wait()
    if meanwhile == "change":
        await b.run("UPDATE t SET n = n + 10")
    elif meanwhile == "drop":
        await b.databases.drop(*NAME)
    go_on.set()
    if meanwhile == "nothing":
        await call
        assert await b.run("SELECT n FROM t") == [{"n": 1}]
        return
    with pytest.raises(SqlUnknown):
        await call
    monkeypatch.undo()
    if meanwhile == "change":
        assert await a.run("SELECT n FROM t") == await b.run("SELECT n FROM t") == [{"n": 11}]
    else:
        assert await a.run("SELECT count(*) AS n FROM sqlite_schema") == [{"n": 0}]


async def test_a_database_that_cannot_be_had_is_still_known(
    hosts: list[OneHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = hosts
    await a.run("CREATE TABLE t (n)")
    await b.databases.measure_all()

    async def away(*_: object) -> None:
        raise DatabaseAway(may_have_committed=False)

    monkeypatch.setattr(b.kept, "pull", away)
    with pytest.raises(Unavailable):
        await b.run("SELECT 1")
    assert b.databases.sizes(DEFAULT_OWNER).keys() == {"n"}


async def test_a_full_disk_of_a_host_is_unavailable(url: str, hosts: list[OneHost], small_disk: Path) -> None:
    """And no half of a copy is left on it, nor taken for the database."""
    a = hosts[0]
    await a.run("CREATE TABLE t (b)")
    await a.run("INSERT INTO t VALUES (randomblob(1900000)), (randomblob(1900000))")
    async with opened(url, alone=False) as store:
        databases = D1Databases(small_disk / "copies", 64 << 20, kept=await store.d1_databases())
        databases.open()
        await databases.measure_all()
        with pytest.raises(Unavailable, match="No space left"):
            await run(databases, *NAME, "SELECT 1", many=False, room=ROOM)
        assert databases.sizes(DEFAULT_OWNER) == a.databases.sizes(DEFAULT_OWNER)
        assert list(small_disk.rglob("*.sqlite")) == []
        await a.run("DROP TABLE t")
        await a.databases.drop(*NAME)
        await a.run("CREATE TABLE t (n)")
        await run(databases, *NAME, "INSERT INTO t VALUES (1)", many=False, room=ROOM)
        await databases.close()
    assert await a.run("SELECT n FROM t") == [{"n": 1}]


@pytest.mark.parametrize("may_have_committed", [True, False])
async def test_a_copy_that_can_not_be_read_any_more(
    hosts: list[OneHost], monkeypatch: pytest.MonkeyPatch, may_have_committed: bool
) -> None:
    """Nothing was stored, but for a commit before that nobody knows of."""
    a = hosts[0]
    await a.run("CREATE TABLE t (n)")
    write = a.kept._database._in_writer

    def cut_off(*args: Any, **how: Any) -> Any:
        if may_have_committed and not how["again"]:
            raise DatabaseAway(may_have_committed=True)
        return write(*args, **how)

    def no_descriptor(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(a.kept._database, "_in_writer", cut_off)
        patched.setattr(d1_replicas, "_pieces", no_descriptor)
        with pytest.raises(Unavailable) as caught:
            await a.run("INSERT INTO t VALUES (1)")
    assert caught.value.code == ("sql_unknown" if may_have_committed else "unavailable")
    for host in hosts:
        assert await host.run("SELECT count(*) AS n FROM t") == [{"n": 0}]


async def test_files_become_rows_and_rows_files(hosts: list[OneHost], tmp_path: Path) -> None:
    files = tmp_path / "files"
    path = files / DEFAULT_OWNER / "n.sqlite"
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (n)")
        connection.execute("INSERT INTO t VALUES (7)")
    a, b = hosts
    await a.kept.import_files(d1_databases.files(files))
    assert [each.name for each in path.parent.iterdir()] == [f"n.sqlite{MOVED}"]
    assert await b.run("SELECT n FROM t") == [{"n": 7}]
    await b.run("UPDATE t SET n = 8")
    await a.kept.export_files(files, d1_databases.SUFFIX)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT n FROM t").fetchall() == [(8,)]
    assert await a.kept.sizes() == {}
