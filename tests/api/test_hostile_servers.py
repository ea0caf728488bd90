"""Servers in sessions that send malformed, endless or smuggled answers, and callers that send such requests."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.api.guest_servers import HTTP_SERVER, serve_in_background
from tests.conftest import MakeSession, Server, eventually

OK = b"HTTP/1.1 200 OK\r\n"
SECOND = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nsmuggled"
REFUSED = {
    "two lengths": OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
    "two lengths in one": OK + b"Content-Length: 2, 3\r\n\r\nabc",
    "a length and chunks": OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
    "chunks and a length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nab\r\n0\r\n\r\n",
    "another encoding": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
    "a length that is none": OK + b"Content-Length: +2\r\n\r\nab",
    "a negative length": OK + b"Content-Length: -1\r\n\r\nab",
    "a space before the colon": OK + b"Content-Length : 2\r\n\r\nab",
    "a folded line": OK + b"X-A: 1\r\nX-B : 2\r\n\r\nab",
    "a name with a space": OK + b"X A: 1\r\n\r\nab",
    "a NUL in a value": OK + b"X-A: 1\0\r\n\r\nab",
    "an escape in a value": OK + b"X-A: \x1b[31m\r\n\r\nab",
    "a bare CR": OK + b"X-A: 1\rX-B: 2\r\n\r\nab",
    "no HTTP": b"220 ready\r\n",
    "HTTP/0.9": b"hello",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "a status of nowhere": b"HTTP/1.1 999 Weird\r\nContent-Length: 0\r\n\r\n",
    "nothing": b"",
    "half a head": OK + b"X-A: 1\r\n",
    "an upgrade that nobody wanted": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
    "too many headers": OK + b"".join(b"X-%d: %b\r\n" % (n, b"y" * 900) for n in range(40)) + b"\r\n",
    "a multipart type": OK + b"Content-Type: multipart/x-mixed-replace\r\nContent-Length: 0\r\n\r\n",
    "a cookie that is none": OK + b"Set-Cookie: =;=\r\nContent-Length: 0\r\n\r\n",
}
CUT = {
    "a length that isn't reached": OK + b"Content-Length: 9\r\n\r\nabc",
    "chunks without an end": OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "half a chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\nabc",
    "a chunk that is none": OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n",
}
PASSED = {
    "a second answer": OK + b"Content-Length: 2\r\n\r\nok" + SECOND,
    "an answer after chunks": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + SECOND,
    "one length twice": OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    "hints first": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 9 + OK + b"Content-Length: 2\r\n\r\nok",
    "a trailer": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nSet-Cookie: a=1\r\n\r\n",
    "connection words": OK + b"Connection: close, X-Request-Id\r\nContent-Length: 2\r\n\r\nok",
}
EMPTY = {
    "a length of nothing": b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n",
    "content of nothing": b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello",
    "chunks of nothing": b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "a length of what is unchanged": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
}
STREAMS = """\
import socket, threading
listening = socket.create_server(("127.0.0.1", 3000))
print("listening", flush=True)

def serve(connection):
    with connection:
        what = connection.recv(1 << 16).split()[1]
        try:
            if what == b"/head":
                connection.sendall(b"HTTP/1.1 200 OK\\r\\n")
                while True:
                    connection.sendall(b"X-A: " + b"y" * 1000 + b"\\r\\n")
            if what == b"/line":
                while True:
                    connection.sendall(b"y" * 1000)
            if what == b"/hints":
                while True:
                    connection.sendall(b"HTTP/1.1 103 Early Hints\\r\\n\\r\\n")
            if what == b"/body":
                connection.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n")
                while True:
                    connection.sendall(b"y" * 1000)
            if what == b"/deaf":
                connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
                connection.shutdown(socket.SHUT_WR)
            threading.Event().wait()
        except OSError:
            print("hung up", flush=True)

while True:
    threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()
