"""The events of a run: while it lasts, afterwards, from any of them on, and after a restart."""

from __future__ import annotations

import signal
from typing import Any

import httpx
import pytest

from tests.api.answers import refused
from tests.api.event_streams import Numbered, followed, numbered
from tests.api.told import UNTIL_TOLD, tell
from tests.conftest import MakeServer, MakeSession
from tests.table import table

CHATTY = """
import os, sys, time
for n in range(20):
    os.write(1, f'out {n} é'.encode()[: 7 + n % 3]); time.sleep(0.004)
    os.write(2, f'err {n}'.encode()); time.sleep(0.004 * (n % 2))
    os.write(1, 'é'.encode()[n % 3:])
sys.exit(3)
"""


def streamed(client: httpx.Client, where: str, code: str, query: str = "", **fields: Any) -> tuple[str, list[Numbered]]:
    """The run's id and the events of POST …/stream."""
    with client.stream("POST", f"/api/sessions/{where}/stream{query}", json={"code": code, **fields}) as answer:
        assert answer.status_code == 200, answer.read()
        return answer.headers["x-era-run"], list(numbered(answer))


def test_they_are_the_same_live_and_afterwards_from_any_on(client: httpx.Client, session: MakeSession) -> None:
    where = session(data={"n": 1})
    # Where the machine is slow, several writes are one event.
    run_id, live = next(got for _ in range(50) if len((got := streamed(client, where, CHATTY))[1]) > 20)
    assert [number for number, _, _ in live] == list(range(1, len(live) + 1))
    path = f"/api/sessions/{where}/runs/{run_id}/events"
    assert followed(client, path) == live
    for after in (1, 7, len(live) - 1, len(live)):
        assert followed(client, f"{path}?after={after}") == live[after:]
        assert followed(client, f"{path}?after=1", headers={"Last-Event-ID": str(after)}) == live[after:]
    assert followed(client, f"{path}?after={len(live) + 5}") == live[-1:], "it waits for nothing: it is told of the end"
    for stream in ("stdout", "stderr"):
        said = "".join(data["content"] for _, name, data in live if name == stream)
        assert said == client.get(f"/api/sessions/{where}/runs/{run_id}/{stream}").content.decode(errors="replace")
    assert live[-1][2]["data"] == {"n": 1}
    assert live[-1][2]["exit_code"] == 3


def test_they_are_the_same_after_a_restart(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"}).raise_for_status()
        run_id, live = streamed(client, "s", CHATTY)
        _, long = streamed(client, "s", "for n in range(300): print(str(n) * 200, flush=True)")
    server.stop()
    server.start()
    with server.client() as client:
        assert followed(client, f"/api/sessions/s/runs/{run_id}/events") == live
        path = f"/api/sessions/s/runs/{long[-1][2]['run_id']}/events"
        assert followed(client, f"{path}?after=3") == long[3:]


def test_a_run_under_way_is_followed_by_many(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    # What was written before somebody reads may be one event, so each waits until the one before has been heard.
    code = f"{UNTIL_TOLD}import os\nfor n in range(3): print(n, flush=True); until_told(str(n))\n"
    code += "while not os.path.exists('go'): time.sleep(0.01)\nprint('end')"
    begun = client.post(f"/api/sessions/{where}/run", json={"code": code, "background": True}).json()
    path = f"/api/sessions/{where}/runs/{begun['run_id']}/events"
    with client.stream("GET", path) as first, client.stream("GET", f"{path}?after=2") as second:
        early, late = numbered(first), numbered(second)
        heard = []
        for n in range(3):
            heard.append(next(early))
            tell(client, str(n))
        assert [data["content"] for _, _, data in heard] == ["0\n", "1\n", "2\n"]
        assert next(late) == heard[2]
        # A third one breaks off, and goes on where it was.
        with client.stream("GET", path) as third:
            assert next(numbered(third)) == heard[0]
        client.put(f"/api/sessions/{where}/files/go?wait=false", content=b"")
        client.delete(f"/api/sessions/{where}/runs/{begun['run_id']}").raise_for_status()
        heard += early
        assert [heard[2], *late] == heard[2:]
    assert heard[-1][1] == "done"
    assert followed(client, path) == heard
    assert followed(client, f"{path}?after=1") == heard[1:]


def test_what_is_no_longer_kept_is_said(own_server: MakeServer) -> None:
    server = own_server(outputs_kept="1", versions_kept="1")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"}).raise_for_status()
        run_id, live = streamed(client, "s", CHATTY)
        client.post("/api/sessions/s/run", json={"code": "print(open('x', 'w'))"}).raise_for_status()
        path = f"/api/sessions/s/runs/{run_id}/events"
        number, _, done = live[-1]
        assert number is not None
        del done["data"]  # that of a version which isn't kept either
        gap = {"type": "gap", "from": 1, "to": number - 1}
        assert followed(client, path) == [(number - 1, "gap", gap), (number, "done", done)]
        later = followed(client, f"{path}?after=4")
        assert later == [(number - 1, "gap", {**gap, "from": 5}), (number, "done", done)]
        assert followed(client, f"{path}?after={number - 1}") == [(number, "done", done)]


def test_a_run_that_was_lost_has_no_result(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"}).raise_for_status()
        body = {"code": "print('x', flush=True)\nimport time; time.sleep(60)", "background": True}
        run_id = client.post("/api/sessions/s/run", json=body).json()["run_id"]
        path = f"/api/sessions/s/runs/{run_id}/events"
        with client.stream("GET", path) as answer:
            events = numbered(answer)
            assert next(events)[2]["content"] == "x\n"
            server.stop(signal.SIGKILL)
            with pytest.raises(httpx.HTTPError):
                next(events)
    server.start()
    with server.client() as client:
        [(number, name, data)] = followed(client, path)
        assert (number, name, data["code"]) == (None, "error", "run_lost")


@table("route", ["run", "stream"])
def test_data_can_be_left_out(client: httpx.Client, session: MakeSession, route: str) -> None:
    where = session(data={"large": "x" * 1000})
    path = f"/api/sessions/{where}/{route}"
    for query, there in (("", True), ("?data=true", True), ("?data=false", False)):
        answer = client.post(path + query, json={"code": "print(1)"})
        assert answer.status_code == 200
        assert ('"large"' in answer.text) is there
        assert ('"data": {' in answer.text or '"data":{' in answer.text) is there
    refused(client.post(f"{path}?data=maybe", json={"code": "print(1)"}), 400, "'data'")
    key = {"Idempotency-Key": "k"}
    first = client.post(path, json={"code": "print(2)"}, headers=key)
    again = client.post(f"{path}?data=false", json={"code": "print(2)"}, headers=key)
    assert again.headers["idempotent-replay" if route == "run" else "x-era-run"]
    assert ('"large"' in first.text, '"large"' in again.text) == (True, False)
