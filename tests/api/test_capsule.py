"""Sessions moved as capsules, over HTTP."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from era.languages import runtimes
from era.wire.sessions import SessionAnswer
from tests import capsules
from tests.api.test_contract import SESSION_KEYS, checked, refused
from tests.capsules import document, file, of_files, parts, run, session, tree, version
from tests.conftest import Run, Server, eventually

type MakeSession = Callable[..., str]

TAR = {"Content-Type": "application/x-tar"}

FURNISH = """
import json, os, sys
os.makedirs("empty/still"); os.makedirs("shut/in")
open("shut/in/deep", "w").write("deep"); os.chmod("shut/in", 0o500)
open("run.sh", "w").write("#!/bin/sh"); os.chmod("run.sh", 0o751)
os.symlink("/etc/passwd", "link"); os.symlink(b"\\xff gone", b"dangling")
for name in (b'quote"', b"new\\nline", b"\\xff\\xfe", "schön €".encode(), b"x" * 255, b" "):
    open(name, "wb").write(name)
open("big", "wb").write(os.urandom(300_000))
json.dump({"n": 1, "ü": [1.5, None, "\\u2028"]}, open(".session_data.json", "w"))
print("o" * 50_000); print("ä", end="", file=sys.stderr)
"""
LOOK = """
import hashlib, os
for directory, names, files in sorted(os.walk(b".")):
    for name in sorted(names + files):
        path = os.path.join(directory, name)
        status = os.lstat(path)
        if path in (b"./.session_data.json", b"./main.py"):
            continue
        content = os.readlink(path) if os.path.islink(path) else None
        if os.path.isfile(path) and not os.path.islink(path):
            content = hashlib.sha256(open(path, "rb").read()).hexdigest()
        time = None if os.path.isdir(path) and not os.path.islink(path) else status.st_mtime_ns
        print(path, oct(status.st_mode), time, content)
