"""Callers of a run that don't wait for its end: Ctrl-C, and a task that is cancelled. And arguments that can't be."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading

import pytest

import era
from era import AsyncEra, Era
from era.sdk.sync.sessions import Session
from tests.conftest import Server, eventually
from tests.sdk.cutter import Cutter

LONG = "import time; print('on', flush=True); time.sleep(300)"
PROGRAM = """
import signal, sys
from era import Era

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background, where it is ignored
with Era(sys.argv[1]) as era:
    era.sessions.get(sys.argv[2]).run(sys.argv[3], timeout=300)
"""


def has_begun(session: Session) -> bool:
    """Return whether the session's newest run has written something."""
    return any(session.runs.get(record.run_id).output() for record in session.runs.list(1))


def ended(session: Session) -> str:
    """Return the status of the session's only run now, without waiting for its end."""
    (record,) = session.runs.list()
    return str(record.status)


def test_ctrl_c_stops_the_run(server: Server) -> None:
    with Era(server.url) as client:
        session = client.session("python")
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, server.url, session.id, LONG], stderr=subprocess.PIPE, text=True
        ) as program:
            try:
                eventually(lambda: has_begun(session))
                program.send_signal(signal.SIGINT)
                _, said = program.communicate(timeout=60)
            finally:
                program.kill()
        assert said.strip().endswith("KeyboardInterrupt")
        assert program.returncode == -signal.SIGINT
        assert ended(session) == "killed"


async def test_interrupt_does_not_stop_the_run_that_is_waited_for(server: Server) -> None:
    with Era(server.url) as client, Cutter(server.url, lambda number, came: False) as way:
        async with AsyncEra(way.url) as waiting:
            session = client.session("python")
            other = session.run(LONG, timeout=300, background=True)
            task = asyncio.create_task(waiting.sessions.named(session.id).run("1", timeout=300))
            await asyncio.to_thread(eventually, lambda: any(b"/run HTTP" in sent for sent in way.requests))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await asyncio.to_thread(other.record)).status == "running"
            await asyncio.to_thread(other.stop)


async def test_a_task_that_is_cancelled_stops_its_run(server: Server) -> None:
    with Era(server.url) as client:
        async with AsyncEra(server.url) as waiting:
            session = client.session("python")
            awaited = await waiting.sessions.get(session.id)
            task = asyncio.create_task(awaited.run(LONG, timeout=300))
            await asyncio.to_thread(eventually, lambda: has_begun(session))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(ended, session) == "killed"


async def test_a_task_that_is_cancelled_twice_still_stops_its_run(server: Server) -> None:
    with Era(server.url) as client:
        async with AsyncEra(server.url) as waiting:
            session = client.session("python")
            task = asyncio.create_task((await waiting.sessions.get(session.id)).run(LONG, timeout=300))
            await asyncio.to_thread(eventually, lambda: has_begun(session))
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(eventually, lambda: ended(session) == "killed")


def test_the_run_of_a_key_is_listed_while_it_lasts(server: Server) -> None:
    with Era(server.url) as client, server.client() as http:
        session = client.session("python")
        path = f"/api/sessions/{session.id}/run"
        body = {"code": LONG, "timeout": 300}

        def run() -> None:
            http.post(path, json=body, headers={"Idempotency-Key": "mine"}, timeout=300)

        running = threading.Thread(target=run)
        running.start()
        eventually(lambda: has_begun(session))
        with server.client() as other:
            listed = other.get(f"{path}s", params={"idempotency_key": "mine"}).json()
            assert [record["status"] for record in listed["runs"]] == ["running"]
            assert listed["count"] == 1
            assert other.get(f"{path}s", params={"idempotency_key": "another"}).json()["runs"] == []
            assert other.get("/api/sessions/none/runs", params={"idempotency_key": "mine"}).status_code == 404
        session.runs.get(listed["runs"][0]["run_id"]).stop()
        running.join()


async def test_arguments_that_can_not_be_are_named(server: Server) -> None:
    with Era(server.url) as client:
        session = client.session("python")
        with pytest.raises(era.BadRequest, match="timeout") as told:
            session.run("1", timeout="abc")  # type: ignore[call-overload]
        assert told.value.code == "invalid_field"
        with pytest.raises(era.BadRequest, match="timeout"):
            client.execute("python", "1", timeout="abc")  # type: ignore[arg-type]
        with pytest.raises(era.BadRequest, match="'stdin' is text, not bytes"):
            session.run("1", stdin=b"abc")  # type: ignore[call-overload]
        with pytest.raises(era.BadRequest, match="'stdin' is text, not bytes"):
            client.execute("python", "1", stdin=b"abc")  # type: ignore[arg-type]
        assert session.runs.list() == []
    async with AsyncEra(server.url) as waiting:
        with pytest.raises(era.BadRequest, match="timeout"):
            await waiting.sessions.named(session.id).run("1", timeout="abc")  # type: ignore[call-overload]
        with pytest.raises(era.BadRequest, match="'stdin' is text, not bytes"):
            await waiting.sessions.named(session.id).stream("1", stdin=b"abc")  # type: ignore[arg-type]
