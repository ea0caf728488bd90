"""Sessions that are woken: what they left is there, as before, and is theirs alone."""

from __future__ import annotations

import json
import os
import signal

import httpx
import pytest

from tests.conftest import MakeServer, Server, eventually
from tests.soaking import soak_the_rest

MANY, FEW = 2100, 105  # so many that a directory keeps its owner, and so few that it gets another one
DIRECTORIES = 21


def fill(files: int) -> str:
    """A program that leaves so many files, and some that are odd."""
    return f"""
import os
import signal
for number in range({files}):
    os.makedirs(f"d{{number % {DIRECTORIES}}}", exist_ok=True)
    open(f"d{{number % {DIRECTORIES}}}/{{number}}", "w").write(str(number))
os.link("d1/1", "second")
os.mkdir("shut"); open("shut/in", "w").write("in"); os.chmod("shut", 0o500)
for name in ("sitecustomize", "usercustomize", "json", "os", "workspace", "supervisor", "landlock", "processes"):
    open(f"{{name}}.py", "w").write("print('the session’s own', __name__)\\nraise SystemExit(9)")
open("pyvenv.cfg", "w").write("home = /workspace")
os.mkdir("encodings"); open("encodings/__init__.py", "w").write("raise SystemExit(9)")
"""


def look(files: int) -> str:
    """A program that sees whether they are there, and its own."""
    return f"""
import subprocess, sys
total = 0
for number in range({files}):
    total += open(f"d{{number % {DIRECTORIES}}}/{{number}}").read() == str(number)
print(total, oct(__import__("posix").stat("shut").st_mode), open("shut/in").read())
open("d2/2", "w").write("mine")  # everything is this sandbox's own
print(__import__("posix").stat("d2/2").st_uid == __import__("posix").getuid())
"""


def _run(client: httpx.Client, where: str, code: str) -> str:
    answer = client.post(f"/api/sessions/{where}/run", json={"code": code, "timeout": 300}, timeout=400)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "ok", answer.text
    return str(answer.json()["stdout"])


def _put_away(server: Server, client: httpx.Client, kept: int) -> None:
    """Wait until the session has lost its sandbox, and so many directories are left of such."""
    assert _run(client, "other", "print(1)") == "1\n"
    assert eventually(lambda: len(list((server.data_dir / "live").glob("sb-*"))) == 1 + kept)


files_left = pytest.mark.parametrize("files", soak_the_rest([FEW, MANY], 1))


@pytest.fixture
def server(own_server: MakeServer) -> Server:
    server = own_server(max_warm="1")
    with server.client() as client:
        for name in ("s", "other"):
            assert client.post("/api/sessions", json={"language": "python", "session_id": name}).status_code == 201
    return server


def test_many_files(server: Server) -> None:
    with server.client() as client:
        _run(client, "s", fill(MANY))
        for turn in range(2):
            _put_away(server, client, 1)
            assert _run(client, "s", look(MANY)) == f"{MANY - turn} 0o40500 in\nTrue\n"
        listed = client.get("/api/sessions/s/files", params={"prefix": "d2/2"}).json()
        assert [file["size"] for file in listed["files"] if file["path"] == "d2/2"] == [4], json.dumps(listed)[:500]
        assert "directory_not_reused" not in server.log
        uids = {run["enforced"]["uid"] for run in client.get("/api/sessions/s/runs").json()["runs"]}
        assert len(uids) == 1, "its files keep their owner"
        assert uids.isdisjoint(
            run["enforced"]["uid"] for run in client.get("/api/sessions/other/runs").json()["runs"]
        ) or (os.geteuid() != 0)


@files_left
def test_a_second_name_of_a_file_is_not_overlooked(server: Server, files: int) -> None:
    """A session that was woken is watched as it was before: a write by one name changes the other."""
    with server.client() as client:
        _run(client, "s", fill(files))
        _put_away(server, client, 1)
        _run(client, "s", "open('second', 'w').write('both')")
        for path in ("second", "d1/1"):
            assert client.get(f"/api/sessions/s/files/{path}").text == "both"


@files_left
def test_nothing_is_trusted_after_a_kill(server: Server, files: int) -> None:
    with server.client() as client:
        _run(client, "s", fill(files))
        _put_away(server, client, 1)
    (directory,) = (each for each in (server.data_dir / "live").glob("sb-*") if (each / "workspace/d1").exists())
    server.stop(signal.SIGKILL)
    (directory / "workspace" / "d1" / "1").write_text("not committed")
    server.start()
    with server.client() as client:
        assert not directory.exists()
        assert _run(client, "s", look(files)) == f"{files} 0o40500 in\nTrue\n"
