"""Starting and stopping a server, as people meet it: what is wrong is told at once, in a line that has the way out, and
Ctrl-C shows no traceback at any moment."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import era as package
from era.errors import NotReady
from era.server.preflight import check_directory, check_is_hidden, check_variables, take_address
from era.settings import Settings
from tests.client.command import environment, era
from tests.conftest import ERA, STOP_SECONDS, Server, assert_nothing_left, mounts
from tests.soaking import soak_the_rest

HEAVY = {"era.app", "era.server.server", "era.api", "fastapi", "uvicorn", "sqlalchemy"}
"""What takes a second to import."""

LIGHT = {"argparse", "json", "pydantic", "httpx", "rich", "importlib.metadata", "era.client.grammar"}
"""What takes a tenth of a second."""


@pytest.fixture
def taken_port() -> Iterator[int]:
    """The port of a server that is about to start: nobody is accepted yet."""
    (listening,) = take_address(Settings(port=0))
    with listening:
        yield listening.getsockname()[1]


IDLE = {"pathlib", "shutil", "tempfile", "tarfile", "asyncio", "dataclasses", "inspect", "rich", "httpx", "pydantic"}
"""What a run in a session has no use for, and would wait for."""


def imported(*words: str | Path, **variables: str) -> tuple[int, set[str], str]:
    """Run the command; its exit code, the modules that it imported, and what else it wrote to stderr."""
    command = [sys.executable, "-X", "importtime", "-m", "era.client.cli", *map(str, words)]
    done = subprocess.run(command, env=environment(None, **variables), capture_output=True, text=True, timeout=60)
    lines = done.stderr.splitlines()
    names = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return done.returncode, names, "\n".join(line for line in lines if not line.startswith("import time:"))


def refused_at_once(*words: str | Path, **variables: str) -> str:
    """Assert that `era serve` refuses before it imports the server; returns what it says."""
    code, modules, said = imported("serve", *words, **variables)
    assert code == 2, said
    assert not modules & HEAVY
    assert said.startswith("era: ")
    assert "Traceback" not in said
    assert said.count("\n") <= 1
    return said


def test_a_port_in_use(taken_port: int, tmp_path: Path) -> None:
    said = refused_at_once("--port", str(taken_port), "--data-dir", tmp_path / "data")
    assert f"Port {taken_port} of 127.0.0.1 is in use" in said
    assert "--port" in said
    assert not (tmp_path / "data").exists()


def test_the_port_is_taken_before_the_server_is_imported(tmp_path: Path) -> None:
    code = f"""
import socket, sys, types
sys.modules["era.app"] = app = types.ModuleType("era.app")
def run_service(settings, say, listening):
    assert not {HEAVY} - {{"era.app"}} & set(sys.modules)
    try: socket.create_server(listening[0].getsockname())
    except OSError as error: say(error.errno == 98)
    return 5
app.run_service = run_service
from era.client.cli import main
sys.argv = ["era", "serve", "--port", "0", "--data-dir", {str(tmp_path / "data")!r}]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(None), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, "True\n", "")


def test_a_host_of_a_cluster_is_not_reached_before_it_serves(taken_port: int, tmp_path: Path) -> None:
    """Others would take a call that waits for one that was done."""
    assert take_address(Settings(port=0, shared_dir=tmp_path)) == []
    with pytest.raises(NotReady, match=f"Port {taken_port} of 127.0.0.1 is in use"):
        take_address(Settings(port=taken_port, shared_dir=tmp_path))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_an_address_of_another_machine(host: str) -> None:
    said = refused_at_once("--host", host, "--port", "0", "--allow-no-key")
    assert host in said
    assert "--host" in said


@pytest.mark.parametrize("named", soak_the_rest(["file/below", "file", "/proc/1/none"], 1))
def test_a_data_directory_that_cannot_be_written(tmp_path: Path, named: str) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / named
    said = refused_at_once("--port", "0", "--data-dir", place)
    assert str(place) in said
    assert "--data-dir" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("seen", soak_the_rest(sorted({"/usr", "/lib", sys.base_prefix}), ["/usr"]))
