"""The blocking client is what scripts/blocking.py makes of the one for asyncio."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_blocking_client_is_made_of_the_other() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "blocking.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_of_the_command_is_made_of_its_parsers() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "cli_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_errors_is_made_of_the_sources() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "error_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
