"""Programs that call services over HTTP: what works with usual clients, and what stands on the record. And webhooks
that arrive, by the same policy."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from era.core.allowlist import can_be_egress
from era.core.concurrency.shares import Shares
from era.core.models import now
from era.core.ports import Sandbox
from era.core.signatures import Verify, is_genuine
from era.network.authority import TRUSTED
from era.network.egress import SandboxNetwork
from era.network.policy import Policy
from tests.conftest import eventually
from tests.network import world
from tests.network.conftest import Machine, NetServer, NewSession, new_session
from tests.soaking import soak_the_rest

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
CLIENTS = {"urllib": ("python", URLLIB), "fetch": ("node", FETCH), "node:http": ("node", NODE_HTTP)}


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
    assert one.record()["enforced"]["network"] == "full"


def test_a_wrong_certificate_is_told_to_the_program(session: NewSession) -> None:
    outcome = session().run(URLLIB.format(url="https://www.example.test/hello"))
    assert "CERTIFICATE_VERIFY_FAILED" in outcome["stderr"]


def test_an_answer_comes_as_it_is_written(session: NewSession) -> None:
    code = """
import http.client, time
connection = http.client.HTTPConnection("www.example.test")
connection.connect()
began, at = time.monotonic(), []
connection.request("GET", "/drip?seconds=3")
for line in connection.getresponse():
    at.append(time.monotonic() - began)
print(len(at), at[0] < at[-1] / 2, at[-1] > 2.4)
"""
    assert session().says(code) == "60 True True\n"


@pytest.mark.skipif(not os.path.exists(TRUSTED), reason="this machine keeps its certificates elsewhere")
def test_variables_of_the_run_win(session: NewSession) -> None:
    code = "import os; print(os.environ['SSL_CERT_FILE'], os.environ['REQUESTS_CA_BUNDLE'])"
    assert session().says(code, env={"SSL_CERT_FILE": "/mine"}) == f"/mine {TRUSTED}\n"
    node = "console.log(process.env.NODE_EXTRA_CA_CERTS, process.env.SSL_CERT_FILE)"
    one = session("node")
    assert one.says(node, env={"NODE_EXTRA_CA_CERTS": "/mine"}) == f"/mine {TRUSTED}\n"
    assert one.says(node) == f"{TRUSTED} {TRUSTED}\n"


def test_execute_has_the_internet_too_and_can_do_without(served: NetServer) -> None:
    body = {"language": "python", "code": URLLIB.format(url="http://www.example.test/hello")}
    with served.client() as client:
        assert client.post("/api/execute", json=body).json()["stdout"] == "www.example.test /hello\n"
        assert client.post("/api/execute", json={**body, "allowInternetAccess": False}).json()["exit_code"] == 1


def test_a_public_ipv6_address_is_reached(session: NewSession) -> None:
    one = session()
    assert one.says(URLLIB.format(url="http://v6.test/hello")) == "v6.test /hello\n"
    assert one.says(URLLIB.format(url=f"http://[{world.PUBLIC_V6}]/hello")) == f"[{world.PUBLIC_V6}] /hello\n"


def test_an_allowlist_names_what_may_be_reached(session: NewSession) -> None:
    one = session(egress={"allow": ["www.example.test", "*.Example.test.", "198.51.100.0/24"]})
    assert one.client.get(f"/api/sessions/{one.id}").json()["egress"]["allow"][0] == "www.example.test"
    code = """
import urllib.request
for host in ("203.0.113.10", "example.test", "www.example.test", "WWW.example.test.", "api.example.test",
             "other.test", "inside.test", "secret.leak.test"):
    try: print(host, urllib.request.urlopen(f"http://{host}/hello").status)
    except urllib.error.URLError as error: print(host, type(error.reason).__name__)
"""
    said = dict(line.split() for line in one.says(code).splitlines())
    allowed = {"www.example.test", "WWW.example.test.", "api.example.test", "other.test"}
    assert {host for host, status in said.items() if status == "200"} == allowed
    reasons = {each["host"]: each["reason"] for each in one.destinations() if not each["allowed"]}
    assert reasons["example.test"] == reasons[world.PUBLIC] == "not_in_allowlist"
    assert said["example.test"] == said["inside.test"] == "PermissionError"
    assert said["secret.leak.test"] == "gaierror"

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
    except OSError: pass
"""
    one = session()
    one.says(code)
    outcome = one.record()["egress"]
    assert len(outcome["destinations"]) == 100
    assert outcome["more"] == 10


def test_private_ranges_that_a_setting_names_are_reached(odd: NetServer) -> None:
    code = """
import urllib.request
for host in ("10.77.0.2", "192.168.77.2", "inside.test", "10.77.0.1", "172.16.77.2"):
    try: print(host, urllib.request.urlopen(f"http://{host}/hello", timeout=5).status)
    except urllib.error.URLError as error: print(host, type(error.reason).__name__)
"""
    with odd.client() as client:
        said = dict(line.split() for line in new_session(client).says(code).splitlines())
    assert said == {
        "10.77.0.2": "200",
        "192.168.77.2": "200",
        "inside.test": "200",
        "10.77.0.1": "PermissionError",  # the machine itself
        "172.16.77.2": "PermissionError",
    }


def test_a_sandbox_without_a_way_out_says_so() -> None:
    """None of ours is, but one may be."""
    network = SandboxNetwork(Shares(1000), Policy())
    sandbox = cast(Sandbox, SimpleNamespace(id="sb", guest_listeners={}, broker=None))
    egress = network.run_egress(sandbox, owner="me", internet=True, egress={})
    network.stop()
    assert egress.certificates == {}
    assert egress.enforced["network"] == "none"
    assert "no way out" in egress.enforced["network_reason"]


