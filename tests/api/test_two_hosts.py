"""What passes between two hosts: WebSockets, of which both ends hear how they end and why, and what a host says about a
call that it passes on, if that host is of another version."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import struct
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from era import Era
from tests.api.guest_servers import HTTP_SERVER, serve_in_background, start_in_background
from tests.api.live import Terminal, process, start
from tests.api.owners import OPERATOR_KEY, client_with_key, new_key
from tests.api.websocket import WebSocket
from tests.client.command import era
from tests.conftest import assert_nothing_left, eventually, mounts
from tests.hostile.test_raw_requests import REQUESTS, Connection
from tests.two_hosts import Home

SERVER = """\
import base64, hashlib, socket, struct, threading, time

def serve(peer):
    head = b""
    while not head.endswith(b"\\r\\n\\r\\n"):
        head += peer.recv(1)
    key = head.lower().partition(b"sec-websocket-key: ")[2]
    key = head[len(head) - len(key):].partition(b"\\r\\n")[0]
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    peer.sendall(b"HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n"
                 b"Sec-WebSocket-Accept: " + accept + b"\\r\\n\\r\\n")
    path = head.split()[1]
    if path == b"/leaves":
        peer.recv(1)
        peer.sendall(b"\\x88\\x08" + struct.pack("!H", 4001) + b"enough")
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(1 << 16):
            pass
    elif path in (b"/counts", b"/counts-late"):
        size = 0
        if path == b"/counts-late":
            time.sleep(2)
        while piece := peer.recv(1 << 16):
            size += len(piece)
        print("counted", size, flush=True)
    elif path == b"/floods":
        threading.Thread(target=heard, args=(peer,)).start()
        try:
            while True:
                peer.sendall(b"\\x82\\x7e\\x10\\x00" + bytes(2048))
                time.sleep(0.002)  # within a frame as often as between two
                peer.sendall(bytes(2048))
                time.sleep(0.002)
        except OSError:
            return
    elif path == b"/trickles":
        peer.sendall(b"\\x82\\x7e\\x10\\x00" + bytes(2048))
        while True:
            time.sleep(0.3)
            peer.sendall(bytes(2048) + b"\\x82\\x7e\\x10\\x00" + bytes(2048))
    peer.close()

def heard(peer):
    seen = b""
    while piece := peer.recv(1 << 16):
        seen += piece
        open("heard", "wb").write(seen)
    peer.close()

