"""Content, by its SHA-256, as objects on an S3-compatible server.

Theory of operation. The object `PREFIX/abcd…` holds the bytes whose SHA-256 is `abcd…`. A server shows an object whole
or not at all and has made it durable when it says so; and since equal names hold equal bytes, an upload may be repeated
or overtaken by another without harm. Content beyond PART is cut into `PREFIX/abcd….0`, `….1` and so on, and
`PREFIX/abcd…` says how many there are; that this isn't the content itself is plain from its SHA-256. So a batch is
nothing but uploads on a few threads, and has ended when all of them have. A batch that fails leaves at worst content
that nobody asked for, which is swept in time.

A put is not to be undone by a sweep. Content is uploaded even if it may be there already, which makes it young by the
server's clock; a sweep removes only what is old. An upload is spared only where this process did one of the same
content less than half an hour ago. Within this process the two also know of each other: a put notes its digest before
anything else (`_recent`), a sweep passes over what was noted, and a put waits while its content is being removed
(`_doomed`). If it isn't known whether a removal was carried out, it may still come, so a put of that content waits on.
That is why one process only may sweep a prefix; others may put there, if their batches take less than the grace period.

A prefix belongs to one installation, since each sweeps what its own rows don't name: `open` leaves a mark, and refuses
a prefix that bears another's.

What is read goes through a cache on the local disk. It is believed only once its SHA-256 has been found right.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from era.core.files.durable import sync
from era.errors import Conflict, Unavailable
from era.store.blob_cache import BlobCache, Incoming
from era.store.s3_client import Bucket, Damaged, Patience

CHUNK = 1 << 20
PART = 8 << 20
"""Content up to this size is one object and uploaded aside; larger content is read twice, and waited for."""

_THREADS = 16
_WAITING = 32
"""Uploads of up to CHUNK bytes that may wait or be under way. This bounds the memory of all batches together."""

_PARTS_WAITING = 4
"""The same for those of up to PART bytes."""

_SPARED_SECONDS = 1800.0
_DOUBT_SECONDS = 60.0
_OWNER = "owner"
_NAME = re.compile(r"([0-9a-f]{64})(?:\.\d+)?")
_PARTS = re.compile(rb"era parts (\d{1,6})")
_PATIENCE = Patience()


class S3Blobs:
    """A BlobStore in a bucket. `open` before anything, `close` when done."""

    def __init__(self, url: str, cache: Path, *, cache_bytes: int, owner: str, patience: Patience = _PATIENCE) -> None:
        self._bucket = Bucket(url, patience)
        self._cache = BlobCache(cache, cache_bytes)
        self._owner = owner
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="era-blobs")
        self._room = threading.BoundedSemaphore(_WAITING)
        self._room_for_parts = threading.BoundedSemaphore(_PARTS_WAITING)
        self._closed = False
        self._changed = threading.Condition()
        """Guards what follows."""
        self._recent: dict[str, float] = {}
        """When a batch last put this."""
        self._uploaded: dict[str, float] = {}
        self._doomed: dict[str, float] = {}
        """What a sweep removes, and until when that may go on, by the monotonic clock."""
        self._batches: dict[int, float] = {}
        """When each batch under way began."""
        self.last_put = 0.0

    def open(self) -> None:
        """Make the cache, see that the bucket can be used. Raises Unavailable, Conflict."""
        self._cache.open()
        try:
            owner = self._read_owner()
            if owner is None:
                self._bucket.put(_OWNER, self._owner.encode())
                owner = self._read_owner()  # Somebody else may have found none, too.
        except OSError as error:
            raise Unavailable(f"The blob store can't be used: {error.strerror}.") from None
        if owner != self._owner:
            raise Conflict(
                "The blob store's bucket and prefix belong to another installation of ERA.",
                hint="Choose another prefix. If the data directory was restored, restore its file `store-id`, too.",
            )

    def close(self) -> None:
        """Let uploads finish. Whatever else is under way ends at its next request."""
        self._closed = True
        self._threads.shutdown()

    @contextmanager
    def batch(self) -> Iterator[S3Batch]:
        """Whatever is put within is durable once the block has ended."""
        batch = S3Batch(self)
        with self._changed:
            self._batches[id(batch)] = time.time()
        try:
            try:
                yield batch
            finally:
                batch._wait()
            batch._finish()
        finally:
            with self._changed:
                del self._batches[id(batch)]
            self.last_put = time.time()

    def get(self, digest: str) -> bytes:
        """The content. Raises FileNotFoundError."""
        with open(self.open_blob(digest), "rb") as file:
            return file.read()

    def open_blob(self, digest: str) -> int:
        """A descriptor to read the content from; the caller closes it. Raises FileNotFoundError."""
        self._check_open()
        found = self._cache.find(digest)
        return found if found is not None else self._bucket.patiently(lambda: self._download(digest))

    def expect(self, digests: Iterable[str]) -> None:
        """These are about to be opened: fetch them together, which takes far less time than one after the other."""
        missing = [digest for digest in dict.fromkeys(digests) if digest not in self._cache]
        if len(missing) > 1:
            for _ in self._threads.map(self._fetch, missing):
                pass

    def sweep(self, keep: set[str], older_than: float) -> int:
        """Remove what isn't in `keep` and was last put before `older_than` (seconds since 1970); how many went."""
        with self._changed:
            # A batch may have begun before that time and still be under way.
            older_than = min([older_than, *self._batches.values()])
            self._forget(older_than)
        removed = 0
        for page in self._bucket.pages():
            self._check_open()
            old: dict[str, list[str]] = {}
            for name, modified in page:
                if modified < older_than and (found := _NAME.fullmatch(name)) and found[1] not in keep:
                    old.setdefault(found[1], []).append(name)
            removed += self._remove(old)
        return removed

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.ESHUTDOWN, "the service is shutting down")

    def _fetch(self, digest: str) -> None:
        os.close(self.open_blob(digest))

    def _read_owner(self) -> str | None:
        try:
            return self._bucket.get(_OWNER).decode(errors="replace")
        except FileNotFoundError:
            return None

    def _forget(self, older_than: float) -> None:
        now = time.monotonic()
        self._recent = {digest: at for digest, at in self._recent.items() if at >= older_than}
        self._uploaded = {digest: at for digest, at in self._uploaded.items() if digest in self._recent}
        self._doomed = {digest: until for digest, until in self._doomed.items() if until > now}

    def _remove(self, old: Mapping[str, Sequence[str]]) -> int:
        """Remove objects, given by digest, of which nothing was put lately; how many digests that were."""
        with self._changed:
            now = time.monotonic()
            doomed = [digest for digest in old if digest not in self._recent and self._doomed.get(digest, now) <= now]
            self._doomed.update(dict.fromkeys(doomed, math.inf))
        until = math.inf
        try:
            self._bucket.delete([name for digest in doomed for name in old[digest]])
            until = 0.0
        finally:
            with self._changed:
                self._doomed.update(dict.fromkeys(doomed, min(until, time.monotonic() + _DOUBT_SECONDS)))
                self._changed.notify_all()
        return sum(digest in old[digest] for digest in doomed)

    def _claim(self, digest: str) -> bool:
        """Keep this content from being swept from now on. Whether it is known to be there."""
        with self._changed:
            while (left := self._doomed.get(digest, 0.0) - time.monotonic()) > 0:
                self._changed.wait(min(left, 1.0))
            now = time.time()
            self._recent[digest] = now
            return now - self._uploaded.get(digest, 0.0) < _SPARED_SECONDS

    def _put(self, digest: str, content: bytes) -> None:
        begun = time.time()
        self._bucket.put(digest, content)
        self._is_there(digest, begun)
        with suppress(OSError), self._cache.incoming() as new:  # It is durable whether there is room here or not.
            new.write(content)
            self._cache.keep(digest, new)

    def _put_parts(self, digest: str, parts: Iterable[bytes]) -> None:
        """The same for large content, from the batch's own thread."""
        begun = time.time()
        hasher = hashlib.sha256()
        active_runs: list[Future[None]] = []
        try:
            for number, part in enumerate(parts):
                hasher.update(part)
                upload = partial(self._bucket.put, f"{digest}.{number}", part)
                active_runs.append(self._submit(upload, self._room_for_parts))
                if active_runs[-1].done():
                    active_runs[-1].result()
        finally:
            wait(active_runs)
        for future in active_runs:
            future.result()
        if hasher.hexdigest() != digest:
            raise OSError(errno.EIO, "a file changed while it was being kept")
        self._bucket.put(digest, b"era parts %d" % len(active_runs))
        self._is_there(digest, begun)

    def _is_there(self, digest: str, since: float) -> None:
        with self._changed:
            self._uploaded[digest] = since

    def _submit(self, job: Callable[[], None], room: threading.BoundedSemaphore) -> Future[None]:
        room.acquire()
        try:
            future = self._threads.submit(job)
        except BaseException:
            room.release()
            raise
        future.add_done_callback(lambda _: room.release())
        return future

    def _download(self, digest: str) -> int:
        with self._cache.incoming() as new:
            if self._receive(self._bucket.pieces(digest), new) != digest:
                head = os.pread(new.fd, 100, 0)
                if not (found := _PARTS.fullmatch(head)):
                    raise Damaged("what came is damaged")
                new.clear()
                parts = (self._bucket.get(f"{digest}.{number}") for number in range(int(found[1])))
                if self._receive(parts, new) != digest:
                    raise Damaged("what came is damaged")
            fd = os.open(new.path, os.O_RDONLY | os.O_CLOEXEC)
            self._cache.keep(digest, new)
            return fd

    def _receive(self, pieces: Iterable[bytes], new: Incoming) -> str:
        """Write pieces; the digest of them all."""
        hasher = hashlib.sha256()
        for piece in pieces:
            self._check_open()
            hasher.update(piece)
            new.write(piece)
        return hasher.hexdigest()


