"""Programs that call services: what works through a session's proxy, and what stands on the record."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from era.core.allowlist import can_be_egress
from era.core.capsules.format import ADDED, ADDED_TO_RUNS
from era.core.ports import Sandbox
from era.network.egress import SandboxNetwork
from tests.network import world
from tests.network.conftest import NEEDS_GVISOR, NO_GATE, Machine, NetServer, NewSession, new_session

URLLIB = """
import json, urllib.request
answer = json.load(urllib.request.urlopen({url!r}, timeout=10))
print(answer["hello"], answer["path"])
"""
FETCH = """
const answer = await (await fetch({url!r})).json();
console.log(answer.hello, answer.path);
"""
NODE_HTTP = """
const {{ default: client }} = await import({url!r}.startsWith('https') ? 'node:https' : 'node:http');
client.get({url!r}, (answer) => {{
  let text = '';
  answer.on('data', (piece) => text += piece);
  answer.on('end', () => {{ const told = JSON.parse(text); console.log(told.hello, told.path); }});
}});
"""
IN_GVISOR = pytest.param("urllib", "gvisor", marks=NEEDS_GVISOR)
CLIENTS = {"urllib": ("python", URLLIB), "fetch": ("node", FETCH), "node:http": ("node", NODE_HTTP)}


@pytest.fixture
def served(proxied: NetServer) -> NetServer:
    """All of these are about the proxy."""
    return proxied


@pytest.fixture(scope="module")
def as_a_user(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetServer]:
    """A server of an ordinary user's."""
    directory = tmp_path_factory.mktemp("user")
    server = machine.serve(directory / "data", weakness=f"exec({NO_GATE!r})", uid=54321, SSL_CERT_FILE="")
    yield server
    server.stop()


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_usual_clients_find_their_way(session: NewSession, machine: Machine, client: str, scheme: str) -> None:
    language, code = CLIENTS[client]
    one = session(language)
    one.client.put(f"/api/sessions/{one.id}/files/ca.pem", content=(machine.keys / "ca.pem").read_bytes())
    trust = {"SSL_CERT_FILE": "/workspace/ca.pem", "NODE_EXTRA_CA_CERTS": "/workspace/ca.pem"}
    url = f"{scheme}://www.example.test/hello?a=1&b=%20"
    for _ in range(2):
        said = one.says(code.format(url=url), env=trust if scheme == "https" else {})
        assert said == "www.example.test /hello?a=1&b=%20\n"
    found = one.destinations()
    assert [(each["host"], each["address"], each["allowed"]) for each in found] == [
        ("www.example.test", world.PUBLIC, True)
    ]
    assert found[0]["port"] == (443 if scheme == "https" else 80)
    assert found[0]["sent"] > 50
    assert found[0]["received"] > 100
    assert one.record()["enforced"]["network"] == "proxy"


@pytest.mark.parametrize(("client", "kind"), [*((one, "bubblewrap") for one in CLIENTS), IN_GVISOR])
def test_the_same_where_an_ordinary_user_serves(as_a_user: NetServer, client: str, kind: str) -> None:
    language, code = CLIENTS[client]
    with as_a_user.client() as http:
        one = new_session(http, language, isolation=kind)
        assert one.says(code.format(url="http://www.example.test/hello")) == "www.example.test /hello\n"
        assert one.record()["enforced"]["network"] == "proxy"
        assert one.run("import socket\nsocket.create_connection(('203.0.113.10', 80))")["status"] == "failed"


def test_a_wrong_certificate_is_told_to_the_program(session: NewSession) -> None:
    told = session().run(URLLIB.format(url="https://www.example.test/hello"))
    assert "CERTIFICATE_VERIFY_FAILED" in told["stderr"]


def test_a_client_that_leaves_tls_to_its_proxy_gets_it_from_there(session: NewSession) -> None:
    code = """
import http.client
proxy = http.client.HTTPConnection("127.0.0.1", 18128)
proxy.request("GET", "https://{host}/hello", headers={{"Host": "{host}"}})
answer = proxy.getresponse()
print(answer.status, answer.read().decode())
"""
    assert '"hello": "www.example.test"' in session().says(code.format(host="www.example.test"))
    said = session().says(code.format(host=world.OTHER))  # its certificate is for other names
    assert said.startswith("502 ")
    assert '"rule": "tls"' in said


