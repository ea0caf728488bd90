"""Passwords that somebody types in for one session's page, in a browser that keeps them as RFC 7617 says."""

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

TYPED = "Basic " + base64.b64encode(b"mina:canary").decode()

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
    realms: set[str] = field(default_factory=set)
    """Those that a password was typed in for."""

    directories: set[str] = field(default_factory=set)
    """Below which the password is sent unasked."""

    def visit(self, path: str, *, types: bool = False) -> str:
        """The `Authorization` that the session's program hears."""
        unasked = any(path.startswith(each) for each in self.directories)
        answer = self.client.get(path, headers={"Authorization": TYPED} if unasked else {})
        found = [
            re.search(r'\bBasic\b.*?\brealm="?([^",]*)', each, re.I)
            for each in answer.headers.get_list("www-authenticate")
        ]
        realms = {match[1] for match in found if match}
        if answer.status_code == 401 and (realms & self.realms or (types and realms)):
            self.realms |= realms if types else set()
            self.directories.add(path.rpartition("/")[0] + "/")
            answer = self.client.get(path, headers={"Authorization": TYPED})
        return str(json.loads(answer.text)["heard"])


PASSIVE = "from era.core.public import challenges; challenges.allowed = lambda value, realm: [value]"
"""Passes on every challenge as it is."""


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("weakened", [False, True], ids=["sound", "weakened"])
def test_a_password_is_for_one_session(own_server: MakeServer, weakened: bool, kind: str) -> None:
    server = own_server(weakness=PASSIVE if weakened else "")
    with server.client() as client:
        for name in ("victim", "stored", "live"):
            made = {"language": "python", "session_id": name, "isolation": kind}
            assert client.post("/api/sessions", json=made).status_code == 201
        stolen = [
            'Basic realm="mail"',
            'Digest realm="x", nonce="1", Basic realm="mail"',
            'Basic realm="/proxy/victim/"',
        ]
        for name, challenges in (("victim", ['Basic realm="mail"']), ("stored", stolen)):
            code = ASKS.replace("CHALLENGES", repr(challenges))
            assert client.put(f"/api/sessions/{name}/code", json={"code": code}).status_code == 200
        start_in_background(client, "live", ASKS_LIVE.replace("CHALLENGES", repr(stolen)))
        attackers = ("/proxy/stored/80/", "/proxy/live/3000/")

        browser = Browser(client)
        assert browser.visit("/proxy/victim/80/inbox", types=True) == TYPED
        assert browser.visit("/proxy/victim/80/sent") == TYPED
        assert browser.visit("/proxy/victim/81/") == TYPED  # its own realm
        assert [browser.visit(path) for path in attackers] == ([TYPED, TYPED] if weakened else ["", ""])

        browser = Browser(client)  # one that is asked in the directory of all sessions
        browser.visit("/proxy/victim", types=True)
        assert [browser.visit(path) for path in attackers] == ([TYPED, TYPED] if weakened else ["", ""])
        assert "basic" not in client.get("/proxy/nobody/80/").headers.get("www-authenticate", "")


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
