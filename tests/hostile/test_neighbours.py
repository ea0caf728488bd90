"""How long one session can keep the event loop busy, and so lets all others wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.neighbours import NEIGHBOURS, Neighbour, beside
from tests.conftest import eventually
from tests.gvisor import BOTH_KINDS
from tests.hostile.served import ForkedServer

_BUSY_SECONDS = 1.5
_FAR_LESS = 0.5

WEAKNESSES = {
    "chunks": "no meter",
    "1xx": "endless 1xx",
    "uploads": "no meter",
    "storage": "no meter",
    "heads": "no meter",
}
"""By neighbour, what must be taken out of the service for it to succeed."""


IDLE = Neighbour("does nothing", "import time; time.sleep(300)", called=False)


def run(server: ForkedServer) -> None:
    with server.client(timeout=60) as client:
        assert client.get("/health").status_code == 200
        done = client.post("/api/execute", json={"language": "python", "code": "print(1)"})
        assert done.json()["stdout"] == "1\n"


def longest_iteration(directory: Path, name: str, kind: str, weakness: str | None) -> float:
    """The longest iteration of the event loop beside a neighbour of this name, in a sandbox of this kind, in seconds on
    a processor."""
    directory.mkdir(exist_ok=True)
    server = ForkedServer(directory / f"{weakness}", named_weakness=weakness, start_seconds=120)
    server.start()
    port = int(server.url.rpartition(":")[2])
    try:
        with beside(port, IDLE, "idle"):  # what a first call takes isn't what later ones wait for
            run(server)
        server.time_iterations()
        with beside(port, NEIGHBOURS[name], "neighbour", kind):
            until = server.processor_seconds() + _BUSY_SECONDS
            if weakness is None:
                run(server)
            assert eventually(lambda: server.processor_seconds() > until, seconds=300)
        return server.longest_iteration()
    finally:
        server.stop()


@pytest.mark.soak
@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("name", WEAKNESSES)
def test_others_have_their_turns_beside_a_neighbour(tmp_path: Path, name: str, kind: str) -> None:
    """They wait far less than where nothing is charged to it, and runs beside it end as well."""
    ours = longest_iteration(tmp_path, name, kind, None)
    weak = longest_iteration(tmp_path, name, kind, WEAKNESSES[name])
    assert ours < _FAR_LESS * weak
