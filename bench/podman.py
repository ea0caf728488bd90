"""podman: a container made for one program, and a program in a container that is there, with the files of the host.

It gets no image, since no registry may be in reach: its root is an empty directory with the host's /usr in it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

from bench import rivals
from bench.arena import Arena
from bench.cases import PROGRAMS, Case, Probe, Ratio
from era import languages
from era.drivers import guest

_RUNTIMES = ("crun", "runc")
_CGROUPS = Path("/sys/fs/cgroup")
_CLOSING_SECONDS = 5.0
_PYTHON = [guest.PYTHON, "-c", PROGRAMS["python"]]


class _Podman:
    """podman with all that it keeps in one directory."""

    def __init__(self, directory: Path, runtime: str) -> None:
        self._group = f"era-bench-{secrets.token_hex(4)}"
        self._root = directory / "root"
        for name in ("usr", "etc", "proc", "sys", "dev", "tmp"):
            (self._root / name).mkdir(parents=True)
        for name in ("bin", "lib", "lib64", "sbin"):
            if (link := Path("/") / name).is_symlink():
                (self._root / name).symlink_to(link.readlink())
        places = (f"--root={directory}/storage", f"--runroot={directory}/run", f"--tmpdir={directory}/tmp")
        self._podman = ["podman", *places, "--storage-driver=vfs", "--cgroup-manager=cgroupfs", f"--runtime={runtime}"]

    def once(self, command: list[str]) -> list[str]:
        """The command line of a program in a container of its own."""
        return [*self._podman, "run", "--rm", *self._container(), *command]

    def start(self) -> str:
        """Start a container that does nothing. Returns its id. Raises RuntimeError."""
        command = [*self._podman, "run", "--detach", *self._container(), "/usr/bin/sleep", "infinity"]
        return rivals.run(command).decode().strip()

    def inside(self, container: str, command: list[str]) -> list[str]:
        """The command line of a program in that container."""
        return [*self._podman, "exec", container, *command]

    def close(self) -> None:
        subprocess.run([*self._podman, "rm", "--all", "--force", "--time=0"], capture_output=True, check=False)
        deadline = time.monotonic() + _CLOSING_SECONDS
        while (left := self._groups()) and time.monotonic() < deadline:
            for group in left:
                for directory, _, _ in os.walk(group, topdown=False):
                    with contextlib.suppress(OSError):  # podman's monitor is still in it
                        os.rmdir(directory)
            time.sleep(0.02)

    def _groups(self) -> list[Path]:
        return [group for pattern in ("", "*/") for group in _CGROUPS.glob(pattern + self._group)]

    def _container(self) -> list[str]:
        mounts = {"/usr": Path("/usr"), **languages.runtime("python").mounts}
        volumes = (f"--volume={source}:{inside}:ro" for inside, source in mounts.items())
        options = ["--network=none", "--log-driver=none", f"--cgroup-parent=/{self._group}"]
        return [*options, *volumes, "--rootfs", str(self._root)]


@cache
def usable() -> tuple[str | None, str]:
    """An OCI runtime with which podman runs a program here. None if there is none; then why, too."""
    if shutil.which("podman") is None:
        return None, "it isn't installed"
    problem = "it has no OCI runtime"
    for runtime in filter(shutil.which, _RUNTIMES):
        with tempfile.TemporaryDirectory(prefix="era-bench-", ignore_cleanup_errors=True) as directory:
            podman = _Podman(Path(directory), runtime)
            tried = subprocess.run(podman.once(["/usr/bin/true"]), capture_output=True, text=True, check=False)
            podman.close()
        if not tried.returncode:
            return runtime, ""
        problem = tried.stderr.strip().rpartition("\n")[2]
    return None, problem


@cache
def _of(arena: Arena) -> _Podman:
    runtime, problem = usable()
    if runtime is None:
        raise RuntimeError(f"podman can't be used: {problem}")
    podman = _Podman(arena.scratch / "podman", runtime)
    arena.closers.callback(podman.close)
    return podman


def _probe(argv: list[str]) -> Probe:
    def after(output: bytes) -> None:
        if output != b"1\n":
            raise RuntimeError(f"podman's program printed {output!r}.")

    return Probe(lambda _: rivals.run(argv), after=after)


def _run(arena: Arena) -> Probe:
    return _probe(_of(arena).once(_PYTHON))


def _execute(arena: Arena) -> Probe:
    podman = _of(arena)
    return _probe(podman.inside(podman.start(), _PYTHON))


CASES: list[Case] = []
RATIOS: list[Ratio] = []
if usable()[0] is not None:
    CASES += [
        Case("podman run", "the interpreter in a new container of podman's", _run, 0.2, burst=2),
        Case("podman exec", "the interpreter in a container that is there", _execute, 0.2, burst=2),
    ]
    RATIOS += [Ratio("create and run", "podman run"), Ratio("python warm", "podman exec")]
