"""A lab for snapshots: working directories without sandboxes, over the real blob store."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from era.core.models import EMPTY, OwnedId, Snapshot
from era.core.ports import Sandbox
from era.core.program import Limits
from era.core.trees.diffs import KINDS, FileChange
from era.core.trees.file_threads import FileThreads
from era.core.trees.pages import change_pages
from era.core.trees.snapshots import Snapshots
from era.store.blobs.blobs import LocalBlobs
from tests.owners import mine

LIMITS = Limits(512 << 20, 1.0, 256, disk_bytes=4 << 30, files=200_000, output_bytes=10 << 20, tmp_bytes=64 << 20)
CLOCK_OF_FILES = 5  # CLOCK_REALTIME_COARSE
SETTLE = 0.06
"""Seconds after which a written file is settled (see trees.py): longer than the tick that the scan assumes."""


def file_changes(snapshots: Snapshots, old: Snapshot, new: Snapshot) -> dict[str, list[FileChange]]:
    """All that differs between two snapshots, by what happened to it."""

    async def listed() -> dict[str, list[FileChange]]:
        return {
            kind: [change async for page in change_pages(snapshots, old, new, mine("s"), kind) for change in page]
            for kind in KINDS
        }

    return asyncio.run(listed())


@dataclass
class Place:
    """A stand-in for a sandbox, with as much of one as snapshots need."""

    workspace: Path
    id: str
    limits: Limits = LIMITS
    uid: int | None = None
    opens_on_host: bool = True
    has_packages: bool = False
    """Whether there is a directory of packages beside it."""

    def may_have_packages(self) -> bool:
        return self.has_packages

    @property
    def sandbox(self) -> Sandbox:
        return cast(Sandbox, self)


@dataclass
class CountingBlobs(LocalBlobs):
    """The real store, which also records the sizes of files put into it."""

    directory: Path
    files_put: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.directory)
        self.open()

    @contextmanager
    def batch(self) -> Iterator[Any]:
        with super().batch() as batch:
            real = batch.put_file

            def put_file(fd: int, size: int) -> str:
                self.files_put.append(size)
                return real(fd, size)

            batch.put_file = put_file  # type: ignore[method-assign]
            yield batch


def large_turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note whose large work is done, from here on: an owner for each piece of it."""
    turns: list[str] = []
    slot = FileThreads.slot

    def noted_slot(threads: FileThreads, session_id: OwnedId, *, is_large: bool) -> Any:
        if is_large:
            turns.append(session_id.owner)
        return slot(threads, session_id, is_large=is_large)

    monkeypatch.setattr(FileThreads, "slot", noted_slot)
    return turns


class Lab:
    """A blob store in a directory, and any number of places."""

    def __init__(self, directory: Path, *, limits: Limits = LIMITS, **options: Any) -> None:
        self.directory = directory
        self.limits = limits
        self.blobs = CountingBlobs(directory / "blobs")
        self.snapshots = Snapshots(self.blobs, **options)
        self.places = 0

    def place(self) -> Place:
        self.places += 1
        workspace = self.directory / f"place{self.places}"
        workspace.mkdir()
        return Place(workspace, f"sandbox{self.places}", self.limits)

    def place_with_packages(self) -> Place:
        """One with an empty directory of packages beside it."""
        self.places += 1
        home = self.directory / f"place{self.places}"
        for name in ("workspace", "packages"):
            (home / name).mkdir(parents=True)
        return Place(home / "workspace", f"sandbox{self.places}", self.limits, has_packages=True)

    def take(self, place: Place, previous: Snapshot = EMPTY, entry: str | None = None) -> Snapshot:
        return asyncio.run(self.snapshots.take(place.sandbox, previous, entry, session_id=mine("s")))

    def restore(self, snapshot: Snapshot) -> Place:
        place = self.place()
        asyncio.run(self.snapshots.restore(snapshot, place.sandbox, session_id=mine("s")))
        return place

    def from_scratch(self, place: Place) -> Snapshot:
        """The snapshot that a service takes which remembers nothing of the place."""
        unknown = Place(place.workspace, f"{place.id} from scratch", self.limits, has_packages=place.has_packages)
        return self.take(unknown)


@contextmanager
def readable(path: bytes, mode: int) -> Iterator[None]:
    """Make a path readable within the block although its mode forbids it, where the tests aren't root's."""
    forbidden = not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0))
    if forbidden:
        os.chmod(path, mode | 0o700)
    yield
    if forbidden:
        os.chmod(path, mode)


def described(directory: Path) -> dict[bytes, tuple[Any, ...]]:
    """Everything that a snapshot keeps of a directory, by path."""
    entries: dict[bytes, tuple[Any, ...]] = {}

    def walk(parent: bytes, prefix: bytes) -> None:
        for name in os.listdir(parent):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            mode = status.st_mode & 0o777
            if stat.S_ISREG(status.st_mode):
                with readable(path, mode), open(path, "rb") as file:
                    entries[prefix + name] = ("file", file.read(), mode, status.st_mtime_ns)
            elif stat.S_ISLNK(status.st_mode):
                entries[prefix + name] = ("link", os.readlink(path), status.st_mtime_ns)
            elif stat.S_ISDIR(status.st_mode):
                entries[prefix + name] = ("dir", mode)
                with readable(path, mode):
                    walk(path, prefix + name + b"/")

    walk(os.fsencode(directory), b"")
    return entries


def mutate(workspace: Path, chance: random.Random) -> None:
    """One random change somewhere below `workspace`."""
    directories = [workspace, *(path for path in workspace.rglob("*") if path.is_dir() and not path.is_symlink())]
    files = [path for path in workspace.rglob("*") if path.is_file() and not path.is_symlink()]
    path = chance.choice(directories) / f"n{chance.randrange(6)}"
    match chance.randrange(9):
        case 0 if not os.path.lexists(path):
            path.write_text(str(chance.random()))
        case 1 if not os.path.lexists(path):
            path.mkdir()
        case 2 if not os.path.lexists(path):
            path.symlink_to(chance.choice(["n1", "/etc/passwd", "gone"]))
        case 3 if files:
            chance.choice(files).unlink()
        case 4 if len(directories) > 1:
            shutil.rmtree(chance.choice(directories[1:]))
        case 5 if files:
            chance.choice(files).chmod(chance.choice([0o600, 0o644, 0o755]))
        case 6 if files and not os.path.lexists(path):
            chance.choice(files).rename(path)
        case 7 if files:
            file = chance.choice(files)
            with open(file, "r+b") as opened:  # the same size, and the old time restored
                old = file.stat().st_mtime_ns
                opened.write(bytes([chance.randrange(256)]))
            os.utime(file, ns=(old, old))
        case 8 if len(directories) > 1:
            chance.choice(directories[1:]).chmod(chance.choice([0o700, 0o755]))
