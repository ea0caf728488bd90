"""What callers of SQL databases are told: results that are as long as they may be, what became of a call whose worker
was killed or died, and what is refused."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from era.errors import BadRequest, EraError, Forbidden, SqlUnknown, TooLarge, Unavailable
from era.store.d1 import d1_databases, d1_worker
from era.store.d1.d1_databases import D1Databases
from tests.soaking import soak_the_rest
from tests.store.d1 import ROOM, A, query, run
from tests.unit.core import until

ONE = "SELECT 1 AS one"
COMMIT = 'connection.execute("COMMIT")'
BLOBS = "SELECT zeroblob(2000000) AS b UNION ALL SELECT randomblob(2000000)"


def rows_named(name: str, count: int) -> str:
    return f'WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT {count}) SELECT x AS "{name}" FROM c'


# -- long results ---------------------------------------------------------------------------------------------------


async def test_names_of_columns_count_in_each_row(databases: D1Databases) -> None:
    """They are in each row's JSON."""
    assert len(await query(databases, rows_named("a" * 95_000, 40))) == 40
    for count in (650, 9_000):
        with pytest.raises(TooLarge) as caught:
            await query(databases, rows_named("a" * 95_000, count))
        assert caught.value.code == "too_large"


@pytest.mark.parametrize(
    ("bound", "sql"),
    [("_RESULT_BYTES", rows_named("a" * 1000, 9)), ("_LINE_BYTES", f"SELECT {'a' * 9000}")],
)
async def test_more_than_a_worker_should_say_is_too_large(
    databases: D1Databases, monkeypatch: pytest.MonkeyPatch, bound: str, sql: str
) -> None:
    monkeypatch.setattr(d1_databases, bound, 4096)
    with pytest.raises(TooLarge) as caught:
        await query(databases, sql)
    assert caught.value.code == "too_large"
    assert await query(databases, ONE) == [{"one": 1}]  # by another worker, of which nothing is unread


async def longest_turn(call: Coroutine[Any, Any, Any]) -> float:
    """How long the event loop had no turn for others while a call was made."""
    task, longest = asyncio.create_task(call), 0.0
    while not task.done():
        begun = time.perf_counter()
        await asyncio.sleep(0)
        longest = max(longest, time.perf_counter() - begun)
    await task
    return longest


async def test_a_long_result_does_not_hold_up_others(databases: D1Databases) -> None:
    """As parsing it does, which nothing can interrupt."""

    async def least(run: Callable[..., Coroutine[Any, Any, Any]]) -> float:
        return min([await longest_turn(run(*A, BLOBS, many=False, room=ROOM)) for _ in range(3)])

    assert len(b"".join(await databases.run_as_json(*A, BLOBS, many=False, room=ROOM))) > 8 << 20
    assert await least(databases.run_as_json) * 4 < await least(partial(run, databases))


async def test_nothing_is_committed_of_a_call_whose_result_can_not_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "a")

    def answer(sql: str) -> dict[str, Any]:
        request = {"path": path, "sql": sql, "params": [], "many": True, "most_bytes": 1 << 20}
        return d1_worker.answer(json.dumps(request).encode())[0]

    assert "size" in answer("CREATE TABLE t (n)")

    def no_memory(_: object) -> bytes:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(d1_worker, "_json", no_memory)
        assert answer("INSERT INTO t VALUES (1); SELECT 1")["kind"] == "memory"
    rows, _ = d1_worker.run(path, "SELECT count(*) AS n FROM t", [], False, 1 << 20)
    assert json.loads(rows) == [{"n": 0}]


# -- workers that end -----------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has workers do something else where they would commit, where there is a file `go`."""
    go = tmp_path / "go"

    def instead(what: str) -> None:
        made = tmp_path / "worker.py"
        text = d1_databases._WORKER.read_text()
        assert text.count(COMMIT) == 1
        made.write_text(text.replace(COMMIT, f"({what}) if os.path.exists({str(go)!r}) else {COMMIT}"))
        monkeypatch.setattr(d1_databases, "_WORKER", made)
        go.touch()

    return instead


