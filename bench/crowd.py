"""One session's runs while other sessions load processors, memory and disk."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator

from bench.arena import Arena
from bench.cases import Probe

CPU = "import os\nos.fork()\nwhile True: pass"
MEMORY = """\
while True:
    held = []
    for _ in range(100):
        held.append(bytearray(b"x") * (4 << 20))
"""
DISK = """\
import os
while True:
    with open("big", "wb") as file:
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        os.fsync(file.fileno())
"""
CROWD = (CPU, CPU, CPU, MEMORY, MEMORY, DISK, DISK)

_SETTLE_SECONDS = 1.0


def run_beside(crowd: tuple[str, ...]) -> Callable[[Arena], Probe]:
    """A warm run while each of `crowd`'s programs runs in a session of its own, without end."""

    def start(arena: Arena) -> Probe:
        session = arena.new_session("python")
        code = "print(1)"
        arena.check_run(arena.run(session, code))

        @contextlib.contextmanager
        def around() -> Iterator[None]:
            others = [arena.new_session("python") for _ in crowd]
            threads = [
                threading.Thread(target=_run, args=(arena.port, other, program))
                for other, program in zip(others, crowd, strict=True)
            ]
            for thread in threads:
                thread.start()
            time.sleep(_SETTLE_SECONDS if crowd else 0)
            try:
                yield
            finally:
                for other in others:
                    arena.delete_session(other)
                for thread in threads:
                    thread.join()

        return Probe(lambda _: arena.run(session, code), after=arena.check_run, around=around)

    return start


def _run(port: int, session: str, code: str) -> None:
    """Run `code` in the session. Returns when the session is deleted."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.closing(connection):
        body = json.dumps({"code": code, "timeout": 120})
        connection.request("POST", f"/api/sessions/{session}/run", body, {"Content-Type": "application/json"})
        connection.getresponse().read()
