"""Programs that open connections to where they may not. Each attack is also made on a server without the wall."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import eventually
from tests.gvisor import BOTH_KINDS
from tests.network import world
from tests.network.conftest import Machine, NetServer, NewSession, Session, new_session

BLIND = "from era.network.policy import Policy; Policy.refuses = lambda self, address: None"
"""Judges no address."""

LATE = """
from era.network import seccomp_notify, run_connections
last = []
right_targets, right_connect = seccomp_notify.targets, run_connections.connect
def targets(notification):
    last[:] = [notification]
    return right_targets(notification)
async def connect(address, port):
    return await right_connect(*right_targets(last[0])[0])
seccomp_notify.targets, run_connections.connect = targets, connect
"""
"""Judges the address that a program gives, then connects to the one that is there a moment later."""

SIEVE = """
from era.network import dns
dns.Allowlist.has_name = lambda self, name: True
"""
"""Asks for any name, whatever may be reached."""

FORWARDING = """
from era.network import dns
dns._problem, dns._rebuilt = lambda query, end: None, lambda query, end: query
"""
"""Passes on what programs send to the nameserver."""

CARELESS = """
from era.network.egress import SandboxNetwork
kept = SandboxNetwork.run_egress
SandboxNetwork.run_egress = lambda self, sandbox, *, internet, **rest: kept(self, sandbox, internet=True, **rest)
"""
"""Doesn't know of a session without internet."""


@pytest.fixture(scope="module")
def canary(machine: Machine) -> Iterator[int]:
    """A port on all of the machine's own addresses where a secret is told, over TCP and UDP."""
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    port = int(listener.getsockname()[1])

    def tell() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                client.sendall(b"canary")

    def tell_datagrams(sock: socket.socket) -> None:
        while True:
            _, who = sock.recvfrom(100)
            sock.sendto(b"canary", who)

    threading.Thread(target=tell, daemon=True).start()
    for address in ("127.0.0.1", "127.7.7.7", world.OWN, world.OWN_PRIVATE, "::1", world.OWN_V6):
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, port))
        threading.Thread(target=tell_datagrams, args=(sock,), daemon=True).start()
    yield port
    listener.close()


@pytest.fixture(scope="module")
def blind(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetServer]:
    server = machine.serve(tmp_path_factory.mktemp("blind") / "data", weakness=BLIND)
    yield server
    server.stop()


def attack(session: Session, code: str) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads(session.says(code, timeout=60))
    return outcome


