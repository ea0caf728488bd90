"""Snapshots of real directories, over the real blob store."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import resource
import socket
import stat
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from era.core.models import EMPTY, STATE_FILE, Snapshot
from era.core.totals import Bounds
from era.core.trees import trees
from era.core.trees.tree_objects import name_bytes
from era.core.trees.trees import SnapshotRefused
from era.errors import CommitFailed, SandboxFailed, Unavailable
from tests.core.lab import CLOCK_OF_FILES, LIMITS, SETTLE, Lab, Place, described, mutate
from tests.owners import mine
from tests.soaking import soak_the_rest

NAMES = st.one_of(
    st.sampled_from([b"a", b"b.txt", b"new\nline", b"\xff\xfe", b"\xed\xa0\x80", "é😀".encode(), b"-rf", b" ", b"\\"]),
    st.binary(min_size=1, max_size=20).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_")),
).filter(lambda name: name not in (b".", b"..", os.fsencode(STATE_FILE)))
# The tests couldn't read what a mode forbids to an ordinary user; the service can, see below.
MODES = st.integers(0, 0o777).map(lambda mode: mode if os.geteuid() == 0 else mode | 0o700)
TIMES = st.integers(0, 2**32 * 10**9 - 1)
FILES = st.tuples(st.just("file"), st.binary(max_size=50), MODES, TIMES)
LINKS = st.tuples(st.just("link"), NAMES)
DIRECTORIES: st.SearchStrategy[Any] = st.deferred(
    lambda: st.tuples(st.just("dir"), st.dictionaries(NAMES, st.one_of(FILES, LINKS, DIRECTORIES), max_size=4), MODES)
)
CONTENTS = st.dictionaries(NAMES, st.one_of(FILES, LINKS, DIRECTORIES), max_size=5)


def make(directory: bytes, contents: dict[bytes, Any]) -> None:
    for name, (kind, *rest) in contents.items():
        path = os.path.join(directory, name)
        if kind == "file":
            content, mode, mtime_ns = rest
            with open(path, "wb") as file:
                file.write(content)
            os.chmod(path, mode)
            os.utime(path, ns=(mtime_ns, mtime_ns))
        elif kind == "link":
            os.symlink(rest[0], path)
        else:
            os.mkdir(path)
            make(path, rest[0])
            os.chmod(path, rest[1])


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CONTENTS)
def test_what_is_taken_comes_back(contents: dict[bytes, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        place = lab.place()
        make(os.fsencode(place.workspace), contents)
        before = described(place.workspace)
        snapshot = lab.take(place)
        assert described(place.workspace) == before, "taking leaves no trace"
        restored = lab.restore(snapshot)
        assert described(restored.workspace) == before
        assert lab.take(restored, snapshot) == snapshot == lab.from_scratch(restored)
        kept = [entry for entry in before.values() if entry[0] != "dir"]
        assert snapshot.file_count == len(kept)
        assert snapshot.total_bytes == sum(len(entry[1]) for entry in kept)
        listed = asyncio.run(lab.snapshots.entries(snapshot, mine("s")))
        assert {(name_bytes(entry.path), entry.mtime_ns, entry.size) for entry in listed} == {
            (path, entry[-1], len(entry[1])) for path, entry in before.items() if entry[0] != "dir"
        }


@pytest.mark.slow
@pytest.mark.parametrize("seed", soak_the_rest(range(6), 2))
def test_what_is_remembered_never_changes_the_answer(seed: int, lab: Lab) -> None:
    chance = random.Random(seed)
    place, snapshot = lab.place(), EMPTY
    for _ in range(40):
        for _ in range(chance.randrange(4)):
            mutate(place.workspace, chance)
        if chance.random() < 0.2:
            time.sleep(SETTLE)
        if chance.random() < 0.1:
            place = lab.restore(snapshot)
        snapshot = lab.take(place, snapshot)
        assert snapshot == lab.from_scratch(place)


def test_a_change_within_one_tick_of_the_clock_is_seen(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are cut to 10 ms, as older kernels have them. Since Linux 6.13 times are finer once they have been read."""

    def coarse_fingerprint(status: os.stat_result) -> trees.Fingerprint:
        tick = 10_000_000
        fine = trees.Fingerprint(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode)
        return fine._replace(ctime_ns=fine.ctime_ns // tick * tick)

    monkeypatch.setattr(trees, "fingerprint", coarse_fingerprint)
    place, snapshot = lab.place(), EMPTY
    for number in range(100):
        file = place.workspace / "file"
        file.write_text(f"{number:04}")
        os.utime(file, ns=(1, 1))
        snapshot = lab.take(place, snapshot)
        assert snapshot == lab.from_scratch(place)


def test_a_change_right_after_a_restore_is_seen(lab: Lab) -> None:
    place = lab.place()
    (place.workspace / "file").write_text("0000")
    snapshot = lab.take(place)
    for number in range(1, 30):
        place = lab.restore(snapshot)
        file = place.workspace / "file"
        old = file.stat().st_mtime_ns
        assert file.stat().st_ctime_ns < time.clock_gettime_ns(CLOCK_OF_FILES), "a write now has another time"
        with open(file, "r+") as opened:
            opened.write(f"{number:04}")
        os.utime(file, ns=(old, old))
        after = lab.take(place, snapshot)
        assert after != snapshot
        snapshot = after


def test_only_what_changed_is_read(lab: Lab) -> None:
    place = lab.place()
    for number in range(100):
        path = place.workspace / f"d{number % 10}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * (1000 + number))
    time.sleep(SETTLE)
    snapshot = lab.take(place)
    assert len(lab.blobs.files_put) == 100

    lab.blobs.files_put.clear()
    assert lab.take(place, snapshot) == snapshot
    assert lab.blobs.files_put == []
    (place.workspace / "d3" / "f13").write_bytes(b"y" * 7)
    snapshot = lab.take(place, snapshot)
    assert lab.blobs.files_put == [7]

    restored = lab.restore(snapshot)
    (restored.workspace / "d4" / "f14").write_bytes(b"y" * 8)
    lab.take(restored, snapshot)
    assert lab.blobs.files_put == [7, 8], "what was restored is known, too"


def test_what_is_remembered_of_an_uncommitted_run_is_void(lab: Lab) -> None:
    """Its content may be swept as garbage, since no row names it."""
    place = lab.place()
    (place.workspace / "file").write_text("content")
    time.sleep(SETTLE)
    lost = lab.take(place, EMPTY)
    assert lab.blobs.sweep(set(), time.time() + 1) == 2
    assert lab.take(place, EMPTY) == lost
    assert described(lab.restore(lost).workspace) == described(place.workspace)


def test_nothing_there_is_empty(lab: Lab) -> None:
    place = lab.place()
    assert lab.take(place) == EMPTY
    (place.workspace / STATE_FILE).write_text("{}")
    assert lab.take(place) == EMPTY
    for number in range(50):
        os.mkfifo(place.workspace / f"pipe{number}")
    assert lab.take(place) == EMPTY
    (place.workspace / "file").write_text("content")
    snapshot = lab.take(place)
    assert snapshot.file_count == 1
    (place.workspace / "file").unlink()
    assert lab.take(place, snapshot) == EMPTY
    assert described(lab.restore(EMPTY).workspace) == {}
    assert asyncio.run(lab.snapshots.entries(EMPTY, mine("s"))) == ()


def test_the_state_file_is_no_file_of_the_session_at_the_top_only(lab: Lab) -> None:
    place = lab.place()
    (place.workspace / "d").mkdir()
    for path in (place.workspace, place.workspace / "d"):
        (path / STATE_FILE).write_text("{}")
    restored = lab.restore(lab.take(place))
    assert set(described(restored.workspace)) == {b"d", b"d/" + os.fsencode(STATE_FILE)}


def test_special_files_are_not_kept(lab: Lab) -> None:
    place = lab.place()
    (place.workspace / "file").write_text("content")
    os.mkfifo(place.workspace / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.workspace / "socket"))
        if os.geteuid() == 0:
            os.mknod(place.workspace / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        snapshot = lab.take(place)
    assert set(described(lab.restore(snapshot).workspace)) == {b"file"}


def test_a_link_out_is_kept_and_never_followed(lab: Lab, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "canary").write_text("canary-1fd3")
    place = lab.place()
    (place.workspace / "to_file").symlink_to(secret / "canary")
    (place.workspace / "to_directory").symlink_to(secret)
    (place.workspace / "loop").symlink_to("loop")
    snapshot = lab.take(place)
    assert lab.blobs.files_put == []
    for path in (tmp_path / "blobs").rglob("*"):
        assert path.is_dir() or b"canary-1fd3" not in path.read_bytes()
    restored = lab.restore(snapshot)
    assert os.readlink(restored.workspace / "to_directory") == str(secret)
    assert described(restored.workspace) == described(place.workspace)


def test_what_became_a_link_since_it_was_seen_is_not_opened(lab: Lab, tmp_path: Path) -> None:
    """This can't happen, since nothing runs during a scan; if it does all the same, the canary isn't read."""
    canary = tmp_path / "canary"
    canary.write_text("canary-1fd3")
    workspace = lab.place().workspace
    (workspace / "file").write_text("content")
    with trees.opened_root(workspace) as root:
        for became in (lambda path: path.symlink_to(canary), lambda path: os.mkfifo(path), lambda path: path.mkdir()):
            tree = trees.Scan(Bounds()).full(root, None)
            assert tree.files.keys() == {"file"}
            (workspace / "file").unlink()
            became(workspace / "file")
            with pytest.raises((OSError, SnapshotRefused)), lab.blobs.batch() as batch:
                trees.store(root, tree, None, batch)
            (workspace / "file").rmdir() if (workspace / "file").is_dir() else (workspace / "file").unlink()
            (workspace / "file").write_text("content")
    assert lab.blobs.files_put == []


@pytest.mark.slow
def test_a_tree_too_deep_is_refused(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    for depth, fits in ((128, True), (129, False), (1200, False)):
        place = lab.place()
        fd = os.open(place.workspace, os.O_RDONLY)
        for _ in range(depth):
            os.mkdir("d", dir_fd=fd)
            child = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = child
        os.close(fd)
        if fits:
            lab.restore(lab.take(place))
        else:
            with pytest.raises(SnapshotRefused, match="deeper than 128"):
                lab.take(place)


def test_too_many_entries_are_refused(tmp_path: Path) -> None:
    lab = Lab(tmp_path, limits=replace(LIMITS, files=100))
    place = lab.place()
    for number in range(100):
        (place.workspace / f"{number}").touch()
    snapshot = lab.take(place)
    assert snapshot.file_count == 100
    os.mkfifo(place.workspace / "one more")
    with pytest.raises(SnapshotRefused, match="more than 100 files"):
        lab.take(place, snapshot)
    (place.workspace / "one more").unlink()
    assert lab.take(place, snapshot) == snapshot


def test_a_huge_sparse_file_is_refused_unread(lab: Lab) -> None:
    place = lab.place()
    (place.workspace / "a").write_text("content")
    with open(place.workspace / "sparse", "wb") as file:
        file.truncate(8 << 40)
    with pytest.raises(SnapshotRefused, match=r"more than 4294967296 bytes"):
        lab.take(place)
    assert lab.blobs.files_put == []


@pytest.mark.slow
def test_a_wide_tree_needs_few_descriptors(lab: Lab) -> None:
    place = lab.place()
    for number in range(250):
        (place.workspace / f"d{number}").mkdir()
        (place.workspace / f"d{number}" / "f").write_text(str(number))
    bounds = resource.getrlimit(resource.RLIMIT_NOFILE)
    # So that one of each directory would be too many.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 125, bounds[1]))
    try:
        restored = lab.restore(lab.take(place))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, bounds)
    assert described(restored.workspace) == described(place.workspace)


def test_writes_through_a_memory_map_on_tmpfs_are_seen(lab: Lab) -> None:
    """The kernel doesn't update the file's times for these."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        place = Place(Path(directory), "on tmpfs")
        file = place.workspace / "file"
        file.write_bytes(b"a" * 4096)
        with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 4096) as mapped:
            time.sleep(SETTLE)
            before = lab.take(place)
            assert mapped[0] == ord("a")
            mapped[:3] = b"xyz"
        after = lab.take(place, before)
        assert after == lab.from_scratch(place) != before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")
def test_files_are_given_to_the_sandbox(lab: Lab) -> None:
    place = lab.place()
    (place.workspace / "d").mkdir()
    (place.workspace / "d" / "file").write_text("content")
    (place.workspace / "link").symlink_to("/etc/passwd")
    snapshot = lab.take(place)
    target = lab.place()
    target.uid = 12345
    os.chown(target.workspace, 12345, 54321)
    owner = os.stat("/etc/passwd").st_uid
    asyncio.run(lab.snapshots.restore(snapshot, target.sandbox, session_id=mine("s")))
    for path in target.workspace.rglob("*"):
        assert (path.lstat().st_uid, path.lstat().st_gid) == (12345, 54321)
    assert os.stat("/etc/passwd").st_uid == owner
    assert lab.take(target, snapshot) == snapshot


def as_nobody(job: Callable[[], None]) -> None:
    """Run `job` in a child process without root's rights; it must not fail."""
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            job()
            os._exit(0)
        except BaseException:  # the child must end here, whatever happened
            import traceback

            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_modes_that_forbid_reading_are_kept_by_a_service_that_is_not_root() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)

        def job() -> None:
            lab = Lab(Path(directory) / "lab")
            place = lab.place()
            for name, mode in (("none", 0), ("write", 0o200), ("group", 0o070)):
                (place.workspace / name).write_text(name)
                (place.workspace / name).chmod(mode)
                (place.workspace / f"d_{name}").mkdir()
                (place.workspace / f"d_{name}" / "f").write_text(name)
                (place.workspace / f"d_{name}").chmod(mode)
            place.workspace.chmod(0)
            snapshot = lab.take(place)
            place.workspace.chmod(0o700)
            restored = lab.restore(snapshot)
            for where in (place, restored):
                for name, mode in (("none", 0), ("write", 0o200), ("group", 0o070)):
                    for path in (where.workspace / name, where.workspace / f"d_{name}"):
                        assert path.stat().st_mode & 0o777 == mode
                    (where.workspace / f"d_{name}").chmod(0o700)
                    assert (where.workspace / f"d_{name}" / "f").read_text() == name
                    (where.workspace / f"d_{name}").chmod(mode)
            assert lab.take(restored, snapshot) == snapshot
            for path in (Path(directory) / "lab").glob("place*/d_*"):
                path.chmod(0o700)

        as_nobody(lambda: (Path(directory) / "lab").mkdir() or job())  # type: ignore[func-returns-value]


