"""The service is killed at random moments, stopped or loses a sandbox: nothing acknowledged is lost, nothing is left
behind."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import sqlite3
import threading
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.conftest import MakeServer, Server, assert_nothing_left, eventually, is_running, mounts

INCREMENT = """
import json, os
with open('.session_data.json') as f: data = json.load(f)
data['n'] += 1
with open('.session_data.json', 'w') as f: json.dump(data, f)
with open('log', 'a') as f: f.write(f"{data['n']}\\n")
"""


class Load:
    """Clients that increment a counter until the service is gone, and count what was acknowledged."""

    def __init__(self, server: Server, clients: int) -> None:
        self.acknowledged = 0
        self.tried = 0
        self._lock = threading.Lock()
        self._url = server.url
        self._threads = [threading.Thread(target=self._work) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60, trust_env=False, verify=False) as client:
            while True:
                with self._lock:
                    self.tried += 1
                try:
                    answer = client.post("/api/sessions/c/run", json={"code": INCREMENT})
                except httpx.TransportError:
                    return
                assert answer.status_code == 200, answer.text
                assert answer.json()["state"]["committed"]
                with self._lock:
                    self.acknowledged += 1

    def has_acknowledged(self, count: int) -> bool:
        return self.acknowledged >= count

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.soak)])
def test_kill_9_at_random_moments_loses_nothing_acknowledged(own_server: MakeServer, kills: int) -> None:
    """Data, files and the version move together."""
    chance = random.Random(20)
    before = mounts()
    server = own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "c", "data": {"n": 0}})
    count = 0
    for kill in range(kills):
        load = Load(server, clients=4)
        assert eventually(partial(load.has_acknowledged, kill % 4))  # however busy the machine is
        time.sleep(chance.uniform(0.05, 0.6))
        processes = server.descendants()
        server.stop(signal.SIGKILL)
        load.join()
        assert_no_process(processes)
        server.start()
        with server.client() as client:
            new = client.get("/api/sessions/c").json()["data"]["n"]
            # The one run that was under way may have been committed without its answer getting out.
            assert count + load.acknowledged <= new <= count + load.acknowledged + 1
            count = new
            lines = client.post(
                "/api/sessions/c/run",
                json={"code": "import os; print(len(open('log').readlines()) if os.path.exists('log') else 0)"},
            ).json()
            assert int(lines["stdout"]) == count, "files and data moved apart"
    assert count > kills
    processes = server.descendants()
    assert server.stop() == 0
    assert_nothing_left(before, processes, server.data_dir)


def assert_no_process(processes: list[int]) -> None:
    """Assert that these processes end."""
    assert eventually(lambda: not any(map(is_running, processes)))
    assert [pid for pid in processes if is_running(pid)] == []


def test_a_run_under_way_is_recorded_as_lost(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s", "data": {"kept": 1}})
        body = {"code": "import time; open('.session_data.json', 'w').write('{}'); time.sleep(60)"}
        thread = threading.Thread(target=_ignore_hangup, args=(server.url, body))
        thread.start()
        assert eventually(lambda: client.get("/api/sessions/s/runs").json()["runs"])
    processes = server.descendants()
    server.stop(signal.SIGKILL)
    thread.join()
    assert_no_process(processes)
    server.start()
    with server.client() as client:
        assert client.get("/api/sessions/s").json()["data"] == {"kept": 1}
        assert 'era_runs{status="lost"} 1.0' in client.get("/metrics").text
    with closing(sqlite3.connect(server.data_dir / "era.sqlite")) as database:
        assert database.execute("select status, exit_code from runs").fetchall() == [("lost", None)]


def test_a_stop_lets_the_run_under_way_finish(own_server: MakeServer) -> None:
    server = own_server(drain_seconds="120")
    answers: list[httpx.Response] = []
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        code = "import time; time.sleep(1); open('.session_data.json', 'w').write('{\"done\": 1}')"
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{server.url}/api/sessions/s/run", json={"code": code}, timeout=300)
            )
        )
        thread.start()
        _until_running(client, "s")
    assert server.stop() == 0
    thread.join()
    assert answers[0].json()["data"] == {"done": 1}


HOST_STOPPED = "The host was stopped or drained while the run was under way, which ended it."

PATIENT = "from era.server import server; server.LAST_ANSWERS_SECONDS = 50"
"""More time for the last answers, since a busy machine may need it."""


def test_a_stop_is_bounded_and_every_caller_gets_an_answer(own_server: MakeServer) -> None:
    server = own_server(weakness=PATIENT, drain_seconds="0.5")
    body = json.dumps({"code": "import time; time.sleep(600)", "timeout": 600})
    with server.client() as client, ExitStack() as open_connections:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        callers = []
        for _ in range(2):
            caller = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
            open_connections.enter_context(closing(caller))
            caller.request("POST", "/api/sessions/s/run", body, {"Content-Type": "application/json"})
            callers.append(caller)
            _until_running(client, "s")
        for _ in range(2):  # whoever calls after it is answered after the server has read it
            assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        assert server.stop() == 0  # long before the run would end
        answers = [(answer.status, json.loads(answer.read())) for answer in (each.getresponse() for each in callers)]
    (status, killed), (refused, waiting) = answers
    assert (status, killed["status"], killed["state"]["committed"]) == (200, "killed", False)
    assert killed["state"]["reason"] == HOST_STOPPED
    assert (refused, waiting["code"]) == (503, "unavailable")
    assert "Traceback" not in server.log


def test_a_dead_sandbox_is_remade_and_its_run_is_killed(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s", "data": {"kept": 1}})
        client.post("/api/sessions/s/run", json={"code": "open('f', 'w').write('old')"})
        answers: list[httpx.Response] = []
        code = "import time; open('f', 'w').write('new'); print('begun', flush=True); time.sleep(30)"
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{server.url}/api/sessions/s/run", json={"code": code}, timeout=60, trust_env=False)
            )
        )
        thread.start()
        _until_running(client, "s")
        run_id = eventually(lambda: client.get("/api/sessions/s/runs").json()["runs"])[0]["run_id"]
        assert eventually(lambda: client.get(f"/api/sessions/s/runs/{run_id}/stdout").text == "begun\n")
        for pid in _supervisors(server):
            os.kill(pid, signal.SIGKILL)
        thread.join()
        outcome = answers[0].json()
        assert (outcome["status"], outcome["exit_code"], outcome["stdout"]) == ("killed", 137, "begun\n")
        assert outcome["state"] == {"version": 2, "committed": False, "reason": "The sandbox died."}
        again = client.post("/api/sessions/s/run", json={"code": "print(open('f').read())"}).json()
        assert (again["status"], again["stdout"], again["data"]) == ("ok", "old\n", {"kept": 1})


def test_a_second_server_on_the_same_data_is_refused(own_server: MakeServer) -> None:
    server = own_server()
    second = Server(server.data_dir)
    with pytest.raises(AssertionError, match="Another ERA service uses"):
        second.start()


def _ignore_hangup(url: str, body: dict[str, str]) -> None:
    """Run until the service is killed."""
    try:
        httpx.post(f"{url}/api/sessions/s/run", json=body, timeout=60, trust_env=False)
    except httpx.TransportError:
        return


def _until_running(client: httpx.Client, session_id: str) -> None:
    assert eventually(lambda: client.get(f"/api/sessions/{session_id}").json()["status"] == "running")


def _supervisors(server: Server) -> list[int]:
    """PID 1 of every sandbox: the child of bubblewrap."""
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in server.descendants()}
    bubblewraps = {pid for pid, name in names.items() if name == "bwrap"}
    return [
        pid for pid in names if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) in bubblewraps
    ]
