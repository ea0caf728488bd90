"""Hostile SQL reaches one database, for a bounded time, with bounded memory and disk."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from era.core.concurrency.fair_limiter import FairLimiter
from era.core.models import DEFAULT_OWNER
from era.errors import BadRequest, EraError, Forbidden, TooLarge
from era.store.d1 import d1_databases, d1_worker
from era.store.d1.d1_databases import D1Databases
from tests.removals import noted_removals, on_the_loop
from tests.store.d1 import ROOM, A, query, run

SECRET = "the canary of another namespace"
SLOW_FUNCTION = "SELECT instr(printf('%.*c', 1900000, 'a'), printf('%.*c', 900000, 'a') || 'b')"
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another namespace's file, with something to find in it."""
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE secrets (text)")
        connection.execute("INSERT INTO secrets VALUES (?)", [SECRET])
    connection.close()
    return path


async def test_statements_together_are_all_or_nothing(databases: D1Databases) -> None:
    answer = await run(
        databases, *A, "CREATE TABLE t (n UNIQUE); INSERT INTO t VALUES (1); SELECT n FROM t", many=True, room=ROOM
    )
    assert answer["results"] == [{"n": 1}]
    assert answer["meta"]["changes"] == 1
    assert answer["meta"]["changed_db"] is True
    with pytest.raises(BadRequest) as caught:
        await run(databases, *A, "INSERT INTO t VALUES (2); INSERT INTO t VALUES (1)", many=True, room=ROOM)
    assert caught.value.code == "sql_error"
    assert await query(databases, "SELECT n FROM t") == [{"n": 1}]


async def test_values_of_every_type_are_stored_and_returned(databases: D1Databases) -> None:
    values = [1, -1.5, "é", None, True, [0, 255]]
    rows = await query(databases, "SELECT ? a, ? b, ? c, ? d, ? e, ? f, 9e999 g", values)
    assert rows == [{"a": 1, "b": -1.5, "c": "é", "d": None, "e": 1, "f": [0, 255], "g": None}]
    assert await query(databases, "SELECT :x AS x", {"x": 2}) == [{"x": 2}]
    trigger = (
        "CREATE TABLE t (n); CREATE TRIGGER r AFTER INSERT ON t BEGIN DELETE FROM t WHERE n = ';'; END; SELECT ';'"
    )
    assert (await run(databases, *A, trigger, many=True, room=ROOM))["results"] == [{"';'": ";"}]


async def test_full_text_and_ranges_are_searched(databases: D1Databases) -> None:
    """fts5, with triggers that keep it up to date as its documentation has it, and rtree: the modules there are."""
    script = """
        CREATE TABLE docs (id INTEGER PRIMARY KEY, body TEXT);
        CREATE VIRTUAL TABLE found USING fts5(body, content='docs', content_rowid='id', tokenize='porter');
        CREATE TRIGGER added AFTER INSERT ON docs BEGIN
            INSERT INTO found(rowid, body) VALUES (new.id, new.body);
        END;
        INSERT INTO docs (body) VALUES ('a fox runs'), ('dogs sleep');
        CREATE VIRTUAL TABLE boxes USING rtree(id, low, high);
        INSERT INTO boxes VALUES (1, 0, 2), (2, 5, 7);
    """
    await run(databases, *A, script, many=True, room=ROOM)
    search = "SELECT rowid, snippet(found, 0, '[', ']', '', 9) AS s FROM found WHERE found MATCH ? ORDER BY bm25(found)"
    assert await query(databases, search, ["running"]) == [{"rowid": 1, "s": "a fox [runs]"}]
    assert await query(databases, "SELECT id FROM boxes WHERE low < 1") == [{"id": 1}]
    await query(databases, "INSERT INTO found(found) VALUES ('rebuild')")
    await run(databases, *A, "DROP TABLE found; DROP TABLE boxes;", many=True, room=ROOM)


