"""Directories that are made whole or not at all: filled beside their place, made durable, then renamed to it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from era.core.files.durable import sync, sync_file_system
from era.errors import Conflict


def check_free(place: Path) -> None:
    """Raises Conflict where there is something already; an empty directory is fine."""
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise Conflict(f"{place} is there already.", hint="Name a directory that doesn't exist yet.")
    if not place.is_dir():
        return
    if any(place.iterdir()):
        raise Conflict(f"{place} is there already, and isn't empty.", hint="Name a directory that doesn't exist yet.")
    if place.is_mount():
        raise Conflict(
            f"{place} is where a file system is mounted, so it can't be put there at once.",
            hint="Name a directory in it that doesn't exist yet.",
        )


@contextmanager
def placing(place: Path) -> Iterator[Path]:
    """A directory to fill, which gets to `place` when the block ends; nothing of it is left if the block raises.

    What a killed process left of an earlier attempt is removed first. Raises Conflict where there is something at
    `place` already, or another process or user is about to place something there; OSError.
    """
    place = place.absolute()
    check_free(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.partial")
    is_left = False
    try:
        draft.mkdir(mode=0o700)
    except FileExistsError:
        is_left = True
    lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if is_left and os.fstat(lock).st_uid != os.geteuid():  # who would see, and could change, all that is put there
            raise Conflict(f"{draft} is another user's.", hint="Remove it, or name a place in a directory of your own.")
        os.fchmod(lock, 0o700)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"Another command is filling {place}.", hint="Wait for it, or name another place.") from None
        _empty(draft)
        try:
            yield draft
            sync_file_system(lock)  # opened before anything was written
            check_free(place)
            draft.rename(place)
            sync(place.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
