"""Blobs as objects on an S3-compatible server, by the SHA-256 of their content.

Theory of operation. The object `PREFIX/abcd…` holds the bytes whose SHA-256 is `abcd…`. A server shows an object whole
or not at all and has made it durable when it says so; and since equal names hold equal bytes, an upload may be repeated
or overtaken by another without harm. Content beyond PART is cut into `PREFIX/abcd….0`, `….1` and so on, and
`PREFIX/abcd…` says how many there are; that this isn't the content itself is plain from its SHA-256. So a batch is
nothing but uploads on a few threads, and has ended when all of them have. A batch that fails leaves at worst content
that no row names, which a later sweep removes.

A sweep must not undo a put. Content is uploaded even if it may be stored already, which makes it young by the server's
clock; a sweep removes only what is old. An upload is left out only where this process did one of the same content less
than half an hour ago. Within this process puts and sweeps also know of each other: a put notes its digest before
anything else (`_recent`), a sweep passes over what was noted, and a put waits while its content is being removed
(`_removing`). If it isn't known whether a removal was carried out, it may still come, so a put of that content waits
on. None of that holds between processes: what another one puts again after the sweep has listed it, and before it is
removed, would be lost. So hosts of a cluster, which share a prefix, tell each other by rows (condemned.py, `share`).

Another process that needs content to stay for a while keeps an object `PREFIX/held/…` young (s3_holds.py). A sweep that
had begun before does no harm: what it removes no row named when it began, and what a row names since then was put since
then.

A prefix belongs to one installation, since each sweeps what its own rows don't name: `open` writes the installation's
id there, and refuses a prefix that bears another one.

Reads go through a cache on the local disk. Content is used only after its SHA-256 was checked.
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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from era.core.trees.durable import sync
from era.errors import Conflict, NotReady, Unavailable
from era.store.blobs.blob_cache import BlobCache, Incoming
from era.store.blobs.condemned import Condemned
from era.store.blobs.s3_client import Bucket, Damaged, Patience, parse
from era.store.blobs.s3_holds import Hold, held
from era.store.blobs.s3_shared import Collection, confirm

CHUNK = 1 << 20
"""Bytes that are read from a file at a time."""

PART = 8 << 20
"""Content of up to this many bytes is one object, uploaded on another thread. Larger content is read twice, to hash it
and to upload it in parts, which the caller waits for."""

_THREADS = 16
_SMALL_UPLOADS = 32
"""Uploads of up to CHUNK bytes that may wait or run at a time. This bounds the memory of all batches together."""

_PART_UPLOADS = 4
"""The same for uploads of up to PART bytes."""

_FRESH_SECONDS = 1800.0
"""For how long after an upload the same content isn't uploaded again."""

_DOUBT_SECONDS = 60.0
"""For how long a removal that got no answer may still be carried out."""

_OWNER = "owner"
"""The object that holds the id of the installation."""

_NAME = re.compile(r"([0-9a-f]{64})(?:\.\d+)?")
"""The name of a blob's object or of one of its parts."""

_PARTS = re.compile(rb"era parts (\d{1,6})")
"""The content of a blob's object where the blob itself is in parts."""

_PATIENCE = Patience()


class _Upload(NamedTuple):
    """When an upload began."""

    at: float
    """In seconds since 1970."""

    database_at: int
    """A time before that by the database's clock, where hosts share the prefix."""


