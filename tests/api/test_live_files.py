"""The files of a live session over HTTP, on real sandboxes: what processes and clients see of each other's files at
once, what stays, and what hostile processes can do about it."""

from __future__ import annotations

import io
import os
import signal
import tarfile
import threading
import time
from typing import Any

import httpx
import pytest

from tests.api.answers import refused
from tests.api.files_api import MIB, delete, get, listed, names, put
from tests.api.live import ended, output, process, start
from tests.conftest import MakeServer, MakeSession, Run, Server, eventually

SWAP = """
import ctypes, os
rename = ctypes.CDLL(None).renameat2
os.mkdir("/tmp/outside"); os.mkdir("d"); os.mkdir("aside"); os.symlink("/tmp/outside", "aside/link")
open("ready", "w").close()
while True:
    rename(-100, b"d", -100, b"aside/link", 2)
"""
"""Exchanges the directory `d` for a link all the time."""


def stat(client: httpx.Client, where: str, path: str) -> httpx.Response:
    return client.get(f"/api/sessions/{where}/stat/{path}")


def post(client: httpx.Client, where: str, call: str, **body: Any) -> httpx.Response:
    return client.post(f"/api/sessions/{where}/{call}", json=body)


def shell(client: httpx.Client, where: str, command: str) -> bytes:
    """What a process of the session says to this command."""
    name = start(client, where, command)
    ended(client, where, name)
    return output(client, where, name)


@pytest.fixture
def where(client: httpx.Client, session: MakeSession) -> str:
    """A live session with a process that goes on."""
    name = session()
    start(client, name, "sleep 1000", tag="sleeper")
    return name


def test_a_client_and_processes_see_each_others_files_at_once(client: httpx.Client, where: str) -> None:
    assert shell(client, where, "mkdir d; printf one > d/a; ln -s a d/l; chmod 640 d/a; echo made") == b"made\n"
    answer = get(client, where, "d/a")
    assert (answer.status_code, answer.content) == (200, b"one")
    found = stat(client, where, "d/a").json()
    assert (found["type"], found["mode"], found["size"]) == ("file", "0640", 3)
    assert answer.headers["ETag"] == f'"{found["etag"]}"'
    assert get(client, where, "d/a", Range="bytes=1-").content == b"ne"
    assert get(client, where, "d/a", **{"If-None-Match": answer.headers["ETag"]}).status_code == 304
    assert [(file["path"], file["type"], file["link"]) for file in listed(client, where)["files"]] == [
        ("d/a", "file", None),
        ("d/l", "link", "a"),
    ]
    written = put(client, where, "d/a", b"two")
    assert written.is_success, written.text
    assert written.headers["ETag"] == get(client, where, "d/a").headers["ETag"]
    assert put(client, where, "x/y/new", b"3").is_success
    assert shell(client, where, "cat d/a x/y/new; stat -c ' %a' d/a") == b"two3 640\n"
    assert post(client, where, "mkdir", path="made/here").json()["created"]
    assert not post(client, where, "mkdir", path="made/here").json()["created"]
    assert post(client, where, "move", **{"from": "d/a", "to": "made/b"}).is_success
    assert delete(client, where, "x?recursive=true").is_success
    assert shell(client, where, "cat made/b; ls; ls made") == b"two" + b"d\nmade\nb\nhere\n"
    assert names(client, where) == ["d/l", "made/b"]
    assert process(client, where, "sleeper")["status"] == "running"


def test_each_change_is_durable_when_it_is_answered(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        start(client, "s", "sleep 1000")
        for name in ("a", "b", "c"):
            assert put(client, "s", name, name.encode()).is_success
        assert delete(client, "s", "b").is_success
        assert post(client, "s", "move", **{"from": "c", "to": "e"}).is_success
        versions = client.get("/api/sessions/s/versions").json()["versions"]
        assert {version["cause"] for version in versions[:5]} <= {"files", "loose_checkpoint"}
        os.kill(server.pid, signal.SIGKILL)
    assert server.process is not None
    server.process.wait()
    server.start()
    with server.client() as client:
        assert names(client, "s") == ["a", "e"]
        assert get(client, "s", "e").content == b"c"


def test_a_large_file_goes_both_ways(client: httpx.Client, where: str) -> None:
    content = os.urandom(MIB) * 20
    assert put(client, where, "large", content).is_success
    answer = get(client, where, "large")
    assert answer.content == content
    assert stat(client, where, "large").json()["etag"] is None, "too large to be hashed for a look"
    assert get(client, where, "large", **{"If-None-Match": answer.headers["ETag"]}).status_code == 304
    assert shell(client, where, "printf x >> large; stat -c %s large") == b"%d\n" % (20 * MIB + 1)
    assert get(client, where, "large", **{"If-None-Match": answer.headers["ETag"]}).status_code == 200
    changed = put(client, where, "large", b"", **{"If-Match": answer.headers["ETag"]})
    assert refused(changed, 412)


def test_preconditions_are_about_the_file_of_this_moment(client: httpx.Client, where: str) -> None:
    first = put(client, where, "a", b"1").headers["ETag"]
    assert shell(client, where, "printf 2 > a; echo") == b"\n"
    assert refused(put(client, where, "a", b"3", **{"If-Match": first}), 412)
    assert refused(put(client, where, "a", b"3", **{"If-None-Match": "*"}), 412)
    assert refused(delete(client, where, "a", **{"If-Match": first}), 412)
    assert put(client, where, "a", b"3", **{"If-Match": get(client, where, "a").headers["ETag"]}).is_success


def test_the_archive_of_a_live_session_is_of_this_moment(client: httpx.Client, where: str) -> None:
    shell(client, where, "mkdir d; printf one > d/a")
    archive = client.get(f"/api/sessions/{where}/archive").content
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert sorted(tar.getnames()) == ["d", "d/a"]


def test_a_put_waits_for_the_run_under_way(client: httpx.Client, where: str, run: Run) -> None:
    code = (
        "import os, time\nopen('go', 'w').close()\nwhile not os.path.exists('end'): time.sleep(0.02)\nos.remove('end')"
    )
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(run(where, code)))
    thread.start()
    assert eventually(lambda: get(client, where, "go").status_code == 200), "reads wait for nobody"
    assert (
        refused(client.put(f"/api/sessions/{where}/files/a?wait=false", content=b"1"), 409)["code"] == "run_under_way"
    )
    shell(client, where, "touch end")
    thread.join()
    assert put(client, where, "a", b"1").is_success


