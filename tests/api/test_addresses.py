"""ERA_BASE_URL in programs: never what anybody's `Host` says."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr
from starlette.requests import Request

from era.api import addresses
from era.settings import Settings
from tests.api.guest_servers import HTTP_SERVER
from tests.api.stored_code import SEEN
from tests.conftest import MakeServer
from tests.gvisor import BOTH_KINDS

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


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8787", "a.b.localhost:1", "127.0.0.1:8787", "127.9.9.9", "[::1]:8787", "192.168.7.5:8787"],
)
def test_addresses_of_this_machine_are_taken_over(host: str) -> None:
    assert addresses.base_url(request(host), settings()) == f"http://{host.lower()}"
    assert addresses.base_url(request(host, scheme="https"), settings()) == f"https://{host.lower()}"


@pytest.mark.parametrize(
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
from era.api import addresses, proxy
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
