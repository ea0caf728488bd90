"""Many sessions: created at once, run at once, visited in turn, and woken. Each case has a service of its own."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from bench import rivals
from bench.arena import Arena, with_settings
from bench.cases import Probe
from bench.large import fill

AT_ONCE = 100
WARM = 32
IN_TURN, VISITORS = 300, 16
FILES, DIRECTORIES = 10_000, 100
DATA = 500 << 20

CLIENTS, RUNS_EACH = 8, 10

_CODE = "print(1)"
_LARGE = """\
import os
with open("large", "wb") as file:
    for _ in range({count}):
        file.write(os.urandom(1 << 20))
print(1)
"""
_IDLE_SECONDS = 0.2
_WAIT_SECONDS = 120.0


def creates_at_once(arena: Arena) -> Probe:
    """Creating sessions, and the first run of each, all at once. Raises RuntimeError where one of them fails."""
    other = with_settings(arena, "at-once")
    count = AT_ONCE // 25 if arena.small else AT_ONCE

    def one(_: int) -> str:
        client = _Client(other)
        session = other.check_created(client.post("/api/sessions", {"language": "python"}))
        other.check_run(client.post(f"/api/sessions/{session}/run", {"code": _CODE}))
        return session

    def call(_: object) -> list[str]:
        with ThreadPoolExecutor(count) as clients:
            return list(clients.map(one, range(count)))

    def after(sessions: list[str]) -> None:
        for session in sessions:
            other.keep_open()
            other.delete_session(session)

    return Probe(call, other.wait_for_pool, after)


def create_and_keep(arena: Arena) -> Probe:
    """A session created and run for the first time, which stays: the processor time of a sandbox that has ended would
    be missing."""
    other = with_settings(arena, "kept", idle_seconds="100000", max_warm="1000")
    other.wait_for_pool()  # or its other languages would count

    def call(_: object) -> tuple[int, bytes]:
        return other.run(other.check_created(other.create("python")), _CODE)

    return Probe(call, other.keep_open, other.check_run)


def eight_clients(arena: Arena) -> Probe:
    """Runs of eight clients at once, each in a warm session of its own: how many the machine does in a second."""
    sessions = [arena.new_session("python") for _ in range(CLIENTS)]
    for session in sessions:
        arena.check_run(arena.run(session, _CODE))
    each = arena.size(RUNS_EACH) or 1

    def one(session: str) -> None:
        client = _Client(arena)
        for _ in range(each):
            arena.check_run(client.post(f"/api/sessions/{session}/run", {"code": _CODE}))

    def call(_: object) -> None:
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(one, sessions))

    return Probe(call, runs=CLIENTS * each)


def two_loops(arena: Arena) -> Probe:
    """As many starts of `python3 -c`, by two loops."""
    argv = rivals.python(_CODE)(arena.scratch)
    each = CLIENTS * (arena.size(RUNS_EACH) or 1) // 2

    def loop(_: int) -> None:
        for _ in range(each):
            rivals.run(argv)

    def call(_: object) -> None:
        with ThreadPoolExecutor(2) as loops:
            list(loops.map(loop, range(2)))

    return Probe(call, runs=2 * each)


def warm_among_others(arena: Arena) -> Probe:
    """A warm run, while so many other clients each run in a session of their own, one run after the other."""
    other = with_settings(arena, "warm")
    count = WARM // 8 if arena.small else WARM
    sessions = [other.new_session("python") for _ in range(count)]
    for session in sessions:
        other.check_run(other.run(session, _CODE))
    ours, *theirs = sessions

    def visits(number: int) -> Callable[[], str]:
        return lambda: theirs[number]

    return Probe(
        lambda _: other.run(ours, _CODE),
        other.keep_open,
        other.check_run,
        lambda: _beside(other, [visits(number) for number in range(len(theirs))]),
    )


def in_turn(arena: Arena) -> Probe:
    """A run in the next of many sessions, of which few are warm, while other clients visit them too."""
    other = with_settings(arena, "in-turn", max_warm="32")
    sessions = [other.new_session("python") for _ in range(arena.size(IN_TURN) or 1)]
    following = itertools.cycle(sessions)
    lock = threading.Lock()

    def visit() -> str:
        with lock:
            return next(following)

    def before() -> str:
        other.keep_open()
        return visit()

    return Probe(
        lambda session: other.run(session, _CODE),
        before,
        other.check_run,
        lambda: _beside(other, [visit] * ((VISITORS // 8 if arena.small else VISITORS) - 1)),
    )


def wake_files(arena: Arena) -> Probe:
    """A run in a session with 10,000 files that was put away."""
    return _wake(arena, "wake-files", fill(arena.size(FILES), DIRECTORIES, 10))


def wake_data(arena: Arena) -> Probe:
    """A run in a session with 500 MiB in one file that was put away."""
    return _wake(arena, "wake-data", _LARGE.format(count=max(arena.size(DATA) >> 20, 5)))


def _wake(arena: Arena, name: str, code: str) -> Probe:
    other = with_settings(arena, name, idle_seconds=str(_IDLE_SECONDS), disk_write_mbps="0")
    session = other.new_session("python")
    other.check_run(other.post(f"/api/sessions/{session}/run", {"code": code, "timeout": 600}))

    def before() -> None:
        other.keep_open()
        deadline = time.monotonic() + _WAIT_SECONDS
        while other.health()["sandboxes"]["live"]:
            if time.monotonic() > deadline:
                raise RuntimeError("The session isn't put away.")
            time.sleep(0.01)
        other.wait_for_pool()

    return Probe(lambda _: other.run(session, _CODE), before, other.check_run)


class _Client:
    """A client with a connection of its own."""

    def __init__(self, arena: Arena) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", arena.port, timeout=120)

    def post(self, path: str, body: object) -> tuple[int, bytes]:
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        return response.status, response.read()


@contextlib.contextmanager
def _beside(arena: Arena, visits: list[Callable[[], str]]) -> Iterator[None]:
    """Within the block, one client for each of `visits` runs in the session that it says, again and again. Raises
    RuntimeError at its end where one of their runs went wrong."""
    over = threading.Event()

    def work(visit: Callable[[], str]) -> None:
        client = _Client(arena)
        while not over.is_set():
            arena.check_run(client.post(f"/api/sessions/{visit()}/run", {"code": _CODE}))

    with ThreadPoolExecutor(max(len(visits), 1)) as clients:
        working = [clients.submit(work, visit) for visit in visits]
        time.sleep(0.2)
        try:
            yield
        finally:
            over.set()
        for done in working:
            done.result()
