"""Messages with large arguments, which go past the protocol's library."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from mcp.client import Client

from tests.api.answers import refused
from tests.conftest import MakeServer, Server
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


LITTLE_ROOM = """
from era.api import guard
guard.MOST_BYTES = 4 << 20
take = guard.Room.take
guard.Room.take = lambda room, size, seconds: take(room, size, 2.0)
"""
HELD_TWICE = f"""{LITTLE_ROOM}
guard.Room.is_passed_on = property(lambda room: False, lambda room, value: None)
"""


@pytest.mark.parametrize("weakness", [LITTLE_ROOM, HELD_TWICE], ids=["", "weakened"])
def test_a_call_and_what_it_calls_share_the_room_of_a_large_body(own_server: MakeServer, weakness: str) -> None:
    """Or each would wait for the other to give it back."""
    server = own_server(weakness=weakness)
    code = f"print('well')  # {'x' * 1_500_000}"
    call = {"name": "era_execute_code", "arguments": {"language": "python", "code": code}}
    with server.client() as client:
        answer = client.post("/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}).text
    assert ("too many large bodies" in answer) is (weakness == HELD_TWICE)
    assert ("well" in answer) is (weakness == LITTLE_ROOM)
