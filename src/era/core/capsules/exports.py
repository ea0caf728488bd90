"""Exports: a session is written as a capsule.

Theory of operation. One read transaction gives session, versions and runs as they were at one moment. They go to a
temporary file while they are read, since there may be many. So does output that is short enough to lie in a row.
Everything else is immutable content, pinned (see pins.py) until the client has it. So the archive's length is known
before its first byte is sent.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import IO

from era.core.capsules import format as layout
from era.core.capsules import tars
from era.core.capsules.manifest import MAX_OBJECTS, too_large
from era.core.metadata import MetadataStore
from era.core.models import KeptOutputs, KeptRun, OwnedId, RunRecord, Session, VersionContent, now
from era.core.program import STREAMS
from era.core.setup.package_sets import InstalledPackageSets
from era.core.trees.blob_store import BlobStore, Hold
from era.core.trees.pack import blob_pieces, larger_pieces
from era.core.trees.pins import Pin, Pins
from era.core.trees.snapshots import Snapshots
from era.errors import Unavailable

_CHUNK = 1 << 20
_SMALL = 1 << 20
_FETCHED_AHEAD = 64
"""How many blobs are announced to a remote store at a time, so that it can fetch small ones together."""


@dataclass(slots=True)
class _Contents:
    """What a capsule will hold: its files, and the objects by digest."""

    document: IO[bytes]
    """capsule.json, in a temporary file."""

    texts: IO[bytes]
    """Outputs from rows, concatenated in a temporary file."""

    pin: Pin
    """The snapshots and the outputs that are blobs."""

    sums: bytes = b""
    readme: bytes = b""
    short: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size in `texts` of an output, by digest."""

    long: dict[str, int] = field(default_factory=dict)
    """Size of an output that is a blob, by digest."""


