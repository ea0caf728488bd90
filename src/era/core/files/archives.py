"""A session's whole tree of files, downloaded and uploaded as an archive.

An upload is first stored in a temporary file. It is then read once from front to end, and its content goes into one
batch of the blob store. If anything is wrong with it, the batch is undone and nothing has happened; the session is only
changed by the single edit that follows.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from weakref import finalize

from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.tasks import Threads
from era.core.concurrency.turns import Turns
from era.core.files.session_files import PATIENCE, Body, SessionFiles
from era.core.metadata import MetadataStore
from era.core.models import STATE_FILE, OwnedId, Session
from era.core.sessions.expiry import calling
from era.core.totals import Bounds, link_totals
from era.core.trees import pack, trees, unpack
from era.core.trees.blob_store import BlobBatch, BlobStore
from era.core.trees.edits import Changes, PutFile, PutLink, display_path, walk
from era.core.trees.paths import Parts, name_problem, state_file
from era.core.trees.pins import Pins
from era.core.trees.snapshots import SHORT_GRACE_SECONDS, Snapshots
from era.core.trees.spool import Spool
from era.core.trees.tree_objects import name_bytes
from era.core.trees.unpack import BadArchive, Format, Member, zip_members
from era.errors import Conflict, TooLarge, TooManyUploads, Unavailable

_AT_A_TIME = 2
"""How many archives are unpacked at a time: each takes a thread and a processor for as long as it lasts. Of an owner's
it is one."""

_MOST_WAITING = 8
"""Archives of an owner that are unpacked or wait for that."""

_RELY_SECONDS = SHORT_GRACE_SECONDS / 2
"""Content that was put longer ago than this is put again before a row names it: it may be swept as garbage by then. By
the clock that a sweep goes by, which may be set, and goes on while the machine sleeps."""

_HEADER_BYTES = 8 << 10
"""What a member of a tar archive may have beside its content, on the average: its header, a long name, attributes."""

_TARGET_BYTES = 4095
"""Linux makes no longer link."""

_IN_ONE_PUT = 1 << 20
"""Members of up to this many bytes are read into memory; larger ones go through a temporary file."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The changes that an archive makes, whose content is in the blob store, and its number of files and links."""

    changes: Changes
    files: int


