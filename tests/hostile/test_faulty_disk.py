"""A disk that fails: the nth call of a kind during a commit, for n = 1, 2, 3 … until none is left to fail.

Calls on blobs fail in this process, those of SQLite by strace in a process of its own. A full disk is a real one.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from era.core.metadata import Retention
from era.errors import CommitFailed, SandboxFailed, Unavailable
from era.store.blobs.blobs import LocalBlobs
from era.store.metadata import SqlStore
from tests.conftest import eventually
from tests.hostile.commits import Commits
from tests.hostile.power import workload
from tests.soaking import soak_the_rest

CALLS = ("open", "write", "fsync", "rename", "utime", "unlink", "listdir", "read", "posix_fadvise", "stat", "sendfile")


class FaultyDisk:
    """Replaces `os.NAME`, and fails the nth call about a file or directory below `directory`."""

    def __init__(self, directory: Path, name: str, n: int, error: int) -> None:
        self._directory = os.fspath(directory)
        self._left = n
        self._error = error
        self._real = getattr(os, name)
        self.name = name
        self.failed = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if any(self._is_ours(argument) for argument in arguments[:2]):
            self._left -= 1
            if self._left == 0:
                self.failed = True
                raise OSError(self._error, os.strerror(self._error))
        return self._real(*arguments, **options)

    def _is_ours(self, argument: Any) -> bool:
        if isinstance(argument, int):
            try:
                argument = os.readlink(f"/proc/self/fd/{argument}")
            except OSError:
                return False
        return isinstance(argument, str | os.PathLike) and os.fspath(argument).startswith(self._directory)


@contextmanager
def faults(disk: FaultyDisk) -> Iterator[FaultyDisk]:
    """Let calls fail as `disk` says, meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, disk.name, disk)
        yield disk


