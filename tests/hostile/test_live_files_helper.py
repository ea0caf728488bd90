"""The helper that reads and changes a live session's files, where a tree is made to lead it astray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from era.guest import live_files
from era.guest.live_files import Files, Refused


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working directory, beside which there is something to be reached."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    (tmp_path / "tree").mkdir()
    return tmp_path / "tree"


@pytest.fixture
def files(tree: Path) -> Iterator[Files]:
    root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    yield Files(root)
    os.close(root)


def put(files: Files, path: list[str], content: bytes) -> None:
    handle = files.create(path)[0]["handle"]
    files.write(handle, 0, content)
    files.place(handle, path[-1], None, 0)


def attempts(files: Files) -> set[str]:
    """Which requests reach something through the link `d`."""
    reached = set()
    for what, attempt in (
        ("read", lambda: files.open(["d", "secret"])),
        ("stat", lambda: files.stat(["d", "secret"])),
        ("put", lambda: put(files, ["d", "new"], b"x")),
        ("mkdir", lambda: files.mkdir(["d", "made"], None)),
        ("move", lambda: files.move(["f"], ["d", "f"], replace=False)),
        ("delete", lambda: files.delete(["d", "secret"], recursive=False)),
    ):
        try:
            attempt()
        except (Refused, OSError):
            continue
        reached.add(what)
    return reached


def test_a_link_leads_nowhere(tree: Path, files: Files) -> None:
    (tree / "d").symlink_to("../outside")
    (tree / "f").touch()
    assert attempts(files) == set()
    assert os.listdir(tree.parent / "outside") == ["secret"]
    found, _ = files.list([], [""], 100, directories=True)
    assert found["count"] == 2, "the link isn't walked"


def test_the_attack_bites_where_links_are_followed(tree: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_files, "DIRECTORY", os.O_RDONLY | os.O_DIRECTORY)
    (tree / "d").symlink_to("../outside")
    (tree / "f").touch()
    assert attempts(files) == {"read", "stat", "put", "mkdir", "move", "delete"}


def test_a_directory_that_becomes_a_link_meanwhile_is_still_that_directory(tree: Path, files: Files) -> None:
    (tree / "d").mkdir()
    handle = files.create(["d", "new"])[0]["handle"]
    (tree / "d").rename(tree / "old")
    (tree / "d").symlink_to("../outside")
    files.write(handle, 0, b"x")
    files.place(handle, "new", None, 0)
    assert (tree / "old/new").read_bytes() == b"x"
    assert os.listdir(tree.parent / "outside") == ["secret"]


def test_deleting_a_directory_deletes_links_and_not_what_they_point_to(tree: Path, files: Files) -> None:
    (tree / "d/e").mkdir(parents=True)
    (tree / "d/e/link").symlink_to(tree.parent / "outside")
    files.delete(["d"], recursive=True)
    assert os.listdir(tree) == []
    assert os.listdir(tree.parent / "outside") == ["secret"]


@pytest.mark.parametrize(
    "path", [["..", "outside", "secret"], ["a/../../outside/secret"], ["/etc/passwd"], [""], ["\0"]]
)
def test_only_names_are_names(files: Files, path: list[str]) -> None:
    with pytest.raises(Refused):
        files.open(path)


def test_pipes_are_not_waited_for(tree: Path, files: Files) -> None:
    os.mkfifo(tree / "pipe")
    with pytest.raises(Refused, match="other"):
        files.open(["pipe"])
    assert files.list([], [""], 10, directories=False)[0]["count"] == 0


def test_a_file_that_never_got_its_place_leaves_nothing(tree: Path, files: Files) -> None:
    handle = files.create(["new"])[0]["handle"]
    assert files.list([], [""], 10, directories=False)[0]["count"] == 0, "drafts aren't listed"
    files.close(handle)
    assert os.listdir(tree) == []
