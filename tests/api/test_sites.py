"""Sites: each session and port under a host name of its own, where everything belongs to the session."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.api.answers import refused
from tests.api.guest_servers import HTTP_SERVER, serve_in_background, start_in_background
from tests.browser import Browser
from tests.conftest import MakeServer, MakeSession, Server
from tests.table import table

OWN_PATHS = [
    "/",
    "/api/sessions",
    "/api/sessions/",
    "/api/keys",
    "/docs",
    "/health",
    "/metrics",
    "/openapi.json",
    "/mcp",
    "/style.css",
    "/proxy/other/3000/",
    "/links/x",
    "/a//b/c%2Fd/?x=/api",
]


def name_of(client: httpx.Client, where: str, port: int = 3000) -> str:
    """The host name and port of a session's site."""
    answer = client.get(f"/api/sessions/{where}/host?port={port}").json()
    assert answer["site_url"].startswith(f"http://{port}-{answer['label']}.localhost:")
    return str(urlsplit(answer["site_url"]).netloc)


def called(client: httpx.Client, name: str, path: str, method: str = "GET", **options: Any) -> httpx.Response:
    """Call a site, whose name nothing here resolves."""
    headers = {"Host": name, **options.pop("headers", {})}
    url = client.base_url.copy_with(raw_path=path.encode())
    return client.request(method, url, headers=headers, **options)


@pytest.fixture
def echo(client: httpx.Client, session: MakeSession) -> str:
    """The name of the site of a session with a live server."""
    where = session()
    serve_in_background(client, where, HTTP_SERVER)
    return name_of(client, where)


def test_a_name_is_stable_and_nobody_elses(own_server: MakeServer) -> None:
    server = own_server(api_key="k")
    keyed = {"headers": {"Authorization": "Bearer k"}}
    labels = []
    with server.client(**keyed) as client:
        for body in ({"session_id": "one"}, {"session_id": "x" * 128}, {"session_id": "A:b_C"}):
            client.post("/api/sessions", json={"language": "python", **body}).raise_for_status()
            answers = [client.get(f"/api/sessions/{body['session_id']}/host?port={port}").json() for port in (1, 65535)]
            assert answers[0]["label"] == answers[1]["label"]
            assert re.fullmatch("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", f"65535-{answers[1]['label']}")
            labels.append(answers[0]["label"])
        assert len(set(labels)) == 3
    server.stop()
    server.start()
    with server.client(**keyed) as client:
        assert client.get("/api/sessions/one/host?port=1").json()["label"] == labels[0]
        client.delete("/api/sessions/one").raise_for_status()
        name = f"1-{labels[0]}.localhost"
        refused(called(client, name, "/"), 404, "no session")
        client.post("/api/sessions/one/restore").raise_for_status()
        assert client.get("/api/sessions/one/host?port=1").json()["label"] == labels[0]
        refused(called(client, name, "/"), 400, "Nothing listens")
        client.delete("/api/sessions/one?purge=true").raise_for_status()
        client.post("/api/sessions", json={"language": "python", "session_id": "one"}).raise_for_status()
        assert client.get("/api/sessions/one/host?port=1").json()["label"] != labels[0], "another session"
        refused(called(client, name, "/"), 404, "no session")


