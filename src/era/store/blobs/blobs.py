"""Blobs in files on the local disk, by the SHA-256 of their content.

Theory of operation. `DIR/ab/abcd…` holds the bytes whose SHA-256 is `abcd…`; a name that exists is complete and never
changes. New content is written to `DIR/incoming` first. When a batch ends, its files are made durable, then renamed,
then the directories that got a name are made durable: three steps for the whole batch, because one journal commit of
the file system serves any number of files that wait for it together. A batch that fails leaves at worst content that
no row names, which a later sweep removes. A directory `ab` is made before it first gets a name, and its own name made
durable: to make all 256 when a server starts for the first time would take up to a second.

The kernel may find out at any time that it can't write something, and tells only who asks by a descriptor that was open
then: it forgets a file that nobody has open, and tells of the file system whoever asks first. So a batch keeps its
files open until they are durable, or, where they are many, has had a descriptor of the file system from its beginning.

Content that is stored already isn't written again; its modification time is set to now instead. `sweep` removes only
what isn't to be kept *and* has not been put for a while, and looks at the time again under the lock that a put holds,
so content just put can't be swept before the row that names it is committed. A batch may take longer than that while:
what is put in it counts as put when it ends, and nothing put since the oldest batch in progress began is swept. The
same goes for the time from a put until its row is committed, or never will be: whoever puts says how long that takes
(`naming`). So a sweep needs no guess at it where no other process puts, and can come early where the disk fills.

Another process that needs all blobs to stay for a while shares a lock of `DIR`; nothing is swept meanwhile.

A name is visible to other batches a moment before its directory is durable. A batch that relies on such a name makes
that directory durable, too (`_unsynced`); `open` does so for all names, as an earlier process may have been killed at
that moment.

Hosts of a cluster share the directory. What one of them removes under its lock is locked against the others by a file,
and a batch makes the names durable that it relies on, whoever gave them. Their own clocks may be hours apart, so all
times here are by the database's (`time`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import resource
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from era.core.models import seconds_ahead
from era.core.trees.copies import extents
from era.core.trees.durable import sync, sync_file_system

CHUNK = 1 << 20
"""Content of up to this many bytes is hashed in memory before it is written; larger content while it is copied."""

_ZEROS = memoryview(bytes(CHUNK))
_FEW = 256
"""More new files than this are made durable by one sync of the file system, which is then ten times faster."""

_MOST_OPEN, _MOST_OF_DESCRIPTORS, _IN_USE = 4 * _FEW, 1 / 16, 1 / 2
"""New files that all batches together keep open, and no more than such a part of the descriptors that the process may
have; none where about such a part of them is in use. A batch that needs more has the file system synced."""

_ROUGHNESS = 2.0
"""Seconds by which a file's time may be older than it was set to: some file systems store even seconds only."""

_LONG_SECONDS = 10.0
"""After a batch that took longer than this, the times of all its content are set again. Whoever relies on that later,
without `naming`, counts from its end (core/files/archives.py)."""

_LOCK_SECONDS = 90.0
"""For how long another host may keep the lock, which it has for a moment only. One that hangs with it is killed by who
watches over it before that (cluster/host_process.py), and then what waits is kept."""

_LEAST_PAUSE, _MOST_PAUSE = 0.001, 0.02
"""Seconds between two looks whether it is free."""

_MOST_GARBAGE = 4 << 30
_LEAST_GARBAGE = 64 << 20
"""More than this is collected early, or than an eighth of what is free where that lies between."""

_BLOCK = 512
"""The unit of `st_blocks`, in bytes."""

_SHARDS = tuple(f"{number:02x}" for number in range(256))
"""The directories, named by the first two digits of the digests in them."""


