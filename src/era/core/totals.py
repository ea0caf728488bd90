"""How much there is in a tree, and how much there may be."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import NamedTuple

_BLOCK = 512  # the unit of st_blocks on every file system
_LISTED_AT_ONCE = 8192
"""Bytes of a directory's list that count as one entry more: an empty one may have room for many, and is read whole."""

_TARGET_BYTES = 256
"""More than a name may have."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a tree may hold at most. `depth` is how many directories may be nested."""

    entries: int = 200_000
    total_bytes: int = 4 << 30
    depth: int = 128

    def have_room(self, totals: Totals) -> bool:
        return totals.entries <= self.entries and totals.total_bytes <= self.total_bytes


class Totals(NamedTuple):
    """Counts of everything below a directory. `entries` are all, `files` are files and links."""

    entries: int = 0
    files: int = 0
    total_bytes: int = 0
    spare_bytes: int = 0
    """What files and directories take on the disk beyond their content; see `spare_bytes`."""

    def plus(self, other: Totals) -> Totals:
        return Totals(self[0] + other[0], self[1] + other[1], self[2] + other[2], self[3] + other[3])

    def minus(self, other: Totals) -> Totals:
        return Totals(self[0] - other[0], self[1] - other[1], self[2] - other[2], self[3] - other[3])


def link_totals(size: int) -> Totals:
    """Those of a link whose target has so many bytes. A long one counts as several entries: targets are remembered with
    the tree and stand in its lists, where they can take six times their bytes."""
    return Totals(1 + size // _TARGET_BYTES, 1, size)


def allocated_bytes(status: os.stat_result) -> int:
    """What a file or directory takes on the disk."""
    return status.st_blocks * _BLOCK


def spare_bytes(status: os.stat_result) -> int:
    """What it takes beyond its content and two blocks, one of them for attributes: room that was allocated behind a
    file's end, or that a directory's list had for names that are gone."""
    content = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return max(0, allocated_bytes(status) - content - 2 * status.st_blksize)


def work_of_listing(status: os.stat_result) -> int:
    """For how many entries more a directory counts that is to be listed."""
    return status.st_size // _LISTED_AT_ONCE