UNABLE = {
    "pidfd_getfd": "from era.network import seccomp_notify; seccomp_notify._PIDFD_GETFD = 9999",
    "CAP_NET_ADMIN": "from era.network import loopback; loopback._SIOCSIFADDR = 0x89ff",
    "process_vm_readv": "from era.network import seccomp_notify; "
    "seccomp_notify._libc.process_vm_readv = lambda *_: (seccomp_notify.ctypes.set_errno(1), -1)[1]",
}


@pytest.mark.parametrize("missing", soak_the_rest(UNABLE, 1))
def test_a_machine_where_connections_cannot_be_supervised_gives_none_and_says_why(
    machine: Machine, tmp_path: Path, missing: str
) -> None:
    """Less network than asked for is reported, not refused."""
    server = machine.serve(tmp_path / "data", weakness=UNABLE[missing])
    with server.client() as client:
        for language, code in CLIENTS.values():
            one = new_session(client, language)
            assert one.run(code.format(url="http://www.example.test/hello"))["status"] == "failed"
            enforced = one.record()["enforced"]
            assert enforced["network"] == "none"
            assert missing in enforced["network_reason"]
        isolation = client.get("/health").json()["isolation"]
        assert missing in isolation["network_reason"]
        assert "no internet access" in isolation["summary"]
    server.stop()


def test_what_was_stored_before_there_was_any_of_this_is_read() -> None:
    """Sessions and runs of older servers have no egress."""
    assert can_be_egress({})
    assert can_be_egress({"allow": ["a.test", "10.0.0.0/8"]})
    wrongs: list[Any] = [
        None,
        [],
        {"deny": []},
        {"allow": "a.test"},
        {"allow": [1]},
        {"allow": ["a b"]},
        {"allow": ["a"] * 999},
    ]
    for wrong in wrongs:
        assert not can_be_egress(wrong)


def came_to(name: str) -> list[dict[str, Any]]:
    """What has come to a webhook of this name in the world."""
    found: list[dict[str, Any]] = httpx.get(f"http://{world.PUBLIC}/hooks/{name}", trust_env=False, verify=False).json()
    return found


def received(name: str, count: int) -> list[dict[str, Any]]:
    """What came to a webhook of this name in the world, once so much did."""
    assert eventually(lambda: len(came_to(name)) >= count)
    found = came_to(name)
    assert len(found) == count, found
    return found


def is_signed(notice: dict[str, Any], secret: str) -> bool:
    """Whether a notice that came is signed with this secret, as an inbox judges it."""
    headers = [(name.lower().encode(), value.encode()) for name, value in notice["headers"].items()]
    return is_genuine(Verify("stripe", secret, "x-era-signature"), headers, notice["body"].encode(), now() / 1e6)


def test_a_notice_arrives_by_tls_and_by_http(served: NetServer, session: NewSession) -> None:
    """One end to the other: a real name, a real certificate, a real run, a receiver that is busy at first."""
    with served.client() as client:

        def webhook(url: str, *events: str) -> dict[str, Any]:
            made = client.post("/api/webhooks", json={"url": url, "events": list(events)})
            assert made.status_code == 201, made.text
            body: dict[str, Any] = made.json()
            return body

        by_tls = webhook("https://www.example.test/hooks/all", "session.created", "run.ended")
        late = webhook("http://other.test/hooks/late", "session.created")
        unsigned = webhook("https://www.example.test:8443/hooks/never", "session.created")
        rebinding = webhook("http://hooks.rebind.test/hooks/never", "session.created")
        inside = client.post("/api/webhooks", json={"url": "http://inside.test/hooks/all"})
        assert (inside.status_code, inside.json()["code"]) == (400, "webhook_refused")
        assert "private" in inside.json()["error"]
        try:
            one = session()
            assert one.says("print(1)") == "1\n"
            created, ended = received("all", 2)
            assert json.loads(created["body"])["data"]["session_id"] == one.id
            told = json.loads(ended["body"])
            assert (told["event"], told["data"]["run_id"]) == ("run.ended", one.record()["run_id"])
            assert ended["headers"]["Host"] == "www.example.test"
            assert is_signed(created, by_tls["secret"])
            assert is_signed(ended, by_tls["secret"])
            assert not is_signed(ended, late["secret"])
            # The same notice comes again when it was not taken, and when somebody asks for it.
            first, again = received("late", 2)
            assert first["body"] == again["body"]
            path = f"/api/webhooks/{by_tls['id']}/deliveries"
            assert eventually(lambda: client.get(path).json()["deliveries"][0]["status"] == "done")
            delivery = client.get(path).json()["deliveries"][0]
            assert (delivery["id"], delivery["http_status"], delivery["tries"]) == (told["id"], 200, 1)
            replayed = client.post(f"{path}/{delivery['id']}/replay")
            assert (replayed.status_code, replayed.json()["status"]) == (202, "pending")
            assert received("all", 3)[2]["body"] == ended["body"]

            # What none may be told, and why.
            def reason(webhook: dict[str, Any]) -> Any:
                [notice] = client.get(f"/api/webhooks/{webhook['id']}/deliveries").json()["deliveries"]
                return notice["reason"]

            for refused, why in ((unsigned, "TLS failed"), (rebinding, "loopback")):
                assert why in eventually(partial(reason, refused))
            assert came_to("never") == []
        finally:
            for made in (by_tls, late, unsigned, rebinding):
                client.delete(f"/api/webhooks/{made['id']}")
