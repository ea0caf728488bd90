"""Programs that use secrets which they never see, in sandboxes, towards hosts that say back what they were sent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gvisor import BOTH_KINDS
from tests.network import world
from tests.network.conftest import Machine, NetServer, NewSession, new_session

VALUE = "canary-8161943"
SECRETS = {"TOKEN": {"value": VALUE, "hosts": ["api.example.test"], "plain_http": True}}
URLS = ["https://api.example.test", "http://api.example.test", "http://www.example.test"]
SAID = f"{URLS[0]} value\n{URLS[1]} value\n{URLS[2]} placeholder\n"

PYTHON = f"""
import json, os, urllib.request
token = os.environ["TOKEN"]
for url in {URLS}:
    asked = urllib.request.Request(url + "/hello", headers={{"X-Token": token}})
    told = json.load(urllib.request.urlopen(asked, timeout=10))
    assert told["headers"]["X-Token"] == token
    print(url, "value" if told["length"] == {len(VALUE)} else "placeholder" if told["length"] == len(token) else told)
"""
NODE = f"""
const token = process.env.TOKEN;
for (const url of {URLS}) {{
  const answer = await fetch(url + '/hello', {{ headers: {{ 'X-Token': token }} }});
  const {{ headers, length }} = await answer.json();
  if ((headers['X-Token'] ?? headers['x-token']) !== token) console.log(headers);
  console.log(url, length === {len(VALUE)} ? 'value' : length === token.length ? 'placeholder' : length);
}}
"""
CLIENTS = {"python": PYTHON, "node": NODE, "deno": NODE.replace("process.env.TOKEN", "Deno.env.get('TOKEN')")}


@pytest.fixture(scope="module")
def as_a_user(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetServer]:
    """A server of an ordinary user's, who finds the certificates it trusts in its own directory."""
    data_dir = tmp_path_factory.mktemp("user") / "data"
    data_dir.mkdir()
    shutil.copy(machine.keys / "ca.pem", data_dir)
    server = machine.serve(data_dir, uid=54323, SSL_CERT_FILE="/mnt/data/ca.pem")
    yield server
    server.stop()


WHERE = [
    *(("served", "bubblewrap", language) for language in CLIENTS),
    ("as_a_user", "bubblewrap", "python"),
    pytest.param("as_a_user", "bubblewrap", "node", marks=pytest.mark.soak),
    *([("served", "gvisor", "python")] if shutil.which("runsc") else []),
]


@pytest.mark.parametrize(("server", "kind", "language"), WHERE)
def test_values_go_to_their_hosts_only(request: pytest.FixtureRequest, server: str, kind: str, language: str) -> None:
    with request.getfixturevalue(server).client() as http:
        one = new_session(http, language, isolation=kind)
        assert one.says(CLIENTS[language], secrets=SECRETS, timeout=60) == SAID
        found = {(each["host"], each["port"]): each["secrets"] for each in one.destinations()}
        assert found == {
            ("api.example.test", 443): ["TOKEN"],
            ("api.example.test", 80): ["TOKEN"],
            ("www.example.test", 80): [],
        }
        http.delete(f"/api/sessions/{one.id}")


def test_a_websocket(session: NewSession) -> None:
    code = """
const socket = new WebSocket('wss://api.example.test/socket');
socket.onopen = () => socket.send(process.env.TOKEN);
socket.onmessage = ({ data }) => { console.log(data === process.env.TOKEN); socket.close(); };
socket.onerror = ({ error }) => console.log(error);
"""
    one = session("node")
    assert one.says(code, secrets=SECRETS) == "true\n"


RAW = (
    f"""
VALUE = {"x" * len(VALUE)!r}
"""
    + """
import os, socket, ssl
token = os.environ["TOKEN"]
def ask(address, port, host, name=None, line="GET /hello"):
    sock = socket.create_connection((address, port), 10)
    if name:
        sock = ssl.create_default_context().wrap_socket(sock, server_hostname=name)
    sock.sendall(f"{line} HTTP/1.1\\r\\nHost: {host}\\r\\nX-Token: {token}\\r\\nConnection: close\\r\\n\\r\\n".encode())
    answer = b"".join(iter(lambda: sock.recv(9999), b"")).decode()
    told = {f'"length": {len(VALUE)}' in answer: "value", f'"length": {len(token)}' in answer: "placeholder"}
    print(answer.split()[1], "leak" if "canary" in answer else told.get(True, answer[-8:]))
"""
)