class Export:
    """A capsule ready to be sent. The caller must `close` it, sent or not."""

    def __init__(
        self, session_id: str, size: int, pieces: Iterator[bytes], threads: Executor, held: tuple[Pins, Pin, ExitStack]
    ) -> None:
        self.session_id = session_id
        self.size = size
        self._pieces = larger_pieces(pieces)
        self._threads = threads
        self._pins, self._pin, self._files = held
        self.renewing: asyncio.Task[None] | None = None
        """What keeps its content from other hosts' garbage collection."""

        self.when_closed: Callable[[], None] = lambda: None

        self._reading = threading.Lock()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The archive, in pieces. Raises Unavailable where the disk fails."""
        loop = asyncio.get_running_loop()
        try:
            while piece := await loop.run_in_executor(self._threads, self._next):
                yield piece
        except OSError as error:
            raise Unavailable(f"The capsule could not be read: {error.strerror}.") from error

    def close(self) -> None:
        """Release the pin and close the files. Files are closed on a thread: if `chunks` was cancelled, another may
        still be reading a piece."""
        self._pins.release(self._pin)
        if self.renewing is not None:
            self.renewing.cancel()
        try:
            self._threads.submit(self._close_files)
        except RuntimeError:  # the executor was shut down with the service, so no thread is reading
            self._close_files()
        self.when_closed()

    def _next(self) -> bytes:
        with self._reading:
            return next(self._pieces, b"")

    def _close_files(self) -> None:
        with self._reading:
            self._pieces.close()
            self._files.close()


class Exporter:
    """Makes exports. `directory` is for temporary files."""

    def __init__(
        self,
        store: MetadataStore,
        snapshots: Snapshots,
        blobs: BlobStore,
        pins: Pins,
        package_sets: InstalledPackageSets,
        threads: Executor,
        directory: Path,
    ) -> None:
        self._store = store
        self._snapshots = snapshots
        self._blobs = blobs
        self._pins = pins
        self._package_sets = package_sets
        self._threads = threads
        self._directory = directory

    async def open(self, session_id: OwnedId, *, history: bool) -> Export:
        """Export a session as it is now; without `history`, without older versions and runs.

        Raises NotFound, Expired, TooLarge where no server would import it, Unavailable where the disk fails.
        """
        try:
            with ExitStack() as stack:
                hold = await self._hold(stack)
                contents = await self._write(session_id, history, stack)
                try:
                    plan = asyncio.get_running_loop().run_in_executor(self._threads, self._plan, contents)
                    objects, size = await plan
                    stored = [digest for digest, _ in objects if digest not in contents.short]
                    if hold is not None:
                        await asyncio.get_running_loop().run_in_executor(self._threads, hold.only, stored)
                    elif self._pins.shared:
                        await self._renew(stored)
                except BaseException:
                    self._pins.release(contents.pin)
                    raise
                held = (self._pins, contents.pin, stack.pop_all())
        except OSError as error:
            raise Unavailable(f"The capsule could not be made: {error.strerror}.") from error
        export = Export(session_id.id, size, self._pieces(contents, objects), self._threads, held)
        if hold is None and self._pins.shared:
            export.renewing = asyncio.create_task(self._keep_renewing(stored))
        return export

    async def _hold(self, stack: ExitStack) -> Hold | None:
        """What keeps content from other hosts' garbage collections until `stack` closes, where there is such a
        thing."""
        hold = self._blobs.hold() if self._pins.shared else None
        if hold is not None:
            stack.callback(self._release, hold)
            await asyncio.get_running_loop().run_in_executor(self._threads, hold.everything)
        return hold

    def _release(self, hold: Hold) -> None:
        try:
            self._threads.submit(hold.release)
        except RuntimeError:  # the executor was shut down with the service
            hold.release()

    async def _renew(self, digests: Sequence[str]) -> None:
        """Count stored content as put now. Raises OSError where some of it is gone."""

        def job() -> None:
            for digest in digests:
                if not self._blobs.renew(digest):
                    raise FileNotFoundError(errno.ENOENT, "its content was removed meanwhile")

        await asyncio.get_running_loop().run_in_executor(self._threads, job)

    async def _keep_renewing(self, digests: Sequence[str]) -> None:
        while True:
            await asyncio.sleep(self._snapshots.grace_seconds / 3)
            with suppress(OSError):  # whoever reads it is told
                await self._renew(digests)

    async def _write(self, session_id: OwnedId, history: bool, stack: ExitStack) -> _Contents:
        """Read the session's rows into temporary files, which `stack` closes, and pin what they name."""
        document, texts = self._temporary(stack), self._temporary(stack)
        package_set = (await self._store.session(session_id)).package_set
        if package_set is not None:
            with suppress(Unavailable):  # a capsule is complete without a lock, too
                await self._package_sets.ensure(package_set)
        async with self._pins.pinning() as pin:
            contents = _Contents(document, texts, pin)

            def take(session: Session, versions: Iterator[VersionContent], runs: Iterator[KeptRun]) -> None:
                lock = self._package_sets.lock(session)
                digest = layout.DocumentWriter(document).write(
                    session,
                    lock,
                    (_version(content, pin) for content in versions),
                    (_run(run, contents) for run in runs),
                )
                document.flush()
                texts.flush()
                contents.readme = layout.readme(session.id)
                contents.sums = layout.sums(digest, contents.readme)

            await self._store.dump(session_id, history=history, take=take)
        return contents

    def _temporary(self, stack: ExitStack) -> IO[bytes]:
        return stack.enter_context(tempfile.TemporaryFile(dir=self._directory))

    def _plan(self, contents: _Contents) -> tuple[Sequence[tuple[str, int]], int]:
        """All objects with their sizes, sorted by digest, and the size of the archive. Raises TooLarge, OSError."""
        sizes = {digest: size for digest, (_, size) in contents.short.items()}
        sizes |= contents.long | self._snapshots.sizes_of(contents.pin.roots)
        if len(sizes) > MAX_OBJECTS:
            raise too_large(f"would have {len(sizes)} files, directories and outputs; {MAX_OBJECTS} can be imported")
        document = os.fstat(contents.document.fileno()).st_size
        all_sizes = (document, len(contents.readme), len(contents.sums), *sizes.values())
        return sorted(sizes.items()), tars.length(iter(all_sizes))

    def _pieces(self, contents: _Contents, objects: Sequence[tuple[str, int]]) -> Iterator[bytes]:
        """The archive, in pieces. Raises OSError."""
        mtime = now() // 1_000_000

        def file(name: str, size: int, content: Iterator[bytes]) -> Iterator[bytes]:
            yield tars.header(name, size, mtime)
            yield from content
            yield tars.padding(size)

        document = contents.document.fileno()
        size = os.fstat(document).st_size
        yield from file(layout.DOCUMENT, size, _part(document, 0, size))
        yield from file(layout.README, len(contents.readme), iter([contents.readme]))
        yield from file(layout.SUMS, len(contents.sums), iter([contents.sums]))
        for batch in batched(objects, _FETCHED_AHEAD):
            self._blobs.expect(digest for digest, size in batch if size <= _SMALL and digest not in contents.short)
            for digest, size in batch:
                yield from file(layout.OBJECTS + digest, size, self._content(contents, digest, size))
        yield tars.END

    def _content(self, contents: _Contents, digest: str, size: int) -> Iterator[bytes]:
        """The content of an object, in pieces."""
        if digest in contents.short:
            yield from _part(contents.texts.fileno(), contents.short[digest][0], size)
            return
        yield from blob_pieces(self._blobs.open_blob, digest, size)


def _version(content: VersionContent, pin: Pin) -> bytes:
    """The line of a version, whose snapshot is pinned."""
    if content.version.snapshot.root is not None:
        pin.roots.add(content.version.snapshot.root)
    return layout.version_line(content)


def _run(run: KeptRun, contents: _Contents) -> bytes:
    """The line of a run, whose outputs are added to the contents."""
    kept = run[1]
    if kept is None:
        return layout.run_line(run[0], None)
    stdout, stderr = (_output(kept, stream, run[0], contents) for stream in STREAMS)
    return layout.run_line(run[0], (stdout, stderr))


def _output(kept: KeptOutputs, stream: str, record: RunRecord, contents: _Contents) -> str:
    """Add one output of a run (stdout or stderr) to the contents, pinned if it is a blob. Returns its digest."""
    digest: str | None = getattr(kept, f"{stream}_digest")
    if digest is not None:
        contents.pin.blobs.add(digest)
        contents.long[digest] = getattr(record, f"{stream}_bytes")
        return digest
    content: bytes = getattr(kept, stream) or b""
    digest = hashlib.sha256(content).hexdigest()
    if digest not in contents.short:
        contents.short[digest] = (contents.texts.tell(), len(content))
        contents.texts.write(content)
    return digest


def _part(fd: int, offset: int, size: int) -> Iterator[bytes]:
    """`size` bytes of a file from `offset`, in pieces. Raises OSError where it has fewer."""
    end = offset + size
    while offset < end:
        piece = os.pread(fd, min(_CHUNK, end - offset), offset)
        if not piece:
            raise OSError(5, "a file is not as long as it was")
        offset += len(piece)
        yield piece
