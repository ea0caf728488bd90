"""Programs that want to where they may not. Each attack is also made on a server without the wall, and gets there."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.network import world
from tests.network.conftest import Machine, NetServer, NewSession, Session, new_session

BLIND = "from era.network.policy import Policy; Policy.refuses = lambda self, address: None"
"""Judges no address."""

FORGETFUL = (
    "import socket; from era.network import policy, run_connections; right = run_connections.connect; "
    "from ipaddress import ip_address; run_connections.connect = lambda address, port: right("
    "ip_address(socket.getaddrinfo('twice.rebind.test', port)[0][4][0]), port)"
)
"""Judges the address that a name has, then connects to the name."""

ASK = """
import json, sys, urllib.request
found = {{}}
for url in {urls!r}:
    try: found[url] = urllib.request.urlopen(url, timeout=8).read().decode()[:200]
    except urllib.error.HTTPError as error: found[url] = error.code
    except OSError as error: found[url] = error.reason.strerror
print(json.dumps(found))
"""


@pytest.fixture(scope="package")
def canary(machine: Machine) -> Iterator[int]:
    """A port on all of the machine's own addresses where a secret is told; nothing else is on it in the world."""

    class Canary(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"canary")

    server = world.Server(("::", 0), Canary)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield int(server.server_address[1])
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="package")
def blind(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetServer]:
    server = machine.serve(tmp_path_factory.mktemp("blind") / "data", weakness=BLIND)
    yield server
    server.stop()


def ask(session: Session, urls: list[str]) -> dict[str, Any]:
    response: dict[str, Any] = json.loads(session.says(ASK.format(urls=urls), timeout=60))
    return response


