"""Partial scans of watched directories find what full scans find; warm directories are restored to any snapshot."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import random
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from era.core.models import EMPTY, STATE_FILE, Snapshot
from era.core.trees import file_threads
from era.core.trees import snapshots as snapshots_module
from era.core.trees import watch as watch_module
from era.core.trees.trees import Scan
from era.core.trees.watch import Watch, WatchBudget
from era.drivers import processes
from tests.conftest import eventually, opened
from tests.core import moments
from tests.core.lab import SETTLE, Lab, Place, described, mutate
from tests.owners import mine
from tests.soaking import soak_the_rest

LARGE = 60


def furnish(workspace: Path) -> None:
    for number in range(LARGE):
        directory = workspace / f"d{number % 5}" / f"e{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number}").write_text(str(number))


def mutate_oddly(workspace: Path, chance: random.Random) -> None:
    """A change that a watch could miss."""
    directories = [path for path in workspace.rglob("*") if path.is_dir() and not path.is_symlink()]
    files = [path for path in workspace.rglob("*") if path.is_file() and not path.is_symlink()]
    if not directories or not files:
        return
    file, directory = chance.choice(files), chance.choice(directories)
    free = chance.choice([workspace, directory]) / f"m{chance.randrange(4)}"
    match chance.randrange(9):
        case 0 if not os.path.lexists(free) and not free.is_relative_to(directory):
            directory.rename(free)
        case 1 if not os.path.lexists(free):
            os.link(file, free)
        case 2 if file.stat().st_size:
            with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
                mapped[0] = chance.randrange(256)
        case 3:
            os.truncate(file, chance.randrange(8))
        case 4 if not os.path.lexists(free):
            (free / "x" / "y").mkdir(parents=True)
            (free / "x" / "y" / "z").write_text("deep")
        case 5 if not free.is_relative_to(directory):
            shutil.rmtree(directory)
            directory.mkdir()
            (directory / "again").write_text("new")
        case 6 if not os.path.lexists(free):
            os.mkfifo(free)
        case 7:
            other = chance.choice(files)
            file.replace(other)
        case 8:
            # The same size, written through another name where the file has one, and the old time restored.
            status = file.stat()
            with file.open("r+b") as opened:
                opened.write(b"Z" * min(1, status.st_size))
            os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("seed", soak_the_rest(range(8), 1))
def test_a_partial_scan_finds_what_a_full_scan_finds(
    seed: int, lab: Lab, monkeypatch: pytest.MonkeyPatch, *, bulk: bool
) -> None:
    """With `bulk` full scans are begun on one thread, given up, and made on another."""
    if bulk:
        monkeypatch.setattr(file_threads, "LARGE_ENTRIES", 40)
    chance = random.Random(seed)
    rescans = 0
    rescan = Scan.rescan

    def counted(*arguments: object) -> object:
        nonlocal rescans
        rescans += 1
        return rescan(*arguments)  # type: ignore[arg-type]  # handed on

    monkeypatch.setattr(Scan, "rescan", counted)
    place, snapshot = lab.place(), EMPTY
    furnish(place.workspace)
    for _ in range(40):
        snapshot = lab.take(place, snapshot)
        assert snapshot == lab.from_scratch(place)
        for _ in range(chance.randrange(5)):
            chance.choice([mutate, mutate_oddly])(place.workspace, chance)
    assert rescans > 10


NAMED = "d0/e0/f0"
CHANGED = "d1/e1/f1"
type Step = Callable[[Path], object]


def write_by(name: str) -> Step:
    return lambda workspace: (workspace / name).write_text("changed")


def link(file: str, name: str) -> Step:
    return lambda workspace: os.link(workspace / file, workspace / name)


def rename(old: str, new: str) -> Step:
    return lambda workspace: os.rename(workspace / old, workspace / new)


def remove(name: str) -> Step:
    return lambda workspace: (workspace / name).unlink()


NAMES_USED_AGAIN: dict[str, list[list[Step]]] = {
    "a link's": [[link(NAMED, "c")], [remove("c"), link(CHANGED, "c"), write_by("c")]],
    "that of a link that is gone": [[link(NAMED, "c")], [remove("c")], [link(CHANGED, "c"), write_by("c")]],
    "a link's, by a rename": [[link(NAMED, "c")], [link(CHANGED, "t"), write_by("t"), rename("t", "c")]],
    "in a directory with the old one's name": [
        [lambda workspace: (workspace / "n").mkdir(), lambda workspace: (workspace / "o").mkdir()],
        [link(NAMED, "n/c")],
        [lambda workspace: shutil.rmtree(workspace / "n")],
        [rename("o", "n"), link(CHANGED, "n/c"), write_by("n/c")],
    ],
    "the state file's": [[write_by(STATE_FILE)], [remove(STATE_FILE), link(CHANGED, STATE_FILE), write_by(STATE_FILE)]],
}
"""What programs do one after the other, by the name under which the last one writes to a file that they don't touch
otherwise."""


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
@pytest.mark.parametrize("name", NAMES_USED_AGAIN)
def test_a_change_by_a_name_that_another_file_had_is_found(
    name: str, weakened: bool, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weakened:
        real = Watch.note_links
        monkeypatch.setattr(Watch, "note_links", lambda *what, arrived: real(*what, arrived=False))
        monkeypatch.setattr(Scan, "_look_at_state_file", lambda *_, **__: None)
    place = lab.place()
    furnish(place.workspace)
    snapshot = lab.take(place)
    for steps in NAMES_USED_AGAIN[name]:
        for step in steps:
            step(place.workspace)
        snapshot = lab.take(place, snapshot)
    assert (snapshot == lab.from_scratch(place)) is not weakened  # only now, as that opens all files


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
def test_a_change_by_what_was_executed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    """Opened by /proc/PID/exe, it has the name by which it was executed: where that is gone, the watch tells of
    nothing. And when the next look comes, its process and all descriptors are gone, too."""
    if weakened:
        monkeypatch.setattr(processes, "_executed", lambda *_: set())
    with moments.opened(tmp_path) as lab:
        furnish(lab.live.workspace)
        program, other = (lab.live.workspace / "d1" / name for name in ("program", "other"))
        shutil.copy(shutil.which("sleep") or "", program)
        process = subprocess.Popen(["sleep", "1000"], executable=program)
        lab.live.running.append(process)
        lab.live.started.append(process)
        os.link(program, other)
        program.unlink()
        for _ in range(2):
            time.sleep(SETTLE)
            lab.moment()  # until it is settled, and has one name
        fd = os.open(f"/proc/{process.pid}/exe", os.O_PATH)
        lab.live.running.clear()
        process.kill()
        process.wait()
        write_when_free(Path(f"/proc/self/fd/{fd}"))
        os.close(fd)
        lab.moment()
        assert other.read_bytes().startswith(b"changed")
        assert lab.contents()["d1/other"].startswith(b"changed") is not weakened


def write_when_free(path: Path) -> None:
    """Write to a file that was executed, once the kernel has noticed that it isn't any more."""

    def written() -> bool:
        try:
            with path.open("r+b") as file:
                return file.write(b"changed") > 0
        except OSError as error:
            if error.errno != errno.ETXTBSY:
                raise
            return False

    assert eventually(written)


