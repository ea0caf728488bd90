"""Requests from outside that reach live servers in sessions unchanged, WebSockets included.

test_hostile_servers.py has servers that send malformed answers.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.api.answers import refused
from tests.api.guest_servers import HTTP_SERVER, WEBSOCKET_ECHO, serve_in_background, start_in_background
from tests.api.websocket import WebSocket
from tests.conftest import MakeServer, MakeSession, Run, Server, at_best
from tests.table import table


def test_a_request_arrives_as_it_is(client: httpx.Client, live: str, server: Server) -> None:
    answer = client.request("PURGE", f"{live}/a%2Fb//c/%ff?x=1&y=%20&z", content=b"hi \xff", headers={"X-Own": "1, 2"})
    assert answer.status_code == 200
    body = answer.json()
    assert (body["method"], body["path"], body["body"]) == ("PURGE", "/a%2Fb//c/%ff?x=1&y=%20&z", "hi \xff")
    seen = {name.lower(): value for name, value in body["headers"]}
    assert (seen["x-own"], seen["content-length"]) == ("1, 2", "4")
    assert answer.headers["X-Era-Run"].startswith("run_")
    assert answer.headers["X-Request-Id"].startswith("req_")
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        assert client.request(method, live).json()["method"] == method
        assert client.request(method, live).json()["path"] == "/"


def test_headers_are_cleaned_both_ways(client: httpx.Client, live: str, server: Server) -> None:
    name, _, port = server.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((name, int(port)), timeout=60, source_address=("127.0.0.2", 0)) as connection:
        connection.sendall(
            f"POST {live}/ HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close, X-Forwarded-For, TE\r\n"
            "X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Host: evil.example\r\nX-Forwarded-Prefix: /evil\r\n"
            "X-Forwarded-Proto: https\r\nX-Real-IP: 192.0.2.1\r\nForwarded: for=192.0.2.1\r\nKeep-Alive: 5\r\n"
            "TE: trailers\r\nProxy-Authorization: Basic eDp5\r\nTrailer: x\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n"
            "Expect: 100-continue\r\nX_Forwarded_For: 192.0.2.1\r\nX-Forwarded_Host: evil.example\r\n"
            "X_Real-IP: 192.0.2.1\r\nContent_Length: 9\r\n"  # which WSGI doesn't tell from those with hyphens
            "Cookie: other=secret; era-session-own=1\r\nAuthorization: Basic sender\r\n"
            "X-Twice: 1\r\nX-Twice: 2\r\n\r\n".encode()
        )
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    body = json.loads(received.rpartition(b"\r\n\r\n")[2])
    prefix = live
    assert sorted((name.lower(), value) for name, value in body["headers"]) == [
        ("authorization", "Basic sender"),
        ("connection", "close"),
        ("cookie", "own=1"),
        ("host", f"{name}:{port}"),
        ("x-forwarded-for", "127.0.0.2"),
        ("x-forwarded-host", f"{name}:{port}"),
        ("x-forwarded-prefix", prefix),
        ("x-forwarded-proto", "http"),
        ("x-twice", "1"),
        ("x-twice", "2"),
    ]
    evil = (
        b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Domain=evil.example; Path=/; Secure\r\nSet-Cookie: b=2\r\n"
        b"Strict-Transport-Security: max-age=9\r\nClear-Site-Data: *\r\nService-Worker-Allowed: /\r\n"
        b"Content-Security-Policy: default-src 'none'; sandbox allow-same-origin\r\nX-Request-Id: mine\r\n"
        b"X-Era-Run: mine\r\nX-Accel-Redirect: /etc/passwd\r\nKeep-Alive: 9\r\nX-Own: kept\r\n"
        b"Content-Length: 2\r\n\r\nok"
    )
    answer = client.get(f"{live}/raw?{evil.hex()}")
    assert (answer.status_code, answer.content, answer.headers["X-Own"]) == (200, b"ok", "kept")
    cookies = f"Path=/proxy/{live.split('/')[2]}/"
    assert answer.headers.get_list("Set-Cookie") == [
        f"era-session-a=1; Secure; {cookies}",
        f"era-session-b=2; {cookies}",
    ]
    policies = answer.headers.get_list("Content-Security-Policy")
    assert [policy.partition(" ")[0] for policy in policies] == ["default-src", "sandbox"]
    assert "allow-same-origin" not in answer.headers["Content-Security-Policy"]
    gone = {"strict-transport-security", "clear-site-data", "service-worker-allowed", "x-accel-redirect", "keep-alive"}
    assert not gone & answer.headers.keys()
    assert "mine" not in answer.headers.values()


@table("variables", [{"V6": "1"}, {"PORT": "80"}, {"PORT": "65535"}])
def test_servers_on_other_ports_and_ipv6_are_reached(
    client: httpx.Client, session: MakeSession, variables: dict[str, str]
) -> None:
    where = session()
    port = variables.get("PORT", "3000")
    start_it = start_in_background if port == "80" else serve_in_background
    start_it(client, where, HTTP_SERVER, env=variables)
    answer = client.get(f"/proxy/{where}/{port}/")
    if port == "80":  # programs may not bind privileged ports
        assert answer.status_code == 400
    else:
        assert answer.json()["path"] == "/"


def test_events_come_as_they_are_sent(client: httpx.Client, live: str, server: Server) -> None:
    with server.client() as other, client.stream("GET", f"{live}/events") as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        lines = answer.iter_lines()
        for n in range(3):
            assert next(line for line in lines if line) == f"data: {n}"  # it has arrived before the next is sent
            assert other.get(f"{live}/go?{n}").status_code == 200
        assert [line for line in lines if line] == []


def test_requests_and_answers_stream_at_the_same_time(server: Server, live: str) -> None:
    name, _, port = server.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((name, int(port)), timeout=60) as connection:
        head = f"POST {live}/chunks HTTP/1.1\r\nHost: {name}:{port}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"3\r\none\r\n")
        stream = connection.makefile("rb")
        while stream.readline() not in (b"\r\n", b""):
            pass
        assert [stream.readline() for _ in range(2)] == [b"3\r\n", b"ONE\r\n"]
        connection.sendall(b"3\r\ntwo\r\n")
        assert [stream.readline() for _ in range(2)] == [b"3\r\n", b"TWO\r\n"]
        connection.sendall(b"0\r\n\r\n")
        assert [stream.readline() for _ in range(2)] == [b"0\r\n", b"\r\n"]


def test_large_bodies_take_no_memory(client: httpx.Client, live: str, server: Server) -> None:
    mib = 128
    client.get(live)
    before = server.resident_bytes
    highest = before
    with client.stream("GET", f"{live}/big?{mib}") as answer:
        size = 0
        for piece in answer.iter_raw(1 << 20):
            size += len(piece)
            highest = max(highest, server.resident_bytes)
    assert size == mib << 20

    def pieces() -> Iterator[bytes]:
        nonlocal highest
        for _ in range(mib):
            yield bytes(1 << 20)
            highest = max(highest, server.resident_bytes)

    sent = client.post(f"{live}/sink", content=pieces(), headers={"Content-Length": str(mib << 20)})
    assert sent.text == str(mib << 20)
    assert highest - before < 24 << 20


def test_a_slow_reader_holds_up_the_server_in_the_session(client: httpx.Client, live: str, server: Server) -> None:
    before = server.resident_bytes
    with client.stream("GET", f"{live}/big?256") as answer:
        time.sleep(1)  # nothing is read here, so what the server has sent would be in the service's memory
        assert server.resident_bytes - before < 16 << 20
        next(answer.iter_raw(1))


def test_calls_without_a_listener_are_no_code(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    answer = client.get(f"/proxy/{where}/3000/")
    assert (answer.status_code, answer.json()["code"]) == (400, "no_code")
    assert answer.json()["hint"] == "Use PUT /api/sessions/{id}/code to store code"
    run_id = serve_in_background(client, where, HTTP_SERVER)
    assert client.get(f"/proxy/{where}/3000/").status_code == 200

    def call_others() -> float:
        began = time.monotonic()
        nobody = refused(client.get(f"/proxy/{where}/3001/"), 400, "Nothing listens on port 3001", "PUT /api/sessions")
        assert nobody["code"] == "no_code"  # the run listens already, elsewhere
        assert client.get(f"/proxy/{where}/18129/").json()["code"] == "no_code"  # the storage's guest listener
        return time.monotonic() - began

    assert at_best(4, call_others) < 4
    assert client.delete(f"/api/sessions/{where}/runs/{run_id}").status_code == 200
    assert client.get(f"/proxy/{where}/3000/").json()["code"] == "no_code"


def test_live_servers_obey_public_access(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session(allowPublicAccess=False)
    serve_in_background(client, where, HTTP_SERVER)
    answer = client.get(f"/proxy/{where}/3000/")
    assert (answer.status_code, answer.json()["code"]) == (403, "not_public")
    websocket = WebSocket(server, f"/proxy/{where}/3000/")
    assert " 403 " in websocket.head.splitlines()[0]
    websocket.close()
    client.patch(f"/api/sessions/{where}", json={"allowPublicAccess": True})
    assert client.get(f"/proxy/{where}/3000/").status_code == 200
    assert client.get("/proxy/nobody/3000/").status_code == 404


def test_a_server_killed_during_an_answer_breaks_the_connection(
    client: httpx.Client, live: str, server: Server
) -> None:
    where = live.split("/")[2]
    run_id = client.get(live).headers["X-Era-Run"]
    failure: list[Exception] = []

    def take() -> None:
        with server.client() as other:
            try:
                other.get(f"{live}/hold")
            except httpx.TransportError as error:
                failure.append(error)

    with client.stream("GET", f"{live}/big?64") as answer:
        pieces = answer.iter_raw(1 << 16)
        next(pieces)
        with server.client() as other:
            assert other.delete(f"/api/sessions/{where}/runs/{run_id}").json()["status"] == "killed"
        with pytest.raises(httpx.TransportError):
            list(pieces)


@pytest.mark.skipif(os.getuid() != 0, reason="every other test here runs as an ordinary user then")
def test_live_servers_of_an_ordinary_users_service(own_server: MakeServer) -> None:
    server = own_server(uid=54321)
    with server.client() as client:
        client.post("/api/sessions", json={"language": "node", "session_id": "s", "service": "exec node app.js"})
        assert client.put("/api/sessions/s/files/app.js", content=WEBSOCKET_ECHO.encode()).status_code == 200
        assert client.get("/proxy/s/3000/").text == "no upgrade"
        websocket = WebSocket(server, "/proxy/s/3000/")
        websocket.send(b"hello", 1)
        assert websocket.receive() == (1, b"hello")
        websocket.close()
        outcome = client.post("/api/sessions/s/run", json={"code": "console.log(1)"}).json()
        assert (outcome["stdout"], client.get("/api/sessions/s/runs").json()["runs"][1]["status"]) == ("1\n", "killed")
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log


# -- WebSockets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo(client: httpx.Client, session: MakeSession) -> str:
    """The path of the public URL of a session with a WebSocket echo server, without a slash at its end."""
    where = session("node")
    serve_in_background(client, where, WEBSOCKET_ECHO)
    assert client.get(f"/proxy/{where}/3000/").text == "no upgrade"
    return f"/proxy/{where}/3000"


def test_a_websocket_is_relayed_both_ways(server: Server, echo: str) -> None:
    websocket = WebSocket(server, f"{echo}/x?y=1", "Sec-WebSocket-Protocol: chat, other", "Cookie: a=1")
    assert websocket.head.startswith("HTTP/1.1 101 Switching Protocols\r\n")
    assert websocket.accepted
    head = websocket.head.lower()
    assert "sec-websocket-protocol: chat\r\n" in head
    assert f"set-cookie: era-session-c=1; path=/proxy/{echo.split('/')[2]}/\r\n".lower() in head
    assert "strict-transport-security" not in head
    assert "x-era-run: run_" in head
    for payload, opcode in ((b"hello", 1), (b"", 2), (bytes(range(256)) * 4, 2), (b"are you there", 9)):
        websocket.send(payload, opcode)
        assert websocket.receive() == (opcode, payload)
    websocket.send((4001).to_bytes(2, "big") + b"enough", 8)
    assert websocket.receive() == (8, b"\x0f\xa1enough")
    assert websocket.rest() == b""
    websocket.close()


def test_large_websocket_messages_take_no_memory(server: Server, echo: str) -> None:
    websocket = WebSocket(server, echo)
    before = server.resident_bytes
    payload = bytes(range(256)) * (1 << 15)  # 8 MiB
    sending = threading.Thread(target=websocket.send, args=(payload,))
    sending.start()
    assert websocket.receive() == (2, payload)
    sending.join()
    assert server.resident_bytes - before < 16 << 20
    websocket.close()


def test_a_websocket_that_is_refused(client: httpx.Client, server: Server, echo: str, session: MakeSession) -> None:
    websocket = WebSocket(server, f"{echo}/refused")
    assert websocket.head.startswith("HTTP/1.1 403 ")
    assert websocket.rest() == b"no"  # the connection carries nothing more
    websocket.close()
    where = session()
    websocket = WebSocket(server, f"/proxy/{where}/3000/")
    assert websocket.head.startswith("HTTP/1.1 400 ")
    assert json.loads(websocket.rest())["code"] == "no_code"
    websocket.close()
