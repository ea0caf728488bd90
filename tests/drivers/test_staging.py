"""What is left of a sandbox on the host is removed, whatever it is."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from era.core.concurrency import outages
from era.drivers.cgroups import Group
from era.drivers.staging import remove_tree
from tests.drivers.sandboxes import Sandboxes, Weakness


def fill(home: Path, what: str) -> None:
    workspace = home / "workspace"
    workspace.mkdir(parents=True)
    (workspace / ".session_data.json").write_text("{}")
    if what == "many files":
        for number in range(100):
            (workspace / str(number)).touch()
    elif what == "a tree":
        (workspace / "a" / "b").mkdir(parents=True)
        (workspace / "a" / "b" / "c").touch()
    elif what == "closed directories":
        (workspace / "a").mkdir()
        (workspace / "a" / "b").touch()
        (workspace / "a").chmod(0)
        workspace.chmod(0o500)


@pytest.mark.parametrize("what", ["a file", "many files", "a tree", "closed directories"])
def test_all_of_it_goes(tmp_path: Path, what: str) -> None:
    fill(tmp_path / "home", what)
    remove_tree(tmp_path / "home")
    assert list(tmp_path.iterdir()) == []
    remove_tree(tmp_path / "home")


def test_a_few_files_go_without_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("subprocess.run")
    fill(tmp_path / "home", "a file")
    remove_tree(tmp_path / "home")
    assert list(tmp_path.iterdir()) == []


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").touch()
    fill(tmp_path / "home", "a file")
    (tmp_path / "home" / "workspace" / "file").symlink_to(canary / "file")
    (tmp_path / "home" / "workspace" / "directory").symlink_to(canary)
    (tmp_path / "home" / "beside").symlink_to(canary)
    remove_tree(tmp_path / "home")
    assert [path.name for path in tmp_path.iterdir()] == ["canary"]
    assert (canary / "file").exists()


@contextmanager
def another_file_system(directory: Path) -> Iterator[None]:
    """One is mounted there, as a subvolume of btrfs would be for those who may not look into the disk."""
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs mounts")
def test_a_service_starts_where_a_tree_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "_noted_at", {})
    fill(tmp_path / "live" / "sb-1", "a tree")
    with another_file_system(tmp_path / "live" / "sb-2" / "workspace" / "v"), capture_logs() as logs:
        sandboxes = Sandboxes(tmp_path, Weakness())
        try:
            assert [path.name for path in (tmp_path / "live").glob("sb-?")] == ["sb-2"]
            assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["files_not_removed"]
            assert sandboxes.run(sandboxes.make(), "print('well')").stdout == "well\n"
        finally:
            sandboxes.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs mounts, and uids of sandboxes")
def test_a_sandbox_whose_tree_stays_is_closed_and_its_uid_is_not_used_again(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    uid = sandbox.uid
    with another_file_system(sandbox.workspace / "v"):
        sandboxes.close(sandbox)
        assert sandbox not in sandboxes.driver._sandboxes
        assert uid not in sandboxes.driver.uids._free
    assert remove_tree(sandbox.workspace.parent)


def test_a_sandbox_whose_control_group_stays_is_closed_all_the_same(
    sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where something of the host's has moved there."""
    monkeypatch.setattr(outages, "_noted_at", {})
    sandbox = sandboxes.make()
    if sandbox._group is None:
        pytest.skip("there are no control groups here")
    uid = sandbox.uid

    def fails(self: Group) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(Group, "remove", fails)
        sandboxes.close(sandbox)
    assert [line["event"] for line in logs] == ["control_group_not_removed"]
    assert sandbox not in sandboxes.driver._sandboxes
    assert not sandbox.workspace.parent.exists()
    assert uid not in sandboxes.driver.uids._free, "something may have it still"
    sandbox._group.remove()


def test_a_sandbox_that_can_not_be_closed_does_not_keep_a_driver_from_its_end(tmp_path: Path) -> None:
    sandboxes = Sandboxes(tmp_path, Weakness())
    other, sandbox = sandboxes.make(), sandboxes.make()

    async def fails() -> None:
        await close()
        raise OSError(errno.EBUSY, "Device or resource busy")

    close, sandbox.close = sandbox.close, fails  # type: ignore[method-assign]  # for this test
    with capture_logs() as logs:
        sandboxes.stop()
    assert [line["event"] for line in logs] == ["sandbox_not_closed"]
    assert not other.workspace.exists()
    assert sandboxes.driver.spawner._shutdown
