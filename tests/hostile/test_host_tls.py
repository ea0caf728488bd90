"""TLS between the hosts of a cluster: everything passes over it, and whoever has no certificate of the cluster's is
refused, as a caller, as the host that is called, and as one that starts. Each attack succeeds where nothing is looked
at."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from era.cluster.local import certify
from tests.api.event_streams import numbered
from tests.api.live import Terminal, start
from tests.api.websocket import WebSocket
from tests.conftest import Server, assert_nothing_left, eventually, mounts
from tests.two_hosts import SECRET, Home

WEAK = """
import ssl

import era.cluster.host_tls

strong = era.cluster.host_tls.host_tls

def weak(settings):
    tls = strong(settings)
    if tls is not None:
        tls.server.verify_mode = ssl.CERT_NONE
        tls.client.check_hostname = False
        tls.client.verify_mode = ssl.CERT_NONE
    return tls

era.cluster.host_tls.host_tls = weak
"""
"""What makes hosts that look at no certificate."""


@contextmanager
def two_hosts(directory: Path, **settings: str) -> Iterator[Home]:
    before = mounts()
    home = Home(directory / "data", settings, tls=True).start()
    try:
        yield home
    finally:
        processes = home.descendants()
        assert home.stop() == 0, home.log
        assert "Traceback" not in home.log, home.log
        assert_nothing_left(before, processes, home.data_dir)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with two_hosts(tmp_path_factory.mktemp("tls")) as home:
        yield home


@pytest.fixture
def client(home: Home) -> Iterator[httpx.Client]:
    """Of the host that isn't the home."""
    with home.client() as client:
        assert client.post("/api/sessions", json={"session_id": "tls", "language": "python"}).status_code == 201
        yield client
        assert client.delete("/api/sessions").status_code == 200


def files(home: Home, host: str = "other") -> Mapping[str, str]:
    """The settings of a certificate that one of the hosts has."""
    directory = home.data_dir.parent / f"{home.data_dir.name}-tls"
    return {
        "ERA_CLUSTER_AUTHORITY": str(directory / "authority.pem"),
        "ERA_CLUSTER_CERTIFICATE": str(directory / f"{host}.pem"),
        "ERA_CLUSTER_CERTIFICATE_KEY": str(directory / f"{host}.key"),
    }


def address(url: str) -> tuple[str, int]:
    name, _, port = url.partition("://")[2].rpartition(":")
    return name, int(port)


def told(home: Home, certificate: Mapping[str, str] | None, header: bytes = b"") -> bytes:
    """What the port for hosts tells somebody with this certificate, or none, who makes a call of a host's."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate is not None:
        context.load_cert_chain(certificate["ERA_CLUSTER_CERTIFICATE"], certificate["ERA_CLUSTER_CERTIFICATE_KEY"])
    answer = b""
    lines = [b"GET /api/sessions HTTP/1.1", b"host: x", b"connection: close"]
    lines += [b"x-era-hop: " + header] if header else []
    plain = socket.create_connection(address(home.hosts_url), 30)
    with suppress(OSError), plain, context.wrap_socket(plain) as connection:
        connection.sendall(b"\r\n".join([*lines, b"", b""]))
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


def operators_header(home: Home) -> bytes:
    """One with the right signature, as whoever has learned the cluster's secret makes it."""
    return home.hop("GET", "/api/sessions", "x", {"caller": ["default", True, "", ["read"]]})


class FakeHost:
    """A server with a certificate of somebody else's, which notes what it is sent."""

    def __init__(self, certificate: Mapping[str, str]) -> None:
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(
            certificate["ERA_CLUSTER_CERTIFICATE"], certificate["ERA_CLUSTER_CERTIFICATE_KEY"]
        )
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._socket.getsockname()[1]}"
        self.heard = b""
        self.tries = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            with suppress(OSError), self._socket.accept()[0] as peer:
                self.tries += 1
                peer.settimeout(30)
                with self._context.wrap_socket(peer, server_side=True) as connection:
                    self.heard += connection.recv(1 << 16)
                continue
            if self._socket.fileno() < 0:
                return

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(60)


@pytest.fixture
def foreign(tmp_path: Path) -> Mapping[str, str]:
    """A certificate for the right address, by an authority of somebody else's."""
    return certify(tmp_path / "foreign", ["foreign"], "127.0.0.1")["foreign"]


