"""The service stops, or a sandbox dies, while sessions are live. Kills are in test_live_kills.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.api.live import Terminal, ended, output, process, socket, start
from tests.conftest import MakeServer, built_with, eventually


def test_a_service_that_stops_keeps_what_processes_left(own_server: MakeServer) -> None:
    server = own_server(weakness="from era.core.live import processes; processes.GRACE = 6.0")
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
    server = own_server(weakness=built_with("era.choices.BubblewrapDriver", template_forks=0))
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
