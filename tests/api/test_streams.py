"""Runs whose output is streamed as server-sent events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx

from era.wire.runs import RunAnswer
from tests.api.answers import RUN_KEYS, refused
from tests.api.event_streams import numbered
from tests.api.told import UNTIL_TOLD, tell
from tests.conftest import MakeServer, MakeSession, eventually
from tests.table import table


def events(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and data of each event, as they come."""
    for _, name, data in numbered(answer):
        yield name, data


def streamed(client: httpx.Client, where: str, code: str, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    """Run code as a stream that must end with one `done`; returns its events. Of each the program is told that it has
    come, by its number."""
    with client.stream("POST", f"/api/sessions/{where}/stream", json={"code": code, **fields}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        received = []
        for event in events(answer):
            received.append(event)
            tell(client, str(len(received)))
    assert answer.headers["x-era-run"] == received[-1][1]["run_id"]
    assert all(name == data["type"] for name, data in received)
    assert [name for name, _ in received].count("done") == 1
    return received


def test_a_stream_has_output_as_it_is_written_and_done_last(client: httpx.Client, session: MakeSession) -> None:
    where = session(data={"n": 1})
    code = f"""
import sys
{UNTIL_TOLD}
for number in range(3):
    print('out', number, flush=True)
    until_told(str(2 * number + 1))
    print('err', number, file=sys.stderr, flush=True)
    until_told(str(2 * number + 2))
sys.exit(5)
"""
    received = streamed(client, where, code)
    assert [(name, data.get("content")) for name, data in received[:-1]] == [
        (f"std{kind}", f"{kind} {number}\n") for number in range(3) for kind in ("out", "err")
    ]
    assert all(data.keys() == {"type", "content"} for _, data in received[:-1])
    name, done = received[-1]
    assert name == "done"
    assert done.keys() == RUN_KEYS - {"stdout", "stderr"} | {"type"}
    RunAnswer.model_validate(
        {**{key: value for key, value in done.items() if key != "type"}, "stdout": "", "stderr": ""},
        strict=True,
        extra="forbid",
    )
    assert (done["exit_code"], done["status"], done["data"]) == (5, "failed", {"n": 1})
    assert client.get(f"/api/sessions/{where}").json()["version"] == done["state"]["version"] == 1


@table(
    "code, expected",
    [
        (
            "import os, time\nfor byte in 'é😀\\n'.encode():\n    os.write(1, bytes([byte])); time.sleep(0.02)",
            "é😀\n",
        ),
        ("import os, time; os.write(1, b'a\\xc3'); time.sleep(0.05); os.write(1, b'b')", "a\ufffdb"),
        ("import os; os.write(1, b'tail \\xf0\\x9f')", "tail \ufffd"),
        ("import os; os.write(1, b'a\\r\\nb\\n\\ndata: x\\n\\0')", "a\r\nb\n\ndata: x\n\0"),
        ("import os\nfor _ in range(40): os.write(1, '😀'.encode() * 4097)", "😀" * 4097 * 40),
        ("", ""),
    ],
)
def test_text_in_a_stream_is_whole(client: httpx.Client, session: MakeSession, code: str, expected: str) -> None:
    received = streamed(client, session(), code)
    assert "".join(data["content"] for name, data in received if name == "stdout") == expected
    assert received[-1][0] == "done"


@table("route", ["run", "stream"])
@table(
    "body, status, word",
    [
        ({}, 400, "no code"),
        ({"code": 5}, 400, "'code'"),
        ({"code": "1", "codes": "1"}, 400, "'codes'"),
        ({"code": "1", "env": {"A": 1}}, 400, "'env.A'"),
        ({"code": "1", "timeout": 0}, 400, "'timeout'"),
        ({"code": "x" * (4 * 2**20 + 1)}, 413, "'code'"),
    ],
)
def test_errors_before_a_run_have_their_status_in_a_stream_too(
    client: httpx.Client, session: MakeSession, route: str, body: dict[str, Any], status: int, word: str
) -> None:
    where = session()
    refused(client.post(f"/api/sessions/{where}/{route}", json=body), status, word)
    refused(client.post(f"/api/sessions/missing/{route}", json={"code": "1"}), 404, "missing")
    assert client.get(f"/api/sessions/{where}").json()["last_run_at"] == ""


def test_a_run_that_is_lost_when_the_reader_of_its_stream_has_gone_is_foreseen(own_server: MakeServer) -> None:
    """As where its session is deleted then. Nobody asks for the run's end any more."""
    server = own_server()
    with server.client() as client:
        where = client.post("/api/sessions", json={"language": "python"}).json()["id"]
        body = {"code": "import time\nprint(1, flush=True)\ntime.sleep(600)", "timeout": 600}
        with client.stream("POST", f"/api/sessions/{where}/stream", json=body) as answer:
            assert "stdout" in next(line for line in answer.iter_lines() if "stdout" in line)
        time.sleep(0.5)  # the service has seen that the reader hung up
        assert client.delete(f"/api/sessions/{where}").status_code == 200
        assert eventually(lambda: "run_failed" in server.log)
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log
    assert "never retrieved" not in server.log, server.log
