"""What starts a tool: nothing is started for a service that has died meanwhile."""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from era.packages import child


@pytest.mark.parametrize("parent_lives", [True, False])
def test_a_tool_is_only_started_for_a_service_that_lives(tmp_path: Path, *, parent_lives: bool) -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    plan: dict[str, Any] = {
        "parent": os.getpid() if parent_lives else dead.pid,
        "uid": None,
        "rlimits": {},
        "directory": os.fspath(tmp_path),
        "command": [sys.executable, "-c", "open('started', 'w').close()"],
        "environment": {},
    }
    code = subprocess.run([sys.executable, child.__file__], input=marshal.dumps(plan), timeout=60).returncode
    assert (code, (tmp_path / "started").exists()) == ((0, True) if parent_lives else (1, False))
