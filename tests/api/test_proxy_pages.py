"""Pages of sessions, in a real browser: they come from the API's own host and port and may attack it."""

from __future__ import annotations

import httpx
import pytest

from tests.api.guest_servers import WEBSOCKET_ECHO, start_in_background
from tests.browser import Browser
from tests.conftest import MakeServer, Server, eventually
from tests.soaking import soak_the_rest

CANARY = "canary-of-another-session"

# Each attack returns what it got, or throws. The page has no Referer that would give it away.
ATTACKS = """
const answerOf = async (...request) => (await fetch(...request)).text();
const post = {method: "POST", headers: {"Content-Type": "application/json"}};
const frame = (url, form) => new Promise((resolve, reject) => {
  const made = document.createElement("iframe");
  made.name = "frame" + Math.random();
  made.onload = () => {
    try { resolve(made.contentWindow.document.documentElement.innerHTML) } catch (error) { reject(error) }
  };
  if (form === undefined) made.src = url;
  document.body.append(made);
  if (form !== undefined) {
    const sent = document.createElement("form");
    Object.assign(sent, {method: "POST", action: url, target: made.name, enctype: "text/plain"});
    document.body.append(sent);
    sent.submit();
  }
});
const attacks = {
  read: () => answerOf("/api/sessions"),
  change: () => answerOf("/api/sessions", {...post, body: '{"language": "python", "session_id": "made-by-a-page"}'}),
  execute: () => answerOf("/api/execute", {...post, body: '{"language": "python", "code": "print(6 * 7)"}'}),
  form: () => frame("/api/sessions/CANARY-gone/restore", null),
  frame: () => frame("/api/sessions"),
  dashboard: () => frame("/"),
  cookie: () => document.cookie,
  storage: () => localStorage.getItem("canary"),
  worker: async () => {
    const made = await navigator.serviceWorker.register("sw.js", {scope: location.pathname});
    return (await made.unregister()) && "registered";
  },
};
window.told = (async () => {
  const found = {};
  for (const [name, attack] of Object.entries(attacks)) {
    try { found[name] = String(await attack()) } catch (error) { found[name] = "refused: " + error.name }
  }
  return found;
})();
""".replace("CANARY", CANARY)

CODE = f"""\
import json, os
own = "sandbox allow-same-origin allow-scripts allow-forms, script-src 'unsafe-inline'"
headers = {{"Content-Security-Policy": own}}
if os.environ["ERA_HTTP_PATH"].endswith("sw.js"):
    print(json.dumps({{"contentType": "text/javascript", "body": ""}}))
else:
    page = "<!doctype html><meta name=referrer content=origin><body><script>" + {ATTACKS!r} + "</script>"
    print(json.dumps({{"contentType": "text/html; charset=utf-8", "headers": HEADERS, "body": page}}))
"""

PLAIN = CODE.replace("HEADERS", "{}")
WITH_A_POLICY = CODE.replace("HEADERS", "headers")


SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><script href="SCRIPT"/></svg>"""
WEAK_GUARD = "from era.api import guard; guard._OWN_CODE = frozenset()"

WEAKNESS = f"from era.core.public import headers; headers.POLICY = ''; {WEAK_GUARD}"
"""A service without the policy that sandboxes pages, and with code of sessions for pages of its own."""


def attack(server: Server, browser: Browser, code: str) -> tuple[dict[str, str], set[str]]:
    """Open a session's page that attacks; returns what each attack got, and the sessions that exist afterwards."""
    with server.client() as client:
        for name in (CANARY, f"{CANARY}-gone", "evil"):
            assert client.post("/api/sessions", json={"language": "python", "session_id": name}).status_code == 201
        assert client.delete(f"/api/sessions/{CANARY}-gone").status_code == 200
        assert client.put("/api/sessions/evil/code", json={"code": code}).status_code == 200
        # As the server's own pages, or another service on this host, may have left it in the browser.
        browser.open(f"{server.url}/docs")
        browser.look(f"document.cookie = 'canary={CANARY}', localStorage.setItem('canary', '{CANARY}')")
        browser.open(f"{server.url}/proxy/evil/3000/page")
        outcomes: dict[str, str] = browser.look("window.told")
        sessions = {session["id"] for session in client.get("/api/sessions").json()["sessions"]}
    browser.open("about:blank")
    return outcomes, sessions


@pytest.mark.parametrize("code", soak_the_rest([PLAIN, WITH_A_POLICY], 1), ids=["as it is", "with a policy of its own"])
def test_a_sessions_page_can_not_attack_the_service(server: Server, browser: Browser, code: str) -> None:
    outcomes, sessions = attack(server, browser, code)
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.startswith("refused: ")} == {}
    assert len(outcomes) == 9
    assert sessions == {CANARY, "evil"}


def test_without_the_sandbox_policy_the_attacks_succeed(own_server: MakeServer, browser: Browser) -> None:
    outcomes, sessions = attack(own_server(weakness=WEAKNESS), browser, PLAIN)
    for name in ("read", "frame", "cookie", "storage"):
        assert CANARY in outcomes[name], outcomes
    assert "42" in outcomes["execute"]
    assert outcomes["worker"] == "registered"
    assert outcomes["dashboard"].startswith("refused: "), "the server's own pages are never in a frame"
    assert sessions == {CANARY, f"{CANARY}-gone", "evil", "made-by-a-page"}


