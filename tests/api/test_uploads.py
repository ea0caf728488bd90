"""Uploads of files, archives and capsules that stall, are slow, or are too many at a time."""

from __future__ import annotations

import http.client
import io
import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import capsules
from tests.api.answers import refused
from tests.api.owners import OPERATOR_KEY, client_with_key, new_key
from tests.conftest import MakeServer, Server, built_with, eventually
from tests.soaking import soak_the_rest

MIB = 1 << 20


def archive(size: int) -> bytes:
    """A tar archive of one random file of this size."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("in/archive")
        member.size = size
        tar.addfile(member, io.BytesIO(os.urandom(size)))
    return buffer.getvalue()


def capsule(size: int) -> bytes:
    """A capsule of a session with one random file of this size."""
    content = os.urandom(size)
    return capsules.of_files(capsules.tree(capsules.file("f", content)), content)


KINDS = {
    "file": ("PUT", "/api/sessions/s/files/f", os.urandom),
    "archive": ("PUT", "/api/sessions/s/archive", archive),
    "capsule": ("POST", "/api/sessions/import?id=made", capsule),
}
RUN = ("POST", "/api/sessions/s/run", lambda _: b'{"code": "1"}')
"""The same of a body that is read as a whole."""


class Upload:
    """A request that is sent piece by piece."""

    def __init__(self, server: Server, kind: str, size: int = 3 * MIB, to: str = "s", key: str = "") -> None:
        method, path, make = KINDS.get(kind, RUN)
        path = path.replace("/s/", f"/{to}/")
        self.content: bytes = make(size)
        self._sent = 0
        self._connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
        self._connection.putrequest(method, path)
        self._connection.putheader("Content-Length", str(len(self.content)))
        self._connection.putheader("Content-Type", "application/json" if kind == "run" else "application/x-tar")
        if key:
            self._connection.putheader("Authorization", f"Bearer {key}")
        self._connection.endheaders()

    def send(self, size: int) -> None:
        self._connection.send(self.content[self._sent : self._sent + size])
        self._sent += size

    def answer(self) -> httpx.Response:
        """The answer, whether or not all was sent."""
        with closing(self._connection):
            answer = self._connection.getresponse()
            return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())

    def finish(self) -> httpx.Response:
        self.send(len(self.content))
        return self.answer()


FIVE_UPLOADS = built_with("era.parts.Slots", how_many=5)


@contextmanager
def of_three_uploads(directory: Path, kind: type[Server], weakness: str = "") -> Iterator[Server]:
    """A server that accepts three large uploads of one owner at a time."""
    server = kind(directory, {"ERA_GRACE_SECONDS": "0"}, weakness=FIVE_UPLOADS + weakness).start()
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, kind_of_server: type[Server]) -> Iterator[Server]:
    """It waits ten seconds for the next piece of a body."""
    directory = tmp_path_factory.mktemp("impatient") / "data"
    with of_three_uploads(directory, kind_of_server, built_with("era.api.http.Guard", idle_seconds=10)) as server:
        yield server


@pytest.fixture
def server(impatient: Server) -> Iterator[Server]:
    with impatient.client() as client:
        assert client.post("/api/sessions", json={"language": "python", "session_id": "s"}).status_code == 201
        yield impatient
        assert client.delete("/api/sessions").status_code == 200
    assert eventually(lambda: list((impatient.data_dir / "uploads").iterdir()) == [])


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def session(client: httpx.Client, name: str = "s") -> dict[str, Any]:
    body: dict[str, Any] = client.get(f"/api/sessions/{name}").json()
    return body


@pytest.mark.parametrize("sent", soak_the_rest([2 * MIB, 0], 1))
def test_a_stalled_body_is_408(server: Server, client: httpx.Client, sent: int) -> None:
    begun = time.monotonic()
    uploads = [Upload(server, kind) for kind in KINDS]
    for upload in uploads:
        upload.send(sent)
    run = Upload(server, "run")
    run.send(9)
    for upload in [*uploads, run]:
        answer = upload.answer()
        refused(answer, 408, "10 seconds")
        assert answer.json()["code"] == "too_slow"
        assert answer.headers["connection"] == "close"
    assert 10 <= time.monotonic() - begun < 120
    assert (session(client)["version"], session(client)["file_count"]) == (1, 0)
    assert client.get("/api/sessions/made").status_code == 404
    assert eventually(lambda: list((server.data_dir / "uploads").iterdir()) == [])


def test_an_upload_that_is_slow_goes_on_and_outlasts_its_sessions_ttl(server: Server, client: httpx.Client) -> None:
    for name in ("s", "t", "witness"):
        client.delete(f"/api/sessions/{name}?purge=true")
        client.post("/api/sessions", json={"language": "python", "session_id": name, "ttl": 12})
    uploads = [Upload(server, kind, to=to) for kind, to in (("file", "s"), ("archive", "t"), ("capsule", "s"))]
    for _ in range(4):
        for upload in uploads:
            upload.send(len(upload.content) // 5)
        time.sleep(3.5)
    assert client.get("/api/sessions/witness").status_code in (404, 410), "nobody called this one"
    for upload in uploads:
        answer = upload.finish()
        assert answer.status_code in (200, 201), answer.text
    assert [session(client, name)["file_count"] for name in ("s", "t", "made")] == [1, 1, 1]


def begin_uploads(server: Server, count: int, key: str = "") -> list[Upload]:
    """Begin uploads; returns when the server has a part of each."""
    uploads = [Upload(server, "file", key=key) for _ in range(count)]
    for upload in uploads:
        upload.send(2 * MIB)
    assert eventually(lambda: len(list((server.data_dir / "uploads").iterdir())) == count)
    return uploads


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory, kind_of_server: type[Server]) -> Iterator[Server]:
    """It waits for as long as servers do."""
    with of_three_uploads(tmp_path_factory.mktemp("patient") / "data", kind_of_server) as server:
        yield server


_OF_WHO_IS_ASKED = pytest.mark.one_host("a capsule is held by the host that is asked, the others by the session's home")


@pytest.mark.parametrize("kind", ["file", "archive", pytest.param("capsule", marks=_OF_WHO_IS_ASKED)])
def test_too_many_large_uploads_at_a_time_are_503(patient: Server, kind: str) -> None:
    with patient.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"}).raise_for_status()
        method, path, make = KINDS[kind]
        first, *others = begin_uploads(patient, 3)
        headers = {"Content-Type": "application/x-tar"}
        answer = client.request(method, path, content=make(2 * MIB), headers=headers)
        refused(answer, 503, "3 large uploads of this owner")
        assert (answer.json()["code"], answer.headers["retry-after"]) == ("too_many_uploads", "5")
        for small in ("a", "b", "c"):
            answer = client.put(f"/api/sessions/s/files/{small}", content=b"small")
            assert answer.status_code == 200, "what is small can always be put"
        assert first.finish().status_code == 200
        answer = client.request(method, path, content=make(2 * MIB), headers=headers)
        assert answer.status_code in (200, 201), answer.text
        assert [other.finish().status_code for other in others] == [200, 200]
        client.delete("/api/sessions").raise_for_status()
    assert eventually(lambda: list((patient.data_dir / "uploads").iterdir()) == [])


ONE_COUNTER = """
from era.core.concurrency.shares import Shares
Shares.left = lambda self, holder: self.most - 1 - self.taken
"""
"""Whoever comes first gets what there is."""

_WEAKENED = pytest.mark.one_host("it calls a server that is weakened")


@pytest.mark.parametrize(
    ("weakness", "most"), [("", 3), pytest.param(ONE_COUNTER, 5, marks=_WEAKENED)], ids=["", "weakened"]
)
def test_stalled_uploads_of_one_owner_leave_some_to_others(own_server: MakeServer, weakness: str, most: int) -> None:
    patient = built_with("era.api.http.Guard", idle_seconds=600)
    server = own_server(weakness=FIVE_UPLOADS + patient + weakness, api_key=OPERATOR_KEY)
    keys = [new_key(server, owner)["key"] for owner in ("mallory", "lovelace")]
    clients = [client_with_key(server, key) for key in keys]
    for client, name in zip(clients, ("s", "hers"), strict=True):
        client.post("/api/sessions", json={"language": "python", "session_id": name}).raise_for_status()
    mallorys, hers = clients
    stalled = begin_uploads(server, most, keys[0])
    refusal = mallorys.put("/api/sessions/s/files/more", content=bytes(2 * MIB))
    refused(refusal, 503, f"{most} large uploads of this owner", "half")
    answer = hers.put("/api/sessions/hers/files/f", content=bytes(2 * MIB))
    capsule_of_hers = Upload(server, "capsule", key=keys[1]).finish()
    if weakness:
        refused(answer, 503, "5 large uploads of all owners")
        assert capsule_of_hers.status_code == 503
    else:
        assert (answer.status_code, capsule_of_hers.status_code) == (200, 201)
    assert [upload.finish().status_code for upload in stalled] == [200] * most
    for client in clients:
        client.close()
