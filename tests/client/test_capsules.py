"""`era export` and `era import` as their users type them."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.capsules import capsule, document, session
from tests.client.command import environment, era, era_bytes
from tests.conftest import ERA, Run, Server


def test_export_and_import(server: Server, client: httpx.Client, run: Run, tmp_path: Path) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "a:b", "data": {"n": 1}})
    run("a:b", "open('f', 'w').write('x' * 100_000)")
    done = era(server, "export", "a:b", cwd=tmp_path, code=0)
    size = (tmp_path / "a:b.era.tar").stat().st_size
    assert (done.stdout, done.stderr) == (f"a:b.era.tar  {size} bytes\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["a:b.era.tar"]

    assert era(server, "import", "a:b.era.tar", "--id", "copy", cwd=tmp_path, code=0).stdout == "copy\n"
    assert client.get("/api/sessions/copy").json()["file_count"] == 1
    assert client.get("/api/sessions/copy").json()["allowPublicAccess"] is False
    assert client.get("/api/sessions/copy/runs").json()["count"] == 1

    era(server, "export", "a:b", "--current", "--output", "now.tar", cwd=tmp_path, code=0)
    era(server, "import", "now.tar", "--id", "now", "--public", cwd=tmp_path, code=0)
    assert client.get("/api/sessions/now").json()["allowPublicAccess"] is True
    assert client.get("/api/sessions/now/runs").json()["count"] == 0

    piped = era_bytes(server, "export", "a:b", "--output", "-", cwd=tmp_path, code=0)
    assert piped.stdout[:12] == b"capsule.json"
    assert (
        era_bytes(server, "import", "-", "--id", "piped", stdin=piped.stdout, cwd=tmp_path, code=0).stdout == b"piped\n"
    )


def test_failures_are_reported(server: Server, client: httpx.Client, tmp_path: Path) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "s"})
    era(server, "export", "s", cwd=tmp_path, code=0)
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "slow.tar").write_bytes(capsule(document(session(default_timeout=10**6))))
    for words, message in {
        ("export", "nobody"): "There is no session 'nobody'",
        ("export", "a b"): "No session has such an id",
        ("export", "s", "--output", "no/such/directory.tar"): "No such file or directory",
        ("import", "none.tar"): "none.tar can't be read: No such file",
        ("import", "."): "Is a directory",
        ("import", "s.era.tar"): "Session 's' already exists",
        ("import", "s.era.tar", "--id", "a b"): "'id' is not valid",
        ("import", "bad.tar", "--id", "x"): "is not a tar archive as ERA writes it",
        ("import", "slow.tar"): "at most 3600 are allowed",
    }.items():
        done = era(server, *words, cwd=tmp_path, code=2)
        assert done.stderr.startswith("era: ")
        assert message in done.stderr
        assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tar", "s.era.tar", "slow.tar"]
    assert client.get("/api/sessions").json()["count"] == 1


def test_a_reader_that_closes_the_pipe(server: Server, client: httpx.Client, run: Run, tmp_path: Path) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "s"})
    run("s", "import os; open('f', 'wb').write(os.urandom(4 << 20))")
    command = f"{ERA} export s --output - | head -c 12"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=environment(server), timeout=60
    )
    assert done.stdout == "capsule.json"
    assert done.stderr == "era: standard output can't be written: Broken pipe\n"


def test_a_refusal_before_the_upload_ends_is_reported(own_server: Callable[..., Server], tmp_path: Path) -> None:
    """The server answers before it has read the file, and its answer is shown."""
    server = own_server(disk_mb="1", max_limits="disk_mb=1")
    (tmp_path / "large.tar").write_bytes(bytes(50 << 20))
    done = era(server, "import", "large.tar", cwd=tmp_path, code=2)
    assert "1048576 are allowed" in done.stderr


def test_no_server(tmp_path: Path) -> None:
    (tmp_path / "c.tar").write_bytes(capsule())
    for words in (("export", "s"), ("import", "c.tar")):
        assert "era serve" in era(None, *words, "--server", "http://127.0.0.1:9", cwd=tmp_path, code=2).stderr


@pytest.mark.parametrize("words", [("export", "s"), ("import", "s.era.tar", "--id", "again")])
def test_a_terminal_sees_a_progress_bar(
    server: Server, client: httpx.Client, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """And a pipe sees none, as the tests above show."""
    client.post("/api/sessions", json={"language": "python", "session_id": "s"})
    era(server, "export", "s", cwd=tmp_path, code=0)
    terminal, theirs = pty.openpty()
    env = environment(server, TERM="xterm", COLUMNS="100")
    done = subprocess.Popen([ERA, *words], stdout=subprocess.PIPE, stderr=theirs, cwd=tmp_path, env=env)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:
        pass  # The other end is closed.
    finally:
        os.close(terminal)
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 0
    assert words[0].encode() in shown
    assert "━".encode() in shown
    assert out.decode().startswith("s.era.tar" if words[0] == "export" else "again")
