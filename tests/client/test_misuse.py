"""What goes wrong between the command and a server while a run is followed: nothing is lost or printed twice, and what
it says helps."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from tests.client.command import environment, era
from tests.conftest import ERA, MakeServer, Server, free_port
from tests.sdk.cutter import Cutter, cut_once_after
from tests.sdk.scripted import refusal, serving

NUMBERS = "import time\nfor n in range(40):\n    print(n, flush=True)\n    time.sleep(0.02)"


def test_a_broken_connection_loses_nothing_of_a_run(server: Server) -> None:
    with Cutter(server.url, cut_once_after(b"7\\n")) as way:
        done = era(None, "run", "-", "-l", "python", env={"ERA_SERVER": way.url}, stdin=NUMBERS, code=0)
        assert any(b"/events?after=" in request for request in way.requests), "nothing was cut"
    assert done.stdout == "".join(f"{n}\n" for n in range(40))


def test_a_run_whose_server_is_killed_is_said_to_be_lost(own_server: MakeServer, tmp_path: Path) -> None:
    server = own_server(port=str(free_port()))
    (tmp_path / "p.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)")
    command = [str(ERA), "run", "p.py", "--timeout", "500", "-s", "kept"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(server), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        server.stop(signal.SIGKILL)
        server.start()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert out == ""
    assert "the service stopped while this run was under way" in " ".join(err.split())


def test_a_server_that_stays_busy() -> None:
    with serving() as scripted:
        scripted.script = [refusal(429, "too_busy", **{"Retry-After": "0"}) for _ in range(20)]
        began = time.monotonic()
        done = era(None, "sessions", "list", env={"ERA_SERVER": scripted.url}, code=2)
        assert 1 < len(scripted.seen) < 20
        assert time.monotonic() - began < 60
    assert "No. Do this." in " ".join(done.stderr.split())


def test_a_program_that_takes_too_long(server: Server) -> None:
    done = era(server, "run", "-", "-l", "python", "--timeout", "0.5", stdin="while True: pass", code=124)
    assert "timeout" in done.stderr
