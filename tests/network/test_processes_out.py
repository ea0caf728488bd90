"""Processes beside runs that reach the internet, while runs of the same session do so too."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.network.conftest import NEEDS_GVISOR, NetServer, new_session

FETCHES = """
import json, time, urllib.request
for _ in range(8):
    answer = json.load(urllib.request.urlopen('http://www.example.test/hello', timeout=20))
    print(answer['hello'], flush=True)
    time.sleep(0.05)
"""
REFUSED = """
import urllib.request
try: urllib.request.urlopen('http://10.0.0.1/', timeout=20); print('reached')
except OSError as problem: print(type(problem.reason).__name__)
"""

KINDS = ["bubblewrap", pytest.param("gvisor", marks=NEEDS_GVISOR)]


def ended(client: Any, session: str, process: str) -> tuple[str, Any]:
    """What a process has said once it has ended, and its record."""
    deadline = time.monotonic() + 60
    while (record := client.get(f"/api/sessions/{session}/processes/{process}").json())["status"] == "running":
        assert time.monotonic() < deadline, record
        time.sleep(0.05)
    with client.stream("GET", f"/api/sessions/{session}/processes/{process}/events") as events:
        data = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
    return "".join(event.get("content", "") for event in data if event.get("type") == "stdout"), record


@pytest.mark.parametrize("kind", KINDS)
def test_runs_and_processes_reach_the_internet_beside_each_other(served: NetServer, kind: str) -> None:
    with served.client() as client:
        one = new_session(client, isolation=kind)
        path = f"/api/sessions/{one.id}/processes"
        for _ in range(2):
            started = [
                client.post(path, json={"command": ["python3", "-c", FETCHES]}).json()["process_id"] for _ in range(2)
            ]
            assert one.says(FETCHES).split() == ["www.example.test"] * 8
            for process in started:
                said, record = ended(client, one.id, process)
                assert (said.split(), record["exit_code"]) == (["www.example.test"] * 8, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_may_not_reach_a_process_may_not_either(served: NetServer, kind: str) -> None:
    with served.client() as client:
        one = new_session(client, isolation=kind)
        path = f"/api/sessions/{one.id}/processes"
        process = client.post(path, json={"command": ["python3", "-c", REFUSED]}).json()["process_id"]
        assert ended(client, one.id, process)[0] == "PermissionError\n"
        closed = new_session(client, isolation=kind, allowInternetAccess=False)
        path = f"/api/sessions/{closed.id}/processes"
        process = client.post(path, json={"command": ["python3", "-c", REFUSED]}).json()["process_id"]
        assert ended(client, closed.id, process)[0] == "OSError\n"