class Archives:
    """Reads and replaces trees of sessions."""

    def __init__(
        self,
        store: MetadataStore,
        snapshots: Snapshots,
        blobs: BlobStore,
        turns: Turns,
        spool: Spool,
        threads: Threads,
        files: SessionFiles,
        pins: Pins,
    ) -> None:
        self._pins = pins
        self._store = store
        self._snapshots = snapshots
        self._blobs = blobs
        self._turns = turns
        self._spool = spool
        self._threads = threads
        self._files = files
        self._unpacking = FairLimiter(_AT_A_TIME, of_owner=1)
        self._waiting: Counter[str] = Counter()
        """By owner, archives that have been received and not been unpacked."""

    async def get(self, session_id: OwnedId, form: Format, version: int | None = None) -> AsyncIterator[bytes]:
        """The tree of a version, of the current one if it is None, as an archive, in pieces. All of them come from one
        snapshot, whatever happens meanwhile.

        Raises Conflict where this format can't hold the tree, Unavailable where the disk fails; while the pieces are
        read, OSError.
        """
        async with self._pins.pinning() as pin:
            snapshot, at = await self._files.snapshot(session_id, version)
            root, made_at = snapshot.root, at // 1_000_000
            pin.roots.update(filter(None, [root]))
        read, open_blob = self._snapshots.read_tree, self._blobs.open_blob
        try:
            if form == "zip":
                await self._threads.in_turn(session_id.owner, self._check_names, root, session=session_id)
                pieces = pack.zip_pieces(read, open_blob, root, made_at)
            else:
                pieces = pack.tar_pieces(read, open_blob, root, made_at)
                if form == "tar.gz":
                    pieces = pack.gzip_pieces(pieces)
            archive = self._on_threads(session_id, pack.larger_pieces(pieces))
        except BaseException as error:
            self._pins.release(pin)
            if isinstance(error, OSError):
                raise Unavailable(f"The session's files could not be read: {error.strerror}.") from error
            raise
        finalize(archive, self._pins.release, pin)  # also where nobody has read a piece
        return archive

    async def put(
        self,
        session_id: OwnedId,
        body: Body,
        declared: Format | None,
        *,
        replace: bool,
        patience: float = PATIENCE,
    ) -> tuple[int, Session, int]:
        """Add an archive's content to the session's tree, or replace the tree by it.

        `body` is the archive, `declared` is the format that the client says it has, if any. Returns the number of
        files and links in it, the session, and how many old versions that dropped. All of it is durable when this
        returns, or nothing has changed. Raises BadArchive, TooLarge, Conflict, TooManyUploads, Unavailable, and
        RunUnderWay as SessionFiles.put_received does.
        """
        session = await self._files.writable_session(session_id)
        if patience == 0:
            self._turns.check_free(session_id)
        async with (
            calling(self._store, session),
            self._spool.receive(body(session), session.owner, self._threads, small=0) as upload,
        ):
            with trees.closing(os.open(upload.path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
                unpacked, put_at = await self._unpack_in_turn(fd, declared, session)
                async with self._turns.take(session_id, patience=patience):
                    session = await self._files.writable_session(session_id, session.key)
                    with self._blobs.naming():
                        if time.time() - put_at > _RELY_SECONDS:
                            await self._unpack(fd, declared, session)
                        snapshot = await self._snapshots.edit(
                            session.snapshot,
                            unpacked.changes,
                            lambda _: None,
                            self._files.bounds(session),
                            session.owned_id,
                            replace=replace,
                        )
                        session, dropped = await self._files.commit(session, snapshot)
        return unpacked.files, session, dropped

    async def _unpack_in_turn(self, fd: int, declared: Format | None, session: Session) -> tuple[Unpacked, float]:
        """Unpack an archive, as soon as its owner has no other that is unpacked. Raises as `_unpack_now`, and
        TooManyUploads where too many of his wait: each has its content on the disk."""
        if self._waiting[session.owner] >= _MOST_WAITING:
            raise TooManyUploads(
                f"{_MOST_WAITING} archives of yours are about to be unpacked already.",
                hint="Send it again when fewer are.",
            )
        self._waiting[session.owner] += 1
        try:
            async with self._unpacking.slot(session.owner, session.owned_id):
                return await self._unpack(fd, declared, session)
        finally:
            self._waiting[session.owner] -= 1
            if not self._waiting[session.owner]:
                del self._waiting[session.owner]

    async def _unpack(self, fd: int, declared: Format | None, session: Session) -> tuple[Unpacked, float]:
        return await self._threads(self._unpack_now, fd, declared, self._files.bounds(session))

    def _unpack_now(self, fd: int, declared: Format | None, bounds: Bounds) -> tuple[Unpacked, float]:
        """Unpack an archive, on a thread. Also returns when all was unpacked, in seconds since 1970: before new content
        gets its time, by which it may be swept. Raises BadArchive, TooLarge, Unavailable."""
        members = _members(fd, declared, bounds)
        try:
            with self._blobs.batch() as batch:
                return _Unpacker(bounds, self._spool, batch).unpack(members), time.time()
        except OSError as error:
            raise Unavailable(f"The archive could not be unpacked: {error.strerror}.") from error

    def _check_names(self, root: str | None) -> None:
        """Raises Conflict where a name or link target isn't UTF-8, which zip can't express, or a name has a backslash,
        which readers of zip, this one too, take for an attack."""
        for path, entry in walk(self._snapshots.read_tree, root):
            try:
                path[-1].encode()
                if entry[0] == "link":
                    entry[2].encode()
            except UnicodeEncodeError:
                raise _unsuitable(path, "a name or points to one that is not UTF-8") from None
            if "\\" in path[-1]:
                raise _unsuitable(path, "a backslash in its name")

    async def _on_threads(self, session_id: OwnedId, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        """`pieces`, each made on a thread."""
        while piece := await self._threads.in_turn(session_id.owner, next, pieces, b"", session=session_id):
            yield piece


def _members(fd: int, declared: Format | None, bounds: Bounds) -> Iterator[Member]:
    """The members of an archive of any format. Raises BadArchive for none, and for another than the declared one;
    TooLarge for one with far more than its members' content, which would take hours to read."""
    form = unpack.format_of(fd)
    if form is None:
        raise BadArchive("The body is no tar, tar.gz or zip archive.")
    if declared not in (None, form):
        raise BadArchive(f"The body is {form}, but its Content-Type says {declared}.")
    if form == "zip":
        return zip_members(fd)
    source = unpack.PlainSource(fd) if form == "tar" else unpack.GzipSource(fd)
    most = bounds.total_bytes + bounds.entries * _HEADER_BYTES + unpack.MAX_TRAILER
    return unpack.tar_members(_Bounded(source, most))


def _unsuitable(path: Parts, what: str) -> Conflict:
    return Conflict(
        f"'{display_path(path)}' has {what}: zip can't hold it.", hint="Ask for ?format=tar.", code="unsuitable_name"
    )


class _Bounded:
    """A source of at most so many bytes. Raises TooLarge beyond."""

    def __init__(self, source: unpack.Source, most: int) -> None:
        self._source = source
        self._most = self._left = most

    def read(self, size: int) -> bytes:
        piece = self._source.read(size)
        self._left -= len(piece)
        if self._left < 0:
            raise TooLarge(f"The archive has more than {self._most} bytes, with the headers of its members.")
        return piece


class _Unpacker:
    """Puts the content of one archive into a batch of the blob store, and collects the changes."""

    def __init__(self, bounds: Bounds, spool: Spool, batch: BlobBatch) -> None:
        self._bounds = bounds
        self._spool = spool
        self._batch = batch
        self._changes = Changes()
        self._members = self._entries = self._files = self._bytes = 0

    def unpack(self, members: Iterator[Member]) -> Unpacked:
        """Unpack all members. Raises BadArchive, and TooLarge beyond the bounds."""
        for member in members:
            self._count(member)
            path = _path(member.name)
            if len(path) > self._bounds.depth + (member.kind != "dir"):
                raise TooLarge(f"'{display_path(path)}' is in more than {self._bounds.depth} directories.")
            if path:
                self._add(path, member)
            elif member.kind != "dir":
                raise BadArchive("The archive has a file or link without a name.")
        return Unpacked(self._changes, self._files)

    def _count(self, member: Member) -> None:
        """Count a member before its content is read. Raises TooLarge."""
        self._members += 1
        self._files += member.kind != "dir"
        self._bytes += member.size
        self._check_entries(self._members)
        if self._bytes > self._bounds.total_bytes:
            raise TooLarge(f"The archive holds more than {self._bounds.total_bytes} bytes when it is unpacked.")

    def _check_entries(self, count: int) -> None:
        if count > self._bounds.entries:
            raise TooLarge(f"The archive has more than {self._bounds.entries} files and directories.")

    def _add(self, path: Parts, member: Member) -> None:
        """Add the change that a member makes. Raises BadRequest for a member that can't be unpacked, and TooLarge where
        there are too many entries with the directories that no member names."""
        if member.kind == "dir":
            self._entries += self._changes.add_directory(path, member.mode)
        elif member.kind == "link":
            if unpack.link_leads_out(len(path) - 1, member.target):
                raise BadArchive(f"The archive's link '{display_path(path)}' leads out of it, or might.")
            size = len(name_bytes(member.target))
            if size > _TARGET_BYTES:
                raise BadArchive(f"The archive's link '{display_path(path)}' has more than {_TARGET_BYTES} bytes.")
            self._entries += self._changes.add(path, PutLink(member.target, member.mtime_ns))
            self._entries += link_totals(size).entries - 1
        else:
            self._entries += self._changes.add(path, self._file(member))
        self._check_entries(self._entries)

    def _file(self, member: Member) -> PutFile:
        """Put the content of a file into the batch."""
        if member.size <= _IN_ONE_PUT:
            digest = self._batch.put(b"".join(member.content()))
        else:
            with self._spool.store(member.content()) as upload:
                upload.put(self._batch)
                digest = upload.digest
        return PutFile(digest, member.size, member.mtime_ns, member.mode)


def _path(name: str) -> Parts:
    """The path of a member, empty for the archive's top directory. Raises BadRequest for one that can't be used."""
    parts = tuple(name.removesuffix("/").split("/"))
    if parts and parts[0] == ".":
        parts = parts[1:]
    for part in parts:
        if problem := name_problem(part):
            raise BadArchive(f"The archive's name '{display_path(parts)}' {problem}.")
    if parts[:1] == (STATE_FILE,):
        raise state_file()
    return parts