@pytest.mark.slow
@pytest.mark.parametrize("seed", soak_the_rest(range(6), 1))
def test_a_warm_directory_is_restored_to_any_snapshot(seed: int, lab: Lab) -> None:
    chance = random.Random(seed)
    place, snapshot = lab.place(), EMPTY
    furnish(place.workspace)
    history: list[tuple[Snapshot, dict[bytes, tuple[object, ...]]]] = [(EMPTY, {})]
    for _ in range(25):
        for _ in range(chance.randrange(6)):
            chance.choice([mutate, mutate_oddly])(place.workspace, chance)
        snapshot = lab.take(place, snapshot)
        history.append((snapshot, described(place.workspace)))
        if chance.random() < 0.5:
            snapshot, before = chance.choice(history)
            asyncio.run(lab.snapshots.restore(snapshot, place.sandbox, session_id=mine("s")))
            assert described(place.workspace) == before
            assert lab.take(place, snapshot) == snapshot == lab.from_scratch(place)


def test_only_what_differs_is_restored(lab: Lab) -> None:
    place = lab.place()
    furnish(place.workspace)
    first = lab.take(place)
    kept = place.workspace / "d1" / "e1" / "f1"
    inode = kept.stat().st_ino
    (place.workspace / "d0" / "e0" / "f0").write_text("changed")
    second = lab.take(place, first)
    assert second != first
    asyncio.run(lab.snapshots.restore(first, place.sandbox, session_id=mine("s")))
    assert (place.workspace / "d0" / "e0" / "f0").read_text() == "0"
    assert kept.stat().st_ino == inode


@pytest.mark.slow
def test_an_event_queue_that_overflows_leads_to_a_full_scan(lab: Lab) -> None:
    place = lab.place()
    furnish(place.workspace)
    snapshot = lab.take(place)
    depth = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    names = [place.workspace / "d0" / "e0" / name for name in ("f0", "f15")]
    for number in range(depth + 10):  # in turn, since the kernel makes one event of equal ones that follow each other
        os.chmod(names[number % 2], 0o644)
    (place.workspace / "d4" / "e1" / "late").write_text("seen all the same")
    snapshot = lab.take(place, snapshot)
    assert snapshot == lab.from_scratch(place)
    (place.workspace / "d4" / "e1" / "later").write_text("and from here on too")
    assert lab.take(place, snapshot) == lab.from_scratch(place)