"""


def exported(client: httpx.Client, session_id: str, **query: str) -> bytes:
    answer = client.get(f"/api/sessions/{session_id}/capsule", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["content-disposition"] == f'attachment; filename="{session_id}.era.tar"'
    assert int(answer.headers["content-length"]) == len(answer.content)
    return answer.content


def load(client: httpx.Client, capsule: bytes, new_id: str | None = None) -> httpx.Response:
    query = {} if new_id is None else {"id": new_id}
    return client.post("/api/sessions/import", params=query, content=capsule, headers=TAR)


def imported(client: httpx.Client, capsule: bytes, new_id: str | None = None) -> dict[str, Any]:
    return checked(load(client, capsule, new_id), SessionAnswer, SESSION_KEYS, 201)


def told(client: httpx.Client, session_id: str) -> dict[str, Any]:
    """All that the API tells of a session, but for what differs between a session and its copy."""
    base = f"/api/sessions/{session_id}"

    def get(path: str) -> Any:
        answer = client.get(f"{base}{path}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    shown = get("?include=files")
    for name in ("id", "session_id", "expires_at"):
        del shown[name]
    versions = [get(f"/versions/{each['version']}?include=files") for each in get("/versions")["versions"]]
    runs = get("/runs")["runs"]
    outputs = [
        client.get(f"{base}/runs/{each['run_id']}/{stream}").content for each in runs for stream in ("stdout", "stderr")
    ]
    for each in (*versions, *runs):
        each["run_id"] = each["run_id"] and each["run_id"].partition("-")[0]
    for each in runs:
        del each["session_id"]
        each["enforced"].pop("imported", None)
    diffs = [get(f"/versions/{each['version']}/diff") for each in versions]
    return {"session": shown, "versions": versions, "diffs": diffs, "runs": runs, "outputs": outputs}


def furnished(client: httpx.Client, session_id: str) -> list[str]:
    """Make a session of every kind of content; what a program sees in it now, and in its second version."""
    body = {
        "language": "python",
        "session_id": session_id,
        "data": {"n": 0},
        "metadata": {"team": "blue", "deep": {"a": [1]}},
        "allowInternetAccess": False,
        "default_timeout": 17.5,
        "ttl": 5000,
    }
    assert client.post("/api/sessions", json=body).status_code == 201
    client.put(f"/api/sessions/{session_id}/code", json={"code": "print('störed')", "description": "d"})
    seen = []
    for code in (FURNISH, LOOK, "import os; os.remove('big'); open('later', 'w').write('l'); 1 / 0", LOOK):
        answer = client.post(f"/api/sessions/{session_id}/run", json={"code": code, "env": {"TOKEN": "hush-hush"}})
        assert answer.status_code == 200, answer.text
        assert answer.json()["state"]["committed"], answer.json()
        if code == LOOK:
            seen.append(answer.json()["stdout"])
    client.patch(f"/api/sessions/{session_id}", json={"data": {"n": 2}})
    client.post(f"/api/sessions/{session_id}/rollback", json={"version": 2})
    client.post(f"/api/sessions/{session_id}/rollback", json={"version": 6})
    return seen


def run_code(client: httpx.Client, session_id: str, code: str) -> str:
    answer = client.post(f"/api/sessions/{session_id}/run", json={"code": code})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same server", "another server"])
def test_a_copy_is_all_that_the_session_was(
    server: Server, client: httpx.Client, own_server: Callable[..., Server], elsewhere: bool
) -> None:
    then, last = furnished(client, "s")[0], furnished(client, "t")[1]
    assert then != last
    capsule = exported(client, "s")
    assert b"hush-hush" not in capsule
    before = told(client, "s")
    with (own_server(spares="0") if elsewhere else server).client() as there:
        new_id = None if elsewhere else "copy"
        name = new_id or "s"
        shown = imported(there, capsule, new_id)
        assert (shown["id"], shown["status"]) == (name, "idle")
        assert told(there, name) == before
        assert all(each["enforced"]["imported"] for each in there.get(f"/api/sessions/{name}/runs").json()["runs"])
        assert there.get("/api/sessions", params={"metadata.team": "blue"}).json()["sessions"][0]["id"] == name
        assert there.get(f"/api/sessions/{name}/code").json()["code"] == "print('störed')"
        if elsewhere:
            assert "era_runs{" not in there.get("/metrics").text

        assert run_code(there, name, LOOK) == run_code(client, "s", LOOK)
        assert there.post(f"/api/sessions/{name}/rollback", json={"version": 2}).status_code == 200
        client.post("/api/sessions/s/rollback", json={"version": 2})
        looked = run_code(there, name, LOOK)
        assert looked == run_code(client, "s", LOOK)
        assert looked == then
        assert there.post(f"/api/sessions/{name}/run", json={}).json()["stdout"] == "störed\n"
        assert there.get(f"/api/sessions/{name}").json()["data"]["n"] == 1
        refused(load(there, capsule, new_id), 409, name)


def test_files_that_a_client_put_are_so_in_the_copy(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    assert client.put(f"/api/sessions/{where}/files/d/put", content=b"by a client").status_code == 200
    assert load(client, exported(client, where), "copy").status_code == 201
    before, after = (client.get(f"/api/sessions/{name}/files").json() for name in (where, "copy"))
    assert before == after
    assert [(entry["path"], entry["uploaded"]) for entry in after["files"]] == [("d/put", True)]
    assert client.get("/api/sessions/copy/files/d/put").content == b"by a client"


def test_a_capsule_without_the_past(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    run(where, "open('a', 'w').write('first')")
    run(where, "open('a', 'w').write('second')")
    capsule = exported(client, where, versions="current")
    assert b"first" not in capsule
    made = imported(client, capsule, "now")
    assert made["version"] == 3
    assert [each["version"] for each in client.get("/api/sessions/now/versions").json()["versions"]] == [3]
    assert client.get("/api/sessions/now/runs").json()["count"] == 0
    assert run("now", "print(open('a').read())")["stdout"] == "second\n"
    refused(client.get("/api/sessions/now/versions/2"), 404)
    refused(client.get(f"/api/sessions/{where}/capsule?versions=some"), 400, "versions")


def test_sessions_that_are_nothing_much(client: httpx.Client, session: MakeSession) -> None:
    """A session that has never run; and one that keeps no files."""
    capsule = exported(client, session("typescript", session_id="fresh:1_-x"))
    assert [name for name, _ in parts(capsule)] == ["capsule.json", "README.txt", "SHA256SUMS"]
    assert imported(client, capsule, "again")["last_run_at"] == ""
    assert imported(client, exported(client, session(persistent=False)), "none")["persistent"] is False
    refused(client.get("/api/sessions/nobody/capsule"), 404, "nobody")
    refused(client.get("/api/sessions/a%20b/capsule"), 404)
    assert client.get("/api/sessions/import").status_code == 404
    assert session(session_id="import") == "import"
    assert exported(client, "import")
    assert client.patch("/api/sessions/import", json={"data": {"a": "x" * 2000}}).status_code == 200
    refused(client.patch("/api/sessions/import", content=b" " * (17 << 20)), 413)


def test_the_readme_and_the_sums_are_for_people(client: httpx.Client, session: MakeSession, tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "c.tar").write_bytes(exported(client, session(session_id="told")))
    script = "tar xf c.tar && sha256sum -c SHA256SUMS && cat README.txt"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "capsule.json: OK" in done.stdout
    assert "told" in done.stdout
    again = "tar -cf again.tar capsule.json README.txt SHA256SUMS"
    subprocess.run(["sh", "-c", again], cwd=tmp_path, check=True)
    assert imported(client, (tmp_path / "again.tar").read_bytes(), "told-again")["language"] == "python"


def test_an_export_during_runs_is_one_version(client: httpx.Client, session: MakeSession, server: Server) -> None:
    """Data and files of each version belong together, and the run under way isn't in it."""
    where = session(data={"n": 0})
    increment = (
        "import json\nd = json.load(open('.session_data.json')); d['n'] += 1\n"
        "json.dump(d, open('.session_data.json', 'w')); open('log', 'a').write('x')"
    )
    done = threading.Event()

    def work() -> None:
        with server.client() as own:
            while not done.is_set():
                assert own.post(f"/api/sessions/{where}/run", json={"code": increment}).status_code == 200

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        taken = []
        for _ in range(15):
            time.sleep(0.05)
            taken.append(exported(client, where))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    for number, capsule in enumerate(taken):
        head = json.loads(parts(capsule)[0][1])
        assert [each["version"] for each in head["versions"]] == sorted(each["version"] for each in head["versions"])
        assert head["versions"][-1]["version"] == head["session"]["version"]
        assert {each["version"] for each in head["runs"][-50:]} <= {each["version"] for each in head["versions"]} | {
            each["version"] for each in head["runs"][:-50]
        }
        made = imported(client, capsule, f"c{number}")
        files = {
            each["path"]: each["size"] for each in client.get(f"/api/sessions/c{number}?include=files").json()["files"]
        }
        assert files.get("log", 0) == made["data"]["n"] == made["version"] - 1
    assert imported(client, taken[-1], "last")["version"] > 5


