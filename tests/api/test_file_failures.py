"""Files over HTTP when clients hang up, disks fail or the service is killed; and memory while large files pass."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from functools import partial

import httpx
import pytest

from tests.api.answers import refused
from tests.api.files_api import MIB, get, put
from tests.conftest import MakeServer, MakeSession, Server, eventually


def test_a_client_that_hangs_up_has_changed_nothing(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    put(client, where, "a", b"old")
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    for length in (1000, 10 * MIB):
        with socket.create_connection(address) as connection:
            head = f"PUT /api/sessions/{where}/files/a HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\n"
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + bytes(length - 1))
            time.sleep(0.1)
    with socket.create_connection(address) as connection:
        head = f"GET /api/sessions/{where}/files/a HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\n\r\n"
        connection.sendall(head.encode())
    uploads = server.data_dir / "uploads"
    assert eventually(lambda: not os.listdir(uploads))
    assert get(client, where, "a").content == b"old"
    assert client.get(f"/api/sessions/{where}").json()["version"] == 2


def test_a_disk_that_fails_is_a_503_and_changes_nothing(
    client: httpx.Client, session: MakeSession, server: Server
) -> None:
    where = session()
    put(client, where, "a", b"old")
    uploads = server.data_dir / "uploads"
    uploads.rename(server.content_dir / "away")
    try:
        for path in ("files/a", "archive"):
            refused(client.put(f"/api/sessions/{where}/{path}", content=bytes(MIB)), 503, "could not be kept")
    finally:
        (server.content_dir / "away").rename(uploads)
    assert get(client, where, "a").content == b"old"
    [file] = [
        path for path in (server.content_dir / "blobs").rglob("*") if path.name == hashlib.sha256(b"old").hexdigest()
    ]
    file.unlink()
    refused(get(client, where, "a"), 503, "could not be read")


def is_told(server: Server, what: str) -> bool:
    return what in server.log


@pytest.mark.one_host(
    "in a cluster all that a capsule will read is renewed before it is sent, and what is missing a 503"
)
def test_a_disk_that_fails_while_much_is_sent_breaks_off(own_server: MakeServer) -> None:
    """Archives and capsules, of which nobody can take what came for all of it."""
    server = own_server()
    large = os.urandom(2 * MIB)
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        put(client, "s", "a", large)
        put(client, "s", "b", b"lost")
        [file] = (server.content_dir / "blobs").rglob(hashlib.sha256(b"lost").hexdigest())
        file.unlink()
        for path in ("archive", "archive?format=tar.gz", "archive?format=zip", "capsule"):
            with client.stream("GET", f"/api/sessions/s/{path}") as answer:
                assert answer.status_code == 200
                with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                    list(answer.iter_raw())
            request = answer.headers["x-request-id"]
            assert eventually(partial(is_told, server, request))
            [line] = [line for line in server.log.splitlines() if request in line]
            assert "request_failed" in line
            assert "status=503" in line
            assert "could not be read" in line
    assert "Traceback" not in server.log
    assert "already started" not in server.log


def send_and_fetch_in_flat_memory(server: Server, size: int) -> None:
    piece = os.urandom(MIB)

    def pieces() -> Iterator[bytes]:
        for number in range(size // MIB):
            yield number.to_bytes(8, "big") + piece[8:]

    expected = hashlib.sha256()
    for each in pieces():
        expected.update(each)
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "big"})
        put(client, "big", "warm", bytes(MIB))
        before = server.reset_peak()
        answer = client.put("/api/sessions/big/files/a", content=pieces(), timeout=600)
        assert answer.json() == {"path": "a", "size": size}
        assert answer.headers["etag"] == f'"{expected.hexdigest()}"'
        for path in ("files/a", "archive"):
            got, digest = 0, hashlib.sha256()
            with client.stream("GET", f"/api/sessions/big/{path}") as stream:
                for each in stream.iter_bytes(MIB):
                    got += len(each)
                    digest.update(each)
            assert got >= size
            assert path == "archive" or digest.hexdigest() == expected.hexdigest()
        with client.stream("GET", "/api/sessions/big/archive") as stream:
            client.put("/api/sessions/big/archive", content=stream.iter_bytes(MIB), timeout=600).raise_for_status()
        assert server.peak_resident_bytes - before < 64 * MIB


def test_128_mib_up_and_down_in_flat_memory(own_server: MakeServer) -> None:
    send_and_fetch_in_flat_memory(own_server(), 128 * MIB)
