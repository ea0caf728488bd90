"""Requests made by pages of other sites, and by names that resolve to this machine: refused, and nothing changes."""

from __future__ import annotations

from typing import Any

import httpx

from era.wire.base import ErrorAnswer
from tests.conftest import MakeServer, Server
from tests.hostile.test_raw_requests import CREATE
from tests.table import table

JSON = {"content-type": "application/json"}


# Routes of every kind, with a body that each accepts.
ROUTES: list[tuple[str, str, bytes | None]] = [
    ("GET", "/api/sessions", None),
    ("POST", "/api/sessions", CREATE),
    ("GET", "/api/sessions/there", None),
    ("PATCH", "/api/sessions/there", b'{"metadata":{"a":1}}'),
    ("PUT", "/api/sessions/there/code", b'{"code":"1"}'),
    ("GET", "/api/sessions/there/code", None),
    ("POST", "/api/sessions/there/run", b'{"code":"1"}'),
    ("POST", "/api/sessions/there/stream", b'{"code":"1"}'),
    ("POST", "/api/execute", b'{"language":"python","code":"1"}'),
    ("DELETE", "/api/sessions/there", None),
    ("DELETE", "/api/sessions", None),
]

PAGES = ("/", "/docs", "/openapi.json", "/metrics")


# Headers of requests. URL and SELF become the server's own URL and host. A header may be empty.
FOREIGN: dict[str, dict[str, str]] = {
    "another site": {"origin": "http://evil.example"},
    "no site": {"origin": "null"},
    "an empty site": {"origin": ""},
    "a site that is no URL": {"origin": "http://[::1"},
    "another port": {"origin": "http://127.0.0.1:1"},
    "another name of here": {"origin": "http://127.0.0.2:8787"},
    "a site with ours in front": {"origin": "URL.evil.example"},
    "a site with ours as its user": {"origin": "http://SELF@evil.example"},
    "ours with a path": {"origin": "URL/x"},
    "a browser that names another site": {"sec-fetch-site": "cross-site"},
    "a browser that names another port": {"sec-fetch-site": "same-site"},
    "a browser that names an unknown site": {"sec-fetch-site": "new-site"},
    "ours, from a page of another": {"origin": "URL", "sec-fetch-site": "cross-site"},
    "a name that resolves to here": {"host": "evil.example"},
    "a name that resolves to here, with our port": {"host": "evil.example:8787"},
    "a name that resolves to here, as its own origin": {
        "host": "evil.example:8787",
        "origin": "http://evil.example:8787",
        "sec-fetch-site": "same-origin",
    },
    "a name that begins as ours": {"host": "127.0.0.1.evil.example"},
    "a name that ends as ours": {"host": "evil.localhost"},
    "a user of ours": {"host": "evil@127.0.0.1"},
    "an address of everywhere": {"host": "0.0.0.0"},
    "an empty name": {"host": ""},
}

OWN: dict[str, dict[str, str]] = {
    "no browser": {},
    "its address": {"host": "SELF"},
    "localhost": {"host": "localhost:8787"},
    "its name in capitals": {"host": "LOCALHOST"},
    "IPv6": {"host": "[::1]:8787"},
    "a page of ours": {"origin": "URL", "sec-fetch-site": "same-origin"},
    "a page of ours at localhost": {"host": "localhost:8787", "origin": "http://localhost:8787"},
    "typed by somebody": {"sec-fetch-site": "none"},
}


def headers_of(server: Server, headers: dict[str, str]) -> dict[str, str]:
    """Headers with the server's own URL and host in the place of URL and SELF."""
    own = server.url.removeprefix("http://")
    return {name: value.replace("URL", server.url).replace("SELF", own) for name, value in headers.items()}


def request_route(
    client: httpx.Client, route: tuple[str, str, bytes | None], headers: dict[str, str]
) -> httpx.Response:
    """Send a request of ROUTES."""
    method, path, body = route
    return client.request(method, path, content=body, headers={**(JSON if body else {}), **headers})


def assert_refused(answer: httpx.Response, status: int, code: str) -> None:
    """Assert an error that lets no page of another site read it."""
    assert answer.status_code == status, (answer.request.method, answer.url, answer.text)
    ErrorAnswer.model_validate(answer.json(), strict=True, extra="forbid")
    assert answer.json()["code"] == code
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def make_session(client: httpx.Client) -> None:
    """Make the session that ROUTES name, with code."""
    assert client.post("/api/sessions", json={"language": "python", "session_id": "there"}).status_code in (201, 409)
    assert client.put("/api/sessions/there/code", json={"code": "2"}).status_code == 200


