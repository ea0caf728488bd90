"""Who has a directory for itself: locks of data directories, and of what the hosts of a cluster share.

The kernel gives a lock back however its process ends, so none is left behind.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO

import structlog

from era.errors import Conflict
from era.settings import Settings
from era.store.blobs.blobs import make_directory

log = structlog.get_logger()

_LOOK_SECONDS = 0.1
_TOLD_AFTER_SECONDS = 5.0


def shared_directory(settings: Settings) -> Path:
    """What a host of a cluster shares with the others; a single server has it all in its data directory."""
    return (settings.shared_dir or settings.data_dir).resolve()


@contextmanager
def sharing(settings: Settings) -> Iterator[None]:
    """Hold the shared directory of a cluster's hosts, as one of them. Raises Conflict where a single server has it."""
    if settings.shared_dir is None:
        yield
        return
    directory = settings.shared_dir.resolve()
    make_directory(directory)
    problem = Conflict(
        f"Another ERA service has {directory} for itself.", hint="Stop it, or choose another ERA_SHARED_DIR."
    )
    with _locked(directory, fcntl.LOCK_SH, problem):
        yield


@asynccontextmanager
async def alone(settings: Settings) -> AsyncIterator[None]:
    """Within the block no other host of the cluster begins to use what they share: the first makes it."""
    if settings.shared_dir is None:
        yield
        return
    with (settings.shared_dir / "starting").open("a") as lock:
        tell_at = time.monotonic() + _TOLD_AFTER_SECONDS
        while not _took(lock, fcntl.LOCK_EX):  # never in a thread, which a signal to stop couldn't end
            if time.monotonic() > tell_at:
                log.info("start_waits", file=lock.name, why="another host of the cluster is starting")
                tell_at = math.inf
            await asyncio.sleep(_LOOK_SECONDS)
        yield


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the data directory's lock. Raises Conflict where another process holds it."""
    problem = Conflict(
        f"Another ERA service uses {directory}.", hint="Stop it, or choose another directory with --data-dir."
    )
    with _locked(directory, fcntl.LOCK_EX, problem):
        yield


@contextmanager
def _locked(directory: Path, kind: int, problem: Conflict) -> Iterator[None]:
    """Hold a directory's lock, of this kind. Raises the problem where another process is in its way."""
    with (directory / "lock").open("a") as lock:
        if not _took(lock, kind):
            raise problem
        yield


def _took(file: IO[str], kind: int) -> bool:
    """Whether a lock of this kind could be taken at once."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
