"""Queries of thousands of parameters: they are refused before anybody reads them, except where a session does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from era.api.guard import Guard
from era.core.public.sites import SiteName


async def call(path: str, parameters: int, *, site: SiteName | None = None) -> list[Message]:
    """What is sent for a query of so many parameters; nothing where the request passes the guard."""
    sent: list[Message] = []

    async def passed(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "client": ("192.0.2.1", 1),
    }
    scope |= {"query_string": b"&".join([b"a"] * parameters), "headers": [(b"host", b"localhost")]}
    await Guard(passed, keys=None, names=(), idle_seconds=1, site=lambda _: site)(scope, receive, send)
    return sent


@pytest.mark.parametrize("path", ["/health", "/metrics", "/links/x", "/api/sessions/x/terminal", "/mcp"])
async def test_a_query_of_thousands_of_parameters_is_refused(path: str) -> None:
    assert await call(path, 1001) == []
    start, body = await call(path, 1002)
    assert start["status"] == 400
    problem = json.loads(body["body"])
    assert problem["code"] == "bad_request"
    assert "1000 parameters" in problem["error"]


async def test_what_a_session_serves_reads_its_queries_itself() -> None:
    assert await call("/proxy/x/80/", 30_000) == []
    assert await call("/", 30_000, site=SiteName(80, "x", is_public=False)) == []
