"""Contexts that restart while their session ends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.api.answers import refused
from tests.conftest import MakeServer, eventually
from tests.soaking import soak_the_rest

SLOW_RESTART = """
import asyncio, os
from era.core.live import contexts
close = contexts.Context.close
async def slow(context, why):
    await close(context, why)
    while why == contexts._RESTARTED and not os.path.exists(os.environ["GO"]):
        await asyncio.sleep(0.02)
contexts.Context.close = slow
"""
"""The next interpreter is started when the test says so."""


@pytest.mark.parametrize("again", soak_the_rest([True, False], 1))
def test_a_session_that_is_deleted_while_a_context_restarts_is_not_found(
    again: bool, own_server: MakeServer, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    server = own_server(weakness=f"import os; os.environ['GO'] = {str(go)!r}\n{SLOW_RESTART}")
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        body = {"language": "python", "session_id": "s"}
        client.post("/api/sessions", json=body)
        client.post("/api/sessions/s/run", json={"code": "1", "context": "main"})
        restarting = pool.submit(httpx.post, f"{server.url}/api/sessions/s/contexts/main/restart", timeout=60)
        assert eventually(lambda: client.get("/api/sessions/s/contexts").json()["contexts"] == [])
        assert client.delete("/api/sessions/s").status_code == 200
        if again:
            client.post("/api/sessions", json=body)
        go.touch()
        assert refused(restarting.result(), 404)["code"] == ("no_such_context" if again else "not_found")


NEVER_READY = """
import os
from era.core.live import contexts
ready, count = contexts.Context.ready, iter(range(9))
async def never(context):
    if next(count):
        context._ready = contexts.asyncio.Event()
        open(os.environ["STARTING"], "w").close()
    await ready(context)
contexts.Context.ready = never
"""
"""The second interpreter isn't ready before it ends."""


@pytest.mark.parametrize("end", soak_the_rest(["stop", "delete"], 1))
def test_a_session_that_ends_while_an_interpreter_starts_anew_has_no_context(
    end: str, own_server: MakeServer, tmp_path: Path
) -> None:
    starting = tmp_path / "starting"
    server = own_server(weakness=f"import os; os.environ['STARTING'] = {str(starting)!r}\n{NEVER_READY}")
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        client.post("/api/sessions/s/run", json={"code": "1", "context": "main"})
        restarting = pool.submit(httpx.post, f"{server.url}/api/sessions/s/contexts/main/restart", timeout=60)
        assert eventually(starting.exists)
        if end == "stop":
            assert client.post("/api/sessions/s/stop").status_code == 200
        else:
            assert client.delete("/api/sessions/s").status_code == 200
        assert refused(restarting.result(), 404)["code"] == ("no_such_context" if end == "stop" else "not_found")