EVERY_WAY = """
import concurrent.futures, ctypes, json, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
def tcp(family, place):
    sock = socket.socket(family); sock.settimeout(2); sock.connect(place); return sock.recv(100).decode()
def tcp_in_c(family, place):
    sock = socket.socket(family)
    if family == socket.AF_INET:
        packed = struct.pack("=H", family) + struct.pack("!H", place[1]) + socket.inet_aton(place[0]) + bytes(8)
    else:
        packed = struct.pack("=H", family) + struct.pack("!HI", place[1], 0) + socket.inet_pton(family, place[0])
        packed += bytes(4)
    if libc.connect(sock.fileno(), packed, len(packed)) < 0:
        raise OSError(ctypes.get_errno(), "connect")
    sock.settimeout(2)
    return sock.recv(100).decode()
def sendto(family, place):
    sock = socket.socket(family, socket.SOCK_DGRAM); sock.settimeout(2); sock.sendto(b"x", place)
    return sock.recv(100).decode()
def sendmsg(family, place):
    sock = socket.socket(family, socket.SOCK_DGRAM); sock.settimeout(2); sock.sendmsg([b"x"], [], 0, place)
    return sock.recv(100).decode()
def sendmsg_unasked(family, place):
    sock = socket.socket(family, socket.SOCK_DGRAM); sock.settimeout(2)
    sock.sendmsg([b"x"], [], socket.MSG_NOSIGNAL, place)
    return sock.recv(100).decode()
def fast_open(family, place):
    sock = socket.socket(family); sock.settimeout(2); sock.sendto(b"x", socket.MSG_FASTOPEN, place)
    return sock.recv(100).decode()
def udp(family, place):
    sock = socket.socket(family, socket.SOCK_DGRAM); sock.settimeout(2); sock.connect(place); sock.send(b"x")
    return sock.recv(100).decode()
def tried(way, place):
    family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    try: return way(family, tuple(place))
    except OSError: return "refused"
ways = tcp, tcp_in_c, sendto, sendmsg, sendmsg_unasked, fast_open, udp
with concurrent.futures.ThreadPoolExecutor(40) as threads:  # to try in vain is slow
    found = {{(way, place): threads.submit(tried, way, place) for place in map(tuple, {places!r}) for way in ways}}
print(json.dumps({{f"{{way.__name__}} {{place[0]}}": said.result() for (way, place), said in found.items()}}))
"""
OWN = [world.OWN, world.OWN_PRIVATE, world.OWN_V6, f"::ffff:{world.OWN}", f"64:ff9b::{world.OWN_PRIVATE}"]
LOOPBACK = ["127.0.0.1", "127.7.7.7", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::127.0.0.1"]
# What the weakened server reaches. The sandbox's own loopback isn't the machine's to anybody.
REACHED = {
    *(f"{way} {host}" for way in ("tcp", "tcp_in_c", "sendto", "sendmsg", "udp") for host in OWN[:3]),
    f"tcp {OWN[3]}",
}


def test_the_machine_itself_is_out_of_reach_in_every_way(
    anywhere: NewSession, kind: str, blind: NetServer, canary: int
) -> None:
    code = EVERY_WAY.format(places=[(host, canary) for host in OWN + LOOPBACK])
    one = anywhere()
    found = attack(one, code)
    assert {way: said for way, said in found.items() if said != "refused"} == {}
    assert all(not each["allowed"] for each in one.destinations())
    assert {each["reason"] for each in one.destinations()} >= {"own_address", "private"}
    reached = set[str]()
    with blind.client() as client:
        for _ in range(5):  # a busy machine is late for one way or the other
            if not reached >= REACHED:
                tried = attack(new_session(client, isolation=kind), code)
                reached |= {way for way, said in tried.items() if said == "canary"}
    assert reached >= REACHED


def test_private_networks_are_out_of_reach(anywhere: NewSession, kind: str, blind: NetServer) -> None:
    code = """
import json, socket
found = {{}}
for host in {hosts!r}:
    try: found[host] = "reached" if socket.create_connection((host, 80), 3) else ""
    except OSError as error: found[host] = error.strerror
print(json.dumps(found))
"""
    hosts = [*world.PRIVATE, *world.PRIVATE_V6, "inside.test", "meta.test", "::ffff:10.77.0.2"]
    code = code.format(hosts=hosts)
    one = anywhere()
    assert attack(one, code) == dict.fromkeys(hosts, "Permission denied")
    assert {each["allowed"] for each in one.destinations()} == {False}
    assert "inside.test" in {each["host"] for each in one.destinations()}
    with blind.client() as client:
        assert attack(new_session(client, isolation=kind), code) == dict.fromkeys(hosts, "reached")


FLIP = """
import ctypes, socket, struct, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def packed(host, port): return struct.pack("=H", 2) + struct.pack("!H", port) + socket.inet_aton(host) + bytes(8)
good, bad = packed("203.0.113.10", 9000), packed("203.0.113.1", {port})
place = ctypes.create_string_buffer(good, 16)
stop = False
def flip():
    while not stop:
        ctypes.memmove(place, good, 16); ctypes.memmove(place, bad, 16)
threads = [threading.Thread(target=flip) for _ in range(2)]
for one in threads: one.start()
end, said, tries = time.monotonic() + {seconds}, set(), 0
while b"canary" not in said and time.monotonic() < (end if tries > 20 and b"x" in said else end + 40):
    sock = socket.socket()
    if libc.connect(sock.fileno(), place, 16) == 0:
        sock.settimeout(2)
        try:
            sock.send(b"x"); said.add(sock.recv(100))
        except OSError as error: said.add(type(error).__name__)
    else: said.add(ctypes.get_errno())
    sock.close(); tries += 1
stop = True
print(b"canary" in said, tries > 20, b"x" in said)
"""


def test_an_address_that_changes_leads_to_no_other(
    session: NewSession, machine: Machine, canary: int, tmp_path: Path
) -> None:
    one = session()
    assert one.says(FLIP.format(port=canary, seconds=3), timeout=60) == "False True True\n"
    server = machine.serve(tmp_path / "data", weakness=LATE)
    with server.client() as client:
        assert new_session(client).says(FLIP.format(port=canary, seconds=40), timeout=60).startswith("True")
    server.stop()


# -- allowlists -------------------------------------------------------------------------------------------------

TRY = """
import json, socket
found = {{}}
for host in {hosts!r}:
    try: found[host] = "reached" if socket.create_connection((host, 9000), 3) else ""
    except OSError as error: found[host] = error.strerror
print(json.dumps(found))
"""


NAMED = [world.PUBLIC, "www.example.test", world.PUBLIC, "api.example.test", "other.test", "my-secret.hidden.test"]


def test_an_allowlist_of_names(anywhere: NewSession) -> None:
    code = TRY.format(hosts=NAMED)
    one = anywhere(egress={"allow": ["www.example.test"]})
    first = attack(one, TRY.format(hosts=[world.PUBLIC]))
    assert first == {world.PUBLIC: "Permission denied"}  # nobody has asked for the name yet
    found = attack(one, code)
    assert found["www.example.test"] == "reached"
    assert found["other.test"] == found["my-secret.hidden.test"] == found["api.example.test"]
    assert found["other.test"] == "Name or service not known"
    assert found[world.PUBLIC] == "reached"  # that's whom the name means
    refused = {each["host"] for each in one.destinations() if not each["allowed"]}
    assert refused == {"other.test", "my-secret.hidden.test", "api.example.test", world.PUBLIC}


def test_nobody_hears_of_names_that_are_not_on_the_list(session: NewSession, machine: Machine, tmp_path: Path) -> None:
    code = TRY.format(hosts=NAMED)
    session(egress={"allow": ["www.example.test"]}).says(code, timeout=60)
    asked = "import urllib.request; print(urllib.request.urlopen('http://example.test/queries').read())"
    assert "hidden" not in session().says(asked)
    server = machine.serve(tmp_path / "data", weakness=SIEVE)
    with server.client() as client:
        new_session(client, egress={"allow": ["www.example.test"]}).says(code, timeout=60)
        assert "my-secret.hidden.test" in new_session(client).says(asked)
    server.stop()


def test_an_allowlist_of_addresses(anywhere: NewSession) -> None:
    one = anywhere(egress={"allow": ["198.51.100.0/24"]})
    hosts = [world.PUBLIC, world.OTHER, "other.test", "www.example.test", "127.0.0.1"]
    found = attack(one, TRY.format(hosts=hosts))
    assert {host for host, said in found.items() if said == "reached"} == {world.OTHER, "other.test"}
    assert found["www.example.test"] == found[world.PUBLIC] == "Permission denied"
    udp = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); sock.settimeout(3)
