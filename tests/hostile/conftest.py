"""Fixtures of the tests of failures."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.store.s3 import bucket, faulty, s3

__all__ = ["bucket", "faulty", "s3"]

GUEST = Path(__file__).resolve().parents[2] / "src" / "era" / "guest"


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


@pytest.fixture
def guest_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import a module of the guest's under the name that it has inside a sandbox, where there is no `era`."""
    monkeypatch.syspath_prepend(str(GUEST))
    yield importlib.import_module
    for name in [name for name, module in sys.modules.items() if _is_guest(module)]:
        del sys.modules[name]


def _is_guest(module: Any) -> bool:
    return module.__name__.count(".") == 0 and Path(getattr(module, "__file__", None) or "/").parent == GUEST
