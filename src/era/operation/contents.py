"""What a data directory consists of: the content that its rows name, followed through trees of files.

The rows are read from an SQLite file in one transaction, so as they were at one moment. Each tree object is verified
before what it names is followed: a damaged one could name anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import create_engine, inspect, text

from era.errors import Conflict, NotFound
from era.store import place
from era.store.migrations import HEAD
from era.store.outputs import output_digests
from era.store.setups import package_sets
from era.store.versions import snapshot_roots

DATABASE = place.SQLITE
KEYS = ("link-key", "site-key", "webhook-key", "store-id")
"""Files of a data directory that are made once, and on which links, sites and an S3 store depend."""

STORE_ID = "store-id"
"""It is there if blobs are in S3."""

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

    def reaches(self, bad: set[str]) -> set[str]:
        """The trees and blobs from which one of these is reached, themselves included."""
        above: dict[str, list[str]] = {}
        for tree, names in self.below.items():
            for name in names:
                above.setdefault(name, []).append(tree)
        found, pending = set(bad), list(bad)
        while pending:
            for tree in above.get(pending.pop(), ()):
                if tree not in found:
                    found.add(tree)
                    pending.append(tree)
        return found


def check_rows_are_here(directory: Path) -> None:
    """Raises NotFound for what is no data directory, Conflict for one whose rows are in PostgreSQL."""
    if (directory / place.NOTE).exists():
        raise Conflict(
            f"The rows of {directory} are in {(directory / place.NOTE).read_text().strip()}, which this can't read.",
            hint="docs/postgresql.md says how to back up both: pg_dump first, then the directory.",
        )
    if not (directory / DATABASE).is_file():
        raise NotFound(f"There is no data directory {directory}.", hint="--data-dir names the server's ERA_DATA_DIR.")


def blob_path(digest: str) -> str:
    """Where a blob lies in a data directory, and in a backup."""
    return f"blobs/{digest[:2]}/{digest}"


def databases(directory: Path) -> Iterator[str]:
    """The paths of programs' SQL databases, in a data directory."""
    for file in sorted((directory / SQL).glob("*/*.sqlite")):
        yield str(file.relative_to(directory))


def named(database: Path) -> Named:
    """What the rows of this database name. Raises Conflict where it isn't of this version of ERA."""
    engine = create_engine(f"sqlite:///{database}", hide_parameters=True)
    try:
        with engine.connect() as connection:
            revision = None
            if inspect(connection).has_table("alembic_version"):
                revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            if revision != HEAD:
                raise Conflict(
                    f"The database is of another version of ERA (its revision is {revision}, not {HEAD}).",
                    hint="Use that version's command; or start this version's server on it once, which brings it up.",
                )
            blobs = {*output_digests(connection), *package_sets(connection)}
            return Named(frozenset(snapshot_roots(connection)), frozenset(each for each in blobs if each))
    finally:
        engine.dispose()


def walk(names: Named, directory: Path) -> Walk:
    """Follow trees from their roots to all that rows need. Reads every tree object."""
    found = Walk(set(names.roots | names.blobs))
    pending = list(names.roots)
    while pending:
        tree = pending.pop()
        if tree in found.below:
            continue
        try:
            files, trees = _tree(directory, tree)
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


def _tree(directory: Path, digest: str) -> tuple[list[str], list[str]]:
    """The digests of the files and directories that a tree object names. Raises OSError, ValueError for a damaged
    one."""
    content = (directory / blob_path(digest)).read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError("has other content than its name says")
    files: list[str] = []
    trees: list[str] = []
    try:
        for kind, _, *rest in json.loads(content):
            if kind in ("file", "dir"):
                if not DIGEST.fullmatch(rest[0]):
                    raise ValueError
                (files if kind == "file" else trees).append(rest[0])
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError("is no list of a directory") from None
    return files, trees


def digest_of(path: Path, advance: Advance = lambda _: None) -> str:
    """The SHA-256 of a file. Raises OSError."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            hasher.update(piece)
            advance(len(piece))
    return hasher.hexdigest()


def copy(source: Path, target: Path, advance: Advance = lambda _: None) -> tuple[str, int]:
    """Copy a file, readable to its owner only, with holes where there are zeros; its SHA-256 and size. Raises
    OSError."""
    hasher, size = hashlib.sha256(), 0
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with source.open("rb", buffering=0) as file, target.open("xb", buffering=0) as made:
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


def sizes(directory: Path, paths: Iterable[str]) -> int:
    """The bytes of these files together; those that are missing count nothing."""
    total = 0
    for path in paths:
        try:
            total += (directory / path).stat().st_size
        except OSError:
            continue
    return total
