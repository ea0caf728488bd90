"""What goes wrong between the command and a server while a run is followed: nothing is lost or printed twice, and what
it says helps."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from era import AsyncEra, Era, LocalError
from tests.client.command import environment, era
from tests.conftest import ERA, MakeServer, Server, free_port
from tests.sdk.cutter import Cutter, cut_once_after
from tests.sdk.scripted import refusal, serving

NUMBERS = "import time\nfor n in range(40):\n    print(n, flush=True)\n    time.sleep(0.02)"


def test_a_broken_connection_loses_nothing_of_a_run(server: Server) -> None:
    with Cutter(server.url, cut_once_after(b"7\\n")) as way:
        done = era(None, "run", "-l", "python", "-", env={"ERA_SERVER": way.url}, stdin=NUMBERS, code=0)
        assert any(b"/events?after=" in request for request in way.requests), "nothing was cut"
    assert done.stdout == "".join(f"{n}\n" for n in range(40))


def test_a_run_whose_server_is_killed_is_said_to_be_lost(own_server: MakeServer, tmp_path: Path) -> None:
    server = own_server(port=str(free_port()))
    (tmp_path / "p.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)")
    command = [str(ERA), "run", "--timeout", "500", "-s", "kept", "p.py"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(server),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        server.stop(signal.SIGKILL)
        server.start()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert out == ""
    assert "the service stopped while this run was under way" in " ".join(err.split())


def test_a_server_that_stays_busy() -> None:
    with serving() as scripted:
        scripted.script = [refusal(429, "too_busy", **{"Retry-After": "0"}) for _ in range(20)]
        began = time.monotonic()
        done = era(None, "sessions", "list", env={"ERA_SERVER": scripted.url}, code=2)
        assert 1 < len(scripted.seen) < 20
        assert time.monotonic() - began < 60
    assert "No. Do this." in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("sessions delete a --purge b", ["DELETE /api/sessions/a?purge=true", "DELETE /api/sessions/b?purge=true"]),
        ("files rm a x --recursive y", ["DELETE …/files/x?recursive=true", "DELETE …/files/y?recursive=true"]),
        ("files rm a -- -r x -- --purge", [f"DELETE …/files/{name}" for name in ("-r", "x", "--", "--purge")]),
        ("files read a -- -x", ["GET …/files/-x"]),
        ("files read --version 3 a -- -x", ["GET …/versions/3/files/-x"]),
        ("storage kv set a k -- -v", ["PUT /api/storage/kv/a/k"]),
        ("kill a -- -p", ["DELETE …/processes/-p"]),
    ],
)
def test_options_stand_anywhere_and_words_behind_two_hyphens_are_none(words: str, asked: list[str]) -> None:
    with serving() as scripted:
        scripted.script = [(200, {}, b"{}")] * len(asked)
        era(None, *words.split(), env={"ERA_SERVER": scripted.url}, code=0)
        seen = [f"{method} {path}".replace("/api/sessions/a/", "…/") for method, path, _ in scripted.seen]
    assert seen == asked
    if "kv" in words:
        assert b"-v" in scripted.bodies[0]


@pytest.mark.parametrize("words", ["sessions get a -- b", "logout a -- b", "sessions -- delete a", "sessions nosuch"])
def test_words_too_many_are_told(words: str) -> None:
    done = era(None, *words.split(), env={"ERA_SERVER": "http://127.0.0.1:9"}, code=2)
    assert "--help has examples" in done.stderr


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_full_disk_behind_standard_output(size: int) -> None:
    with serving() as scripted:
        scripted.script = [(200, {}, bytes(size))]
        command = ["bash", "-c", f"{ERA} files read s a > /dev/full"]
        environ = environment(None, ERA_SERVER=scripted.url)
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "era: standard output can't be written: No space left on device\n"


def test_a_file_is_fetched_into_a_directory(tmp_path: Path) -> None:
    with serving() as scripted:
        scripted.script = [(200, {}, b"report")] * 2
        env = {"ERA_SERVER": scripted.url}
        era(None, "files", "read", "s", "out/report.pdf", "-o", ".", cwd=tmp_path, env=env, code=0)
        (tmp_path / "sub").mkdir()
        done = era(None, "files", "read", "s", "out/report.pdf", "-o", "sub", "--json", cwd=tmp_path, env=env, code=0)
        assert json.loads(done.stdout)["file"] == "sub/report.pdf"
        found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.pdf")}
        assert found == {"report.pdf": "report", "sub/report.pdf": "report"}


@pytest.mark.parametrize("target", [".", "/", "sub"])
async def test_a_directory_is_no_file_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Nothing is asked for: there is no server."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    url = f"http://127.0.0.1:{free_port()}"
    with Era(url) as client, pytest.raises(LocalError, match="is a directory"):
        client.sessions.named("s").files.download("a", target)
    async with AsyncEra(url) as waiting:
        with pytest.raises(LocalError, match="is a directory"):
            await waiting.sessions.named("s").files.archive(target)
        with pytest.raises(LocalError, match="is a directory"):
            await waiting.sessions.named("s").export(target)


def test_a_program_that_takes_too_long(server: Server) -> None:
    done = era(server, "run", "-l", "python", "--timeout", "0.5", "-", stdin="while True: pass", code=124)
    assert "timeout" in done.stderr
