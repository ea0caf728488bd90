"""Whole trees in and out of a session, as archives.

An archive that comes in is a file of ours before it is looked at. It is then read once from front to end, and what it
holds goes into one batch of the blob store. Whatever is wrong with it ends that batch, and nothing has happened; the
session is only touched by the one edit that follows.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from era.core.expiry import calling
from era.core.files import pack, trees, unpack
from era.core.files.edits import Changes, PutFile, PutLink, shown, walk
from era.core.files.paths import Parts, name_problem, state_file
from era.core.files.session_files import SessionFiles
from era.core.files.snapshots import BlobStore, Snapshots
from era.core.files.spool import Slots, Spool, Threads
from era.core.files.trees import BlobBatch, Bounds
from era.core.files.unpack import BadArchive, Format, Member
from era.core.files.unzip import zip_members
from era.core.metadata import MetadataStore
from era.core.models import EMPTY, STATE_FILE, OwnedId, Session
from era.core.turns import Turns
from era.errors import Conflict, TooLarge, Unavailable

_AT_A_TIME = 2
"""Archives that are unpacked at a time: it takes a thread and a processor for as long as it lasts."""

_RELY_SECONDS = 600.0
"""Content put this long ago is put once more before a row names it, lest it be swept."""

_IN_ONE_PUT = 1 << 20


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What an archive changes, its content being in the blob store, and how many files and links it has."""

    changes: Changes
    files: int


