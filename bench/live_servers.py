"""Calls of a live server in a session, and of the same server on the host."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys

from bench.arena import Answer, Arena
from bench.cases import Probe

SERVER = """\
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1")
        self.end_headers()
        self.wfile.write(b"1")
    def log_message(self, *_):
        pass
server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def _check(answer: Answer) -> None:
    if answer != (200, b"1"):
        raise RuntimeError(f"A call went wrong: {answer}")


def forwarded(arena: Arena) -> Probe:
    """A call of a live server in a session. ERA makes a new connection inside for each call."""
    session = arena.new_session("python")
    body = {"code": SERVER.replace("PORT", "3000"), "background": True, "timeout": 3600}
    answer = arena.post(f"/api/sessions/{session}/run", body)
    if answer[0] != 202:
        raise RuntimeError(f"The server was not started: {answer}")
    _check(arena.get(f"/proxy/{session}/3000/"))
    run = json.loads(answer[1])["run_id"]

    def stop() -> None:
        arena.keep_open()  # closing other cases may have taken a while
        arena.delete(f"/api/sessions/{session}/runs/{run}")

    arena.closers.callback(stop)
    return Probe(lambda _: arena.get(f"/proxy/{session}/3000/"), after=_check)


def direct(arena: Arena) -> Probe:
    """A call of the same server on the host, with a new connection for each call."""
    command = [sys.executable, "-c", SERVER.replace("PORT", "0")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=arena.scratch)
    arena.closers.callback(process.wait)
    arena.closers.callback(process.kill)
    port = int(process.stdout.readline()) if process.stdout else 0

    def call() -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        response = connection.getresponse()
        answer = response.status, response.read()
        connection.close()
        return answer

    return Probe(lambda _: call(), after=_check)
