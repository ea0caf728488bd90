"""A download by a program in a session, and by the same program on the host, from the same server in world.py."""

from __future__ import annotations

import json
import subprocess

from bench.arena import Answer, Arena
from bench.cases import Probe
from bench.world import ADDRESS, world
from era.drivers import guest

MEGABYTES = 512

_DOWNLOAD = f"""\
import socket
buffer, got = bytearray(1 << 20), 0
with socket.create_connection(("{ADDRESS}", 80)) as server:
    server.sendall(b"MEGABYTES\\n")
    while count := server.recv_into(buffer):
        got += count
print(got >> 20)
"""


def _code(arena: Arena) -> str:
    return _DOWNLOAD.replace("MEGABYTES", str(arena.size(MEGABYTES)))


def in_session(arena: Arena) -> Probe:
    """A download by a program in a session."""
    there, code, expected = world(arena).arena, _code(arena), f"{arena.size(MEGABYTES)}\n"
    there.keep_open()  # setting up other cases may have taken a while
    session = there.check_created(there.post("/api/sessions", {"language": "python", "default_timeout": 60}))

    def after(answer: Answer) -> None:
        run = json.loads(answer[1])
        if run.get("stdout") != expected:
            raise RuntimeError(f"A download went wrong: {run}")

    return Probe(lambda _: there.run(session, code), there.keep_open, after)


def direct(arena: Arena) -> Probe:
    """The same download on the host, outside of sandboxes, in the network namespace of the service."""
    command = [*world(arena).inside(), guest.PYTHON, "-c", _code(arena)]
    expected = f"{arena.size(MEGABYTES)}\n".encode()

    def after(output: bytes) -> None:
        if output != expected:
            raise RuntimeError(f"A download went wrong: {output!r}")

    return Probe(lambda _: subprocess.run(command, check=True, capture_output=True).stdout, after=after)