def test_without_watches_every_scan_is_full(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Watch:
        raise OSError(24, "too many")

    monkeypatch.setattr(snapshots_module, "Watch", refused)
    place = lab.place()
    furnish(place.workspace)
    snapshot = lab.take(place)
    (place.workspace / "d2" / "e2" / "more").write_text("found")
    assert lab.take(place, snapshot) == lab.from_scratch(place)


def watched() -> int:
    """How many directories this process watches."""
    count = 0
    for descriptor in os.listdir("/proc/self/fdinfo"):
        with suppress(OSError), open(f"/proc/self/fdinfo/{descriptor}") as info:
            count += info.read().count("inotify wd:")
    return count


def test_a_session_with_many_directories_isnt_watched_and_others_are(tmp_path: Path) -> None:
    lab = Lab(tmp_path, watches=WatchBudget(100))
    before = watched()
    small, large = lab.place(), lab.place()
    furnish(small.workspace)
    first = lab.take(small)
    assert watched() == before + 21
    for number in range(60):
        (large.workspace / f"d{number}" / "e").mkdir(parents=True)
    snapshot = lab.take(large)
    assert watched() == before + 21
    (large.workspace / "d5" / "e" / "new").write_text("found all the same")
    assert lab.take(large, snapshot) == lab.from_scratch(large)
    (small.workspace / "d1" / "e1" / "new").write_text("found")
    assert lab.take(small, first) == lab.from_scratch(small)
    asyncio.run(lab.snapshots.close())
    assert eventually(lambda: watched() == before)


def test_a_session_that_grows_out_of_its_watches_is_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "MAX_WATCHES", 40)
    budget = WatchBudget(1000)
    lab = Lab(tmp_path, watches=budget)
    before = watched()
    place = lab.place()
    furnish(place.workspace)
    snapshot = lab.take(place)
    assert watched() == before + 21
    for number in range(15):
        (place.workspace / "d1" / "e1" / f"m{number}" / "n").mkdir(parents=True)
        snapshot = lab.take(place, snapshot)
        assert watched() <= before + 40
    assert snapshot == lab.from_scratch(place)
    (place.workspace / "d1" / "e1" / "m7" / "n" / "late").write_text("found")
    shutil.rmtree(place.workspace / "d1" / "e1" / "m9")
    assert lab.take(place, snapshot) == lab.from_scratch(place)
    assert budget._shares.taken == watched() - before == 0
    asyncio.run(lab.snapshots.close())


def test_descriptors_go_with_the_sandbox(lab: Lab) -> None:
    inotify = "anon_inode:inotify"
    before = opened(inotify)
    places: list[Place] = [lab.place() for _ in range(5)]
    for place in places:
        furnish(place.workspace)
        lab.take(place)
    assert opened(inotify) == before + 5
    for place in places:
        lab.snapshots.forget(place.id)
    assert eventually(lambda: opened(inotify) == before)


@pytest.mark.slow
@pytest.mark.parametrize("directories", soak_the_rest([10, 100], 1))
def test_one_changed_file_among_many_is_found_fast(lab: Lab, directories: int) -> None:
    """Not by time: no directory is listed."""
    place = lab.place()
    for number in range(directories):
        directory = place.workspace / f"d{number}"
        directory.mkdir()
        for file in range(100):
            (directory / str(file)).write_text("x")
    snapshot = lab.take(place)
    (place.workspace / "d7" / "5").write_text("changed")
    opened: list[object] = []
    original = os.scandir

    def counting(path: object) -> object:
        opened.append(path)
        return original(path)  # type: ignore[call-overload]  # handed on

    begun = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", counting)
        changed = lab.take(place, snapshot)
    print(f"{(time.perf_counter() - begun) * 1000:.2f} ms")
    assert changed != snapshot
    assert opened == []


@pytest.mark.parametrize("times", soak_the_rest([15, 60], 1))
def test_a_watch_may_be_closed_while_it_is_used(tmp_path: Path, times: int) -> None:
    """As where a session is deleted during a commit: what is read then is nobody else's file, and it tells nothing."""
    number, stop = 300, threading.Event()
    for n in range(number):
        (tmp_path / str(n)).mkdir()
    innocent = tmp_path / "innocent"
    innocent.write_bytes(b"x" * 6000)
    wrong: list[object] = []

    def others() -> None:
        """Opens files all the time, whose descriptors are those that were closed last."""
        while not stop.is_set():
            try:
                with innocent.open("rb", buffering=0) as file:
                    content = file.read()
                if len(content) != 6000:
                    wrong.append(len(content))
            except OSError as error:
                wrong.append(error)

    busy = threading.Thread(target=others)
    busy.start()
    descriptors = [os.open(tmp_path / str(n), os.O_RDONLY) for n in range(number)]
    told = Counter[str]()
    try:
        for _ in range(times):
            watch = Watch(WatchBudget(4 * number, 1))
            for n, fd in enumerate(descriptors):
                watch.add(fd, (str(n),))
            assert watch.works
            for n in range(50):
                (tmp_path / str(n) / "f").write_text("x")
            closing = threading.Thread(target=watch.close)
            closing.start()
            touched = watch.touched()
            closing.join()
            told["nothing known" if touched is None else "all of it" if len(touched.below) == 50 else "a part"] += 1
            assert watch.touched() is None
            assert not watch.works
    finally:
        stop.set()
        busy.join()
        for fd in descriptors:
            os.close(fd)
    assert wrong == []
    assert set(told) <= {"nothing known", "all of it"}, told