def collect(lab: Lab, *roots: Snapshot) -> int:
    return asyncio.run(lab.snapshots.collect_garbage([snapshot.root for snapshot in roots if snapshot.root]))


def test_garbage_goes_and_the_rest_stays(tmp_path: Path) -> None:
    lab = Lab(tmp_path, grace_seconds=0.0)
    place = lab.place()
    (place.workspace / "d").mkdir()
    (place.workspace / "d" / "kept").write_text("kept")
    (place.workspace / "dropped").write_text("dropped")
    old = lab.take(place)
    (place.workspace / "dropped").unlink()
    new = lab.take(place, old)
    assert collect(lab, old, new) == 0
    assert collect(lab, new) == 2, "the old root and the file that is gone"
    assert described(lab.restore(new).workspace) == described(place.workspace)
    with pytest.raises(SandboxFailed):
        lab.restore(old)
    with pytest.raises(Unavailable):
        asyncio.run(lab.snapshots.entries(old, mine("s")))
    with pytest.raises(Unavailable):
        collect(lab, old)
    assert collect(lab) == 3


def test_content_just_put_is_no_garbage(lab: Lab) -> None:
    place = lab.place()
    (place.workspace / "file").write_text("content")
    snapshot = lab.take(place)
    assert collect(lab) == 0
    assert lab.restore(snapshot)