@table("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE"])
def test_every_path_and_method_is_the_sessions(client: httpx.Client, echo: str, method: str) -> None:
    for path in OWN_PATHS if method in ("GET", "POST") else OWN_PATHS[:3]:
        answer = called(client, echo, path, method, content=b"{}", headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, (path, answer.text)
        seen = answer.json()
        assert (seen["method"], seen["path"], seen["body"]) == (method, path, "{}")
        headers = {name.lower(): value for name, value in seen["headers"]}
        assert headers["host"] == headers["x-forwarded-host"] == echo
        assert "x-forwarded-prefix" not in headers


def test_no_call_of_the_api_is_reached(client: httpx.Client, session: MakeSession, echo: str) -> None:
    """Not even the one with a shortcut."""
    where = session()
    body = {"code": "print('run by the API')"}
    for path in (f"/api/sessions/{where}/run", "/api/execute"):
        for name in (echo, echo.upper()):
            answer = called(client, name, path, "POST", json=body, headers={"Origin": f"http://{echo}"})
            assert answer.json()["path"] == path
    assert client.get(f"/api/sessions/{where}/runs").json()["count"] == 0


@pytest.mark.parametrize("end", [".", ".:8787", ":"])
def test_a_name_with_a_dot_or_colon_at_its_end_is_the_same_site(own_server: MakeServer, end: str) -> None:
    server = own_server(api_key="k", public_host="apps.example.test")
    with server.client(headers={"Authorization": "Bearer k"}) as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"}).raise_for_status()
        label = client.get("/api/sessions/s/host?port=3000").json()["label"]
        for above in ("localhost", "apps.example.test"):
            for path in ("/", "/api/sessions", "/openapi.json"):
                refused(called(client, f"3000-{label}.{above}{end}", path), 400, "Nothing listens")


def test_the_api_key_reaches_no_site(own_server: MakeServer) -> None:
    server = own_server(api_key="open sesame")
    with server.client(headers={"Authorization": "Bearer open sesame"}) as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"}).raise_for_status()
        stored = client.post("/api/keys", json={"owner": "o", "description": ""}).json()["key"]
        serve_in_background(client, "s", HTTP_SERVER)
        name = name_of(client, "s")
    with server.client() as client:
        for key in ("open sesame", stored, "open%20sesame"):
            cookies = f"a=1; era={key}; era-session-b=2; era-session-c={key}"
            sent = {"X-Api-Key": key, "Cookie": cookies, "Authorization": f"Bearer {key}"}
            for url, host, kept in (("/", name, "a=1; era-session-b=2"), ("/proxy/s/3000/", "localhost", "b=2")):
                answer = called(client, host, url, headers=sent)
                seen = {each.lower(): value for each, value in answer.json()["headers"]}
                assert key not in answer.text
                assert seen["cookie"] == kept
                assert not {"x-api-key", "authorization"} & seen.keys()
        assert "b3BlbiBzZXNhbWU=" not in client.get("/proxy/s/3000/", auth=("", "open sesame")).text, "not in base64"
        own = {"X-Api-Key": "the session's own"}
        seen = {each.lower(): value for each, value in called(client, name, "/", headers=own).json()["headers"]}
        assert seen["x-api-key"] == own["X-Api-Key"]


def raw(client: httpx.Client, name: str, *lines: str) -> httpx.Response:
    """What becomes of an answer with these headers."""
    answer = "\r\n".join(["HTTP/1.1 200 OK", "Content-Length: 2", *lines, "", "ok"])
    return called(client, name, f"/raw?{answer.encode().hex()}")


def test_a_cookie_is_for_this_host_only(client: httpx.Client, echo: str) -> None:
    cookies = [
        "a=1; Path=/x; Domain=localhost; HttpOnly",
        "b=2;domain=.localhost",
        "c=3; DOMAIN = localhost ; Secure",
        "__Host-d=4; Path=/; Secure",
        "e=domain=localhost",
    ]
    answer = raw(client, echo, *(f"Set-Cookie: {cookie}" for cookie in cookies))
    assert answer.headers.get_list("set-cookie") == [
        "a=1; Path=/x; HttpOnly",
        "b=2",
        "c=3; Secure",
        "__Host-d=4; Path=/; Secure",
        "e=domain=localhost",
    ]


def test_what_a_site_may_answer(client: httpx.Client, echo: str) -> None:
    kept = {
        "content-security-policy": "default-src 'self'",
        "service-worker-allowed": "/",
        "access-control-allow-origin": "*",
        "x-content-type-options": "nosniff",
        "content-type": "multipart/x-mixed-replace; boundary=x",
        "location": "/login",
    }
    dropped = {
        "clear-site-data": '"cookies"',
        "strict-transport-security": "max-age=1; includeSubDomains",
        "alt-svc": 'h3=":1"',
        "x-accel-redirect": "/etc/passwd",
        "x-sendfile": "/etc/passwd",
        "x-litespeed-location": "/etc/passwd",
        "set-login": "logged-in",
    }
    answer = raw(client, echo, *(f"{name}: {value}" for name, value in (kept | dropped).items()))
    assert answer.text == "ok"
    assert {name: answer.headers.get(name) for name in kept} == kept
    assert not dropped.keys() & answer.headers.keys()
    assert answer.headers["x-era-run"]
    asked = raw(client, echo, 'WWW-Authenticate: Basic realm="r", Negotiate', "WWW-Authenticate: NTLM")
    assert asked.headers.get_list("www-authenticate") == ['Basic realm="r"']


def test_names_that_are_none(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    name = name_of(client, where)
    label = name.removeprefix("3000-").partition(".")[0]
    changed = ("b" if label[0] == "a" else "a") + label[1:]
    for wrong in (changed, label[:-1] + ("b" if label[-1] == "a" else "a"), label[1:], label + "a", "x", "a-b"):
        refused(called(client, f"3000-{wrong}.localhost", "/api/sessions"), 404, "no session")
    for port in ("0", "65536", "99999"):
        refused(called(client, f"{port}-{label}.localhost", "/"), 400, "port")
    for foreign in (
        f"{label}.localhost",
        f"x.3000-{label}.localhost",
        f"3000-{label}.evil.example",
        f"3000-{label}.localhost.evil.example",
        f"-{label}.localhost",
        f"123456-{label}.localhost",
        f"3000-{label}.localhost:x",
        "evil.localhost",
        ".localhost",
    ):
        refused(called(client, foreign, "/api/sessions"), 403, "own names")
    for hosts in ((name, "127.0.0.1"), ("127.0.0.1", name), (name, name)):
        lines = "".join(f"Host: {host}\r\n" for host in hosts)
        answer = server.exchange(f"GET /api/sessions HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 400"), answer
    refused(called(client, name, "/", "CONNECT"), 405)
    client.patch(f"/api/sessions/{where}", json={"allowPublicAccess": False}).raise_for_status()
    refused(called(client, name, "/"), 403, "not public")


def test_others_reach_sites_below_a_public_host(own_server: MakeServer) -> None:
    server = own_server(public_host="apps.example.test", api_key="the key")
    with server.client() as client:
        keyed = {"Authorization": "Bearer the key"}
        client.post("/api/sessions", json={"language": "python", "session_id": "s"}, headers=keyed).raise_for_status()
        run = {"code": HTTP_SERVER, "background": True, "env": {"PORT": "3000"}}
        client.post("/api/sessions/s/run", json=run, headers=keyed).raise_for_status()
        host = client.get("/api/sessions/s/host?port=3000", headers=keyed).json()
        name = f"3000-{host['label']}.apps.example.test"
        assert host["site_url"] == f"https://{name}"
        for each in (name, f"{name}:8443", f"3000-{host['label']}.localhost"):
            seen = called(client, each, "/api/keys", headers=keyed).json()
            assert seen["path"] == "/api/keys"
            headers = {name.lower(): value for name, value in seen["headers"]}
            assert "authorization" not in headers, "a key of the API's is nothing for a session"
            assert headers["x-forwarded-proto"] == ("http" if each.endswith(".localhost") else "https")
        refused(called(client, f"3000-{'a' * 32}.apps.example.test", "/api/sessions", headers=keyed), 404)
        assert called(client, "era.example.test", "/api/sessions", headers=keyed).status_code == 200


PAGE_SERVER = """\
const crypto = require("crypto"), http = require("http");
const page = `<!doctype html><link rel="stylesheet" href="/style.css"><body><script src="/app.js"></script>`;
const app = `
document.cookie = "script=1; path=/";
document.cookie = "wide=1; path=/; domain=localhost";
window.stored = localStorage.getItem("who");
localStorage.setItem("who", location.host);
window.told = (async () => {
  const socket = new WebSocket("ws://" + location.host + "/api/socket");
  const greeting = await new Promise((resolve, reject) => {
    socket.onmessage = (event) => resolve(event.data);
    socket.onerror = () => reject(new Error("no socket"));
  });
  const database = await new Promise((resolve, reject) => {
    const opening = indexedDB.open("x");
    opening.onsuccess = () => resolve(opening.result.name);
    opening.onerror = reject;
  });
  const worker = await navigator.serviceWorker.register("/sw.js");
  const answer = await fetch("/api/sessions", {method: "POST", body: "b"});
  return {greeting, database, worker: worker.scope, answer: await answer.text(), origin: self.origin,
          color: getComputedStyle(document.body).color};
})();
`;
const types = {"/style.css": ["text/css", "body { color: rgb(1, 2, 3) }"], "/app.js": ["text/javascript", app],
               "/sw.js": ["text/javascript", ""]};
http.createServer((request, response) => {
  const [type, body] = types[request.url] ?? ["text/html", page];
  if (request.url === "/api/sessions") return response.end(request.method + " " + request.headers.cookie);
  response.setHeader("Content-Type", type);
  response.setHeader("Set-Cookie", ["server=1; HttpOnly", "shared=1; Domain=localhost"]);
  response.end(body);
}).on("upgrade", (request, socket) => {
  const accept = crypto.createHash("sha1")
    .update(request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest("base64");
  socket.write("HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n"
    + `Sec-WebSocket-Accept: ${accept}\\r\\n\\r\\n`);
  socket.write(Buffer.from([0x81, 2, 104, 105]));
  socket.on("error", () => {});
}).listen(3000, () => console.log("listening"));
"""


def test_a_page_works_as_on_any_site_and_sees_no_other(
    client: httpx.Client, session: MakeSession, server: Server, browser: Browser
) -> None:
    wheres = session("node"), session("node")
    names = []
    for where in wheres:
        start_in_background(client, where, PAGE_SERVER)
        names.append(name_of(client, where))
    for name in names:
        browser.open(f"http://{name}/")
        assert browser.look("window.stored") is None, "the storage of another session"
        told = browser.look("window.told")
        cookies = told.pop("answer").removeprefix("POST ").split("; ")
        assert sorted(cookies) == ["script=1", "server=1", "shared=1"], "and none of another session"
        assert told == {
            "greeting": "hi",
            "database": "x",
            "worker": f"http://{name}/",
            "origin": f"http://{name}",
            "color": "rgb(1, 2, 3)",
        }
        browser.open(f"http://{name}/again")
        assert browser.look("window.stored") == name
    # Neither this server's own pages nor those under /proxy get any cookie of theirs.
    port = urlsplit(server.url).port
    browser.open(f"http://localhost:{port}/")
    assert browser.look("document.cookie") == ""
    client.put(
        f"/api/sessions/{wheres[0]}/code", json={"code": "import os; print(os.environ['ERA_HTTP_HEADERS'])"}
    ).raise_for_status()
    attack = "fetch('/api/sessions', {headers: {'X': '1'}}).then((answer) => answer.text())"
    assert json.loads(browser.look(attack))["count"] >= 2
    browser.open(f"http://{names[0]}/")
    reading = f"fetch('http://localhost:{port}/api/sessions').then(() => 'read', () => 'refused')"
    assert browser.look(reading) == "refused"
    other = f"fetch('http://{names[1]}/').then(() => 'read', () => 'refused')"
    assert browser.look(other) == "refused"


WEAKNESS = (
    "from era.api.routes import proxy; from starlette.routing import Match; "
    "proxy.SiteUrls.matches = lambda self, scope: (Match.NONE, {})"
)
WIDE_COOKIES = "from era.core.public import headers; headers._of_site = lambda name, value: [(name, value)]"


@pytest.mark.soak
def test_the_walls_are_what_keeps_them_apart(tmp_path: Path) -> None:
    """The same requests against a service without them."""
    for weakness, attack in ((WEAKNESS, "own pages"), (WIDE_COOKIES, "cookies")):
        server = Server(tmp_path / attack.replace(" ", "-"), weakness=weakness).start()
        try:
            with server.client() as client:
                client.post("/api/sessions", json={"language": "python", "session_id": "s"}).raise_for_status()
                serve_in_background(client, "s", HTTP_SERVER)
                name = name_of(client, "s")
                if attack == "own pages":
                    assert "openapi" in called(client, name, "/openapi.json").json()
                else:
                    answer = raw(client, name, "Set-Cookie: a=1; Domain=localhost")
                    assert answer.headers["set-cookie"] == "a=1; Domain=localhost"
        finally:
            server.stop()
