"""Calls of the Python SDK while a real server is killed, stays away, and is started again."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

import era
from era import AsyncEra, Era
from era.errors import RunLost
from tests.conftest import MakeServer, Server, eventually, free_port
from tests.sdk.cutter import Cutter
from tests.sdk.scripted import Script, ScriptedServer, refusal, serving

LONG = "import time; time.sleep(300)"
AWAY_SECONDS = 4.0
"""For how long a server is away: longer than three attempts with pauses of 0.1, 0.3 and 0.9 seconds."""

RUN: Script = (200, {}, b'{"run_id": "run_1", "status": "ok"}')


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with serving() as server:
        yield server


@contextmanager
def restarting(server: Server) -> Iterator[None]:
    """Kill the server, and start it again after a while, beside the block."""
    server.stop(signal.SIGKILL)
    starting = threading.Timer(AWAY_SECONDS, server.start)
    starting.start()
    try:
        yield
    finally:
        starting.join()


async def test_connection_lost_when_the_server_stays_away(own_server: MakeServer) -> None:
    server = own_server(port=str(free_port()))
    with Era(server.url, timeout=2) as client, ThreadPoolExecutor() as threads:
        first, second = client.session("python"), client.session("python")
        async with AsyncEra(server.url, timeout=2) as waiting:
            running = threads.submit(first.run, LONG, timeout=1)
            awaited = asyncio.create_task((await waiting.sessions.get(second.id)).run(LONG, timeout=1))
            await asyncio.to_thread(eventually, lambda: all(each.runs.list() for each in (first, second)))
            server.stop(signal.SIGKILL)
            for failed in (
                await asyncio.to_thread(running.exception),
                (await asyncio.gather(awaited, return_exceptions=True))[0],
            ):
                assert type(failed) is era.ConnectionLost, repr(failed)
                assert "runs.list()" in failed.hint
            # Nothing was sent of these.
            with pytest.raises(era.ServerAway):
                await asyncio.to_thread(first.run, "1", timeout=1)
    server.start()


async def test_calls_go_on_through_a_restart(own_server: MakeServer) -> None:
    server = own_server(port=str(free_port()))
    with Era(server.url) as client, ThreadPoolExecutor() as threads:
        first, second, other = (client.session("python", data={"n": 1}) for _ in range(3))
        async with AsyncEra(server.url) as waiting:
            running = threads.submit(first.run, LONG, timeout=300)
            awaited = asyncio.create_task((await waiting.sessions.get(second.id)).run(LONG, timeout=300))
            await asyncio.to_thread(eventually, lambda: all(each.runs.list() for each in (first, second)))
            with restarting(server):
                assert await asyncio.to_thread(other.data.all) == {"n": 1}
                assert await (await waiting.sessions.get(other.id)).data.get("n") == 1
            # They began once, and it is known what became of them.
            with pytest.raises(RunLost):
                await asyncio.to_thread(running.result)
            with pytest.raises(RunLost):
                await awaited
            assert [len(each.runs.list()) for each in (first, second)] == [1, 1]


def test_a_run_whose_answer_was_lost_is_answered_after_a_restart(own_server: MakeServer) -> None:
    server = own_server(port=str(free_port()))
    killed: list[bool] = []

    def cut(_: int, came: bytes) -> bool:
        if killed or b'"exit_code"' not in came:
            return False
        killed.append(True)
        server.stop(signal.SIGKILL)
        server.start()
        return True

    with Cutter(server.url, cut) as way, Era(way.url) as client:
        session = client.session("python")
        assert session.run("print('once')").stdout == "once\n"
        assert killed
        assert len(session.runs.list()) == 1


def test_lost_run_without_a_key_is_raised_at_once(own_server: MakeServer) -> None:
    server = own_server(port=str(free_port()))
    with Era(server.url, idempotency_keys=False) as client, ThreadPoolExecutor() as threads:
        session = client.session("python")
        running = threads.submit(session.run, "open('begun', 'w'); " + LONG, timeout=300)
        process = session.process("sleep 300")  # live, so that files of the run can be seen while it lasts
        eventually(lambda: session.files.exists("begun"))
        assert process.id
        since = time.monotonic()
        server.stop(signal.SIGKILL)
        assert type(running.exception()) is era.ConnectionLost
        assert time.monotonic() - since < 30
    server.start()


async def test_error_of_a_lost_attempt_is_raised_after_refusals(scripted: ScriptedServer) -> None:
    """Each refusal says only that its own attempt did nothing."""
    for refused in (refusal(429, "too_busy", **{"Retry-After": "0"}), refusal(409, "run_under_way")):
        unknown = refusal(503, "outcome_unknown")
        scripted.script = [unknown, *[refused] * 9]
        with Era(scripted.url, timeout=1) as client, pytest.raises(era.errors.OutcomeUnknown):
            client._connection.call(era.sdk.calls.Call("POST", "/api/sessions/x/run", json={}, once=True))
        scripted.script = [unknown, *[refused] * 9]
        async with AsyncEra(scripted.url, timeout=1) as waiting:
            with pytest.raises(era.errors.OutcomeUnknown):
                await waiting._connection.call(era.sdk.calls.Call("POST", "/api/sessions/x/run", json={}, once=True))


def test_attempts_end_when_a_proxy_never_reached_the_server(scripted: ScriptedServer) -> None:
    scripted.script = [(502, {}, b"<html>")] * 9
    with Era(scripted.url, retries=2) as client, pytest.raises(era.NotEra):
        client.health()
    assert len(scripted.seen) == 3


def test_no_wait_for_a_restart_when_retries_is_0(scripted: ScriptedServer) -> None:
    scripted.script = [(200, {}, b"{}"), (502, {}, b"<html>"), RUN]
    with Era(scripted.url, retries=0) as client:
        client.health()
        with pytest.raises(era.NotEra):
            client.sessions.named("x").run("1")
    assert len(scripted.seen) == 2
