"""Data of an older checkout: refused by this one, and moved by scripts/move-data.

The older checkout is the present code under a revision from before `v001`. So this shows the refusals and the transfer,
and nothing of what older code did otherwise.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import era as package
from tests.client.command import environment, era
from tests.conftest import Server, eventually

OPERATOR = "open sesame"
ROOT = Path(__file__).parents[2]
MOVE = "`scripts/move-data OLD_CHECKOUT OLD_DATA NEW_DATA`"
COUNT = """
import json
data = json.load(open(".session_data.json"))
data["n"] += 1
json.dump(data, open(".session_data.json", "w"))
open("runs.txt", "a").write(f"run {data['n']}\\n")
print("n is", data["n"])
"""
SESSIONS = 8


@dataclass
class Old:
    """An older checkout, the data that its server left, and what that had answered."""

    checkout: Path
    data: Path
    ada: str = ""
    """The secret of a key of the owner ada."""

    answers: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def old() -> Iterator[Old]:
    directory = Path(tempfile.mkdtemp(prefix="era-old-"))  # pytest's are closed to users of sandboxes
    try:
        directory.chmod(0o755)
        old = Old(_checkout(directory / "checkout"), directory / "data")
        server = Server(old.data, {"ERA_API_KEY": OPERATOR, "PYTHONPATH": str(old.checkout / "src")}).start()
        try:
            _fill(server, old)
        finally:
            server.stop()
        yield old
    finally:
        shutil.rmtree(directory)


def _checkout(checkout: Path) -> Path:
    """Make a checkout whose code and revision are older ones."""
    source = Path(package.__file__).parent
    target = checkout / "src" / "era"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "web"))
    (target / "web").symlink_to(source / "web")
    migrations = target / "store" / "migrations"
    (migrations / "versions" / "v001_tables.py").rename(migrations / "versions" / "0030_tables.py")
    for file in (migrations / "__init__.py", migrations / "versions" / "0030_tables.py"):
        file.write_text(file.read_text().replace('"v001"', '"0030"').replace("revision.isdigit()", "False"))
    commands = checkout / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, rest in (("python", '"$@"'), ("era", '-m era.client.cli "$@"')):
        (commands / name).write_text(f"#!/bin/sh\nPYTHONPATH={checkout}/src exec {sys.executable} {rest}\n")
        (commands / name).chmod(0o755)
    return checkout


@contextmanager
def calling(server: Server, key: str) -> Iterator[httpx.Client]:
    with server.client(headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


def _fill(server: Server, old: Old) -> None:
    """Have a server keep some of everything, for two owners."""
    with calling(server, OPERATOR) as operator:
        old.ada = operator.post("/api/keys", json={"owner": "ada", "description": "hers"}).json()["key"]
        quotas = {"quotas": {"sessions": SESSIONS}}
        assert operator.patch("/api/owners/ada", json=quotas).status_code == 200
    for key, names in sessions_of(old).items():
        with calling(server, key) as client:
            for name in names:
                made = {"language": "python", "session_id": name, "data": {"n": 0}, "allowPublicAccess": True}
                client.post("/api/sessions", json=made).raise_for_status()
            used = f"/api/sessions/{names[0]}"
            assert client.post(f"{used}/run", json={"code": COUNT}).json()["status"] == "ok"
            client.put(f"{used}/code", json={"code": COUNT}).raise_for_status()
            client.put(f"{used}/versions/2/name", json={"name": "good"}).raise_for_status()
            inbox = {"verify": {"scheme": "github", "secret": "s3cret"}, "retries": 3}
            client.put(f"{used}/inbox", json=inbox).raise_for_status()
            client.put("/api/storage/kv/app/a%2F%C3%A9", json={"value": "green", "metadata": {"n": 1}})
            client.put("/api/storage/r2/app/o.bin", json={"content": "AAEC/w==", "metadata": {"a": "b"}})
            sql = {"sql": "CREATE TABLE t (b); INSERT INTO t VALUES (x'00ff'); CREATE VIEW v AS SELECT hex(b) h FROM t"}
            client.post("/api/storage/d1/app/exec", json=sql).raise_for_status()
            client.post("/api/webhooks", json={"url": "http://203.0.113.7/era"}).raise_for_status()
            old.answers[key] = answers(client, names)


def sessions_of(old: Old) -> dict[str, list[str]]:
    """The ids of each owner's sessions, by key. The first one is used."""
    return {OPERATOR: ["kept"], old.ada: [f"ada-{number}" for number in range(SESSIONS)]}


