"""Preparation of languages: work done once on a machine, such as compiling a standard library, for all its sandboxes.

Theory of operation. The result is a directory `ready` in a place of its own: beside the installation where that can be
written, else in the user's cache, else where the service says. Sandboxes mount the place, read-only. It is there before
the result is, so a sandbox that was made earlier sees the result appear.

`make setup` prepares for a checkout. A service without the result prepares in the background (drivers/preparations.py),
at the lowest priority: with SCHED_IDLE any run comes first. Runs still take two to three times as long while it keeps
all processors busy, so what takes long waits until somebody asks for the language. A file lock lets one service build
while others wait for it. What a service that was stopped has built is built upon by the next one, but not after the
machine was restarted: content that was never flushed may be damaged then. The result is flushed before it gets its
name.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

READY = "ready"
PLACES = "share/era"
"""The directory of places, in an installation."""

_POLL_SECONDS = 0.5
_ERROR_CHARACTERS = 2_000

_START = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: it ends with the service
if os.getppid() != int(sys.argv[1]):  # which died before that
    os._exit(1)
os.umask(0o022)  # the uids of sandboxes must be able to read the result
if sys.argv[2] == "idle":
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.execv(sys.argv[3], sys.argv[3:])
"""


class PreparationFailed(Exception):
    """The command failed: the message has the end of what it wrote to stderr."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """What one language needs to have prepared."""

    name: str
    """The name of its place. It has to change with whatever the result depends on, such as a version."""

    title: str
    """What is prepared, to begin a sentence with."""

    mount: str
    """Where sandboxes have the place."""

    command: Callable[[Path], tuple[Sequence[str], Mapping[str, str]]]
    """argv and environment of the program that fills a directory. It may find there what it left when it was killed."""

    at_start: bool = True
    """Whether a service prepares it when it starts; else when a sandbox of the language is first asked for."""

    def ready_place(self) -> Path | None:
        """The place that has the result, None if it hasn't been prepared on this machine."""
        places = (directory / self.name for directory in _directories())
        return next((place for place in places if (place / READY).is_dir()), None)

    def make_place(self, *fallback: Path) -> Path:
        """Make a place in the first directory that can be written, `fallback` last. Raises OSError if none can."""
        for directory in (*_directories(), *fallback):
            place = directory / self.name
            with suppress(OSError):
                place.mkdir(parents=True, exist_ok=True)
                if os.access(place, os.W_OK):
                    return place
        raise PermissionError(f"there is no directory to prepare {self.name} in")

    async def run(self, place: Path, *, idle: bool = False) -> None:
        """Make the result in `place`, or wait until another process has. Raises PreparationFailed, OSError."""
        async with _locked(place / "lock"):
            if (place / READY).is_dir():
                return
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
            unfinished = place / f"building-{boot}"
            for other in place.glob("building-*"):
                if other != unfinished:
                    shutil.rmtree(other)
            unfinished.mkdir(exist_ok=True)
            command, environment = self.command(unfinished)
            await _run(command, environment, idle=idle)
            await asyncio.to_thread(os.sync)
            unfinished.rename(place / READY)


def _directories() -> tuple[Path, ...]:
    """Where places may be, the best one first."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(sys.prefix) / PLACES, Path(cache) / "era"


@asynccontextmanager
async def _locked(file: Path) -> AsyncIterator[None]:
    """Hold an exclusive lock on `file`. The kernel takes it from a process that ends."""
    with file.open("w") as opened:
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(_POLL_SECONDS)
            else:
                break
        yield


async def _run(command: Sequence[str], environment: Mapping[str, str], *, idle: bool) -> None:
    """Run a program to its end; it is killed, with all it started, if this task is cancelled. Raises PreparationFailed,
    OSError."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", _START, str(os.getpid()), "idle" if idle else "usual", *command),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, stderr = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if process.returncode != 0:
        raise PreparationFailed(stderr.decode(errors="replace")[-_ERROR_CHARACTERS:].strip())