class S3Blobs:
    """A BlobStore in a bucket. `open` before anything, `close` when done."""

    def __init__(
        self,
        url: str,
        cache: Path,
        *,
        cache_bytes: int,
        owner: str,
        patience: Patience = _PATIENCE,
    ) -> None:
        """`cache` is the cache's directory, `owner` the id of this installation. Raises BadRequest for a bad `url`."""
        self._bucket = Bucket(url, patience)
        self._cache = BlobCache(cache, cache_bytes)
        self._owner = owner
        self._condemned: Condemned | None = None
        """What hosts of a cluster tell each other."""

        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="era-blobs")
        self._small_uploads = threading.BoundedSemaphore(_SMALL_UPLOADS)
        self._part_uploads = threading.BoundedSemaphore(_PART_UPLOADS)
        self._closed = False
        self._changed = threading.Condition()
        """Guards all that follows; notified when a removal has ended."""

        self._recent: dict[str, float] = {}
        """When a batch last put a digest, in seconds since 1970."""

        self._uploaded: dict[str, _Upload] = {}
        """The last upload of a digest that succeeded."""

        self._forgotten_at = time.time()
        """When notes were last dropped that no longer matter."""

        self._removing: dict[str, float] = {}
        """Digests that a sweep removes, and until when that may go on, by the monotonic clock."""

        self._batches: dict[int, float] = {}
        """When each batch in progress began, by its id, in seconds since 1970."""

        self.last_put = time.time()
        """When a batch last ended, in seconds since 1970; or now, as an earlier process may just have put something."""

        self.written = 0
        """How many blobs this process has written."""

        self.written_bytes = 0
        """Isn't counted: a bucket doesn't fill."""

    def open(self, *, take: bool = True) -> None:
        """Make the cache and, with `take`, take the prefix for this installation if it is nobody's.

        Raises Unavailable where the bucket can't be used, Conflict where the prefix isn't this installation's.
        """
        self._cache.open()
        bucket = self._bucket.briefly()  # somebody waits to be told what is wrong
        try:
            owner = _owner_in(bucket)
            if owner is None and take:
                bucket.put(_OWNER, self._owner.encode())
                owner = _owner_in(bucket)  # Another installation may have written it at the same time.
        except OSError as error:
            raise Unavailable(f"The blob store can't be used: {error.strerror}.") from None
        if owner != self._owner:
            raise _anothers()

    def share(self, condemned: Condemned) -> None:
        """Put and remove content beside other hosts of a cluster from now on. Call it before anything is put."""
        self._condemned = condemned

    def hurry(self) -> None:
        """Repeat no request from now on: what fails has failed, so that the service needn't be waited for."""
        self._bucket.hurry()

    def close(self) -> None:
        """Let uploads finish. Downloads and sweeps in progress fail at their next request."""
        self._closed = True
        self.hurry()
        self._threads.shutdown()

    @contextmanager
    def batch(self) -> Iterator[S3Batch]:
        """What is put within is durable once the block has ended. Raises OSError."""
        batch = S3Batch(self)
        with self._changed:
            self._batches[id(batch)] = time.time()
        try:
            try:
                yield batch
            finally:
                batch._uploads.wait()
            batch._finish()
            if self._condemned is not None:
                confirm(self._condemned, batch._put_at, self._put_again)
        finally:
            with self._changed:
                del self._batches[id(batch)]
            self.last_put = time.time()

    def get(self, digest: str) -> bytes:
        """The content of a blob. Raises FileNotFoundError, OSError."""
        with open(self.open_blob(digest), "rb") as file:
            return file.read()

    def open_blob(self, digest: str) -> int:
        """A descriptor to read a blob from, which the caller closes. Raises FileNotFoundError, OSError."""
        self._check_open()
        cached = self._cache.find(digest)
        return cached if cached is not None else self._bucket.patiently(lambda: self._download(digest))

    def renew(self, digest: str) -> bool:
        """Whether there is such a blob, which no other host removes then for some hours. Within this process whoever
        asks sees to that."""
        if self._condemned is None:
            return True
        found, now = self._condemned.spare((), [digest])
        return found.get(digest, 0) < now and self._bucket.has(digest)

    def naming(self) -> AbstractContextManager[None]:
        return nullcontext()

    def time(self) -> float:
        """By this machine's clock: a sweep finds out how far the bucket's is ahead."""
        return time.time()

    def unnamed_since(self) -> None:
        """None: other processes may use the bucket, too."""

    def is_crowded(self, garbage: int) -> bool:
        return False

    def hold(self) -> Hold:
        """What can keep content, of whatever process."""
        return Hold(self._bucket)

    def expect(self, digests: Iterable[str]) -> None:
        """Fetch blobs that are about to be opened into the cache, several at a time. Raises OSError."""
        missing = [digest for digest in dict.fromkeys(digests) if digest not in self._cache]
        if len(missing) > 1:
            for _ in self._threads.map(self._fetch, missing):
                pass

    def sweep(self, keep: set[str], older_than: float) -> int:
        """Remove blobs that aren't in `keep` and were last put before `older_than` (seconds since 1970); how many.

        Raises OSError; BlockingIOError, and removes nothing, while a backup reads the blobs.
        """
        keep = keep | held(self._bucket)
        if self._condemned is not None:
            collection = Collection(self._bucket, self._condemned, self._threads, _digest_of)
            return collection.run(keep, older_than, self._check_open)
        with self._changed:
            # A batch may have begun before that time and still be in progress.
            older_than = min([older_than, *self._batches.values()])
            self._forget(older_than)
        removed = 0
        for page in self._bucket.pages():
            self._check_open()
            old: dict[str, list[str]] = {}
            for name, modified, _ in page:
                digest = _digest_of(name)
                if digest is not None and modified < older_than and digest not in keep:
                    old.setdefault(digest, []).append(name)
            removed += self._remove(old)
        return removed

    @contextmanager
    def held_off(self) -> Iterator[None]:
        """Keep sweeps off, of whatever process. Raises OSError."""
        hold = self.hold()
        try:
            hold.everything()
            yield
        finally:
            hold.release()

    def sizes(self) -> dict[str, int]:
        """The bytes of all content, by digest. Raises OSError."""
        found: dict[str, int] = {}
        for page in self._bucket.pages():
            for name, _, size in page:
                match = _NAME.fullmatch(name)
                if match and (name == match[1] or match[1] in found):  # parts, which come after it, are nothing alone
                    found[match[1]] = found.get(match[1], 0) + size
        return found

    def is_empty(self) -> bool:
        """Whether there is nothing below the prefix. Raises OSError."""
        return next(self._bucket.pages(), None) is None

    def remove_all(self) -> None:
        """Remove everything below the prefix. Raises OSError."""
        for page in self._bucket.pages():
            self._bucket.delete([listed.name for listed in page])

    def take_out(self, digest: str, target: Path) -> None:
        """Remove content that isn't what its digest says, keeping the object itself, without its parts, as a file.
        Raises OSError."""
        target.write_bytes(self._bucket.get(digest))
        self._bucket.delete([digest])
        with self._changed:
            self._uploaded.pop(digest, None)

    def _check_open(self) -> None:
        """Raises OSError after `close`."""
        if self._closed:
            raise OSError(errno.ESHUTDOWN, "the service is shutting down")

    def _fetch(self, digest: str) -> None:
        """Get a blob into the cache, where there is room for it."""
        os.close(self.open_blob(digest))

    def _forget(self, older_than: float) -> None:
        """Drop notes of puts and removals that no longer matter, so that they don't grow for ever."""
        now = time.monotonic()
        self._recent = {digest: at for digest, at in self._recent.items() if at >= older_than}
        self._uploaded = {digest: upload for digest, upload in self._uploaded.items() if digest in self._recent}
        self._removing = {digest: until for digest, until in self._removing.items() if until > now}

    def _remove(self, old: Mapping[str, Sequence[str]]) -> int:
        """Remove objects, given by digest, except of content put lately; how many blobs. Raises OSError."""
        with self._changed:
            now = time.monotonic()
            removable = [
                digest for digest in old if digest not in self._recent and self._removing.get(digest, now) <= now
            ]
            self._removing.update(dict.fromkeys(removable, math.inf))
        until = math.inf
        try:
            if self._bucket.briefly().delete([name for digest in removable for name in old[digest]]):
                until = 0.0
        finally:
            with self._changed:
                self._removing.update(dict.fromkeys(removable, min(until, time.monotonic() + _DOUBT_SECONDS)))
                self._changed.notify_all()
        return sum(digest in old[digest] for digest in removable)

    def _protect(self, digest: str) -> _Upload | None:
        """Protect content from sweeps from now on, after waiting for one that is removing it. Returns its last upload
        where that was so lately that there needn't be another."""
        with self._changed:
            while (left := self._removing.get(digest, 0.0) - time.monotonic()) > 0:
                self._changed.wait(min(left, 1.0))
            now = time.time()
            self._recent[digest] = now
            upload = self._uploaded.get(digest)
            return upload if upload is not None and now - upload.at < _FRESH_SECONDS else None

    def _put(self, digest: str, content: bytes) -> None:
        """Upload content as one object, and add it to the cache. Raises OSError."""
        begun = self._begin_upload()
        self._bucket.put(digest, content)
        self._note_upload(digest, begun)
        with suppress(OSError), self._cache.incoming() as new:  # A full cache disk is no reason to fail.
            new.write(content)
            self._cache.keep(digest, new)

    def _put_parts(self, digest: str, parts: Iterable[bytes]) -> None:
        """Upload content in parts, from the batch's own thread, which waits for them. Raises OSError, also where the
        parts don't have the digest."""
        begun = self._begin_upload()
        hasher = hashlib.sha256()
        uploads = _Uploads(self)
        number = 0
        try:
            for number, part in enumerate(parts, 1):
                hasher.update(part)
                uploads.begin(partial(self._bucket.put, f"{digest}.{number - 1}", part), self._part_uploads)
        finally:
            uploads.wait()
        uploads.check()
        if hasher.hexdigest() != digest:
            raise OSError(errno.EIO, "a file changed while it was being kept")
        self._bucket.put(digest, b"era parts %d" % number)
        self._note_upload(digest, begun)

    def _put_again(self, digest: str) -> None:
        """Upload content that a batch put and another host removed, if it is in the cache and fits one object. Raises
        OSError."""
        cached = self._cache.find(digest)
        if cached is not None:
            with open(cached, "rb") as file:
                if os.path.getsize(cached) <= PART:
                    self._put(digest, file.read())
                    return
        with self._changed:
            self._uploaded.pop(digest, None)
        raise OSError(errno.EAGAIN, "the same content was just removed; try again")

    def _begin_upload(self) -> _Upload:
        """The note of an upload that begins now."""
        return _Upload(time.time(), 0 if self._condemned is None else self._condemned.now())

    def _note_upload(self, digest: str, begun: _Upload) -> None:
        with self._changed:
            self._uploaded[digest] = begun
            if self._condemned is not None and time.time() - self._forgotten_at > _FRESH_SECONDS:
                # A sweep does it, too, but another host may do all of them.
                self._forgotten_at = time.time()
                self._forget(self._forgotten_at - _FRESH_SECONDS)

    def _submit(self, job: Callable[[], None], slots: threading.BoundedSemaphore) -> Future[None]:
        """Start `job` on one of the threads, after waiting for a slot."""
        slots.acquire()
        try:
            future = self._threads.submit(job)
        except BaseException:
            slots.release()
            raise
        future.add_done_callback(lambda _: slots.release())
        return future

    def _download(self, digest: str) -> int:
        """Fetch a blob and add it to the cache; a descriptor to read it from. Raises OSError, and Damaged where the
        content received hasn't this digest."""
        with self._cache.incoming() as new:
            if self._receive(self._bucket.pieces(digest), new) != digest:
                head = os.pread(new.fd, 100, 0)
                if not (match := _PARTS.fullmatch(head)):
                    raise Damaged("what came is damaged")
                new.clear()
                parts = (self._bucket.get(f"{digest}.{number}") for number in range(int(match[1])))
                if self._receive(parts, new) != digest:
                    raise Damaged("what came is damaged")
            fd = os.open(new.path, os.O_RDONLY | os.O_CLOEXEC)
            with suppress(OSError):  # it is here, whether it is cached or not
                self._cache.keep(digest, new)
            return fd

    def _receive(self, pieces: Iterable[bytes], new: Incoming) -> str:
        """Write pieces to a file; their digest."""
        hasher = hashlib.sha256()
        for piece in pieces:
            self._check_open()
            hasher.update(piece)
            new.write(piece)
        return hasher.hexdigest()


