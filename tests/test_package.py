"""The distribution: what is in it, and that it works where nothing is but itself and what it depends on.

Dependencies are installed in the versions of uv.lock, from uv's cache or from the registry that this machine's uv asks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import uv

import era
from tests.conftest import Process, Server, assert_nothing_left, eventually, mounts

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UV = uv.find_uv_bin()
MACHINE_CERTS = Path("/etc/ssl/certs/ca-certificates.crt")
START_SECONDS = 0.15


def environment() -> dict[str, str]:
    """This process's environment, with uv configured as scripts/setup does it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ERA_", "PYTHON", "VIRTUAL_ENV"))}
    own |= {"UV_PYTHON_DOWNLOADS": "never"}
    if (ROOT / ".tools/cache").exists():
        own.setdefault("UV_CACHE_DIR", str(ROOT / ".tools/cache"))
    if MACHINE_CERTS.exists():
        own = {"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1"} | own
    return own


def run(*command: str | Path, code: int = 0, cwd: Path = ROOT) -> str:
    """Run a command that must leave with this exit code. Returns its standard output, of a failure its errors."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def processor_seconds(*command: str | Path) -> float:
    """The least processor time of a command in several tries: what it takes on a machine that does nothing else."""
    tries = []
    silently = [(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
    for _ in range(5):
        pid = os.posix_spawn(command[0], command, environment(), file_actions=silently)
        _, status, usage = os.wait4(pid, 0)
        assert status == 0
        tries.append(usage.ru_utime + usage.ru_stime)
    return min(tries)


@dataclass(frozen=True)
class Distribution:
    wheel: Path
    constraints: Path
    """A file with the versions of uv.lock."""


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """The wheel, built from the source distribution as package indexes get it."""
    directory = tmp_path_factory.mktemp("dist")
    run(UV, "build", "--quiet", "--out-dir", directory)
    constraints = directory / "constraints.txt"
    options = ("--frozen", "--quiet", "--all-extras", "--no-dev", "--no-emit-project", "--no-hashes")
    run(UV, "export", *options, "--output-file", constraints)
    (wheel,) = directory.glob("*.whl")
    return Distribution(wheel, constraints)


def test_the_wheel_holds_the_package_and_its_licence(distribution: Distribution) -> None:
    with zipfile.ZipFile(distribution.wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        head = archive.read(metadata).decode()
    files = {path for path in (ROOT / "src/era").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {name for name in names if name.startswith("era/")} == {
        str(path.relative_to(ROOT / "src")) for path in files
    }
    for built in ("dashboard", "guide"):
        assert f"era/web/{built}/index.html" in names, f"the {built} isn't built: `scripts/setup`"
    assert metadata.replace("METADATA", "licenses/LICENSE") in names
    assert re.search(r"^Name: era-sessions$", head, re.MULTILINE)
    assert re.search(r"^License-Expression: Apache-2.0$", head, re.MULTILINE)
    assert re.search(rf"^Version: {re.escape(era.__version__)}$", head, re.MULTILINE)
    assert PROJECT["version"] == era.__version__


def install(distribution: Distribution, venv: Path, extra: str = "") -> Path:
    """Make a virtual environment with the package in it."""
    run(UV, "venv", "--quiet", "--python", os.path.realpath(sys.executable), venv)
    options = ("--quiet", "--python", venv, "--constraints", distribution.constraints)
    run(UV, "pip", "install", *options, f"{distribution.wheel}{extra}")
    return venv


@pytest.fixture(scope="module")
def plain(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the plain install."""
    return install(distribution, tmp_path_factory.mktemp("plain") / "venv")


def test_the_plain_install_has_no_server_library(plain: Path) -> None:
    installed = {each["name"] for each in json.loads(run(UV, "pip", "list", "--format", "json", "--python", plain))}
    listed = {re.split(r"[<>=\[]", each)[0] for each in PROJECT["optional-dependencies"]["server"]}
    # What httpx itself needs.
    assert installed & listed == {"anyio", "h11"}


