"""The tests of adapters, in a process of their own.

Frameworks of agents take ten seconds to import and fill a process, and where tests are shared out, every worker
collects every test. Whoever names this folder or one of its files, or selects by name, gets their tests themselves
(conftest.py).
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


@pytest.mark.slow
def test_adapters(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-rs"]
    command += ["--basetemp", str(tmp_path / "its"), str(FOLDER)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    if skipped := re.findall(r"^SKIPPED .*", done.stdout, re.MULTILINE):
        pytest.skip("; ".join(skipped))  # frameworks that setup could not install
