"""What is left of a sandbox on the host is removed, whatever it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from era.drivers.staging import remove_tree


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