@pytest.mark.parametrize(
    "sql",
    [
        "PRAGMA page_size = 512",
        "PRAGMA data_version = 2",
        "ATTACH 'PATH' AS other",
        "VACUUM INTO 'PATH.copy'",
        "VACUUM",
        "DETACH main",
        "PRAGMA journal_mode = OFF",
        "PRAGMA database_list",
        "SELECT * FROM pragma_database_list",
        "PRAGMA hard_heap_limit = 0",
        "PRAGMA max_page_count = 1000000",
        "PRAGMA temp_store_directory = '/tmp'",
        "PRAGMA writable_schema = ON",
        "SELECT load_extension('PATH')",
        "SELECT fts3_tokenizer('x')",
        "SELECT readfile('PATH')",
        "SELECT writefile('PATH.copy', 'x')",
        "CREATE VIRTUAL TABLE v USING csv(filename='PATH')",
        "CREATE VIRTUAL TABLE v USING dbstat",
        "BEGIN",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT s",
    ],
)
async def test_nothing_beyond_the_database_is_reached(databases: D1Databases, other: Path, sql: str) -> None:
    with pytest.raises((Forbidden, BadRequest, TooLarge)):
        await query(databases, sql.replace("PATH", str(other)))
    assert sorted(path.name for path in other.parent.iterdir()) == ["d1", "other.sqlite"]
    assert await query(databases, "SELECT 1 AS still") == [{"still": 1}]


@pytest.mark.parametrize("sql", ["UPDATE sqlite_schema SET sql = 'x'", "DELETE FROM sqlite_schema"])
async def test_the_schema_table_cannot_be_written(databases: D1Databases, sql: str) -> None:
    await run(databases, *A, "CREATE TABLE t (n)", many=True, room=ROOM)
    with pytest.raises(EraError):
        await query(databases, sql)
    assert await query(databases, "SELECT name FROM sqlite_schema") == [{"name": "t"}]


