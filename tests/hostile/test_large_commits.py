"""Sparse files of gigabytes that one session commits: nothing for its program, and much to read for the service."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.gvisor import BOTH_KINDS
from tests.hostile.served import ForkedServer

SPARSE = """
import os
for n in range(4):
    with open(f"s{n}", "wb") as file: file.truncate(1000 << 20); file.seek(-8, 2); file.write(os.urandom(8))
print("done")
"""
MANY = "import os\nfor n in range(40): open(f'f{n}', 'wb').write(os.urandom(8))"
"""So many that they aren't committed by the event loop."""


@pytest.mark.soak
@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("weakness", [None, "no threads for large commits"])
def test_they_hold_up_nobody_elses_commits(tmp_path: Path, kind: str, weakness: str | None) -> None:
    server = ForkedServer(tmp_path / "data", named_weakness=weakness)
    server.start()
    try:
        with server.client(timeout=300) as client:
            for name in ("greedy", "neighbour"):
                made = client.post("/api/sessions", json={"language": "python", "session_id": name, "isolation": kind})
                assert made.status_code == 201, made.text
            assert client.post("/api/sessions/neighbour/run", json={"code": MANY}).json()["state"]["committed"]
            body = {"code": SPARSE, "background": True}
            run = f"/api/sessions/greedy/runs/{client.post('/api/sessions/greedy/run', json=body).json()['run_id']}"
            assert eventually(lambda: client.get(f"{run}/stdout").text == "done\n")
            assert client.post("/api/sessions/neighbour/run", json={"code": MANY}).json()["state"]["committed"]
            is_first = client.get(run).json()["status"] == "running"
            assert is_first == (weakness is None)
            assert eventually(lambda: client.get(run).json()["status"] == "ok", 300)
    finally:
        server.stop()
