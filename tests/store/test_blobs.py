"""Content-addressed blobs: tests of both stores, then of the local disk's alone."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from era.core import models
from era.core.files import archives
from era.core.trees.snapshots import SHORT_GRACE_SECONDS, Snapshots
from era.store.blobs import blobs as module
from era.store.blobs.blobs import LocalBlobs
from era.store.blobs.s3_blobs import S3Blobs
from tests.soaking import soak_the_rest
from tests.store.s3 import S3

type Blobs = LocalBlobs | S3Blobs


@pytest.fixture
def local(tmp_path: Path) -> LocalBlobs:
    store = LocalBlobs(tmp_path / "blobs")
    store.open()
    return store


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Blobs]:
    """Either store, empty."""
    if request.param == "local":
        yield request.getfixturevalue("local")
        return
    s3: S3 = request.getfixturevalue("s3")
    url = s3.url(request.getfixturevalue("bucket"))
    store = S3Blobs(url, tmp_path / "cache", cache_bytes=16 << 20, owner="tests")
    store.open()
    yield store
    store.close()


LOCAL = pytest.mark.parametrize("blobs", soak_the_rest(["local", "s3"], 1), indirect=True)
"""Marks tests of much content, which are long with a bucket."""


@pytest.fixture
def stored(blobs: Blobs, request: pytest.FixtureRequest) -> Callable[[], list[str]]:
    """A function that lists the blobs that are really stored."""
    if isinstance(blobs, LocalBlobs):
        return lambda: files_of(blobs)
    s3: S3 = request.getfixturevalue("s3")
    bucket: str = request.getfixturevalue("bucket")
    return lambda: [name for name in s3.names(bucket) if name != "owner"]


def files_of(blobs: LocalBlobs) -> list[str]:
    return sorted(path.name for path in Path(blobs._directory).rglob("*") if path.is_file())


def put(blobs: Blobs, content: bytes) -> str:
    with blobs.batch() as batch:
        return batch.put(content)


def put_file(blobs: Blobs, path: Path, size: int | None = None) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        with blobs.batch() as batch:
            return batch.put_file(fd, os.fstat(fd).st_size if size is None else size)
    finally:
        os.close(fd)


def age(blobs: LocalBlobs, digest: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(blobs._path(digest), (then, then))


@pytest.mark.parametrize("size", [0, 1, module.CHUNK, module.CHUNK + 1, 3 * module.CHUNK + 7])
def test_content_comes_back_by_its_digest(
    size: int, blobs: Blobs, stored: Callable[[], list[str]], tmp_path: Path
) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    digest = put_file(blobs, tmp_path / "file")
    assert digest == hashlib.sha256(content).hexdigest() == put(blobs, content)
    assert blobs.get(digest) == content
    fd = blobs.open_blob(digest)
    assert os.read(fd, size + 1) == content if size < 2**20 else os.fstat(fd).st_size == size
    os.close(fd)
    assert stored() == [digest]


def test_put_file_reads_no_more_than_size(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (4 << 20))
    for size in (10, 2 << 20):
        assert len(blobs.get(put_file(blobs, tmp_path / "file", size))) == size


def test_put_file_reads_from_the_current_position(blobs: Blobs, tmp_path: Path) -> None:
    content = os.urandom(12 << 20)
    (tmp_path / "file").write_bytes(content)
    for skip, size in ((5, 100), (7, 2 << 20), (9, 10 << 20), (12 << 20, 10)):
        with open(tmp_path / "file", "rb", buffering=0) as file, blobs.batch() as batch:
            file.seek(skip)
            digest = batch.put_file(file.fileno(), size)
        assert blobs.get(digest) == content[skip : skip + size]


@LOCAL
def test_large_files_take_little_memory(blobs: Blobs, tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.truncate(128 << 20)
    tracemalloc.start()
    put_file(blobs, tmp_path / "file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (8 << 20 if isinstance(blobs, LocalBlobs) else 64 << 20)


def test_equal_content_is_stored_once(blobs: Blobs, stored: Callable[[], list[str]], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (2 << 20))
    for _ in range(2):
        with blobs.batch() as batch:
            assert batch.put(b"a") == batch.put(b"a")
        put_file(blobs, tmp_path / "file")
    assert len(stored()) == 2


@LOCAL
@pytest.mark.slow
def test_many_files_in_one_batch(blobs: Blobs, stored: Callable[[], list[str]]) -> None:
    with blobs.batch() as batch:
        digests = [batch.put(str(number).encode()) for number in range(400)]
    assert stored() == sorted(digests)


def test_a_missing_blob_is_a_file_not_found_error(blobs: Blobs) -> None:
    for read in (blobs.get, blobs.open_blob):
        with pytest.raises(FileNotFoundError) as caught:
            read("0" * 64)
        assert caught.value.strerror


def test_expected_blobs_can_be_opened(blobs: Blobs) -> None:
    with blobs.batch() as batch:
        digests = [batch.put(str(number).encode()) for number in range(50)]
    blobs.expect(digests)
    for number, digest in enumerate(digests):
        with open(blobs.open_blob(digest), "rb") as file:
            assert file.read() == str(number).encode()


@pytest.mark.slow
def test_batches_of_several_threads(blobs: Blobs, stored: Callable[[], list[str]]) -> None:
    def work() -> None:
        for begin in range(0, 60, 20):
            with blobs.batch() as batch:
                for number in range(begin, begin + 25):
                    batch.put(str(number).encode())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stored()) == 65


def test_a_sweep_removes_old_blobs_that_are_not_kept(blobs: Blobs, stored: Callable[[], list[str]]) -> None:
    kept, old = put(blobs, b"kept"), put(blobs, b"old")
    time.sleep(0.01)
    horizon = time.time()
    young = put(blobs, b"young")
    assert blobs.sweep({kept}, horizon) == 1
    assert stored() == sorted([kept, young])
    assert blobs.sweep({kept}, horizon) == 0
    assert put(blobs, b"old") == old
    assert blobs.get(old) == b"old"


def test_a_put_saves_old_content_from_the_sweep(blobs: Blobs, stored: Callable[[], list[str]]) -> None:
    digest = put(blobs, b"old")
    time.sleep(0.01)
    horizon = time.time()
    assert put(blobs, b"old") == digest
    assert blobs.sweep(set(), horizon) == 0
    assert stored() == [digest]


def test_nothing_of_a_batch_in_progress_is_swept(blobs: Blobs, stored: Callable[[], list[str]]) -> None:
    """Not even if it takes longer than the grace period."""
    old = put(blobs, b"old")
    with blobs.batch() as batch:
        digests = [batch.put(b"old"), batch.put(b"new")]
        time.sleep(0.02)
        assert blobs.sweep(set(), time.time()) == 0
    assert digests[0] == old
    assert stored() == sorted(digests)


def test_a_batch_counts_as_put_when_it_ends(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONG_SECONDS", 0.0)
    put(blobs, b"old")
    with blobs.batch() as batch:
        batch.put(b"old")
        time.sleep(0.02)
        horizon = time.time()
        time.sleep(0.02)
    assert blobs.sweep(set(), horizon) == 0


@pytest.mark.parametrize("seconds", [5.0, 25.0, 55.0, 65.0])
def test_what_a_batch_has_found_stored_can_be_relied_on_after_its_end(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """As an archive does that waits for its turn then."""
    clock = Clock(time.time())
    monkeypatch.setattr(module, "time", clock)
    put(local, b"old")
    clock.pass_by(1000)
    with local.batch() as batch:
        batch.put(b"old")
        clock.pass_by(seconds)
    clock.pass_by(archives._RELY_SECONDS)
    assert local.sweep(set(), clock.at - SHORT_GRACE_SECONDS) == 0


@pytest.mark.parametrize("seconds", [5.0, 25.0, 55.0, 65.0])
def test_so_can_new_content_however_long_its_names_take_to_be_durable(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """They get them one after the other, and then come up to 256 directories, on a disk that others use."""
    clock = Clock(time.time())
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "sync", lambda directory: clock.pass_by(seconds / 20))
    with local.batch() as batch:
        for n in range(20):
            batch.put(b"%d" % n)
    clock.pass_by(archives._RELY_SECONDS)
    assert local.sweep(set(), clock.at - SHORT_GRACE_SECONDS) == 0


@pytest.mark.parametrize("behind", [-7200.0, 7200.0])
async def test_content_of_a_host_whose_clock_is_wrong_is_as_old_as_that_of_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: float
) -> None:
    """Whichever of them collects: a host puts content that no row names yet."""
    blobs = LocalBlobs(tmp_path / "blobs", "host.")
    blobs.open()
    clock = Clock(time.time())
    for putting, collecting in ((-behind, 0.0), (0.0, -behind)):
        for off, collects in ((putting, False), (collecting, True)):
            monkeypatch.setattr(models, "_clock", models._Clock())
            models._clock.ahead = int(-off * 1_000_000)
            monkeypatch.setattr(module, "time", Clock(clock.at + off))
            if collects:
                assert await Snapshots(blobs).collect_garbage([]) == 0
            else:
                put(blobs, b"content")
    monkeypatch.setattr(module, "time", Clock(clock.at + 3700))
    monkeypatch.setattr(models, "_clock", models._Clock())
    assert await Snapshots(blobs).collect_garbage([]) == 1
    blobs.close()


def test_a_sweep_removes_nothing_once_the_lock_between_hosts_is_gone(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "blobs", "host.")
    blobs.open()
    digests = {put(blobs, b"%d" % n) for n in range(3)}
    for digest in digests:
        age(blobs, digest, 3600)

    class Closing(set[str]):
        """What has the store closed by another thread while it is looked at."""

        def __contains__(self, digest: object) -> bool:
            blobs.close()
            return False

    assert blobs.sweep(Closing(), time.time()) == 0
    assert digests <= set(files_of(blobs))


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[tuple[LocalBlobs, LocalBlobs]]:
    hosts = LocalBlobs(tmp_path / "blobs", "one."), LocalBlobs(tmp_path / "blobs", "two.")
    for each in hosts:
        each.open()
    yield hosts
    for each in hosts:
        each.close()


async def test_what_another_host_put_goes_though_the_one_that_collects_puts_nothing(
    two_hosts: tuple[LocalBlobs, LocalBlobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been too young for the last collection, while all that is named is as it was."""
    collecting, other = two_hosts
    clock = Clock(time.time())
    monkeypatch.setattr(module, "time", clock)
    snapshots = Snapshots(collecting, grace_seconds=60)
    clock.pass_by(100)
    put(other, b"named by no row")
    clock.pass_by(30)
    assert await snapshots.collect_garbage([]) == 0
    clock.pass_by(100)
    assert await snapshots.collect_garbage([]) == 1