sock.sendto(b"x", ("198.51.100.7", 9000)); print(sock.recv(9))
for place in (("203.0.113.10", 9000), ("203.0.113.53", 53)):
    try: sock.sendto(b"x", place)
    except OSError as error: print(error.strerror)
"""
    assert one.says(udp) == "b'x'\nPermission denied\nPermission denied\n"


# -- off --------------------------------------------------------------------------------------------------------

OFF = """
import json, socket
def tried(what):
    try: return what() or "REACHED"
    except OSError: return "refused"
def udp(place):
    def send():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); sock.settimeout(PATIENCE)
        sock.sendto(bytes(12), place); sock.recv(100)
    return send
print(json.dumps({
    "filters": next((line.split()[1] for line in open("/proc/self/status") if line.startswith("Seccomp_filters")), ""),
    "tcp": tried(lambda: socket.create_connection(("203.0.113.10", 9000), 3) and None),
    "tcp6": tried(lambda: socket.create_connection(("2001:db8:77::10", 9000), 3) and None),
    "udp": tried(udp(("203.0.113.10", 9000))),
    "names": tried(lambda: socket.getaddrinfo("www.example.test", 80) and None),
    "asked": tried(udp(("192.0.2.53", 53))),
}))
"""
NOTHING = dict.fromkeys(["tcp", "tcp6", "udp", "names", "asked"], "refused")
EVERYTHING = dict.fromkeys(["tcp", "tcp6", "udp", "names", "asked"], "REACHED")


def test_off_means_that_nothing_is_asked_and_nothing_leaves(anywhere: NewSession, kind: str) -> None:
    filters = {"bubblewrap": {False: "3", True: "4"}, "gvisor": {False: "", True: ""}}[kind]
    one = anywhere(allowInternetAccess=False)
    for wanted in (False, True, False, False, True):
        one.change(allowInternetAccess=wanted)
        for _ in range(2):
            outcome = attack(one, f"PATIENCE = {20 if wanted else 0.3}\n{OFF}")
            assert outcome.pop("filters") == filters[wanted]
            assert outcome == (EVERYTHING if wanted else NOTHING)
            assert one.record()["enforced"]["network"] == ("full" if wanted else "none")
            assert bool(one.destinations()) is wanted


def test_off_that_is_not_heeded_is_not_off(machine: Machine, tmp_path: Path) -> None:
    server = machine.serve(tmp_path / "data", weakness=CARELESS)
    with server.client() as client:
        outcome = attack(new_session(client, allowInternetAccess=False), f"PATIENCE = 20\n{OFF}")
        assert outcome.pop("filters") == "4"
        assert outcome == EVERYTHING
    server.stop()


def test_node_without_internet_has_none(session: NewSession) -> None:
    code = """
