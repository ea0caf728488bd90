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
from tests.api.test_versions import HEADER_KEYS, setting
from tests.conftest import MakeServer, MakeSession, Run


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


@pytest.mark.parametrize(
    "weakness", ["", "from era.core.sessions import versions; versions.DISKS = 1000"], ids=["", "weakened"]
)
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