def test_a_data_directory_that_sandboxes_would_see(tmp_path: Path, seen: str) -> None:
    (tmp_path / "link").symlink_to(seen)
    for place in (Path(seen) / "era-none" / "data", tmp_path / "link" / "era-none"):
        said = refused_at_once("--port", "0", "--data-dir", place)
        assert f"ERA_DATA_DIR can't be {place}: sandboxes see" in said
        assert not place.exists()
    with pytest.raises(NotReady, match="ERA_SHARED_DIR can't be"):
        check_is_hidden(Settings(data_dir=tmp_path, shared_dir=Path(seen) / "era-none"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become an ordinary user")
def test_a_data_directory_of_somebody_else(tmp_path: Path) -> None:
    code = (
        "import os, sys; from era.server.preflight import check_directory; from pathlib import Path; os.setuid(65534)\n"
    )
    code += "try: check_directory(Path(sys.argv[1]))\nexcept Exception as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "data"], capture_output=True, text=True)
    assert "can't be written to (Permission denied)" in done.stdout, done.stderr


def test_a_data_directory_in_use(server: Server) -> None:
    said = refused_at_once("--port", "0", "--data-dir", server.data_dir)
    assert f"Another ERA service uses {server.data_dir}" in said


@pytest.mark.parametrize("seconds", [0.3, 60])
def test_a_lock_that_a_killed_server_s_child_has_for_a_moment(tmp_path: Path, seconds: float) -> None:
    holds = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True)"
    )
    command = [sys.executable, "-c", f"{holds}; time.sleep({seconds})", str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        if seconds < 1:
            check_directory(tmp_path)
        else:
            with pytest.raises(NotReady, match="Another ERA service uses"):
                check_directory(tmp_path)
        child.kill()


def test_a_misspelt_variable() -> None:
    assert refused_at_once(ERA_PROT="9000") == "era: ERA_PROT is not a setting. Did you mean ERA_PORT?"


@pytest.mark.parametrize("key", soak_the_rest(["canary\x1b[2J canary", "canary\n", " canary"], 1))
def test_a_key_that_is_refused_is_not_shown(key: str) -> None:
    told = refused_at_once(ERA_API_KEY=key)
    assert "ERA_API_KEY" in told
    assert "canary" not in told


@pytest.mark.soak
def test_what_is_wrong_is_named() -> None:
    assert "ERA_API_KEY?" in refused_at_once(ERA_APIKEY="secret")
    assert "ERA_MAX_WARM?" in refused_at_once(ERA_MAXWARM="3")
    assert "ERA_PORT: " in refused_at_once(ERA_PORT="many")
    assert "ERA_API_KEY" in refused_at_once("--host", "0.0.0.0", "--port", "0")


@pytest.mark.parametrize("command", soak_the_rest(["serve", "doctor", "check", "gc"], 1))
def test_a_secret_that_is_refused_is_not_shown(command: str, tmp_path: Path) -> None:
    code, _, said = imported(command, ERA_CLUSTER_SECRET="canary-7151", ERA_DATA_DIR=str(tmp_path))
    assert (code, said.count("\n")) == (2, 0)
    assert said.startswith("era: ERA_CLUSTER_SECRET: ")
    assert "canary" not in said


def test_variables_that_are_nobodys_mistake() -> None:
    fine = ["ERA_PORT", "ERA_SERVER", "ERA_SESSION_ID", "ERA_BASE_URL", "ERAS", "PATH"]
    assert list(check_variables(dict.fromkeys(fine, "1"))) == []
    (warning,) = check_variables({"ERA_VERSION": "1"})
    assert "ERA_VERSION is not a setting, and is ignored" in warning


def test_the_version_needs_hardly_any_import() -> None:
    code, modules, said = imported("--version")
    assert (code, said) == (0, "")
    assert not modules & (HEAVY | LIGHT)
    assert len(modules) < 60, modules
    assert era(None, "--version", code=0).stdout == f"{package.__version__}\n"


def test_a_run_waits_for_no_import_that_it_has_no_use_for(server: Server, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("print(1)")
    for _ in range(2):  # the first one makes the session
        code, modules, said = imported("run", "--session", "warm", tmp_path / "one.py", ERA_SERVER=server.url)
        assert (code, said) == (0, "")
    assert not modules & (HEAVY | IDLE)
    assert len(modules) < 150, modules


def test_the_start_says_whether_programs_have_internet(server: Server) -> None:
    (line,) = re.findall("^isolation .*", server.log, re.MULTILINE)
    assert "no network" not in line
    assert ("internet" in line) or ("no internet access: " in line)


def start(data_dir: Path) -> subprocess.Popen[str]:
    command = [str(ERA), "serve", "--port", "0", "--data-dir", str(data_dir), "--isolation", "bubblewrap"]
    command += ["--log-level", "warning"]  # or it says which sandboxes it has started
    return subprocess.Popen(
        command,
        env=environment(None),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.soak  # the test below has the moment at which there is most to undo
@pytest.mark.parametrize("often", [False, True], ids=["once", "often"])
def test_ctrl_c_at_any_moment_leaves_no_traceback_and_nothing_else(tmp_path: Path, often: bool) -> None:
    """From the first import to the end of the process; the moments are random, over twice the time of a start."""
    before = mounts()
    data_dir = tmp_path / "data"
    began = time.monotonic()
    process = start(data_dir)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ERA serves")
    seconds = time.monotonic() - began
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == 0
    for _ in range(2):
        process = start(data_dir)
        time.sleep((0.1 + random.random() * 2) * seconds)  # before that, it is Python alone that starts
        process.send_signal(signal.SIGINT)
        while often and process.poll() is None:
            time.sleep(random.random() * 0.2)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=STOP_SECONDS)
        assert err == "", err
        assert process.returncode in ((0,) if out else (-signal.SIGINT, 128 + signal.SIGINT, 0))
        assert_nothing_left(before, [], data_dir)


def test_a_signal_during_the_start_undoes_it(tmp_path: Path) -> None:
    """SIGTERM as soon as there is a database, which is before the first sandbox is proved to work."""
    before = mounts()
    process = start(tmp_path / "data")
    while not (tmp_path / "data" / "era.sqlite").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=STOP_SECONDS)
    assert err == ""
    assert process.returncode == (0 if out else 128 + signal.SIGTERM)
    assert_nothing_left(before, [], tmp_path / "data")