def test_an_address_counts_only_as_the_answer_for_a_name(session: NewSession) -> None:
    code = f"""
ask("{world.PUBLIC}", 80, "api.example.test")  # nobody has said yet who that is
socket.getaddrinfo("www.example.test", 80)
ask("{world.PUBLIC}", 80, "api.example.test")
socket.getaddrinfo("api.example.test", 80)
ask("{world.PUBLIC}", 80, "api.example.test")
ask("{world.PUBLIC}", 80, "www.example.test")
socket.getaddrinfo("other.test", 80)
ask("{world.OTHER}", 80, "api.example.test")  # this is not its address
"""
    one = session()
    outcome = ["placeholder", "placeholder", "value", "placeholder", "placeholder"]
    assert one.says(RAW + code, secrets=SECRETS) == "".join(f"200 {each}\n" for each in outcome)
    assert {(each["host"], each["address"]): each["secrets"] for each in one.destinations()} == {
        (world.PUBLIC, world.PUBLIC): [],
        ("www.example.test", world.PUBLIC): [],
        ("api.example.test", world.PUBLIC): ["TOKEN"],
        ("other.test", world.OTHER): [],
    }


def test_a_certificate_counts_whatever_the_address(session: NewSession) -> None:
    code = f"""
ask("{world.PUBLIC}", 443, "api.example.test", "api.example.test")  # without having asked for the name
ask("{world.PUBLIC}", 443, "www.example.test", "api.example.test")
ask("{world.PUBLIC}", 8443, "api.example.test", "api.example.test")  # an impostor
"""
    one = session()
    assert one.says(RAW + code, secrets=SECRETS) == '200 value\n200 placeholder\n502  "tls"}\n\n'
    assert [(each["host"], each["port"], each["reason"], each["secrets"]) for each in one.destinations()] == [
        ("api.example.test", 443, None, ["TOKEN"]),
        ("api.example.test", 8443, "tls", []),
    ]


REPEATED = """
import http.client, os, ssl
token, told = os.environ["TOKEN"], ""
def ask(method, path, body=None):
    connection = http.client.HTTPSConnection("api.example.test", timeout=60)
    connection.request(method, path, body, {"X-Token": token, "Content-Type": "application/json"})
    answer = connection.getresponse()
    said = f"{answer.headers}{answer.read().decode()}"
    shown = "value" if "canary" in said else "placeholder" if token in said else "nothing"
    print(answer.status, shown)
ask("GET", "/redirect-token")
ask("GET", "/no-such-page")
ask("GET", "/hello")
ask("POST", "/posts", '{"key": "%s"}' % token)
ask("TRACE", "/")
connection = http.client.HTTPSConnection("api.example.test", timeout=60)
connection.request("GET", "/hello?key=" + token)
print("target", "canary" in connection.getresponse().read().decode())
connection = http.client.HTTPConnection("api.example.test", timeout=60)
connection.request("GET", "/hello", headers={"X-Token": token})
print("plain", f'"length": {len(token)}' not in connection.getresponse().read().decode())
"""

LEAKY = """
import h11
from era.core.secrets import PLACEHOLDER
from era.network import exchange, interception, redaction
interception.Redaction = lambda secrets: redaction.Redaction([])
exchange._ECHOING = ()
right = interception.Interception.secrets_for
interception.Interception.secrets_for = lambda self, host, *, tls: right(self, host, tls=True)
exchange._rewritten = lambda request, headers: h11.Request(
    method=request.method, target=PLACEHOLDER.sub(b"canary", request.target), headers=headers
)
"""
"""Leaves answers as they are, and sends values in targets, with TRACE and over plain HTTP."""


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_a_host_that_repeats_a_value_tells_the_program_nothing(
    machine: Machine, session: NewSession, tmp_path: Path, kind: str
) -> None:
    secrets = {"TOKEN": {"value": VALUE, "hosts": ["api.example.test"]}}
    placeholders = "302 placeholder\n404 placeholder\n200 placeholder\n201 placeholder\n"
    sound = f"{placeholders}405 nothing\ntarget False\nplain False\n"
    assert session(isolation=kind).says(REPEATED, secrets=secrets) == sound
    weak = machine.serve(tmp_path / "data", weakness=LEAKY)
    with weak.client() as http:
        told = new_session(http, isolation=kind).says(REPEATED, secrets=secrets)
        assert told == f"{placeholders}200 placeholder\ntarget True\nplain True\n".replace("placeholder", "value")