class S3Batch:
    """Puts that become durable together, all from one thread."""

    def __init__(self, store: S3Blobs) -> None:
        self._store = store
        self._digests: set[str] = set()
        self._active_runs: list[Future[None]] = []

    def put(self, content: bytes) -> str:
        """The digest of `content`, which will be kept."""
        digest = hashlib.sha256(content).hexdigest()
        if not self._have(digest):
            self._stop_if_failed()
            room = self._store._room if len(content) <= CHUNK else self._store._room_for_parts
            self._active_runs.append(self._store._submit(partial(self._store._put, digest, content), room))
        return digest

    def put_file(self, fd: int, size: int) -> str:
        """The digest of the next `size` bytes of `fd` (fewer where it ends before), which will be kept."""
        start = os.lseek(fd, 0, os.SEEK_CUR)

        def read(count: int, offset: int) -> bytes:
            return os.pread(fd, count, start + offset)

        if size <= PART:
            return self.put(b"".join(_pieces(read, size, CHUNK)))
        hasher = hashlib.sha256()
        for piece in _pieces(read, size, CHUNK):
            hasher.update(piece)
        digest = hasher.hexdigest()
        if not self._have(digest):
            self._stop_if_failed()
            self._store._put_parts(digest, _pieces(read, size, PART))
        return digest

    def put_spooled(self, path: str, digest: str) -> None:
        """Put the content of the file at `path`, of which the digest is known and nothing will ever be changed."""
        with open(path, "rb", buffering=0) as file:
            if self.put_file(file.fileno(), os.fstat(file.fileno()).st_size) != digest:
                raise OSError(errno.EIO, "a file changed while it was kept")

    def _have(self, digest: str) -> bool:
        if digest in self._digests:
            return True
        known = self._store._claim(digest)
        self._digests.add(digest)
        return known

    def _stop_if_failed(self) -> None:
        still = []
        for future in self._active_runs:
            if future.done():
                future.result()
            else:
                still.append(future)
        self._active_runs = still

    def _wait(self) -> None:
        for future in self._active_runs:
            future.exception()

    def _finish(self) -> None:
        for future in self._active_runs:
            future.result()
        with self._store._changed:
            # The batch may have taken long, and the row that names this is yet to come.
            self._store._recent.update(dict.fromkeys(self._digests, time.time()))


def _pieces(read: Callable[[int, int], bytes], size: int, piece: int) -> Iterator[bytes]:
    """`size` bytes as `read(count, offset)` gives them, all of length `piece` but the last."""
    offset = 0
    while offset < size:
        wanted = min(piece, size - offset)
        content = read(wanted, offset)
        while content and len(content) < wanted and (more := read(wanted - len(content), offset + len(content))):
            content += more
        if not content:
            return
        yield content
        offset += len(content)


def installation(file: Path) -> str:
    """The id of the installation whose data lies beside `file`, made when first asked for."""
    if not file.exists():
        draft = file.with_suffix(".new")
        with draft.open("w") as opened:
            opened.write(secrets.token_hex(16))
            opened.flush()
            os.fsync(opened.fileno())
        draft.rename(file)
        sync(os.fspath(file.parent))
    return file.read_text().strip()
