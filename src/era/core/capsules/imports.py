"""Imports: a capsule is checked and becomes a session.

Theory of operation. The archive is first stored in a temporary file. Then all of it is checked there: the layout of the
archive, capsule.json, every tree object, and that the objects which these need are exactly the ones that are there.
Only then are the objects put into the blob store, where each must turn out to have the digest that it is named by. At
last session, versions and runs are made; they are invisible until they are complete. So a capsule that is refused
leaves nothing behind. One whose import is cut short by a crash may leave rows and blobs that nothing names, which are
cleared away in time.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence, Set
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from era.core.capsules import format as layout
from era.core.capsules import tars
from era.core.capsules.format import DocumentReader, kept_outputs
from era.core.capsules.manifest import MAX_OBJECTS, bad_capsule, too_large
from era.core.capsules.tars import Entry
from era.core.capsules.trees import Objects, TreeCheck
from era.core.concurrency.tasks import free_on, to_its_end
from era.core.metadata import MetadataStore, Retention
from era.core.models import CHECKPOINTS, KeptRun, KeptVersion, OwnedId, Session, Snapshot, VersionContent
from era.core.program import STREAMS
from era.core.runs.outputs import INLINE_BYTES
from era.core.sessions.versions import HistoryBound
from era.core.totals import Bounds
from era.core.trees.blob_store import BlobStore
from era.errors import BadRequest, Unavailable

_MAX_README_BYTES = 64 << 10
_SPOOLED_AT_ONCE = 1 << 20
_CHUNK = 1 << 20
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(slots=True)
class Capsule:
    """A checked capsule, whose archive is open as `fd`."""

    fd: int
    document: DocumentReader
    session: Session
    objects: dict[str, Entry]
    """Where each object lies in the archive, by digest."""

    blobs: set[str]
    """The objects that belong into the blob store; the others are outputs that are short enough for a row."""

    run_count: int

    def runs(self, retention: Retention) -> Iterator[KeptRun]:
        """Those runs, and outputs of them, that this server keeps: the newest. Oldest first."""
        for left, (record, outputs) in zip(range(self.run_count, 0, -1), self.document.runs(), strict=True):
            if left <= retention.runs:
                shown = outputs if left <= retention.outputs else None
                yield record, None if shown is None else kept_outputs(shown, self._short)

    def _short(self, digest: str) -> bytes | None:
        """The content of a short output; None for one that is a blob."""
        entry = self.objects[digest]
        return None if entry.size > INLINE_BYTES else _read(self.fd, entry)


class Importer:
    """Makes sessions of capsules. `directory` is for temporary files; `max_timeout` is the server's, in seconds."""

    def __init__(
        self,
        store: MetadataStore,
        blobs: BlobStore,
        threads: Executor,
        directory: Path,
        *,
        bounds: Bounds,
        max_timeout: float,
        history: HistoryBound | None = None,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._threads = threads
        self._directory = directory
        self._bounds = bounds
        self._max_timeout = max_timeout
        self._history = history

    async def load(self, chunks: AsyncIterator[bytes], caller: OwnedId, new_id: str | None, *, public: bool) -> Session:
        """Make the session that an archive holds, for the caller's owner, under `new_id` or else the id that it had.
        Only with `public` it may be called by anybody, if it says so itself.

        Of older versions, only those are made that the session's history has room for.

        Raises BadRequest or TooLarge for a capsule that can't be accepted, Conflict where the id is taken, Unavailable
        where the disk fails. Then nothing is made.
        """
        try:
            async with AsyncExitStack() as stack:
                spool = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115  closed on a thread
                stack.push_async_callback(free_on, self._threads, spool.close)
                await self._spool(chunks, spool.fileno())
                stack.enter_context(self._blobs.naming())
                capsule = await self._on_thread(self._prepared, spool.fileno())
                session = replace(
                    capsule.session,
                    owner=caller.owner,
                    id=new_id or capsule.session.id,
                    # Or whoever made the capsule could have its code run with this owner's storage, by calling it.
                    allow_public=public and capsule.session.allow_public,
                )
                kept = await self._kept(session, capsule.document)
                versions = (each for each in capsule.document.versions() if each.version.n in kept)
                return await self._store.load(session, versions, capsule.runs(self._store.retention), caller.key_id)
        except OSError as error:
            raise Unavailable(f"The capsule could not be kept: {error.strerror}.") from error

    async def _kept(self, session: Session, document: DocumentReader) -> Set[int]:
        """The numbers of the versions that this server keeps and the session's history has room for. Raises TooLarge
        for names beyond that."""
        kept = await self._on_thread(_kept_versions, self._store.retention, document.versions())
        left_out: Sequence[int] = ()
        if self._history is not None:
            older = [version for version in kept if version.n != session.version or version.named]
            left_out = await self._history.not_imported(session, older)
        return {version.n for version in kept}.difference(left_out)

    async def _spool(self, chunks: AsyncIterator[bytes], fd: int) -> None:
        """Write the archive into a file, in large pieces."""
        waiting = bytearray()
        async for chunk in chunks:
            waiting += chunk
            if len(waiting) >= _SPOOLED_AT_ONCE:
                await self._on_thread(_write, fd, bytes(waiting))
                waiting.clear()
        await self._on_thread(_write, fd, bytes(waiting))

    async def _on_thread[T](self, job: Callable[..., T], *arguments: Any) -> T:
        """Run a job that uses the archive's file. It has ended before that is closed, also where this is cancelled: its
        descriptor may be another file's then."""
        return await to_its_end(asyncio.get_running_loop().run_in_executor(self._threads, job, *arguments))

    def _prepared(self, fd: int) -> Capsule:
        """Check the capsule, and put its objects into the blob store, all or none. Raises BadRequest, TooLarge."""
        capsule = check(fd, self._bounds)
        if capsule.session.default_timeout > self._max_timeout:
            raise BadRequest(
                f"The session's default_timeout is {capsule.session.default_timeout:g} seconds, at most "
                f"{self._max_timeout:g} are allowed.",
                hint="The server's ERA_MAX_TIMEOUT sets the bound.",
            )
        with self._blobs.batch() as batch:
            for digest in capsule.blobs:
                entry = capsule.objects[digest]
                os.lseek(fd, entry.offset, os.SEEK_SET)
                if batch.put_file(fd, entry.size) != digest:
                    raise _damaged(digest)  # this undoes the batch
        return capsule


def _kept_versions(retention: Retention, contents: Iterator[VersionContent]) -> Set[KeptVersion]:
    """Those versions that this server keeps: the newest, the newest checkpoints, and what has a name."""
    newest = deque[KeptVersion](maxlen=retention.versions), deque[KeptVersion](maxlen=retention.checkpoints)
    named = set()
    for version in (content.version for content in contents):
        each = KeptVersion(version.n, version.snapshot.root, version.name is not None, version.cause in CHECKPOINTS)
        newest[each.is_checkpoint].append(each)
        if each.named:
            named.add(each)
    return named.union(*newest)


def check(fd: int, bounds: Bounds) -> Capsule:
    """The capsule in the archive open as `fd`, completely checked except for the content of blobs.

    Raises BadRequest or TooLarge.
    """
    try:
        document, objects = _layout(fd)
    except tars.TarProblem as problem:
        raise bad_capsule(f"can't be read as a tar: it {problem}") from None

    def entry(digest: str) -> Entry:
        if digest not in objects:
            raise bad_capsule(f"lacks object {digest}")
        return objects[digest]

    trees = TreeCheck(Objects(lambda digest: _read(fd, entry(digest)), lambda digest: entry(digest).size), bounds)
    reader = DocumentReader(fd, document, trees.snapshot)
    session = reader.session()
    blobs, short, run_count = trees.needed, set[str](), 0
    for record, outputs in reader.runs():
        run_count += 1
        for stream in STREAMS if outputs else ():
            digest = getattr(outputs, stream)
            if entry(digest).size != getattr(record, f"{stream}_bytes"):
                raise bad_capsule(f"has a run whose {stream} is not as long as its record says")
            (blobs if entry(digest).size > INLINE_BYTES else short).add(digest)
    for digest in short:
        if hashlib.sha256(_read(fd, entry(digest))).hexdigest() != digest:
            raise _damaged(digest)
    if unused := objects.keys() - blobs - short:
        raise bad_capsule(f"has an object that nothing in it needs: {min(unused)}")
    return Capsule(fd, reader, session, objects, blobs, run_count)


def _layout(fd: int) -> tuple[Entry, dict[str, Entry]]:
    """Where capsule.json and the objects lie in an archive, whose layout is checked.

    Raises TarProblem, BadRequest, TooLarge.
    """
    entries = tars.entries(fd)
    document = _next(entries, layout.DOCUMENT)
    DocumentReader(fd, document, _no_snapshot).check_format()
    readme = _next(entries, layout.README)
    sums = _next(entries, layout.SUMS)
    if readme.size > _MAX_README_BYTES or _read(fd, sums, _CHUNK) != layout.sums(
        _digest(fd, document), _read(fd, readme)
    ):
        raise bad_capsule(
            f"has a {layout.DOCUMENT} or {layout.README} other than {layout.SUMS} says: it is damaged, or was edited"
        )
    objects: dict[str, Entry] = {}
    last = ""
    for entry in entries:
        kind, digest = entry.name[: len(layout.OBJECTS)], entry.name[len(layout.OBJECTS) :]
        if kind != layout.OBJECTS or not _DIGEST.fullmatch(digest):
            raise bad_capsule(f"has a file that no capsule has: {entry.name!r}")
        if digest <= last:
            raise bad_capsule(f"has its objects out of order, or one twice: {digest}")
        if len(objects) == MAX_OBJECTS:
            raise too_large(f"has more than {MAX_OBJECTS} objects")
        objects[digest] = entry
        last = digest
    return document, objects


def _next(entries: Iterator[Entry], name: str) -> Entry:
    """The next file of an archive, which must have this name. Raises BadRequest."""
    entry = next(entries, None)
    if entry is None or entry.name != name:
        found = "nothing" if entry is None else repr(entry.name)
        raise bad_capsule(f"has {found} where {name} belongs")
    return entry


def _no_snapshot(root: str) -> Snapshot:
    """Stands in for TreeCheck.snapshot where only the format number is read."""
    raise AssertionError(root)


def _damaged(digest: str) -> BadRequest:
    return bad_capsule(f"is damaged: object {digest} has other content")


def _read(fd: int, entry: Entry, most: int | None = None) -> bytes:
    """The content of a file in an archive, or its first `most` bytes."""
    size = entry.size if most is None else min(entry.size, most)
    pieces = []
    offset = entry.offset
    while size > 0 and (piece := os.pread(fd, size, offset)):
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return b"".join(pieces)


def _digest(fd: int, entry: Entry) -> str:
    hasher = hashlib.sha256()
    end = entry.offset + entry.size
    for offset in range(entry.offset, end, _CHUNK):
        hasher.update(os.pread(fd, min(_CHUNK, end - offset), offset))
    return hasher.hexdigest()


def _write(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