# -- nothing of a value is anywhere -----------------------------------------------------------------------------

UNSEEN = "canary-4078213"
LOOK = """
import os, re, urllib.request
asked = urllib.request.Request("https://api.example.test/users/mina", headers={"X-Token": os.environ["TOKEN"]})
print(urllib.request.urlopen(asked, timeout=10).status)
pattern, found = re.compile(rb"canary-[0-9]{7}"), set()
def look(path, at=0, size=1 << 26):
    try:
        with open(path, "rb", 0) as file:
            file.seek(at)
            if pattern.search(file.read(size)):
                found.add(path)
    except (OSError, OverflowError, ValueError):
        pass
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline"):
        look(f"/proc/{pid}/{name}")
    try:
        maps = open(f"/proc/{pid}/maps").read().split("\\n")[:-1]
    except OSError:
        continue
    for line in maps:
        start, end = (int(one, 16) for one in line.split()[0].split("-"))
        look(f"/proc/{pid}/mem", start, min(end - start, 1 << 26))
for top in ("/workspace", "/tmp", "/dev/shm", "/etc"):
    for directory, _, names in os.walk(top):
        for name in names:
            look(os.path.join(directory, name))
print("found" if found else "nothing")
"""
LATER = """
import os, socket, ssl
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
sock = context.wrap_socket(socket.create_connection(("api.example.test", 443), 10), server_hostname="api.example.test")
print("for runs with secrets" in sock.getpeercert(True).decode("latin-1"), "/etc/era" in str(dict(os.environ)))
"""

TALKATIVE = """
import sys
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from era.api.routing import context
from era.core.execution import execution
from era.network import authority, interception
from era.network import egress
execution.placeholders = lambda found: {one.name: one.value for one in found}
right_secret = context.secret
def secret(name, value, *rest, **how):
    print("took", value, file=sys.stderr, flush=True)
    return right_secret(name, value, *rest, **how)
context.secret = secret
class Swap(interception.Swap):
    def __init__(self, secrets):
        super().__init__(secrets)
        self.used |= {one.value for one in secrets}
interception.Swap = Swap
right_write = authority.Authority.write
def write(self, path):
    right_write(self, path)
    key = self._issuer._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.with_suffix(".key").write_bytes(key)
authority.Authority.write = write
right_run_egress, kept = egress.SandboxNetwork.run_egress, []
def run_egress(self, sandbox, *, secrets=(), **rest):
    kept.extend(secrets)
    return right_run_egress(self, sandbox, secrets=kept, **rest)
egress.SandboxNetwork.run_egress = run_egress
"""
"""Gives programs the values, logs and records them, keeps the authority's key, and remembers secrets for later runs."""


@pytest.mark.parametrize("talkative", [False, True])
def test_nothing_of_it_is_anywhere(served: NetServer, machine: Machine, tmp_path: Path, talkative: bool) -> None:
    server = served
    if talkative:
        server = machine.serve(tmp_path / "data", weakness=TALKATIVE)
    with server.client() as http:
        one = new_session(http)
        outcome = one.run(LOOK, secrets={"TOKEN": {"value": UNSEEN, "hosts": ["api.example.test"]}}, timeout=120)
        assert outcome["stdout"].startswith("200\n"), outcome
        answers = [str(outcome), str(one.record()), http.get(f"/api/sessions/{one.id}?include=files").text]
        intercepted, trusted = one.says(LATER).split()
        capsule = http.get(f"/api/sessions/{one.id}/capsule").content
    kept = {path: path.read_bytes() for path in server.data_dir.rglob("*") if path.is_file()}
    found = {
        "sandbox": outcome["stdout"] == "200\nfound\n",
        "answers": any(UNSEEN in answer for answer in answers) or UNSEEN.encode() in capsule,
        "log": UNSEEN in server.log,
        "disk": any(UNSEEN.encode() in content for content in kept.values()),
        "key": any(b"PRIVATE KEY" in content for content in kept.values()),
        "intercepted": intercepted == "True",
        "trusted": trusted == "True",
    }
    assert found == dict.fromkeys(found, talkative)
    assert any(path.name == "certificates.pem" for path in kept)
