"""Messages with large arguments, which go past the protocol's library."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from mcp.client import Client

from tests.api.answers import refused
from tests.conftest import Server
from tests.mcp.clients import WAYS, text_of, used


def test_a_body_of_too_many_values_is_refused_unread(client: httpx.Client) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"a": [1] * 700_000}}
    problem = refused(client.post("/mcp", json=body), 413, "too many values")
    assert problem["code"] == "too_large"


@pytest.mark.parametrize("way", WAYS)
def test_large_arguments_arrive_as_they_are(server: Server, way: str) -> None:
    data = {f"k{n}": n for n in range(20_000)} | {"nothing": None, "é": "☃"}
    content = "é☃" * 500_000

    async def work(client: Client) -> list[Any]:
        calls: list[tuple[str, dict[str, Any]]] = [
            ("era_create_session", {"data": data}),
            ("era_update_session", {"data": data | {"more": 1}}),
            ("era_upload_file", {"path": "a.txt", "content": content}),
            ("era_run_in_session", {"command": "cat a.txt | wc -c"}),
            ("era_get_session", {}),
        ]
        answers, which = list[Any](), dict[str, Any]()
        for name, arguments in calls:
            answers.append(await client.call_tool(name, arguments | which))
            assert not answers[-1].is_error, text_of(answers[-1])
            which = {"session_id": answers[0].structured_content["id"]}
        return answers

    created, _, _, ran, got = used(server, way, work)
    assert created.structured_content["data"] == data
    assert "2500000" in text_of(ran)
    assert got.structured_content["data"] == data | {"more": 1}


def test_data_that_is_too_large_is_refused_unread(client: httpx.Client) -> None:
    call = {"name": "era_create_session", "arguments": {"data": {"n": [0] * 600_000}}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    refused(client.post("/mcp", json=body), 413, "1048576 are allowed")
