"""A session written as a capsule.

Theory of operation. One read of the database gives session, versions and runs as they were at one moment; they go to a
temporary file while they are read, since nobody knows how many there are. So does output short enough to lie in a row.
Everything else is content that never changes and is pinned (see pins.py) until the client has it, so the archive's
length is known before its first byte is sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import IO

from era.core.capsules import format as layout
from era.core.capsules import tars
from era.core.capsules.pins import Pin, Pins
from era.core.capsules.validators import MAX_OBJECTS, too_large
from era.core.files.pack import larger_pieces
from era.core.files.snapshots import BlobStore, Snapshots
from era.core.metadata import MetadataStore
from era.core.models import KeptOutputs, KeptRun, OwnedId, RunRecord, Session, VersionContent, now
from era.core.outputs import STREAMS
from era.core.setup.locks import Locks
from era.errors import Unavailable

_CHUNK = 1 << 20
_SMALL = 1 << 20
_FETCHED_AHEAD = 64
"""So many small blobs are fetched together where they are far away."""


@dataclass(slots=True)
class _Written:
    """What was read of the database, and what else the capsule must hold."""

    document: IO[bytes]
    texts: IO[bytes]
    """Output that lies in rows, one after the other."""

    pin: Pin
    sums: bytes = b""
    readme: bytes = b""
    short: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Where in `texts` output of this digest begins, and how long it is."""

    long: dict[str, int] = field(default_factory=dict)
    """How long output is that is a blob."""


