"""What only a database server does: it goes and comes back, cuts off, is shared, or isn't what the settings say."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, text, update

from era.core.cluster.homes import Host
from era.core.metadata import RunFilter, SessionChange
from era.core.models import DEFAULT_OWNER, Answered, Claim, KeptOutputs, OwnedId, Use
from era.errors import BadRequest, CommitFailed, Conflict, HostLost, NotReady, Unavailable
from era.store import homes as rows_of_homes
from era.store import place
from era.store.engine import database, dialects
from era.store.engine.database import Database, DatabaseAway
from era.store.engine.tables import homes, runs, sessions
from era.store.homes import HomeRows, _look, _renew
from era.store.metadata import SqlStore
from era.store.runs import list_runs_of_owner
from era.store.usage import add_use
from tests.conftest import eventually
from tests.owners import mine
from tests.postgres import Postgres
from tests.soaking import soak_the_rest
from tests.store.postgres_proxy import PostgresProxy, postgres_proxy
from tests.store.rows import ended, execute, multiply, new, opened

__all__ = ["postgres_proxy"]

USE = Use(DEFAULT_OWNER, "", 20_000)


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[SqlStore]:
    async with opened(postgres_url) as store:
        yield store


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
async def test_a_restart_between_two_calls_is_not_noticed(store: SqlStore, restarted: Postgres, how: int) -> None:
    await store.create_session(new("a"))
    await asyncio.gather(*(store.session(mine("a")) for _ in range(9)))  # each reader has a connection
    restarted.stop(how)
    restarted.start()
    assert {each.id for each in await asyncio.gather(*(store.session(mine("a")) for _ in range(9)))} == {"a"}
    restarted.stop(how)
    restarted.start()
    assert (await store.create_session(new("b"))).version == 1


async def test_while_it_is_away_calls_fail_at_once_and_what_ran_is_stored_later(
    store: SqlStore, restarted: Postgres
) -> None:
    session = await store.create_session(new("a"))
    await store.begin_run(mine("a"), "r1")
    restarted.stop()
    ending = asyncio.create_task(store.end_run(ended(session, "r1"), data='{"n": 1}', snapshot=None))
    for call in (store.session(mine("a")), store.create_session(new("b")), store.begin_run(mine("a"), "r2")):
        with pytest.raises(DatabaseAway, match="can't be reached") as away:
            await call
        assert (away.value.status, away.value.retry_after) == (503, 2)
    assert not ending.done()
    await asyncio.to_thread(restarted.start)
    assert (await ending).version == 2
    assert (await store.session(mine("a"))).data == '{"n": 1}'
    assert [record.status for record in await store.runs(session.key, 9)] == ["ok"]


async def test_a_run_that_ends_while_it_stays_away_is_not_kept(
    store: SqlStore, restarted: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_PATIENCE_SECONDS", 0.0)
    session = await store.create_session(new("a"))
    await store.begin_run(mine("a"), "r1")
    restarted.stop()
    with pytest.raises(CommitFailed, match="could not be stored"):
        await store.end_run(ended(session, "r1"), data='{"n": 1}', snapshot=None)
    restarted.start()
    assert (await store.session(mine("a"))).version == 1


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "shared"])
@pytest.mark.parametrize("when", ["before", "after", "late"])
async def test_a_run_whose_commit_was_cut_off_is_stored_once(
    postgres_url: str, postgres_proxy: PostgresProxy, when: str, alone: bool
) -> None:
    store = SqlStore(postgres_proxy.url(postgres_url), alone=alone)
    try:
        await store.open()
        session = await store.create_session(new("a"))
        claim = Claim("run", "key", "h" * 64, "mark")
        postgres_proxy.cut(when)
        assert (await store.begin_run(mine("a"), "r1", claim)).key == session.key
        postgres_proxy.cut(when)
        record = ended(session, "r1", enforced={"network": "none"})
        stored = await store.end_run(record, data='{"n": 1}', snapshot=None)
        assert stored == replace(record, version=2, key=stored.key)
        assert postgres_proxy.cuts == 2
        assert list(await store.runs(session.key, 9)) == [stored]
        assert [each.n for each in await store.versions(mine("a"), limit=9, before=None)] == [2, 1]
        claimed = await store.find_claim(mine("a"), claim)
        assert claimed is not None
        assert claimed.run == stored
        with pytest.raises(Conflict):
            await store.begin_run(mine("a"), "r1")
    finally:
        await store.close()


async def test_what_may_be_stored_is_said_to_be_where_the_look_for_it_fails(
    postgres_url: str, postgres_proxy: PostgresProxy
) -> None:
    """The failure alone would tell its caller to send again what may have been done."""

    def store_something(connection: Connection, *, again: bool) -> None:
        connection.execute(text("SELECT 1 / 0") if again else text("CREATE TABLE stored (n int)"))

    async with opened(postgres_proxy.url(postgres_url), alone=False) as store:
        postgres_proxy.cut("after")
        with pytest.raises(DatabaseAway) as failed:
            await store.database.write_once(store_something, patient=False)
        assert (failed.value.code, failed.value.retry_after) == ("outcome_unknown", None)
        assert postgres_proxy.cuts == 1


@pytest.mark.parametrize("when", soak_the_rest(["before", "after"], ["after"]))
async def test_a_run_that_is_cut_off_at_any_message_is_stored_once(
    postgres_url: str, postgres_proxy: PostgresProxy, when: str
) -> None:
    """Each message of both its transactions in turn."""
    async with opened(postgres_proxy.url(postgres_url), alone=False) as store:
        session = await store.create_session(new("a"))
        await store.usage.add_use(USE)
        number, was_cut = 0, True
        while was_cut:
            number += 1
            claim = Claim("run", f"key {number}", "h" * 64, "mark")
            cuts = postgres_proxy.cuts
            await store.check_writable()  # so that it is connected
            postgres_proxy.cut(when, message=number)
            session = await store.begin_run(mine("a"), f"r{number}", claim)
            outputs = KeptOutputs(b"said", b"")
            record = ended(session, f"r{number}")
            answered = Answered(claim, "{}", outputs)
            stored = await store.end_run(
                record, data=f'{{"n": {number}}}', snapshot=None, outputs=outputs, answered=answered, use=USE
            )
            was_cut = postgres_proxy.cuts > cuts
            postgres_proxy.spare()
            assert stored.version == number + 1
        assert number > 6, "hardly any message was cut"
        assert [each.id for each in await store.runs(session.key, 99)] == [f"r{n}" for n in range(number, 0, -1)]
        newest = await store.versions(mine("a"), limit=99, before=None)
        assert [each.n for each in newest] == [*range(number + 1, 0, -1)]
        [used] = await store.usage.days(USE.owner, USE.day, USE.day)
        assert used.runs == number + 1, "a run was counted twice, or never"


@pytest.mark.parametrize(("when", "version"), [("before", 1), ("after", 2)])
async def test_what_can_not_be_found_out_in_time_is_said_to_be_unknown(
    postgres_url: str, postgres_proxy: PostgresProxy, when: str, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a second end, which says that nothing was kept, doesn't take the place of the one that may be stored."""
    monkeypatch.setattr(database, "_PATIENCE_SECONDS", 0.0)
    async with opened(postgres_proxy.url(postgres_url)) as store:
        session = await store.create_session(new("a"))
        await store.begin_run(mine("a"), "r1")
        postgres_proxy.cut(when)
        with pytest.raises(CommitFailed, match="not known"):
            await store.end_run(ended(session, "r1"), data='{"n": 1}', snapshot=None)
        second = ended(session, "r1", status="failed", committed=False)
        if when == "after":
            with pytest.raises(CommitFailed):
                await store.end_run(second, data=None, snapshot=None)
        else:
            await store.end_run(second, data=None, snapshot=None)
        [record] = await store.runs(session.key, 9)
        assert (record.status, record.version) == ("ok" if when == "after" else "failed", version)
        assert (await store.session(mine("a"))).version == version