def test_scripts_forms_and_cors_of_pages_work(client: httpx.Client, server: Server, browser: Browser) -> None:
    """A page may also ask its own session, with CORS."""
    page = (
        "<title>first</title><script>window.told = fetch('data').then((answer) => answer.text())</script>"
        "<form method=post action=sent><input name=word value=hello></form>"
    )
    code = f"""\
import json, os
path, body = os.environ["ERA_HTTP_PATH"], os.environ["ERA_HTTP_BODY"]
if path == "/data":
    print(json.dumps({{"headers": {{"Access-Control-Allow-Origin": "*"}}, "body": "some data"}}))
elif path == "/sent":
    print(json.dumps({{"contentType": "text/html", "body": "<title>got " + body + "</title>"}}))
else:
    print(json.dumps({{"contentType": "text/html", "body": {page!r}}}))
"""
    client.post("/api/sessions", json={"language": "python", "session_id": "app"})
    client.put("/api/sessions/app/code", json={"code": code})
    browser.open(f"{server.url}/proxy/app/3000/")
    assert browser.look("window.told") == "some data"
    browser.look("document.querySelector('form').submit()")
    browser.wait("document.title === 'got word=hello'")
    browser.open("about:blank")


LIVE = """\
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b'''<!doctype html><title>live</title><script>
const got = (target, event) => new Promise((resolve, reject) => {
  target.addEventListener(event, resolve, {once: true});
  target.addEventListener("error", () => reject(Error(event)), {once: true});
});
window.told = (async () => {
  const found = {};
  found.fetched = await (await fetch("data")).text();
  found.sent = await (await fetch("data", {method: "PUT", headers: {"X-Mine": "1"}, body: "{}"})).text();
  found.refused = await fetch("closed").then(() => "read", (error) => error.name);
  const source = new EventSource("events"), events = [];
  source.onmessage = (event) => events.push(event.data);
  await got(source, "end");
  source.close();
  found.events = events.join();
  const echo = new WebSocket(location.href.replace(/^http/, "ws").replace("/app/3000/", "/echo/3000/"));
  await got(echo, "open");
  echo.send("hello");
  found.echoed = (await got(echo, "message")).data;
  echo.close();
  return found;
})();
</script>'''

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body, kind = (PAGE, "text/html") if self.path == "/" else (b"some data", "text/plain")
        self.send_response(200)
        if self.path != "/closed":
            self.send_header("Access-Control-Allow-Origin", "*")
        if self.path == "/events":
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for n in range(3):
                self.wfile.write(f"data: {n}\\n\\n".encode())
                time.sleep(0.01)
            self.wfile.write(b"event: end\\ndata: -\\n\\n")
            return
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_OPTIONS(self):
        self.send_response(204)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Methods", "PUT")
        self.send_header("Access-Control-Allow-Headers", "X-Mine")
        self.end_headers()

    do_PUT = do_GET

    def log_message(self, *_):
        pass

print("listening", flush=True)
ThreadingHTTPServer(("127.0.0.1", 3000), Handler).serve_forever()
"""


def test_a_live_page_uses_fetch_events_and_websockets(client: httpx.Client, server: Server, browser: Browser) -> None:
    """It also reaches a WebSocket of another session."""
    for name, language, code in (("app", "python", LIVE), ("echo", "node", WEBSOCKET_ECHO)):
        client.post("/api/sessions", json={"language": language, "session_id": name})
        start_in_background(client, name, code, timeout=60)
    browser.open(f"{server.url}/proxy/app/3000/")
    outcomes = browser.look("window.told")
    browser.open("about:blank")
    assert outcomes == {
        "fetched": "some data", "sent": "some data", "refused": "TypeError", "events": "0,1,2", "echoed": "hello"
    }  # fmt: skip


@pytest.mark.parametrize("weakness", ["", WEAK_GUARD], ids=["", "weakened"])
def test_a_picture_in_a_tab_of_its_own_loads_no_code_of_a_session(
    own_server: MakeServer, browser: Browser, weakness: str
) -> None:
    """The dashboard has fetched it, so that its address, which a user may open, is of the dashboard's origin."""
    server = own_server(weakness=weakness)
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "evil"}).raise_for_status()
        attack = "fetch(origin + '/api/sessions', {method: 'POST', headers: {'Content-Type': 'application/json'}, body:"
        attack += """ '{"language": "python", "session_id": "made-by-a-picture"}'})"""
        code = f"import json\nprint(json.dumps({{'contentType': 'text/javascript', 'body': {attack!r}}}))"
        client.put("/api/sessions/evil/code", json={"code": code}).raise_for_status()
        svg = SVG.replace("SCRIPT", f"{server.url}/proxy/evil/3000/x.js")
        browser.open(f"{server.url}/")
        url = browser.look(f"URL.createObjectURL(new Blob([{svg!r}], {{type: 'image/svg+xml'}}))")
        browser.call("Page.navigate", url=url)
        browser.wait("document.documentElement.localName === 'svg' && document.readyState === 'complete'")
        if weakness:
            assert eventually(lambda: client.get("/api/sessions/made-by-a-picture").status_code == 200)
        else:
            assert eventually(lambda: "route=/proxy session=evil status=403" in server.log_of_calls), (
                "it has been asked for"
            )
            assert client.get("/api/sessions/made-by-a-picture").status_code == 404