listener = socket.create_server(("127.0.0.1", 3000))
print("listening", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"""


@pytest.fixture(scope="module", params=["plain", pytest.param("over TLS", marks=pytest.mark.soak)])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    before, data_dir = mounts(), tmp_path_factory.mktemp("two") / "data"
    home = Home(data_dir, tls=request.param == "over TLS").start()
    yield home
    processes = home.descendants()
    assert home.stop() == 0, home.log
    assert "Traceback" not in home.log, home.log
    assert_nothing_left(before, processes, data_dir)


@pytest.fixture
def client(home: Home) -> Iterator[httpx.Client]:
    """Of the host that isn't the home."""
    with home.client() as client:
        yield client
    with home.client() as client:
        assert client.delete("/api/sessions").status_code == 200


@pytest.fixture
def public(client: httpx.Client) -> str:
    """The path of a public URL at which SERVER serves."""
    body = {"session_id": "sockets", "language": "python", "allowPublicAccess": True}
    assert client.post("/api/sessions", json=body).status_code == 201
    serve_in_background(client, "sockets", SERVER)
    return "/proxy/sockets/3000"


def opened(home: Home, path: str) -> WebSocket:
    socket = WebSocket(home, path)
    assert socket.accepted, socket.head
    return socket


def test_a_host_that_stops_has_its_sockets_go_elsewhere(home: Home, client: httpx.Client, public: str) -> None:
    other = home.other
    assert other is not None
    where = start(client, "sockets", "while sleep 0.01; do echo line; done")
    attached = Terminal(opened(home, f"/api/sessions/sockets/processes/{where}/attach"))
    attached.until_event("stdout")
    flooded = opened(home, f"{public}/floods")
    assert flooded.receive() == (2, bytes(4096))
    stopped = threading.Thread(target=lambda: codes.append(other.stop()))
    codes: list[int] = []
    stopped.start()
    # Frames are whole until the end, however many there are.
    while (frame := flooded.receive())[0] != 8:
        assert frame == (2, bytes(4096))
    assert frame[1] == struct.pack("!H", 1012)
    flooded.send(frame[1], opcode=8)
    assert attached.until_closed() == 1012
    stopped.join(60)
    assert codes == [0]
    for socket in (flooded, attached.connection):
        assert socket.rest() is not None
        socket.close()
    # The home has lost nothing by that, and its program was told.
    with home.at_home().client() as at_home:
        assert process(at_home, "sockets", where)["status"] == "running"
        assert eventually(lambda: len(at_home.get("/api/sessions/sockets/files/heard").content) == 8)
        heard = at_home.get("/api/sessions/sockets/files/heard").content
        assert heard[0] == 0x88
    other.start()
    home.url = other.url
    again = Terminal(opened(home, f"/api/sessions/sockets/processes/{where}/attach"))
    again.until_event("stdout")
    again.connection.close()


OLDER = {"caller": ["ann", False, "", ["read"]]}
"""What a host of a version says that knew less: nothing else but for whom and when."""

NEWER = {
    "from": "host_1",
    "caller": ["ann", False, "", ["read", "scope of a later version"], {"more": "about him"}],
    "client": ["10.0.0.7", 4711],
    "request_id": "req_1",
    "scheme": "https",
    "base_url": "https://era.example",
    "port": 443,
    "version": 2,
    "later": {"anything": [1, None]},
}


@pytest.mark.parametrize("home", ["plain"], indirect=True)
@pytest.mark.parametrize("said", [OLDER, NEWER], ids=["older", "newer"])
def test_a_call_passed_on_by_a_host_of_another_version(home: Home, client: httpx.Client, said: dict[str, Any]) -> None:
    with home.at_home().client() as at_home:
        for method, status in (("GET", 200), ("POST", 403)):
            header = home.hop(method, "/api/sessions", home.own_url.removeprefix("http://"), said)
            answer = at_home.request(method, "/api/sessions", headers={b"x-era-hop": header})
            assert answer.status_code == status, answer.text
            assert answer.headers["x-request-id"] == said.get("request_id", answer.headers["x-request-id"])
            assert answer.json().get("sessions", []) == []


def test_a_list_shows_what_sessions_do_at_another_host(home: Home, client: httpx.Client) -> None:
    for name in ("runs", "live", "kernel", "idle"):
        assert client.post("/api/sessions", json={"session_id": name, "language": "python"}).status_code == 201
    start_in_background(client, "runs", "import time; time.sleep(600)")
    start(client, "live", "exec sleep 600")
    start(client, "live", "exec sleep 600")
    assert client.post("/api/sessions/kernel/run", json={"code": "x = 1", "context": "a"}).status_code == 200
    states = {"runs": ("running", 0), "live": ("live", 2), "kernel": ("live", 0), "idle": ("idle", 0)}

    def shown(**query: str) -> dict[str, tuple[str, int]]:
        listed = client.get("/api/sessions", params=query).json()["sessions"]
        return {each["id"]: (each["status"], each["processes"]) for each in listed}

    assert eventually(lambda: shown() == states), shown()
    assert shown(status="live") == {"live": states["live"], "kernel": states["kernel"]}
    assert client.delete("/api/sessions", params={"status": "idle"}).json()["deleted_sessions"] == ["idle"]
    # Nobody but a host may ask.
    assert client.get("/cluster/active", params={"owner": "default"}).status_code == 404


def test_the_hosts_of_a_cluster_are_listed(home: Home, client: httpx.Client) -> None:
    assert client.post("/api/sessions", json={"session_id": "listed", "language": "python"}).status_code == 201
    start(client, "listed", "exec sleep 600")
    listed = client.get("/api/hosts")
    hosts = {each["id"]: each for each in listed.json()["hosts"] if each["status"] != "dead"}
    called, at_home = listed.json()["this"], (home.data_dir / "host-id").read_text()
    assert hosts.keys() == {called, at_home}
    assert listed.headers["x-era-host"] == called
    assert client.get("/api/sessions/listed").headers["x-era-host"] == at_home
    assert {each["status"] for each in hosts.values()} == {"ready"}
    assert sorted(each["leader"] for each in hosts.values()) == [False, True]
    assert hosts[called]["sessions"] == 0 < hosts[at_home]["sessions"]
    assert hosts[called]["state"]["processes"] == 0 < hosts[at_home]["state"]["processes"]

    def have_sandboxes() -> bool:
        state = next(each["state"] for each in client.get("/api/hosts").json()["hosts"] if each["id"] == at_home)
        return bool(0 < state["live_sessions"] <= state["sandboxes"]["live"])

    assert eventually(have_sandboxes)  # Live sessions of other tests may be about to be put away.
    with paused(home):
        silent = {each["id"]: each for each in client.get("/api/hosts").json()["hosts"]}[at_home]
    assert (silent["status"], silent["state"]) == ("silent", None)
    with Era(home.url) as era:
        assert {each["id"]: each["status"] for each in era.hosts()}.items() >= {
            called: "ready",
            at_home: "ready",
        }.items()
    # Nobody but a host may ask for what it says of itself.
    assert client.get("/cluster/state").status_code == 404


def test_what_hosts_ask_each_other_is_a_path_like_any_other_at_a_site(home: Home, client: httpx.Client) -> None:
    """Though a host has signed that it passes the request on."""
    body = {"session_id": "site", "language": "python", "allowPublicAccess": True}
    assert client.post("/api/sessions", json=body).status_code == 201
    serve_in_background(client, "site", HTTP_SERVER)
    name = urlsplit(client.get("/api/sessions/site/host", params={"port": 3000}).json()["site_url"]).netloc
    for path in ("active?owner=default", "changed", "hello", "in-use", "room", "setups", "state"):
        answer = client.get(f"/cluster/{path}", headers={"Host": name})
        assert answer.json().get("path") == f"/cluster/{path}", answer.text


@pytest.mark.parametrize("home", ["plain"], indirect=True)
def test_a_host_with_another_secret_does_not_start(home: Home) -> None:
    settings = {
        "ERA_SHARED_DIR": str(home.content_dir),
        "ERA_DATA_DIR": str(home.data_dir.parent / "refused"),
        "ERA_CLUSTER_SECRET": "another secret, of thirty-two characters",
        "ERA_PORT": "0",
    }
    started = era(None, "serve", code=2, env=settings)
    problem = [line for line in started.stderr.splitlines() if line.startswith("era: ")]
    assert len(problem) == 1, started.stderr
    for said in ("don't trust each other", "ERA_CLUSTER_SECRET", "http://127.0.0.1:"):
        assert said in problem[0]


@contextmanager
def paused(home: Home) -> Iterator[None]:
    """Within the block the home does nothing."""
    state = Path(f"/proc/{home.pid}/stat")
    with closing(sqlite3.connect(home.content_dir / "era.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")  # so that the home isn't paused with the lock
        os.kill(home.pid, signal.SIGSTOP)
        assert eventually(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
        database.execute("ROLLBACK")
    try:
        yield
    finally:
        os.kill(home.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home that only those with a key may call."""
    data_dir = tmp_path_factory.mktemp("keyed") / "data"
    home = Home(data_dir, {"ERA_API_KEY": OPERATOR_KEY}).start()
    yield home
    assert home.stop() == 0, home.log
    assert "Traceback" not in home.log, home.log


def test_what_is_changed_at_one_host_holds_at_the_others_once_that_is_answered(keyed: Home) -> None:
    key, home = new_key(keyed, "bea"), keyed.at_home()
    where = f"/api/keys/{key['id']}"
    with (
        client_with_key(keyed, OPERATOR_KEY) as operator,
        client_with_key(home, key["key"]) as bea,
        client_with_key(home, OPERATOR_KEY) as operator_at_home,
    ):
        assert bea.get("/api/quotas").json()["key"]["quotas"] == {}
        assert operator.patch(where, json={"quotas": {"sessions": 3}}).is_success
        assert bea.get("/api/quotas").json()["key"]["quotas"] == {"sessions": 3}
        assert operator.patch("/api/owners/bea", json={"quotas": {"sessions": 2}}).is_success
        assert bea.get("/api/quotas").json()["quotas"]["sessions"] == 2
        made = operator.post("/api/webhooks", json={"url": "http://203.0.113.7/era", "events": ["run.ended"]}).json()
        assert operator.post("/api/sessions", json={"session_id": "told", "language": "python"}).is_success
        assert operator.post("/api/sessions/told/run", json={"code": "1"}).is_success  # at the home
        told = operator_at_home.get(f"/api/webhooks/{made['id']}/deliveries").json()["deliveries"]
        assert [each["event"] for each in told] == ["run.ended"]
        assert operator.delete(f"/api/webhooks/{made['id']}").is_success
        rotated = operator.post(f"{where}/rotate", json={"grace_seconds": 0}).json()["key"]
        assert bea.get("/api/quotas").status_code == 401
        with client_with_key(home, rotated) as bea_again:
            assert bea_again.get("/api/quotas").is_success
            assert operator.delete(where).is_success
            assert bea_again.get("/api/quotas").status_code == 401


@pytest.mark.parametrize("home", ["plain"], indirect=True)
def test_bytes_that_are_no_plain_request_are_taken_for_the_same_at_both_hosts(home: Home, client: httpx.Client) -> None:
    """Neither can be made to take a part of one request for another one, which the next caller would be answered."""
    body = {"session_id": "raw", "language": "python", "allowPublicAccess": True}
    assert client.post("/api/sessions", json=body).status_code == 201
    serve_in_background(client, "raw", HTTP_SERVER)
    for path, (name, (request, _)) in product((b"/api/sessions/raw/stat/x", b"/proxy/raw/3000/x"), REQUESTS.items()):
        asked = request.replace(b"/api/sessions HTTP", path + b" HTTP")
        answers = [re.findall(rb"HTTP/1\.1 (\d+)", exchanged(url, asked)) for url in (home.own_url, home.url)]
        assert answers[0] == answers[1], (path, name)
        next_one = client.get("/proxy/raw/3000/next")
        assert (next_one.status_code, next_one.json()["path"]) == (200, "/next"), name


def exchanged(url: str, request: bytes) -> bytes:
    """What a host answers to these bytes, in which SELF stands for its name."""
    with Connection(url) as connection:
        connection.send(request)
        return connection.receive(60)
