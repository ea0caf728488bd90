"""Transactions are durable and all or nothing; errors of the database become Unavailable."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, RootTransaction, event

from era.core.metadata import RunFilter, SessionFilter
from era.core.owners.audit import AuditFilter
from era.core.owners.usage import use_of
from era.errors import CommitFailed, SessionDeleted, Unavailable
from era.store.engine import database
from era.store.engine.database import DatabaseAway
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.store.postgres_proxy import PostgresProxy, postgres_proxy
from tests.store.rows import ended, execute, new, opened

__all__ = ["postgres_proxy"]


async def test_the_error_of_a_failing_database_has_no_sql(
    url: str, store: SqlStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A table that is gone stands for any trouble; the store must work again once the trouble is over."""
    session = await store.create_session(new("a"))
    await store.begin_run(mine("a"), "r1")
    execute(url, "ALTER TABLE runs RENAME TO away")
    with pytest.raises(CommitFailed) as commit:
        await store.end_run(ended(session, "r1"), data='{"secret": 1}', snapshot=None)
    with pytest.raises(Unavailable) as unavailable:
        await store.begin_run(mine("a"), "r2")
    for told in (str(commit.value), str(unavailable.value), caplog.text):
        assert "UPDATE" not in told
        assert "secret" not in told
    assert (await store.session(mine("a"))).version == 1
    execute(url, "ALTER TABLE away RENAME TO runs")
    assert (await store.end_run(ended(session, "r1"), data='{"secret": 2}', snapshot=None)).version == 2


