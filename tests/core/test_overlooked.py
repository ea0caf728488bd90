"""Programs that change a file so that inotify reports another name, or none in time: the next scan must find it."""

from __future__ import annotations

import array
import asyncio
import ctypes
import gc
import mmap
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from era.core.models import Snapshot
from era.core.trees import watch as watch_module
from tests.core.lab import SETTLE, Lab, Place, described

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
DIRECTORIES, FILES = 6, 8
"""More entries than are scanned on the event loop, so that the directory is watched."""


def furnish(workspace: Path) -> None:
    for directory in range(DIRECTORIES):
        (workspace / f"d{directory}").mkdir()
        for file in range(FILES):
            (workspace / f"d{directory}" / f"f{file}").write_text("as it was")


def exchange(one: Path, other: Path) -> None:
    if _libc.renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2")


def write(path: Path) -> None:
    path.write_text("changed")


def by_link(victim: Path, link: Path, change: Callable[[Path], None] = write) -> None:
    os.link(victim, link)
    change(link)


def opened_for(change: Callable[[int], object]) -> Callable[[Path], None]:
    """Changes a file by its descriptor."""

    def open_and_change(path: Path) -> None:
        fd = os.open(path, os.O_RDWR)
        try:
            change(fd)
        finally:
            os.close(fd)

    return open_and_change


def punch_hole(fd: int) -> None:
    if _libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4)):
        raise OSError(ctypes.get_errno(), "fallocate")


def send_file(fd: int) -> None:
    source = os.memfd_create("source")
    os.write(source, b"changed")
    os.sendfile(fd, source, 0, 7)
    os.close(source)


def splice(fd: int) -> None:
    read, write = os.pipe()
    os.write(write, b"changed")
    os.splice(read, fd, 7, offset_dst=0)
    os.close(read)
    os.close(write)


def copy_range(path: Path) -> None:
    with (path.parent / "f7").open("rb") as source, path.open("r+b") as file:
        os.copy_file_range(source.fileno(), file.fileno(), 2, 3, 0)


def set_times_back(path: Path) -> None:
    """With as many bytes as before."""
    before = path.stat()
    path.write_text("as it w4s")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def reopen(path: Path) -> None:
    fd = os.open(path, os.O_PATH)
    write(Path(f"/proc/self/fd/{fd}"))
    os.close(fd)


CHANGES: dict[str, Callable[[Path], None]] = {
    "a hole": opened_for(punch_hole),
    "sendfile": opened_for(send_file),
    "splice": opened_for(splice),
    "copy_file_range": copy_range,
    "pwrite": opened_for(lambda fd: os.pwrite(fd, b"X", 2)),
    "truncate": lambda path: os.truncate(path, 3),
    "ftruncate": opened_for(lambda fd: os.ftruncate(fd, 3)),
    "times set back": set_times_back,
    "opened anew": reopen,
}


def link_beside(workspace: Path) -> None:
    by_link(workspace / "d1/f1", link := workspace / "d1/link")
    link.unlink()


def link_elsewhere(workspace: Path) -> None:
    by_link(workspace / "d1/f1", link := workspace / "d2/link")
    link.unlink()


def link_in_a_directory_of_its_own(workspace: Path) -> None:
    (own := workspace / "d3/own").mkdir()
    by_link(workspace / "d1/f1", own / "link")
    shutil.rmtree(own)


def link_in_a_directory_that_stays(workspace: Path) -> None:
    (own := workspace / "d3/own").mkdir()
    by_link(workspace / "d1/f1", link := own / "link")
    link.unlink()


def link_in_a_directory_that_was_moved(workspace: Path) -> None:
    (workspace / "d3").rename(workspace / "d4/moved")
    by_link(workspace / "d1/f1", link := workspace / "d4/moved/link")
    link.unlink()
    (workspace / "d4/moved").rename(workspace / "d3")


def link_replaced(workspace: Path) -> None:
    by_link(workspace / "d1/f1", link := workspace / "d1/link")
    (other := workspace / "d2/other").write_text("")
    other.rename(link)


def link_renamed_and_removed(workspace: Path) -> None:
    by_link(workspace / "d1/f1", link := workspace / "d1/link")
    link.rename(renamed := workspace / "d2/renamed")
    renamed.unlink()


def link_exchanged(workspace: Path) -> None:
    by_link(workspace / "d1/f1", link := workspace / "d1/link")
    exchange(link, workspace / "d2/f2")
    (workspace / "d2/f2").unlink()
    link.rename(workspace / "d2/f2")


def mode_by_link(workspace: Path) -> None:
    by_link(workspace / "d1/f1", link := workspace / "d1/link", lambda path: path.chmod(0o600))
    link.unlink()


def mapped_by_link(workspace: Path) -> None:
    def change(path: Path) -> None:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            mapped[:1] = b"X"

    by_link(workspace / "d1/f1", link := workspace / "d2/link", change)
    link.unlink()


def closed_late(workspace: Path) -> None:
    """Written through a map; the descriptor is in flight between sockets that only refer to each other."""
    with (workspace / "d1/f1").open("r+b") as file:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        flight = array.array("i", [file.fileno(), here.fileno(), there.fileno()])
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, flight)])
        there.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, flight)])
        with mmap.mmap(file.fileno(), 0) as mapped:
            mapped[:1] = b"X"
    here.close()
    there.close()