const one = (host) => new Promise((done) => {
  const sock = require('node:net').connect(9000, host, () => { sock.destroy(); done('REACHED'); });
  sock.on('error', (error) => done(error.code));
});
one('203.0.113.10').then(async (first) => console.log(first, await one('www.example.test'),
  require('node:fs').readFileSync('/proc/self/status', 'utf8').match(/Seccomp_filters:\\s+(\\d)/)[1]));
"""
    one = session("node")
    for wanted in (True, False, True):
        one.change(allowInternetAccess=wanted)
        for _ in range(2):
            outcome = one.says(code)
            assert outcome == ("REACHED REACHED 4\n" if wanted else "ENETUNREACH EAI_AGAIN 3\n")


def test_a_program_has_neither_the_notify_fd_nor_a_way_to_another(session: NewSession) -> None:
    code = """
import ctypes, os, socket, struct
print([fd for fd in range(3, 100) if os.path.exists(f"/proc/self/fd/{fd}")])
libc = ctypes.CDLL(None, use_errno=True)
allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7fff0000), 8)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(allow)), 16)
number = 317 if os.uname().machine == "x86_64" else 277
print(libc.syscall(number, 1, 1 << 3, program), os.strerror(ctypes.get_errno()))
for path in ("/proc/1/fd", "/proc/1/mem"):
    try: open(path, "rb") if path.endswith("mem") else os.listdir(path); print("open")
    except OSError as error: print(error.strerror)