async def test_other_writes_that_were_cut_off_say_that_it_is_not_known(
    postgres_url: str, postgres_proxy: PostgresProxy
) -> None:
    async with opened(postgres_proxy.url(postgres_url)) as store:
        postgres_proxy.cut("after")
        with pytest.raises(DatabaseAway, match="not known") as away:
            await store.create_session(new("a"))
        assert away.value.may_have_committed
        assert (away.value.code, away.value.retry_after) == ("outcome_unknown", None)
        assert away.value.retry_after is None, "or SDKs would make another one"
        assert (await store.session(mine("a"))).version == 1


async def test_a_transaction_that_was_ended_before_its_commit_is_known_to_be_undone(postgres_url: str) -> None:
    """PostgreSQL ends one in which nothing happens for long, as where this process gets no processor before COMMIT."""
    async with opened(postgres_url, alone=False, lease_seconds=4.0) as store:
        session = await store.create_session(new("a"))

        def stalls(connection: Connection) -> None:
            connection.execute(text("UPDATE sessions SET default_timeout = 7 WHERE id = 'a'"))
            time.sleep(3)  # more than half of the lease

        with pytest.raises(DatabaseAway) as away:
            await store.database.write(stalls)
        assert not away.value.may_have_committed
        assert (await store.session(mine("a"))).default_timeout == session.default_timeout != 7


