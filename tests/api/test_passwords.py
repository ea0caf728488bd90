"""Passwords that somebody types in for one session's page, in a browser that keeps them as RFCs 7617 and 7616 say."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field

import httpx
import pytest

from tests.api.guest_servers import start_in_background
from tests.conftest import MakeServer
from tests.gvisor import BOTH_KINDS
from tests.soaking import soak_the_rest

TYPED = "Basic " + base64.b64encode(b"mina:canary").decode()
DIGEST = 'Digest username="mina", realm="mail", nonce="1", uri="/", response="canary"'
"""By which whoever hears it can find out the password."""

ASKS = """
import json, os
heard = json.loads(os.environ["ERA_HTTP_HEADERS"]).get("authorization", "")
headers, status = {"WWW-Authenticate": CHALLENGES}, 200 if heard else 401
print(json.dumps({"status": status, "headers": headers, "body": {"heard": heard}}))
"""

ASKS_LIVE = """
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        heard = self.headers.get("Authorization", "")
        self.send_response(200 if heard else 401)
        for challenge in CHALLENGES:
            self.send_header("WWW-Authenticate", challenge)
        self.end_headers()
        self.wfile.write(json.dumps({"heard": heard}).encode())
print("listening", flush=True)
ThreadingHTTPServer(("127.0.0.1", 3000), Handler).serve_forever()
"""


@dataclass
class Browser:
    """One that somebody uses who types a password in for the victim's page only."""

    client: httpx.Client
    scheme: str = "Basic"
    realms: set[str] = field(default_factory=set)
    """Those that a password was typed in for."""

    directories: set[str] = field(default_factory=set)
    """Below which the password is sent unasked."""

    def visit(self, path: str, *, types: bool = False) -> str:
        """The `Authorization` that the session's program hears."""
        typed = {"Authorization": TYPED if self.scheme == "Basic" else DIGEST}
        unasked = any(path.startswith(each) for each in self.directories)
        answer = self.client.get(path, headers=typed if unasked else {})
        asked = answer.headers.get_list("www-authenticate")
        found = [re.search(rf'\b{self.scheme}\b.*?\brealm="?([^",]*)', each, re.I) for each in asked]
        realms = {match[1] for match in found if match}
        if answer.status_code == 401 and (realms & self.realms or (types and realms)):
            self.realms |= realms if types else set()
            # A digest is for all of the origin where its server names no paths (`domain`).
            self.directories.add(path.rpartition("/")[0] + "/" if self.scheme == "Basic" else "/")
            answer = self.client.get(path, headers=typed)
        return str(json.loads(answer.text)["heard"])


ATTACKERS = ("/proxy/stored/80/", "/proxy/live/3000/")


def have_ask(client: httpx.Client, victim: list[str], attackers: list[str], kind: str) -> None:
    """Make sessions whose programs ask for a password by these challenges."""
    for name in ("victim", "stored", "live"):
        made = {"language": "python", "session_id": name, "isolation": kind}
        assert client.post("/api/sessions", json=made).status_code == 201
    for name, challenges in (("victim", victim), ("stored", attackers)):
        code = ASKS.replace("CHALLENGES", repr(challenges))
        assert client.put(f"/api/sessions/{name}/code", json={"code": code}).status_code == 200
    start_in_background(client, "live", ASKS_LIVE.replace("CHALLENGES", repr(attackers)))


PASSIVE = "from era.core.public import headers; headers._challenges_allowed = lambda value, realm: [value]"
"""Passes on every challenge as it is."""


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("weakened", [False, True], ids=["sound", "weakened"])
def test_a_password_is_for_one_session(own_server: MakeServer, weakened: bool, kind: str) -> None:
    server = own_server(weakness=PASSIVE if weakened else "")
    with server.client() as client:
        stolen = [
            'Basic realm="mail"',
            'Digest realm="x", nonce="1", Basic realm="mail"',
            'Basic realm="/proxy/victim/"',
        ]
        have_ask(client, ['Basic realm="mail"'], stolen, kind)

        browser = Browser(client)
        assert browser.visit("/proxy/victim/80/inbox", types=True) == TYPED
        assert browser.visit("/proxy/victim/80/sent") == TYPED
        assert browser.visit("/proxy/victim/81/") == TYPED  # its own realm
        assert [browser.visit(path) for path in ATTACKERS] == ([TYPED, TYPED] if weakened else ["", ""])

        browser = Browser(client)  # one that is asked in the directory of all sessions
        browser.visit("/proxy/victim", types=True)
        assert [browser.visit(path) for path in ATTACKERS] == ([TYPED, TYPED] if weakened else ["", ""])
        assert "basic" not in client.get("/proxy/nobody/80/").headers.get("www-authenticate", "")


HEARING = "from era.core.public import headers; headers._is_of_another = lambda authorization: False"
"""Passes on what no session can have asked for."""


@pytest.mark.parametrize(
    "weaknesses",
    soak_the_rest([(), (PASSIVE, HEARING), (PASSIVE,), (HEARING,)], 2),
    ids=["sound", "weakened", "asked for", "passed on"],
)
def test_no_session_hears_a_digest(own_server: MakeServer, weaknesses: tuple[str, ...]) -> None:
    """None can ask for one, and none is passed on that was asked for by somebody else."""
    with own_server(weakness="\n".join(weaknesses)).client() as client:
        challenges = ['Digest realm="mail", nonce="1"']
        have_ask(client, challenges, challenges, "bubblewrap")
        browser = Browser(client, "Digest")
        heard = DIGEST if len(weaknesses) == 2 else ""
        assert browser.visit("/proxy/victim/80/inbox", types=True) == heard
        assert [browser.visit(path) for path in ATTACKERS] == [heard, heard]
        browser = Browser(client, "Digest", directories={"/"})  # something else on this host has asked
        heard = DIGEST if HEARING in weaknesses else ""
        assert [browser.visit(path) for path in ATTACKERS] == [heard, heard]


def test_the_server_itself_asks_for_no_password(own_server: MakeServer) -> None:
    """A browser would send it to all sessions."""
    server = own_server(api_key="the-key")
    with server.client() as client:
        for path in (
            "/",
            "/docs",
            "/api",
            "/api/sessions",
            "/api/nothing",
            "/mcp",
            "/metrics",
            "/proxy/x/1/",
            "/proxy",
        ):
            for method in ("GET", "POST", "TRACE"):
                for headers in ({}, {"Authorization": TYPED}):
                    asked = client.request(method, path, headers=headers).headers.get_list("www-authenticate")
                    assert asked in ([], ["Bearer"]), (method, path)
        assert client.get("/api/sessions").headers["www-authenticate"] == "Bearer"