def test_a_file_that_looks_like_a_tree_object_hides_nothing_from_the_mark(tmp_path: Path) -> None:
    lab = Lab(tmp_path, grace_seconds=0.0)
    place = lab.place()
    (place.workspace / "d").mkdir()
    (place.workspace / "d" / "file").write_text("content")
    inner = lab.take(Place(place.workspace / "d", "inner"))
    assert inner.root is not None
    (place.workspace / "a").write_bytes(lab.blobs.get(inner.root))  # Marked before the directory is.
    snapshot = lab.take(place)
    collect(lab, snapshot)
    assert described(lab.restore(snapshot).workspace) == described(place.workspace)


def test_damaged_content_is_reported(lab: Lab) -> None:
    place = lab.place()
    (place.workspace / "file").write_text("content")
    snapshot = lab.take(place)
    known = lab.snapshots.memories.get(place.id)
    assert known is not None
    digest = known.tree.files["file"].digest
    assert digest is not None
    os.truncate(lab.blobs._path(digest), 3)
    with pytest.raises(SandboxFailed, match="not as long"):
        lab.restore(snapshot)


def test_a_failing_disk_is_reported(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    place = lab.place()
    (place.workspace / "file").write_text("content")

    def broken(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CommitFailed, match="No space left"):
        lab.take(place)
    monkeypatch.undo()
    assert lab.take(place).file_count == 1


@pytest.mark.slow
def test_takes_of_several_sandboxes_at_a_time(lab: Lab) -> None:
    places = [lab.place() for _ in range(8)]
    for place in places:
        for number in range(100):
            (place.workspace / f"f{number}").write_text(str(number % 50))
            os.utime(place.workspace / f"f{number}", ns=(1, 1))

    async def main() -> list[Snapshot]:
        calls: list[Awaitable[Snapshot]] = [
            lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s")) for place in places
        ]
        return list(await asyncio.gather(*calls))

    assert len(set(asyncio.run(main()))) == 1
    lab.snapshots.forget(places[0].id)
    assert [lab.snapshots.memories.size(place.id) for place in places] == [0, *[100] * 7]