def test_50_mib_in_and_out_stream_through(session: NewSession) -> None:
    code = """
import hashlib, http.client, os, resource
for path in ("/big?mb=50",):
    proxy = http.client.HTTPConnection("127.0.0.1", 18128)
    proxy.request("GET", "http://www.example.test" + path)
    answer, digest, size = proxy.getresponse(), hashlib.sha256(), 0
    while piece := answer.read(1 << 18):
        digest.update(piece); size += len(piece)
    print(size, digest.hexdigest())
def pieces():
    for _ in range(800):
        yield bytes(range(256)) * 256
for headers in ({"Content-Length": str(50 << 20)}, {}):
    proxy = http.client.HTTPConnection("127.0.0.1", 18128)
    proxy.request("POST", "http://www.example.test/upload", pieces(), headers, encode_chunked=not headers)
    print(proxy.getresponse().read().decode())
"""
    digest = hashlib.sha256(world.CHUNK * 800).hexdigest()
    one = session()
    told = one.says(code, timeout=60)
    assert told.splitlines()[0] == f"{50 << 20} {digest}"
    assert [line for line in told.splitlines()[1:] if f'"size": {50 << 20}, "sha256": "{digest}"' in line] == (
        told.splitlines()[1:]
    )
    (found,) = one.destinations()
    assert found["connections"] == 3
    assert found["received"] > 50 << 20
    assert found["sent"] > 100 << 20


def test_an_answer_comes_as_it_is_written(session: NewSession) -> None:
    code = """
import time, urllib.request
began, at = time.monotonic(), []
for line in urllib.request.urlopen("http://www.example.test/drip?seconds=0.5"):
    at.append(time.monotonic() - began)
print(len(at), at[0] < 0.3, at[-1] > 0.4)
"""
    assert session().says(code) == "10 True True\n"


def test_a_tunnel_takes_anything_and_ends_one_direction_at_a_time(session: NewSession) -> None:
    code = """
import socket
proxy = socket.create_connection(("127.0.0.1", 18128))
proxy.sendall(b"CONNECT www.example.test:9000 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n" + b"early")
answer = b""
while not answer.endswith(b"early"):
    answer += proxy.recv(1000)
print(answer.split(b"\\r\\n")[0].decode())
proxy.sendall(b"late")
proxy.shutdown(socket.SHUT_WR)
rest = b""
while piece := proxy.recv(1000):
    rest += piece
print(rest.decode())
"""
    assert session().says(code) == "HTTP/1.1 200 Connection established\nlate\n"


def test_headers_between_program_and_proxy_stay_there(session: NewSession) -> None:
    code = """
import http.client
proxy = http.client.HTTPConnection("127.0.0.1", 18128)
proxy.request("GET", "http://user:secret@www.example.test/hello", headers={
    "Host": "elsewhere.test", "Proxy-Authorization": "Basic eA==", "Proxy-Connection": "keep-alive",
    "Connection": "x-mine, close", "X-Mine": "1", "Keep-Alive": "5", "TE": "trailers", "Upgrade": "h2c", "X-Kept": "2",
})
print(proxy.getresponse().read().decode())
"""
    told = json.loads(session().says(code))["headers"]
    told.pop("Accept-Encoding", None)
    assert told == {"Host": "www.example.test", "X-Kept": "2", "Connection": "close"}


def test_variables_of_the_run_win(session: NewSession) -> None:
    code = "import os; print(os.environ['HTTP_PROXY'], os.environ['https_proxy'])"
    assert session().says(code, env={"HTTP_PROXY": "http://mine:1"}) == "http://mine:1 http://127.0.0.1:18128\n"
    node = "console.log(process.env.HTTP_PROXY, process.env.NODE_USE_ENV_PROXY)"
    one = session("node")
    assert one.says(node, env={"HTTP_PROXY": "http://mine:1"}) == "http://mine:1 1\n"
    assert one.says(node) == "http://127.0.0.1:18128 1\n"


def test_execute_has_the_internet_too_and_can_do_without(served: NetServer) -> None:
    body = {"language": "python", "code": URLLIB.format(url="http://www.example.test/hello")}
    with served.client() as client:
        assert client.post("/api/execute", json=body).json()["stdout"] == "www.example.test /hello\n"
        assert client.post("/api/execute", json={**body, "allowInternetAccess": False}).json()["exit_code"] == 1


def test_a_public_ipv6_address_is_reached(session: NewSession) -> None:
    one = session()
    assert one.says(URLLIB.format(url="http://v6.test/hello")) == "v6.test /hello\n"
    assert one.says(URLLIB.format(url=f"http://[{world.PUBLIC_V6}]/hello")) == f"[{world.PUBLIC_V6}] /hello\n"


def test_failures_say_what_failed(session: NewSession) -> None:
    code = """
import urllib.request
for url in ("http://no.such.test/", "http://www.example.test:81/"):
    try: urllib.request.urlopen(url)
    except urllib.error.HTTPError as error: print(error.code, error.read().decode(), end="")
"""
    one = session()
    first, second = one.says(code).splitlines()
    assert first.startswith("502 ")
    assert '"rule": "no_such_name"' in first
    assert second.startswith("502 ")
    assert "connection refused" in second
    assert [each["reason"] for each in one.destinations()] == ["no_such_name", "unreachable"]


