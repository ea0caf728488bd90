"""Steps that tests of all drivers take."""

from __future__ import annotations

import os
from typing import Any


def shared(sandboxes: Any, language: str) -> Any:
    """The sandbox of this language that tests share. It has run a program before, so that its spare is warm."""
    sandbox = sandboxes.shared.get(language)
    if sandbox is None or not is_alive(sandboxes, sandbox):
        sandbox = sandboxes.shared[language] = sandboxes.make(language)
        sandboxes.run(sandbox, "")
    return sandbox


def is_alive(sandboxes: Any, sandbox: Any) -> bool:
    return bool(sandboxes.alive(sandbox) if sandboxes.far else sandbox.alive)


def says(sandboxes: Any, sandbox: Any, code: str, **more: Any) -> str:
    """What a program writes to stdout, which has to exit with 0."""
    result = sandboxes.run(sandbox, code, **more)
    assert (result.ended.exit_code, result.ended.cause) == (0, "exit"), result.stdout + result.stderr
    return str(result.stdout)


def uid_of(sandboxes: Any) -> int:
    """The uid of the service."""
    return int(sandboxes.uid if sandboxes.far else os.getuid())
