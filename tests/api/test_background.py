"""Runs in the background: begun, followed, stopped."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.api.guest_servers import start_in_background
from tests.api.told import WAITS, tell
from tests.conftest import STOP_SECONDS, MakeServer, MakeSession, Run, Server, eventually
from tests.table import table

SLEEPER = """\
import json, time
open("begun.txt", "w").write("x")
json.dump({"seen": True}, open(".session_data.json", "w"))
print("begun", flush=True)
time.sleep(600)
"""


def record(client: httpx.Client, where: str, run_id: str) -> dict[str, Any]:
    answer = client.get(f"/api/sessions/{where}/runs/{run_id}")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_a_background_run_answers_at_once_and_is_recorded(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(data={"n": 1})
    run_id = start_in_background(client, where, f"{WAITS}open('f', 'w').write('x'); print('done')")
    assert record(client, where, run_id)["status"] == "running"
    assert client.get(f"/api/sessions/{where}").json()["status"] == "running"
    with ThreadPoolExecutor(1) as pool:
        after = pool.submit(run, where, "print(open('f').read())")  # this run waits for its turn
        tell(client)
        assert after.result()["stdout"] == "x\n"
    done = record(client, where, run_id)
    assert (done["status"], done["exit_code"], done["state"]["committed"]) == ("ok", 0, True)
    assert client.get(f"/api/sessions/{where}/runs/{run_id}/stdout").text == "done\n"


def test_a_background_run_can_be_stopped(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    run_id = start_in_background(client, where, SLEEPER)
    url = f"/api/sessions/{where}/runs/{run_id}"
    assert eventually(lambda: client.get(f"{url}/stdout").text)
    stopped = client.delete(url)
    assert stopped.status_code == 200
    outcome = stopped.json()
    assert (outcome["status"], outcome["exit_code"], outcome["state"]["committed"]) == ("killed", 143, True)
    assert outcome == record(client, where, run_id)
    assert client.delete(url).json() == outcome  # its end isn't changed by stopping it again
    assert client.get(f"/api/sessions/{where}").json()["data"] == {"seen": True}
    assert run(where, "import os; print(os.path.exists('begun.txt'))")["stdout"] == "True\n"
    other = session()
    assert client.delete(f"/api/sessions/{other}/runs/{run_id}").status_code == 404
    assert client.delete(f"/api/sessions/{where}/runs/nothing").status_code == 404


def test_a_foreground_run_can_be_stopped_too(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where, outcomes = session(), []

    def call() -> None:
        with server.client() as other:
            outcomes.append(
                other.post(f"/api/sessions/{where}/run", json={"code": "import time; time.sleep(600)"}).json()
            )

    thread = threading.Thread(target=call)
    thread.start()
    runs = eventually(lambda: client.get(f"/api/sessions/{where}/runs").json()["runs"])
    assert client.delete(f"/api/sessions/{where}/runs/{runs[0]['run_id']}").json()["status"] == "killed"
    thread.join()
    assert (outcomes[0]["status"], outcomes[0]["exit_code"]) == ("killed", 143)


@table("body", [{"code": "1", "background": "yes"}, {"background": True}])
def test_invalid_background_runs_do_not_begin(client: httpx.Client, session: MakeSession, body: dict[str, Any]) -> None:
    where = session()
    assert client.post(f"/api/sessions/{where}/run", json=body).status_code == 400
    assert client.get(f"/api/sessions/{where}/runs").json()["count"] == 0
    stream = client.post(f"/api/sessions/{where}/stream", json={"code": "1", "background": True})
    assert stream.status_code == 400


def test_stopping_the_service_stops_and_commits_background_runs(own_server: MakeServer) -> None:
    server = own_server(drain_seconds=str(10 * STOP_SECONDS))
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        run_id = start_in_background(client, "s", SLEEPER)
        assert eventually(lambda: client.get(f"/api/sessions/s/runs/{run_id}/stdout").text)
    assert server.stop() == 0  # within STOP_SECONDS: the drain doesn't wait for a run without an end
    assert "Traceback" not in server.log
    server.start()
    with server.client() as client:
        outcome = client.get(f"/api/sessions/s/runs/{run_id}").json()
        assert (outcome["status"], outcome["state"]["committed"]) == ("killed", True)
        assert client.get("/api/sessions/s").json()["data"] == {"seen": True}
