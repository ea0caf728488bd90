"""The helper that tells what changes in a live session's files, where a tree is made to lead it astray."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def live_watch(guest_module: Callable[[str], Any]) -> Any:
    return guest_module("live_watch")


@pytest.fixture
def watch(live_watch: Any, tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "tree").mkdir()
    (tmp_path / "outside").mkdir()
    root = os.open(tmp_path / "tree", os.O_RDONLY | os.O_DIRECTORY)
    return lambda *path, recursive=True: live_watch.Watch(root, list(path), recursive=recursive)


def test_links_are_not_watched(watch: Callable[..., Any], live_watch: Any, tmp_path: Path) -> None:
    (tmp_path / "tree/link").symlink_to(tmp_path / "outside")
    made = watch()
    (tmp_path / "tree/later").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/secret").touch()
    (tmp_path / "tree/own").touch()
    assert {tuple(each["path"]) for each in made.take()} == {("later",), ("own",)}
    assert list(made.directories.values()) == [()]
    with pytest.raises(live_watch.Refused, match="link"):
        watch("link", "below")


def test_a_link_in_place_of_a_watched_directory_leads_nowhere(watch: Callable[..., Any], tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "d").mkdir()
    made = watch()
    (tree / "d").rename(tree / "old")
    (tree / "d").symlink_to(tmp_path / "outside")
    made.take()
    (tmp_path / "outside/secret").touch()
    (tree / "old/own").touch()
    assert {tuple(each["path"]) for each in made.take()} == {("old", "own")}


def test_too_many_directories_are_refused(
    watch: Callable[..., Any], live_watch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_watch, "MOST_DIRECTORIES", 5)
    made = watch()
    for number in range(6):
        (tmp_path / f"tree/{number}").mkdir()
    with pytest.raises(live_watch.Refused, match="many"):
        made.take()
