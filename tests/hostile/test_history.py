"""A session that fills its history: what it may hold on disk has a bound."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.api.live import process, start
from tests.conftest import eventually
from tests.gvisor import BOTH_KINDS
from tests.hostile.served import ForkedServer
from tests.soaking import soak_the_rest

MIB = 1 << 20
LIMIT = 4 * MIB
MOST = LIMIT * 9 // 8 + MIB
RUNS = 15
CHECKPOINTS_KEPT = 7

REWRITE = "import os\nfor n in range(4): open(f'f{n}', 'wb').write(os.urandom(1 << 18))"
PUT_AWAY = "import os; os.rename('f0', 'f1'); open('f0', 'wb').write(os.urandom(1 << 19))"
MANY_NAMES = "import os\nfor n in range(2000): open('x' * 200 + str(n) + os.urandom(8).hex(), 'w').close()"
REWRITE_MANY = """
import os
while True:
    for n in range(64): open(f"f{n}", "wb").write(os.urandom(1 << 14))
    print("w", flush=True)
    input()
    if os.path.exists(".session_data.json"): os.remove(".session_data.json")
    os.mkdir(".session_data.json")
    print("d", flush=True)
    input()
    os.rmdir(".session_data.json")
"""
"""Rewrites all, adds to what is there, holds nothing but lists of directories, goes on beside refused checkpoints."""


@pytest.fixture(params=soak_the_rest([None, "no bound of history"], 1))
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ForkedServer]:
    settings = {"ERA_ISOLATION": "bubblewrap", "ERA_HISTORY_MB": str(LIMIT // MIB)}
    server = ForkedServer(tmp_path / "data", settings, named_weakness=request.param)
    server.start()
    yield server
    server.stop()


def stored(server: ForkedServer) -> int:
    """How many bytes of blobs are left after a garbage collection."""
    blobs = server.data_dir / "blobs"

    def size() -> int:
        total = 0
        for path in blobs.rglob("*"):
            with suppress(FileNotFoundError):  # it has just been collected
                total += path.stat().st_size if path.is_file() else 0
        return total

    sizes = [size()]
    os.kill(server.pid, signal.SIGUSR1)

    def settled() -> bool:
        sizes.append(size())
        return len(sizes) > 20 and len(set(sizes[-20:])) == 1

    assert eventually(settled)
    return sizes[-1]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(REWRITE, id="rewrite", marks=pytest.mark.soak),
        pytest.param(PUT_AWAY, id="put away"),
        pytest.param(MANY_NAMES, id="many names", marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_a_session_that_rewrites_its_files_holds_no_more_than_its_limit(
    code: str, kind: str, server: ForkedServer
) -> None:
    with server.client() as client:
        made = client.post("/api/sessions", json={"language": "python", "session_id": "s", "isolation": kind})
        assert made.status_code == 201
        client.post("/api/sessions/s/run", json={"code": "for n in range(2): open(f'f{n}', 'w').close()"})
        clear = "import os\nfor name in os.listdir('.'):\n  if name.startswith('x'): os.remove(name)\n"
        dropped = 0
        for _ in range(RUNS):
            outcome = client.post("/api/sessions/s/run", json={"code": clear + code}).json()
            assert (outcome["status"], outcome["state"]["committed"]) == ("ok", True), outcome
            dropped += outcome["state"].get("versions_dropped", 0)
        kept = [each["version"] for each in client.get("/api/sessions/s/versions").json()["versions"]]
        assert kept[0] == outcome["state"]["version"]
        assert len(client.get("/api/sessions/s/archive").content) > 0, "the current version is there"
        held = stored(server)
        if server.named_weakness:
            assert dropped == 0
            assert len(kept) == RUNS + 2
            assert held > MOST, "this attack is none"
        else:
            assert dropped == RUNS + 2 - len(kept) > 0
            # Or the collection had not begun yet.
            assert held <= MOST or eventually(lambda: stored(server) <= MOST)


def has_written(client: httpx.Client, count: int) -> bool:
    """Whether the process has written so many bytes, sooner or later."""
    return bool(eventually(lambda: process(client, "s", "p")["output_bytes"] == count))


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_a_live_session_that_has_its_files_looked_at_anew_holds_no_more(kind: str, server: ForkedServer) -> None:
    """What is stored while its processes go on, before the moment of the checkpoint, counts, too."""
    with server.client() as client:
        made = client.post("/api/sessions", json={"language": "python", "session_id": "s", "isolation": kind})
        assert made.status_code == 201
        start(client, "s", ["python3", "-c", REWRITE_MANY], stdin=True, tag="p")
        for number in range(CHECKPOINTS_KEPT):
            assert has_written(client, 4 * number + 2)
            assert client.post("/api/sessions/s/checkpoint").status_code == 200
            client.post("/api/sessions/s/processes/p/stdin", content=b"\n")
            assert has_written(client, 4 * number + 4)
            assert client.post("/api/sessions/s/checkpoint").status_code == 409, "nothing is remembered of its files"
            client.post("/api/sessions/s/processes/p/stdin", content=b"\n")
        kept = client.get("/api/sessions/s/versions").json()["versions"]
        if server.named_weakness:
            assert len(kept) == CHECKPOINTS_KEPT + 1
            assert sum(each["total_size_bytes"] for each in kept) > MOST, "this attack is none"
        else:
            assert sum(each["total_size_bytes"] for each in kept) <= MOST
