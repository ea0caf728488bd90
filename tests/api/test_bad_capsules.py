"""Capsules that are refused, damaged or cut off by a kill: all of the session or nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests import capsules
from tests.api.answers import refused
from tests.api.capsule_api import TAR, export_capsule, import_capsule, send_capsule
from tests.capsules import document, file, of_files, run, session, tree, version
from tests.conftest import MakeServer, Server
from tests.soaking import soak_the_rest
from tests.table import table

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


def make_furnished_session(client: httpx.Client, session_id: str) -> list[str]:
    """Make a session with every kind of content; returns what a program sees in it in the second version and now."""
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
    outputs = []
    for code in (FURNISH, LOOK, "import os; os.remove('big'); open('later', 'w').write('l'); 1 / 0", LOOK):
        answer = client.post(f"/api/sessions/{session_id}/run", json={"code": code, "env": {"TOKEN": "hush-hush"}})
        assert answer.status_code == 200, answer.text
        assert answer.json()["state"]["committed"], answer.json()
        if code == LOOK:
            outputs.append(answer.json()["stdout"])
    client.patch(f"/api/sessions/{session_id}", json={"data": {"n": 2}})
    client.post(f"/api/sessions/{session_id}/rollback", json={"version": 2})
    client.post(f"/api/sessions/{session_id}/rollback", json={"version": 6})
    return outputs


def blob_names(server: Server) -> set[str]:
    """The names of a server's blobs."""
    return {path.name for path in (server.content_dir / "blobs").rglob("*") if path.is_file()}


@contextmanager
def nothing_made(client: httpx.Client, server: Server) -> Iterator[None]:
    """Assert that what is done here makes no session, no blob and no file, and that the server is well."""

    def state() -> tuple[Any, ...]:
        names = sorted(path.name for path in server.data_dir.iterdir())
        return client.get("/api/sessions").json()["count"], blob_names(server), names

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


@table("which", BAD)
def test_bad_capsules_make_nothing(client: httpx.Client, server: Server, which: str) -> None:
    with nothing_made(client, server):
        body = refused(send_capsule(client, BAD[which], "bad"), 400)
        assert "capsule" in (body["error"] + body["hint"]).lower() or "default_timeout" in body["error"]


def test_capsules_that_are_too_large_are_refused(client: httpx.Client, server: Server, own_server: MakeServer) -> None:
    with nothing_made(client, server):
        refused(
            send_capsule(client, capsules.capsule(document(session(metadata={"a": "x" * (1 << 20)})))), 413, "metadata"
        )
        refused(
            send_capsule(client, capsules.capsule(document(versions=[version(data={"a": "x" * (1 << 20)})]))),
            413,
            "data",
        )
    small = own_server(disk_mb="1", max_limits="disk_mb=1")
    with small.client() as there, nothing_made(there, small):
        refused(send_capsule(there, bytes(2 << 20)), 413, "1048576")
        chunked = iter([bytes(1 << 19)] * 5)
        refused(there.post("/api/sessions/import", content=chunked, headers=TAR), 413, "1048576")
        # This bound is for imports alone.
        refused(there.post("/api/sessions", content=b" " * (17 << 20)), 413, "16777216")


def test_only_the_content_type_of_an_archive_is_accepted(client: httpx.Client, server: Server) -> None:
    """Pages of other sites can't send that type without a preflight."""
    capsule = capsules.capsule()
    with nothing_made(client, server):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/json"):
            answer = client.post("/api/sessions/import", content=capsule, headers={"Content-Type": kind})
            refused(answer, 400, "application/x-tar")
        answer = client.post("/api/sessions/import", content=capsule, headers={**TAR, "Origin": "http://evil.example"})
        refused(answer, 403)
        for bad in ("a b", "", "x" * 129, "../x"):
            refused(send_capsule(client, capsule, bad), 400, "id")
    assert import_capsule(client, capsule)["id"] == "moved"


@pytest.mark.parametrize("changes", soak_the_rest([60, 200], 1))
def test_damaged_capsules_make_nothing(client: httpx.Client, server: Server, changes: int) -> None:
    """A real capsule with bytes flipped, cut, doubled or moved; the server serves on."""
    make_furnished_session(client, "s")
    whole = export_capsule(client, "s")
    chance = random.Random(3)
    refusals = 0
    with nothing_made(client, server):
        for number in range(changes):
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
            answer = send_capsule(client, bytes(bad), f"n{number}")
            if answer.status_code == 201:
                # The damage hit the padding at the end of the archive, which may have any length.
                assert client.delete(f"/api/sessions/n{number}?purge=true").status_code == 200
            else:
                refused(answer, 400 if answer.status_code != 413 else 413)
                refusals += 1
    assert refusals > 0.95 * changes
    assert server.log.count("Traceback") == 0
