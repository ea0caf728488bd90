"""Watches of sessions that aren't live over HTTP: they follow the versions."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import httpx
import pytest

from tests.api.answers import refused
from tests.api.files_api import put
from tests.api.live import start
from tests.api.test_watch_files import watch
from tests.conftest import MakeSession, Run, Server


def is_live(client: httpx.Client, where: str) -> bool:
    return bool(client.get(f"/api/sessions/{where}").json()["status"] == "live")


def test_changes_of_runs_and_calls_are_reported(
    client: httpx.Client, session: MakeSession, server: Server, run: Run
) -> None:
    where = session()
    assert put(client, where, "d/first", b"").is_success
    first = client.get(f"/api/sessions/{where}").json()["version"]
    with watch(server, where, recursive=True) as seen:
        assert put(client, where, "d/e/put", b"1").is_success
        for path in ("d/e", "d/e/put"):
            assert seen.has(type="create", path=path)
        run(where, "import os; os.remove('d/e/put'); os.rmdir('d/e'); open('d/made', 'w').write('1')")
        assert seen.has(type="remove", path="d/e/put")
        assert seen.has(type="remove", path="d/e")
        assert seen.has(type="create", path="d/made")
        run(where, "open('d/made', 'w').write('22')")
        assert seen.has(type="write", path="d/made")
        run(where, "import os; os.chmod('d/made', 0o700)")
        assert seen.has(type="chmod", path="d/made")
        assert not is_live(client, where), "a watch makes nothing live"
        assert client.post(f"/api/sessions/{where}/rollback", json={"version": first}).is_success
        assert seen.has(type="remove", path="d/made")


def test_watch_ends_with_an_overflow_when_the_session_becomes_live(
    client: httpx.Client, session: MakeSession, server: Server
) -> None:
    where = session()
    with watch(server, where) as seen:
        start(client, where, "echo 1 > missed; sleep 1000")
        assert seen.until(lambda each: each["type"] == "overflow")
        assert seen.coming.get(timeout=60) is None, "the stream has ended"
    with watch(server, where, after=seen.last) as live:
        assert live.until(lambda each: each["type"] == "gap")[-1]["from"] == seen.last + 1
        assert put(client, where, "new", b"").is_success
        assert live.has(type="create", path="new")


def test_watch_ends_when_the_session_is_deleted(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    with watch(server, where) as seen:
        assert client.delete(f"/api/sessions/{where}").is_success
        assert seen.until(lambda each: each["type"] == "error")[-1]["code"] == "not_found"


@pytest.mark.parametrize("count", [5000, 20_000])
def test_step_of_many_changes_is_reported_or_an_overflow(
    client: httpx.Client, session: MakeSession, server: Server, count: int
) -> None:
    where = session()
    with io.BytesIO() as packed:
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for number in range(count):
                archive.addfile(tarfile.TarInfo(f"d/{number}"))
        content = packed.getvalue()
    with watch(server, where, recursive=True) as seen:
        answer = client.put(f"/api/sessions/{where}/archive", content=content, timeout=60)
        assert answer.is_success, answer.text
        assert seen.until(lambda each: each["type"] == "overflow" or each.get("path", "").startswith("d/"))
        assert put(client, where, "z", b"").is_success
        assert seen.has(type="create", path="z")
        kinds = [each["type"] for each in seen.all]
        assert kinds.count("overflow") == (1 if count == 20_000 else 0)
        assert kinds.count("create") == (1 if count == 20_000 else count + 2)
        assert "gap" not in kinds


@pytest.mark.parametrize("live", [False, True])
def test_dot_is_the_working_directory_everywhere(client: httpx.Client, session: MakeSession, live: bool) -> None:
    where = session()
    api = f"/api/sessions/{where}"
    assert put(client, where, "d/file", b"1").is_success
    if live:
        start(client, where, "sleep 1000")

    def json(answer: httpx.Response) -> Any:
        assert answer.is_success, answer.text
        return answer.json()

    for prefix in ("", ".", "./"):
        assert [each["path"] for each in json(client.get(f"{api}/files", params={"prefix": prefix}))["files"]] == [
            "d/file"
        ]
    for path in ("", "%2E", "%2e/"):
        found = json(client.get(f"{api}/stat/{path}"))
        assert (found["path"], found["type"]) == ("", "dir")
    for path in ("", "."):
        assert json(client.post(f"{api}/mkdir", json={"path": path}))["created"] is False
        for names in ({"from": path, "to": "x"}, {"from": "d", "to": path}):
            answer = client.post(f"{api}/move", json=names)
            assert refused(answer, 400)["code"] == "bad_path"
            assert "working directory" in answer.json()["error"]
        assert refused(client.post(f"{api}/links", json={"path": path}), 400)["code"] == "bad_path"
    for answer in (client.put(f"{api}/files/%2E", content=b""), client.get(f"{api}/files/%2E")):
        assert refused(answer, 400)["code"] == "bad_path", "no file has this name"
    assert client.get("/api/sessions/none-such/stat/%2E").status_code == 404
