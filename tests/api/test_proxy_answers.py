"""What a public call is answered: statuses, bodies, headers and cookies that stored code printed."""

from __future__ import annotations

import os
from typing import Any

import httpx

from tests.api.stored_code import Publish, printing
from tests.conftest import Server
from tests.table import table


@table(
    "printed, status, media_type, body",
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
def test_printed_json_is_the_answer(
    client: httpx.Client, publish: Publish, printed: Any, status: int, media_type: str, body: bytes
) -> None:
    answer = client.get(publish(printing(printed)))
    assert (answer.status_code, answer.headers["Content-Type"], answer.content) == (status, media_type, body)
    assert answer.headers["X-Era-Run"].startswith("run_")
    assert answer.headers.get("Retry-After") == (str(printed["headers"]["Retry-After"]) if status == 503 else None)


@table(
    "code, status, body",
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
def test_printed_text_is_the_answer(
    client: httpx.Client, publish: Publish, code: str, status: int, body: bytes
) -> None:
    answer = client.get(publish(code))
    assert (answer.status_code, answer.content) == (status, body)
    if not body.startswith(b'{"'):
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert b"secret" not in answer.content + str(answer.headers).encode()


FILLS_MEMORY = "x = bytearray(4 << 30)\nfor i in range(0, len(x), 4096): x[i] = 1"
OUT_OF_MEMORY = [(FILLS_MEMORY, 502, "memory")] if os.geteuid() == 0 else []
"""Without a cgroup, as an ordinary user's service, it is an exception like any other."""


@table(
    "code, status, word",
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
        (printing({"headers": {"X-A": "\u010d\u010aX-Evil: 1"}}), 502, "character"),  # whose low bytes are CR and LF
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
        *OUT_OF_MEMORY,
    ],
)
def test_invalid_answers_are_502(client: httpx.Client, publish: Publish, code: str, status: int, word: str) -> None:
    url = publish(code)
    answer = client.get(url)
    assert (answer.status_code, answer.json()["code"]) == (status, "no_answer")
    assert word in answer.json()["error"]
    assert "X-Evil" not in answer.headers
    assert "secret" not in answer.text
    run = client.get(f"/api/sessions/{url.split('/')[2]}/runs/{answer.headers['X-Era-Run']}")
    assert run.status_code == 200


def test_a_call_that_times_out_is_504(client: httpx.Client, publish: Publish, server: Server) -> None:
    before = server.log.count("request_failed")  # tests before this one may have logged some
    url = publish("import time; print('secret', flush=True); time.sleep(60)", default_timeout=0.3)
    answer = client.get(url)
    assert (answer.status_code, answer.json()["code"]) == (504, "answer_timeout")
    assert "secret" not in answer.text
    assert client.get(f"/api/sessions/{url.split('/')[2]}/runs").json()["runs"][0]["status"] == "timeout"
    assert server.log.count("request_failed") == before, "what a guest does is no failure of the service"


def test_headers_that_guests_may_not_set(client: httpx.Client, publish: Publish) -> None:
    headers = {
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
    answer = client.get(publish(printing({"status": 302, "headers": headers, "body": "all of it"})))
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
