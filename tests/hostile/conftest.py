"""Fixtures of the tests of failures."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.s3 import bucket, faulty, s3

__all__ = ["bucket", "faulty", "s3"]


@pytest.fixture(scope="session")
def strace() -> None:
    """Skip where system calls can't be traced; on CI fail instead, so that it is noticed."""
    works = shutil.which("strace") and subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True)
    if not works or works.returncode != 0:
        reason = "strace is needed and must be allowed to trace: apt-get install strace"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory in memory, as the tests' files needn't last."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as directory:
        yield Path(directory)