def test_nothing_is_followed_and_nothing_is_waited_for(client: httpx.Client, where: str) -> None:
    shell(
        client,
        where,
        "mkfifo pipe; ln -s /etc/passwd link; ln -s /etc dir; mkdir d; touch f; ln -s ../../etc up; mkdir shut;"
        "chmod 0 shut",
    )
    codes = {
        path: refused(get(client, where, path), 409)["code"] for path in ("pipe", "link", "dir/passwd", "up/x", "d")
    }
    assert codes == {
        "pipe": "is_no_file",
        "link": "is_a_link",
        "dir/passwd": "is_a_link",
        "up/x": "is_a_link",
        "d": "is_a_directory",
    }
    for path in ("pipe", "link", "dir/new", "d", "f/x"):
        assert put(client, where, path, b"1").status_code == 409, path
    assert refused(delete(client, where, "d"), 409)["code"] == "is_a_directory"
    assert delete(client, where, "dir").is_success, "the link itself"
    assert get(client, where, "none").status_code == 404
    assert delete(client, where, "pipe").is_success
    assert refused(post(client, where, "move", **{"from": "f", "to": "link"}), 409)["code"] == "exists"
    assert shell(client, where, "chmod 700 shut; head -c4 link") == b"root"


def attack(client: httpx.Client, where: str) -> set[str]:
    """Put files into a directory that a process exchanges for a link out of the tree. Returns what lies there."""
    start(client, where, ["python3", "-c", SWAP])
    assert eventually(lambda: get(client, where, "ready").status_code == 200)
    for number in range(40):
        assert put(client, where, f"d/{number}", b"x").status_code in (200, 409, 404)
        assert get(client, where, f"d/{number}").status_code in (200, 404, 409)
    return set(shell(client, where, "ls /tmp/outside").decode().split())


def test_a_directory_exchanged_for_a_link_leads_nowhere(client: httpx.Client, where: str) -> None:
    assert attack(client, where) == set()


def test_a_file_that_gets_shorter_while_it_is_sent_breaks_off(client: httpx.Client, server: Server, where: str) -> None:
    shell(client, where, "truncate -s 256M big")
    with client.stream("GET", f"/api/sessions/{where}/files/big") as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        shell(client, where, "truncate -s 1M big")
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            list(pieces)
    request = answer.headers["x-request-id"]
    assert eventually(lambda: request in server.log)
    [line] = [line for line in server.log.splitlines() if request in line]
    assert "request_failed" in line
    assert "status=503" in line
    assert "not as long as it was" in line
    assert "Traceback" not in server.log


@pytest.mark.parametrize("size", [5 * MIB, 200_000])
@pytest.mark.parametrize("kept", ["a", "node_modules/large"], ids=["files", "packages"])
def test_a_file_that_has_no_room_costs_the_session_nothing(
    client: httpx.Client, session: MakeSession, size: int, kept: str
) -> None:
    """It is refused before it is written: what can't be committed would end the processes."""
    where = session(limits={"disk_mb": 8})
    sleeper = start(client, where, "sleep 1000")
    if kept != "a":
        put(client, where, "node_modules/.package-lock.json", b"{}")
    put(client, where, kept, bytes(8 * MIB - 100_000))
    before = names(client, where)
    refused(client.put(f"/api/sessions/{where}/files/b", content=bytes(size)), 413, "may be")
    time.sleep(1)
    assert names(client, where) == before
    assert process(client, where, sleeper)["status"] == "running"
    put(client, where, kept, bytes(size))
    assert names(client, where) == before
