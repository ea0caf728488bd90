"""The helper that reads and changes a live session's files, where a tree is made to lead it astray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.table import table


@pytest.fixture
def live_files(guest_module: Callable[[str], Any]) -> Any:
    return guest_module("live_files")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working directory, beside which there is something to be reached."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    (tmp_path / "tree").mkdir()
    return tmp_path / "tree"


@pytest.fixture
def files(tree: Path, live_files: Any) -> Iterator[Any]:
    root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    yield live_files.Files(root)
    os.close(root)


def put(files: Any, path: list[str], content: bytes) -> None:
    handle = files.create(path)[0]["handle"]
    files.write(handle, 0, content)
    files.place(handle, path[-1], None, 0)


def attempts(files: Any, refused: type[Exception]) -> set[str]:
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
        except (refused, OSError):
            continue
        reached.add(what)
    return reached


def test_a_link_leads_nowhere(tree: Path, files: Any, live_files: Any) -> None:
    (tree / "d").symlink_to("../outside")
    (tree / "f").touch()
    assert attempts(files, live_files.Refused) == set()
    assert os.listdir(tree.parent / "outside") == ["secret"]
    found, _ = files.list([], [""], 100, directories=True)
    assert found["count"] == 2, "the link isn't walked"


def test_the_attack_bites_where_links_are_followed(
    tree: Path, files: Any, live_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_files, "DIRECTORY", os.O_RDONLY | os.O_DIRECTORY)
    (tree / "d").symlink_to("../outside")
    (tree / "f").touch()
    assert attempts(files, live_files.Refused) == {"read", "stat", "put", "mkdir", "move", "delete"}


def test_a_directory_that_becomes_a_link_meanwhile_is_still_that_directory(tree: Path, files: Any) -> None:
    (tree / "d").mkdir()
    handle = files.create(["d", "new"])[0]["handle"]
    (tree / "d").rename(tree / "old")
    (tree / "d").symlink_to("../outside")
    files.write(handle, 0, b"x")
    files.place(handle, "new", None, 0)
    assert (tree / "old/new").read_bytes() == b"x"
    assert os.listdir(tree.parent / "outside") == ["secret"]


def test_deleting_a_directory_deletes_links_and_not_what_they_point_to(tree: Path, files: Any) -> None:
    (tree / "d/e").mkdir(parents=True)
    (tree / "d/e/link").symlink_to(tree.parent / "outside")
    files.delete(["d"], recursive=True)
    assert os.listdir(tree) == []
    assert os.listdir(tree.parent / "outside") == ["secret"]


@table("path", [["..", "outside", "secret"], ["a/../../outside/secret"], ["/etc/passwd"], [""], ["\0"]])
def test_only_names_are_names(files: Any, live_files: Any, path: list[str]) -> None:
    with pytest.raises(live_files.Refused):
        files.open(path)


def test_pipes_are_not_waited_for(tree: Path, files: Any, live_files: Any) -> None:
    os.mkfifo(tree / "pipe")
    with pytest.raises(live_files.Refused, match="other"):
        files.open(["pipe"])
    assert files.list([], [""], 10, directories=False)[0]["count"] == 0


def test_a_file_that_never_got_its_place_leaves_nothing(tree: Path, files: Any) -> None:
    handle = files.create(["new"])[0]["handle"]
    assert files.list([], [""], 10, directories=False)[0]["count"] == 0, "drafts aren't listed"
    files.close(handle)
    assert os.listdir(tree) == []


def test_one_file_too_many_leaves_nothing(
    tree: Path, files: Any, live_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a caller has as many open as may be."""
    monkeypatch.setattr(live_files, "MOST_HANDLES", 1)
    (tree / "f").touch()
    files.open(["f"])
    before = os.listdir("/proc/self/fd")
    for request in (files.create, files.open):
        with pytest.raises(live_files.Refused, match="busy"):
            request(["f"])
    with pytest.raises(live_files.Refused, match="busy"):
        files.put(["f"], None, 0, b"new")
    assert os.listdir(tree) == ["f"]
    assert os.listdir("/proc/self/fd") == before
