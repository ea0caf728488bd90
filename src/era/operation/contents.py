"""What a data directory consists of: the content that its rows name, followed through trees of files.

The rows are read in one transaction, so as they were at one moment. Each tree object is verified
before what it names is followed: a damaged one could name anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import Connection

from era.operation.server_data import STORE_ID, Content, is_damaged
from era.store import place
from era.store.outputs import OUTPUT_DIGESTS
from era.store.setups import PACKAGE_SETS
from era.store.versions import SNAPSHOT_ROOTS

DATABASE = place.SQLITE
KEYS = ("link-key", "site-key", "webhook-key", STORE_ID)
"""Files of a data directory that are made once, and on which links, sites, webhooks and an S3 store depend."""

DAMAGED = "has other content than its name says"
NO_LIST = "is no list of a directory"

SQL = "storage/sql"
DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20

type Advance = Callable[[int], None]
"""Told of each number of bytes that were done."""


@dataclass(frozen=True, slots=True)
class Named:
    """What rows name: roots of trees, and other blobs."""

    roots: frozenset[str]
    blobs: frozenset[str]


@dataclass(slots=True)
class Walk:
    """All blobs that rows need, and what is wrong with the trees among them, by digest."""

    needed: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)
    below: dict[str, list[str]] = field(default_factory=dict)
    """What each tree names."""

    def above(self) -> dict[str, list[str]]:
        """The trees that name each tree and blob."""
        above: dict[str, list[str]] = {}
        for tree, names in self.below.items():
            for name in names:
                above.setdefault(name, []).append(tree)
        return above


def reaching(bad: Iterable[str], above: Mapping[str, Iterable[str]]) -> set[str]:
    """The trees and blobs from which one of these is reached, themselves included. `above` is Walk.above."""
    found = set(bad)
    pending = list(found)
    while pending:
        for tree in above.get(pending.pop(), ()):
            if tree not in found:
                found.add(tree)
                pending.append(tree)
    return found


def databases(directory: Path) -> Iterator[str]:
    """The paths of programs' SQL databases, in a data directory."""
    for file in sorted((directory / SQL).glob("*/*.sqlite")):
        yield str(file.relative_to(directory))


def named(rows: Connection) -> Named:
    """What these rows name."""
    roots, outputs, sets = (rows.execute(query).scalars() for query in (SNAPSHOT_ROOTS, OUTPUT_DIGESTS, PACKAGE_SETS))
    return Named(frozenset(roots), frozenset(each for each in (*outputs, *sets) if each))


def walk(names: Named, content: Content) -> Walk:
    """Follow trees from their roots to all that rows need. Reads every tree object."""
    found = Walk(set(names.roots | names.blobs))
    pending = list(names.roots)
    while pending:
        tree = pending.pop()
        if tree in found.below:
            continue
        try:
            files, trees = _tree(content, tree)
        except FileNotFoundError:
            found.problems[tree] = "is missing"
            files = trees = []
        except OSError as error:
            found.problems[tree] = f"can't be read: {error.strerror}"
            files = trees = []
        except ValueError as error:
            found.problems[tree] = str(error)
            files = trees = []
        found.below[tree] = [*files, *trees]
        found.needed.update(found.below[tree])
        pending += trees
    return found


def _tree(content: Content, digest: str) -> tuple[list[str], list[str]]:
    """The digests of the files and directories that a tree object names. Raises OSError, ValueError for a damaged
    one."""
    try:
        with content.open(digest) as file:
            listed = file.read()
    except OSError as error:
        if is_damaged(error):
            raise ValueError(DAMAGED) from None
        raise
    if hashlib.sha256(listed).hexdigest() != digest:
        raise ValueError(DAMAGED)
    files: list[str] = []
    trees: list[str] = []
    try:
        for kind, _, *rest in json.loads(listed):
            if kind in ("file", "dir"):
                if not DIGEST.fullmatch(rest[0]):
                    raise ValueError
                (files if kind == "file" else trees).append(rest[0])
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError(NO_LIST) from None
    return files, trees


def digest_of(source: Path | BinaryIO, advance: Advance = lambda _: None) -> str:
    """The SHA-256 of a file. Raises OSError."""
    hasher = hashlib.sha256()
    with _opened(source) as file:
        while piece := file.read(_CHUNK):
            hasher.update(piece)
            advance(len(piece))
    return hasher.hexdigest()


def copy(source: Path | BinaryIO, target: Path, advance: Advance = lambda _: None) -> tuple[str, int]:
    """Copy a file, readable to its owner only, with holes where there are zeros; its SHA-256 and size. Raises
    OSError."""
    hasher, size = hashlib.sha256(), 0
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _opened(source) as file, target.open("xb", buffering=0) as made:
        target.chmod(0o600)
        while piece := file.read(_CHUNK):
            hasher.update(piece)
            size += len(piece)
            if piece.count(0) == len(piece):
                made.seek(len(piece), 1)
            else:
                rest = memoryview(piece)
                while rest:
                    rest = rest[made.write(rest) :]
            advance(len(piece))
        made.truncate(size)
    return hasher.hexdigest(), size


def _opened(source: Path | BinaryIO) -> BinaryIO:
    return source.open("rb", buffering=0) if isinstance(source, Path) else source


def sizes(directory: Path, paths: Iterable[str]) -> int:
    """The bytes of these files together; those that are missing count nothing."""
    total = 0
    for path in paths:
        try:
            total += (directory / path).stat().st_size
        except OSError:
            continue
    return total