def answers(client: httpx.Client, names: list[str]) -> dict[str, Any]:
    """Collect what a server answers to the owner of these sessions, without what a move changes."""
    paths = ["/api/storage/kv/app/a%2F%C3%A9", "/api/storage/r2/app/o.bin", "/api/webhooks"]
    paths += [f"/api/sessions/{name}" for name in names]
    used = f"/api/sessions/{names[0]}"
    paths += [f"{used}/{name}" for name in ("versions", "files", "code", "inbox", "files/runs.txt", "runs")]
    found: dict[str, Any] = {path: client.get(path).raise_for_status().text for path in paths}
    for path, text in found.items():
        if text.startswith("{"):
            found[path] = json.loads(text)
            for name in ("uploaded", "url", "request_id"):
                found[path].pop(name, None)
    for run in found[f"{used}/runs"]["runs"]:
        run["enforced"].pop("imported", None)
    query = {"sql": "SELECT h FROM v"}
    found["sql"] = client.post("/api/storage/d1/app/query", json=query).raise_for_status().json()["results"]
    return found


def content(directory: Path) -> dict[str, str]:
    """The digests of all files."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("command", ["serve", "check", "backup", "gc"])
def test_old_data_is_refused_and_left_as_it_is(old: Old, command: str, tmp_path: Path) -> None:
    before = content(old.data)
    words: list[str | Path] = [command, *([tmp_path / "copy"] if command == "backup" else []), "--data-dir", old.data]
    done = era(None, *words, env={"ERA_API_KEY": OPERATOR, "ERA_PORT": "0"})
    assert done.returncode == 2
    assert (
        done.stderr == f"era: The data is of an older checkout of ERA: move it into a new data directory with {MOVE}.\n"
    )
    assert content(old.data) == before
    assert not (tmp_path / "copy").exists()


def test_a_backup_of_an_older_checkout_is_refused(old: Old, tmp_path: Path) -> None:
    backup, restored = tmp_path / "backup", tmp_path / "restored"
    words: list[str | Path] = [old.checkout / ".venv/bin/era", "backup", backup, "--data-dir", old.data]
    subprocess.run(words, env=environment(None), check=True, stdout=subprocess.DEVNULL)
    done = era(None, "restore", backup, "--data-dir", restored)
    assert done.returncode == 2
    assert f"{backup} is of an older checkout of ERA: restore it with that checkout's `era restore`" in done.stderr
    assert MOVE in done.stderr
    assert list(tmp_path.iterdir()) == [backup]


def moving(old: Old, target: Path) -> subprocess.Popen[str]:
    """Begin to move the data of an older checkout."""
    words: list[str | Path] = [sys.executable, ROOT / "scripts/move_data.py", old.checkout, old.data, target]
    variables = environment(None, ERA_ISOLATION="bubblewrap", OLD_ERA_ISOLATION="bubblewrap", OLD_ERA_SPARES="0")
    return subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def sessions_in(directory: Path) -> int:
    """How many sessions a data directory has by now."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{directory}/era.sqlite?mode=ro", uri=True)) as rows:
        return int(rows.execute("SELECT count(*) FROM sessions").fetchone()[0])
    return 0


def is_free(directory: Path) -> bool:
    """Whether no server has a data directory."""
    with (directory / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_everything_is_moved_also_where_the_move_was_killed(old: Old, tmp_path: Path) -> None:
    target = tmp_path / "new"
    first = moving(old, target)
    assert eventually(lambda: sessions_in(target) >= 2 or first.poll() is not None)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert eventually(lambda: is_free(old.data) and is_free(target))
    second = moving(old, target)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 0, said
    assert "Going on with what was begun." in said
    assert "more were there already" in said
    assert "Everything was moved." in said

    server = Server(target, {"ERA_API_KEY": OPERATOR}).start()
    try:
        for key, names in sessions_of(old).items():
            with calling(server, key) as client:
                assert answers(client, names) == old.answers[key]
                assert client.post(f"/api/sessions/{names[0]}/run").json()["stdout"] == "n is 2\n"
        with calling(server, OPERATOR) as operator:
            assert [key["description"] for key in operator.get("/api/keys").json()["keys"]] == ["hers"]
            assert operator.get("/api/owners/ada").json()["set"] == {"sessions": SESSIONS}
    finally:
        server.stop()
    assert not list(target.glob("moving*"))
    assert (target / "webhook-key").read_bytes() == (old.data / "webhook-key").read_bytes()
    third = moving(old, target)
    said, _ = third.communicate(timeout=60)
    assert (third.returncode, "has something in it already" in said) == (1, True)


def test_what_can_not_be_moved_is_named(old: Old, tmp_path: Path) -> None:
    damaged = Old(old.checkout, tmp_path / "damaged")
    shutil.copytree(old.data, damaged.data, symlinks=True)
    for blob in (damaged.data / "blobs").rglob("*"):
        if blob.is_file():
            os.truncate(blob, 0)
    done = moving(damaged, tmp_path / "new")
    said, _ = done.communicate(timeout=300)
    assert done.returncode == 1
    assert "FAILED     ada: session ada-0: " in said
    assert f"moved      {SESSIONS - 1} sessions" in said  # the others have no files
    assert "not everything was moved" in said
