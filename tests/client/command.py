"""The `era` command as its users call it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile

from tests.conftest import ERA, Server, preloaded

LARGE = {"backup", "check", "gc", "migrate", "restore", "serve"}
"""Commands that import the server, which takes them two seconds."""


def environment(server: Server | None, **variables: str) -> dict[str, str]:
    """This process's environment without its ERA_ variables, but with ERA_SERVER if there is a server."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
    return own | ({} if server is None else {"ERA_SERVER": server.url}) | variables


def _forked(
    words: list[str], variables: dict[str, str], stdin: bytes, cwd: Path | None
) -> subprocess.CompletedProcess[bytes]:
    with TemporaryFile() as given, TemporaryFile() as out, TemporaryFile() as err:
        given.write(stdin)
        streams = given, out, err
        for stream in streams:
            stream.seek(0)
        code = preloaded().start(words, variables, (given.fileno(), out.fileno(), err.fileno()), cwd).wait(300)
        for stream in streams:
            stream.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


def era_bytes(
    server: Server | None,
    *words: str | Path,
    stdin: bytes = b"",
    cwd: Path | None = None,
    code: int | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run the command. It must print no traceback, and leave with this exit code unless that is None."""
    variables = environment(server, **env or {})
    if words[0] in LARGE and "PYTHONPATH" not in variables:
        done = _forked([*map(str, words)], variables, stdin, cwd)
    else:
        done = subprocess.run([ERA, *words], input=stdin, capture_output=True, cwd=cwd, env=variables, timeout=300)
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
