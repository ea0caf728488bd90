"""Snapshots of a working directory in which processes go on: consistent where they can be made to stand still."""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import pytest

from era.core.process import HeldFiles
from era.core.trees import live_snapshots, trees
from era.core.trees.copies import ContentCopies
from era.core.trees.durable import times_tell_of_maps
from era.core.trees.live_snapshots import LiveSnapshot, LiveSnapshots
from era.core.trees.trees import SnapshotRefused
from tests.core.lab import LIMITS, SETTLE
from tests.core.moments import MomentLab, lab, write
from tests.owners import mine
from tests.soaking import soak_the_rest

__all__ = ["lab"]

COUNTERS = """
import os, sys
n = 0
while True:
    n += 1
    for name in "ab":
        with open(f"{sys.argv[1]}.{name}", "w") as file:
            file.write(f"{n:08}")
"""
"""Writes a counter to two files, in order."""

FIGHTER = """
import os, random, sys
while True:
    name, other = (f"d{random.randrange(20)}" for _ in range(2))
    try:
        choice = random.randrange(5)
        if choice == 0: os.mkdir(name)
        if choice == 1: os.rename(name, other)
        if choice == 2: os.symlink(sys.argv[1], name)
        if choice == 3: open(f"{name}/f", "w").write("x" * 100_000)
        if choice == 4:
            if os.path.islink(name): os.unlink(name)
            else:
                for each in os.listdir(name): os.unlink(f"{name}/{each}")
                os.rmdir(name)
    except OSError: pass
"""
"""Makes directories, files and links of the same names, and takes them away. The links lead to the directory that it is
told."""


@pytest.mark.parametrize("can_freeze", [True, False])
def test_what_changed_is_kept(lab: MomentLab, can_freeze: bool) -> None:
    lab.live.can_freeze = can_freeze
    for number in range(60):
        write(lab, f"d{number % 3}/f{number}", b"%d" % number)
    write(lab, "large", b"x" * 300_000)
    os.symlink("/etc/passwd", lab.live.workspace / "link")
    time.sleep(SETTLE)
    assert lab.moment().consistent == can_freeze
    assert len(lab.contents()) == 61
    before = lab.last
    assert lab.moment().snapshot == before
    write(lab, "d1/f1", b"changed")
    write(lab, "new/deep/file", b"y" * 100_000)
    os.unlink(lab.live.workspace / "d2/f2")
    time.sleep(SETTLE)
    assert lab.moment().consistent == can_freeze
    contents = lab.contents()
    assert (contents["d1/f1"], contents["new/deep/file"]) == (b"changed", b"y" * 100_000)
    assert "d2/f2" not in contents
    assert len(contents) == 61
    # A snapshot of an ordinary run goes on from there.
    assert asyncio.run(lab.snapshots.take(lab.live.sandbox, lab.last, session_id=mine("s"))) == lab.last


@pytest.mark.parametrize("writers", soak_the_rest([10, 20], 1))
def test_counters_written_in_order_are_never_reversed(lab: MomentLab, writers: int) -> None:
    for number in range(writers):
        lab.live.start(COUNTERS, str(number))
    while len(os.listdir(lab.live.workspace)) < 2 * writers:
        time.sleep(0.01)
    for _ in range(8):
        assert lab.moment().consistent
        contents = lab.contents()
        for number in range(writers):
            first, second = (contents.get(f"{number}.{name}", b"") for name in "ab")
            if first and second:
                assert int(first) - int(second) in (0, 1)
    assert lab.contents() != {}


def test_what_is_slow_to_stand_still_is_told_again(lab: MomentLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy machine. Nor is a sandbox one that can't be frozen for that."""
    looks: list[bool] = []
    put_tree = ContentCopies.put_tree

    def noted(aside: ContentCopies, fd: int, tree: Any, **more: Any) -> None:
        looks.append(more["still"])
        put_tree(aside, fd, tree, **more)

    monkeypatch.setattr(ContentCopies, "put_tree", noted)
    lab.live.too_slow = 2
    write(lab, "file", b"first")
    assert lab.moment().consistent
    assert looks[-1:] == [True]
    lab.live.too_slow = 1000
    write(lab, "file", b"second")
    lab.moment()
    assert looks[-1:] == [False], "not for ever"
    assert lab.live.id not in lab.moments._cant_freeze
    lab.live.can_freeze = False
    write(lab, "file", b"third")
    lab.moment()
    assert lab.live.id in lab.moments._cant_freeze


@pytest.mark.parametrize("can_freeze", [True, False])
def test_a_program_that_fights_it_leads_nowhere_else(lab: MomentLab, can_freeze: bool) -> None:
    """Every content is one that the program wrote, in a file of this directory, or there is an error that says why."""
    lab.live.can_freeze = can_freeze
    elsewhere = lab.live.workspace.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "canary").write_text("canary")
    for _ in range(2):
        lab.live.start(FIGHTER, str(elsewhere))
    for _ in range(8):
        moment = lab.moment()
        assert moment.consistent or not can_freeze
        for content in lab.contents().values():
            assert set(content) <= {ord("x")}


