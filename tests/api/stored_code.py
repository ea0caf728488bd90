"""Stored programs that answer public calls, and raw requests to the service."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tests.conftest import Server

type Publish = Callable[..., str]


SEEN = """\
import json, os
names = [name for name in os.environ if name.startswith(("ERA_HTTP", "ERA_REQUEST", "ERA_PROXY"))]
print(json.dumps({"body": {name: os.environ[name] for name in names}}))
"""


COUNTER = """\
import json
data = json.load(open(".session_data.json"))
data["calls"] = data.get("calls", 0) + 1
json.dump(data, open(".session_data.json", "w"))
open("calls.txt", "a").write("x")
print(json.dumps({"status": 201, "headers": {"X-Calls": data["calls"]}, "body": data}))
"""


def printing(answer: Any) -> str:
    """A program that prints `answer` as JSON."""
    return f"import json; print(json.dumps({answer!r}))"


def raw(server: Server, request: bytes) -> bytes:
    """What the server sends for these bytes until it hangs up; SELF in them is its host and port."""
    host = server.url.removeprefix("http://")
    name, _, port = host.rpartition(":")
    with socket.create_connection((name, int(port)), timeout=20) as connection:
        with suppress(ConnectionError):
            connection.sendall(request.replace(b"SELF", host.encode()))
        received = b""
        with suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                received += piece
    return received