ATTACKS = [
    *(link_beside, link_elsewhere, link_in_a_directory_of_its_own, link_in_a_directory_that_stays),
    *(link_in_a_directory_that_was_moved, link_replaced, link_renamed_and_removed, link_exchanged),
    *(mode_by_link, mapped_by_link, closed_late),
]


def watched(lab: Lab) -> tuple[Place, Snapshot]:
    """A place with files that an earlier scan has settled."""
    place = lab.place()
    furnish(place.workspace)
    time.sleep(SETTLE)
    return place, lab.take(place)


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_wants_to_be_overlooked_is_found(attack: Callable[[Path], None], lab: Lab) -> None:
    place, snapshot = watched(lab)
    attack(place.workspace)
    taken = lab.take(place, snapshot)
    assert taken == lab.from_scratch(place)
    assert taken != snapshot
    (place.workspace / "d0/f0").write_text("an ordinary change")
    assert lab.take(place, taken) == lab.from_scratch(place)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_watch_without_these_rules_overlooks_it(
    attack: Callable[[Path], None], lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "_MASK", watch_module._MASK & ~watch_module._OPEN)
    monkeypatch.setattr(watch_module._CreatedNames, "note", lambda *_: None)
    gc.disable()
    try:
        for _ in range(20):  # the kernel may collect what is in flight at any moment: then it isn't overlooked
            place, snapshot = watched(lab)
            attack(place.workspace)
            if lab.take(place, snapshot) != lab.from_scratch(place):
                return
        raise AssertionError("it is never overlooked")
    finally:
        gc.enable()


@pytest.mark.parametrize("is_sound", [True, False])
@pytest.mark.parametrize("is_linked", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_a_file_is_found(
    change: Callable[[Path], None], is_linked: bool, is_sound: bool, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And isn't, where a watch hears of names only, and forgets them."""
    if not is_sound:
        names = watch_module._MOVED_FROM | watch_module._MOVED_TO | watch_module._CREATE | watch_module._DELETE
        monkeypatch.setattr(watch_module, "_MASK", names | watch_module._ONLY_DIRECTORIES)
        monkeypatch.setattr(watch_module._CreatedNames, "note", lambda *_: None)
    place, snapshot = watched(lab)
    victim, link = place.workspace / "d1/f1", place.workspace / "d2/link"
    if is_linked:
        by_link(victim, link, change)
        link.unlink()
    else:
        change(victim)
    taken = lab.take(place, snapshot)
    assert (taken != snapshot) == (taken == lab.from_scratch(place)) == is_sound


NAMES = st.sampled_from([f"d{d}/{name}" for d in range(3) for name in ("f0", "f1", "n0", "n1", "own/n0")])
KINDS = st.sampled_from(
    ["write", "link", "unlink", "rename", "exchange", "truncate", "mode", "map", "mkdir", "rmtree", "swap directories"]
)


def do(workspace: Path, kind: str, one: Path, other: Path) -> None:
    match kind:
        case "write":
            one.write_bytes(os.urandom(4))
        case "link":
            os.link(one, other)
        case "unlink":
            one.unlink()
        case "rename":
            one.rename(other)
        case "exchange":
            exchange(one, other)
        case "truncate":
            os.truncate(one, 1)
        case "mode":
            one.chmod(0o600 if one.stat().st_mode & 0o44 else 0o644)
        case "map":
            with one.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
                mapped[:1] = bytes([mapped[0] ^ 1])
        case "mkdir":
            (one.parent / "own").mkdir()
        case "rmtree":
            shutil.rmtree(one.parent / "own")
        case "swap directories":
            exchange(workspace / one.relative_to(workspace).parts[0], workspace / other.relative_to(workspace).parts[0])


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(st.tuples(KINDS, NAMES, NAMES), max_size=12), min_size=1, max_size=4))
def test_any_mixture_of_calls_is_found(runs: list[list[tuple[str, str, str]]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        place, snapshot = watched(lab)
        for run in runs:
            for kind, one, other in run:
                try:
                    do(place.workspace, kind, place.workspace / one, place.workspace / other)
                except (OSError, ValueError):
                    continue  # as a program that gets an error; an empty file can't be mapped
            snapshot = lab.take(place, snapshot)
            assert snapshot == lab.from_scratch(place)
        fresh = lab.restore(snapshot)
        assert described(fresh.workspace) == described(place.workspace)
        asyncio.run(lab.snapshots.close())  # its watches are few for each user


def test_the_program_s_own_file_needs_no_full_scan(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    place, snapshot = watched(lab)
    listed: list[object] = []
    scandir = os.scandir

    def counted(path: object) -> object:
        listed.append(path)
        return scandir(path)  # type: ignore[call-overload]  # handed on

    monkeypatch.setattr(os, "scandir", counted)
    write(place.workspace / "main.py")
    write(place.workspace / "d1/f1")
    (place.workspace / "main.py").unlink()
    changed = lab.take(place, snapshot, "main.py")
    assert listed == []
    assert changed == lab.from_scratch(place) != snapshot


@pytest.mark.parametrize("entry", [None, "main.py"])
def test_a_link_with_the_name_of_the_program_s_file_is_found(entry: str | None, lab: Lab) -> None:
    place, snapshot = watched(lab)
    entry_path = place.workspace / "main.py"
    if entry:  # the supervisor's, and again as the supervisor left it
        write(entry_path)
        entry_path.unlink()
    by_link(place.workspace / "d1/f1", entry_path)
    entry_path.unlink()
    taken = lab.take(place, snapshot, entry)
    assert taken == lab.from_scratch(place) != snapshot
