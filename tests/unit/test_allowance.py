"""Directories that an ordinary user's service can't look into, since their mode forbids it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from era.core.files.allowance import Allowance, Full
from era.core.models import EMPTY, Snapshot
from tests.drivers.sandboxes import LIMITS

NOBODY = 65534


def as_a_user(directory: Path, job: Callable[[], object]) -> None:
    """Do this in a directory of an ordinary user, as that user."""
    if os.geteuid():
        os.chdir(directory)
        job()
        return
    os.chown(directory, NOBODY, NOBODY)
    if not (pid := os.fork()):
        try:
            os.chdir(directory)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            job()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def allowance(before: Snapshot = EMPTY) -> Allowance:
    """That of a run in the working directory, which may have 2 MiB."""
    sandbox: Any = SimpleNamespace(
        id="sb",
        workspace=Path(),
        limits=replace(LIMITS, disk_bytes=2 << 20),
        may_have_packages=lambda: False,
        unnamed_bytes=lambda _: 0,
        hides_files=lambda _: False,
    )

    async def end() -> None: ...

    return Allowance(sandbox, before, end)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # back at the end


def test_a_closed_directory_alone_is_no_harm(tmp_path: Path) -> None:
    def job() -> None:
        os.mkdir("shut", 0)
        watch = allowance()
        for _ in range(6):
            Path("more").write_bytes(b"x" * 1000)
            watch._measure()

    as_a_user(tmp_path, job)


@pytest.mark.parametrize("others", ["nothing", "what was there"])
def test_what_a_closed_directory_takes_counts(tmp_path: Path, others: str) -> None:
    def job() -> None:
        os.mkdir("shut")
        if others == "what was there":
            Path("shut", "before").write_bytes(os.urandom(1 << 20))
            os.sync()
        watch = allowance(Snapshot("", 2, 1 << 20) if others == "what was there" else EMPTY)
        with open("shut/file", "wb") as file:
            os.chmod("shut", 0)
            file.write(os.urandom(3 << 20))
            file.flush()
            os.fsync(file.fileno())

            def measure_often() -> None:  # what others free may hide it for a while
                for _ in range(1000):
                    watch._measure()

            with pytest.raises(Full, match="closed directories"):
                measure_often()

    as_a_user(tmp_path, job)