def test_a_host_that_hangs_with_the_lock_stops_no_other_for_ever(
    two_hosts: tuple[LocalBlobs, LocalBlobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.3)
    hanging, other = two_hosts
    digest = put(other, b"content")
    age(other, digest, 3600)
    with hanging._staying():
        for use in (lambda: put(other, b"new"), lambda: other.renew(digest), lambda: other.sweep(set(), time.time())):
            with pytest.raises(BlockingIOError, match="hangs"):
                use()
    assert files_of(other) == sorted([digest, "lock"])
    put(other, b"new")


def test_a_host_closes_while_one_of_its_puts_waits_for_another_host(two_hosts: tuple[LocalBlobs, LocalBlobs]) -> None:
    hanging, other = two_hosts
    with ThreadPoolExecutor(1) as thread:
        with hanging._staying():
            putting = thread.submit(put, other, b"content")
            assert not wait([putting], timeout=0.1).done
            other.close()
        assert putting.result(timeout=60)


def test_a_batch_whose_content_was_removed_meanwhile_fails(local: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a host that shares the directory, say, an hour later."""
    monkeypatch.setattr(module, "_LONG_SECONDS", -1.0)
    digest = put(local, b"content")

    def put_and_remove() -> None:
        with local.batch() as batch:
            batch.put(b"content")
            os.unlink(local._path(digest))

    with pytest.raises(OSError, match="removed"):
        put_and_remove()


@pytest.mark.parametrize("step", [-3600.0, -100.0, 0.0, 3600.0])
def test_what_a_row_is_about_to_name_stays_when_the_clock_is_set(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    clock = Clock(time.time())
    monkeypatch.setattr(module, "time", clock)
    with local.naming():
        clock.set(step)
        put(local, b"content")
        for _ in range(40):
            clock.pass_by(5)
            horizon = local.unnamed_since()
            assert horizon is not None
            assert local.sweep(set(), horizon - SHORT_GRACE_SECONDS) == 0
    clock.pass_by(100)
    assert local.sweep(set(), clock.at - SHORT_GRACE_SECONDS) == 1


def test_whoever_names_content_waits_for_no_file_that_is_removed(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done on the event loop, and a file may be large and the disk slow."""
    put(local, b"old")
    removing, may_end = threading.Event(), threading.Event()

    def slow(path: str) -> None:
        removing.set()
        may_end.wait(20)

    monkeypatch.setattr(os, "unlink", slow)
    sweeping = threading.Thread(target=local.sweep, args=(set(), time.time() + 1))
    sweeping.start()
    assert removing.wait(20)
    named = threading.Event()

    def name() -> None:
        with local.naming():
            local.unnamed_since()
        named.set()

    naming = threading.Thread(target=name)
    naming.start()
    at_once = named.wait(5)
    may_end.set()
    sweeping.join()
    naming.join()
    assert at_once


def test_a_disk_that_tells_nothing_of_itself_is_not_crowded(local: LocalBlobs, tmp_path: Path) -> None:
    assert local.is_crowded(1 << 50)
    (tmp_path / "blobs").rename(tmp_path / "elsewhere")
    assert not local.is_crowded(1 << 50)


class Clock:
    """Stands in for the module `time`."""

    def __init__(self, at: float) -> None:
        self.at = at
        self._passed = 0.0

    def pass_by(self, seconds: float) -> None:
        self.at += seconds
        self._passed += seconds

    def set(self, step: float) -> None:
        self.at += step

    def monotonic(self) -> float:
        return self._passed

    def time(self) -> float:
        return self.at

    def time_ns(self) -> int:
        return int(self.at * 1e9)


def test_a_failed_batch_leaves_nothing(local: LocalBlobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(2 << 20))

    def fail() -> None:
        with local.batch() as batch:
            batch.put(b"a")
            fd = os.open(tmp_path / "file", os.O_RDONLY)
            batch.put_file(fd, 2 << 20)
            os.close(fd)
            batch.put_file(fd, 2 << 20)  # The descriptor is gone.

    with pytest.raises(OSError, match="Bad file descriptor"):
        fail()
    assert files_of(local) == []


def test_leftovers_of_a_killed_process_are_removed(local: LocalBlobs, tmp_path: Path) -> None:
    digest = put(local, b"kept")
    (tmp_path / "blobs" / "incoming" / "17").write_bytes(b"half")
    LocalBlobs(tmp_path / "blobs").open()
    assert files_of(local) == [digest]


def test_a_local_sweep_goes_by_the_files_times(local: LocalBlobs) -> None:
    kept, old, young = (put(local, content) for content in (b"kept", b"old", b"young"))
    age(local, kept, 100)
    age(local, old, 100)
    assert local.sweep({kept}, time.time() - 50) == 1
    assert files_of(local) == sorted([kept, young])
    with pytest.raises(FileNotFoundError):
        local.get(old)


def test_a_sweep_never_removes_what_a_put_relies_on(local: LocalBlobs) -> None:
    """A thread sweeps all the while; whatever a batch has put must be there after it."""
    contents = [str(number).encode() for number in range(20)]
    stop = threading.Event()
    swept = 0

    def sweep() -> None:
        nonlocal swept
        while not stop.is_set():
            swept += local.sweep(set(), time.time() - 50)

    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        for _ in range(30):
            with local.batch() as batch:
                digests = [batch.put(content) for content in contents]
            for digest, content in zip(digests, contents, strict=True):
                assert local.get(digest) == content
            for digest in digests:
                age(local, digest, 100)
            time.sleep(0.002)
    finally:
        stop.set()
        thread.join()
    assert swept > 0, "the sweep was at work"