def test_everything_passes_over_tls(home: Home, client: httpx.Client) -> None:
    assert client.post("/api/sessions/tls/run", json={"code": "print(6 * 7)"}).json()["stdout"] == "42\n"
    body = {"code": "for n in range(3): print(n, flush=True)"}
    with client.stream("POST", "/api/sessions/tls/stream", json=body) as answer:
        events = list(numbered(answer))
    assert "".join(data["content"] for _, name, data in events if name == "stdout") == "0\n1\n2\n"
    content = bytes(range(256)) * (1 << 15)
    pieces = (content[start : start + (1 << 16)] for start in range(0, len(content), 1 << 16))
    assert client.put("/api/sessions/tls/files/large", content=pieces).json()["size"] == len(content)
    assert client.get("/api/sessions/tls/files/large").content == content
    path = f"/api/sessions/tls/processes/{start(client, 'tls', ['cat'], stdin=True)}/attach"
    attached = Terminal(WebSocket(home, path))
    attached.until_event("attached")
    attached.send(b"echoed\n")
    attached.until_event("stdout")
    attached.connection.close()
    assert client.get("/api/sessions").json()["sessions"][0]["status"] == "live"
    # What programs are told is the port for everybody, at the host that was called.
    told = client.post("/api/sessions/tls/run", json={"code": "import os; print(os.environ['ERA_BASE_URL'])"}).json()
    assert told["stdout"].strip() == home.url


def test_only_hosts_with_a_certificate_are_answered(home: Home, foreign: Mapping[str, str]) -> None:
    header = operators_header(home)
    assert told(home, files(home), header).startswith(b"HTTP/1.1 200 ")
    for certificate in (None, foreign):
        assert told(home, certificate, header) == b""
    refused = told(home, files(home))
    assert refused.startswith(b"HTTP/1.1 403 ")
    assert b'"bad_hop"' in refused


def test_nobody_talks_plain_at_the_port_for_hosts(home: Home) -> None:
    with socket.create_connection(address(home.hosts_url), 30) as connection, suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"HTTP" not in connection.recv(1 << 16)


def test_no_host_is_believed_at_the_port_for_everybody(home: Home) -> None:
    host = home.own_url.removeprefix("http://")
    header = home.hop("GET", "/api/sessions", host, {"caller": ["default", True, "", ["read"]]})
    with home.at_home().client() as at_home:
        answer = at_home.get("/api/sessions", headers={b"x-era-hop": header})
    assert (answer.status_code, answer.json()["code"]) == (403, "bad_hop")


def test_programs_do_not_reach_the_port_for_hosts(home: Home, client: httpx.Client) -> None:
    name, port = address(home.hosts_url)
    code = f"import socket\nsocket.create_connection(({name!r}, {port}), 5)"
    for internet in (False, True):
        body = {"language": "python", "code": code, "allowInternetAccess": internet}
        answer = client.post("/api/execute", json=body).json()
        assert answer["exit_code"] == 1, answer
        assert "Error" in answer["stderr"], answer


@pytest.mark.parametrize("kind", ["foreign", "plain"])
def test_what_takes_the_place_of_the_home_gets_nothing(
    home: Home, client: httpx.Client, foreign: Mapping[str, str], kind: str
) -> None:
    """Somebody else's certificate is refused, and nobody is called plain."""
    fake = FakeHost(foreign)
    try:
        with home.said_to_be_at(fake.url if kind == "foreign" else home.own_url):
            answer = client.post("/api/sessions/tls/run", json={"code": "print('a secret')"})
        assert (answer.status_code, answer.json()["code"]) == (503, "home_unreachable"), answer.text
        assert ("certificate" if kind == "foreign" else "plain") in answer.json()["error"]
        assert fake.heard == b""
    finally:
        fake.close()


def test_a_host_without_a_certificate_of_the_clusters_does_not_start(home: Home, foreign: Mapping[str, str]) -> None:
    mine = {"ERA_SHARED_DIR": str(home.content_dir), "ERA_CLUSTER_SECRET": SECRET}
    for number, (certificate, said) in enumerate(((foreign, "its certificate"), ({}, "its certificate"))):
        refused = Server(home.data_dir.parent / f"refused-{number}", {**mine, **certificate})
        with pytest.raises(AssertionError, match="The server did not start"):
            refused.start()
        assert refused.stop() == 2, "it hadn't ended by itself"
        assert "Traceback" not in refused.log, refused.log
        problem = [line for line in refused.log.splitlines() if line.startswith("era: ")]
        assert len(problem) == 1, refused.log
        assert "don't trust each other" in problem[0]
        assert said in problem[0]
        assert home.hosts_url in problem[0]
        assert "ERA_CLUSTER_CERTIFICATE" in problem[0]


@pytest.mark.soak
def test_where_nothing_is_looked_at_the_attacks_succeed(tmp_path: Path, foreign: Mapping[str, str]) -> None:
    weak = tmp_path / "weak"
    weak.mkdir()
    (weak / "sitecustomize.py").write_text(WEAK)
    with two_hosts(tmp_path, PYTHONPATH=str(weak)) as home:
        assert told(home, None, operators_header(home)).startswith(b"HTTP/1.1 200 ")
        fake = FakeHost(foreign)
        try:
            with home.client() as client:
                assert client.post("/api/sessions", json={"session_id": "a", "language": "python"}).status_code == 201
                with home.said_to_be_at(fake.url), suppress(httpx.TimeoutException):  # It answers nothing.
                    client.post("/api/sessions/a/run", json={"code": "1"}, timeout=10)
            assert eventually(lambda: b"x-era-hop" in fake.heard)
        finally:
            fake.close()
