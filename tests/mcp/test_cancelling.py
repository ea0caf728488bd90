"""Calls of tools that are cancelled: by hanging up, and by a notification that names the call and its client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any

import anyio
import httpx
import pytest
from mcp.client import Client

from era.mcp.calls import Calls
from tests.api.owners import Owners, new_key
from tests.conftest import Server, eventually
from tests.mcp.clients import WAYS, used

HANDSHAKE = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
}


class Mcp:
    """A client of version 2025-11-25 over HTTP that doesn't hang up when it cancels."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.session = self.post(HANDSHAKE).headers["mcp-session-id"]
        self.client.headers["Mcp-Session-Id"] = self.session

    @classmethod
    @contextmanager
    def connected(
        cls, server: Server, key: str | None = None, accept: str = "application/json, text/event-stream"
    ) -> Iterator[Mcp]:
        headers = {"Accept": accept, "MCP-Protocol-Version": "2025-11-25"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=server.url, headers=headers, timeout=120) as client:
            yield cls(client)

    def post(self, message: dict[str, Any]) -> httpx.Response:
        return self.client.post("/mcp", json=message).raise_for_status()

    def cancel(self, request_id: Any) -> None:
        params = {"requestId": request_id, "reason": "enough"}
        answer = self.post({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params})
        assert answer.status_code == 202

    @contextmanager
    def sleeping(self, session_id: str, request_id: Any) -> Iterator[list[httpx.Response]]:
        """A call that sleeps in a new session, and the list that gets its answer. At the end it must be answered."""
        self.client.post("/api/sessions", json={"language": "python", "session_id": session_id}).raise_for_status()
        given = {"session_id": session_id, "code": "import time\nprint('on')\ntime.sleep(300)", "timeout": 300}
        params = {"name": "era_run_in_session", "arguments": given}
        message = {"jsonrpc": "2.0", "id": request_id, "method": "tools/call", "params": params}
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(self.post(message)), daemon=True)
        thread.start()
        assert eventually(lambda: self.status(session_id) == "running")
        yield answers
        thread.join(60)
        assert answers

    def status(self, session_id: str) -> str:
        """The status of the session's last run."""
        runs = self.client.get(f"/api/sessions/{session_id}/runs").raise_for_status().json()["runs"]
        return str(runs[0]["status"]) if runs else ""


@pytest.mark.parametrize("accept", ["application/json, text/event-stream", "application/json"])
@pytest.mark.parametrize("request_id", [7, "call-7"])
def test_cancelled_notification_stops_the_run(server: Server, accept: str, request_id: Any) -> None:
    with Mcp.connected(server, accept=accept) as mcp:
        with mcp.sleeping("told", request_id) as answers:
            mcp.cancel(request_id)
        assert eventually(lambda: mcp.status("told") == "killed")
        assert '"code":-32800' in answers[0].text
        ran = mcp.client.post("/api/sessions/told/run", json={"code": "print(1)"}).json()
    assert (ran["status"], ran["stdout"]) == ("ok", "1\n")


def test_cancelled_notification_of_another_client_stops_nothing(owners: Owners) -> None:
    """Neither one with the same key, nor one of another owner that knows the protocol's session."""
    alice, mallory = (new_key(owners.server, name)["key"] for name in ("mcp-alice", "mcp-mallory"))
    with ExitStack() as stack:
        victim, neighbour, foreign, without = (
            stack.enter_context(Mcp.connected(owners.server, key)) for key in (alice, alice, mallory, alice)
        )
        foreign.client.headers["Mcp-Session-Id"] = victim.session
        del without.client.headers["Mcp-Session-Id"]
        with victim.sleeping("kept", 1) as answers:
            for client in (neighbour, foreign, without):
                client.cancel(1)
            others: list[Any] = [2, "1", None, [1], {}]
            for wrong in others:
                victim.cancel(wrong)
            assert victim.post({"jsonrpc": "2.0", "id": 3, "method": "ping"}).status_code == 200
            assert (victim.status("kept"), answers) == ("running", [])
            victim.cancel(1)
        assert eventually(lambda: victim.status("kept") == "killed")


async def test_run_is_stopped_when_its_call_was_cancelled_before() -> None:
    """It may be waiting for its turn."""
    asked, begins, stopped = anyio.Event(), anyio.Event(), anyio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            assert request.url.path == "/api/sessions/s/runs/run-1"
            stopped.set()
            return httpx.Response(200, json={})
        asked.set()
        await begins.wait()
        return httpx.Response(200, headers={"X-Era-Run": "run-1"}, content=b"")

    async def call(client: httpx.AsyncClient) -> None:
        async with aclosing(Calls(client).events("/api/sessions/s/stream", {"code": "1"})) as events:
            async for _ in events:
                pass

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://era") as client:
        async with anyio.create_task_group() as group:
            group.start_soon(call, client)
            await asked.wait()
            group.cancel_scope.cancel()
        assert not stopped.is_set()
        begins.set()
        with anyio.fail_after(60):
            await stopped.wait()


@pytest.mark.parametrize("way", [*WAYS, "stdio with a handshake"])
def test_a_call_that_is_cancelled_stops_its_run(server: Server, client: httpx.Client, way: str) -> None:
    async def work(connected: Client) -> None:
        await connected.call_tool("era_create_session", {"session_id": "stopped"})
        code = "import time\nprint('on', flush=True)\ntime.sleep(120)"
        arguments = {"session_id": "stopped", "code": code, "timeout": 200}
        began = anyio.Event()

        async def progress(progress: float, total: float | None, message: str | None) -> None:
            began.set()

        async with anyio.create_task_group() as group:

            async def call() -> None:
                await connected.call_tool("era_run_in_session", arguments, progress_callback=progress)

            group.start_soon(call)
            await began.wait()
            group.cancel_scope.cancel()
        with anyio.fail_after(120):
            while True:
                (run,) = client.get("/api/sessions/stopped/runs").json()["runs"]
                if run["status"] != "running":
                    break
                await anyio.sleep(0.05)
        assert run["status"] == "killed"

    used(server, way, work)
