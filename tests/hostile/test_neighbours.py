"""What others wait while one session keeps the event loop busy."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from bench.neighbours import NEIGHBOURS, beside
from tests.hostile.served import ForkedServer

_GIVE_UP_SECONDS = 60.0
_FAR_LESS = 0.5


def waited(directory: Path, name: str, weakness: str | None, give_up: float = _GIVE_UP_SECONDS) -> float:
    """The longest of a few waits for /health beside a neighbour of this name, in seconds. One that takes longer than
    `give_up` isn't waited for."""
    directory.mkdir(exist_ok=True)
    server = ForkedServer(directory / f"{weakness}", weakness=weakness).start()
    try:
        longest = 0.0
        with beside(int(server.url.rpartition(":")[2]), NEIGHBOURS[name], "neighbour"):
            for _ in range(3):
                began = time.monotonic()
                try:
                    with server.client(timeout=give_up) as client:
                        assert client.get("/health").status_code == 200
                        longest = max(longest, time.monotonic() - began)
                        if weakness is None:
                            done = client.post("/api/execute", json={"language": "python", "code": "print(1)"})
                            assert done.json()["stdout"] == "1\n"
                except httpx.TimeoutException:
                    return give_up
        return longest
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["chunks", "uploads"])
def test_others_are_served_beside_a_neighbour_with_tiny_pieces(tmp_path: Path, name: str) -> None:
    """They wait far less than where nothing is in slices, and runs beside it end as well."""
    for again in range(3):  # something else on the machine may slow one of the two down
        ours = waited(tmp_path / f"{again}", name, None)
        far_longer = ours / _FAR_LESS
        if waited(tmp_path / f"{again} weak", name, "no slices", far_longer) >= far_longer:
            return
    pytest.fail("they wait as long where nothing is in slices")