def peak(pid: int) -> int:
    """The most memory that a process has had since `reset`, in bytes."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def reset(pid: int) -> int:
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak(pid)


def test_memory_stays_flat(client: httpx.Client, session: MakeSession, run: Run, server: Server) -> None:
    """64 MiB out and in, in a few MiB of memory."""
    where = session()
    run(where, "import os\nfor n in range(4): open(f'f{n}', 'wb').write(os.urandom(16 << 20))")
    exported(client, session(session_id="warm"))
    before = reset(server.pid)
    with client.stream("GET", f"/api/sessions/{where}/capsule") as answer:
        chunks = list(answer.iter_raw())
    assert sum(map(len, chunks)) > 64 << 20
    assert peak(server.pid) - before < 24 << 20, "the export"
    before = reset(server.pid)
    answer = client.post("/api/sessions/import?id=big", content=iter(chunks), headers=TAR)
    assert answer.status_code == 201, answer.text
    assert peak(server.pid) - before < 24 << 20, "the import"
    assert run("big", "import os; print(sum(os.path.getsize(f'f{n}') for n in range(4)))")["stdout"] == f"{64 << 20}\n"


def test_who_hangs_up_leaves_nothing(client: httpx.Client, session: MakeSession, run: Run, server: Server) -> None:
    """Neither an export that nobody reads to its end nor an import that stops halfway: descriptors are checked."""
    where = session()
    run(where, "import os; open('f', 'wb').write(os.urandom(16 << 20))")
    ready = len(runtimes())  # what the run took of them is made again, with descriptors of its own
    assert eventually(lambda: client.get("/health").json()["sandboxes"]["ready"] == ready)
    open_before = len(os.listdir(f"/proc/{server.pid}/fd"))
    for _ in range(5):
        with client.stream("GET", f"/api/sessions/{where}/capsule") as answer:
            next(answer.iter_raw())
    name, _, port = server.url.removeprefix("http://").rpartition(":")
    request = f"POST /api/sessions/import HTTP/1.1\r\nHost: {name}:{port}\r\nContent-Length: 100000000\r\n"
    for _ in range(5):
        with socket.create_connection((name, int(port))) as connection:
            connection.sendall(request.encode() + b"Content-Type: application/x-tar\r\n\r\n" + bytes(3 << 20))
    assert eventually(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) <= open_before), [
        os.readlink(path) for path in Path(f"/proc/{server.pid}/fd").iterdir()
    ]
    assert client.get("/api/sessions").json()["count"] == 1
    assert server.log.count("Traceback") == 0


def stored(server: Server) -> set[str]:
    return {path.name for path in (server.data_dir / "blobs").rglob("*") if path.is_file()}


@contextmanager
def nothing_made(client: httpx.Client, server: Server) -> Iterator[None]:
    """No session, no blob, no file; and the server is well."""

    def state() -> tuple[Any, ...]:
        names = sorted(path.name for path in server.data_dir.iterdir())
        return client.get("/api/sessions").json()["count"], stored(server), names

    before = state()
    yield
    assert state() == before
    assert client.get("/health").status_code == 200


BAD = {
    "nothing": b"",
    "no tar": b"PK" + bytes(2000),
    "another format": capsules.capsule(document(format=2)),
    "a name that leaves": of_files(tree(file("..", b"")), b""),
    "a slash": of_files(tree(file("a/../../b", b"")), b""),
    "the state's name": of_files(tree(file(".session_data.json", b"")), b""),
    "setuid": of_files(tree(file("a", b"", mode=0o4755)), b""),
    "a missing object": of_files(tree(file("a", b"x"))),
    "one too many": capsules.capsule(None, b"x"),
    "a run under way": capsules.capsule(document(runs=[run(status="running")])),
    "two runs of one id": capsules.capsule(document(runs=[run(), run()])),
    "too patient": capsules.capsule(document(session(default_timeout=3601))),
    "no such language": capsules.capsule(document(session(language="cobol"))),
    "env": capsules.capsule(document(session(env={"A": "b"}))),
    "a huge version": capsules.capsule(document(session(version=2**62), [version(version=2**62)])),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_capsules_make_nothing(client: httpx.Client, server: Server, which: str) -> None:
    with nothing_made(client, server):
        body = refused(load(client, BAD[which], "bad"), 400)
        assert "capsule" in (body["error"] + body["hint"]).lower() or "default_timeout" in body["error"]


def test_what_is_too_large(client: httpx.Client, server: Server, own_server: Callable[..., Server]) -> None:
    with nothing_made(client, server):
        refused(load(client, capsules.capsule(document(session(metadata={"a": "x" * (1 << 20)})))), 413, "metadata")
        refused(load(client, capsules.capsule(document(versions=[version(data={"a": "x" * (1 << 20)})]))), 413, "data")
    small = own_server(import_mb="1")
    with small.client() as there, nothing_made(there, small):
        refused(load(there, bytes(2 << 20)), 413, "1048576")
        chunked = iter([bytes(1 << 19)] * 5)
        refused(there.post("/api/sessions/import", content=chunked, headers=TAR), 413, "1048576")
        # The bound is that of this call alone.
        refused(there.post("/api/sessions", content=b" " * (17 << 20)), 413, "16777216")


def test_only_an_archive_is_taken(client: httpx.Client, server: Server) -> None:
    """A type that a page of another site can't send without asking."""
    capsule = capsules.capsule()
    with nothing_made(client, server):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/json"):
            answer = client.post("/api/sessions/import", content=capsule, headers={"Content-Type": kind})
            refused(answer, 400, "application/x-tar")
        answer = client.post("/api/sessions/import", content=capsule, headers={**TAR, "Origin": "http://evil.example"})
        refused(answer, 403)
        for bad in ("a b", "", "x" * 129, "../x"):
            refused(load(client, capsule, bad), 400, "id")
    assert imported(client, capsule)["id"] == "moved"