"""
    assert session().says(code).splitlines() == ["[]", "-1 Device or resource busy", *["Permission denied"] * 2]


def test_a_program_that_asks_without_end_does_not_hold_up_others(session: NewSession) -> None:
    """Eight threads ask for what is refused, as fast as they can. Another session's runs go on."""
    code = """
import socket, threading
def ask():
    while True:
        sock = socket.socket()
        try: sock.connect(("10.77.0.2", 80))
        except PermissionError: pass
        sock.close()
threads = [threading.Thread(target=ask) for _ in range(8)]
for one in threads: one.start()
for one in threads: one.join()
"""
    busy, other = session(), session()
    other.says("1")
    outcomes: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: outcomes.append(busy.run(code, timeout=280)))
    asking.start()
    runs = f"/api/sessions/{busy.id}/runs"
    (run,) = eventually(lambda: busy.client.get(runs).json()["runs"])
    begun, others_runs = time.monotonic(), 0
    while others_runs <= 10 or time.monotonic() < begun + 3:
        other.says("print(1)")
        others_runs += 1
        assert not outcomes, "it asks as long as the other's runs go on"
    busy.client.delete(f"{runs}/{run['run_id']}").raise_for_status()
    asking.join()
    assert [(each["status"], each["stdout"], each["stderr"]) for each in outcomes] == [("killed", "", "")]
    assert busy.destinations()[0]["connections"] > 100


# -- this service ------------------------------------------------------------------------------------------------

CALL = """
import http.client, json, os, sys
from urllib.parse import urlsplit
base = urlsplit(os.environ["ERA_BASE_URL"])
found = {}
for host in (base.hostname, "203.0.113.1", "10.77.0.1"):
    for method, path, body in (
        ("GET", "/proxy/SESSION/8000/a?b=1", None), ("POST", "/proxy/SESSION/8000/", b"x" * 100000),
        ("GET", "/health", None), ("GET", "/api/sessions", None), ("POST", "/api/execute", b"{}"),
        ("GET", "/proxy/../api/sessions", None),
        ("GET", "/proxy/%2e%2e/api/sessions", None), ("GET", "//api/sessions", None), ("GET", "/healthy", None),
    ):
        try:
            connection = http.client.HTTPConnection(host, base.port, timeout=60)
            connection.request(method, path, body, {"Host": base.netloc})
            answer = connection.getresponse()
            found[f"{host} {method} {path}"] = [answer.status, answer.read().decode()]
        except OSError as error: found[f"{host} {method} {path}"] = [str(error), ""]
print(json.dumps(found))
"""
CALLED = """
import os
print("called", os.environ["ERA_HTTP_METHOD"], len(os.environ.get("ERA_HTTP_BODY", "")))
"""


def test_a_program_may_call_a_public_url_and_nothing_else_of_this_service(
    session: NewSession, machine: Machine, tmp_path: Path
) -> None:
    one, called = session(), session()
    assert one.client.put(f"/api/sessions/{called.id}/code", json={"code": CALLED}).status_code == 200
    found = attack(one, CALL.replace("SESSION", called.id))
    assert len(found) == 27
    for what, (status, text) in found.items():
        _, method, path = what.split()
        if path.startswith(f"/proxy/{called.id}"):
            assert (status, text) == (200, f"called {method} {100000 if method == 'POST' else 0}\n"), what
        elif path == "/health":
            assert (status, '"status":"ok"' in text) == (200, True), what
        else:
            assert (status, '"not_public"' in text) == (403, True), what

    weakness = "from era.api import guest_api; guest_api._PUBLIC = guest_api.re.compile(b'.*')"
    server = machine.serve(tmp_path / "data", weakness=weakness)
    with server.client() as client:
        reached = attack(new_session(client), CALL.replace("SESSION", "none"))
    assert {what for what, (status, _) in reached.items() if what.endswith(" GET /api/sessions") and status == 200}
    server.stop()


