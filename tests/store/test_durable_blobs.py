"""What a batch of blobs on the local disk syncs, and when; and by which descriptors."""

from __future__ import annotations

import hashlib
import os
import resource
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from era.core.trees import durable
from era.store.blobs import blobs as module
from era.store.blobs.blobs import LocalBlobs


@pytest.fixture
def local(tmp_path: Path) -> LocalBlobs:
    store = LocalBlobs(tmp_path / "blobs")
    store.open()
    return store


def put(blobs: LocalBlobs, content: bytes) -> None:
    with blobs.batch() as batch:
        batch.put(content)


def test_nothing_is_visible_before_it_is_durable(local: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new file is synced before it has its name, each directory after; names not yet durable aren't relied on."""
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        events.append("file" if "incoming" in os.readlink(f"/proc/self/fd/{fd}") else "directory")
        real_fsync(fd)

    def rename(source: str, target: str) -> None:
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with local.batch() as batch:
        batch.put(b"a")
        batch.put(b"b")
    assert events == ["file", "file", "directory", "rename", "rename", "directory", "directory"]
    events.clear()
    put(local, b"a")
    assert events == []

    def broken(fd: int) -> None:
        fsync(fd)
        if events[-2:] == ["rename", "directory"]:
            raise OSError("EIO")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="EIO"):
        put(local, b"c")
    monkeypatch.setattr(os, "fsync", fsync)
    events.clear()
    put(local, b"c")
    assert events == ["directory"], "the name is there, but nobody knows yet that it lasts"


def test_a_directory_of_names_counts_as_made_once_its_own_name_is_durable(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def sync(path: str) -> None:
        synced.append(path)
        if len(synced) == 1:
            raise OSError("EIO")

    monkeypatch.setattr(module, "sync", sync)
    with pytest.raises(OSError, match="EIO"):
        put(local, b"a")
    put(local, b"a")
    put(local, b"a" * 2)
    directory = str(local._directory)
    assert synced[:3] == [directory, directory, f"{directory}/{hashlib.sha256(b'a').hexdigest()[:2]}"]


class Opened:
    """What is opened in `incoming` and still is: for each descriptor how many writes there had been before. And these
    numbers of the descriptors by which files, or the file system, were synced."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes_before: dict[int, int] = {}
        self.writes = 0
        self.synced: list[int] = []
        self.synced_all: list[int] = []
        self.most = 0
        real_open, real_close, real_write, real_fsync = os.open, os.close, os.write, os.fsync

        def open_(path: str, *given: int, **named: int) -> int:
            fd = real_open(path, *given, **named)
            if os.fspath(path).startswith(f"{directory}/incoming"):
                self.writes_before[fd] = self.writes
                self.most = max(self.most, len(self.writes_before))
            return fd

        def close(fd: int) -> None:
            self.writes_before.pop(fd, None)
            real_close(fd)

        def write(fd: int, content: bytes) -> int:
            self.writes += fd in self.writes_before
            return real_write(fd, content)

        def fsync(fd: int) -> None:
            if fd in self.writes_before:
                self.synced.append(self.writes_before[fd])
            real_fsync(fd)

        def syncfs(fd: int) -> int:
            self.synced_all.append(self.writes_before[fd])
            return 0

        for name, what in (("open", open_), ("close", close), ("write", write), ("fsync", fsync)):
            monkeypatch.setattr(os, name, what)
        monkeypatch.setattr(durable, "_libc", SimpleNamespace(syncfs=syncfs))


@pytest.fixture
def seen(local: LocalBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    return Opened(tmp_path / "blobs", monkeypatch)


def test_failures_to_write_are_asked_for_by_descriptors_from_before_the_writes(
    local: LocalBlobs, seen: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a failed write-back only who had a descriptor by then: of an inode that nobody has open it
    may forget it, and what others have been told of a file system it doesn't tell who opens it later."""
    (tmp_path / "large").write_bytes(bytes(module.CHUNK + 1))
    with local.batch() as batch:
        for n in range(3):
            batch.put(b"%d" % n)
        with open(tmp_path / "large", "rb", buffering=0) as file:
            batch.put_file(file.fileno(), module.CHUNK + 1)
    assert seen.synced == [0, 1, 2, 3], "each by the descriptor by which it was written"
    assert seen.synced_all == []

    monkeypatch.setattr(module, "_FEW", 3)
    seen.synced, seen.writes = [], 0
    with local.batch() as batch:
        for n in range(10, 16):
            batch.put(b"%d" % n)
    assert seen.synced == []
    assert seen.synced_all == [0]
    assert seen.most <= 2 + 4
    assert not seen.writes_before


def test_batches_together_keep_few_files_open(local: LocalBlobs, seen: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_OPEN", 4)
    for _ in range(2):
        with local.batch() as one, local.batch() as other:
            for _number in range(4):
                one.put(os.urandom(9))
            other.put(os.urandom(9))
        assert len(seen.synced) == 4
        assert len(seen.synced_all) == 1
        seen.synced, seen.synced_all = [], []
    with suppress(ZeroDivisionError), local.batch() as batch:
        batch.put(os.urandom(9))
        raise ZeroDivisionError
    assert seen.most <= 4 + 1 + 2
    assert not seen.writes_before
    assert local._kept_open == 0


def test_batches_keep_no_file_open_where_descriptors_are_few(local: LocalBlobs, seen: Opened) -> None:
    """Or whoever walks a wide tree has none left."""
    bounds = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        others = [stack.enter_context(open(os.devnull)) for _ in range(100)]
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, bounds)
        resource.setrlimit(resource.RLIMIT_NOFILE, (others[-1].fileno() + 80, bounds[1]))
        with local.batch() as batch:
            for _ in range(4):
                batch.put(os.urandom(9))
    assert seen.synced == []
    assert seen.synced_all == [0]
    assert seen.most <= 2
