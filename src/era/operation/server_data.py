"""Where a server keeps what it has: its data directory, and the database and the bucket that have its rows and content,
if that hasn't.

What it consists of is the content that rows name, followed through trees of files. The rows are read in one
transaction, so as they were at one moment. Each tree object is verified before what it names is followed: a damaged one
could name anything.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, Protocol

from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import SQLAlchemyError

from era.core.trees.durable import sync
from era.errors import Conflict, EraError, NotFound, Unavailable
from era.store import place
from era.store.blobs.s3_blobs import S3Blobs, installation
from era.store.engine import dialects
from era.store.migrations import HEAD, refuse_old, revision_of
from era.store.outputs import OUTPUT_DIGESTS
from era.store.setups import PACKAGE_SETS
from era.store.versions import SNAPSHOT_ROOTS

STORE_ID = "store-id"
"""The file of a data directory, or of what a cluster's hosts share, that is there if content is in S3: the id by which
the bucket knows its installation."""

ASIDE = "damaged"
"""The directory of a data directory that damaged content is moved to."""

_CACHE_BYTES = 256 << 20
_AHEAD = 64
_SMALL = 1 << 20


def blob_path(digest: str) -> str:
    """Where a blob lies in a data directory, and in a backup."""
    return f"blobs/{digest[:2]}/{digest}"


class Content(Protocol):
    """The blobs of a server. All methods raise OSError."""

    def open(self, digest: str) -> BinaryIO:
        """What is stored under this digest, whether it has it or not. Raises FileNotFoundError, OSError with EBADMSG
        where it is known to be damaged."""
        ...

    def sizes(self, digests: Iterable[str]) -> Mapping[str, int]:
        """The bytes of those of these blobs that there are."""
        ...

    def expect(self, digests: Iterable[str]) -> Iterator[str]:
        """The same digests, about to be opened in this order."""
        ...

    def held_off(self) -> AbstractContextManager[None]:
        """Keep the server's collections of garbage off."""
        ...

    def put_aside(self, digest: str, directory: Path) -> None:
        """Move damaged content into this directory."""
        ...

    def put(self, file: Path, digest: str) -> None:
        """Store a file, which has this digest, for good."""
        ...


class LocalContent:
    """Blobs in a data directory, or in a backup."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, digest: str) -> BinaryIO:
        return (self._directory / blob_path(digest)).open("rb", buffering=0)

    def sizes(self, digests: Iterable[str]) -> Mapping[str, int]:
        found = {}
        for digest in digests:
            with suppress(OSError):
                found[digest] = (self._directory / blob_path(digest)).stat().st_size
        return found

    def expect(self, digests: Iterable[str]) -> Iterator[str]:
        return iter(digests)

    @contextmanager
    def held_off(self) -> Iterator[None]:
        """Shares the lock that a collection needs for itself; waits for one that is under way."""
        (self._directory / "blobs").mkdir(mode=0o700, exist_ok=True)
        lock = os.open(self._directory / "blobs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield
        finally:
            os.close(lock)

    def put_aside(self, digest: str, directory: Path) -> None:
        there = self._directory / blob_path(digest)
        there.rename(directory / digest)
        sync(directory)
        sync(there.parent)

    def put(self, file: Path, digest: str) -> None:
        there = self._directory / blob_path(digest)
        sync(file)
        there.parent.mkdir(mode=0o700, exist_ok=True)
        sync(there.parent.parent)
        file.rename(there)
        sync(there.parent)


class S3Content:
    """Blobs in a bucket."""

    def __init__(self, blobs: S3Blobs) -> None:
        self._blobs = blobs
        self._sizes: Mapping[str, int] = {}

    def open(self, digest: str) -> BinaryIO:
        """Raises Unavailable where the bucket can't be read: that says nothing of its content."""
        try:
            return os.fdopen(self._blobs.open_blob(digest), "rb", buffering=0)
        except OSError as error:
            if error.errno == errno.EIO:
                raise Unavailable(f"The content can't be read: {error.strerror}.") from None
            raise

    def sizes(self, digests: Iterable[str]) -> Mapping[str, int]:
        self._sizes = self._blobs.sizes()
        return {digest: self._sizes[digest] for digest in digests if digest in self._sizes}

    def expect(self, digests: Iterable[str]) -> Iterator[str]:
        """Small ones are fetched several at a time; `sizes` must have been called."""
        waiting: list[str] = []
        for digest in digests:
            waiting.append(digest)
            if len(waiting) == _AHEAD:
                yield from self._fetched(waiting)
                waiting = []
        yield from self._fetched(waiting)

    def _fetched(self, digests: list[str]) -> list[str]:
        with suppress(OSError):  # who opens it is told
            self._blobs.expect(digest for digest in digests if self._sizes.get(digest, _SMALL) < _SMALL)
        return digests

    def held_off(self) -> AbstractContextManager[None]:
        return self._blobs.held_off()

    def put_aside(self, digest: str, directory: Path) -> None:
        self._blobs.take_out(digest, directory / digest)
        sync(directory / digest)

    def put(self, file: Path, digest: str) -> None:
        with self._blobs.batch() as batch:
            batch.put_spooled(str(file), digest)


