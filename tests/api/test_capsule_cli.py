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
from tests.conftest import ERA, Run, Server


def surroundings(server: Server | None = None) -> dict[str, str]:
    """This process's environment, without what it may say of a server."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
    return known if server is None else known | {"ERA_SERVER": server.url}


def era(
    server: Server, place: Path, *words: str, stdin: bytes = b"", code: int = 0
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [ERA, *words], input=stdin, capture_output=True, cwd=place, env=surroundings(server), timeout=60
    )
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


def test_out_and_in(server: Server, client: httpx.Client, run: Run, tmp_path: Path) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "a:b", "data": {"n": 1}})
    run("a:b", "open('f', 'w').write('x' * 100_000)")
    done = era(server, tmp_path, "export", "a:b")
    size = (tmp_path / "a:b.era.tar").stat().st_size
    assert (done.stdout.decode(), done.stderr) == (f"a:b.era.tar  {size} bytes\n", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["a:b.era.tar"]

    assert era(server, tmp_path, "import", "a:b.era.tar", "--id", "copy").stdout == b"copy\n"
    assert client.get("/api/sessions/copy").json()["file_count"] == 1
    assert client.get("/api/sessions/copy/runs").json()["count"] == 1

    era(server, tmp_path, "export", "a:b", "--current", "--output", "now.tar")
    era(server, tmp_path, "import", "now.tar", "--id", "now")
    assert client.get("/api/sessions/now/runs").json()["count"] == 0

    piped = era(server, tmp_path, "export", "a:b", "--output", "-")
    assert piped.stdout[:12] == b"capsule.json"
    assert era(server, tmp_path, "import", "-", "--id", "piped", stdin=piped.stdout).stdout == b"piped\n"


def test_what_went_wrong_is_told(server: Server, client: httpx.Client, tmp_path: Path) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "s"})
    era(server, tmp_path, "export", "s")
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
        done = era(server, tmp_path, *words, code=2)
        assert done.stderr.startswith(b"era: ")
        assert message in done.stderr.decode()
        assert done.stdout == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tar", "s.era.tar", "slow.tar"]
    assert client.get("/api/sessions").json()["count"] == 1


def test_a_reader_that_has_enough(server: Server, client: httpx.Client, run: Run, tmp_path: Path) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "s"})
    run("s", "import os; open('f', 'wb').write(os.urandom(4 << 20))")
    command = f"{ERA} export s --output - | head -c 12"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=surroundings(server), timeout=60
    )
    assert done.stdout == "capsule.json"
    assert done.stderr == "era: standard output can't be written: Broken pipe\n"


def test_a_large_refusal_is_told_too(own_server: Callable[..., Server], tmp_path: Path) -> None:
    """The server answers before it has read the file, and the answer is shown all the same."""
    server = own_server(import_mb="1")
    (tmp_path / "large.tar").write_bytes(bytes(50 << 20))
    done = era(server, tmp_path, "import", "large.tar", code=2)
    assert b"1048576 are allowed" in done.stderr


def test_no_server(tmp_path: Path) -> None:
    (tmp_path / "c.tar").write_bytes(capsule())
    for words in (("export", "s"), ("import", "c.tar")):
        command = [ERA, *words, "--server", "http://127.0.0.1:9"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=surroundings())
        assert done.returncode == 2
        assert "era serve" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("export", "s"), ("import", "s.era.tar", "--id", "again")])
def test_a_terminal_sees_how_far_it_is(
    server: Server, client: httpx.Client, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """And a pipe sees nothing of that, as the tests above tell."""
    client.post("/api/sessions", json={"language": "python", "session_id": "s"})
    era(server, tmp_path, "export", "s")
    terminal, theirs = pty.openpty()
    environment = surroundings(server) | {"TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.Popen([ERA, *words], stdout=subprocess.PIPE, stderr=theirs, cwd=tmp_path, env=environment)
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
