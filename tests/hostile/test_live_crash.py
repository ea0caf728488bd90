"""The service is killed or stopped while sessions are live: records are honest, and nothing is left."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from tests.api.live import Terminal, ended, output, process, socket, start
from tests.conftest import MakeServer, assert_nothing_left, eventually, is_running, mounts


def assert_all_dead(processes: list[int]) -> None:
    assert eventually(lambda: not any(map(is_running, processes)))


def test_kill_9_with_live_sessions(own_server: MakeServer) -> None:
    """What a run acknowledged stands, processes are on record as lost, and no process or terminal is left. Many kills,
    at any moment, are in test_live_kills.py."""
    chance = random.Random(15)
    before = mounts()
    server = own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
    for kill in range(2):
        with server.client() as client:
            names = [start(client, "s", "while true; do date > f; sleep 0.01; done") for _ in range(3)]
            names.append(start(client, "s", ["bash", "-l"], pty={"cols": 80, "rows": 24}))
            done = start(client, "s", "echo done")
            assert output(client, "s", done) == b"done\n"
            assert ended(client, "s", done)["exit_code"] == 0
            ran = client.post("/api/sessions/s/run", json={"code": f"open('kept', 'w').write('{kill}')"}).json()
            assert ran["state"]["committed"]
        time.sleep(chance.uniform(0, 0.4))
        processes = server.descendants()
        server.stop(signal.SIGKILL)
        assert_all_dead(processes)
        server.start()
        with server.client() as client:
            for name in names:
                lost = process(client, "s", name)
                assert (lost["status"], lost["reason"]) == ("lost", "The service stopped while this process ran.")
                assert lost["ended_at"]
                assert lost["output_bytes"] is None, "nobody knows what it had written"
            assert client.get("/api/sessions/s/files/kept").text == str(kill)
            assert client.get("/api/sessions/s").json()["status"] == "idle"
    processes = server.descendants()
    assert server.stop() == 0
    assert_nothing_left(before, processes, server.data_dir)


def test_a_service_that_stops_keeps_what_processes_left(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        start(client, "s", "trap 'echo bye > left; exit 0' TERM; echo up; while true; do sleep 0.05; done", tag="p")
        assert eventually(lambda: process(client, "s", "p")["output_bytes"])
    with socket(server, "s/terminal") as opened:
        shell = Terminal(opened)
        shell.until_event("attached")
        server.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]  # it runs
        assert shell.until_event("exit")["reason"] == "The service stopped."
        assert shell.until_closed() == 1000
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log
    server.start()
    with server.client() as client:
        record = process(client, "s", "p")
        assert (record["status"], record["reason"]) == ("ended", "The service stopped.")
        assert client.get("/api/sessions/s/files/left").text == "bye\n"
        assert output(client, "s", "p").startswith(b"up\n")


def test_a_sandbox_that_dies_is_told(own_server: MakeServer) -> None:
    """PID 1 of the sandbox is killed from outside."""
    server = own_server(spares="0", template_forks="0")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        start(client, "s", "exec sleep 1000", tag="p")
        for pid in server.descendants():
            try:
                if b"main.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        assert ended(client, "s", "p")["reason"] is not None
        assert client.post("/api/sessions/s/run", json={"code": "print(1)"}).json()["stdout"] == "1\n"
        start(client, "s", "true", tag="again")
        assert ended(client, "s", "again")["exit_code"] == 0
