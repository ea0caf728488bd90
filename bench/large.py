"""Cases of large sizes: sessions with many files or much data, and many sessions. A small arena has a hundredth."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing

from bench.arena import Arena
from bench.cases import Probe

FILES, DIRECTORIES = 10_000, 100
COPY_FILES, COPY_BYTES = 2_000, 1 << 30
SESSIONS = 100_000

_TOUCH = """\
import time
with open("{path}", "w") as file:
    file.write(str(time.time_ns()))
print(1)
"""

_FILL = """\
import os
for number in range({files}):
    directory = f"d{{number % {directories}}}"
    os.makedirs(directory, exist_ok=True)
    with open(f"{{directory}}/{{number}}", "wb") as file:
        file.write(os.urandom({size}))
print(1)
"""


def change_one_file(*, of_many: bool) -> Callable[[Arena], Probe]:
    """A run that changes one file, in a working directory of many files or of that one."""

    def start(arena: Arena) -> Probe:
        session = arena.new_session("python")
        if of_many:
            arena.check_run(arena.run(session, fill(arena.size(FILES), DIRECTORIES, 10)))
        code = _TOUCH.format(path="d7/7" if of_many else "f")
        arena.check_run(arena.run(session, code))
        return Probe(lambda _: arena.run(session, code), after=arena.check_run)

    return start


def checkpoint(arena: Arena) -> Probe:
    """A checkpoint of a session with many files, of which a process changes one all the time."""
    session = arena.new_session("python")
    arena.check_run(arena.run(session, fill(arena.size(FILES), DIRECTORIES, 10)))
    command = "while sleep 0.01; do date +%N > d7/7; done"
    arena.check_status(201)(arena.post(f"/api/sessions/{session}/processes", {"command": command}))
    path = f"/api/sessions/{session}/checkpoint"
    arena.check_status(200)(arena.post(path, {}))  # the first one looks at everything
    return Probe(lambda _: arena.post(path, {}), after=arena.check_status(200))


def duplicate(arena: Arena) -> Probe:
    """Copying a session with 1 GiB in 2,000 files. The copies stay until the service's data is removed."""
    source = _big_session(arena)
    return Probe(lambda _: arena.post(f"/api/sessions/{source}/duplicate", {}), after=arena.check_created)


def rollback(arena: Arena) -> Probe:
    """A rollback to a version with 1 GiB in 2,000 files, from one without.

    Each call makes a version, and old versions are dropped. So each goes back to one of the last two.
    """
    source = _big_session(arena)

    def roll_back(version: int) -> tuple[int, bytes]:
        return arena.post(f"/api/sessions/{source}/rollback", {"version": version})

    def before() -> int:
        full = int(json.loads(arena.get(f"/api/sessions/{source}")[1])["version"])
        arena.check_status(200)(roll_back(full - 1))
        return full

    return Probe(roll_back, before, arena.check_status(200))


def first_page_of_files(arena: Arena) -> Probe:
    """A page of 100 of a session's 10,000 files."""
    session = arena.new_session("python")
    arena.check_run(arena.run(session, fill(arena.size(FILES), DIRECTORIES, 10)))
    path = f"/api/sessions/{session}/files?limit=100"
    return Probe(lambda _: arena.get(path), after=arena.check_status(200))


def page_of_sessions(arena: Arena) -> Probe:
    """A page of 50 of 100,000 sessions, by a label that half of them have."""
    _many_sessions(arena, arena.size(SESSIONS))
    path = "/api/sessions?limit=50&metadata.half=1"
    return Probe(lambda _: arena.get(path), after=arena.check_status(200))


def fill(files: int, directories: int, size: int) -> str:
    return _FILL.format(files=files, directories=directories, size=size)


def _big_session(arena: Arena) -> str:
    """Create a session with 1 GiB in 2,000 files and return its id."""
    session = arena.new_session("python")
    files = arena.size(COPY_FILES)
    body = {"code": fill(files, 20, COPY_BYTES // COPY_FILES), "timeout": 600}
    arena.check_run(arena.post(f"/api/sessions/{session}/run", body))
    return session


def _many_sessions(arena: Arena, count: int) -> None:
    """Make `count` sessions: one by a call, the others by copying its rows in the database, which is quicker."""
    label = {"half": "1"}
    body = {"language": "python", "session_id": "bench-seed", "metadata": label}
    arena.check_created(arena.post("/api/sessions", body))
    with closing(sqlite3.connect(arena.data_dir / "era.sqlite", timeout=30)) as database, database:
        seed = database.execute("SELECT key FROM sessions WHERE id = 'bench-seed'").fetchone()[0]
        columns = [row[1] for row in database.execute("PRAGMA table_info(sessions)") if row[1] not in ("key", "id")]
        names = ", ".join(columns)
        database.execute(
            f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            f"INSERT INTO sessions (id, {names}) SELECT 'bench-' || i, {names} FROM sessions, n WHERE key = ?",
            (count - 1, seed),
        )
        for table in ("versions", "session_pairs"):
            columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})") if row[1] != "session_key"]
            names = ", ".join(f"t.{column}" for column in columns)
            database.execute(
                f"INSERT INTO {table} (session_key, {', '.join(columns)}) SELECT s.key, {names} "
                f"FROM sessions s, {table} t WHERE t.session_key = ? AND s.key > ? "
                + ("AND s.key % 2 = 0" if table == "session_pairs" else ""),
                (seed, seed),
            )
    time.sleep(0.5)  # SQLite writes its log of so many rows back now