class LocalBlobs:
    """A BlobStore in one directory, which belongs to one process at a time, or to the hosts of a cluster. `open` before
    anything."""

    def __init__(self, directory: Path, host: str = "") -> None:
        """`host` names this host of a cluster, the same after every start; empty where no other process puts blobs."""
        self._host = host
        self._directory = os.fspath(directory)
        self._incoming = f"{self._directory}/incoming"
        self._lock = threading.Lock()
        self._sweeping = threading.Lock()
        """Sweeps come one after the other, since the lock that they take against other processes can't be shared."""

        self._shards: set[str] = set()
        """The directories `ab` whose own names this process knows to be durable."""

        self._unsynced: set[str] = set()
        """Digests whose names may not be durable yet."""

        self._between_hosts: int | None = None
        """The descriptor of the file that locks what hosts of a cluster remove against what they put."""

        self._numbers = count()
        self._closed = False
        self._in_progress: dict[object, tuple[float, float]] = {}
        """When each batch in progress began, or who puts what isn't named yet, in seconds since 1970 and by the
        monotonic clock: where the first has been set back meanwhile, the other tells."""

        self._marking = threading.Lock()
        """For these and `_kept_open` alone: the event loop takes it, and must not wait until a file is removed."""

        self._kept_open = 0
        """How many files batches keep open."""

        self.last_put = time.time()
        """When a batch last ended, in seconds since 1970; or now, as an earlier process may just have put something."""

        self.written = 0
        """How many blobs this process has written."""

        self.written_bytes = 0
        """How many bytes of the disk they took."""

    def open(self) -> None:
        """Make the directories, and remove what a killed process left half written. Raises OSError."""
        make_directory(Path(self._directory))
        Path(self._incoming).mkdir(mode=0o700, exist_ok=True)
        for leftover in os.listdir(self._incoming):
            if leftover.startswith(self._host):
                os.unlink(f"{self._incoming}/{leftover}")
        if self._host:
            self._between_hosts = os.open(f"{self._incoming}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        shards = self._found_shards()
        for shard in shards:
            sync(self._shard(shard))
        sync(self._directory)
        self._shards.update(shards)

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """What is put within is durable once the block has ended; if it raises, nothing was put. Raises OSError."""
        batch = Batch(self)
        try:
            with self.naming():
                yield batch
                batch._finish()
        finally:
            self.last_put = self.time()
            batch._clean_up()

    def time(self) -> float:
        return time.time() + seconds_ahead()

    @contextmanager
    def naming(self) -> Iterator[None]:
        token = object()
        with self._marking:
            self._in_progress[token] = (self.time(), time.monotonic())
        try:
            yield
        finally:
            with self._marking:
                del self._in_progress[token]

    def unnamed_since(self) -> float | None:
        if self._host:
            return None
        return self._oldest_in_progress(self.time())

    def _oldest_in_progress(self, otherwise: float) -> float:
        """When the oldest that is in progress began, or `otherwise` where that is earlier."""
        with self._marking:
            apart = self.time() - time.monotonic()
            return min([otherwise, *(min(at, ticks + apart) - _ROUGHNESS for at, ticks in self._in_progress.values())])

    def is_crowded(self, garbage: int) -> bool:
        if self._host or garbage < _LEAST_GARBAGE:
            return False
        try:
            room = os.statvfs(self._directory)
        except OSError:
            return False
        return garbage >= min(_MOST_GARBAGE, max(_LEAST_GARBAGE, room.f_bavail * room.f_frsize // 8))

    def get(self, digest: str) -> bytes:
        """The content of a blob. Raises FileNotFoundError."""
        return Path(self._path(digest)).read_bytes()

    def open_blob(self, digest: str) -> int:
        """A descriptor to read a blob from, which the caller closes. Raises FileNotFoundError."""
        return os.open(self._path(digest), os.O_RDONLY | os.O_CLOEXEC)

    def renew(self, digest: str) -> bool:
        return self._reuse(digest) is not None

    def hold(self) -> None:
        """None: what was put lately stays, so it is enough to `renew` that again and again."""

    def expect(self, digests: Iterable[str]) -> None:
        """Does nothing: blobs on the local disk needn't be fetched ahead."""

    def hurry(self) -> None:
        """Does nothing: what fails on the local disk isn't repeated."""

    def close(self) -> None:
        """Make a sweep in progress return early."""
        self._closed = True
        if self._between_hosts is not None:
            with self._lock:
                os.close(self._between_hosts)
                self._between_hosts = None

    def sweep(self, keep: set[str], older_than: float) -> int:
        """Remove blobs that aren't in `keep` and were last put before `older_than`, by the clock of `time`; how many.

        Raises BlockingIOError, and removes nothing more, while a backup reads the blobs or another host hangs.
        """
        with self._sweeping, self._alone():
            return self._sweep(keep, older_than)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the lock of the directory, which other processes share that need all of it to stay (see
        operation/backup.py)."""
        lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(errno.EAGAIN, "a backup or a check is under way") from None
            yield
        finally:
            os.close(lock)

    def _sweep(self, keep: set[str], older_than: float) -> int:
        removed = 0
        older_than = self._oldest_in_progress(older_than)
        for shard in self._found_shards():
            if self._closed:
                break
            for name in os.listdir(self._shard(shard)):
                if name not in keep and self._remove_if_old(name, older_than):
                    removed += 1
        return removed

    def _remove_if_old(self, digest: str, older_than: float) -> bool:
        """Remove a blob last put before `older_than`, looking under the lock that puts hold. Returns whether it was
        removed."""
        path = self._path(digest)
        with self._staying(), suppress(FileNotFoundError):  # Another sweep may have removed it.
            # After `close` the lock no longer keeps other hosts off.
            if not self._closed and os.stat(path).st_mtime < older_than:
                os.unlink(path)
                return True
        return False

    def _found_shards(self) -> list[str]:
        return [shard for shard in _SHARDS if os.path.isdir(self._shard(shard))]

    def _make_shards(self, shards: set[str]) -> None:
        """Make those of these directories that are missing, and the names of all of them durable."""
        if not (new := shards - self._shards):
            return
        for shard in new:
            Path(self._shard(shard)).mkdir(mode=0o700, exist_ok=True)
        sync(self._directory)
        self._shards.update(new)

    def _shard(self, digest: str) -> str:
        return f"{self._directory}/{digest[:2]}"

    def _path(self, digest: str) -> str:
        return f"{self._directory}/{digest[:2]}/{digest}"

    def _reuse(self, digest: str) -> bool | None:
        """Count stored content as put now. True where its name is durable, False where it isn't yet, None where no such
        content is stored."""
        with self._staying():
            try:
                _set_time(self._path(digest))
            except FileNotFoundError:
                return None
            return not self._host and digest not in self._unsynced

    @contextmanager
    def _staying(self) -> Iterator[None]:
        """Nobody else puts or removes anything within the block. Raises BlockingIOError where another host keeps the
        lock: one that is stopped with it, as by SIGSTOP, would else stop all others, too."""
        until, pause = time.monotonic() + _LOCK_SECONDS, _LEAST_PAUSE
        while True:
            with self._lock:  # not while it waits, as `close` needs it, too
                if self._try_lock():
                    try:
                        yield
                    finally:
                        if self._between_hosts is not None:
                            fcntl.flock(self._between_hosts, fcntl.LOCK_UN)
                    return
            if time.monotonic() > until:
                raise BlockingIOError(errno.EAGAIN, "another host that shares the directory hangs")
            time.sleep(pause)
            pause = min(2 * pause, _MOST_PAUSE)

    def _try_lock(self) -> bool:
        """Lock the directory against other hosts, where there are any; false while one of them has it."""
        if self._between_hosts is None:
            return True
        try:
            fcntl.flock(self._between_hosts, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _may_keep_open(self, fd: int) -> bool:
        """Count another file that a batch keeps open, if there may be one. Each descriptor is the lowest that is free,
        so that of the file says roughly how many there are."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _MOST_OPEN
        if limit != resource.RLIM_INFINITY:
            most = min(int(limit * _MOST_OF_DESCRIPTORS), most) if fd < limit * _IN_USE else 0
        with self._marking:
            may = self._kept_open < most
            self._kept_open += may
        return may

    def _new_name(self) -> str:
        """A path for content that is not complete yet."""
        return f"{self._incoming}/{self._host}{next(self._numbers)}"


class Batch:
    """Blobs that become durable together, put from one thread."""

    def __init__(self, store: LocalBlobs) -> None:
        """Raises OSError. To be cleaned up in any case."""
        self._store = store
        self._file_system = os.open(store._incoming, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._began = time.time(), time.monotonic()
        self._new: dict[str, str] = {}
        """The temporary file of each blob that wasn't stored before, by digest."""

        self._open: dict[str, int] = {}
        """The descriptors of these files, as long as there are few."""

        self._has_many = False
        """Whether they are too many, so that none is kept open."""

        self._reused: set[str] = set()
        """Digests that were stored before."""

        self._relied_on: set[str] = set()
        """Digests whose names this batch has to make durable."""

        self._unfinished: str | None = None
        """The temporary file that was begun last."""

    def put(self, content: bytes) -> str:
        """Store `content`; its digest."""
        digest = hashlib.sha256(content).hexdigest()
        if not self._have(digest):
            with self._temporary() as (fd, path):
                _write(fd, content)
            self._new[digest] = path
        return digest

    def put_file(self, fd: int, size: int) -> str:
        """Store the next `size` bytes of `fd`, fewer where it ends before; their digest."""
        if size <= CHUNK:
            return self.put(_read(fd, size))
        hasher, start = hashlib.sha256(), os.lseek(fd, 0, os.SEEK_CUR)
        with self._temporary() as (copy, path):
            for offset, length, is_data in extents(fd, start, start + size):
                if is_data:
                    _copy(fd, offset, length, copy, hasher)
                else:  # it must be hashed, but neither read nor written
                    _hash_zeros(hasher, length)
                    os.lseek(copy, length, os.SEEK_CUR)
            os.ftruncate(copy, os.lseek(copy, 0, os.SEEK_CUR))
        digest = hasher.hexdigest()
        if self._have(digest):
            self._close(path)
            os.unlink(path)
        else:
            self._new[digest] = path
        return digest

    def put_spooled(self, path: str, digest: str) -> None:
        """Store the file at `path`, which has this digest and never changes. It is linked where that works."""
        if self._have(digest):
            return
        name = self._unfinished = self._store._new_name()
        try:
            os.link(path, name)
        except OSError:  # Another file system, or one without hard links.
            with open(path, "rb", buffering=0) as file:
                self.put_file(file.fileno(), os.fstat(file.fileno()).st_size)
        else:
            self._keep_open(name, os.open(name, os.O_RDONLY | os.O_CLOEXEC))
            self._new[digest] = name

    def _have(self, digest: str) -> bool:
        """Whether the content is stored, or will be with this batch. What is stored counts as put now."""
        if digest in self._new:
            return True
        durable = self._store._reuse(digest)
        if durable is not None:
            self._reused.add(digest)
        if durable is False:
            self._relied_on.add(digest)
        return durable is not None

    @contextmanager
    def _temporary(self) -> Iterator[tuple[int, str]]:
        """A new temporary file: its descriptor, for the block, and its path."""
        path = self._unfinished = self._store._new_name()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield fd, path
            if len(self._new) < _FEW:
                # Starts writing to the disk now; `_finish` then waits for all files at once.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except BaseException:
            os.close(fd)
            raise
        self._keep_open(path, fd)

    def _keep_open(self, path: str, fd: int) -> None:
        """Keep a new file open until it is durable; or close it, and all of them, where they are too many."""
        if not self._has_many and len(self._open) < _FEW and self._store._may_keep_open(fd):
            self._open[path] = fd
            return
        os.close(fd)
        self._has_many = True
        for other in list(self._open):
            self._close(other)

    def _close(self, path: str) -> None:
        """Close a new file, if it is kept open."""
        if (fd := self._open.pop(path, None)) is not None:
            with self._store._marking:
                self._store._kept_open -= 1
            os.close(fd)

    def _make_durable(self) -> None:
        """Make all content durable. Raises OSError, also for what couldn't be written since the batch began."""
        if self._has_many:
            sync_file_system(self._file_system)
        for path, fd in list(self._open.items()):
            os.fsync(fd)
            self._close(path)

    def _finish(self) -> None:
        """Make all content durable, then name it, then make the names durable."""
        store = self._store
        self._make_durable()
        taken = sum(os.stat(path).st_blocks * _BLOCK for path in self._new.values())
        with store._lock:
            store._unsynced.update(self._new)
            store.written += len(self._new)
            store.written_bytes += taken
        self._relied_on.update(self._new)
        shards = {digest[:2] for digest in self._relied_on}
        store._make_shards(shards)
        for digest, path in list(self._new.items()):
            # Under the lock, and not before: content of this name may have been put by another batch meanwhile, and
            # its time must not fall back.
            with store._staying():
                _set_time(path)
                os.rename(path, store._path(digest))
            del self._new[digest]
        for shard in sorted(shards):
            sync(store._shard(shard))
        with store._lock:
            store._unsynced -= self._relied_on
        began, ticks = self._began
        if max(time.time() - began, time.monotonic() - ticks) > _LONG_SECONDS:  # a clock may be set
            # Of new content too: to make names durable may take a slow disk longer than all before it.
            for digest in self._reused | self._relied_on:
                if store._reuse(digest) is None:
                    raise OSError(errno.EIO, "content was removed while it was put")

    def _clean_up(self) -> None:
        """Remove temporary files that got no name, and close all that is open."""
        os.close(self._file_system)
        for path in list(self._open):
            with suppress(OSError):
                self._close(path)
        for path in (*self._new.values(), *filter(None, [self._unfinished])):
            with suppress(FileNotFoundError):
                os.unlink(path)


def make_directory(directory: Path) -> None:
    """Make a directory and its parents, and sync them: a file is no more durable than the names on the path to it."""
    if not directory.exists():
        make_directory(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
    with suppress(PermissionError):  # It isn't ours, so it was there before.
        sync(os.fspath(directory.parent))


def _set_time(path: str) -> None:
    """Set a file's times to now. Not by the kernel's own clock for that, which is a tick behind."""
    now = time.time_ns() + int(seconds_ahead() * 1e9)
    os.utime(path, ns=(now, now))


def _read(fd: int, size: int) -> bytes:
    """The next `size` bytes of `fd`, fewer where it ends before."""
    pieces = []
    while size > 0 and (piece := os.read(fd, size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _write(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def _copy(source: int, offset: int, length: int, target: int, hasher: hashlib._Hash) -> None:
    """Append bytes of one file to another and to what is hashed. Raises OSError where there are fewer."""
    end = offset + length
    while offset < end:
        piece = os.pread(source, min(end - offset, CHUNK), offset)
        if not piece:
            raise OSError(errno.EIO, "a file ended while it was read")
        hasher.update(piece)
        _write(target, piece)
        offset += len(piece)


def _hash_zeros(hasher: hashlib._Hash, length: int) -> None:
    while length > 0:
        hasher.update(_ZEROS[:length])
        length -= len(_ZEROS)