class Stores:
    """Commits to stores in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.blobs = LocalBlobs(self.data / "blobs")
        self.blobs.open()
        self.store = SqlStore(f"sqlite:///{self.data / 'era.sqlite'}", Retention(versions=1))
        self.commits = Commits(self.store, self.blobs, directory / "workspace")

    async def open(self) -> Stores:
        await self.store.open()
        return self

    async def close(self) -> None:
        await self.commits.snapshots.close()
        await self.store.close()

    async def check(self) -> int:
        return (await self.commits.check(self.directory / "scratch")).version

    async def check_no_orphans(self) -> None:
        """Check that after a collection no blob is left that no row needs."""
        await self.commits.collect()
        found = {path.name for path in (self.data / "blobs").rglob("*") if path.is_file()}
        assert found == await self.commits.reachable()


async def reopened(directory: Path) -> Stores:
    return await Stores(directory).open()


@pytest.mark.parametrize(
    "error",
    [pytest.param(errno.EIO, id="EIO"), pytest.param(errno.ENOSPC, id="ENOSPC", marks=pytest.mark.soak)],
)
@pytest.mark.parametrize("call", soak_the_rest(CALLS, ("write", "fsync", "rename")))
async def test_a_commit_whose_files_fail_leaves_the_old_state(call: str, error: int, scratch: Path) -> None:
    stores = await reopened(scratch)
    await stores.commits.create()
    failures = 0
    for kind in range(2, 7):  # Version 5 has a large file, 6 has more files than are synced one by one.
        n = 1
        while True:
            with faults(FaultyDisk(stores.data / "blobs", call, n, error)) as disk:
                try:
                    assert await stores.commits.commit() == kind
                except CommitFailed:
                    failures += 1
                else:
                    break
            assert disk.failed
            assert await stores.check() == kind - 1
            n += 1 if n < 12 or kind < 6 else 97
        assert await stores.check() == kind
        if disk.failed:  # the commit went on without that call
            assert call in ("posix_fadvise", "unlink")
    await stores.close()
    stores = await reopened(scratch)
    assert await stores.check() == 6
    await stores.check_no_orphans()
    await stores.close()
    if call in ("open", "write", "fsync", "rename", "utime"):
        assert failures > 10


@pytest.mark.parametrize(
    "call", soak_the_rest(["open", "read", "unlink", "listdir", "stat", "sendfile"], ("open", "read", "unlink"))
)
async def test_a_restore_or_a_collection_that_fails_harms_nothing(call: str, scratch: Path) -> None:
    stores = await reopened(scratch)
    await stores.commits.create()
    n = 1
    while True:
        for _ in range(2 if n == 1 else 1):
            version = await stores.commits.commit()
        with faults(FaultyDisk(stores.data / "blobs", call, n, errno.EIO)) as disk:
            try:
                await stores.check()
                await stores.commits.collect()
            except (SandboxFailed, Unavailable):
                assert disk.failed
        assert await stores.check() == version
        if not disk.failed or n > 600:
            break
        n += 1 if n < 20 else 83
    await stores.check_no_orphans()
    await stores.close()


SQLITE_FAULTS = [
    ("pwrite64", "era.sqlite-wal", "EIO"),
    ("fdatasync", "era.sqlite-wal", "EIO"),
    ("pwrite64", "era.sqlite", "ENOSPC"),
    ("pwrite64", "era.sqlite-wal", "ENOSPC"),
    ("pwrite64", "era.sqlite", "EIO"),
    ("fdatasync", "era.sqlite", "EIO"),
    ("pread64", "era.sqlite-wal", "EIO"),
    ("openat", "era.sqlite-wal", "EIO"),
]


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize(("call", "file", "error"), SQLITE_FAULTS[:1])
async def test_a_database_that_fails_leaves_old_or_new(call: str, file: str, error: str, scratch: Path) -> None:
    """As tables are made, and in a commit. With more migrations the first commit comes later."""
    for n, is_commit in ((7, False), (259, True)):
        assert await fails(scratch / str(n), call, file, error, n, is_commit=is_commit)


@pytest.mark.soak
@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("first", range(1, 7))
@pytest.mark.parametrize(("call", "file", "error"), SQLITE_FAULTS)
async def test_a_database_that_fails_at_any_call_leaves_old_or_new(
    call: str, file: str, error: str, first: int, scratch: Path
) -> None:
    n = first
    while await fails(scratch / str(n), call, file, error, n):
        n += 6


async def fails(directory: Path, call: str, file: str, error: str, n: int, *, is_commit: bool | None = None) -> bool:
    """Make commits during which SQLite's nth and next such call fail, and check that nothing acknowledged is lost.
    Returns whether that call was reached. `is_commit` says whether that call is one of a commit."""
    (directory / "data").mkdir(parents=True)
    log = directory / "strace"
    command = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", str(log), "-P", str(directory / "data" / file)]
    command += ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={n}..{n + 1}"]
    done = subprocess.run([*command, *workload(directory, 6)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 or "created" not in done.stdout, done.stderr
    assert is_commit in (None, "created" in done.stdout), f"call {n} is another one by now"
    await assert_kept(directory, done.stdout)
    failed = "INJECTED" in log.read_text()
    assert failed or "committed 7" in done.stdout
    shutil.rmtree(directory)
    return failed


COMMITS = [
    pytest.param([], "1", ["committed 4", "collected"], [4], id="once"),
    pytest.param(["impatient"], "1", ["unknown", "collected"], [3], id="once, and nobody looks"),
    pytest.param([], "1+", ["unknown", "refused"], [3, 4], id="for ever"),
]


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize(("how", "when", "said", "versions"), COMMITS)
async def test_a_commit_whose_sync_fails_is_old_or_new_after_a_kill(
    how: list[str], when: str, said: list[str], versions: list[int], scratch: Path
) -> None:
    """What it wrote is in SQLite's log then, and a restart takes it in unless it is settled before: so its files stay
    until it is."""
    assert commit_whose_sync_fails(scratch, when, *how) == said
    stores = await reopened(scratch)
    try:
        assert await stores.check() in versions
        assert await stores.commits.commit() in [version + 1 for version in versions]
    finally:
        await stores.close()


def commit_whose_sync_fails(directory: Path, when: str, *how: str) -> list[str]:
    """What failing_commit.py says where syncs of SQLite's log fail, those that strace counts as `when`. Kills it."""
    command = [sys.executable, "-m", "tests.hostile.failing_commit", os.fspath(directory), *how]
    log, strace = os.fspath(directory / "data" / "era.sqlite-wal"), None
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            inject = ["-e", "trace=fdatasync", "-e", f"inject=fdatasync:error=EIO:when={when}"]
            strace = subprocess.Popen(
                ["strace", "-f", "-qq", "-o", "/dev/null", "-p", str(process.pid), "-P", log, *inject]
            )
            assert eventually(lambda: is_traced(process.pid))
            process.stdin.write("go\n")
            process.stdin.flush()
            return [process.stdout.readline().rstrip() for _ in range(2)]
        finally:
            process.kill()
            if strace is not None:
                strace.wait()


def is_traced(pid: int) -> bool:
    """Whether all threads of a process are traced."""
    return all("TracerPid:\t0" not in (task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir())


@pytest.mark.parametrize("limit", soak_the_rest([40_000, 100_000, 400_000, 1_000_000], [1_000_000]))
async def test_a_file_size_limit_loses_nothing_acknowledged(limit: int, scratch: Path) -> None:
    """With `ulimit -f`."""
    directory = scratch / "disk"
    directory.mkdir()
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; ulimit -f {limit // 1024}; exec \"$@\"", "-", *workload(directory)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    await assert_kept(directory, done.stdout)
    assert "failed" in done.stdout or "created" not in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
@pytest.mark.parametrize("size", soak_the_rest(["700k", "1200k", "2400k"], ["1200k"]))
async def test_a_full_disk_loses_nothing_acknowledged(size: str, scratch: Path) -> None:
    """Commits fail, what was acknowledged stays, and once there is room again commits work."""
    disk = scratch / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], check=True)
    try:
        done = subprocess.run(workload(disk), capture_output=True, text=True, timeout=120)
        assert "failed" in done.stdout or "created" not in done.stdout
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        await assert_kept(disk, done.stdout)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


async def assert_kept(directory: Path, said: str) -> None:
    """Check that all that was acknowledged is there and whole, and that commits work again."""
    stores = await reopened(directory)
    try:
        if "created" not in said:
            return
        last = max([1, *(int(line.split()[1]) for line in said.splitlines() if line.startswith("committed"))])
        assert last <= await stores.check() <= last + ("failed" in said)
        version = await stores.commits.commit()
        assert await stores.check() == version
        await stores.check_no_orphans()
    finally:
        await stores.close()