async def test_a_full_disk_fails_the_commit_and_keeps_the_old_state(sqlite_store: SqlStore) -> None:
    store = sqlite_store
    session = await store.create_session(new("a"))
    await store.begin_run(mine("a"), "r1")

    def cap(connection: Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 30")

    await store.database.write(cap)
    with pytest.raises(CommitFailed):
        await store.end_run(ended(session, "r1"), data=json.dumps("x" * 1_000_000), snapshot=None)
    assert (await store.session(mine("a"))).data == "{}"
    assert (await store.end_run(ended(session, "r1"), data='{"n": 1}', snapshot=None)).version == 2


@pytest.fixture
def failing_commits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the next COMMIT on SQLite fail with this code, after it was carried out or not."""
    commit = RootTransaction.commit

    def fail_next(code: int, *, counts: bool) -> None:
        def failing(transaction: RootTransaction) -> None:
            monkeypatch.setattr(RootTransaction, "commit", commit)
            if counts:
                transaction.commit()
            error = sqlite3.OperationalError("the disk fails")
            error.sqlite_errorcode = code
            raise error

        monkeypatch.setattr(RootTransaction, "commit", failing)

    return fail_next


@pytest.mark.parametrize("counts", [True, False])
async def test_it_is_looked_up_whether_a_commit_counts_that_the_disk_failed(
    sqlite_store: SqlStore, failing_commits: Callable[..., None], counts: bool
) -> None:
    """And whoever is told before the commit is told once."""
    told: list[Any] = []
    session = await sqlite_store.create_session(new("a"))
    failing_commits(sqlite3.SQLITE_IOERR_FSYNC, counts=counts)
    await sqlite_store.begin_run(mine("a"), "r1", known=told.append)
    failing_commits(sqlite3.SQLITE_IOERR_FSYNC, counts=counts)
    assert (await sqlite_store.end_run(ended(session, "r1"), data='{"n": 1}', snapshot=None)).version == 2
    assert [run.version for run in await sqlite_store.runs(session.key, 10)] == [2]
    assert len(told) == 1


@pytest.mark.parametrize(("code", "is_unknown"), [(sqlite3.SQLITE_IOERR_FSYNC, True), (sqlite3.SQLITE_FULL, False)])
async def test_a_commit_that_the_disk_failed_is_unknown_unless_there_was_no_room(
    sqlite_store: SqlStore, failing_commits: Callable[..., None], code: int, is_unknown: bool
) -> None:
    failing_commits(code, counts=False)
    with pytest.raises(Unavailable) as caught:
        await sqlite_store.create_session(new("a"))
    assert (caught.value.may_have_committed, caught.value.code == "outcome_unknown") == (is_unknown, is_unknown)
    await sqlite_store.create_session(new("b"))


async def test_nothing_is_written_until_an_unknown_commit_is_settled(
    sqlite_url: str, sqlite_store: SqlStore, failing_commits: Callable[..., None]
) -> None:
    """It can't be while a transaction reads what was before."""
    event.listen(sqlite_store.database.engines.writer, "connect", _wait_for_nobody)
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM sessions").fetchall()
        await sqlite_store.create_session(new("a"))
        failing_commits(sqlite3.SQLITE_IOERR_FSYNC, counts=False)
        with pytest.raises(Unavailable):
            await sqlite_store.create_session(new("b"))
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                await sqlite_store.create_session(new("b"))
            assert not caught.value.may_have_committed
    await sqlite_store.create_session(new("b"))


async def test_what_a_killed_service_left_in_the_log_is_settled_first(
    sqlite_url: str, sqlite_store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sync may have failed, and whoever syncs it again isn't told: it has to be written once more."""
    sqlite_file, killed = Path(sqlite_url.removeprefix("sqlite:///")), tmp_path / "killed.db"
    await sqlite_store.create_session(new("a"))
    shutil.copy(sqlite_file, killed)
    shutil.copy(f"{sqlite_file}-wal", f"{killed}-wal")

    def sessions_in_the_file() -> int:
        alone = shutil.copy(killed, tmp_path / "without its log.db")
        with closing(sqlite3.connect(alone)) as connection:
            try:
                return int(connection.execute("SELECT count(*) FROM sessions").fetchone()[0])
            except sqlite3.OperationalError:  # there isn't even the table
                return 0

    found: list[int] = []
    monkeypatch.setattr(database, "upgrade", lambda engine: found.append(sessions_in_the_file()))
    assert sessions_in_the_file() == 0
    store = SqlStore(f"sqlite:///{killed}")
    await store.open()
    try:
        assert found == [1]
    finally:
        await store.close()


async def test_a_database_that_another_program_reads_is_opened(
    sqlite_url: str, sqlite_store: SqlStore, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    with closing(sqlite3.connect(path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM sessions").fetchall()
        await sqlite_store.create_session(new("a"))
        store = SqlStore(sqlite_url)
        await store.open()
        try:
            await store.create_session(new("b"))
        finally:
            await store.close()
    assert "can't be emptied" in caplog.text


def _wait_for_nobody(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA busy_timeout = 0")


async def test_an_end_after_a_deletion_that_comes_twice_counts_once(store: SqlStore) -> None:
    """The answer to the first may have been lost."""
    session, who = await store.create_session(new("a")), mine("a")
    await store.begin_run(who, "r1")
    await store.delete_session(who)
    end = ended(session, "r1", status="failed", committed=False)
    for _ in range(2):
        with pytest.raises(SessionDeleted):
            await store.end_run(end, data=None, snapshot=None, who=who, use=use_of(who, 5, {}))
    assert [(day.runs, day.cpu_us) for day in await store.usage.days(None, 0, 1 << 20)] == [(1, 5)]


async def test_a_closed_store_is_unavailable(url: str) -> None:
    store = SqlStore(url)
    await store.open()
    await store.close()
    await store.close()
    for call in (store.session(mine("a")), store.create_session(new("a"))):
        with pytest.raises(Unavailable):
            await call


async def test_connections_are_as_durable_as_promised(sqlite_store: SqlStore) -> None:
    await sqlite_store.create_session(new("a"))

    def pragmas(connection: Connection) -> list[Any]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    assert await sqlite_store.database.write(pragmas) == ["wal", 2, 1, 5000]


COMMITTER = """
import asyncio, sys
from era.core.models import NewSession, RunRecord, now
from tests.owners import mine
from era.store.engine.database import DatabaseAway
from era.store.metadata import SqlStore

async def main():
    store = SqlStore(sys.argv[1])
    await store.open()
    session = await store.create_session(NewSession(mine("a"), "python", True, "{}", {}, True, True, 30.0))
    for n in range(1_000_000):
        await store.begin_run(mine("a"), f"r{n}")
        record = RunRecord(f"r{n}", session.key, "ok", now(), now(), 0, committed=True)
        ended = await store.end_run(record, data='{"n": %d}' % n, snapshot=None)
        print(ended.version, n, flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "wait"),
    [("sqlite_url", 0.0), ("sqlite_url", 0.07), ("sqlite_url", 0.2), ("postgres_url", 0.07)],
    indirect=["url"],
)
async def test_kill_9_loses_nothing_acknowledged(url: str, wait: float) -> None:
    command = [sys.executable, "-c", textwrap.dedent(COMMITTER), url]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first
        time.sleep(wait)
        process.kill()
        lines = (first + process.stdout.read()).splitlines(keepends=True)
    version, n = map(int, [line for line in lines if line.endswith(b"\n")][-1].split())

    async with opened(url) as store:
        session = await store.session(mine("a"))
        assert session.version >= version
        kept = json.loads(session.data)["n"]
        assert kept >= n
        assert session.version == kept + 2, "data and version move together"
        runs = {run.id: run for run in await store.runs(session.key, 10)}
        assert runs[f"r{kept}"].version == session.version
        assert await store.mark_lost() in (0, 1)


OF_OWNERS: dict[str, Callable[[SqlStore, str], Awaitable[Any]]] = {
    "sessions": lambda store, owner: store.sessions(SessionFilter(owner, limit=9)),
    "a page": lambda store, owner: store.session_page(SessionFilter(owner, limit=9), 9),
    "runs": lambda store, owner: store.runs_of_owner(RunFilter(owner, 9)),
    "stats": lambda store, owner: store.storage_items.item_counts(owner),
    "resources": lambda store, owner: store.storage_items.all_items(owner, None, None, prefix="", limit=9, offset=0),
    "usage": lambda store, owner: store.usage.days(owner, 0, 9),
    "audit": lambda store, owner: store.audit.audit_entries(AuditFilter(9, owner)),
    "webhooks": lambda store, owner: store.webhooks.webhooks(owner),
    "metrics": lambda store, _: store.counts(),
}


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
@pytest.mark.parametrize("kind", OF_OWNERS)
async def test_an_owner_s_long_reads_keep_neither_others_nor_health_waiting(
    sqlite_store: SqlStore, kind: str, weakened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, database = OF_OWNERS[kind], sqlite_store.database
    if weakened:
        monkeypatch.setattr(database, "read_for", lambda _, job, *args: database.read(job, *args))
    end, begun, loop = threading.Event(), asyncio.Queue[None](), asyncio.get_running_loop()
    takes_long, in_reader = True, database._in_reader

    def slowly(job: Any, *args: Any) -> Any:
        if takes_long:
            loop.call_soon_threadsafe(begun.put_nowait, None)
            end.wait()
        return in_reader(job, *args)

    monkeypatch.setattr(database, "_in_reader", slowly)
    calls = [asyncio.ensure_future(call(sqlite_store, "greedy")) for _ in range(9)]
    try:
        for _ in range(database.engines.readers if weakened else 1):
            await begun.get()
        takes_long = False
        others = [sqlite_store.ping(), sqlite_store.present_sessions([1]), OF_OWNERS["runs"](sqlite_store, "other")]
        calls += [asyncio.ensure_future(each) for each in others]
        if weakened:
            await asyncio.sleep(0.01)
            assert not any(each.done() for each in calls)
        else:
            async with asyncio.timeout(60):
                await asyncio.gather(*calls[-3:])
            assert not any(each.done() for each in calls[:-3])
        assert begun.empty()
    finally:
        end.set()
        await asyncio.gather(*calls)


async def test_long_reads_of_whoever_is_gone_count_until_they_end(sqlite_store: SqlStore) -> None:
    """Or one who hangs up and asks again would have all readers."""
    database, loop = sqlite_store.database, asyncio.get_running_loop()
    end, begun = threading.Event(), asyncio.Queue[None]()

    def takes_long(_: Connection) -> None:
        loop.call_soon_threadsafe(begun.put_nowait, None)
        end.wait()

    first = asyncio.create_task(database.read_for("greedy", takes_long))
    await begun.get()
    first.cancel()
    second = asyncio.create_task(database.read_for("greedy", takes_long))
    await sqlite_store.ping()
    assert begun.empty()
    end.set()
    await asyncio.gather(first, second, return_exceptions=True)
    assert first.cancelled()
    assert begun.qsize() == 1


async def test_exports_of_whole_sessions_keep_no_lists_waiting(sqlite_store: SqlStore) -> None:
    """Neither their owner's nor others', however many are under way: each may take minutes."""
    loop = asyncio.get_running_loop()
    end, begun = threading.Event(), asyncio.Queue[None]()

    def take(*_: object) -> None:
        loop.call_soon_threadsafe(begun.put_nowait, None)
        end.wait()

    for name in "ab":
        await sqlite_store.create_session(new(name))
    exports = [asyncio.create_task(sqlite_store.dump(mine(name), history=True, take=take)) for name in "ab"]
    try:
        await begun.get()
        async with asyncio.timeout(60):
            for of in OF_OWNERS.values():
                await asyncio.gather(
                    of(sqlite_store, mine("a").owner), of(sqlite_store, "another"), sqlite_store.ping()
                )
        assert begun.empty()
    finally:
        end.set()
        await asyncio.gather(*exports)


async def test_who_has_to_write_waits_until_an_unknown_commit_is_settled(
    sqlite_url: str, sqlite_store: SqlStore, failing_commits: Callable[..., None]
) -> None:
    """And keeps no other waiting for as long as somebody reads what was before."""
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as reader:
        await sqlite_store.create_session(new("a"))
        await sqlite_store.begin_run(mine("a"), "r1")
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM sessions").fetchall()
        failing_commits(sqlite3.SQLITE_IOERR_FSYNC, counts=False)
        session = await sqlite_store.session(mine("a"))
        end = asyncio.create_task(sqlite_store.end_run(ended(session, "r1"), data='{"n": 1}', snapshot=None))
        for _ in range(3):
            with pytest.raises(Unavailable) as caught:
                await sqlite_store.create_session(new("b"))
        assert not caught.value.may_have_committed
        assert not end.done()
        reader.rollback()
        await end
    assert json.loads((await sqlite_store.session(mine("a"))).data) == {"n": 1}


async def test_read_fails_within_bound_while_database_hangs(
    postgres_url: str, postgres_proxy: PostgresProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(postgres_proxy.url(postgres_url)) as store:
        await store.create_session(new("a"))
        shown = await store.session(mine("a"))
        monkeypatch.setattr(database, "PROMPT_SECONDS", 0.2)
        postgres_proxy.goes_on.clear()
        try:
            async with asyncio.timeout(30):
                with pytest.raises(DatabaseAway, match="can't be reached"):
                    await store.session(mine("a"))
        finally:
            postgres_proxy.goes_on.set()
        monkeypatch.undo()
        assert await store.session(mine("a")) == shown
