"""A run that makes more directories than the service may watch. In gVisor nothing is watched."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import Server
from tests.gvisor import BOTH_KINDS

MOST = 40
FEW = f"from era.core.trees import watch; watch.MAX_WATCHES = {MOST}"
"""The bound as it is, for a smaller number."""

UNBOUND = (
    "from era.core.trees.watch import WatchBudget; WatchBudget.take = lambda *_: True; WatchBudget.room = 1 << 20; "
    "WatchBudget.give_back = lambda *_: None"
)
MANY = """
import os
for number in range(300): os.makedirs(f'd{number}', exist_ok=True)
open('d7/new', 'a').write('x')
"""


def watched(pid: int) -> int:
    """How many directories a process watches."""
    count = 0
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(OSError):
            count += info.read_text().count("inotify wd:")
    return count


@pytest.mark.soak
@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("weakness", [FEW, UNBOUND], ids=["bounded", "not bounded"])
def test_a_run_cant_have_all_watches(tmp_path: Path, kind: str, weakness: str) -> None:
    server = Server(tmp_path / "data", weakness=weakness)
    server.start()
    assert server.pid is not None
    try:
        with server.client() as client:
            for name in ("greedy", "neighbour"):
                made = client.post("/api/sessions", json={"language": "python", "session_id": name, "isolation": kind})
                assert made.status_code == 201, made.text
            for count in range(1, 3):
                done = client.post("/api/sessions/greedy/run", json={"code": MANY}).json()
                assert done.get("status") == "ok", done
                assert done["state"]["committed"], done
                assert client.get("/api/sessions/greedy/files/d7/new").text == "x" * count
            assert (watched(server.pid) <= 2 * MOST) == (weakness == FEW or kind == "gvisor"), watched(server.pid)
            done = client.post("/api/sessions/neighbour/run", json={"code": "print(1)"}).json()
            assert done["stdout"] == "1\n"
    finally:
        server.stop()
