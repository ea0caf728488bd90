"""The tests of adapters, each file in a process of its own.

Frameworks of agents take ten seconds to import and fill a process, and where tests are shared out, every worker
collects every test. Whoever names this folder, or one of its files, gets their tests themselves (conftest.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters.conftest import FOLDER
from tests.documents import ROOT

FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
NOT_HERE = {"test_apart.py", "test_jupyterlab.py"}
"""This file, and one that has long tests only."""


@pytest.mark.slow
@pytest.mark.parametrize("file", [name for name in FILES if name not in NOT_HERE])
def test_adapters(file: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-rs"]
    command += ["--basetemp", str(tmp_path / "its"), str(FOLDER / file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 5), done.stdout[-20_000:] + done.stderr[-5_000:]
    skipped = re.findall(r"^SKIPPED .*", done.stdout, re.MULTILINE)
    if skipped:
        pytest.skip("; ".join(skipped))
    assert done.returncode == 0, f"{file} has no tests"
