"""The `era` command as its users call it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import ERA, Server


def environment(server: Server | None, **variables: str) -> dict[str, str]:
    """This process's environment without its ERA_ variables, but with ERA_SERVER if there is a server."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
    return own | ({} if server is None else {"ERA_SERVER": server.url}) | variables


def era_bytes(
    server: Server | None,
    *words: str | Path,
    stdin: bytes = b"",
    cwd: Path | None = None,
    code: int | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run the command. It must print no traceback, and leave with this exit code unless that is None."""
    done = subprocess.run(
        [ERA, *words], input=stdin, capture_output=True, cwd=cwd, env=environment(server, **env or {}), timeout=300
    )
    assert code is None or done.returncode == code, (done.stdout + done.stderr).decode()
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def era(
    server: Server | None,
    *words: str | Path,
    stdin: str = "",
    cwd: Path | None = None,
    code: int | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """The same in text."""
    done = era_bytes(server, *words, stdin=stdin.encode(), cwd=cwd, code=code, env=env)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
