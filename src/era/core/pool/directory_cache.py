"""Kept directories: working directories of sandboxes that were put away, as a cache of their sessions' snapshots.

Theory of operation. To fill a working directory from blobs takes time for each file. A sandbox that makes way leaves
its directory behind, which is just what the last commit found there: no program has run since, and nothing that could
touch it is alive. When the session runs next, its new sandbox gets the files by renaming them. If the session has
another snapshot by then, only what differs is written.

It is a cache: what is kept is known to this process only, and removed at its start. A directory that is restored as
quickly isn't kept. What was used longest ago goes first, when all take more disk than they may, or when disk is short.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from era.core.concurrency.tasks import log_failure
from era.core.models import Snapshot
from era.core.ports import Sandbox

_WORTH_FILES, _WORTH_BYTES = 100, 4 << 20
"""What has fewer files and bytes is restored as quickly."""

MOST_BYTES = 4 << 30
"""Disk space of the directories by default. Less is used where the disk is nearly full."""

_BLOCK = 4096
"""What each takes on disk besides its content, about; a directory takes that, too."""

_FREE_SHARE = 0.1
"""How much of the disk has to stay free."""


@dataclass(frozen=True, slots=True)
class CachedDirectory:
    """A session's directory, in a sandbox that is dead."""

    sandbox: Sandbox
    snapshot: Snapshot
    """What it holds."""

    entries: int
    """How many files, directories and the like are in it."""

    @property
    def disk_bytes(self) -> int:
        """What it takes on disk, about."""
        return self.snapshot.total_bytes + self.entries * _BLOCK


class DirectoryCache:
    """The kept directories, by session."""

    def __init__(self, most_bytes: int, forget: Callable[[str], None]) -> None:
        """All together take at most `most_bytes` of disk. `forget` is called with the id of a sandbox whose directory
        is about to be removed."""
        self._most_bytes = most_bytes
        self._forget = forget
        self._kept: OrderedDict[int, CachedDirectory] = OrderedDict()
        self._bytes = 0
        self._closing: set[asyncio.Task[None]] = set()

    def keys(self) -> list[int]:
        """The keys of sessions of which there is one."""
        return list(self._kept)

    def is_worth_it(self, snapshot: Snapshot) -> bool:
        """Whether a directory with this snapshot is to be kept."""
        large = snapshot.file_count > _WORTH_FILES or snapshot.total_bytes > _WORTH_BYTES
        return large and snapshot.total_bytes + snapshot.file_count * _BLOCK <= self._most_bytes

    def add(self, session_key: int, sandbox: Sandbox, snapshot: Snapshot, entries: int) -> None:
        """Keep the directory of a sandbox that was put away, which holds this snapshot, of so many files, directories
        and the like. Others may go for it, or it goes at once."""
        self._drop(session_key)
        added = CachedDirectory(sandbox, snapshot, entries)
        if added.disk_bytes > self._most_bytes:
            self.close_soon(added)  # rather than all others, and then this one, too
            return
        self._kept[session_key] = added
        self._bytes += added.disk_bytes
        while self._kept and (self._bytes > self._most_bytes or _is_short(sandbox.workspace)):
            self._drop(next(iter(self._kept)))

    def take(self, session_key: int) -> CachedDirectory | None:
        """Take out the session's directory, if there is one. The caller closes it, with `close_soon` or `close`."""
        kept = self._kept.pop(session_key, None)
        if kept is not None:
            self._bytes -= kept.disk_bytes
        return kept

    async def close(self, kept: CachedDirectory) -> None:
        """Remove a directory that was taken out. It is gone when this returns."""
        self._forget(kept.sandbox.id)
        await kept.sandbox.close()

    def close_soon(self, kept: CachedDirectory) -> None:
        """The same, without waiting for it."""
        task = asyncio.create_task(self.close(kept))
        self._closing.add(task)
        task.add_done_callback(self._closed)

    async def close_all(self) -> None:
        for key in list(self._kept):
            self._drop(key)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _drop(self, session_key: int) -> None:
        if (kept := self.take(session_key)) is not None:
            self.close_soon(kept)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        log_failure(task, "directory_not_removed")


def _is_short(directory: os.PathLike[str]) -> bool:
    """Whether the disk that has this directory is nearly full."""
    disk = os.statvfs(directory)
    return disk.f_bavail < _FREE_SHARE * disk.f_blocks
