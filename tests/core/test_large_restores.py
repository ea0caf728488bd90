"""How large work on files is: all that a restore makes and removes counts, and so does each list of directories."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from era.core.files import file_threads, restoring, trees
from era.core.files.file_threads import Budget
from era.core.models import DEFAULT_OWNER, EMPTY
from tests.core.lab import Lab, described, large_turns
from tests.core.test_file_threads import FILES, filled
from tests.owners import mine


def one_file(workspace: Path) -> None:
    (workspace / "file").touch()


def many_links(workspace: Path) -> None:
    for number in range(FILES):
        (workspace / str(number)).symlink_to(f"{number}")


def other_links(workspace: Path) -> None:
    for number in range(FILES):
        (workspace / str(number)).symlink_to("elsewhere")


def equal_directories(workspace: Path) -> None:
    """In several, each of which has few."""
    for number in range(FILES):
        (workspace / str(number % 6) / str(number)).mkdir(parents=True)


def many_files_below(workspace: Path) -> None:
    (workspace / "file").mkdir()
    for number in range(FILES):
        (workspace / "file" / str(number)).touch()


def directories_of_mode(mode: int) -> Callable[[Path], None]:
    def made(workspace: Path) -> None:
        for number in range(FILES):
            (workspace / str(number)).mkdir()
            (workspace / str(number)).chmod(mode)

    return made


def nothing(_: Path) -> None: ...


CHANGES: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "links": (one_file, many_links),
    "other links": (many_links, other_links),
    "equal directories": (one_file, equal_directories),
    "no directory any more": (many_files_below, one_file),
    "less": (many_links, one_file),
    "nothing any more": (equal_directories, nothing),
    "modes": (directories_of_mode(0o700), directories_of_mode(0o755)),
}
"""What is in a directory, and what is to be."""


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
@pytest.mark.parametrize("what", CHANGES)
async def test_a_restore_is_large_by_all_that_it_makes_and_removes(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, what: str, weakened: bool
) -> None:
    there, wanted = lab.place(), lab.place()
    for place, fill in zip((there, wanted), CHANGES[what], strict=True):
        fill(place.workspace)
    await lab.snapshots.take(there.sandbox, EMPTY, session_id=mine("s"))
    snapshot = await lab.snapshots.take(wanted.sandbox, EMPTY, session_id=mine("s"))
    monkeypatch.setattr(file_threads, "LARGE_BYTES", FILES // 2 * trees.FILE_BYTES)
    if weakened:
        monkeypatch.setattr(restoring, "spend", lambda *_: None)
    turns = large_turns(monkeypatch)
    await lab.snapshots.restore(snapshot, there.sandbox, session_id=mine("s"))
    assert described(there.workspace) == described(wanted.workspace)
    assert turns == ([] if weakened else [DEFAULT_OWNER])
    assert await lab.snapshots.take(there.sandbox, snapshot, session_id=mine("s")) == replace(snapshot, stored_bytes=0)


class NotedReads:
    """Which blobs were read on which kind of threads, and which of them hadn't been fetched ahead."""

    def __init__(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: dict[str, list[str]] = {"era-files": [], "era-bulk": []}
        self.alone: list[str] = []
        self._fetched: set[str] = set()
        self._get = lab.blobs.get
        monkeypatch.setattr(lab.blobs, "get", self.get)
        monkeypatch.setattr(lab.blobs, "expect", self._fetched.update)

    def get(self, digest: str) -> bytes:
        self.read[threading.current_thread().name.rpartition("_")[0]].append(digest)
        if digest not in self._fetched:
            self.alone.append(digest)
        return self._get(digest)


async def test_a_restore_that_is_known_to_be_large_reads_nothing_where_small_work_is_done(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = await lab.snapshots.take(filled(lab, "text").sandbox, EMPTY, session_id=mine("s"))
    noted = NotedReads(lab, monkeypatch)
    monkeypatch.setattr(file_threads, "LARGE_BYTES", FILES * trees.FILE_BYTES - 1)
    await lab.snapshots.restore(snapshot, lab.place().sandbox, session_id=mine("s"))
    assert noted.read == {"era-files": [], "era-bulk": [snapshot.root]}


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_a_count_fetches_together_and_stops_before_it_is_too_much(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    """Where content comes from elsewhere, one list after the other takes as long as many requests."""
    place, snapshots = lab.place(), [EMPTY]
    for number in range(FILES):
        (place.workspace / f"{number % 4}" / f"{number}").mkdir(parents=True)
        (place.workspace / f"{number % 4}" / f"{number}" / "file").write_text(f"{number}")
    for text in ("x", "xx"):
        (place.workspace / "file").write_text(text)
        snapshots.append(await lab.snapshots.take(place.sandbox, snapshots[-1], session_id=mine("s")))
    roots = [str(snapshot.root) for snapshot in snapshots[1:]]
    noted = NotedReads(lab, monkeypatch)
    if weakened:
        monkeypatch.setattr(Budget, "check_room", lambda *_: None)
    monkeypatch.setattr(file_threads, "LARGE_BYTES", FILES // 2 * trees.FILE_BYTES)
    held = await lab.snapshots.held_bytes(roots, 1 << 40, session_id=mine("s"))
    # The first one's own list and those of the four directories; so many as are too much; all.
    assert len(noted.read["era-files"]) == (FILES // 2 + 1 if weakened else 5)
    assert noted.alone == []
    assert len(set(noted.read["era-bulk"])) == len(noted.read["era-bulk"]) == 2 + 4 + FILES
    lists = sum(len(noted._get(digest)) for digest in noted.read["era-bulk"])
    assert held[1] == lists + sum(len(f"{number}") for number in range(FILES)) + len("xxx")
    assert held[0] == held[1] - len(noted._get(roots[1])) - len("xx")
