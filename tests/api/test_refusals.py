"""Requests that are refused: bodies, ids, queries, methods and paths, each with an error in the contract's shape."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.api.answers import JSON, refused, send_json
from tests.api.told import WAITS, tell
from tests.conftest import MakeServer, MakeSession, Server, built_with, eventually
from tests.table import table

ID = "/api/sessions/there"
CREATE = ("POST", "/api/sessions")
RUN = ("POST", f"{ID}/run")
PATCH = ("PATCH", ID)
CODE = ("PUT", f"{ID}/code")
EXECUTE = ("POST", "/api/execute")
DEEP = '{"a":' * 64 + "{}" + "}" * 64
MANY = '{"a":' * 100_000 + "1" + "}" * 100_000
LARGE = '{"a":"' + "x" * 2**20 + '"}'

BODIES: dict[str, tuple[tuple[str, str], str, int, str]] = {
    # unknown fields
    "create, unknown": (CREATE, '{"language":"python","lang":"x"}', 400, "'lang'"),
    "run, unknown": (RUN, '{"code":"1","files":{}}', 400, "'files'"),
    "patch, unknown": (PATCH, '{"language":"node"}', 400, "'language'"),
    "code, unknown": (CODE, '{"code":"1","name":"x"}', 400, "'name'"),
    "execute, unknown": (EXECUTE, '{"language":"python","code":"1","session_id":"x"}', 400, "'session_id'"),
    # missing fields
    "create, no language": (CREATE, "{}", 400, "'language' is missing"),
    "code, no code": (CODE, "{}", 400, "'code' is missing"),
    "execute, no code": (EXECUTE, '{"language":"python"}', 400, "'code' is missing"),
    # types
    "language, number": (CREATE, '{"language":5}', 400, "'language'"),
    "language, null": (CREATE, '{"language":null}', 400, "'language'"),
    "persistent, string": (CREATE, '{"language":"python","persistent":"true"}', 400, "'persistent'"),
    "persistent, number": (CREATE, '{"language":"python","persistent":1}', 400, "'persistent'"),
    "internet, null": (CREATE, '{"language":"python","allowInternetAccess":null}', 400, "'allowInternetAccess'"),
    "data, list": (CREATE, '{"language":"python","data":[]}', 400, "'data'"),
    "data, null": (CREATE, '{"language":"python","data":null}', 400, "'data'"),
    "data, string": (PATCH, '{"data":"{}"}', 400, "'data'"),
    "metadata, list": (PATCH, '{"metadata":[]}', 400, "'metadata'"),
    "timeout of a session, string": (CREATE, '{"language":"python","default_timeout":"5"}', 400, "'default_timeout'"),
    "timeout, true": (RUN, '{"code":"1","timeout":true}', 400, "'timeout'"),
    "timeout, list": (RUN, '{"code":"1","timeout":[1]}', 400, "'timeout'"),
    "env, list": (RUN, '{"code":"1","env":["A=1"]}', 400, "'env'"),
    "env, number": (RUN, '{"code":"1","env":{"A":1}}', 400, "'env.A'"),
    "env, boolean": (RUN, '{"code":"1","env":{"A":true}}', 400, "'env.A'"),
    "env, null": (RUN, '{"code":"1","env":{"A":null}}', 400, "'env.A'"),
    "description, number": (CODE, '{"code":"1","description":1}', 400, "'description'"),
    "files, bytes": (EXECUTE, '{"language":"python","code":"1","files":{"a":1}}', 400, "'files.a'"),
    # values
    "language, unknown": (CREATE, '{"language":"cobol"}', 400, "'cobol'"),
    "language, empty": (CREATE, '{"language":""}', 400, "language"),
    "execute, unknown language": (EXECUTE, '{"language":"cobol","code":"1"}', 400, "'cobol'"),
    "timeout, zero": (RUN, '{"code":"1","timeout":0}', 400, "'timeout'"),
    "timeout, negative": (RUN, '{"code":"1","timeout":-1}', 400, "'timeout'"),
    "timeout, endless": (RUN, '{"code":"1","timeout":1e300}', 400, "'timeout'"),
    "timeout, digits": (RUN, '{"code":"1","timeout":1' + "0" * 400 + "}", 400, "'timeout'"),
    "default timeout, zero": (PATCH, '{"default_timeout":0}', 400, "'default_timeout'"),
    "default timeout, negative": (CREATE, '{"language":"python","default_timeout":-3}', 400, "'default_timeout'"),
    "env, name with =": (RUN, '{"code":"1","env":{"A=B":"1"}}', 400, "'A=B'"),
    "env, no name": (RUN, '{"code":"1","env":{"":"1"}}', 400, "name"),
    "env, NUL in a name": (RUN, '{"code":"1","env":{"A\\u0000":"1"}}', 400, "name"),
    "env, NUL in a value": (RUN, '{"code":"1","env":{"A":"1\\u0000"}}', 400, "'env.A'"),
    "setup": (CREATE, '{"language":"python","setup":{"pip":["-r x"]}}', 400, "'setup.pip'"),
    "id, slash": (CREATE, '{"language":"python","session_id":"a/b"}', 400, "'session_id'"),
    "id, dots": (CREATE, '{"language":"python","session_id":".."}', 400, "'session_id'"),
    "id, newline at the end": (CREATE, '{"language":"python","session_id":"a\\n"}', 400, "'session_id'"),
    "id, NUL": (CREATE, '{"language":"python","session_id":"a\\u0000"}', 400, "'session_id'"),
    "id, not ASCII": (CREATE, '{"language":"python","session_id":"é"}', 400, "'session_id'"),
    "id, digits of another script": (CREATE, '{"language":"python","session_id":"١"}', 400, "'session_id'"),
    "id, empty": (CREATE, '{"language":"python","session_id":""}', 400, "'session_id'"),
    "id, 129 characters": (CREATE, '{"language":"python","session_id":"' + "x" * 129 + '"}', 400, "'session_id'"),
    "id, 10 KB": (CREATE, '{"language":"python","session_id":"' + "x" * 10_000 + '"}', 400, "'session_id'"),
    "files, up": (EXECUTE, '{"language":"python","code":"1","files":{"../a":""}}', 400, "'../a'"),
    "files, up in the middle": (EXECUTE, '{"language":"python","code":"1","files":{"a/../../b":""}}', 400, "'files'"),
    "files, absolute": (EXECUTE, '{"language":"python","code":"1","files":{"/etc/x":""}}', 400, "'/etc/x'"),
    "files, empty": (EXECUTE, '{"language":"python","code":"1","files":{"":""}}', 400, "'files'"),
    "files, NUL": (EXECUTE, '{"language":"python","code":"1","files":{"a\\u0000b":""}}', 400, "'files'"),
    "files, a directory": (EXECUTE, '{"language":"python","code":"1","files":{"a":"","a/b":""}}', 400, "'a'"),
    # sizes and depths
    "data, 1 MiB": (CREATE, '{"language":"python","data":' + LARGE + "}", 413, "files"),
    "data, deep": (CREATE, '{"language":"python","data":' + DEEP + "}", 413, "files"),
    "data, 1 MiB, patched": (PATCH, '{"data":' + LARGE + "}", 413, "files"),
    "data, deep, patched": (PATCH, '{"data":' + DEEP + "}", 413, "files"),
    "metadata, 1 MiB": (CREATE, '{"language":"python","metadata":' + LARGE + "}", 413, "'metadata'"),
    "metadata, deep": (PATCH, '{"metadata":' + DEEP + "}", 413, "'metadata'"),
    "body, deep": (CREATE, '{"language":"python","data":' + MANY + "}", 413, "deeper"),
    "body, deep lists": (RUN, "[" * 100_000 + "]" * 100_000, 413, "deeper"),
    "code, large": (CODE, '{"code":"' + "x" * (4 * 2**20 + 1) + '"}', 413, "'code'"),
    "execute, large": (EXECUTE, '{"language":"python","code":"' + "x" * (4 * 2**20 + 1) + '"}', 413, "'code'"),
    "env, one large": (RUN, '{"code":"1","env":{"A":"' + "x" * 200_000 + '"}}', 413, "'env'"),
    "files, many": (
        EXECUTE,
        json.dumps({"language": "python", "code": "1", "files": dict.fromkeys(map(str, range(1001)), "")}),
        413,
        "'files'",
    ),
    # not valid JSON
    "empty": (CREATE, "", 400, "JSON"),
    "blank": (CREATE, "  ", 400, "empty"),
    "malformed": (CREATE, '{"language":', 400, "is not JSON"),
    "malformed, Python": (RUN, "{'code': '1'}", 400, "is not JSON"),
    "two documents": (RUN, '{"code":"1"}{}', 400, "is not JSON"),
    "list": (RUN, '[{"code":"1"}]', 400, "object"),
    "string": (RUN, '"code"', 400, "object"),
    "null": (RUN, "null", 400, "object"),
    "NaN": (CREATE, '{"language":"python","data":{"a":NaN}}', 400, "NaN"),
    "Infinity": (RUN, '{"code":"1","timeout":Infinity}', 400, "Infinity"),
    "1e400": (CREATE, '{"language":"python","metadata":{"a":1e400}}', 400, "out of range"),
    "5,000 digits": (PATCH, '{"data":{"a":' + "9" * 5000 + "}}", 400, "digits"),
    "lone surrogate in code": (RUN, '{"code":"\\ud800"}', 400, "surrogate"),
    "lone surrogate in data": (PATCH, '{"data":{"\\udfff":1}}', 400, "surrogate"),
    "lone surrogate in env": (RUN, '{"code":"1","env":{"A":"\\ud800"}}', 400, "surrogate"),
}  # fmt: skip


@pytest.fixture
def there(session: MakeSession) -> str:
    """The session of which requests are refused."""
    return session(session_id="there", data={"n": 1})


@table("name", BODIES)
def test_an_invalid_body_is_refused(client: httpx.Client, there: str, name: str) -> None:
    (method, path), body, status, word = BODIES[name]
    before = client.get("/api/sessions").json()
    refused(send_json(client, method, path, body), status, word)
    assert client.get("/api/sessions").json() == before


@table(
    "call, body, error, hint",
    [
        (
            PATCH,
            '{"ttl":"1h"}',
            "'ttl' is not valid: Input should be a valid integer.",
            "'ttl': Seconds without a call",
        ),
        (RUN, '{"code":"1","secrets":{"K":"abc"}}', "'secrets.K' is not valid: It should be an object.", "hosts"),
        (RUN, '{"code":"1","secrets":{"K":{"value":"abc"}}}', "'secrets.K.hosts' is missing.", "'hosts': Hosts ("),
        (CREATE, '{"language":"python","limits":5}', "'limits' is not valid: It should be an object.", "memory_mb"),
    ],
)
def test_a_hint_says_what_a_field_is(
    client: httpx.Client, there: str, call: tuple[str, str], body: str, error: str, hint: str
) -> None:
    answer = send_json(client, *call, body).json()
    assert answer["error"] == error
    assert hint in answer["hint"]
    assert "abc" not in str(answer)


@table(
    "body, word",
    [
        (b'\xef\xbb\xbf{"language":"python"}', "byte order mark"),
        ('{"language":"python"}'.encode("utf-16"), "UTF-8"),
        (b'{"language":"py\xff"}', "UTF-8"),
        (b'{"language":"py\xed\xa0\x80"}', "UTF-8"),
    ],
)
def test_a_body_that_is_not_utf8_is_refused(client: httpx.Client, body: bytes, word: str) -> None:
    refused(send_json(client, "POST", "/api/sessions", body), 400, word)


@table("chunked", [False, True])
def test_a_body_over_16_mib_is_refused_with_or_without_a_length(client: httpx.Client, chunked: bool) -> None:
    pieces = [b'{"language":"python","data":"', *[b"x" * 2**20] * 16, b'"}']
    content: Any = iter(pieces) if chunked else b"".join(pieces)
    refused(client.post("/api/sessions", content=content, headers=JSON), 413, "bytes")
    assert client.get("/health").json()["status"] == "ok"


BAD_IDS = ["a/b", "a\nb", "a\n", "\n", "a\0b", "\0", "a b", "é", "..", ".", "a.b", "%", "x" * 129, "x" * 10_000]


@table("bad", BAD_IDS)
def test_an_id_that_no_session_can_have_is_not_found(client: httpx.Client, bad: str) -> None:
    escaped = quote(bad, safe="").replace(".", "%2E")  # or httpx would resolve the dots itself
    calls = [("GET", ""), ("DELETE", ""), ("PATCH", ""), ("POST", "/run"), ("POST", "/stream"), ("GET", "/code")]
    for method, rest in calls:
        body = {"POST": {"code": "1"}, "PATCH": {}}.get(method)
        refused(client.request(method, f"/api/sessions/{escaped}{rest}", json=body), 404)


@table("good", ["a", "A_b-c:1", "0", "-", "x" * 128])
def test_an_id_of_the_documented_form_is_taken(client: httpx.Client, session: MakeSession, good: str) -> None:
    assert session(session_id=good) == good
    assert client.get(f"/api/sessions/{quote(good)}").json()["id"] == good


@table(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=1.5",
        f"limit={'9' * 5000}",
        "cursor=!",
        "cursor=" + "x" * 65,
        "status=done",
        "language=cobol",
        "include=all",
    ],
)
def test_an_invalid_query_is_refused(client: httpx.Client, session: MakeSession, query: str) -> None:
    path = f"/api/sessions/{session()}" if query.startswith("include") else "/api/sessions"
    refused(client.get(f"{path}?{query}"), 400, query.partition("=")[0])


@table(
    "method, path, allowed",
    [
        ("PUT", "/api/sessions", {"GET", "POST", "DELETE"}),
        ("POST", "/api/sessions/x", {"GET", "PATCH", "DELETE"}),
        ("GET", "/api/sessions/x/run", {"POST"}),
        ("DELETE", "/api/sessions/x/code", {"GET", "PUT"}),
        ("GET", "/api/execute", {"POST"}),
        ("POST", "/health", {"GET"}),
        ("BREW", "/health", {"GET"}),
    ],
)
def test_a_method_that_a_path_does_not_have_is_405(
    client: httpx.Client, method: str, path: str, allowed: set[str]
) -> None:
    answer = client.request(method, path)
    if method == "BREW":
        assert answer.status_code in (400, 405)
        return
    assert refused(answer, 405, method)["code"] == "method_not_allowed"
    methods = {name.strip() for name in answer.headers["allow"].split(",")}
    assert methods - {"HEAD"} <= allowed
    assert methods


@table("path", ["/api", "/api/nothing", "/api/sessions/x/nothing", "/nothing", "/api//execute"])
def test_an_unknown_path_is_404(client: httpx.Client, path: str) -> None:
    refused(client.get(path), 404)


def test_malformed_requests_are_400(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for request in (b"GET /api/sessions/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", b"\0\0\0\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(request)
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


SECRET = "s3cr3t-in-env"

LEAKS = {
    "beside a number": f'{{"code":"1","env":{{"A":"{SECRET}","B":5}}}}',
    "in a list": f'{{"code":"1","env":{{"A":["{SECRET}"]}}}}',
    "in a key": f'{{"code":"1","env":{{"A":{{"{SECRET}":1}}}}}}',
    "instead of env": f'{{"code":"1","env":"{SECRET}"}}',
    "list instead of env": f'{{"code":"1","env":["{SECRET}"]}}',
    "NUL": f'{{"code":"1","env":{{"A":"{SECRET}\\u0000"}}}}',
    "large": f'{{"code":"1","env":{{"A":"{SECRET}{"x" * 140_000}"}}}}',
    "unknown field": f'{{"code":"1","env":{{"A":"{SECRET}"}},"more":1}}',
    "bad timeout": f'{{"code":"1","env":{{"A":"{SECRET}"}},"timeout":-1}}',
    "trailing comma": f'{{"code":"1","env":{{"A":"{SECRET}"}},}}',
    "raw newline": f'{{"code":"1","env":{{"A":"{SECRET}\n"}}}}',
    "surrogate": f'{{"code":"1","env":{{"A":"{SECRET}\\ud800"}}}}',
    "no code": f'{{"env":{{"A":"{SECRET}"}}}}',
    "a list": f'["{SECRET}"]',
    "a string": f'"{SECRET}"',
}


@table("name", LEAKS)
def test_a_value_of_env_is_in_no_error_and_no_log(
    server: Server, client: httpx.Client, session: MakeSession, name: str
) -> None:
    where = session()
    for path in (f"/api/sessions/{where}/run", f"/api/sessions/{where}/stream", "/api/execute", "/api/sessions"):
        answer = send_json(client, "POST", path, LEAKS[name])
        assert 400 <= answer.status_code < 500
        assert SECRET not in answer.text + str(answer.headers)
    assert SECRET not in server.log


def test_more_runs_than_may_wait_are_429(own_server: MakeServer) -> None:
    server = own_server(weakness=built_with("era.parts.Turns", max_waiting=2))
    with server.client() as client, ThreadPoolExecutor(4) as pool:
        client.post("/api/sessions", json={"language": "python", "session_id": "busy"})
        client.post("/api/sessions", json={"language": "python", "session_id": "free"})

        def work(_: int) -> int:
            with server.client() as own:
                return own.post("/api/sessions/busy/run", json={"code": WAITS, "timeout": 60}).status_code

        calls = [pool.submit(work, number) for number in range(4)]
        # Of four one is refused, and by then one runs and two wait.
        assert eventually(lambda: any(call.done() for call in calls))
        (refused_one,) = (call for call in calls if call.done())
        assert refused_one.result() == 429
        for route in ("run", "stream"):
            answer = client.post(f"/api/sessions/busy/{route}", json={"code": "1"})
            refused(answer, 429, "busy")
            assert int(answer.headers["retry-after"]) >= 1
        # Other sessions run, and this session can still be read.
        assert client.post("/api/sessions/free/run", json={"code": "print(1)"}).status_code == 200
        assert client.get("/api/sessions/busy").status_code == 200
        tell(client)
        assert sorted(call.result() for call in calls) == [200, 200, 200, 429]
        assert client.post("/api/sessions/busy/run", json={"code": "1"}).status_code == 200