ENDS = {
    "killed before": ("time.sleep(60)", 0),
    "killed after": (f"({COMMIT}, time.sleep(60))", 1),
    "dies before": ("os.abort()", 0),
    "dies after": (f"({COMMIT}, os.abort())", 1),
    "used up its time": (f"({COMMIT}, os.kill(os.getpid(), {int(signal.SIGXCPU)}))", 1),
}


@pytest.mark.parametrize("end", soak_the_rest(ENDS, ["killed after", "dies before"]))
async def test_nobody_knows_what_became_of_a_commit_that_was_cut_off(
    databases: D1Databases,
    tmp_path: Path,
    worker: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    what, rows = ENDS[end]
    await query(databases, "CREATE TABLE t (n)")
    await databases.close()  # so that the next worker is another
    worker(what)
    monkeypatch.setattr(d1_databases, "_COMMIT_SECONDS", 2.0)
    with pytest.raises(SqlUnknown) as caught:
        await query(databases, "INSERT INTO t VALUES (1)")
    error = caught.value
    assert (error.status, error.code) == (503, "sql_unknown")
    assert "undone" not in error.message
    assert error.hint
    assert error.retry_after is None, "clients would send it again by themselves"
    (tmp_path / "go").unlink()
    assert await query(databases, "SELECT count(*) AS n FROM t") == [{"n": rows}]


@pytest.mark.parametrize(
    "sql", soak_the_rest([ONE, "SELECT * FROM t", "UPDATE t SET n = 2 WHERE n = 7"], ["UPDATE t SET n = 2 WHERE n = 7"])
)
async def test_where_nothing_has_changed_nothing_is_unknown(
    databases: D1Databases, worker: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, sql: str
) -> None:
    await query(databases, "CREATE TABLE t (n)")
    await databases.close()
    worker("time.sleep(60)")
    monkeypatch.setattr(d1_databases, "_KILL_SECONDS", 2.0)
    with pytest.raises(BadRequest) as caught:
        await query(databases, sql)
    assert caught.value.code == "sql_timeout"


async def test_a_commit_may_take_longer_than_the_rest_of_a_call(
    databases: D1Databases, tmp_path: Path, worker: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a slow disk. To kill the worker would leave nobody knowing what became of it."""
    await query(databases, "CREATE TABLE t (n)")
    await databases.close()
    worker(f"(time.sleep(4), {COMMIT})")
    (tmp_path / "go").rename(tmp_path / "later")
    await query(databases, "SELECT 1")  # with the worker that is there then
    (tmp_path / "later").rename(tmp_path / "go")
    monkeypatch.setattr(d1_databases, "_KILL_SECONDS", 2.0)
    answer = await run(databases, *A, "INSERT INTO t VALUES (1)", many=False, room=ROOM)
    assert answer["meta"]["changes"] == 1


async def test_a_worker_that_answers_as_it_is_killed_has_answered(
    databases: D1Databases, worker: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    await query(databases, "CREATE TABLE t (n)")
    await databases.close()
    worker(f"(time.sleep(2.5), {COMMIT})")
    monkeypatch.setattr(d1_databases, "_COMMIT_SECONDS", 1.0)
    end = databases._end

    def late(*given: Any, **named: Any) -> None:
        time.sleep(2)  # as a service that gets no processor
        end(*given, **named)

    monkeypatch.setattr(databases, "_end", late)
    answer = await run(databases, *A, "INSERT INTO t VALUES (1)", many=False, room=ROOM)
    assert answer["meta"]["changes"] == 1


async def test_a_call_that_is_cancelled_ends_once_its_worker_has(
    databases: D1Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may write to the file until then, as where it waits for a disk. It has said more than was read."""
    started = databases._worker
    workers: list[Any] = []

    async def worker() -> asyncio.subprocess.Process:
        made = await started()
        kill, loop = made.kill, asyncio.get_running_loop()
        monkeypatch.setattr(made, "kill", lambda: loop.call_later(0.2, kill))
        workers.append(made)
        return made

    async def nothing_read(_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(databases, "_worker", worker)
    monkeypatch.setattr(d1_databases._Answer, "read", nothing_read)
    call = asyncio.create_task(databases.run_as_json(*A, BLOBS, many=False, room=ROOM))
    async with asyncio.timeout(30):
        await until(lambda: bool(workers) and workers[0].stdout._paused)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert workers[0].returncode is not None


def fails(code: str) -> str:
    """What fails in a worker as SQLite does with this code."""
    return f"exec('error = sqlite3.OperationalError(); error.sqlite_errorcode = sqlite3.{code}; raise error')"


@pytest.mark.parametrize(
    ("what", "code", "rows"),
    [
        (f"({COMMIT}, {fails('SQLITE_IOERR_FSYNC')})", "sql_unknown", 1),  # of the journal, once it is truncated
        (fails("SQLITE_FULL"), "storage_full", 0),
    ],
)
async def test_nobody_knows_what_became_of_a_commit_that_the_disk_failed(
    databases: D1Databases, tmp_path: Path, worker: Callable[[str], None], what: str, code: str, rows: int
) -> None:
    """But where there is no room, that is noticed before anything is committed."""
    await query(databases, "CREATE TABLE t (n)")
    await databases.close()
    worker(what)
    with pytest.raises(EraError) as caught:
        await query(databases, "INSERT INTO t VALUES (1)")
    assert caught.value.code == code
    (tmp_path / "go").unlink()
    assert await query(databases, "SELECT count(*) AS n FROM t") == [{"n": rows}]


def test_what_is_written_is_known_before_the_commit(tmp_path: Path) -> None:
    """Also where no row of a program's has changed."""
    said: list[str] = []
    for sql, writes in (
        ("CREATE TABLE t (n); CREATE INDEX i ON t (n); INSERT INTO t VALUES (1)", True),
        ("SELECT * FROM t", False),
        ("DELETE FROM t WHERE n = 2", False),
        ("UPDATE t SET n = n", True),
        ("ANALYZE", True),
        ("ANALYZE", True),
        ("REINDEX i", True),
        ("SELECT 1", False),
    ):
        said.clear()
        d1_worker.run(str(tmp_path / "a"), sql, [], True, 1 << 20, committing=lambda: said.append("committing"))
        assert bool(said) is writes, sql


async def test_a_commit_that_fails_is_told_as_undone(databases: D1Databases) -> None:
    deferred = "CREATE TABLE p (n PRIMARY KEY); CREATE TABLE c (n REFERENCES p DEFERRABLE INITIALLY DEFERRED)"
    await run(databases, *A, deferred, many=True, room=ROOM)
    with pytest.raises(BadRequest) as caught:
        await query(databases, "INSERT INTO c VALUES (1)")
    assert caught.value.code == "sql_error"
    assert await query(databases, "SELECT count(*) AS n FROM c") == [{"n": 0}]


# -- what is refused ------------------------------------------------------------------------------------------------


async def test_each_owner_has_as_many_databases(databases: D1Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d1_databases, "_MOST_DATABASES", 3)

    async def make(owner: str, namespace: str) -> None:
        await run(databases, owner, namespace, "CREATE TABLE t (n)", many=False, room=ROOM, asker=namespace)

    done = await asyncio.gather(*(make("greedy", f"n{n}") for n in range(9)), return_exceptions=True)
    refusals = [each for each in done if isinstance(each, EraError)]
    assert {(each.code, each.message) for each in refusals} == {("too_large", "You have 3 databases already.")}
    assert 3 <= len(databases.sizes("greedy")) <= 4, "one more may have been under way"
    for namespace in "abc":
        await make("another", namespace)
    await run(databases, "another", "a", "INSERT INTO t VALUES (1)", many=False, room=ROOM)
    assert len(databases.sizes("another")) == 3
    assert databases.total == sum(sum(databases.sizes(owner).values()) for owner in ("greedy", "another"))
    assert await databases.drop("another", "a")
    await make("another", "d")
    assert list(databases.sizes("another")) == ["b", "c", "d"]


async def test_bytes_are_lists_of_numbers_in_params_of_both_kinds(databases: D1Databases) -> None:
    for sql, params in (("SELECT ? AS b", [[0, 255]]), ("SELECT :b AS b", {"b": [0, 255]})):
        assert await query(databases, sql, params) == [{"b": [0, 255]}]
        assert await query(databases, sql.replace("SELECT", "SELECT typeof(").replace(" AS", ") AS"), params) == [
            {"b": "blob"}
        ]
    with pytest.raises(BadRequest):
        await query(databases, "SELECT :b AS b", {"b": [256]})


@pytest.mark.parametrize(
    "sql",
    [
        "VACUUM",
        " /* so */ vacuum main; -- it is",
        "VACUUM INTO 'PATH'",
        "SELECT load_extension('PATH')",
        "SELECT * FROM pragma_database_list",
        "ATTACH 'PATH' AS other",
        "BEGIN",
        "CREATE VIRTUAL TABLE v USING csv(filename='PATH')",
    ],
)
async def test_what_reaches_beyond_the_database_is_forbidden(databases: D1Databases, tmp_path: Path, sql: str) -> None:
    with pytest.raises(Forbidden) as caught:
        await query(databases, sql.replace("PATH", str(tmp_path / "other")))
    assert caught.value.code == "sql_refused"
    assert not (tmp_path / "other").exists()


# -- what the machine refuses -----------------------------------------------------------------------------------------


async def test_a_machine_without_another_process_is_unavailable(
    databases: D1Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_process(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "create_subprocess_exec", no_process)
        with pytest.raises(Unavailable) as caught:
            await query(databases, ONE)
    assert "temporarily unavailable" in caught.value.message
    assert await query(databases, ONE) == [{"one": 1}]


async def test_an_idle_worker_that_has_just_died_is_not_asked(databases: D1Databases) -> None:
    await query(databases, ONE)
    ((worker, _),) = databases._idle
    assert worker.stdin is not None
    worker.stdin.close()  # which is known before its end is
    assert await query(databases, ONE) == [{"one": 1}]


async def test_a_database_whose_directory_can_not_be_synced_is_unavailable(
    databases: D1Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    await query(databases, "CREATE TABLE t (n)")

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(d1_databases, "_sync", full)
    with pytest.raises(Unavailable, match="No space left"):
        await databases.drop(*A)
    with pytest.raises(Unavailable, match="No space left"):
        await run(databases, "new owner", "a", ONE, many=False, room=ROOM)


async def test_a_full_disk_is_told_from_a_database_as_large_as_it_may_be(small_disk: Path) -> None:
    fill = "INSERT INTO t VALUES (randomblob({0})), (randomblob({0}))"
    for most_bytes, size in ((64 << 20, 1_500_000), (600_000, 300_000)):
        databases = D1Databases(small_disk / str(most_bytes), most_bytes)
        databases.open()
        await query(databases, "CREATE TABLE t (b)")
        with pytest.raises(EraError) as caught:
            await query(databases, fill.format(size))
        if most_bytes > 1 << 20:
            assert (caught.value.code, "no room left on the disk" in caught.value.message) == ("unavailable", True)
        else:
            assert caught.value.code == "storage_full"
        assert await query(databases, "SELECT count(*) AS n FROM t") == [{"n": 0}]
        await databases.drop(*A)
        await databases.close()