class _Uploads:
    """Uploads that are of use together only: once one has failed, none begins any more."""

    def __init__(self, store: S3Blobs) -> None:
        self._store = store
        self._unfinished: list[Future[None]] = []
        self._failure: BaseException | None = None

    def begin(self, upload: Callable[[], None], slots: threading.BoundedSemaphore) -> None:
        """Begin an upload after waiting for a slot. Raises what another one has failed by."""
        self.check()
        self._unfinished = [future for future in self._unfinished if not future.done()]
        self._unfinished.append(self._store._submit(partial(self._run, upload), slots))

    def wait(self) -> None:
        """Wait until all have ended, whether well or not."""
        wait(self._unfinished)

    def check(self) -> None:
        """Raises what an upload has failed by."""
        if self._failure is not None:
            raise self._failure

    def _run(self, upload: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                upload()
            except BaseException as failure:
                self._failure = failure


class S3Batch:
    """Blobs that become durable together, put from one thread."""

    def __init__(self, store: S3Blobs) -> None:
        self._store = store
        self._put_at: dict[str, int] = {}
        """What is put, each with a time before its upload by the database's clock, where hosts share the prefix."""

        self._uploads = _Uploads(store)
        self._written = 0

    def put(self, content: bytes) -> str:
        """Store `content`; its digest. Raises OSError where an upload has failed."""
        digest = hashlib.sha256(content).hexdigest()
        if not self._have(digest):
            slots = self._store._small_uploads if len(content) <= CHUNK else self._store._part_uploads
            self._uploads.begin(partial(self._store._put, digest, content), slots)
        return digest

    def put_file(self, fd: int, size: int) -> str:
        """Store the next `size` bytes of `fd`, fewer where it ends before; their digest. Raises OSError."""
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
            self._uploads.check()
            self._store._put_parts(digest, _pieces(read, size, PART))
        return digest

    def put_spooled(self, path: str, digest: str) -> None:
        """Store the file at `path`, which has this digest and never changes. Raises OSError."""
        if self._reuse(digest):
            return  # it may have gigabytes, and mostly it was put just before
        with open(path, "rb", buffering=0) as file:
            if self.put_file(file.fileno(), os.fstat(file.fileno()).st_size) != digest:
                raise OSError(errno.EIO, "a file changed while it was kept")

    def _have(self, digest: str) -> bool:
        """Whether the content needn't be uploaded; else it is about to be. It is protected from sweeps from now on."""
        if self._reuse(digest):
            return True
        self._put_at[digest] = self._store._begin_upload().database_at
        self._written += 1
        return False

    def _reuse(self, digest: str) -> bool:
        """Whether the content needn't be uploaded, and is put by this. It is protected from sweeps from now on."""
        if digest in self._put_at:
            return True
        upload = self._store._protect(digest)
        if upload is None:
            return False
        self._put_at[digest] = upload.database_at
        return True

    def _finish(self) -> None:
        """Raises OSError where an upload has failed."""
        self._uploads.check()
        with self._store._changed:
            # The batch may have taken long, and the row that names these is still to be committed.
            self._store._recent.update(dict.fromkeys(self._put_at, time.time()))
            self._store.written += self._written


def _digest_of(name: str) -> str | None:
    """The digest of the blob that the object of this name belongs to, if it is one's."""
    match = _NAME.fullmatch(name)
    return match and match[1]


def _pieces(read: Callable[[int, int], bytes], size: int, piece: int) -> Iterator[bytes]:
    """Split the first `size` bytes that `read(count, offset)` gives into pieces of `piece` bytes; the last may be
    shorter. Reading ends early where the file does."""
    offset = 0
    while offset < size:
        length = min(piece, size - offset)
        content = read(length, offset)
        while content and len(content) < length and (more := read(length - len(content), offset + len(content))):
            content += more
        if not content:
            return
        yield content
        offset += len(content)


def check_bucket(url: str, store_id: Path) -> None:
    """Find out whether a bucket can be used by the installation whose id is kept in `store_id`, if it has one yet.
    Nothing is written. Raises NotReady, Conflict where the prefix is another installation's, BadRequest for a bad
    `url`."""
    named = parse(url)
    try:
        owner = _owner_in(Bucket(url, _PATIENCE).briefly())
    except OSError as error:
        where = f"s3://{named.bucket}/{named.prefix} at {named.endpoint or 'AWS'}"
        raise NotReady(
            f"{where} can't be used ({error.strerror}): correct ERA_BLOBS and AWS_…, or start the S3 server."
        ) from None
    if owner is not None and (not store_id.exists() or owner != store_id.read_text().strip()):
        raise _anothers()


def _owner_in(bucket: Bucket) -> str | None:
    """Whose the prefix of a bucket is; None for nobody's. Raises OSError."""
    try:
        return bucket.get(_OWNER).decode(errors="replace")
    except FileNotFoundError:
        return None


def _anothers() -> Conflict:
    return Conflict(
        "The blob store's bucket and prefix belong to another installation of ERA.",
        hint="Choose another prefix. If the data directory was restored, restore its file `store-id`, too.",
    )


def installation(file: Path) -> str:
    """The id of this installation, kept in `file`, which is made at the first call."""
    if not file.exists():
        draft = file.with_suffix(".new")
        with draft.open("w") as opened:
            opened.write(secrets.token_hex(16))
            opened.flush()
            os.fsync(opened.fileno())
        draft.rename(file)
        sync(os.fspath(file.parent))
    return file.read_text().strip()