async def test_hosts_that_share_a_database_do_not_lose_each_others_writes(postgres_url: str) -> None:
    """Each transaction counts as if it were alone: those that others got in the way of are run again."""

    def add(connection: Connection) -> None:
        n = int(connection.execute(text("SELECT default_timeout FROM sessions WHERE id = 'a'")).scalar_one())
        connection.execute(text("UPDATE sessions SET default_timeout = :n WHERE id = 'a'"), {"n": n + 1})

    hosts = [SqlStore(postgres_url, alone=False) for _ in range(2)]
    try:
        for host in hosts:
            await host.open()
        await hosts[0].create_session(new("a", default_timeout=0.0))

        async def work(host: SqlStore) -> None:
            for _ in range(20):
                await host.database.write(add)

        await asyncio.gather(*map(work, hosts))
        assert (await hosts[0].session(mine("a"))).default_timeout == 40
        both = await asyncio.gather(*(host.create_session(new("b")) for host in hosts), return_exceptions=True)
        assert sorted(isinstance(each, Conflict) for each in both) == [False, True]
    finally:
        for host in hosts:
            await host.close()


async def test_a_transaction_that_others_get_in_the_way_of_again_and_again(postgres_url: str) -> None:
    """It is run again until it goes well, on the connection that there is."""
    loop, connections = asyncio.get_running_loop(), list[int]()
    count = text("UPDATE sessions SET default_timeout = default_timeout + 1 WHERE id = 'a'")
    async with opened(postgres_url, alone=False) as one, opened(postgres_url, alone=False) as other:
        await other.create_session(new("a", default_timeout=0.0))

        def overtaken(connection: Connection) -> None:
            connections.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
            connection.execute(text("SELECT default_timeout FROM sessions WHERE id = 'a'")).scalar_one()
            if len(connections) <= 15:
                overtaking = other.database.write(lambda its: its.execute(count))
                asyncio.run_coroutine_threadsafe(overtaking, loop).result(60)
            connection.execute(count)

        await one.database.write(overtaken)
        assert len(connections) == 16
        assert len(set(connections)) == 1
        assert (await one.session(mine("a"))).default_timeout == 16


