"""Idle sessions are rows and files: thousands of them cost a server no process, and next to no memory."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import MakeServer, Server, eventually

SESSIONS, CLIENTS = 10_000, 8
RUN_EVERY = 20
"""So many sessions make one that has run something."""

MOST_MB = 32
"""That the service's own memory may grow by: 3 kB a session."""


def _memory(server: Server) -> float:
    """Megabytes of the service's own process."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]  # it is always there


def _use(server: Server, numbers: range) -> None:
    with server.client(timeout=120) as client:
        for number in numbers:
            made = client.post("/api/sessions", json={"language": "python", "session_id": f"s{number}"})
            assert made.status_code == 201, made.text
            if number % RUN_EVERY == 0:
                run = client.post(f"/api/sessions/s{number}/run", json={"code": "open('n', 'w').write('1')"})
                assert run.json()["status"] == "ok", run.text


@pytest.mark.soak
def test_ten_thousand_idle_sessions_cost_no_process(own_server: MakeServer) -> None:
    server = own_server(idle_seconds="0.5")
    _use(server, range(SESSIONS, SESSIONS + RUN_EVERY))  # what the first session of all costs is there

    def live() -> int:
        with server.client() as client:
            return int(client.get("/health").json()["sandboxes"]["live"])

    assert eventually(lambda: live() == 0)
    before, memory = len(server.descendants()), _memory(server)
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(lambda n: _use(server, range(n, SESSIONS, CLIENTS)), range(CLIENTS)))
    assert eventually(lambda: live() == 0)
    assert eventually(lambda: len(server.descendants()) <= before), server.descendants()
    with server.client() as client:
        again = client.post("/api/sessions/s0/run", json={"code": "print(open('n').read())"}).json()
    assert again["stdout"] == "1\n", "one that has been idle goes on with its files"
    grown = _memory(server) - memory
    print(f"{SESSIONS} idle sessions: no process, {grown:.0f} MB more than {memory:.0f}")
    assert grown <= MOST_MB