def test_without_the_authorizer_another_database_is_read(
    tmp_path: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steal = f"ATTACH '{other}' AS other"
    limits = {which: value for which, value in d1_worker._LIMITS.items() if which != sqlite3.SQLITE_LIMIT_ATTACHED}
    monkeypatch.setattr(d1_worker, "_LIMITS", limits)
    with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
        d1_worker.run(str(tmp_path / "a.sqlite"), steal, [], False, 1 << 20)
    monkeypatch.setattr(d1_worker, "authorize", lambda *_: sqlite3.SQLITE_OK)
    # One statement more is needed, since a call may be many.
    rows, _ = d1_worker.run(str(tmp_path / "a.sqlite"), f"{steal}; SELECT text FROM other.secrets", [], True, 1 << 20)
    assert json.loads(rows) == [{"text": SECRET}]


@pytest.mark.slow
async def test_sql_that_does_not_end_is_stopped_and_other_calls_go_on(databases: D1Databases) -> None:
    """Those of the owner's other sessions, and those of other owners."""
    begun = time.monotonic()
    endless = asyncio.create_task(query(databases, f"{ENDLESS} count(*) FROM c"))
    await asyncio.sleep(0.1)
    for owner, asker in ((DEFAULT_OWNER, "another session"), ("another owner", "")):
        other = await run(databases, owner, "b", "SELECT 1 AS one", many=False, room=ROOM, asker=asker)
        assert other["results"] == [{"one": 1}]
        assert not endless.done()
    with pytest.raises(BadRequest) as caught:
        await endless
    assert caught.value.code == "sql_timeout"
    assert time.monotonic() - begun > 4
    assert await query(databases, "SELECT 1 AS one") == [{"one": 1}]


async def endless(databases: D1Databases, askers: Sequence[str]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """An owner's calls that don't end by themselves, in as many namespaces as there are who ask."""
    sql = f"{ENDLESS} count(*) FROM c"
    for number in range(len(askers)):
        await run(databases, "greedy", f"n{number}", "SELECT 1", many=False, room=ROOM)
    tasks = [
        asyncio.create_task(run(databases, "greedy", f"n{number}", sql, many=False, room=ROOM, asker=asker))
        for number, asker in enumerate(askers)
    ]
    await asyncio.sleep(0.2)
    yield tasks
    await end(tasks)


async def end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def is_held_up(call: Coroutine[Any, Any, Any], by: Sequence[asyncio.Task[Any]]) -> bool:
    """Whether a call, which takes a moment by itself, isn't done as long as others are under way. Ends those."""
    held_up = asyncio.create_task(call)
    await asyncio.wait([held_up], timeout=1.5)
    waited = not held_up.done()
    assert not any(task.done() for task in by)
    await end(by)
    await held_up
    return waited


@pytest.fixture
async def of_eight_sessions(databases: D1Databases) -> AsyncIterator[list[asyncio.Task[Any]]]:
    async for tasks in endless(databases, "abcdefgh"):
        yield tasks


@pytest.fixture
async def of_one_session(databases: D1Databases) -> AsyncIterator[list[asyncio.Task[Any]]]:
    async for tasks in endless(databases, "aaaa"):
        yield tasks


@pytest.mark.slow
async def test_one_owner_cant_have_all_workers(
    databases: D1Databases, of_eight_sessions: list[asyncio.Task[Any]]
) -> None:
    for owner in ("one", "two", "three"):
        await run(databases, owner, "a", "SELECT 1", many=False, room=ROOM)
    assert not any(task.done() for task in of_eight_sessions)


@pytest.fixture
def no_turns(databases: D1Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes turns away: whoever comes first has all workers."""
    monkeypatch.setattr(databases, "_slots", FairLimiter(4))


@pytest.mark.slow
@pytest.mark.usefixtures("no_turns")
async def test_without_turns_one_owner_has_all_workers(
    databases: D1Databases, of_eight_sessions: list[asyncio.Task[Any]]
) -> None:
    call = run(databases, "one", "a", "SELECT 1", many=False, room=ROOM)
    assert await is_held_up(call, of_eight_sessions)


@pytest.mark.slow
async def test_one_session_cant_have_all_workers_of_its_owner(
    databases: D1Databases, of_one_session: list[asyncio.Task[Any]]
) -> None:
    for asker in ("b", "c", ""):
        await run(databases, "greedy", "a", "SELECT 1", many=False, room=ROOM, asker=asker)
    assert not any(task.done() for task in of_one_session)


@pytest.mark.slow
@pytest.mark.usefixtures("no_turns")
async def test_without_turns_one_session_has_all_workers(
    databases: D1Databases, of_one_session: list[asyncio.Task[Any]]
) -> None:
    call = run(databases, "greedy", "a", "SELECT 1", many=False, room=ROOM, asker="b")
    assert await is_held_up(call, of_one_session)


def wait(sql: str) -> Iterator[str]:
    """Statements, of which each is held up by something else for a while."""
    time.sleep(0.4)
    yield sql


@pytest.mark.parametrize("clock", ["process_time", "monotonic"])
def test_time_is_what_a_call_takes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: str) -> None:
    """With a clock that shows what others take, too, it would pay for them."""
    monkeypatch.setattr(d1_worker, "statements", wait)
    monkeypatch.setattr(d1_worker, "CPU_SECONDS", 0.3)
    monkeypatch.setattr(d1_worker, "_STEPS", 1)
    monkeypatch.setattr("era.store.d1.d1_worker.time.process_time", getattr(time, clock))
    request = json.dumps(
        {"path": str(tmp_path / "a"), "sql": "SELECT 1", "params": [], "many": True, "most_bytes": 1 << 20}
    )
    head, _ = d1_worker.answer(request.encode())
    assert head.get("kind") == (None if clock == "process_time" else "time")


async def test_the_kernel_ends_what_can_not_be_interrupted(
    databases: D1Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the processor time that it took."""
    worker = tmp_path / "worker.py"
    worker.write_text(d1_databases._WORKER.read_text().replace("_KILL_CPU_SECONDS = 7", "_KILL_CPU_SECONDS = 0"))
    monkeypatch.setattr(d1_databases, "_WORKER", worker)
    with pytest.raises(BadRequest) as caught:
        await query(databases, SLOW_FUNCTION)
    assert caught.value.code == "sql_timeout"
    assert await query(databases, "SELECT 1 AS one") == [{"one": 1}]


async def test_one_call_of_a_function_that_takes_for_ever_is_killed(
    databases: D1Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can interrupt SQLite in there. Were it a thread of the service's, it would be lost."""
    monkeypatch.setattr("era.store.d1.d1_databases._KILL_SECONDS", 1.0)
    begun = time.monotonic()
    with pytest.raises(BadRequest) as caught:
        await query(databases, SLOW_FUNCTION)
    assert caught.value.code == "sql_timeout"
    assert time.monotonic() - begun < 60
    monkeypatch.undo()
    assert await query(databases, "SELECT 1 AS one") == [{"one": 1}]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT zeroblob(1000000000)",
        "SELECT randomblob(1000000000)",
        f"SELECT group_concat(x) FROM ({ENDLESS} x FROM c LIMIT 500000)",
        f"{ENDLESS} randomblob(1000000) FROM c LIMIT 100000",
        f"SELECT count(*) FROM (SELECT DISTINCT randomblob(1000000) FROM ({ENDLESS} x FROM c LIMIT 9999))",
        f"WITH big AS MATERIALIZED ({ENDLESS} zeroblob(1000000) AS z FROM c LIMIT 9999) SELECT sum(length(z)) FROM big",
        f"{ENDLESS} x FROM c LIMIT 20000",
        f"SELECT {'+'.join('1' for _ in range(100_000))}",
        f"SELECT {'NOT ' * 5000}1",
        "SELECT 1 WHERE 'x' LIKE '" + "%a" * 5000 + "'",
    ],
)
async def test_memory_and_answers_are_bounded(databases: D1Databases, sql: str) -> None:
    with pytest.raises((TooLarge, BadRequest)):
        await query(databases, sql)
    assert await query(databases, "SELECT 1 AS one") == [{"one": 1}]


async def test_the_size_of_a_database_is_bounded(databases: D1Databases, tmp_path: Path) -> None:
    await run(databases, *A, "CREATE TABLE t (b)", many=True, room=ROOM)
    fill = f"INSERT INTO t {ENDLESS} randomblob(100000) FROM c LIMIT 1000"
    with pytest.raises(TooLarge) as caught:
        await query(databases, fill)
    assert caught.value.code == "storage_full"
    assert await query(databases, "SELECT count(*) AS n FROM t") == [{"n": 0}]
    assert sum(path.stat().st_size for path in (tmp_path / "d1").glob("*/*")) < 5 << 20
    with pytest.raises(TooLarge):  # and so has all of the storage
        await run(databases, *A, f"INSERT INTO t {ENDLESS} randomblob(100000) FROM c LIMIT 10", many=False, room=4096)
    await run(databases, *A, "DELETE FROM t", many=False, room=0)


async def test_the_size_of_a_schema_is_bounded(databases: D1Databases) -> None:
    many = ";".join(f"CREATE TABLE t{n} (x)" for n in range(d1_worker.MAX_TABLES + 1))
    with pytest.raises(TooLarge):
        await run(databases, *A, many, many=True, room=ROOM)
    assert await query(databases, "SELECT count(*) AS n FROM sqlite_schema") == [{"n": 0}]


@pytest.mark.parametrize("sql", ["", "SELECT", "SELECT 1; SELECT 2", "SELECT ?", "SELECT \0", "SELECT 'x", ";;;"])
async def test_bad_sql_is_a_bad_request(databases: D1Databases, sql: str) -> None:
    if not sql.strip(";"):
        assert await query(databases, sql) == []
        return
    with pytest.raises(BadRequest) as caught:
        await query(databases, sql)
    assert caught.value.hint


async def test_no_state_of_a_connection_outlives_a_call(databases: D1Databases) -> None:
    await query(databases, "CREATE TEMP TABLE left_over (x)")
    with pytest.raises(BadRequest):
        await query(databases, "SELECT * FROM left_over")
    assert databases.total == 0, "a database in which nothing was committed is no file"


async def test_a_dropped_database_is_gone(databases: D1Databases, tmp_path: Path) -> None:
    await run(databases, *A, "CREATE TABLE t (n)", many=True, room=ROOM)
    assert list(databases.sizes(DEFAULT_OWNER)) == ["a"]
    again = D1Databases(tmp_path / "d1", 1 << 20)
    again.open()
    assert again.sizes(DEFAULT_OWNER) == databases.sizes(DEFAULT_OWNER)
    assert await databases.drop(*A)
    assert not await databases.drop(*A)
    assert list((tmp_path / "d1").glob("*/*")) == []


async def test_a_killed_worker_leaves_the_old_state(databases: D1Databases) -> None:
    await run(databases, *A, "CREATE TABLE t (n); INSERT INTO t VALUES (1)", many=True, room=ROOM)
    long = asyncio.create_task(
        run(databases, *A, f"UPDATE t SET n = 2; {ENDLESS} count(*) FROM c", many=True, room=ROOM)
    )
    await asyncio.sleep(0.5)
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    assert await query(databases, "SELECT n FROM t") == [{"n": 1}]


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("weakened", [False, True], ids=["sound", "weakened"])
async def test_a_worker_yields_to_the_service(
    databases: D1Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    """Beside a busy process of the service's, on the same processor, endless SQL gets little of it."""
    if weakened:
        weak = tmp_path / "worker.py"
        weak.write_text(d1_databases._WORKER.read_text().replace("os.nice(_NICENESS)", "pass"))
        monkeypatch.setattr(d1_databases, "_WORKER", weak)
    assert await query(databases, "SELECT 1 AS one") == [{"one": 1}]
    ((worker, _),) = databases._idle
    own = os.getpriority(os.PRIO_PROCESS, 0)
    expected = own if weakened else min(own + 10, 19)
    assert os.getpriority(os.PRIO_PROCESS, worker.pid) == expected
    assert os.getpgid(worker.pid) != os.getpgid(0), "Ctrl-C reaches it"
    processor = {min(os.sched_getaffinity(0))}
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for pid in (worker.pid, busy.pid):
            os.sched_setaffinity(pid, processor)
        endless = asyncio.create_task(query(databases, f"{ENDLESS} count(*) FROM c"))
        used = processor_seconds(worker.pid)
        while processor_seconds(worker.pid) == used:  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.01)
        before = [processor_seconds(pid) for pid in (worker.pid, busy.pid)]
        while processor_seconds(busy.pid) < before[1] + 0.3:  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.01)
        its, services = (processor_seconds(pid) - at for pid, at in zip((worker.pid, busy.pid), before, strict=True))
    finally:
        busy.kill()
        busy.wait()
    endless.cancel()
    await asyncio.wait([endless])
    assert its > services / 2 if weakened else its < services / 3, (its, services)


def test_an_answer_is_json_whatever_is_in_a_row(tmp_path: Path) -> None:
    line = {"path": str(tmp_path / "x.sqlite"), "sql": "SELECT CAST(x'ff41' AS TEXT) AS t", "params": []}
    head, result = d1_worker.answer(json.dumps({**line, "many": False, "most_bytes": 1 << 20}).encode())
    assert head == {"size": len(b"".join(result))}
    assert json.loads(b"".join(result))["results"] == [{"t": "\ufffdA"}]


async def test_hosts_that_share_files_remove_none_that_another_is_just_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = [D1Databases(tmp_path / "d1", 4 << 20, is_shared=True) for _ in range(2)]
    for host in hosts:
        host.open()
    go, worker, commit = tmp_path / "go", tmp_path / "worker.py", 'connection.execute("COMMIT")'
    wait = f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(go)!r}), True)]"
    worker.write_text(d1_databases._WORKER.read_text().replace(commit, f"{wait}; {commit}"))
    path = tmp_path / "d1" / DEFAULT_OWNER / "a.sqlite"
    with monkeypatch.context() as patched:
        patched.setattr(d1_databases, "_WORKER", worker)
        first = "CREATE TABLE t (n); INSERT INTO t VALUES (1)"
        making = asyncio.create_task(run(hosts[0], *A, first, many=True, room=ROOM))
        while not Path(f"{path}-journal").exists():  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.01)
    assert path.stat().st_size == 0
    assert await query(hosts[1], "SELECT 1 AS one") == [{"one": 1}]
    assert hosts[1].sizes(DEFAULT_OWNER) == {}, "it isn't one yet"
    go.touch()
    await making
    for host in hosts:
        assert await query(host, "SELECT n FROM t") == [{"n": 1}]
        await host.close()


async def test_a_database_to_which_nothing_was_committed_leaves_no_file(databases: D1Databases, tmp_path: Path) -> None:
    assert await query(databases, "SELECT 1 AS one") == [{"one": 1}]
    assert databases.sizes(DEFAULT_OWNER) == {}
    assert list(tmp_path.glob("d1/*/*")) == []


async def test_a_database_is_removed_on_a_thread(
    databases: D1Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be large, and its journal as well."""
    await query(databases, "CREATE TABLE t (n)")
    noted = noted_removals(monkeypatch)
    assert await databases.drop(*A)
    assert {name for name, _ in noted} == {"a.sqlite", "a.sqlite-journal"}
    assert on_the_loop(noted) == []
    assert not await databases.drop(*A)