async def test_writes_wait_while_there_is_no_room_for_predicate_locks(
    restarted: Postgres, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL keeps those of all transactions that are beside one that is open for long."""
    restarted.stop()
    restarted.start(max_connections="12", max_pred_locks_per_transaction="10")
    async with opened(postgres_url) as store:
        assert "few predicate locks (max_pred_locks_per_transaction is 10)" in caplog.text
        with closing(psycopg.connect(postgres_url)) as long:
            long.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            long.execute("UPDATE leader SET host_id = 'x'")

            def close() -> None:
                eventually(lambda: "out of shared memory" in restarted.said)
                long.close()

            closing_it = threading.Thread(target=close)
            closing_it.start()
            number = 0
            while closing_it.is_alive():
                number += 1
                run = f"r{number}"
                await store.create_session(new(f"s{number}"))
                await store.begin_run(mine(f"s{number}"), run)
                await store.change_session(mine(f"s{number}"), SessionChange(default_timeout=1.0))
    assert "out of shared memory" in restarted.said


async def test_hosts_count_an_owners_usage_beside_each_other(postgres_url: str) -> None:
    added, may_commit = threading.Event(), threading.Event()

    def add_slowly(connection: Connection) -> None:
        add_use(connection, USE)
        added.set()
        assert may_commit.wait(60)

    async with opened(postgres_url, alone=False) as one, opened(postgres_url, alone=False) as other:
        for n, store in enumerate((one, other)):
            await (await store.homes()).join(Host(f"h{n}", ""), 3600.0)
        slow = asyncio.create_task(one.database.write(add_slowly))
        try:
            assert await asyncio.to_thread(added.wait, 60)
            await asyncio.wait_for(other.usage.add_use(USE), 30)
        finally:
            may_commit.set()
        await slow
        assert [day.runs for day in await one.usage.days(DEFAULT_OWNER, USE.day, USE.day)] == [2]


async def test_only_one_service_has_a_database_for_itself(
    store: SqlStore, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialects, "OWNERSHIP_SECONDS", 0.1)
    for alone in (True, False):
        second = SqlStore(postgres_url, alone=alone)
        with pytest.raises(NotReady, match=r"Another ERA service uses postgresql://.*/test\d+: stop it"):
            await second.open()
        await second.close()
    assert await store.newest_ids("anybody", 1) == []


async def test_a_service_waits_for_one_before_it_that_takes_its_time_to_go(store: SqlStore, postgres_url: str) -> None:
    second = SqlStore(postgres_url, alone=True)
    try:
        opening = asyncio.create_task(second.open())
        await asyncio.wait({opening}, timeout=7)
        assert not opening.done()
        await store.close()
        await opening
    finally:
        await second.close()


_ASCII = "CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE_PROVIDER libc"


async def refusal(url: str) -> str:
    """What is said of a database that can't be used."""
    store = Database(url)
    try:
        with pytest.raises(NotReady) as refused:
            await store.open()
    finally:
        await store.close()
    assert "\n" not in refused.value.message
    assert "secret" not in refused.value.message
    return refused.value.message


async def test_what_is_wrong_with_a_database_is_told_in_a_line(postgres: Postgres, empty_postgres_url: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and doesn't listen
        port = closed.getsockname()[1]
        said = await refusal(f"postgresql://era:secret@127.0.0.1:{port}/era")
        assert said.startswith(f"postgresql://127.0.0.1:{port}/era can't be used (")
        assert "Connection refused" in said
    assert 'database "nothing" does not exist' in await refusal(postgres.url("nothing"))
    assert 'role "era" does not exist' in await refusal(postgres.url("x").replace("postgres@", "era:secret@"))
    postgres.execute("DROP DATABASE IF EXISTS ascii", _ASCII)
    assert "has the encoding SQL_ASCII" in await refusal(postgres.url("ascii"))
    postgres.execute("DROP ROLE IF EXISTS reader", "CREATE ROLE reader LOGIN")
    said = await refusal(empty_postgres_url.replace("postgres@", "reader@"))
    assert "can't be written to by its user" in said


async def test_no_statement_is_compiled(store: SqlStore) -> None:
    """Not even one that reads a whole table, which the writer has PostgreSQL think to be beyond all measure."""

    def plan(connection: Connection, compiles: bool = False) -> str:
        if compiles:
            connection.execute(text("SET LOCAL jit = on"))
            if not connection.scalar(text("SELECT pg_jit_available()")):
                return "JIT isn't there"
        return "\n".join(connection.scalars(text("EXPLAIN ANALYZE SELECT count(*) FROM webhooks WHERE url = 'x'")))

    assert "JIT" in await store.database.write(plan, True)
    assert "JIT" not in await store.database.write(plan)
    for job in (store.database.read, store.database.write):
        assert await job(lambda connection: connection.scalar(text("SHOW jit"))) == "off"


@pytest.mark.parametrize("sound", soak_the_rest([True, False], 1), ids=["sound", "weakened"])
@pytest.mark.parametrize("where", soak_the_rest(["a heartbeat", "a run's end", "a statement"], 1))
async def test_a_host_that_is_paused_in_a_transaction_takes_no_others_lease(
    postgres_url: str, where: str, sound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has locked the others need as soon as its lease is over: its row, or those of its runs. It may be paused
    between two statements, or between two messages of what is one to PostgreSQL, which waits then as it would in the
    middle of a statement."""
    lease = 6.0 if sound else 1.5
    if not sound:
        monkeypatch.setattr(rows_of_homes, "cut_off", lambda *_: None)
    store = partial(opened, postgres_url, alone=False, lease_seconds=lease if sound else None)
    began, goes_on, slowest, lost = threading.Event(), threading.Event(), 0.0, 0
    async with store() as one, store() as two:
        hosts, rows = [Host(name, f"http://{name}") for name in ("paused", "alive")], await two.homes()
        own_rows = await one.homes()
        await own_rows.join(hosts[0], lease)
        await rows.join(hosts[1], lease)
        session = await one.create_session(new("s"))
        await own_rows.take(session.key)
        await one.begin_run(mine("s"), "r")

        def pause(connection: Connection) -> None:
            if began.is_set():  # It was cut off, which it doesn't notice before it goes on.
                goes_on.wait(4 * lease)
                raise HostLost("as a check of the session's home says")
            began.set()
            if where == "a heartbeat":
                _renew(connection, hosts[0])
            else:
                connection.execute(update(runs).values(status="ok"))
            if where == "a statement" and not goes_on.is_set():
                connection.execute(text(f"SELECT pg_sleep({4 * lease})"))
            goes_on.wait(4 * lease)

        own = own_rows._beats if where == "a heartbeat" else one.database
        paused = asyncio.create_task(own.write(pause))
        try:
            until = time.monotonic() + 3 * lease
            while time.monotonic() < until and slowest <= lease and not lost:
                at = time.monotonic()
                with suppress(TimeoutError, Unavailable):  # while what was cut off still has its locks
                    async with asyncio.timeout(lease + 0.1):
                        lost = (await rows.beat(hosts[1])).lost
                slowest = max(slowest, time.monotonic() - at)
                await asyncio.sleep(lease / 5)
        finally:
            goes_on.set()
            with suppress(HostLost, DatabaseAway):
                await paused
        assert (slowest < lease and lost == 1) is sound
        record, _ = await two.run(mine("s"), "r")
        assert not sound or record.status == "lost"


@pytest.mark.parametrize("sound", soak_the_rest([True, False], 1), ids=["sound", "weakened"])
async def test_a_commit_that_stalls_kills_no_host(
    postgres: Postgres, postgres_url: str, sound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL's disk hangs, or a standby that each commit waits for is gone: that keeps the heartbeats of all hosts
    waiting for longer than a lease, and none of them is dead."""
    lease = 4.0 if sound else 1.0
    if not sound:
        monkeypatch.setattr(rows_of_homes, "_LATE", 100)
    async with AsyncExitStack() as stack:
        hosts = [Host(name, f"http://{name}") for name in "abc"]
        stores = [
            await stack.enter_async_context(opened(postgres_url, alone=False, lease_seconds=lease)) for _ in hosts
        ]
        rows = [await store.homes() for store in stores]
        for each, host in zip(rows, hosts, strict=True):
            await each.join(host, lease)

        async def beat(each: HomeRows, host: Host) -> bool:
            """Whether all hosts were alive all the time."""
            alive = 3
            while time.monotonic() < until:
                try:
                    alive = min(alive, len((await each.beat(host)).hosts))
                except (HostLost, DatabaseAway):
                    return False
                await asyncio.sleep(lease / 5)
            return alive == 3

        until = time.monotonic() + 5 * lease
        beating = asyncio.gather(*(beat(each, host) for each, host in zip(rows, hosts, strict=True)))
        await asyncio.sleep(lease / 2)
        try:
            postgres.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
            await asyncio.sleep(2 * lease)
        finally:
            postgres.execute(
                "SET synchronous_commit = local",
                "ALTER SYSTEM RESET synchronous_standby_names",
                "SELECT pg_reload_conf()",
            )
        assert all(await beating) is sound


async def test_a_home_that_is_locked_keeps_no_heartbeat_waiting(postgres_url: str) -> None:
    lease = 5.0
    async with opened(postgres_url, alone=False, lease_seconds=lease) as one:
        rows, host = await one.homes(), Host("a", "http://a")
        await rows.join(host, lease)
        session = await one.create_session(new("s"))
        await rows.take(session.key)
        with closing(psycopg.connect(postgres_url)) as other:
            other.execute("SELECT FROM homes FOR UPDATE")
            taking = asyncio.create_task(rows.take(session.key))
            for _ in range(5):
                began = time.monotonic()
                await rows.beat(host)
                assert time.monotonic() - began < lease
                await asyncio.sleep(lease / 10)
            assert not taking.done()
        await taking


async def make_many(url: str, store: SqlStore, rows: HomeRows, many: int) -> None:
    """Make so many sessions, which were at home at hosts that are dead, with three runs each."""
    session = await store.create_session(new("s"))
    await rows.take(session.key)
    await store.begin_run(mine("s"), "r")
    await store.end_run(ended(session, "r"), data=None, snapshot=None)
    multiply(url, sessions, many, id="'s' || i")
    multiply(url, homes, many, session_key=f"{session.key} + i", host_id="'dead' || mod(i, 50)")
    multiply(url, runs, 3 * many, id="'r' || i", session_key=f"{session.key} + mod(i, {many})")
    execute(url, "ANALYZE")


READ = text("SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_xact_user_tables")
"""Rows that a transaction has read."""


async def test_a_look_at_all_hosts_reads_no_more_where_there_is_much(postgres_url: str) -> None:
    """Each host does that once a second, and the one that leads looks for what dead ones were doing. Here most sessions
    were at home at such, and nothing is under way."""
    many = 20_000
    async with opened(postgres_url, alone=False) as store:
        rows, host = await store.homes(), Host("leads", "http://leads")
        await rows.join(host, 3600)
        await make_many(postgres_url, store, rows, many)

        def read_by(looks: int) -> Callable[[Connection], int]:
            def job(connection: Connection) -> int:
                for _ in range(looks):
                    _look(connection, host, declares=True)
                return int(connection.scalar(READ) or 0)

            return job

        # PostgreSQL plans a statement anew a few times, and then for all values that its parameters may have.
        assert await store.database.write(read_by(20)) < 20 * 100


WHICH = [RunFilter("nobody", 50), RunFilter("few", 50), RunFilter(DEFAULT_OWNER, 50, status="running")]


@pytest.mark.parametrize("which", soak_the_rest(WHICH, WHICH[1:]))
async def test_a_list_of_runs_reads_no_more_where_there_are_many(postgres_url: str, which: RunFilter) -> None:
    async with opened(postgres_url, alone=False) as store:
        rows = await store.homes()
        await rows.join(Host("a", "http://a"), 3600)
        await make_many(postgres_url, store, rows, 20_000)
        few = await store.create_session(new("of few", id=OwnedId("few", "of few")))
        await rows.take(few.key)
        await store.begin_run(OwnedId("few", "of few"), "run")

        def read_by_lists(connection: Connection) -> tuple[int, int]:
            found = [len(list_runs_of_owner(connection, which)) for _ in range(20)]
            return found[-1], int(connection.scalar(READ) or 0)

        found, read = await store.database.read(read_by_lists)
        assert found == (which.owner == "few")
        assert read < 20 * (100 if which.owner != DEFAULT_OWNER else 1100)


async def test_text_that_it_can_not_hold_is_refused(store: SqlStore) -> None:
    session = await store.create_session(new("a"))
    with pytest.raises(BadRequest, match="NUL"):
        await store.session(mine("a\0"))
    await store.begin_run(mine("a"), "r1")
    await store.end_run(ended(session, "r1", committed=False, reason="a\0b"), data=None, snapshot=None)
    assert [record.reason for record in await store.runs(session.key, 9)] == ["a\N{REPLACEMENT CHARACTER}b"]


def test_a_data_directory_keeps_to_one_place(tmp_path: Path) -> None:
    url, other = "postgresql://era:secret@db/era", "postgresql://db/other"
    assert place.rows_url(tmp_path, None) == f"sqlite:///{tmp_path}/era.sqlite"
    assert place.rows_url(tmp_path, url) == url
    (tmp_path / "era.sqlite").touch()
    with pytest.raises(NotReady, match="era migrate"):
        place.rows_url(tmp_path, url)
    place.note(tmp_path, url)
    assert (tmp_path / place.NOTE).read_text() == "postgresql://db:5432/era\n"
    assert place.rows_url(tmp_path, url) == url
    for wrong in (None, other):
        with pytest.raises(NotReady, match="are in postgresql://db:5432/era"):
            place.rows_url(tmp_path, wrong)
    for wrong in ("sqlite:///x", "postgresql://db", "db:5432", "", "postgresql://db:port/era"):
        with pytest.raises(NotReady, match="must be like postgresql://"):
            place.rows_url(tmp_path, wrong)
