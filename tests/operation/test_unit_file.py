"""The systemd unit that the documents show, as systemd reads it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ERA

ROOT = Path(__file__).parents[2]
ANALYZE = shutil.which("systemd-analyze")
UNIT = re.search(r"\[Unit\].*?(?=```)", (ROOT / "docs" / "deployment.md").read_text(), re.DOTALL)


def complaints(directory: Path, unit: str) -> tuple[int, str]:
    """What systemd has to say about a unit."""
    path = directory / "era.service"
    path.write_text(unit)
    done = subprocess.run(
        [str(ANALYZE), "verify", "--man=no", path], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(ANALYZE is None, reason="needs systemd-analyze, of Debian's package systemd")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    assert UNIT is not None
    unit = UNIT[0].replace("/opt/era/.venv/bin/era", str(ERA))
    assert complaints(tmp_path, unit) == (0, "")
    code, text = complaints(tmp_path, unit.replace("Delegate=", "Delegates="))
    assert "Unknown key 'Delegates'" in text
    code, text = complaints(tmp_path, UNIT[0].replace("/opt/era/.venv", str(tmp_path)))
    assert code != 0
    assert "not executable" in text
