"""What sessions take of memory, and how many can be warm at once: figures that are measured once, after the rounds."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import many
from bench.arena import Arena, with_settings
from bench.processor import pids_below

NAME = "memory"
"""How it is asked for beside names of cases."""

SESSIONS, CLIENTS = 1000, 8
IDLE = 10_000
_MORE = 8
_CODE = "print(1)"
_PATIENCE_SECONDS = 60.0


def of_sessions(arena: Arena, *, quick: bool) -> Mapping[str, float]:
    """Megabytes of private memory that one more warm Python session takes, and, unless it is to be `quick`, how many of
    1,000 sessions failed that were to be warm at once, and what the service takes of memory with them."""
    other = with_settings(arena, "memory", max_warm=str(2 * SESSIONS), idle_seconds="100000")
    _warm(other, 2)  # what is shared is there now
    before = _private(other)
    failed = _warm(other, _MORE)
    figures = {"one more warm session, MB": (_private(other) - before) / _MORE}
    figures |= _of_idle_sessions(arena)
    if not quick:
        began = time.monotonic()
        failed += _warm(other, SESSIONS - 2 - _MORE)
        warm = other.health()["sandboxes"]["live"]
        figures |= {
            f"sessions warm, of {SESSIONS}": warm,
            "failures of their creates and runs": failed,
            "seconds until they were": time.monotonic() - began,
            "the service with those that are warm, MB": other.memory() / (1 << 20),
        }
    return figures


def _of_idle_sessions(arena: Arena) -> Mapping[str, float]:
    """How many more processes a service has with 10,000 sessions, of which some have run something just before, and
    what it takes of memory."""
    other = with_settings(arena, "idle", idle_seconds="0.5")
    other.wait_for_pool()
    before, count = len(pids_below(other.pid)), arena.size(IDLE)
    many.make(other, f"sqlite:///{other.data_dir / 'era.sqlite'}", count)
    if _warm(other, _MORE):
        raise RuntimeError("A session failed.")
    until = time.monotonic() + _PATIENCE_SECONDS
    while other.health()["sandboxes"]["live"] and time.monotonic() < until:
        time.sleep(0.1)
    other.wait_for_pool()
    while len(pids_below(other.pid)) > before and time.monotonic() < until:
        time.sleep(0.1)  # until those of a sandbox that has just been closed have ended, too
    return {
        f"processes of {count} idle sessions": len(pids_below(other.pid)) - before,
        "the service with them, MB": other.memory() / (1 << 20),
    }


def _warm(arena: Arena, count: int) -> int:
    """Create so many sessions and run a program in each; how many failed."""

    def one(_: int) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", arena.port, timeout=300)
        try:
            session = _post(connection, "/api/sessions", {"language": "python"})["id"]
            return bool(_post(connection, f"/api/sessions/{session}/run", {"code": _CODE})["status"] != "ok")
        except (OSError, KeyError, http.client.HTTPException):
            return True
        finally:
            connection.close()

    with ThreadPoolExecutor(CLIENTS) as clients:
        failed = sum(clients.map(one, range(count)))
    arena.keep_open()
    return failed


def _post(connection: http.client.HTTPConnection, path: str, body: object) -> dict[str, Any]:
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    return answer


def _private(arena: Arena) -> float:
    """Megabytes of private memory of all that the service has started, without itself, once the pool is full again."""
    arena.wait_for_pool()
    total = 0
    for pid in pids_below(arena.pid) - {arena.pid}:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
    return total / 1024
