"""Cases of large sizes: sessions with many files or much data. A small arena has a hundredth."""

from __future__ import annotations

import json
from collections.abc import Callable

from bench.arena import Arena
from bench.cases import Probe

FILES, DIRECTORIES = 10_000, 100
COPY_FILES, COPY_BYTES = 2_000, 1 << 30

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


def fill(files: int, directories: int, size: int) -> str:
    return _FILL.format(files=files, directories=directories, size=size)


def _big_session(arena: Arena) -> str:
    """Create a session with 1 GiB in 2,000 files and return its id."""
    session = arena.new_session("python")
    files = arena.size(COPY_FILES)
    body = {"code": fill(files, 20, COPY_BYTES // COPY_FILES), "timeout": 600}
    arena.check_run(arena.post(f"/api/sessions/{session}/run", body))
    return session