def test_an_allowlist_names_what_may_be_reached(session: NewSession) -> None:
    one = session(egress={"allow": ["www.example.test", "*.Example.test.", "198.51.100.0/24"]})
    assert one.client.get(f"/api/sessions/{one.id}").json()["egress"]["allow"][0] == "www.example.test"
    code = """
import urllib.request
for host in ("www.example.test", "WWW.example.test.", "api.example.test", "example.test", "other.test",
             "203.0.113.10", "inside.test", "secret.leak.test"):
    try: print(host, urllib.request.urlopen(f"http://{host}/hello").status)
    except urllib.error.HTTPError as error: print(host, error.code)
"""
    said = dict(line.split() for line in one.says(code).splitlines())
    allowed = {"www.example.test", "WWW.example.test.", "api.example.test", "other.test"}
    assert {host for host, status in said.items() if status == "200"} == allowed
    reasons = {each["host"]: each["reason"] for each in one.destinations() if not each["allowed"]}
    assert reasons["example.test"] == reasons[world.PUBLIC] == "not_in_allowlist"

    one.change(egress={"allow": ["example.test"]})
    said = dict(line.split() for line in one.says(code).splitlines())
    assert {host for host, status in said.items() if status == "200"} == {"example.test"}
    queries = one.client  # what no entry can ever fit isn't even asked for
    one.change(egress={"allow": []})
    asked = one.says("import urllib.request; print(urllib.request.urlopen('http://example.test/queries').read())")
    assert asked.count(" secret.leak") == 2  # of the first list, which had addresses: A and AAAA
    assert queries is one.client


@pytest.mark.parametrize(
    "entry", ["", "*", "*.", "http://a.test", "a b", "a.test:80", "10.0.0.1/8", "10.1", "::g", "x" * 300]
)
def test_an_allowlist_with_nonsense_is_refused(served: NetServer, entry: str) -> None:
    with served.client() as client:
        answer = client.post("/api/sessions", json={"language": "python", "egress": {"allow": [entry]}})
        assert answer.status_code == 400
        assert "egress" in answer.json()["error"]


def test_the_record_is_bounded(session: NewSession) -> None:
    code = """
import urllib.request
for port in range(2000, 2110):
    try: urllib.request.urlopen(f"http://10.0.0.1:{port}/")
    except urllib.error.HTTPError: pass
"""
    one = session()
    one.says(code)
    told = one.record()["egress"]
    assert len(told["destinations"]) == 100
    assert told["more"] == 10


def test_private_ranges_that_a_setting_names_are_reached(odd: NetServer) -> None:
    code = """
import urllib.request
for host in ("10.77.0.2", "192.168.77.2", "inside.test", "10.77.0.1", "172.16.77.2"):
    try: print(host, urllib.request.urlopen(f"http://{host}/hello", timeout=5).status)
    except urllib.error.HTTPError as error: print(host, error.code)
"""
    with odd.client() as client:
        said = dict(line.split() for line in new_session(client).says(code).splitlines())
    assert said == {
        "10.77.0.2": "200",
        "192.168.77.2": "200",
        "inside.test": "200",
        "10.77.0.1": "403",  # the machine itself
        "172.16.77.2": "403",
    }


def test_a_sandbox_without_a_way_out_says_so() -> None:
    """None of ours is, but one may be."""
    network = SandboxNetwork()
    run_egress = network.run_egress(cast(Sandbox, SimpleNamespace(guest_listeners={})), internet=True, egress={})
    network.stop()
    assert run_egress.env == {}
    assert run_egress.enforced["network"] == "none"
    assert "no way out" in run_egress.enforced["network_reason"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_other_programs_go_by_the_environment(session: NewSession) -> None:
    code = """
import subprocess
for url in ("http://www.example.test/hello", "http://10.0.0.1/"):
    done = subprocess.run(["curl", "-s", "-w", " %{http_code}", url], capture_output=True, text=True)
    print(done.stdout.replace("\\n", " "))
"""
    first, second = session().says(code).splitlines()
    assert first.startswith('{"hello": "www.example.test"')
    assert first.endswith(" 200")
    assert second.startswith('{"error": ')
    assert second.endswith(" 403")


def test_what_was_stored_before_there_was_any_of_this_is_read() -> None:
    """Sessions and runs of older servers, and of older capsules, have no egress."""
    assert ADDED["egress"] == ADDED_TO_RUNS["egress"] == {}
    assert can_be_egress({})
    assert can_be_egress({"allow": ["a.test", "10.0.0.0/8"]})
    for wrong in (
        None,
        [],
        {"deny": []},
        {"allow": "a.test"},
        {"allow": [1]},
        {"allow": ["a b"]},
        {"allow": ["a"] * 999},
    ):
        assert not can_be_egress(wrong)
