"""Which files processes have mapped to share, as the kernel says it."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from era.drivers import memory, processes
from tests.conftest import eventually


@pytest.mark.parametrize("kernel_can_be_asked", [True, False])
def test_shared_maps_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_can_be_asked: bool) -> None:
    if not kernel_can_be_asked:
        monkeypatch.setattr(processes, "_PROCMAP_QUERY", 0x66FF)  # as before Linux 6.11: ENOTTY
    inodes: list[int] = []
    maps: list[mmap.mmap] = []
    for name, flags in (("one", mmap.MAP_SHARED), ("two", mmap.MAP_SHARED), ("private", mmap.MAP_PRIVATE)):
        with (tmp_path / name).open("w+b") as file:
            file.write(b"content")
            file.flush()
            maps.append(mmap.mmap(file.fileno(), 0, flags=flags))
            inodes.append(os.fstat(file.fileno()).st_ino)
    found = processes.mapped([os.getpid(), 1 << 22])  # the other one has ended
    assert found is not None
    assert found & set(inodes) == set(inodes[:2])
    for each in maps:
        each.close()
    assert not (processes.mapped([os.getpid()]) or set()) & set(inodes)


FIRST_THREAD_ENDS = """
import ctypes, mmap, os, sys, threading
libc = ctypes.CDLL(None)
unnamed = open("unnamed", "w+b")
unnamed.write(bytes(1 << 16))
unnamed.flush()
os.unlink("unnamed")
file = open("mapped", "r+b")
shared = mmap.mmap(file.fileno(), 0)
def other():
    sys.stdin.read()
threading.Thread(target=other).start()
print(flush=True)
libc.pthread_exit(None)
"""
THREAD_HAS_ITS_OWN = """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None)
def other():
    if libc.unshare(0x400):  # CLONE_FILES
        raise OSError
    unnamed = open("unnamed", "w+b")
    unnamed.write(bytes(1 << 16))
    unnamed.flush()
    os.unlink("unnamed")
    file = open("mapped", "r+b")
    print(flush=True)
    sys.stdin.read()
threading.Thread(target=other).start()
"""


@pytest.mark.parametrize("kernel_compares", [True, False])
@pytest.mark.parametrize("program", [FIRST_THREAD_ENDS, THREAD_HAS_ITS_OWN])
def test_what_threads_have_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, kernel_compares: bool
) -> None:
    """Though proc(5) says nothing of it under the process's own id."""
    if not kernel_compares:
        monkeypatch.setattr(processes, "_KCMP", None)
    file = tmp_path / "mapped"
    file.write_bytes(b"content")
    device = file.stat().st_dev
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        if program == FIRST_THREAD_ENDS:
            assert eventually(
                lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            )
        held = processes.held([process.pid], device)
        assert held is not None
        assert file.stat().st_ino in held.open
        assert (file.stat().st_ino in held.mapped) == (program == FIRST_THREAD_ENDS)
        assert processes.unnamed_bytes([process.pid], device) >= 1 << 16
        assert processes.memory_bytes([process.pid]) > 1 << 20
        assert memory.used([process.pid]) > 1 << 20
        assert memory.of_processes([process.pid], 0) > 1 << 20
        assert memory.of_processes([process.pid], 1 << 40) > 1 << 20
        assert memory.of_gvisor([process.pid]) > 1 << 20
        process.stdin.close()


def test_what_is_executed_or_only_pointed_at_is_held(tmp_path: Path) -> None:
    """Its name may be gone: a look goes by the inode."""
    program, pointed_at = tmp_path / "program", tmp_path / "pointed at"
    shutil.copy(shutil.which("sleep") or "", program)
    pointed_at.write_bytes(b"content")
    fd = os.open(pointed_at, os.O_PATH)
    with subprocess.Popen(["sleep", "1000"], executable=program, pass_fds=[fd]) as process:
        os.close(fd)
        inodes = {path.stat().st_ino for path in (program, pointed_at)}
        device = program.stat().st_dev
        program.rename(tmp_path / "other name")
        (tmp_path / "other name").unlink()
        held = processes.held([process.pid, 1 << 22], device)  # the other one has ended
        assert held is not None
        assert held.open >= inodes
        assert not held.mapped & inodes
        held = processes.held([process.pid], device + 1)
        assert held is not None
        assert not held.open & inodes
        process.kill()


def test_a_directory_that_is_gone_and_has_somebody_in_it_counts(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    status = directory.stat()
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=directory, stdin=subprocess.PIPE) as process:
        assert status.st_ino not in processes.unnamed([process.pid], status.st_dev)
        directory.rmdir()
        assert status.st_ino in processes.unnamed([process.pid], status.st_dev)
        process.kill()