@pytest.mark.parametrize("is_told", [True, False])
def test_what_a_map_changes_is_seen_though_the_times_stay(
    lab: MomentLab, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody can tell which files are mapped."""
    if not is_told:
        monkeypatch.setattr(lab.live, "held_files", lambda _: None)
    code = """
import mmap, os, sys
fd = os.open("mapped", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 4096)
there = mmap.mmap(fd, 4096)
os.close(fd)
print("ready", flush=True)
for line in sys.stdin.buffer:
    there[:5] = line[:5]
    print("done", flush=True)
"""
    for number in range(60):
        write(lab, f"f{number}", b"")
    process = lab.live.start(code)
    assert process.stdin
    assert process.stdout
    process.stdout.readline()
    for word in (b"first", b"other", b"third", b"forth"):
        process.stdin.write(word + b"\n")
        process.stdin.flush()
        process.stdout.readline()
        time.sleep(SETTLE)
        lab.moment()
        assert lab.contents()["mapped"][:5] == word
    assert len(lab.contents()["mapped"]) == mmap.PAGESIZE


def test_a_file_that_stays_open_is_looked_at_each_time(lab: MomentLab) -> None:
    code = """
import sys
with open("log", "ab", buffering=0) as log:
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        log.write(line)
        print("done", flush=True)
"""
    for number in range(60):
        write(lab, f"f{number}", b"")
    process = lab.live.start(code)
    assert process.stdin
    assert process.stdout
    process.stdout.readline()
    lab.moment()
    written = b""
    for word in (b"one\n", b"two\n", b"three\n"):
        process.stdin.write(word)
        process.stdin.flush()
        process.stdout.readline()
        written += word
        lab.moment()
        assert lab.contents()["log"] == written


def test_odd_things_are_left_out_and_nothing_blocks(lab: MomentLab) -> None:
    where = os.fsencode(lab.live.workspace)
    os.mkfifo(where + b"/fifo")
    with open(where + b"/\xff\nname", "wb") as file:
        file.write(b"odd")
    with open(where + b"/sparse", "wb") as file:
        file.truncate(1 << 26)
        file.seek(1 << 25)
        file.write(b"data")
    os.symlink("/dev/zero", where + b"/zero")
    os.mknod(where + b"/socket", 0o140600)
    lab.moment()
    names = {name for _, name, *_ in lab.snapshots.read_tree(lab.last.root or "")}
    assert names == {"\udcff\nname", "sparse", "zero"}


def test_what_exceeds_the_limits_is_refused_and_the_last_one_stands(lab: MomentLab) -> None:
    write(lab, "a", b"a")
    first = lab.moment().snapshot
    lab.live.limits = type(LIMITS)(512 << 20, 1.0, 256, disk_bytes=4 << 30, files=30, output_bytes=1, tmp_bytes=1)
    for number in range(40):
        write(lab, f"f{number}", b"")
    with pytest.raises(SnapshotRefused, match="more than"):
        lab.moment()
    assert lab.contents(first) == {"a": b"a"}
    assert os.listdir(lab.directory / "aside") == []
    for number in range(40):
        os.unlink(lab.live.workspace / f"f{number}")
    assert lab.moment().snapshot == first


def test_everything_stands_still_for_what_changed_only(lab: MomentLab) -> None:
    for number in range(200):
        write(lab, f"d{number % 50}/f{number}", b"%d" % number)
    time.sleep(SETTLE)
    lab.moment()
    lab.blobs.files_put.clear()
    looked: list[str] = []
    real = os.stat

    def counting(path: object, **options: object) -> os.stat_result:
        looked.append(str(path))
        return real(path, **options)  # type: ignore[arg-type]

    write(lab, "d1/f1", b"changed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", counting)
        lab.moment()
    assert lab.contents()["d1/f1"] == b"changed"
    assert len(looked) < 50, "the rest isn't even looked at"


def test_a_small_tree_that_is_as_it_was_need_not_stand_still(lab: MomentLab) -> None:
    with trees.opened_root(lab.live.workspace) as root:
        if not times_tell_of_maps(root):
            pytest.skip("the temporary directory is on a file system where everything stands still each time")
    (lab.live.workspace / "a" / "b").mkdir(parents=True)
    os.symlink("a", lab.live.workspace / "link")
    write(lab, "a/b/file", b"content")
    lab.moment()
    time.sleep(SETTLE)
    lab.moment()  # now it is settled

    def never() -> NoReturn:
        raise AssertionError("it was to stand still")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.live, "frozen", never)
        before = lab.last
        assert lab.moment() == LiveSnapshot(before, consistent=True)
        for path, changed in (("a", "a/b"), (".", "a"), (".", "link")):
            # There and back again, so that nothing tells it but the times.
            os.rename(lab.live.workspace / changed, lab.live.workspace / path / "away")
            os.rename(lab.live.workspace / path / "away", lab.live.workspace / changed)
            with pytest.raises(AssertionError, match="stand still"):
                lab.moment()
            lab.last = before
            patch.undo()
            lab.moment()
            time.sleep(SETTLE)
            patch.setattr(lab.live, "frozen", never)
            assert lab.moment() == LiveSnapshot(before, consistent=True)


class LongCall:
    """A call that is writing to a file, whose times it has set when it began. Nobody is told of it, as where another
    thread has closed its descriptor. The watch isn't either: the name by which it was opened is gone."""

    def __init__(self, lab: MomentLab, patch: pytest.MonkeyPatch) -> None:
        write(lab, "opened", b"before")
        self._fd = os.open(lab.live.workspace / "opened", os.O_WRONLY)
        os.link(lab.live.workspace / "opened", lab.live.workspace / "file")
        os.unlink(lab.live.workspace / "opened")
        os.pwrite(self._fd, b"half", 0)
        at_first, real = trees.fingerprint(os.fstat(self._fd)), trees.fingerprint
        patch.setattr(
            trees, "fingerprint", lambda status: at_first if status.st_ino == at_first.inode else real(status)
        )
        patch.setattr(trees, "is_tmpfs", lambda _: False)  # where every file is read each time
        patch.setattr(live_snapshots, "_WRITE_NS", 3600_000_000_000)  # a minute may pass on a busy machine
        patch.setattr(lab.live, "held_files", lambda _: HeldFiles(frozenset(), frozenset()))
        time.sleep(2 * SETTLE)

    def ends(self) -> None:
        if self._fd >= 0:
            os.pwrite(self._fd, b"all of", 0)
            os.close(self._fd)
            self._fd = -1


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """What is put aside: whether everything stands still, and how many files it is."""
    noted: list[tuple[bool, int]] = []
    put_tree = ContentCopies.put_tree

    def put(aside: ContentCopies, fd: int, tree: Any, **more: Any) -> None:
        put_tree(aside, fd, tree, **more)
        noted.append((more["still"], len(aside._contents)))

    monkeypatch.setattr(ContentCopies, "put_tree", put)
    return noted


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
@pytest.mark.parametrize("entries", [1, 60])
@pytest.mark.parametrize("begins", ["before", "after"])
def test_half_of_what_a_call_writes_is_read_again_while_all_stands_still(
    lab: MomentLab, monkeypatch: pytest.MonkeyPatch, begins: str, entries: int, weakened: bool
) -> None:
    """Of one that has begun after the first time that everything stood still, or before where it didn't."""
    if weakened:  # as if each call were as short as a tick
        put_aside: Any = LiveSnapshots._put_aside

        def put(*arguments: Any, small: bool) -> Any:
            *before, _, aside = arguments
            return put_aside(*before, time.time_ns(), aside, small=small)

        monkeypatch.setattr(LiveSnapshots, "_put_aside", put)
    for number in range(entries - 1):
        write(lab, f"f{number}", b"")
    calls: list[LongCall] = []
    frozen, put_tree = lab.live.frozen, ContentCopies.put_tree

    @asynccontextmanager
    async def begins_afterwards() -> AsyncIterator[bool | None]:
        async with frozen() as still:
            yield still
        if not calls:
            calls.append(LongCall(lab, monkeypatch))

    def ends_afterwards(aside: ContentCopies, fd: int, tree: Any, **more: Any) -> None:
        put_tree(aside, fd, tree, **more)
        calls[0].ends()

    monkeypatch.setattr(ContentCopies, "put_tree", ends_afterwards)
    if begins == "after":
        monkeypatch.setattr(lab.live, "frozen", begins_afterwards)
    else:
        calls.append(LongCall(lab, monkeypatch))
        lab.live.too_slow = 3
    for _ in range(2):
        assert lab.moment().consistent
        assert lab.contents()["file"] == (b"halfre" if weakened else b"all of"), "and the half is kept for good"


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
@pytest.mark.parametrize("freezes_later", [True, False])
def test_what_a_call_was_writing_without_a_freezer_is_read_again(
    lab: MomentLab, monkeypatch: pytest.MonkeyPatch, freezes_later: bool, weakened: bool
) -> None:
    lab.live.can_freeze = False
    call = LongCall(lab, monkeypatch)
    if weakened:
        monkeypatch.setattr(live_snapshots, "_WRITE_NS", 0)
    assert not lab.moment().consistent
    assert lab.contents()["file"] == b"halfre"
    call.ends()
    lab.live.can_freeze = freezes_later
    lab.moment()
    assert lab.contents()["file"] == (b"halfre" if weakened else b"all of")


@pytest.mark.parametrize("stands_still_at_first", [True, False])
def test_little_is_read_while_all_stands_still(
    lab: MomentLab, reads: list[tuple[bool, int]], stands_still_at_first: bool
) -> None:
    """Though all files are fresh: calls have ended when everything stood still for the first time."""
    for number in range(60):
        write(lab, f"f{number}", b"x" * 100_000)
    time.sleep(2 * SETTLE)
    lab.live.too_slow = 0 if stands_still_at_first else 3
    assert lab.moment().consistent
    assert reads == [(False, 60), (True, 0 if stands_still_at_first else 60)]
    write(lab, "f7", b"changed")
    assert lab.moment().consistent
    assert reads[2:] == [(True, 1)], "and once at most"


MAPS_TWICE = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
sys.stdin.readline()
file = os.open("f1", os.O_RDWR)
shared, private = (libc.mmap(None, 4096, 3, flags, file, 0) for flags in (1, 2))
os.close(file)
print(flush=True)
sys.stdin.readline()
ctypes.memmove(shared, b"other", 5)
libc.munmap(shared, 4096)
print(flush=True)
sys.stdin.readline()
"""
"""Maps a file to share, and once more for itself: so that nothing is closed when it has written to the first map, and
taken that away."""


def test_what_was_mapped_before_a_watch_began_is_looked_at(lab: MomentLab, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(60):
        write(lab, f"f{number}", b"first")
    time.sleep(SETTLE)
    snapshot = lab.moment().snapshot
    for path in lab.live.workspace.iterdir():
        path.unlink()
    lab.snapshots.forget(lab.live.id)
    # The directory isn't watched yet.
    asyncio.run(lab.snapshots.restore(snapshot, lab.live.sandbox, session_id=mine("s")))
    process = lab.live.start(MAPS_TWICE)

    def goes_on() -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()

    new_watch, put_tree = lab.snapshots.new_watch, ContentCopies.put_tree

    def mapped_first(*arguments: Any) -> Any:
        goes_on()
        return new_watch(*arguments)

    def written_first(*arguments: Any, **more: Any) -> None:
        if not more["still"]:
            goes_on()
            monkeypatch.undo()
        put_tree(*arguments, **more)

    monkeypatch.setattr(lab.snapshots, "new_watch", mapped_first)
    monkeypatch.setattr(ContentCopies, "put_tree", written_first)
    assert lab.moment().consistent
    assert lab.contents()["f1"] == b"other"


@pytest.mark.parametrize("can_freeze", [True, False])
def test_what_is_mapped_while_that_is_asked_for_is_read_again(
    lab: MomentLab, can_freeze: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a process that was asked about already, while many others are."""
    frozen = lab.live.frozen
    lab.live.can_freeze = can_freeze
    for number in range(60):
        write(lab, f"f{number}", b"")

    def is_untold(name: str) -> bool:
        """Whether the times of the file don't tell of its last change: they do where the kernel has written it back in
        between, as it does when other programs sync."""
        late = lab.live.workspace / name
        write(lab, name, b"before" + bytes(4090))
        time.sleep(SETTLE)
        maps: list[mmap.mmap] = []
        times: list[int] = []

        def held_files(_: int) -> HeldFiles:
            if maps:
                is_mapped = [] if maps[0].closed else [os.stat(late).st_ino]
                return HeldFiles(frozenset(), frozenset(is_mapped))
            with late.open("r+b") as file:
                maps.append(mmap.mmap(file.fileno(), 0))
            maps[0][:6] = b"first "
            time.sleep(2 * SETTLE)
            return HeldFiles(frozenset(), frozenset())

        def write_once_more() -> None:
            if maps and not maps[0].closed:
                times.append(os.stat(late).st_ctime_ns)
                maps[0][:6] = b"second"
                times.append(os.stat(late).st_ctime_ns)
                maps[0].close()

        @asynccontextmanager
        async def frozen_later() -> AsyncIterator[bool | None]:
            if can_freeze:
                write_once_more()
            async with frozen() as still:
                yield still

        monkeypatch.setattr(lab.live, "held_files", held_files)
        monkeypatch.setattr(lab.live, "frozen", frozen_later)
        lab.snapshots.forget(lab.live.id)
        lab.moment()
        write_once_more()
        lab.moment()
        assert lab.contents()[name][:6] == b"second"
        return times[0] == times[1]

    assert any(is_untold(f"late{number}") for number in range(10))