class Archives:
    def __init__(
        self,
        store: MetadataStore,
        snapshots: Snapshots,
        blobs: BlobStore,
        turns: Turns,
        spool: Spool,
        threads: Threads,
        files: SessionFiles,
        slots: Slots,
    ) -> None:
        self._store = store
        self._snapshots = snapshots
        self._blobs = blobs
        self._turns = turns
        self._spool = spool
        self._threads = threads
        self._files = files
        self._slots = slots
        self._unpacking = asyncio.Semaphore(_AT_A_TIME)

    async def get(self, session_id: OwnedId, form: Format) -> AsyncIterator[bytes]:
        """The session's tree. The pieces come from one snapshot, whatever happens meanwhile.

        Raises Conflict where this form can't hold it; an OSError on the way is one of the disk.
        """
        session = await self._store.session(session_id)
        root, made_at = session.snapshot.root, session.updated_at // 1_000_000
        read, open_blob = self._snapshots.read_tree, self._blobs.open_blob
        if form == "zip":
            try:
                await self._threads(self._check_names, root)
            except OSError as error:
                raise Unavailable(f"The session's files could not be read: {error.strerror}.") from error
            pieces = pack.zip_pieces(read, open_blob, root, made_at)
        else:
            pieces = pack.tar_pieces(read, open_blob, root, made_at)
            if form == "tar.gz":
                pieces = pack.gzip_pieces(pieces)
        return self._on_threads(pack.gathered(pieces))

    async def put(
        self, session_id: OwnedId, pieces: AsyncIterator[bytes], said: Format | None, *, replace: bool
    ) -> tuple[int, Session]:
        """Add what an archive holds to the session's tree, or put it in its place; how many files that were.

        All of it is durable when this returns, or nothing has changed. Raises BadArchive, TooLarge, Conflict,
        TooManyUploads.
        """
        session = await self._files.changeable(session_id)
        async with (
            calling(self._store, session),
            self._spool.received(pieces, self._threads, small=0) as upload,
        ):
            with trees.closing(os.open(upload.path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
                with self._slots.one():
                    unpacked = await self._unpack(fd, said, self._files.bounds(session))
                put_at = time.monotonic()
                async with self._turns.take(session_id):
                    session = await self._files.changeable(session_id, session.key)
                    if time.monotonic() - put_at > _RELY_SECONDS:
                        await self._unpack(fd, said, self._files.bounds(session))
                    base = EMPTY if replace else session.snapshot
                    snapshot = await self._snapshots.edit(
                        base, unpacked.changes, lambda _: None, self._files.bounds(session)
                    )
                    session = await self._store.commit(
                        session_id, "files", data=None, snapshot=snapshot, key=session.key
                    )
        return unpacked.files, session

    async def _unpack(self, fd: int, said: Format | None, bounds: Bounds) -> Unpacked:
        async with self._unpacking:
            return await self._threads(self._unpack_now, fd, said, bounds)

    def _unpack_now(self, fd: int, said: Format | None, bounds: Bounds) -> Unpacked:
        members = _members(fd, said)
        try:
            with self._blobs.batch() as batch:
                return _Unpacking(bounds, self._spool, batch).all_of(members)
        except OSError as error:
            raise Unavailable(f"The archive could not be unpacked: {error.strerror}.") from error

    def _check_names(self, root: str | None) -> None:
        for path, entry in walk(self._snapshots.read_tree, root):
            try:
                path[-1].encode()
                if entry[0] == "link":
                    entry[2].encode()
            except UnicodeEncodeError:
                raise Conflict(
                    f"'{shown(path)}' has a name or points to one that is not UTF-8: zip can't hold it.",
                    hint="Ask for ?format=tar.",
                    code="unsuitable_name",
                ) from None

    async def _on_threads(self, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        while piece := await self._threads(next, pieces, b""):
            yield piece


def _members(fd: int, said: Format | None) -> Iterator[Member]:
    form = unpack.format_of(fd)
    if form is None:
        raise BadArchive("The body is no tar, tar.gz or zip archive.")
    if said not in (None, form):
        raise BadArchive(f"The body is {form}, but its Content-Type says {said}.")
    if form == "zip":
        return zip_members(fd)
    source = unpack.PlainSource(fd) if form == "tar" else unpack.GzipSource(fd)
    return unpack.tar_members(source)


class _Unpacking:
    """One archive on its way into a batch."""

    def __init__(self, bounds: Bounds, spool: Spool, batch: BlobBatch) -> None:
        self._bounds = bounds
        self._spool = spool
        self._batch = batch
        self._changes = Changes()
        self._members = self._files = self._bytes = 0

    def all_of(self, members: Iterator[Member]) -> Unpacked:
        for member in members:
            self._count(member)
            path = _path(member.name)
            if len(path) > self._bounds.depth + (member.kind != "dir"):
                raise TooLarge(f"'{shown(path)}' is in more than {self._bounds.depth} directories.")
            if path:
                self._add(path, member)
            elif member.kind != "dir":
                raise BadArchive("The archive has a file or link without a name.")
        return Unpacked(self._changes, self._files)

    def _count(self, member: Member) -> None:
        self._members += 1
        self._files += member.kind != "dir"
        self._bytes += member.size
        if self._members > self._bounds.entries:
            raise TooLarge(f"The archive has more than {self._bounds.entries} files and directories.")
        if self._bytes > self._bounds.total_bytes:
            raise TooLarge(f"The archive holds more than {self._bounds.total_bytes} bytes when it is unpacked.")

    def _add(self, path: Parts, member: Member) -> None:
        if member.kind == "dir":
            self._changes.at_directory(path, member.mode)
        elif member.kind == "link":
            if unpack.link_leads_out(len(path) - 1, member.target):
                raise BadArchive(f"The archive's link '{shown(path)}' leads out of it, or might.")
            self._changes.at(path, PutLink(member.target, member.mtime_ns))
        else:
            self._changes.at(path, self._file(member))

    def _file(self, member: Member) -> PutFile:
        if member.size <= _IN_ONE_PUT:
            digest = self._batch.put(b"".join(member.content()))
        else:
            with self._spool.stored(member.content()) as upload:
                upload.put(self._batch)
                digest = upload.digest
        return PutFile(digest, member.size, member.mtime_ns, member.mode)


def _path(name: str) -> Parts:
    """The path of a member; the top itself has no parts. Raises BadRequest."""
    parts = tuple(name.removesuffix("/").split("/"))
    if parts and parts[0] == ".":
        parts = parts[1:]
    for part in parts:
        if problem := name_problem(part):
            raise BadArchive(f"The archive's name '{shown(parts)}' {problem}.")
    if parts == (STATE_FILE,):
        raise state_file()
    return parts