class Export:
    """A capsule to be sent. `close` when done, sent or not."""

    def __init__(
        self, session_id: str, size: int, pieces: Iterator[bytes], threads: Executor, held: tuple[Pins, Pin, ExitStack]
    ) -> None:
        self.session_id = session_id
        self.size = size
        self._pieces = larger_pieces(pieces)
        self._threads = threads
        self._pins, self._pin, self._files = held
        self._reading = threading.Lock()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The archive. Raises Unavailable where the disk fails."""
        loop = asyncio.get_running_loop()
        try:
            while piece := await loop.run_in_executor(self._threads, self._next):
                yield piece
        except OSError as error:
            raise Unavailable(f"The capsule could not be read: {error.strerror}.") from error

    def close(self) -> None:
        """Let go of everything. Who waited for a chunk and was cancelled may have left a thread that reads one."""
        self._pins.release(self._pin)
        try:
            self._threads.submit(self._close_files)
        except RuntimeError:  # The service is stopping, so nobody reads.
            self._close_files()

    def _next(self) -> bytes:
        with self._reading:
            return next(self._pieces, b"")

    def _close_files(self) -> None:
        with self._reading:
            self._pieces.close()
            self._files.close()


class Exporter:
    def __init__(
        self,
        store: MetadataStore,
        snapshots: Snapshots,
        blobs: BlobStore,
        pins: Pins,
        locks: Locks,
        threads: Executor,
        directory: Path,
    ) -> None:
        self._store = store
        self._snapshots = snapshots
        self._blobs = blobs
        self._pins = pins
        self._locks = locks
        self._threads = threads
        self._directory = directory

    async def open(self, session_id: OwnedId, *, history: bool) -> Export:
        """A session as it is now. Raises NotFound, Expired; TooLarge where no server would import it; Unavailable where
        the disk fails."""
        try:
            with ExitStack() as stack:
                written = await self._write(session_id, history, stack)
                try:
                    plan = asyncio.get_running_loop().run_in_executor(self._threads, self._plan, written)
                    objects, size = await plan
                except BaseException:
                    self._pins.release(written.pin)
                    raise
                held = (self._pins, written.pin, stack.pop_all())
        except OSError as error:
            raise Unavailable(f"The capsule could not be made: {error.strerror}.") from error
        return Export(session_id.id, size, self._pieces(written, objects), self._threads, held)

    async def _write(self, session_id: OwnedId, history: bool, stack: ExitStack) -> _Written:
        document, texts = self._temporary(stack), self._temporary(stack)
        environment = (await self._store.session(session_id)).environment
        if environment is not None:
            with suppress(Unavailable):  # The capsule is complete without a lock, too.
                await self._locks.need(environment)
        async with self._pins.pinning() as pin:
            written = _Written(document, texts, pin)

            def take(session: Session, versions: Iterator[VersionContent], runs: Iterator[KeptRun]) -> None:
                lock = self._locks.lock(session)
                digest = layout.Document(document).write(
                    session,
                    lock,
                    (_version(content, pin) for content in versions),
                    (_run(run, written) for run in runs),
                )
                document.flush()
                texts.flush()
                written.readme = layout.readme(session.id)
                written.sums = layout.sums(digest, written.readme)

            await self._store.dump(session_id, history=history, take=take)
        return written

    def _temporary(self, stack: ExitStack) -> IO[bytes]:
        return stack.enter_context(tempfile.TemporaryFile(dir=self._directory))

    def _plan(self, written: _Written) -> tuple[Sequence[tuple[str, int]], int]:
        """Every object with its size, in order, and the size of the archive."""
        sizes = {digest: size for digest, (_, size) in written.short.items()}
        sizes |= written.long | self._snapshots.sizes_of(written.pin.roots)
        if len(sizes) > MAX_OBJECTS:
            raise too_large(f"would have {len(sizes)} files, directories and outputs; {MAX_OBJECTS} can be imported")
        document = os.fstat(written.document.fileno()).st_size
        all_sizes = (document, len(written.readme), len(written.sums), *sizes.values())
        return sorted(sizes.items()), tars.length(iter(all_sizes))

    def _pieces(self, written: _Written, objects: Sequence[tuple[str, int]]) -> Iterator[bytes]:
        mtime = now() // 1_000_000

        def file(name: str, size: int, content: Iterator[bytes]) -> Iterator[bytes]:
            yield tars.header(name, size, mtime)
            yield from content
            yield tars.padding(size)

        document = written.document.fileno()
        size = os.fstat(document).st_size
        yield from file(layout.DOCUMENT, size, _part(document, 0, size))
        yield from file(layout.README, len(written.readme), iter([written.readme]))
        yield from file(layout.SUMS, len(written.sums), iter([written.sums]))
        for some in batched(objects, _FETCHED_AHEAD):
            self._blobs.expect(digest for digest, size in some if size <= _SMALL and digest not in written.short)
            for digest, size in some:
                yield from file(layout.OBJECTS + digest, size, self._content(written, digest, size))
        yield tars.END

    def _content(self, written: _Written, digest: str, size: int) -> Iterator[bytes]:
        if digest in written.short:
            yield from _part(written.texts.fileno(), written.short[digest][0], size)
            return
        fd = self._blobs.open_blob(digest)
        try:
            yield from _part(fd, 0, size)
        finally:
            os.close(fd)


def _version(content: VersionContent, pin: Pin) -> bytes:
    if content.version.snapshot.root is not None:
        pin.roots.add(content.version.snapshot.root)
    return layout.version_line(content)


def _run(run: KeptRun, written: _Written) -> bytes:
    kept = run[1]
    if kept is None:
        return layout.run_line(run[0], None)
    stdout, stderr = (_output(kept, stream, run[0], written) for stream in STREAMS)
    return layout.run_line(run[0], (stdout, stderr))


def _output(kept: KeptOutputs, stream: str, record: RunRecord, written: _Written) -> str:
    """The digest of an output, which is a blob or put aside."""
    digest: str | None = getattr(kept, f"{stream}_digest")
    if digest is not None:
        written.pin.blobs.add(digest)
        written.long[digest] = getattr(record, f"{stream}_bytes")
        return digest
    content: bytes = getattr(kept, stream) or b""
    digest = hashlib.sha256(content).hexdigest()
    if digest not in written.short:
        written.short[digest] = (written.texts.tell(), len(content))
        written.texts.write(content)
    return digest


def _part(fd: int, offset: int, size: int) -> Iterator[bytes]:
    """`size` bytes of a file. Raises OSError where it has fewer."""
    end = offset + size
    while offset < end:
        piece = os.pread(fd, min(_CHUNK, end - offset), offset)
        if not piece:
            raise OSError(5, "a file is not as long as it was")
        offset += len(piece)
        yield piece