OWN_SPELLINGS = ["127.0.0.1", "127.1", "2130706433", "0177.1", "0x7f.1", "0x7f000001", "127.0.0.1.", "0", "0.0.0.0"]
OWN_SPELLINGS += ["localhost", "LOCALHOST.", "loop.test", "127.7.7.7", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"]
OWN_SPELLINGS += ["[::]", "\uff11\uff12\uff17.\uff10.\uff10.\uff11".encode("idna").decode()]
OUTSIDE_SPELLINGS = [world.OWN, "own.test", world.OWN_PRIVATE, f"[{world.OWN_V6}]", f"[::ffff:{world.OWN}]"]
OUTSIDE_SPELLINGS += ["3405803777", "0xcb.0.0x7101"]
OWN_SPELLINGS += OUTSIDE_SPELLINGS


def test_the_machine_itself_is_out_of_reach_however_it_is_spelt(
    session: NewSession, blind: NetServer, canary: int
) -> None:
    """What means loopback is the sandbox's own, whoever judges addresses."""
    code = """
import json, urllib.request
found = {{}}
for host in {hosts!r}:
    try: found[host] = urllib.request.urlopen(f"http://{{host}}:{port}/", timeout=8).read().decode()
    except OSError as error: found[host] = "refused"
print(json.dumps(found))
"""
    code = code.format(hosts=OWN_SPELLINGS, port=canary)
    found = json.loads(session().says(code, timeout=60))
    assert found == dict.fromkeys(OWN_SPELLINGS, "refused")
    with blind.client() as client:
        reached = json.loads(new_session(client).says(code, timeout=60))
    assert [host for host in OUTSIDE_SPELLINGS if reached[host] != "canary"] == []


def test_a_redirect_leads_no_further_than_its_target_may(session: NewSession, blind: NetServer, canary: int) -> None:
    urls = [
        f"http://www.example.test/redirect?to=http://{world.OWN}:{canary}/",
        "http://www.example.test/redirect?to=http://10.77.0.2/hello",
    ]
    assert ask(session(), urls) == dict.fromkeys(urls, "Permission denied")
    with blind.client() as client:
        assert ask(new_session(client), urls)[urls[0]] == "canary"


def test_a_name_with_a_public_and_a_private_address_leads_to_the_public_one(session: NewSession) -> None:
    one = session()
    urls = ["http://mixed.test/hello"]
    assert "mixed.test" in ask(one, urls)[urls[0]]
    assert [each["address"] for each in one.destinations() if each["allowed"]] == [world.PUBLIC]


def test_a_rebinding_name_is_what_it_was_when_it_was_judged(
    session: NewSession, machine: Machine, canary: int, tmp_path: Path
) -> None:
    one = session()
    urls = ["http://once.rebind.test/hello", "http://once.rebind.test/hello?again"]
    found = ask(one, urls)
    assert "once.rebind.test" in found[urls[0]]
    assert found[urls[1]] == "Connection refused"  # by the sandbox's own loopback
    asked = ask(one, ["http://example.test/queries"])["http://example.test/queries"]
    assert asked.count("A once.rebind.test") <= 4  # once for each connection

    server = machine.serve(tmp_path / "data", weakness=FORGETFUL)
    url = f"http://twice.rebind.test:{canary}/"
    with server.client() as client:
        assert ask(new_session(client), [url]) == {url: "canary"}
    server.stop()


OFF = """
import os, socket
def tried(what):
    try: what()
    except OSError: return "refused"
    return "REACHED"
def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("203.0.113.10", 9000))
def raw():
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
def abstract():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\\0era-canary")
print([name for name in os.environ if "proxy" in name.lower() and name != "ERA_PROXY_URL"])
print(tried(lambda: socket.create_connection(("203.0.113.10", 80), 3)))
print(tried(lambda: socket.create_connection(("2001:db8:77::10", 80), 3)))
print(tried(udp))
print(tried(lambda: socket.getaddrinfo("www.example.test", 80)))
print(tried(lambda: socket.create_connection(("127.0.0.1", 9), 3)))
print(tried(raw))
print(tried(abstract))
"""


@pytest.fixture
def abstract_canary() -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0era-canary")
        listener.listen()
        yield


def test_on_opens_tcp_and_udp_and_nothing_else(anywhere: NewSession, abstract_canary: None) -> None:
    assert anywhere().says(OFF).splitlines() == ["[]", *["REACHED"] * 4, *["refused"] * 3]


def test_a_program_cannot_keep_a_connection_for_a_run_without(session: NewSession, odd: NetServer) -> None:
    """A daemon of the first run holds a connection and listens; the second run has no internet."""
    hold = """
import os, socket, time
sock = socket.create_connection(("www.example.test", 9000))
sock.sendall(b"x")
print(sock.recv(100).decode())
if os.fork() == 0:
    os.setsid()
    helper = socket.create_server(("127.0.0.1", 7777))
    while True: helper.accept()
"""
    use = "import socket; socket.create_connection({place}, 3)"
    places = [("127.0.0.1", 7777), (world.PUBLIC, 9000)]
    one = session()
    assert one.says(hold) == "x\n"
    one.change(allowInternetAccess=False)
    for place, reason in zip(places, ("refused", "unreachable"), strict=True):
        assert reason in one.run(use.format(place=place))["stderr"]

    with odd.client() as client:
        weak = new_session(client)
        assert weak.says(hold) == "x\n"
        weak.change(allowInternetAccess=False)
        found = weak.run(KEPT)
        assert found["stdout"] == "still there\n", found


KEPT = """
import socket
sock = socket.socket()
sock.bind(("203.0.113.10", 0))
print("still there")
"""


def test_nobody_inside_can_take_the_place_of_the_storages_listener(anywhere: NewSession) -> None:
    code = """
import os, socket, urllib.request
held = []
for address in ("127.0.0.1", "0.0.0.0", "127.0.0.2"):
    sock = socket.socket()
    held.append(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try: sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError: pass
    try:
        sock.bind((address, 18129))
        sock.listen()
        print(address, "taken")
    except OSError: print(address, "refused")
try: urllib.request.urlopen("http://127.0.0.1:18129/api/sessions", timeout=5)
except urllib.error.HTTPError as error: print(error.code)
"""
    one = anywhere()
    said = one.says(code).splitlines()
    assert said == ["127.0.0.1 refused", "0.0.0.0 refused", "127.0.0.2 taken", "404"]


def test_another_sessions_connections_are_not_to_be_found(served: NetServer, session: NewSession) -> None:
    """Two runs at a time: one with internet, one without, which looks at every address of its own."""
    with_it, without = session(), session(allowInternetAccess=False)
    response: list[str] = []
    later = "import socket, time; held = [socket.create_connection(('203.0.113.10', 9000))]; time.sleep(1.5)\n"
    later += "import urllib.request; print(urllib.request.urlopen('http://www.example.test/hello').status)"

    def hold() -> None:
        with served.client() as client:
            response.append(Session(client, with_it.id).says(later))

    holding = threading.Thread(target=hold)
    holding.start()
    code = """
import socket, time
end, reached = time.monotonic() + 1, []
while time.monotonic() < end:
    for host in ("127.0.0.1", "::1", "127.0.0.2", "203.0.113.1", "10.77.0.1", "203.0.113.10"):
        for port in (18129, 9000) if host != "127.0.0.1" else (9000,):
            try: socket.create_connection((host, port), 0.2); reached.append(host)
            except OSError: pass
    time.sleep(0.1)
print(reached)
"""
    assert without.says(code) == "[]\n"
    holding.join()
    assert response == ["200\n"]
    # From outside there is nothing on the guest listener's port either.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 18129), 1)
