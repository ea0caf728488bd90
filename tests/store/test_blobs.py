"""Content-addressed files on a real disk."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from era.store import blobs as module
from era.store.blobs import LocalBlobs


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    store = LocalBlobs(tmp_path / "blobs")
    store.open()
    return store


def put(blobs: LocalBlobs, content: bytes) -> str:
    with blobs.batch() as batch:
        return batch.put(content)


def put_file(blobs: LocalBlobs, path: Path, size: int | None = None) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        with blobs.batch() as batch:
            return batch.put_file(fd, os.fstat(fd).st_size if size is None else size)
    finally:
        os.close(fd)


def stored(blobs: LocalBlobs) -> list[str]:
    return sorted(path.name for path in Path(blobs._directory).rglob("*") if path.is_file())


def age(blobs: LocalBlobs, digest: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(blobs._path(digest), (then, then))


@pytest.mark.parametrize("size", [0, 1, module.CHUNK, module.CHUNK + 1, 3 * module.CHUNK + 7])
def test_content_comes_back_by_its_digest(size: int, blobs: LocalBlobs, tmp_path: Path) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    digest = put_file(blobs, tmp_path / "file")
    assert digest == hashlib.sha256(content).hexdigest() == put(blobs, content)
    assert blobs.get(digest) == content
    fd = blobs.open_blob(digest)
    assert os.read(fd, size + 1) == content if size < 2**20 else os.fstat(fd).st_size == size
    os.close(fd)
    assert stored(blobs) == [digest]


def test_no_more_is_read_than_asked_for(blobs: LocalBlobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (4 << 20))
    for size in (10, 2 << 20):
        assert len(blobs.get(put_file(blobs, tmp_path / "file", size))) == size


def test_large_files_take_little_memory(blobs: LocalBlobs, tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    put_file(blobs, tmp_path / "file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_the_same_content_is_kept_once(blobs: LocalBlobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (2 << 20))
    for _ in range(2):
        with blobs.batch() as batch:
            assert batch.put(b"a") == batch.put(b"a")
        put_file(blobs, tmp_path / "file")
    assert len(stored(blobs)) == 2


def test_many_files_in_one_batch(blobs: LocalBlobs) -> None:
    with blobs.batch() as batch:
        digests = [batch.put(str(number).encode()) for number in range(1000)]
    assert stored(blobs) == sorted(digests)


def test_a_failed_batch_leaves_nothing(blobs: LocalBlobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(2 << 20))

    def fail() -> None:
        with blobs.batch() as batch:
            batch.put(b"a")
            fd = os.open(tmp_path / "file", os.O_RDONLY)
            batch.put_file(fd, 2 << 20)
            os.close(fd)
            batch.put_file(fd, 2 << 20)  # The descriptor is gone.

    with pytest.raises(OSError, match="Bad file descriptor"):
        fail()
    assert stored(blobs) == []


def test_nothing_is_visible_before_it_is_durable(blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new file is synced before it has its name, each directory after; names not yet durable aren't relied on."""
    events: list[str] = []
    real_sync, real_rename = module._sync, os.rename

    def sync(path: str) -> None:
        events.append("file" if "incoming" in path else "directory")
        real_sync(path)

    def rename(source: str, target: str) -> None:
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(module, "_sync", sync)
    monkeypatch.setattr(os, "rename", rename)
    with blobs.batch() as batch:
        batch.put(b"a")
        batch.put(b"b")
    assert events == ["file", "file", "rename", "rename", "directory", "directory"]
    events.clear()
    put(blobs, b"a")
    assert events == []

    def broken(path: str) -> None:
        sync(path)
        if "incoming" not in path:
            raise OSError("EIO")

    monkeypatch.setattr(module, "_sync", broken)
    with pytest.raises(OSError, match="EIO"):
        put(blobs, b"c")
    monkeypatch.setattr(module, "_sync", sync)
    events.clear()
    put(blobs, b"c")
    assert events == ["directory"], "the name is there, but nobody knows yet that it lasts"


def test_leftovers_of_a_killed_process_go(blobs: LocalBlobs, tmp_path: Path) -> None:
    digest = put(blobs, b"kept")
    (tmp_path / "blobs" / "incoming" / "17").write_bytes(b"half")
    LocalBlobs(tmp_path / "blobs").open()
    assert stored(blobs) == [digest]


def test_sweep_takes_what_is_old_and_not_kept(blobs: LocalBlobs) -> None:
    kept, old, young = (put(blobs, content) for content in (b"kept", b"old", b"young"))
    age(blobs, kept, 100)
    age(blobs, old, 100)
    assert blobs.sweep({kept}, time.time() - 50) == 1
    assert stored(blobs) == sorted([kept, young])
    with pytest.raises(FileNotFoundError):
        blobs.get(old)


def test_a_put_saves_old_content_from_the_sweep(blobs: LocalBlobs) -> None:
    digest = put(blobs, b"old")
    age(blobs, digest, 100)
    assert put(blobs, b"old") == digest
    assert blobs.sweep(set(), time.time() - 50) == 0


def test_a_sweep_never_takes_what_a_put_relies_on(blobs: LocalBlobs) -> None:
    """A thread sweeps all the while; whatever a batch has put must be there after it."""
    contents = [str(number).encode() for number in range(20)]
    stop = threading.Event()
    swept = 0

    def sweep() -> None:
        nonlocal swept
        while not stop.is_set():
            swept += blobs.sweep(set(), time.time() - 50)

    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        for _ in range(30):
            with blobs.batch() as batch:
                digests = [batch.put(content) for content in contents]
            for digest, content in zip(digests, contents, strict=True):
                assert blobs.get(digest) == content
            for digest in digests:
                age(blobs, digest, 100)
            time.sleep(0.002)
    finally:
        stop.set()
        thread.join()
    assert swept > 0, "the sweep was at work"
