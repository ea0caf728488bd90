"""A server that answers what it is told to: refusals and nonsense that a real one can't be brought to at will."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers with what stands in the server's `script`, one after the other."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path, dict(self.headers)))  # type: ignore[attr-defined]
        status, headers, body = self.server.script.pop(0)  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815  names of http.server

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving() -> Iterator[Any]:
    """Such a server, with its `url`, its `script`, and what it has `seen`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.script, server.seen = [], []  # type: ignore[attr-defined]
        server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        yield server
        server.shutdown()


type Script = tuple[int, dict[str, str], bytes]


def refusal(status: int, code: str, **headers: str) -> Script:
    body = f'{{"error": "No.", "code": "{code}", "hint": "Do this.", "request_id": "req_1"}}'
    return status, headers, body.encode()
