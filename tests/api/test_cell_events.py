"""Events of cells over HTTP: what a cell shows, between its output."""

from __future__ import annotations

import json

import httpx

from tests.api.event_streams import followed, numbered
from tests.conftest import MakeSession


def test_events_in_the_order_of_the_writes_live_and_afterwards(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    code = "import time\nprint('a', end=''); display('b'); time.sleep(0.3); print('c', end='')\n1 / 0"
    body = {"context": "main", "code": code}
    with client.stream("POST", f"/api/sessions/{where}/stream", json=body) as answer:
        live = list(numbered(answer))
        run_id = answer.headers["X-Era-Run"]
    kinds = [(kind, event.get("content", event.get("data"))) for _, kind, event in live if kind != "stderr"]
    assert kinds[:-2] == [("stdout", "a"), ("display", {"text/plain": "'b'"}), ("stdout", "c")]
    (_, _, error), (_, _, done) = live[-2:]
    assert (error["type"], error["name"], done["type"]) == ("cell_error", "ZeroDivisionError", "done")
    assert {name: error[name] for name in ("name", "value", "traceback")} == done["error"]
    assert [each["data"] for each in done["results"]] == [{"text/plain": "'b'"}]
    again = followed(client, f"/api/sessions/{where}/runs/{run_id}/events")
    assert [(number, kind) for number, kind, _ in again] == [(number, kind) for number, kind, _ in live]
    assert [event for _, _, event in again[:-1]] == [event for _, _, event in live[:-1]]
    for after in range(len(live)):
        rest = followed(client, f"/api/sessions/{where}/runs/{run_id}/events", params={"after": after})
        assert rest == again[after:]


def test_floods_of_events_are_bounded_as_results_are(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    code = (
        "from IPython.display import clear_output\n"
        "handle = display('x' * 10_000, display_id=True)\n"
        "for _ in range(1500): handle.update('x' * 10_000); clear_output()"
    )
    path = f"/api/sessions/{where}/run"
    answer = client.post(path, json={"context": "main", "code": code}).json()
    assert (answer["status"], answer["results_truncated"]) == ("ok", True)
    events = followed(client, f"/api/sessions/{where}/runs/{answer['run_id']}/events")
    assert sum(len(json.dumps(event)) for _, kind, event in events if kind != "done") < 5 << 20
    after = client.post(path, json={"context": "main", "code": "1"}).json()
    assert after["memory"] == {"kept": True, "reason": None}
