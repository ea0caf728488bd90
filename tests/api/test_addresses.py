"""ERA_BASE_URL in programs: never what anybody's `Host` says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.requests import Request

from era.api.protocol import addresses
from era.settings import Settings
from tests.api.guest_servers import HTTP_SERVER
from tests.api.live import Terminal, output, start
from tests.api.stored_code import SEEN
from tests.api.websocket import WebSocket
from tests.conftest import MakeServer, eventually
from tests.gvisor import BOTH_KINDS
from tests.table import table

SERVED = ("192.168.7.5", 8787)


def request(host: str | None, *, served: tuple[str, int] = SERVED, scheme: str = "http") -> Request:
    headers = [] if host is None else [(b"host", host.encode("latin-1"))]
    return Request(
        {
            **{"type": "http", "headers": headers, "server": served, "scheme": scheme, "path": "/", "method": "GET"},
            "state": {},
        }
    )


def settings(**fields: Any) -> Settings:
    return Settings(api_key=SecretStr("k"), **{"host": "0.0.0.0", **fields})


@table(
    "host",
    ["localhost", "LOCALHOST:8787", "a.b.localhost:1", "127.0.0.1:8787", "127.9.9.9", "[::1]:8787", "192.168.7.5:8787"],
)
def test_addresses_of_this_machine_are_taken_over(host: str) -> None:
    assert addresses.base_url(request(host), settings()) == f"http://{host.lower()}"
    assert addresses.base_url(request(host, scheme="https"), settings()) == f"https://{host.lower()}"


@table(
    "host",
    [
        *(
            "evil.example",
            "evil.example:8787",
            "localhost.evil.example",
            "evillocalhost",
            "192.168.7.6:8787",
            "0.0.0.0",
        ),
        *("localhost@evil.example", "localhost:80@evil.example", "localhost:8787/evil", "localhost:x", "localhost:"),
        *("127.0.0.1.evil.example", "2130706433", "127.1", "0177.0.0.1", "[::]", "[::ffff:8.8.8.8]", "[::1", "::1"),
        *("localhost evil.example", "localhost,evil.example", "evil.example#.localhost", "ev\xefl.localhost", "", None),
    ],
)
def test_all_others_are_not(host: str | None) -> None:
    assert addresses.base_url(request(host), settings()) == "http://192.168.7.5:8787"
    served = ("::ffff:192.168.7.5", 8787)
    assert addresses.base_url(request(host, served=served), settings(host="::")) == "http://192.168.7.5:8787"
    assert addresses.base_url(request(host), settings(public_url="https://era.test/x/")) == "https://era.test/x"


def test_the_configured_name_is_one_of_ours() -> None:
    assert addresses.base_url(request("Era.test:8787"), settings(host="era.test")) == "http://era.test:8787"
    assert addresses.base_url(request("evil.example"), settings(host="era.test")) == "http://era.test:8787"
    assert addresses.base_url(request("evil.example", served=("::1", 1)), settings(host="::1")) == "http://[::1]:1"


def test_what_serves_many_is_told_nothing_of_a_request() -> None:
    for host in ("localhost:1", "127.0.0.2:8787", "evil.example", None):
        assert addresses.served_url(request(host, scheme="https"), settings()) == "http://192.168.7.5:8787"


CREDULOUS = """
from era.api.protocol import addresses
from era.api.routes import proxy
addresses._is_verified = lambda *_: True
proxy.served_url = addresses.base_url
"""
"""Believes every `Host`."""


SERVICE = HTTP_SERVER.replace(
    "def on_echo(self):",
    "def on_base(self):\n        self.reply(os.environ['ERA_PROXY_URL'].encode())\n\n    def on_echo(self):",
)


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("weakened", [False, True], ids=["sound", "weakened"])
def test_a_host_header_is_nobodys_base_url(own_server: MakeServer, weakened: bool, kind: str) -> None:
    """Neither of the owner's runs, nor of code that answers the public, nor of a service's later callers."""
    server = own_server(weakness=CREDULOUS if weakened else "", api_key="the-key")
    evil = {"Host": "evil.example"}
    with server.client(headers={"Authorization": "Bearer the-key"}) as owner, server.client() as anybody:
        ours = f"{server.url}/proxy/"
        for session in ("s", "service"):
            made = {"language": "python", "session_id": session, "isolation": kind}
            assert owner.post("/api/sessions", json=made).status_code == 201
        assert owner.put("/api/sessions/service/files/app.py", content=SERVICE.encode()).status_code == 200
        assert owner.patch("/api/sessions/service", json={"service": "exec python3 app.py"}).status_code == 200
        assert owner.put("/api/sessions/s/code", json={"code": SEEN}).status_code == 200
        code = {"code": "import os; print(os.environ['ERA_PROXY_URL'])"}
        told = {
            "run": owner.post("/api/sessions/s/run", json=code, headers=evil).json()["stdout"].strip(),
            "public": anybody.get("/proxy/s/80/", headers=evil).json()["ERA_PROXY_URL"],
            "service": anybody.get("/proxy/service/3000/base", headers=evil).text,
            "later": anybody.get("/proxy/service/3000/base").text,
        }
        theirs = "http://evil.example/proxy/"
        base = theirs if weakened else ours
        many = theirs if weakened else f"{server.own_url}/proxy/"  # the home's, as nothing is known of later callers
        assert told == {"run": f"{base}s", "public": f"{base}s", "service": f"{many}service", "later": f"{many}service"}
        assert (
            owner.get("/api/sessions/s/host?port=1", headers={"Host": "era.lan"}).json()["base_url"] == "http://era.lan"
        )
        # Names of this machine still come through.
        port = server.url.rpartition(":")[2]
        seen = owner.post("/api/sessions/s/run", json=code, headers={"Host": f"era.localhost:{port}"}).json()
        assert seen["stdout"] == f"http://era.localhost:{port}/proxy/s\n"


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("weakened", [False, True], ids=["sound", "weakened"])
def test_nor_that_of_what_is_live_or_of_deliveries(own_server: MakeServer, weakened: bool, kind: str) -> None:
    """Neither of processes, terminals and interpreters, which stay, nor of a delivery, which is run later."""
    server = own_server(weakness=CREDULOUS if weakened else "", api_key="the-key")
    key, evil, names_it = "Bearer the-key", {"Host": "evil.example"}, re.compile("ERA_PROXY_URL=(http[^\\s\0]+)")
    with (
        server.client(headers={"Authorization": key}) as owner,
        server.client(headers={"Authorization": key, **evil}) as misled,
        server.client(headers=evil) as anybody,
    ):
        made = {"language": "python", "session_id": "s", "isolation": kind}
        assert owner.post("/api/sessions", json=made).status_code == 201
        assert owner.put("/api/sessions/s/code", json={"code": "import os; print(dict(os.environ))"}).is_success
        assert owner.put("/api/sessions/s/inbox", json={}).is_success
        assert anybody.post("/proxy/s/inbox", content=b"x").status_code == 202

        def deliveries() -> list[dict[str, Any]]:
            listed: list[dict[str, Any]] = owner.get("/api/sessions/s/inbox/deliveries").json()["deliveries"]
            return listed

        assert eventually(lambda: deliveries()[0]["status"] == "done"), deliveries()
        run = owner.get(f"/api/sessions/s/runs/{deliveries()[0]['run_ids'][0]}/stdout").text
        told = {"delivery": run.partition("'ERA_PROXY_URL': '")[2].partition("'")[0]}

        def found(printed: str) -> str:
            return match[1] if (match := names_it.search(printed)) else printed

        told["process"] = found(output(owner, "s", start(misled, "s", "env")).decode())
        socket = WebSocket(server, "/api/sessions/s/terminal", f"Authorization: {key}", host="evil.example")
        shell = Terminal(socket)
        shell.send("env; exit\n")
        shell.until_closed()
        socket.close()
        told["terminal"] = found(shell.shown.decode())
        given = {"code": "import os; print(f\"ERA_PROXY_URL={os.environ['ERA_PROXY_URL']}\")", "context": "main"}
        told["cell"] = found(misled.post("/api/sessions/s/run", json=given).json()["stdout"])
        assert misled.post("/api/sessions/s/contexts/main/restart").is_success
        began = {"code": "print(open('/proc/self/environ').read())", "context": "main"}
        told["interpreter"] = found(owner.post("/api/sessions/s/run", json=began).json()["stdout"])
        assert set(told.values()) == {f"{'http://evil.example' if weakened else server.url}/proxy/s"}, told