def is_damaged(error: OSError) -> bool:
    """Whether an error says that content is there, but can't be what was stored."""
    return error.errno == errno.EBADMSG


@dataclass(frozen=True, slots=True)
class ServerData:
    """Where a server keeps what it has."""

    directory: Path
    database_url: str | None = None
    """Of PostgreSQL; None for the file in the directory."""

    blobs_url: str = ""
    """Of a prefix of a bucket; empty for the directory."""

    @property
    def database(self) -> Path:
        return self.directory / place.SQLITE

    @property
    def is_in_s3(self) -> bool:
        return (self.directory / STORE_ID).exists()

    def check_rows(self) -> None:
        """Raises NotFound where there is no such data directory, NotReady where its rows are in another database."""
        if not self.database.is_file() and not (self.directory / place.NOTE).is_file():
            raise NotFound(
                f"There is no data directory {self.directory}.", hint="--data-dir names the server's ERA_DATA_DIR."
            )
        place.rows_url(self.directory, self.database_url)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """The rows as of one moment. Raises NotFound and NotReady as `check_rows`, NotReady where they are of an older
        checkout, Conflict where they are of another version of ERA, Unavailable where the database fails."""
        self.check_rows()
        with reading(place.rows_url(self.directory, self.database_url)) as connection:
            yield connection

    @contextmanager
    def content(self) -> Iterator[Content]:
        """Raises Conflict where it is in a bucket that isn't named, or isn't this installation's; Unavailable."""
        if not self.is_in_s3:
            yield LocalContent(self.directory)
            return
        if not self.blobs_url:
            raise Conflict(
                f"The content of {self.directory} is in S3.",
                hint="Set ERA_BLOBS and AWS_… as for the server, or leave the content out with --without-content.",
            )
        with bucket(self.blobs_url, (self.directory / STORE_ID).read_text().strip()) as blobs:
            blobs.open(take=False)
            yield S3Content(blobs)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have a database of PostgreSQL for oneself. Raises NotReady where a server uses it."""
        if self.database_url is None:
            yield
            return
        writer = dialects.connect(self.database_url).writer
        try:
            dialects.check_server(writer)  # whose connection stays
            yield
        finally:
            writer.dispose()


@contextmanager
def bucket(url: str, owner: str) -> Iterator[S3Blobs]:
    """The blobs in a bucket, not opened yet, with a small cache of their own."""
    with TemporaryDirectory(prefix="era-content-") as cache:
        blobs = S3Blobs(url, Path(cache), cache_bytes=_CACHE_BYTES, owner=owner)
        try:
            yield blobs
        finally:
            blobs.close()


@contextmanager
def new_bucket(url: str, directory: Path) -> Iterator[S3Blobs]:
    """An empty prefix of a bucket, taken for the installation of this data directory; emptied again if the block
    raises. Raises Conflict where there is something, Unavailable."""
    with bucket(url, installation(directory / STORE_ID)) as blobs:
        if not _asked(blobs.is_empty):
            raise Conflict("There is something at ERA_BLOBS already.", hint="Name another prefix, or another bucket.")
        blobs.open()
        try:
            yield blobs
        except BaseException as error:
            try:
                blobs.remove_all()
            except OSError:
                tell_left(error, "ERA_BLOBS")
            raise


def tell_left(error: BaseException, where: str) -> None:
    """Raise the error that made a restore fail, anew, with the hint that this couldn't be undone."""
    if isinstance(error, Exception):
        message = error.message if isinstance(error, EraError) else str(error)
        hint = f"What was restored couldn't be removed again: empty what {where} names before you try it once more."
        raise Unavailable(message, hint=hint) from error


def _asked[T](question: Callable[[], T]) -> T:
    try:
        return question()
    except OSError as error:
        raise Unavailable(f"The blob store can't be used: {error.strerror}.") from None


@contextmanager
def reading(url: str) -> Iterator[Connection]:
    """The rows of a database as of one moment, if they are of this version of ERA. See `ServerData.reading`."""
    is_here = url.startswith("sqlite:")
    engine = create_engine(url, hide_parameters=True) if is_here else dialects.connect(url, alone=False).reader
    try:
        with telling():
            if not is_here:
                dialects.check_server(engine)
            with engine.connect() as connection, connection.begin():
                if is_here:
                    connection.exec_driver_sql("BEGIN")  # which the driver would leave out before reading
                _check_revision(connection)
                yield connection
    finally:
        engine.dispose()


@contextmanager
def telling() -> Iterator[None]:
    """Say what a database says in a line, as Unavailable."""
    try:
        yield
    except SQLAlchemyError as error:
        raise Unavailable(f"The database failed: {dialects.message(error)}") from error


def _check_revision(connection: Connection) -> None:
    revision = revision_of(connection)
    refuse_old(revision)
    if revision != HEAD:
        raise Conflict(
            f"The database is of another version of ERA (its revision is {revision}, not {HEAD}).",
            hint="Use that version's command; or start this version's server on it once, which brings it up.",
        )


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
