"""The list of tools is made once for each version of the protocol, however often clients ask for it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from mcp_types import methods
from starlette.applications import Starlette

from era.api.routes.mcp import Mcp

MODERN = "2026-07-28"
META = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


def body(version: str, method: str = "tools/list", **params: Any) -> dict[str, Any]:
    meta = {"_meta": META} if version == MODERN else {}
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": {**meta, **params}}


def headers(version: str, method: str = "tools/list") -> dict[str, str]:
    return {"MCP-Protocol-Version": version, **({"Mcp-Method": method} if version == MODERN else {})}


@pytest.fixture
def shaped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods whose results the library has validated and shaped."""
    methods_shaped = list[str]()
    shape = methods.serialize_server_result

    def counting(method: str, version: str, *arguments: Any) -> dict[str, Any]:
        methods_shaped.append(method)
        return shape(method, version, *arguments)

    monkeypatch.setattr(methods, "serialize_server_result", counting)
    return methods_shaped


@pytest.mark.parametrize("version", ["2025-11-25", MODERN])
async def test_tool_list_is_shaped_once_when_asked_for_again(version: str, shaped: list[str]) -> None:
    """To shape it took 4 ms of the event loop for each of these calls."""
    transport = httpx.ASGITransport(Starlette(routes=(mcp := Mcp()).routes()))
    async with mcp.lifespan(None), httpx.AsyncClient(transport=transport, base_url="http://era:8787") as client:
        answers = [await client.post("/mcp", json=body(version), headers=headers(version)) for _ in range(5)]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert len(answers[0].json()["result"]["tools"]) > 10
        assert shaped == ["tools/list"]

        wrong = await client.post("/mcp", json=body(version, cursor=5), headers=headers(version))
        assert wrong.json()["error"]["code"] == -32602


async def test_tool_list_is_not_made_to_check_a_call(shaped: list[str]) -> None:
    """The library looks up the schema of each tool that is called."""
    transport = httpx.ASGITransport(Starlette(routes=(mcp := Mcp()).routes()))
    async with mcp.lifespan(None), httpx.AsyncClient(transport=transport, base_url="http://era:8787") as client:
        call = body(MODERN, "tools/call", name="era_python", arguments={"wrong": 1})
        sent = {**headers(MODERN, "tools/call"), "Mcp-Name": "era_python"}
        answer = await client.post("/mcp", json=call, headers=sent)
        assert "There is no argument 'wrong'" in answer.json()["result"]["content"][0]["text"]
    assert shaped == ["tools/call"]