"""


def test_malformed_answers_are_502(client: httpx.Client, live: str) -> None:
    for name, answer in REFUSED.items():
        result = client.get(f"{live}/raw?{answer.hex()}") if len(answer) < 9000 else None
        if result is None:
            continue
        assert result.status_code == 502, (name, result.text)
        body = result.json()
        assert (body["code"], result.headers["X-Era-Run"][:4]) == ("no_answer", "run_"), name
        assert "smuggled" not in result.text


def test_truncated_answers_break_the_connection(client: httpx.Client, live: str) -> None:
    for name, answer in CUT.items():
        with pytest.raises(httpx.TransportError):
            print(name, client.get(f"{live}/raw?{answer.hex()}").content)


def test_bytes_after_an_answer_are_dropped(server: Server, live: str) -> None:
    for name, answer in PASSED.items():
        request = f"GET {live}/raw?{answer.hex()} HTTP/1.1\r\nHost: SELF\r\n\r\n"
        last = f"GET {live}/status?418 HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n\r\n"
        received = server.exchange((request + last).encode())
        assert received.count(b"HTTP/1.1 ") == 2, (name, received)
        first, _, second = received.partition(b"HTTP/1.1 418 ")
        assert first.startswith(b"HTTP/1.1 200 "), (name, received)
        assert b"ok" in first.rpartition(b"\r\n\r\n")[0] + first.rpartition(b"\r\n\r\n")[2], name
        assert b"smuggled" not in received, name
        assert b"set-cookie" not in first.lower(), name
        assert second.endswith(b"body"), name


def test_answers_without_content_have_no_length(server: Server, live: str) -> None:
    for name, answer in EMPTY.items():
        request = f"GET {live}/raw?{answer.hex()} HTTP/1.1\r\nHost: SELF\r\n\r\n"
        last = f"GET {live}/status?418 HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n\r\n"
        first, _, second = server.exchange((request + last).encode()).partition(b"HTTP/1.1 418 ")
        assert first.startswith(answer.partition(b"\r\n")[0]), (name, first)
        assert first.endswith(b"\r\n\r\n"), (name, first)
        assert b"content-length" not in first.lower(), name
        assert b"transfer-encoding" not in first.lower(), name
        assert second.endswith(b"body"), name


COPYING = """
from era.api.routes import proxy as forward
async def copy(self):
    self._began = True
    while piece := await self._reader.read(65536):
        await self._caller.send_raw(piece)
    await self._caller.hang_up()