def test_damaged_capsules(client: httpx.Client, server: Server) -> None:
    """A real one with bytes flipped, cut, doubled or moved; and a server that serves on."""
    furnished(client, "s")
    whole = exported(client, "s")
    chance = random.Random(3)
    refusals = 0
    with nothing_made(client, server):
        for number in range(200):
            bad = bytearray(whole)
            at, size = chance.randrange(len(bad)), chance.choice([1, 512, 10_000])
            match number % 4:
                case 0:
                    bad[at] ^= 1 << chance.randrange(8)
                case 1:
                    bad[chance.randrange(12_000)] ^= 0xFF
                case 2:
                    del bad[at : at + size]
                case 3:
                    bad[at:at] = bad[at : at + size]
            answer = load(client, bytes(bad), f"n{number}")
            if answer.status_code == 201:
                # What was hit is the end of the archive, of which there may be any length.
                assert client.delete(f"/api/sessions/n{number}?purge=true").status_code == 200
            else:
                refused(answer, 400 if answer.status_code != 413 else 413)
                refusals += 1
    assert refusals > 190
    assert server.log.count("Traceback") == 0


def test_kill_9_during_an_import(own_server: Callable[..., Server]) -> None:
    """There is all of the session or nothing, no file is left, and the same capsule can be imported then."""
    server = own_server(spares="0")
    chance = random.Random(11)
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        for n in range(5):
            client.post(
                "/api/sessions/s/run",
                json={"code": f"import os\nfor m in range(100): open(f'{n}-{{m}}', 'wb').write(os.urandom(9000))"},
            )
        capsule = exported(client, "s")
        files = client.get("/api/sessions/s?include=files").json()["files"]
        client.delete("/api/sessions/s?purge=true")
    began = time.monotonic()
    with server.client() as client:
        assert load(client, capsule, "timed").status_code == 201
    duration = time.monotonic() - began
    names = sorted(path.name for path in server.data_dir.iterdir())
    outcomes: set[int] = set()
    longest = duration
    for number in range(12):
        thread = threading.Thread(target=_ignore_hangup, args=(server.url, capsule, f"n{number}"))
        thread.start()
        time.sleep(chance.uniform(0.2, 1) * longest)
        server.stop(signal.SIGKILL)
        thread.join()
        server.start()
        with server.client() as client:
            answer = client.get(f"/api/sessions/n{number}?include=files")
            outcomes.add(answer.status_code)
            longest *= 0.7 if answer.status_code == 200 else 1.4  # However fast the machine is, there is some of each.
            if answer.status_code == 200:
                assert answer.json()["files"] == files
                assert answer.json()["version"] == 6
                assert client.get(f"/api/sessions/n{number}/versions").json()["count"] == 6
                assert client.get(f"/api/sessions/n{number}/runs").json()["count"] == 5
            else:
                assert imported(client, capsule, f"n{number}")["version"] == 6
        assert sorted(path.name for path in server.data_dir.iterdir()) == names
        assert list((server.data_dir / "blobs" / "incoming").iterdir()) == []
    assert outcomes == {200, 404}
    with closing(sqlite3.connect(server.data_dir / "era.sqlite")) as database:
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []


def _ignore_hangup(url: str, capsule: bytes, new_id: str) -> None:
    with httpx.Client(base_url=url, timeout=60, trust_env=False, verify=False) as client:
        try:
            load(client, capsule, new_id)
        except httpx.TransportError:
            return