@pytest.mark.parametrize("words", [("python", "-c", "import era"), ("era", "--version")], ids=" ".join)
def test_the_plain_install_starts_fast(plain: Path, words: tuple[str, ...]) -> None:
    assert processor_seconds(plain / "bin" / words[0], *words[1:]) < START_SECONDS


def test_the_plain_install_calls_servers(plain: Path, server: Server, tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text("print('hello')")
    assert run(plain / "bin/era", "run", "--server", server.url, tmp_path / "hello.py") == "hello\n"
    run(plain / "bin/era", "push", "nobody", tmp_path, "--server", server.url, code=2)


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_the_plain_install_says_how_to_get_the_server(plain: Path, command: str) -> None:
    errors = run(plain / "bin/era", command, code=2)
    assert errors.endswith(": pip install 'era-sessions[server]'\n")
    assert errors.count("\n") == 1


@dataclass
class ToolServer(Server):
    """A server that `uvx` starts, for a user whose home is empty."""

    uvx: tuple[str, ...] = ()
    home: Path = Path()

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> Process:
        settings = {name: value for name, value in environment.items() if name.startswith("ERA_")}
        # Compiling Go's library keeps all processors busy, and other tests run beside this one.
        command = ["nice", "-n", "5", *self.uvx, "era", "serve"]
        return super()._spawn(command, uvx_environment(self.home) | settings, log)


def uvx_environment(home: Path) -> dict[str, str]:
    cache = run(UV, "cache", "dir").strip()
    return environment() | {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "UV_CACHE_DIR": cache}


@pytest.fixture(scope="module")
def tool_server(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolServer]:
    directory = tmp_path_factory.mktemp("tool")
    python = ("--python", os.path.realpath(sys.executable))
    constraints = ("--constraints", str(distribution.constraints))
    uvx = (UV, "tool", "run", "--quiet", *python, *constraints, "--from", f"{distribution.wheel}[server]")
    # Installs, so that the server's start needn't wait for it.
    command = (*uvx, "python", "-c", "import sys; print(sys.prefix)")
    installed = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=uvx_environment(directory), check=True)
    before = mounts()
    server = ToolServer(directory / "data", uvx=uvx, home=directory, start_seconds=600)  # long, for `nice`
    server.start()
    yield server
    processes = server.descendants()
    assert server.stop() == 0, server.log
    assert_nothing_left(before, processes, server.data_dir)
    # uv keeps what it made in its cache, where this wheel's will never be asked for again.
    shutil.rmtree(installed.stdout.strip())


def test_an_install_with_the_server_has_what_the_server_imports(distribution: Distribution, tmp_path: Path) -> None:
    venv = install(distribution, tmp_path / "venv", "[server]")
    run(venv / "bin/python", "-c", "import era.app, era.server.server, era.mcp.tools, era.operation.backup")


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", "print('up')"),
        ("node", "console.log('up')"),
        pytest.param(  # it compiles Go's standard library
            "go", 'package main\n\nimport "fmt"\n\nfunc main() { fmt.Println("up") }', marks=pytest.mark.soak
        ),
    ],
    ids=["python", "node", "go"],
)
def test_uvx_serves(tool_server: ToolServer, language: str, code: str) -> None:
    """Go's first program waits until its standard library is compiled: by what is left of the processors, so on a busy
    machine it may be told to come again."""
    body = {"language": language, "code": code, "timeout": 300}
    with tool_server.client(timeout=400) as client:

        def answered() -> dict[str, Any] | None:
            answer = client.post("/api/execute", json=body)
            return None if answer.status_code == 503 and "still being compiled" in answer.text else answer.json()

        answer = eventually(answered, seconds=400)
    assert (answer["status"], answer["stdout"]) == ("ok", "up\n"), answer
