"""Ten minutes of a service's life with every feature in use, by many at a time, and what happens once an hour every few
seconds. At the end rows and content agree, nothing leaks, and the log tells each thing once.

ERA_SOAK_SECONDS says how long, ten minutes if it is left out; with 0 every feature is used once.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from era.drivers.cgroups import cgroup_name
from era.languages import runtimes
from tests.client.command import era
from tests.conftest import Server, assert_nothing_left, cgroups, eventually, held, mounts
from tests.hostile.features import FEATURES, KEY, Day

CLIENTS = 4
GROWTH_BYTES = 24 << 20
"""By how much the service may have grown between a third and the end of its time: memory of the allocator's, caches."""

SETTINGS = {
    "ERA_API_KEY": KEY,
    "ERA_LOG_FORMAT": "json",
    "ERA_MAX_WARM": "8",
    "ERA_SPARES": "1",
    "ERA_IDLE_SECONDS": "5",
    "ERA_GRACE_SECONDS": "20",
    "ERA_VERSIONS_KEPT": "3",
    "ERA_OUTPUTS_KEPT": "2",
}


class CompressedServer(Server):
    """A server that does every few seconds what others do once an hour."""

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.hostile.compressed", *command[1:]]
        root = Path(__file__).resolve().parents[2]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=root)


@pytest.mark.soak
def test_ten_minutes_with_every_feature_in_use(tmp_path: Path) -> None:
    live(tmp_path, seconds=float(os.environ.get("ERA_SOAK_SECONDS", "600")))


def live(directory: Path, seconds: float) -> None:
    """Use every feature once, then at random for so long; check what is left."""
    before = mounts()
    server = CompressedServer(directory / "data", SETTINGS).start()
    day = Day(server)
    try:
        with day.client() as client:
            assert eventually(lambda: client.get("/health").json()["sandboxes"]["ready"] == len(runtimes()))
            at_first = held(server)
            with backups(server, directory, seconds > 0), sampled(server) as sizes:
                use(day, seconds)
            everything_goes(day)
            assert eventually(
                lambda: client.get("/health").json()["sandboxes"] == {"live": 0, "busy": 0, "ready": len(runtimes())}
            ), client.get("/health").json()
            assert eventually(lambda: held(server)[1] <= at_first[1]), "processes were left behind"
            assert eventually(lambda: held(server)[0] <= at_first[0] + 8), "descriptors were left open"
            groups = {Path(group).name for group in cgroups(cgroup_name(server.data_dir))}
            assert len(groups) in (0, len(runtimes())), groups
        third = sizes[len(sizes) // 3 : len(sizes) // 2]
        if seconds > 0:
            grown = statistics.median(sizes[-len(third) :]) - statistics.median(third)
            print(f"memory: {[size >> 20 for size in sizes[:: max(1, len(sizes) // 20)]]} MiB; used: {day.used}")
            assert grown < GROWTH_BYTES, f"the service grew by {grown / (1 << 20):.0f} MiB"
        era(None, "check", "--data-dir", server.data_dir, code=0)
    finally:
        processes = server.descendants() if server.process else []
        code = server.stop()
    assert code == 0
    assert_nothing_left(before, processes, server.data_dir)
    era(None, "check", "--data-dir", server.data_dir, code=0)
    told_once(day)


def use(day: Day, seconds: float) -> None:
    """Let clients use features: all of them once, then at random until the time is over."""
    end, lock, chance = time.monotonic() + seconds, threading.Lock(), random.Random(7)
    first = list(FEATURES)
    chance.shuffle(first)
    failures: list[str] = []

    def client() -> None:
        while True:
            with lock:
                if not first and (failures or time.monotonic() >= end):
                    return
                name, seed = first.pop() if first else chance.choice(list(FEATURES)), chance.randrange(1 << 30)
            try:
                day.use(name, seed)
            except Exception:
                failures.append(f"{name} ({seed}): {traceback.format_exc(limit=-4)}")

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "\n".join(failures)


def everything_goes(day: Day) -> None:
    """Delete what is left, and wait until it is purged."""
    with day.client() as client:
        assert client.delete("/api/sessions").status_code == 200
        assert client.get("/api/sessions").json()["sessions"] == []


@contextmanager
def backups(server: Server, directory: Path, again: bool) -> Iterator[None]:
    """Back the server up now, and again and again if asked to; the last one must be whole."""
    stop = threading.Event()
    made: list[Path] = []
    failures: list[BaseException] = []

    def back_up() -> None:
        while not stop.is_set():
            target = directory / f"backup{len(made)}"
            try:
                era(None, "backup", "--data-dir", server.data_dir, target, code=0)
            except BaseException as error:
                failures.append(error)
                return
            made.append(target)
            for old in made[:-2]:
                subprocess.run(["rm", "-rf", "--", old], check=True)
            if not again or stop.wait(20):
                return

    thread = threading.Thread(target=back_up)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failures, failures
    era(None, "restore", made[-1], "--data-dir", directory / "restored", code=0)
    era(None, "check", "--data-dir", directory / "restored", code=0)


@contextmanager
def sampled(server: Server) -> Iterator[list[int]]:
    """The memory of the service itself, in bytes, twice a second at first and every few seconds later."""
    sizes: list[int] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(2):
            sizes.append(server.resident_bytes)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield sizes
    finally:
        stop.set()
        thread.join()


def told_once(day: Day) -> None:
    """The log has each request and each run once, and no failure that isn't one of these."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in day.server.log.splitlines() if line.startswith("{")]
    requests = Counter(line["request"] for line in lines if line["event"] in ("request", "request_failed"))
    statuses = {line["request"]: line["status"] for line in lines if line["event"] in ("request", "request_failed")}
    assert {request for request, count in requests.items() if count > 1} == set()
    assert {request for request in day.failed if requests[request] != 1} == set()
    assert {request: statuses[request] for request in day.failed} == day.failed
    runs = Counter(line["run"] for line in lines if line["event"] == "run")
    assert {run: runs[run] for run in day.runs if runs[run] != 1} == {}
    assert {run for run, count in runs.items() if count > 1} == set()
    bad = [line for line in lines if line["level"] in ("warning", "error", "critical")]
    unexpected = [line for line in bad if line["event"] != "request_failed" or line["status"] not in (429, 503)]
    assert unexpected == [], unexpected[:5]
    assert "Traceback" not in day.server.log
