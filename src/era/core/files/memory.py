"""What is remembered of a sandbox's working directory from one scan to the next."""

from __future__ import annotations

from dataclasses import dataclass

from era.core.files.paths import Parts
from era.core.files.trees import Tree
from era.core.files.watch import Watch
from era.core.models import Snapshot


@dataclass(frozen=True, slots=True)
class Memory:
    """The snapshot that a working directory holds, the scanned tree, and the watch on it, if any."""

    snapshot: Snapshot
    tree: Tree
    watch: Watch | None = None
    linked: frozenset[tuple[Parts, str]] | None = None
    """The files with several names, where the directory was watched and may be again."""

    held: frozenset[tuple[Parts, str]] | None = frozenset()
    """The files that processes had open or mapped at the scan, by directory and name: these may change without the
    watch noting it. None where they aren't known, so that a full scan is needed."""

    ahead_bytes: int = 0
    """How much was stored of the tree that the snapshot hasn't: the next snapshot must count it (history.py)."""


@dataclass(frozen=True, slots=True)
class Scanned:
    """A scanned tree that isn't stored yet, and the watch on it, if any."""

    tree: Tree
    watch: Watch | None