forward._ToProgram._download = copy
"""
"""Copies the bytes of guests instead of parsing their answers."""


def test_a_proxy_that_copies_would_let_them_through(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", weakness=COPYING).start()
    try:
        with server.client() as client:
            client.post("/api/sessions", json={"language": "python", "session_id": "s"})
            run_id = serve_in_background(client, "s", HTTP_SERVER)
            assert eventually(lambda: client.get(f"/api/sessions/s/runs/{run_id}/stdout").text == "listening\n")
            for answer in (PASSED["a second answer"], REFUSED["two lengths"], REFUSED["no HTTP"]):
                request = f"GET /proxy/s/3000/raw?{answer.hex()} HTTP/1.1\r\nHost: SELF\r\n\r\n"
                assert server.exchange(request.encode()) == answer
    finally:
        server.stop()


def test_endless_answers_are_bounded(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    run_id = serve_in_background(client, where, STREAMS)
    url = f"/proxy/{where}/3000"
    for path in ("/head", "/line", "/hints"):
        answer = client.get(f"{url}{path}")
        assert (answer.status_code, answer.json()["code"]) == (502, "no_answer"), path
    with client.stream("GET", f"{url}/body") as answer:  # an endless body comes for as long as somebody reads it
        size = 0
        for piece in answer.iter_raw():
            size += len(piece)
            if size > 1 << 20:
                break
    sent = client.post(f"{url}/deaf", content=bytes(4 << 20))  # the server answers without reading the body
    assert (sent.status_code, sent.content) == (200, b"ok")
    stdout = f"/api/sessions/{where}/runs/{run_id}/stdout"
    # No connection inside outlives its caller.
    assert eventually(lambda: client.get(stdout).text.count("hung up") >= 3)


HURRIED = """
from era.api.routes import proxy as forward
from era.core.public import live_servers
forward.HEAD_SECONDS, forward.IDLE_SECONDS = 3.0, 5.0
live_servers._START_SECONDS, live_servers.MAX_CALLERS = 1.0, 4
"""
"""Timeouts that are short enough for a test."""


def answers_to(server: Server, count: int) -> list[int]:
    """The statuses of so many calls at a time to a server that answers none."""

    def call(_: int) -> int:
        with server.client() as client:
            return client.get("/proxy/s/3000/hold").status_code

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def test_slow_servers_and_callers_time_out(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", weakness=HURRIED).start()
    try:
        with server.client() as client:
            client.post("/api/sessions", json={"language": "python", "session_id": "s"})
            run_id = serve_in_background(client, "s", STREAMS)
            answer = client.get("/proxy/s/3000/hold")
            assert (answer.status_code, answer.json()["code"]) == (504, "answer_timeout")
            assert answer.headers["X-Era-Run"] == run_id
            name, _, port = server.url.removeprefix("http://").rpartition(":")
            connections = []
            for _ in range(4):  # these callers read nothing, so their answers stall
                connection = socket.create_connection((name, int(port)), timeout=60)
                connection.sendall(f"GET /proxy/s/3000/body HTTP/1.1\r\nHost: {name}:{port}\r\n\r\n".encode())
                connection.recv(1)
                connections.append(connection)
            assert client.get("/proxy/s/3000/hold").status_code == 503  # MAX_CALLERS are held
            assert eventually(lambda: answers_to(server, 4) == [504] * 4), "not all of them have timed out"
            for connection in connections:
                connection.settimeout(60)
                with suppress(ConnectionError):  # what is in flight, then the end
                    while connection.recv(1 << 20):
                        pass
                connection.close()
            client.post("/api/sessions", json={"language": "python", "session_id": "deaf", "service": "exec sleep 600"})
            answer = client.get("/proxy/deaf/3000/")
            assert (answer.status_code, answer.json()["code"]) == (504, "answer_timeout")
        assert server.stop() == 0
        assert "Traceback" not in server.log, server.log
    finally:
        if server.process is not None:
            server.stop()


def test_malformed_requests_reach_no_server(server: Server, live: str) -> None:
    """A request reaches the server in the session as one request, or not at all."""
    inside = f"GET {live}/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    cases = {
        "both lengths": f"POST {live}/ HTTP/1.1\r\nHost: SELF\r\nContent-Length: 4\r\n"
        f"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{inside}",
        "two lengths": f"POST {live}/ HTTP/1.1\r\nHost: SELF\r\nContent-Length: 0\r\nContent-Length: 9\r\n\r\n{inside}",
        "a line in the target": f"GET {live}/\x0bx HTTP/1.1\r\nHost: SELF\r\n\r\n",
        "two hosts": f"GET {live}/ HTTP/1.1\r\nHost: SELF\r\nHost: evil.example\r\n\r\n",
        "no host": f"GET {live}/ HTTP/1.1\r\n\r\n",
        "CONNECT": "CONNECT x:1 HTTP/1.1\r\nHost: SELF\r\n\r\n",
    }
    for name, request in cases.items():
        received = server.exchange(request.encode().replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        status = int(received.split(b" ")[1])
        assert 400 <= status < 500, (name, received)
    other = f"GET http://evil.example{live}/x?y HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n\r\n"
    answer = json.loads(server.exchange(other.encode()).rpartition(b"\r\n\r\n")[2])
    assert answer["path"] == "/x?y"
    assert dict(answer["headers"])["host"] == server.url.removeprefix("http://")
