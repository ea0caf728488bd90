"""Names of versions, and files of old versions, over HTTP."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile

import httpx
import pytest

from era.wire import files, versions
from tests.api.answers import checked, refused
from tests.api.capsule_api import export_capsule, import_capsule
from tests.api.live import process, start
from tests.api.test_versions import HEADER_KEYS, setting
from tests.conftest import MakeServer, MakeSession, Run, eventually


def name(client: httpx.Client, where: str, n: int, name: object) -> httpx.Response:
    return client.put(f"/api/sessions/{where}/versions/{n}/name", json={"name": name})


def names(client: httpx.Client, where: str) -> dict[int, str | None]:
    """The names of the versions that are kept, by number."""
    listed = client.get(f"/api/sessions/{where}/versions").json()["versions"]
    return {each["version"]: each["name"] for each in listed}


def test_a_version_has_a_name_until_it_is_taken_from_it(client: httpx.Client, session: MakeSession) -> None:
    where = session(data={"n": 1})
    client.patch(f"/api/sessions/{where}", json={"data": {"n": 2}})
    made = checked(name(client, where, 1, "the first ❶"), versions.VersionHeader, HEADER_KEYS)
    assert (made["version"], made["name"], made["cause"]) == (1, "the first ❶", "create")
    assert names(client, where) == {2: None, 1: "the first ❶"}
    assert client.get(f"/api/sessions/{where}/versions/1").json()["name"] == "the first ❶"
    assert refused(name(client, where, 2, "the first ❶"), 409, "Version 1")["code"] == "conflict"
    assert name(client, where, 1, "the first ❶").status_code == 200
    assert name(client, where, 1, "other").json()["name"] == "other"
    assert name(client, where, 2, "the first ❶").status_code == 200
    assert client.get(f"/api/sessions/{where}").json()["version"] == 2, "a name makes no version"
    url = f"/api/sessions/{where}/versions/2/name"
    checked(client.delete(url), versions.NameDeletedAnswer, {"success", "version"})
    assert refused(client.delete(url), 404, "no name")["code"] == "no_such_name"
    assert names(client, where) == {2: None, 1: "other"}
    for bad in ("", "x" * 129, "a\nb", "\x00", "\x9b", "\ud800", 1, None):
        refused(name(client, where, 1, bad) if bad != "\ud800" else _raw(client, where), 400)
    assert name(client, where, 1, "x" * 128).status_code == 200
    for number, code in ((3, "no_such_version"), (1 << 62, "no_such_version")):
        assert refused(name(client, where, number, "n"), 404)["code"] == code
        assert refused(client.delete(f"/api/sessions/{where}/versions/{number}/name"), 404)["code"] == code
    refused(name(client, "nobody", 1, "n"), 404, "nobody")


def _raw(client: httpx.Client, where: str) -> httpx.Response:
    """A name that is half of a character."""
    headers = {"Content-Type": "application/json"}
    return client.put(f"/api/sessions/{where}/versions/1/name", content=b'{"name": "\\ud800"}', headers=headers)


@pytest.mark.parametrize("weakness", ["", "from era.core import history; history.DISKS = 1000"], ids=["", "weakened"])
def test_a_history_holds_four_times_the_session_s_disk_where_nothing_else_is_set(
    own_server: MakeServer, weakness: str
) -> None:
    with own_server(weakness=weakness).client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s", "limits": {"disk_mb": 1}})
        for _ in range(10):
            put = client.put("/api/sessions/s/files/f", content=os.urandom(900_000))
            assert put.is_success, put.text
        held = len(names(client, "s"))
        assert held == (11 if weakness else 4), "five would hold over 4 MiB"


def test_named_versions_are_kept(own_server: MakeServer) -> None:
    server = own_server(versions_kept="2", history_mb="1")
    fill = "import os; open('f', 'wb').write(os.urandom(300_000))"
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        client.post("/api/sessions/s/run", json={"code": setting({"n": 1}, f="first")})
        name(client, "s", 2, "first")
        for n in range(4):
            client.patch("/api/sessions/s", json={"data": {"n": n}})
        assert names(client, "s") == {6: None, 5: None, 2: "first"}
        hint = refused(client.get("/api/sessions/s/versions/3"), 404)["hint"]
        assert "ERA_VERSIONS_KEPT" in hint
        assert "ERA_HISTORY_MB" in hint
        for _ in range(3):
            version = client.post("/api/sessions/s/run", json={"code": fill}).json()["state"]["version"]
            last = name(client, "s", version, f"v{version}")
        assert last.status_code == 200
        version = client.post("/api/sessions/s/run", json={"code": fill}).json()["state"]["version"]
        body = refused(name(client, "s", version, "too much"), 413, "history", "ERA_HISTORY_MB")
        assert body["code"] == "too_large"
        assert name(client, "s", 7, "renamed").status_code == 200
        client.delete("/api/sessions/s/versions/8/name")
        assert refused(client.get("/api/sessions/s/versions/8"), 404)["code"] == "version_gone"
        assert name(client, "s", version, "fits").status_code == 200
        seen = names(client, "s")
    server.stop()
    server.start()
    with server.client() as client:
        assert names(client, "s") == seen == {10: "fits", 9: "v9", 7: "renamed", 2: "first"}
        assert client.get("/api/sessions/s/versions/2/files/f").text == "first"
        assert client.post("/api/sessions/s/rollback", json={"version": 2}).json()["data"] == {"n": 1}
        # They move with a capsule.
        capsule = client.get("/api/sessions/s/capsule").content
        headers = {"Content-Type": "application/x-tar"}
        assert client.post("/api/sessions/import?id=t", content=capsule, headers=headers).status_code == 201
        assert names(client, "t") == names(client, "s") == {11: None, **seen}
        assert client.post("/api/sessions/t/duplicate", json={"id": "u", "from_version": 2}).status_code == 201
        assert names(client, "u") == {1: None}


def test_a_gap_that_checkpoints_left_takes_no_version_that_loses_its_name(own_server: MakeServer) -> None:
    with own_server(history_mb="1", isolation="bubblewrap").client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})

        def put(size: int) -> int:
            answer = client.put("/api/sessions/s/files/f", content=os.urandom(size))
            return int(answer.json().get("versions_dropped", 0))

        put(200_000)
        put(200_000)
        assert name(client, "s", 3, "n").status_code == 200
        start(client, "s", "head -c 300000 /dev/urandom > f; echo; exec sleep 1000", tag="p")
        assert eventually(lambda: process(client, "s", "p")["output_bytes"])
        assert client.post("/api/sessions/s/checkpoint").json()["version"] == 4
        assert (put(250_000), put(250_000)) == (0, 1)
        assert set(names(client, "s")) == {1, 2, 3, 5, 6}, "the checkpoint went first"
        assert client.delete("/api/sessions/s/versions/3/name").status_code == 200
        assert set(names(client, "s")) == {1, 2, 3, 5, 6}
        import_capsule(client, export_capsule(client, "s"), "copy")
        assert set(names(client, "copy")) == {1, 2, 3, 5, 6}


def test_a_capsule_brings_no_more_than_a_history_may_hold(
    client: httpx.Client, session: MakeSession, own_server: MakeServer
) -> None:
    where = session()
    for _ in range(6):
        client.put(f"/api/sessions/{where}/files/f", content=os.urandom(300_000))
    assert [name(client, where, n, f"n{n}").status_code for n in (2, 3)] == [200, 200]
    fits = client.get(f"/api/sessions/{where}/capsule").content
    assert name(client, where, 4, "n4").status_code == name(client, where, 5, "n5").status_code == 200
    too_much = client.get(f"/api/sessions/{where}/capsule").content
    headers = {"Content-Type": "application/x-tar"}
    with own_server(history_mb="1").client() as other:
        answer = other.post("/api/sessions/import?id=s", content=too_much, headers=headers)
        refused(answer, 413, "named versions", "history")
        refused(other.get("/api/sessions/s"), 404)
        assert other.post("/api/sessions/import?id=s", content=fits, headers=headers).status_code == 201
        assert names(other, "s") == {7: None, 3: "n3", 2: "n2"}


def test_answers_say_how_many_versions_were_dropped(own_server: MakeServer) -> None:
    server = own_server(history_mb="1")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        files_url, archive = "/api/sessions/s/files/f", io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            member = tarfile.TarInfo("g")
            member.size = 500_000
            tar.addfile(member, io.BytesIO(bytes(500_000)))
        answers = [client.put(files_url, content=bytes([n]) * 400_000) for n in range(4)]
        bodies = [checked(answer, files.FileWrittenAnswer, set(answer.json())) for answer in answers]
        assert [body.get("versions_dropped") for body in bodies] == [None, None, 2, 1]
        assert set(names(client, "s")) == {4, 5}
        assert client.get("/api/sessions/s/files/f").content == bytes([3]) * 400_000
        headers = {"Content-Type": "application/x-tar"}
        put = client.put("/api/sessions/s/archive", content=archive.getvalue(), headers=headers).json()
        assert put["versions_dropped"] > 0
        run = {"code": "import os; open('f', 'wb').write(os.urandom(700_000)); os.remove('g')"}
        key = {"Idempotency-Key": "k"}
        outcome = client.post("/api/sessions/s/run", json=run, headers=key)
        assert outcome.json()["state"]["versions_dropped"] > 0
        assert client.post("/api/sessions/s/run", json=run, headers=key).content == outcome.content
        record = client.get(f"/api/sessions/s/runs/{outcome.json()['run_id']}").json()
        assert record["state"] == outcome.json()["state"]


def test_files_of_an_old_version_are_read_like_current_ones(
    client: httpx.Client, session: MakeSession, run: Run
) -> None:
    where = session()
    url = f"/api/sessions/{where}"
    run(where, "import os; os.mkdir('d'); open('d/ä\\n', 'w').write('0123456789'); open('b', 'w').write('old')")
    then = client.get(f"{url}/files").json()
    etag = client.get(f"{url}/files/b").headers["ETag"]
    run(where, "import os, shutil; shutil.rmtree('d'); open('b', 'w').write('new'); open('c', 'w').close()")
    old = f"{url}/versions/2"
    checked(client.get(f"{old}/files"), files.FilesAnswer, set(then))
    assert client.get(f"{old}/files").json() == then
    first = client.get(f"{old}/files?limit=1").json()
    rest = client.get(f"{old}/files", params={"limit": 1, "cursor": first["next_cursor"]}).json()
    assert first["files"] + rest["files"] == then["files"]
    assert [each["path"] for each in client.get(f"{old}/files?prefix=d/").json()["files"]] == ["d/ä\n"]
    assert client.get(f"{url}/versions/1/files").json()["files"] == []

    answer = client.get(f"{old}/files/b")
    assert (answer.text, answer.headers["ETag"]) == ("old", etag)
    assert answer.headers["Content-Security-Policy"].startswith("sandbox")
    assert client.get(f"{old}/files/b", headers={"If-None-Match": etag}).status_code == 304
    part = client.get(f"{old}/files/d/%C3%A4%0A", headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.text, part.headers["Content-Range"]) == (206, "234", "bytes 2-4/10")
    assert client.head(f"{old}/files/b").headers["Content-Length"] == "3"
    refused(client.get(f"{old}/files/b", headers={"Range": "bytes=9-"}), 416)
    refused(client.get(f"{old}/files/c"), 404, "c")
    refused(client.get(f"{old}/files/d"), 409)
    refused(client.get(f"{old}/files/../b".replace("..", "%2e%2e")), 400)
    assert client.put(f"{old}/files/b", content=b"").status_code == 405
    assert client.delete(f"{old}/files/b").status_code == 405

    with tarfile.open(fileobj=io.BytesIO(client.get(f"{old}/archive").content)) as tar:
        assert sorted(member.name for member in tar if member.isfile()) == ["b", "d/ä\n"]
    zipped = client.get(f"{old}/archive?format=zip")
    assert f'filename="{where}-2.zip"' in zipped.headers["Content-Disposition"]
    assert zipfile.ZipFile(io.BytesIO(zipped.content)).read("b") == b"old"
    for path in ("files", "files/b", "archive"):
        assert refused(client.get(f"{url}/versions/4/{path}"), 404)["code"] == "no_such_version"
        refused(client.get(f"{url}/versions/0/{path}"), 400)
        refused(client.get(f"/api/sessions/nobody/versions/1/{path}"), 404, "nobody")