@table("name", FOREIGN)
def test_a_page_of_another_site_is_refused_and_changes_nothing(server: Server, client: httpx.Client, name: str) -> None:
    headers = headers_of(server, FOREIGN[name])
    make_session(client)
    before = client.get("/api/sessions").json(), client.get("/api/sessions/there/code").json()
    for route in ROUTES:
        assert_refused(request_route(client, route, headers), 403, "forbidden")
    assert (client.get("/api/sessions").json(), client.get("/api/sessions/there/code").json()) == before
    for page in PAGES:
        if headers.keys() & {"host", "origin"} and name != "ours, from a page of another":
            assert_refused(client.get(page, headers=headers), 403, "forbidden")
        else:  # links on other sites may lead to a page
            assert client.get(page, headers=headers).status_code == 200


@table("name", OWN)
def test_the_same_requests_from_here_are_answered(server: Server, client: httpx.Client, name: str) -> None:
    headers = headers_of(server, OWN[name])
    for route in ROUTES:
        make_session(client)
        answer = request_route(client, route, headers)
        assert answer.status_code in (200, 201), (route, answer.text)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    for page in PAGES:
        assert client.get(page, headers=headers).status_code == 200


@table(
    "kind",
    [
        "text/plain",
        "text/plain; application/json",
        "text/plain;charset=application/json",
        "text/plain, application/json",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        None,
    ],
)
@table("browser", ["a page of ours", "typed by somebody"])
def test_bodies_of_types_without_preflight_are_refused(
    server: Server, client: httpx.Client, kind: str | None, browser: str
) -> None:
    """Types that browsers send without a preflight, from a browser that says nothing against it otherwise. A request
    that says nothing of where it comes from is no browser's; see tests/api/test_names_and_slashes.py."""
    make_session(client)
    before = client.get("/api/sessions").json()
    headers = headers_of(server, OWN[browser]) | ({} if kind is None else {"content-type": kind})
    for method, path, body in ROUTES:
        if body is not None:
            assert_refused(client.request(method, path, content=body, headers=headers), 400, "invalid_field")
    assert client.get("/api/sessions").json() == before


@table(
    "form",
    [
        {"data": {"language": "python", "code": "1"}},
        {"data": {'{"language":"python","code":"1","env":{"A': '":""}}'}},
        {"files": {'{"language":"python"}': b"x"}},
        {"params": {"language": "python", "code": "1"}},
    ],
)
def test_a_form_changes_nothing(server: Server, client: httpx.Client, form: dict[str, Any]) -> None:
    make_session(client)
    headers = headers_of(server, OWN["a page of ours"])
    before = client.get("/api/sessions").json()
    for path in ("/api/sessions", "/api/execute", "/api/sessions/there/run", "/api/sessions/there/stream"):
        assert_refused(client.post(path, **form, headers=headers), 400, "invalid_field")
    assert client.get("/api/sessions").json() == before


@table("kind", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON"])
def test_the_same_body_counts_as_json(client: httpx.Client, kind: str) -> None:
    for route in ROUTES:
        if route[2] is not None:
            make_session(client)
            assert request_route(client, route, {"content-type": kind}).status_code in (200, 201)


def test_a_preflight_allows_nothing(server: Server, client: httpx.Client) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for _, path, _ in ROUTES:
        answer = client.options(path, headers={"origin": "http://evil.example", **asks})
        assert_refused(answer, 403, "forbidden")
        assert_refused(client.options(path, headers={"origin": server.url, **asks}), 405, "method_not_allowed")


def test_with_an_api_key_only_the_key_counts(own_server: MakeServer) -> None:
    """Wherever a request comes from: no page of another site knows the key."""
    server = own_server(api_key="the-key")
    key = {"authorization": "Bearer the-key"}
    with server.client() as client:
        for name in FOREIGN:
            headers = headers_of(server, FOREIGN[name])
            for route in ROUTES:
                assert_refused(request_route(client, route, headers), 401, "unauthorized")
                assert_refused(
                    request_route(client, route, {**headers, "authorization": "Bearer the-ke"}), 401, "unauthorized"
                )
            assert request_route(client, ("POST", "/api/sessions", CREATE), {**headers, **key}).status_code == 201
