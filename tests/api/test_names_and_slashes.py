"""What clients get slightly wrong: misspelt names, needless slashes, missing types, other methods. Each is taken as it
was meant where that is safe, and otherwise answered with what was meant."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.api.answers import JSON, refused
from tests.conftest import MakeServer, MakeSession, Run, Server
from tests.table import table

# -- names ----------------------------------------------------------------------------------------------------------

MISSPELT_FIELDS: dict[str, tuple[str, str, Any, str, str]] = {
    "run": ("POST", "/run", {"cod": "1"}, "'cod'", "'code'"),
    "stream": ("POST", "/stream", {"code": "1", "time_out": 3}, "'time_out'", "'timeout'"),
    "nested": ("PATCH", "", {"limits": {"memory": 128}}, "'limits.memory'", "'memory_mb'"),
    "one of several types": ("PATCH", "", {"setup": {"pip": {"requirments": "a"}}}, "'setup.pip.req", "'requirements'"),
    "camel case": ("PATCH", "", {"defaultTimeout": 3}, "'defaultTimeout'", "'default_timeout'"),
    "snake case": ("PATCH", "", {"allow_internet_access": False}, "'allow_in", "'allowInternetAccess'"),
    "a word of it": ("POST", "/duplicate", {"version": 1}, "'version'", "'from_version'"),
    "nothing near": ("POST", "/run", {"colour": "red"}, "'colour'", "code, env"),
}  # fmt: skip


@table("name", MISSPELT_FIELDS)
def test_a_misspelt_field_is_refused_with_the_nearest_one(
    client: httpx.Client, session: MakeSession, name: str
) -> None:
    method, path, body, wrong, meant = MISSPELT_FIELDS[name]
    answer = client.request(method, f"/api/sessions/{session()}{path}", json=body)
    problem = refused(answer, 400, wrong, meant)
    assert problem["code"] == "invalid_field"
    assert meant in problem["hint"]


MUCH_IS_WRONG: dict[str, tuple[str, str, Any, str]] = {
    "unknown fields": ("POST", "/api/execute", {"language": "python", "code": ""}, "is not a field of this call."),
    "items": ("POST", "/api/storage/d1/app/query", {"sql": "SELECT 1", "params": [{}] * 3000}, "'params.0"),
    "values by name": ("POST", "/api/storage/d1/app/query", {"sql": "SELECT 1"}, "'params'"),
    "words": ("POST", "/api/execute", {"language": "python", "args": [1] * 3000, "code": ""}, "'args.0'"),
    "variables": ("POST", "/api/execute", {"language": "python", "code": ""}, "'env."),
}


@table("name", MUCH_IS_WRONG)
def test_of_all_that_is_wrong_the_first_few_are_told(client: httpx.Client, name: str) -> None:
    """The answer was a hundred times as long as the request."""
    method, path, body, wrong = MUCH_IS_WRONG[name]
    many: dict[str, Any] = {f"name{number}": {} for number in range(3000)}
    added = {"unknown fields": many, "values by name": {"params": many}, "variables": {"env": many}}
    body = body | added.get(name, {})
    answer = client.request(method, path, json=body)
    problem = refused(answer, 400, wrong)
    assert problem["code"] == "invalid_field"
    assert 1 <= len(problem["details"]) <= 20


MISSPELT_PATHS = {
    "/api/session": "/api/sessions",
    "/api/session/a:b": "/api/sessions/a:b",
    "/api/sessions/a/runn": "/api/sessions/a/run",
    "/api/sessions/a/file": "/api/sessions/a/files",
    "/api/sessions/a/processes/b/signl": "/api/sessions/a/processes/b/signal",
    "/sessions/a/run": "/api/sessions/a/run",
    "/execute": "/api/execute",
    "/helth": "/health",
}


@table("path", MISSPELT_PATHS)
def test_a_misspelt_path_is_answered_with_the_nearest_one(client: httpx.Client, path: str) -> None:
    problem = refused(client.post(path, json={}), 404, "nothing at this path")
    assert problem["hint"] == f"Did you mean {MISSPELT_PATHS[path]}? See /docs for the paths there are."


@table("path", ["/nothing/like/it", "/api/sessions//run", "/api/sessions/a/b/c", f"/{'x' * 999}"])
def test_a_path_that_is_near_to_none_is_answered_with_the_docs(client: httpx.Client, path: str) -> None:
    assert refused(client.post(path, json={}), 404)["hint"] == "See /docs for the paths there are."


ELSEWHERE: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/api/sessions/{id}/exec", {"command": "ls"}, 404, "POST /api/sessions/{id}/run "),
    ("POST", "/api/sessions/{id}/files/upload", {}, 405, "PUT /api/sessions/{id}/files/{path} "),
    ("POST", "/v2/sandboxes", {"templateID": "base"}, 404, "POST /api/sessions "),
    ("POST", "/api/v2/execute", {"language": "python"}, 404, "POST /api/execute "),
    ("PATCH", "/api/sessions/{id}", {"env": {"A": "1"}}, 400, "'setup'"),
    ("POST", "/api/sessions/{id}/run", {"code": "1", "stream": True}, 400, "/stream"),
    ("POST", "/api/execute", {"language": "python", "version": "3", "files": [{}]}, 400, "{name: text}"),
]
"""Calls that another service has, and what the hint names."""


def test_what_another_service_has_is_refused_with_the_call_that_does_it(
    client: httpx.Client, session: MakeSession
) -> None:
    where = session()
    for method, path, body, status, named in ELSEWHERE:
        answer = client.request(method, path.replace("{id}", where), json=body)
        assert named in refused(answer, status)["hint"], (path, answer.text)


UNKNOWN_QUERIES = {
    "/api/sessions?lmit=1": "'limit'",
    "/api/sessions?metadata=x": "'metadata.KEY'",
    "/api/sessions?label=x": "language",
    "/api/sessions/{id}?includes=files": "'include'",
    "/api/sessions/{id}/files?prefx=a": "'prefix'",
    "/api/sessions/{id}/files/a?download=1": "none",
    "/api/sessions/{id}/archive?fmt=zip": "format",
    "/api/sessions/{id}/capsule?version=all": "'versions'",
    "/api/sessions/{id}/code?pretty=1": "none",
    "/api/storage/kv/some?lim=1": "'limit'",
    "/api/storage/kv/some/key?x=1": "none",
    "/api/resources/list?kind=kv": "type",
    "/api/languages?all=1": "none",
    "/metrics?x=1": "none",
}


@table("path", UNKNOWN_QUERIES)
def test_an_unknown_query_parameter_is_refused_with_the_nearest_one(
    client: httpx.Client, session: MakeSession, path: str
) -> None:
    url = path.replace("{id}", session())
    name = path.partition("?")[2].partition("=")[0]
    refused(client.get(url), 400, f"'{name}'", UNKNOWN_QUERIES[path])
    ignored = client.get(url.replace(f"?{name}=", "?_="))
    assert ignored.status_code in (200, 404), ignored.text  # there is no such file, key or code


def test_writing_calls_refuse_unknown_query_parameters_and_do_nothing(
    client: httpx.Client, session: MakeSession
) -> None:
    where = session()
    refused(client.put(f"/api/sessions/{where}/files/a?mod=755", content=b"x"), 400, "'mod'", "'mode'")
    refused(client.delete(f"/api/sessions/{where}?purg=true"), 400, "'purg'", "'purge'")
    refused(client.post(f"/api/sessions/{where}/run?timeout=3", json={"code": "1"}), 400, "'timeout'", "data")
    shown = client.get(f"/api/sessions/{where}").json()
    assert (shown["version"], shown["last_run_at"]) == (1, "")


def test_a_misspelt_id_gets_the_nearest_one(client: httpx.Client, session: MakeSession) -> None:
    for name in ("weekly-report", "other"):
        session(session_id=name)
    for wrong in ("weekly_report", "weekly-reports", "Weekly-Report"):
        problem = refused(client.get(f"/api/sessions/{wrong}"), 404, wrong, "'weekly-report'")
        assert problem["error"] == f"There is no session '{wrong}'."
        refused(client.post(f"/api/sessions/{wrong}/run", json={"code": "1"}), 404, "'weekly-report'")
    assert "mean" not in refused(client.get("/api/sessions/unlike"), 404)["hint"]


# -- slashes --------------------------------------------------------------------------------------------------------


def test_a_slash_at_the_end_is_as_without(client: httpx.Client, session: MakeSession, run: Run) -> None:
    assert client.post("/api/sessions/", json={"language": "python", "session_id": "s"}).status_code == 201
    assert client.get("/api/sessions/").json()["count"] == 1
    assert client.get("/api/sessions/s/").json()["id"] == "s"
    assert client.post("/api/sessions/s/run/", json={"code": "print(1)"}).json()["stdout"] == "1\n"
    assert client.get("/api/sessions/s/runs/?limit=1").json()["count"] == 1
    assert client.put("/api/storage/kv/slashes/a", json={"value": "1"}).status_code == 200
    assert client.get("/api/storage/kv/slashes/").json()["keys"][0]["name"] == "a"
    assert client.get("/health/").json()["status"] == "ok"
    assert client.get("/docs/").status_code == 200
    assert client.delete("/api/sessions/s/").json()["id"] == "s"


def test_a_slash_is_part_of_a_key_and_of_a_file_s_path(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    assert client.put("/api/storage/kv/slashes/a/", json={"value": "dir"}).status_code == 200
    refused(client.get("/api/storage/kv/slashes/a"), 404)
    assert client.get("/api/storage/kv/slashes/a/").json()["value"] == "dir"
    refused(client.put(f"/api/sessions/{where}/files/a/", content=b"x"), 400, "'a/'")


@table("path", ["/api/sessions/", "/api/storage/kv/slashes/", "/api/storage/r2/slashes/"])
def test_an_empty_name_deletes_nothing(client: httpx.Client, session: MakeSession, path: str) -> None:
    """As `curl -X DELETE $ERA/api/sessions/$ID` does where ID is empty."""
    if client.get("/api/sessions").json()["count"] == 0:
        session(session_id="kept")
    client.put("/api/storage/kv/slashes/kept", json={"value": "1"})
    client.put("/api/storage/r2/slashes/kept", json={"content": "AA=="})
    assert client.delete(path).status_code in (400, 404)
    assert client.get("/api/sessions").json()["count"] == 1
    assert client.get("/api/resources/stats").json()["total"] == 2


# -- methods --------------------------------------------------------------------------------------------------------


@table(
    "method, path, allowed",
    [
        ("PUT", "/api/sessions", "DELETE, GET, POST"),
        ("DELETE", "/api/sessions/x/code", "GET, PUT"),
        ("GET", "/api/sessions/x/run", "POST"),
        ("POST", "/api/sessions/x/files/a", "DELETE, GET, HEAD, PUT"),
        ("POST", "/health", "GET, HEAD"),
    ],
)
def test_405_names_every_method(client: httpx.Client, method: str, path: str, allowed: str) -> None:
    answer = client.request(method, path)
    problem = refused(answer, 405, method, *allowed.split(", "))
    assert problem["code"] == "method_not_allowed"
    assert answer.headers["allow"] == allowed


# -- types ----------------------------------------------------------------------------------------------------------

TYPES = [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/octet-stream"]


@table("kind", TYPES)
def test_a_json_body_counts_whatever_its_type_where_no_browser_sent_it(client: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    name = f"typed-{TYPES.index(kind)}"
    body = json.dumps({"language": "python", "session_id": name}).encode()
    assert client.post("/api/sessions", content=body, headers=headers).status_code == 201
    refused(client.post("/api/sessions", content=b"language=python", headers=headers), 400, "JSON")
    answer = client.post(f"/api/sessions/{name}/run", content=b'{"code":"print(1)"}', headers=headers)
    assert answer.json()["stdout"] == "1\n"


def test_the_stored_code_runs_without_a_body(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    assert refused(client.post(f"/api/sessions/{where}/run"), 400)["code"] == "no_code"
    client.put(f"/api/sessions/{where}/code", json={"code": "print('stored')"})
    assert client.post(f"/api/sessions/{where}/run").json()["stdout"] == "stored\n"
    assert "stored" in client.post(f"/api/sessions/{where}/stream").text
    refused(client.post("/api/sessions"), 400, "The body is missing")
    refused(client.put(f"/api/sessions/{where}/code"), 400, "The body is missing")


@table("kind", TYPES)
@table("browser", ["origin", "sec-fetch-site"])
def test_a_page_needs_the_type_of_json(server: Server, client: httpx.Client, kind: str | None, browser: str) -> None:
    """A page can send the other types to any server without asking that first."""
    told = {"origin": server.url} if browser == "origin" else {"sec-fetch-site": "same-origin"}
    headers = told | ({} if kind is None else {"content-type": kind})
    before = client.get("/api/sessions").json()["count"]
    refused(client.post("/api/sessions", content=b'{"language":"python"}', headers=headers), 400, "Content-Type")
    assert client.get("/api/sessions").json()["count"] == before
    assert client.post("/api/sessions", content=b'{"language":"python"}', headers=told | JSON).status_code == 201


def test_with_a_bearer_token_a_page_has_been_asked_before(own_server: MakeServer) -> None:
    server = own_server(api_key="the-key")
    told = {"origin": "http://elsewhere.example", "content-type": "text/plain"}
    with server.client(headers={"authorization": "Bearer the-key"}) as client:
        assert client.post("/api/sessions", content=b'{"language":"python"}', headers=told).status_code == 201


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/api/sessions/s/files/grüße.txt", "/api/sessions?label=grüße"])
def test_a_url_that_is_not_escaped_is_refused_with_how_to_escape_it(server: Server, target: str) -> None:
    for raw in (target.encode(), target.encode("latin-1")):
        answer = server.exchange(b"PUT %b HTTP/1.1\r\nHost: SELF\r\nContent-Length: 0\r\n\r\n" % raw)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 "), answer
        said = json.loads(body)
        assert (said["code"], "URL" in said["error"], "%C3%BC" in said["hint"]) == ("bad_request", True, True), said


@pytest.mark.parametrize("blanks", [b"  ", b"\t", b" \t "])
def test_blanks_around_a_header_value_do_not_count(server: Server, session: MakeSession, blanks: bytes) -> None:
    where = session()
    for _ in range(2):
        body = b'{"code":"print(1)"}'
        answer = server.exchange(
            b"POST /api/sessions/%b/run HTTP/1.1\r\nHost: SELF%b\r\nIdempotency-Key: %bkey%b\r\n"
            b"Content-Type: application/json%b\r\nContent-Length: %d%b\r\nConnection: close%b\r\n\r\n%b"
            % (where.encode(), blanks, blanks, blanks, blanks, len(body), blanks, blanks, body)
        )
        assert answer.startswith(b"HTTP/1.1 200 "), answer
    assert b"idempotent-replay: true" in answer.lower()