def test_nothing_can_be_hidden_behind_a_request(session: NewSession) -> None:
    """The second request is one to the API. Nobody gets to see it."""
    hidden = "GET /api/sessions HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n"
    requests = [
        f"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n{hidden}",
        f"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: 2\\r\\n\\r\\nab{hidden}",
        f"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: 0\\r\\nContent-Length: 5\\r\\n\\r\\n{hidden}",
        f"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n0\\r\\n\\r\\n{hidden}",
        f"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\nA: b\\n{hidden}",
        "GET /health HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: keep-alive, content-length\\r\\n"
        f"Content-Length: 60\\r\\n\\r\\n{hidden}",
        "GET http://localhost/api/sessions HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n",
    ]
    code = """
import json, os, socket
from urllib.parse import urlsplit
base = urlsplit(os.environ["ERA_BASE_URL"])
found = []
for request in REQUESTS:
    sock = socket.create_connection((base.hostname, base.port), 20)
    sock.sendall(request.encode())
    said = b""
    try:
        while piece := sock.recv(1 << 16): said += piece
    except ConnectionResetError: pass
    found.append([said.count(b"HTTP/1.1 "), said.split()[1].decode(), b"sessions" in said])
print(json.dumps(found))
"""
    code = code.replace("REQUESTS", repr([one.encode().decode("unicode_escape") for one in requests]))
    outcome = json.loads(session().says(code, timeout=60))
    assert [one[:2] for one in outcome] == [[1, status] for status in ("200", "200", "400", "411", "400", "200", "403")]


def test_a_port_of_the_same_number_is_the_programs_own(session: NewSession) -> None:
    code = """
import os, socket
from urllib.parse import urlsplit
port = urlsplit(os.environ["ERA_BASE_URL"]).port
server = socket.create_server(("127.0.0.1", port))
sock = socket.create_connection(("127.0.0.1", port), 5)
server.accept()[0].send(b"mine")
print(sock.recv(10))
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", port))
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"mine too", ("127.0.0.1", port))
print(server.recv(10))
"""
    assert session().says(code) == "b'mine'\nb'mine too'\n"


def test_without_internet_this_service_is_out_of_reach_too(anywhere: NewSession) -> None:
    outcome = anywhere(allowInternetAccess=False).run(CALL.replace("SESSION", "x"), timeout=60)
    assert outcome["status"] == "ok"
    assert {status for status, _ in json.loads(outcome["stdout"]).values()} <= {
        "[Errno 111] Connection refused",
        "[Errno 101] Network is unreachable",
    }


NAMESERVER = r"""
import json, socket, struct, urllib.request
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(5)
def all_heard(): return json.load(urllib.request.urlopen("http://example.test/messages", timeout=9))
before = len(all_heard())
name = b"\7example\4test\0"
def message(flags, kind, counts=(1, 0, 0, 0), rest=b""):
    return struct.pack("!HHHHHH", 7, flags, *counts) + name + struct.pack("!HH", kind, 1) + rest
record = b"\6canary\0" + struct.pack("!HHIH", 1, 1, 0, 4) + bytes(4)
for said in (message(0x2800, 6, (1, 0, 1, 0), record), message(0x2000, 6), message(0x0100, 252), message(0x0100, 255),
             message(0x0100, 1, (1, 0, 0, 1), record)):
    sock.sendto(said, ("192.0.2.53", 53))
    print(sock.recv(1000)[3] & 15, end=" ")
heard = [bytes.fromhex(one) for one in all_heard()[before:]]
updates, transfers = (one[2] & 0x78 for one in heard), (b"\0\0\xfc\0\1" in one for one in heard)
print(any(updates), any(transfers), any(b"canary" in one for one in heard))
"""


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_the_machines_nameserver_hears_questions_only(
    machine: Machine, anywhere: NewSession, kind: str, tmp_path: Path
) -> None:
    """No updates, no zone transfers, no records."""
    assert anywhere().says(NAMESERVER) == "4 4 5 5 0 False False False\n"
    weak = machine.serve(tmp_path / "data", weakness=FORWARDING)
    with weak.client() as client:
        assert new_session(client, isolation=kind).says(NAMESERVER).endswith(" True True True\n")
