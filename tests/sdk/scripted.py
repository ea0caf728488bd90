"""A server that answers what it is told to: refusals and nonsense that a real one can't be brought to at will."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

type Script = tuple[int, dict[str, str], bytes]
"""An answer: its status, headers and body."""


class ScriptedServer(http.server.ThreadingHTTPServer):
    """Such a server, at a free port of this machine."""

    def __init__(self, *script: Script, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.script = list(script)
        """What it answers next, one after the other."""

        self.seen: list[tuple[str, str, dict[str, str]]] = []
        """Method, path and headers of each request."""

        self.bodies: list[bytes] = []
        """What each of them brought."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ScriptedServer

    def answer(self) -> None:
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = b"".join(self._chunks()) if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.bodies.append(body)
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        status, headers, body = self.server.script.pop(0)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815  names of http.server

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving() -> Iterator[ScriptedServer]:
    """A scripted server that serves within the block."""
    with ScriptedServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def refusal(status: int, code: str, **headers: str) -> Script:
    body = f'{{"error": "No.", "code": "{code}", "hint": "Do this.", "request_id": "req_1"}}'
    return status, headers, body.encode()
