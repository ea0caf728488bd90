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

from era.core.models import EMPTY, Snapshot
from era.core.trees.allowance import Allowance, Full
from tests.drivers.sandboxes import LIMITS

NOBODY = 65534


def as_a_user(directory: Path, job: Callable[[], object]) -> None:
    """Do this in a directory of an ordinary user, as that user."""
    if os.geteuid():
        os.chdir(directory)
        try:
            job()
        finally:
            os.chmod("shut", 0o700)  # or nobody could remove it
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


class Disk:
    """A file system of which nobody but the test takes anything."""

    taken = 0
    """Bytes."""

    def statvfs(self, _: object) -> SimpleNamespace:
        return SimpleNamespace(f_bfree=(1 << 20) - self.taken // 4096, f_frsize=4096, f_ffree=1 << 20)


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.chdir(tmp_path)  # back at the end
    made = Disk()
    monkeypatch.setattr("era.core.trees.allowance.os.statvfs", made.statvfs)
    return made


def test_a_closed_directory_alone_is_no_harm(tmp_path: Path, disk: Disk) -> None:
    def job() -> None:
        os.mkdir("shut", 0)
        watch = allowance()
        for n in range(6):
            Path("more").write_bytes(b"x" * 1000 * n)
            disk.taken = 4096
            watch._measure()

    as_a_user(tmp_path, job)


@pytest.mark.parametrize("mode", [0, 0o400], ids=["closed", "can only be listed"])
@pytest.mark.parametrize("before", [0, 1 << 20])
def test_what_a_closed_directory_takes_counts(tmp_path: Path, disk: Disk, before: int, mode: int) -> None:
    def job() -> None:
        os.mkdir("shut")
        Path("shut/file").touch()
        os.chmod("shut", mode)
        watch = allowance(Snapshot("", 2, before) if before else EMPTY)
        disk.taken = (2 << 20) - before
        for _ in range(6):
            watch._measure()
        disk.taken += 1 << 16
        watch._measure()
        watch._measure()
        with pytest.raises(Full, match="closed directories"):
            watch._measure()

    as_a_user(tmp_path, job)
