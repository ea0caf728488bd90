"""Calling in: requests answered by a session's stored code. test_proxy_pages.py has the browser's part."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import httpx
import pytest

from tests.conftest import Run, Server, eventually

type Session = Callable[..., str]
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


@pytest.fixture
def publish(client: httpx.Client, session: Session) -> Publish:
    """Makes a session that stores code; the answer is the path of its public URL, without a slash at its end."""

    def make(code: str | None, language: str = "python", **fields: Any) -> str:
        where = session(language, **fields)
        if code is not None:
            assert client.put(f"/api/sessions/{where}/code", json={"code": code}).status_code == 200
        return f"/proxy/{where}/3000"

    return make


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


def without_id(answer: httpx.Response) -> dict[str, Any]:
    told: dict[str, Any] = answer.json()
    del told["request_id"]
    return told


# -- where to call ----------------------------------------------------------------------------------------------------


def test_the_url(client: httpx.Client, session: Session, server: Server) -> None:
    where = session(session_id="a:b-c_D")
    answer = client.get(f"/api/sessions/{where}/host", params={"port": 8080})
    url = f"{server.url}/proxy/{where}/8080"
    expected = {"url": url, "base_url": server.url, "session_id": where, "port": 8080}
    assert (answer.status_code, answer.json()) == (200, expected)
    for port in ("?port=0", "?port=65536", "?port=-1", "?port=x", "?port=", "?port=8080.5", ""):
        assert client.get(f"/api/sessions/{where}/host{port}").status_code == 400, port
    assert client.get("/api/sessions/nobody/host?port=1").status_code == 404


def test_the_url_that_the_server_was_told(own_server: Callable[..., Server]) -> None:
    server = own_server(public_url="https://era.example/below/")
    with server.client() as client:
        assert client.post("/api/sessions", json={"language": "python", "session_id": "s"}).status_code == 201
        told = client.get("/api/sessions/s/host?port=1").json()
        assert told["url"] == "https://era.example/below/proxy/s/1"
        code = 'print(\'{"headers": {"Set-Cookie": "a=1"}}\')'
        client.put("/api/sessions/s/code", json={"code": code})
        # The name it was told is one of its own, and none that it was not told.
        answer = client.get("/proxy/s/1/", headers={"Host": "era.example"})
        assert answer.headers["Set-Cookie"] == "era-session-a=1; Path=/below/proxy/s/"
        assert client.get("/proxy/s/1/", headers={"Host": "evil.example"}).status_code == 403


def test_no_session(client: httpx.Client, session: Session) -> None:
    known = without_id(client.get("/proxy/nobody/80/x"))
    assert (known["code"], client.get("/proxy/nobody/80/x").status_code) == ("not_found", 404)
    for path in (
        "",
        "/",
        "/nobody",
        "/no%20body/80/",
        "/a%2Fb/80",
        "//80/",
        f"/{'x' * 200}/80",
        "/%00",
        "/%ff/1",
        "/a.b/0",
    ):
        answer = client.get(f"/proxy{path}")
        assert (answer.status_code, without_id(answer)) == (404, known), path
    where = session()
    client.delete(f"/api/sessions/{where}")
    assert client.get(f"/proxy/{where}/80/").status_code == 404


def test_not_public(client: httpx.Client, publish: Publish) -> None:
    url = publish(COUNTER, allowPublicAccess=False)
    where = url.split("/")[2]
    for path in (f"{url}/x", url, f"/proxy/{where}", f"/proxy/{where}/nonsense"):
        assert client.post(path).status_code == 403, path
    assert client.post(url).json()["code"] == "not_public"
    assert client.get(f"/api/sessions/{where}/runs").json()["count"] == 0
    assert client.patch(f"/api/sessions/{where}", json={"allowPublicAccess": True}).status_code == 200
    assert client.post(url).status_code == 201
    # The owner's own calls don't ask for it.
    assert client.patch(f"/api/sessions/{where}", json={"allowPublicAccess": False}).status_code == 200
    assert client.post(f"/api/sessions/{where}/run", json={}).status_code == 200


def test_what_becomes_private_while_a_call_waits(client: httpx.Client, publish: Publish, server: Server) -> None:
    """What counts is what the session says when the call has its turn."""
    url = publish(COUNTER)
    where = url.split("/")[2]
    answers: list[int] = []

    def call() -> None:
        with server.client() as other:
            answers.append(other.post(url).status_code)

    def hold() -> None:
        with server.client() as other:
            other.post(f"/api/sessions/{where}/run", json={"code": "import time; time.sleep(1.5)"})

    holding, calling = threading.Thread(target=hold), threading.Thread(target=call)
    holding.start()
    assert eventually(lambda: client.get(f"/api/sessions/{where}").json()["status"] == "running")
    calling.start()
    time.sleep(0.3)
    assert client.patch(f"/api/sessions/{where}", json={"allowPublicAccess": False}).status_code == 200
    holding.join()
    calling.join()
    assert answers == [403]


def test_no_code_and_no_port(client: httpx.Client, publish: Publish) -> None:
    answer = client.get(f"{publish(None)}/x")
    assert (answer.status_code, answer.json()["code"]) == (400, "no_code")
    assert answer.json()["hint"] == "Use PUT /api/sessions/{id}/code to store code"
    where = publish(SEEN).split("/")[2]
    for port in ("0", "65536", "http", "%33000", "99999999999", "-1", "3000%2Fx"):
        assert client.get(f"/proxy/{where}/{port}/x").status_code == 400, port


# -- what the program sees --------------------------------------------------------------------------------------------


def test_the_request_is_seen(client: httpx.Client, publish: Publish, server: Server) -> None:
    url = publish(SEEN)
    answer = client.put(
        f"{url}/a%20b/%2e%2e/%2F;c//d?x=1&y=%20+&x=2",
        content="Grüße, {}",
        headers={"Content-Type": "text/x-own", "X-Hub-Signature": "sha1=abc"},
    )
    seen = answer.json()
    headers = json.loads(seen["ERA_HTTP_HEADERS"])
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    assert seen["ERA_REQUEST_MODE"] == "proxy"
    assert seen["ERA_HTTP_METHOD"] == "PUT"
    assert seen["ERA_HTTP_PATH"] == "/a%20b/%2e%2e/%2F;c//d"
    assert seen["ERA_HTTP_QUERY"] == "?x=1&y=%20+&x=2"
    assert seen["ERA_HTTP_BODY"] == "Grüße, {}"
    assert seen["ERA_HTTP_BODY_ENCODING"] == "utf-8"
    assert seen["ERA_PROXY_URL"] == f"{server.url}/proxy/{url.split('/')[2]}"
    assert headers["content-type"] == "text/x-own"
    assert headers["x-hub-signature"] == "sha1=abc"
    assert headers["host"] == server.url.removeprefix("http://")


@pytest.mark.parametrize("language", ["node", "typescript"])
def test_other_languages(client: httpx.Client, publish: Publish, language: str) -> None:
    code = "console.log(JSON.stringify({status: 202, body: process.env.ERA_HTTP_METHOD + process.env.ERA_HTTP_PATH}))"
    answer = client.patch(f"{publish(code, language)}/x", content=b"{}")
    assert (answer.status_code, answer.text) == (202, "PATCH/x")


@pytest.mark.parametrize("end", ["/3000/", "/3000", "/", ""])
def test_no_path_is_a_slash(client: httpx.Client, publish: Publish, end: str) -> None:
    where = publish(SEEN).split("/")[2]
    seen = client.get(f"/proxy/{where}{end}").json()
    assert (seen["ERA_HTTP_PATH"], seen["ERA_HTTP_QUERY"], seen["ERA_HTTP_BODY"]) == ("/", "", "")


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
def test_any_method(client: httpx.Client, publish: Publish, method: str) -> None:
    code = 'import os; m = os.environ[\'ERA_HTTP_METHOD\']; print(\'{"headers": {"X-Seen": "%s"}}\' % m)'
    answer = client.request(method, publish(code))
    assert (answer.status_code, answer.headers["X-Seen"]) == (200, method)
    assert (answer.content == b"") == (method == "HEAD")


@pytest.mark.parametrize("body", [b"\xff\xfe", b"a\0b", bytes(range(256))])
def test_bodies_that_are_no_text(client: httpx.Client, publish: Publish, body: bytes) -> None:
    seen = client.post(publish(SEEN), content=body).json()
    assert seen["ERA_HTTP_BODY_ENCODING"] == "base64"
    assert base64.b64decode(seen["ERA_HTTP_BODY"]) == body


def test_too_large_for_an_environment(client: httpx.Client, publish: Publish) -> None:
    # A child gets the environment by a system call, which has the kernel's bound.
    url = publish("import subprocess; print(subprocess.run(['true']).returncode)")
    room = (128 << 10) - len("ERA_HTTP_BODY=") - 1
    assert client.post(url, content=b"x" * room).json() == 0
    assert client.post(url, content=b"\xff" * (room // 4 * 3)).json() == 0
    for body in (b"x" * (room + 1), b"\xff" * (room // 4 * 3 + 1), b"x" * (1 << 20)):
        answer = client.post(url, content=body)
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert "ERA_HTTP_BODY" in answer.json()["error"]
    chunked = client.post(url, content=iter([b"x" * 65536] * 3))
    assert chunked.status_code == 413
    answer = client.get(url, headers={"X-Quotes": '"' * 100_000})  # escaped, twice as many; or too many for HTTP
    assert answer.status_code in (413, 431)
    assert client.get(url, headers={"X-Quotes": '"' * 60_000}).status_code == 200


def test_headers_are_cleaned(server: Server, publish: Publish) -> None:
    url = publish(SEEN).encode()
    request = (
        b"POST " + url + b" HTTP/1.1\r\nHost: SELF\r\nConnection: close, X-Forwarded-For, TE\r\nTE: trailers\r\n"
        b"X-Forwarded-For: 192.0.2.1\r\nKeep-Alive: 5\r\nProxy-Authorization: Basic eDp5\r\nProxy-Connection: x\r\n"
        b"Trailer: x\r\nX-Twice: 1\r\nx-twice: 2\r\nSet-Cookie: a=b\r\nCookie: other=secret; era-session-own=1\r\n"
        b"Cookie: era-session-b=2; more=secret\r\nX-Latin: \xe4\r\nAuthorization: Basic sender\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    )
    seen = json.loads(raw(server, request).partition(b"\r\n\r\n")[2])
    headers = json.loads(seen["ERA_HTTP_HEADERS"])
    assert seen["ERA_HTTP_BODY"] == "hi"
    assert headers == {
        "host": server.url.removeprefix("http://"),
        "x-forwarded-for": "192.0.2.1",  # what a proxy in front has said can't be taken away by naming it
        "x-twice": "1, 2",
        "cookie": "own=1; b=2",
        "x-latin": "ä",
        "authorization": "Basic sender",
    }


# -- what it answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "status", "media_type", "body"),
    [
        ({"status": 201, "body": "made"}, 201, "text/plain; charset=utf-8", b"made"),
        ({"body": {"a": [1, "ü"]}}, 200, "application/json", '{"a":[1,"ü"]}'.encode()),
        ({"body": None}, 200, "application/json", b"null"),
        ({"contentType": "text/html", "body": "<p>ü"}, 200, "text/html", "<p>ü".encode()),
        ({"headers": {"Content-Type": "text/css"}, "body": "a{}"}, 200, "text/css", b"a{}"),
        ({"headers": {"Content-Type": "a/b"}, "contentType": "text/css", "body": ""}, 200, "text/css", b""),
        ({"status": 404}, 404, "application/json", b'{"status": 404}'),
        ({"status": "ok", "n": 1}, 200, "application/json", b'{"status": "ok", "n": 1}'),
        ({"status": True}, 200, "application/json", b'{"status": true}'),
        ({"status": 204, "body": "none"}, 204, "text/plain; charset=utf-8", b""),
        ({"status": 304}, 304, "application/json", b""),
        ({"status": 503, "body": "later", "headers": {"Retry-After": 5}}, 503, "text/plain; charset=utf-8", b"later"),
        ([1, {"status": 500}], 200, "application/json", b'[1, {"status": 500}]'),
        ("text", 200, "application/json", b'"text"'),
        (7, 200, "application/json", b"7"),
    ],
)
def test_json_is_the_answer(
    client: httpx.Client, publish: Publish, printed: Any, status: int, media_type: str, body: bytes
) -> None:
    answer = client.get(publish(printing(printed)))
    assert (answer.status_code, answer.headers["Content-Type"], answer.content) == (status, media_type, body)
    assert answer.headers["X-Era-Run"].startswith("run_")
    assert answer.headers.get("Retry-After") == (str(printed["headers"]["Retry-After"]) if status == 503 else None)


@pytest.mark.parametrize(
    ("code", "status", "body"),
    [
        ("print('hello')", 200, b"hello\n"),
        ("pass", 200, b""),
        ("print('{not json')", 200, b"{not json\n"),
        ("print('NaN')", 200, b"NaN\n"),
        ("print('[' * 100_000)", 200, b"[" * 100_000 + b"\n"),
        ("import sys; sys.stdout.buffer.write(b'\\xff<b>')", 200, b"\xff<b>"),
        ("import sys; print('half'); print('secret', file=sys.stderr); sys.exit(3)", 500, b"half\n"),
        ("raise SystemExit('secret')", 500, b""),
        ("print('{\"kept\": 1}'); raise SystemExit(3)", 200, b'{"kept": 1}'),
        ("print('{\"status\": 422}'); raise SystemExit(3)", 422, b'{"status": 422}'),
    ],
)
def test_text_is_the_answer(client: httpx.Client, publish: Publish, code: str, status: int, body: bytes) -> None:
    answer = client.get(publish(code))
    assert (answer.status_code, answer.content) == (status, body)
    if not body.startswith(b'{"'):
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert b"secret" not in answer.content + str(answer.headers).encode()


@pytest.mark.parametrize(
    ("code", "status", "word"),
    [
        (printing({"status": 199}), 502, "status"),
        (printing({"status": 600}), 502, "status"),
        (printing({"status": -(10**30)}), 502, "status"),
        (printing({"headers": []}), 502, "headers"),
        (printing({"contentType": 1}), 502, "contentType"),
        (printing({"contentType": "text/html\r\nX-Evil: 1"}), 502, "character"),
        (printing({"headers": {"X-A": "1\r\nX-Evil: 1"}}), 502, "character"),
        (printing({"headers": {"X-A": "1\nX-Evil: 1"}}), 502, "character"),
        (printing({"headers": {"X-A": "1\0"}}), 502, "character"),
        (printing({"headers": {"X-A": "\u010d\u010aX-Evil: 1"}}), 502, "character"),  # CR and LF, in the low bytes
        (printing({"headers": {"X-A\r\nX-Evil": "1"}}), 502, "name"),
        (printing({"headers": {"X-A: 1\r\nX-Evil": "1"}}), 502, "name"),
        (printing({"headers": {"": "1"}}), 502, "name"),
        (printing({"headers": {"X-A": {}}}), 502, "X-A"),
        (printing({"headers": {"X-A": True}}), 502, "X-A"),
        (printing({"headers": {"Set-Cookie": "a"}}), 502, "cookie"),
        (printing({"headers": {"Set-Cookie": "a\tb=1"}}), 502, "cookie"),
        (printing({"headers": {"X-A": "x" * 40_000}}), 502, "32 KiB"),
        (printing({"contentType": " Multipart/X-Mixed-Replace; boundary=x", "body": ""}), 502, "multipart"),
        ("print('[' + '0,' * 600_000 + '0]')", 502, "too many"),
        ("print('x' * (20 << 20))", 502, "limit of output"),
        ("import os; print('secret', flush=True); os.kill(os.getpid(), 9)", 502, "killed"),
        pytest.param(
            "x = bytearray(4 << 30)\nfor i in range(0, len(x), 4096): x[i] = 1",
            502,
            "memory",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="without a cgroup it is an exception like any other"),
        ),
    ],
)
def test_no_answer(client: httpx.Client, publish: Publish, code: str, status: int, word: str) -> None:
    url = publish(code)
    answer = client.get(url)
    assert (answer.status_code, answer.json()["code"]) == (status, "no_answer")
    assert word in answer.json()["error"]
    assert "X-Evil" not in answer.headers
    assert "secret" not in answer.text
    run = client.get(f"/api/sessions/{url.split('/')[2]}/runs/{answer.headers['X-Era-Run']}")
    assert run.status_code == 200


def test_too_late(client: httpx.Client, publish: Publish, server: Server) -> None:
    before = server.log.count("request_failed")  # other tests let the service's disk fail
    url = publish("import time; print('secret', flush=True); time.sleep(60)", default_timeout=0.3)
    answer = client.get(url)
    assert (answer.status_code, answer.json()["code"]) == (504, "answer_timeout")
    assert "secret" not in answer.text
    assert client.get(f"/api/sessions/{url.split('/')[2]}/runs").json()["runs"][0]["status"] == "timeout"
    assert server.log.count("request_failed") == before, "what a guest does is no failure of the service"


def test_headers_that_are_not_a_guests(client: httpx.Client, publish: Publish) -> None:
    wanted = {
        **dict.fromkeys(("Connection", "Keep-Alive", "Upgrade", "Trailer", "TE", "Proxy-Authenticate"), "evil"),
        **dict.fromkeys(("Transfer-Encoding", "X-Request-Id", "X-Era-Run", "X-Content-Type-Options"), "evil"),
        **dict.fromkeys(("Clear-Site-Data", "Strict-Transport-Security", "Alt-Svc", "NEL", "Report-To"), "evil"),
        **dict.fromkeys(("SERVICE-worker-allowed", "X-Accel-Redirect", "X-Sendfile", "Date", "Set-Cookie2"), "evil"),
        "Content-Length": 1,
        "content-security-policy": ["sandbox allow-same-origin, default-src 'none'; SANDBOX; img-src *", "sandbox"],
        "Access-Control-Allow-Origin": "*",
        "X-Own": ["1", 2],
        "Location": "https://elsewhere.example/",
    }
    answer = client.get(publish(printing({"status": 302, "headers": wanted, "body": "all of it"})))
    assert answer.status_code == 302
    assert answer.text == "all of it"
    assert not [value for value in answer.headers.values() if "evil" in value]
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers.get_list("X-Own") == ["1", "2"]
    assert answer.headers["Location"] == "https://elsewhere.example/"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    *own, last = answer.headers.get_list("Content-Security-Policy")
    assert own == ["default-src 'none'; img-src *"]
    assert last.startswith("sandbox ")
    assert "allow-same-origin" not in last
    for name in ("Content-Length", "X-Request-Id", "X-Era-Run", "Date"):
        assert len(answer.headers.get_list(name)) == 1, name


def test_cookies_stay_in_the_session(client: httpx.Client, publish: Publish, server: Server) -> None:
    setting = {
        "headers": {"Set-Cookie": ["id=7; Domain=127.0.0.1; Path=/; HttpOnly; Evil; Max-Age=60", "b=2;PATH=/api"]}
    }
    code = f"import json, os\nheaders = json.loads(os.environ['ERA_HTTP_HEADERS'])\nanswer = {setting!r}\n"
    code += "answer['body'] = headers.get('cookie', '')\nprint(json.dumps(answer))"
    url, other = publish(code), publish(code)
    where = url.split("/")[2]
    with server.client(cookies={"host": "secret"}) as browser:
        first = browser.get(f"{url}/x")
        assert first.headers.get_list("Set-Cookie") == [
            f"era-session-id=7; HttpOnly; Max-Age=60; Path=/proxy/{where}/",
            f"era-session-b=2; Path=/proxy/{where}/",
        ]
        assert first.text == ""
        assert sorted(browser.get(f"{url}/y").text.split("; ")) == ["b=2", "id=7"]
        assert browser.get(other).text == "", "another session has seen them"


# -- a run like any other ---------------------------------------------------------------------------------------------


def test_calls_are_runs(client: httpx.Client, publish: Publish, run: Run) -> None:
    url = publish(COUNTER)
    where = url.split("/")[2]
    answers = [client.post(f"{url}/hook") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201] * 3
    assert [answer.headers["X-Calls"] for answer in answers] == ["1", "2", "3"]
    told = client.get(f"/api/sessions/{where}").json()
    assert (told["data"]["calls"], told["file_count"]) == (3, 1)
    records = client.get(f"/api/sessions/{where}/runs").json()["runs"]
    assert [record["run_id"] for record in records] == [answer.headers["X-Era-Run"] for answer in reversed(answers)]
    assert [record["state"]["version"] for record in records] == [4, 3, 2]
    assert run(where, "print(open('calls.txt').read())")["stdout"] == "xxx\n"


def test_one_at_a_time_and_not_too_many(own_server: Callable[..., Server]) -> None:
    server = own_server(max_waiting="2")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        code = COUNTER + "import time; time.sleep(0.4)"
        assert client.put("/api/sessions/s/code", json={"code": code}).status_code == 200
        answers: list[httpx.Response] = []

        def call() -> None:
            with server.client() as caller:
                answers.append(caller.post("/proxy/s/80"))

        callers = [threading.Thread(target=call) for _ in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [201] * 3 + [429] * 5
        assert sorted(answer.headers["X-Calls"] for answer in answers if answer.status_code == 201) == ["1", "2", "3"]
        assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 429)


def test_a_caller_that_hangs_up_stops_nothing(client: httpx.Client, publish: Publish, server: Server) -> None:
    url = publish("import time; time.sleep(0.5)\n" + COUNTER)
    where = url.split("/")[2]
    name, _, port = server.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((name, int(port))) as connection:
        connection.sendall(f"GET {url} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        assert eventually(lambda: client.get(f"/api/sessions/{where}").json()["status"] == "running")
    assert eventually(lambda: client.get(f"/api/sessions/{where}").json()["data"].get("calls") == 1)
    with socket.create_connection((name, int(port))) as connection:  # in the middle of its body
        connection.sendall(f"POST {url} HTTP/1.1\r\nHost: {name}\r\nContent-Length: 9\r\n\r\nabc".encode())
        time.sleep(0.2)
    time.sleep(0.2)
    assert client.get(f"/api/sessions/{where}/runs").json()["count"] == 1
    assert "Traceback" not in server.log


# -- the gate ---------------------------------------------------------------------------------------------------------


def test_no_key_is_asked_and_none_is_handed_on(own_server: Callable[..., Server]) -> None:
    server = own_server(api_key="open sesame")
    with server.client() as client:
        key = {"Authorization": "Bearer open sesame"}
        assert client.post("/api/sessions", json={"language": "python", "session_id": "s"}, headers=key).is_success
        assert client.put("/api/sessions/s/code", json={"code": SEEN}, headers=key).is_success
        assert client.get("/api/sessions/s/host?port=1").status_code == 401
        for headers in ({}, key, {"Authorization": "Basic b3BlbiBzZXNhbWU="}, {"Host": "any.example"}):
            answer = client.get("/proxy/s/1/", headers=headers)
            assert answer.status_code == 200
            assert "sesame" not in answer.text
            assert "authorization" not in answer.text
        run = client.post("/api/sessions/s/run", json={"code": "import os; print(dict(os.environ))"}, headers=key)
        assert "sesame" not in run.text


def test_callers_from_anywhere_but_under_our_name(client: httpx.Client, publish: Publish) -> None:
    url = publish("print('served')")
    foreign = [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Referer": "http://127.0.0.1/proxy/x/3000/"},
    ]
    assert client.get("/api/sessions").status_code == 200
    for headers in foreign:
        assert client.post(url, headers=headers).text == "served\n"
        assert client.get("/api/sessions", headers=headers).status_code == 403, headers
    assert client.get(url, headers={"Host": "rebound.example"}).status_code == 403
    for referer in ("http://x/%70roxy/y", "http://x/proxy", "http://x:1/proxy?x"):
        assert client.get("/api/sessions", headers={"Referer": referer}).status_code == 403, referer
    assert client.get("/api/sessions", headers={"Referer": f"{client.base_url}/docs"}).status_code == 200


HEAD = b"POST URL HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n"
ENDED = b"Content-Length: 2\r\n\r\nhi"


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi!",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhi\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-2\r\nhi\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        HEAD + b"X-A: 1\r\n folded\r\n" + ENDED,
        HEAD + b"X-A: 1\0\r\n" + ENDED,
        HEAD + b"Host: evil.example\r\n" + ENDED,
        HEAD.replace(b"SELF", b"evil.example") + ENDED,
        HEAD.replace(b"URL", b"http://SELFURL").replace(b"Host: SELF", b"Host: evil.example") + ENDED,
        HEAD.replace(b"POST URL", b"CONNECT SELF") + b"\r\n",
        HEAD.replace(b"POST URL", b"CONNECT URL") + b"\r\n",
        HEAD.replace(b"HTTP/1.1", b"HTTP/9.9") + ENDED,
        HEAD.replace(b"URL", b"URL/\xff\0") + ENDED,
    ],
)
def test_bytes_that_no_run_comes_of(client: httpx.Client, publish: Publish, server: Server, sent: bytes) -> None:
    url = publish(COUNTER)
    received = raw(server, sent.replace(b"URL", url.encode()))
    assert b"HTTP/1.1 4" in received[:10]
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", received)) == 1
    time.sleep(0.05)
    assert client.get(f"/api/sessions/{url.split('/')[2]}/runs").json()["count"] == 0


@dataclass
class ImpatientServer(Server):
    """A server that gives a body one second."""

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        changed = "from era.api import proxy; proxy._BODY_SECONDS = 1.0; from era.client.cli import main; main()"
        return subprocess.Popen([sys.executable, "-c", changed, "serve"], stdout=log, stderr=log, env=environment)


def test_a_body_that_trickles(own_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece comes in time, and the whole never does."""
    monkeypatch.setattr("tests.conftest.Server", ImpatientServer)
    server = own_server(spares="0")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        client.put("/api/sessions/s/code", json={"code": COUNTER})

        def trickle() -> Iterator[bytes]:
            for _ in range(40):
                yield b"x"
                time.sleep(0.1)

        began = time.monotonic()
        with suppress(httpx.WriteError):  # it may have hung up before the next piece
            assert client.post("/proxy/s/1", content=trickle()).status_code == 408
        assert time.monotonic() - began < 6
        assert client.get("/api/sessions/s/runs").json()["count"] == 0


def test_an_upgrade_and_then_nothing_that_was_asked_for(publish: Publish, server: Server) -> None:
    """After it has been answered, what comes on the connection is no second request, and it is closed."""
    request = b"GET " + publish(COUNTER).encode() + b" HTTP/1.1\r\nHost: SELF\r\nConnection: Upgrade\r\n"
    request += b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    began = time.monotonic()
    received = raw(server, request + b"\x81\x05hello")
    assert time.monotonic() - began < 12
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", received)[:1] in ([b"201"], [b"400"])
    assert b"101 " not in received


def test_an_upgrade_is_an_ordinary_call(publish: Publish, server: Server) -> None:
    request = b"GET " + publish(SEEN).encode() + b" HTTP/1.1\r\nHost: SELF\r\nConnection: Upgrade, close\r\n"
    request += b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    received = raw(server, request)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b"upgrade" not in received.lower()
