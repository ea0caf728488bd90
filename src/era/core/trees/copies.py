"""Copies of files: with their holes, which read as zeros and take no disk; and of content that is put aside, to be
stored while the files change again."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

from era.core.trees import trees
from era.core.trees.blob_store import BlobBatch
from era.core.trees.trees import Changed, File, Tree, WorkspaceFull

_FICLONE = 0x40049409  # linux/fs.h
_WORTH_SHARING = 1 << 16


def extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """The bytes of the file open as `fd` from `start` up to `end`, both offsets in bytes, as (offset, length, is_data).

    The extents come in order, without gaps, and end where the file does. A file system that knows nothing of holes has
    one extent of data, as lseek(2) has it. The descriptor's own position moves.
    """
    end = min(end, os.fstat(fd).st_size)
    while start < end:
        try:
            data = min(os.lseek(fd, start, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end  # the rest is a hole
        if data > start:
            yield start, data - start, False
        if data < end:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            yield data, hole - data, True
            data = hole
        start = data


def copy(content: int, fd: int, size: int) -> None:
    """Copy `size` bytes, all that the file open as `content` has, into the empty file open as `fd`. They share blocks
    where the file system can do that (ioctl_ficlone(2)), until one of them is written to; else holes stay holes. Raises
    OSError."""
    if _shared(content, fd, size):
        return
    for offset, length, is_data in extents(content, 0, size):
        if is_data:
            os.lseek(fd, offset, os.SEEK_SET)
            while length > 0 and (sent := os.sendfile(fd, content, offset, length)):
                offset, length = offset + sent, length - sent
    os.ftruncate(fd, size)


def copy_changing(content: int, fd: int, status: os.stat_result) -> None:
    """The same for a file that may change meanwhile, whose `status` was this: the copy ends where the file does by
    then. Where that had no holes, the copy has none either: what is cut off while it is read would look like one.
    Raises OSError."""
    size = status.st_size
    if status.st_blocks * 512 < size:
        copy(content, fd, size)
        return
    if _shared(content, fd, size):
        return
    offset = 0
    while offset < size and (sent := os.sendfile(fd, content, offset, size - offset)):
        offset += sent


def _shared(content: int, fd: int, size: int) -> bool:
    """Have the empty file `fd` share the blocks of another one, if it is large enough for that and the file system can.
    Returns whether it does."""
    if size < _WORTH_SHARING:
        return False
    try:
        fcntl.ioctl(fd, _FICLONE, content)
    except OSError:
        return False  # this file system can't, or these are two
    return True


_SMALL = 64 << 10
"""Bytes up to which content is put aside in memory."""

_IN_MEMORY = 16 << 20
"""Bytes that are put aside in memory, of one working directory."""

_numbers = count()


class ContentCopies:
    """The content of files of one tree. Larger files are copies in a directory, which share blocks with the originals
    where the file system can do that. `close` it at the end."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        """`most_bytes` is what the tree may hold at most."""
        self._directory, self._most_bytes = directory, most_bytes
        self._room = 0
        self._contents: dict[int, bytes | str] = {}
        """By the identity of the tree's files: the content itself, or the path of the copy."""

        self._in_memory = 0

    def put_tree(self, fd: int, tree: Tree, *, still: bool) -> None:
        """Put aside all files without a digest in the directory open as `fd`, which was scanned as `tree`. Where it
        isn't `still`, what is gone by now is taken out of the tree, and the rest becomes what it is now: files may have
        grown since the scan, so the bounds hold again. Raises Changed, WorkspaceFull, OSError."""
        self.close()  # of an attempt that was given up
        self._room = self._most_bytes - tree.totals.total_bytes
        self._put_below(fd, tree, still=still)

    def _put_below(self, fd: int, tree: Tree, *, still: bool) -> None:
        for name, file in list(tree.files.items()):
            if file.digest is None:
                try:
                    with trees.opened(fd, name, file.fingerprint.mode) as content:
                        self._put(content, file, still=still)
                except (OSError, Changed) as error:
                    _check_gone(error, still=still)
                    del tree.files[name]
        for name, child in list(tree.trees.items()):
            if child.digest is None:
                try:
                    with trees.opened(fd, name, stat.S_IFDIR | child.mode) as below:
                        self._put_below(below, child, still=still)
                except (OSError, Changed) as error:
                    _check_gone(error, still=still)
                    del tree.trees[name]
        if not still:
            tree.update_totals()

    def _put(self, fd: int, file: File, *, still: bool) -> None:
        status = os.fstat(fd)
        if status.st_ino != file.fingerprint.inode:
            raise Changed
        size = status.st_size
        if still and size != file.fingerprint.size:
            raise Changed
        self._take_room(size - file.fingerprint.size)
        if size <= _SMALL and self._in_memory + size <= _IN_MEMORY:
            content = b"".join(iter(lambda: os.read(fd, _SMALL), b"")) if still else _read(fd, size)
            self._in_memory += len(content)
            self._contents[id(file)] = content
            size = len(content)
        else:
            path = f"{self._directory}/aside-{next(_numbers)}"
            made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._contents[id(file)] = path
            with trees.closing(made):
                if still:
                    copy(fd, made, size)
                else:
                    copy_changing(fd, made, status)
                copied = os.fstat(made).st_size
                self._take_room(copied - size)  # it may have grown again
                size = copied
        if not still:
            file.fingerprint = trees.fingerprint(os.fstat(fd))._replace(size=size)

    def _take_room(self, more: int) -> None:
        """Note that a file has so many bytes more than was known. Raises WorkspaceFull."""
        self._room -= more
        if self._room < 0:
            raise WorkspaceFull(f"the working directory holds more than {self._most_bytes} bytes")

    def store_files(self, tree: Tree, known: Tree | None, batch: BlobBatch) -> None:
        """Put into a batch what was put aside of a tree's files, and set their digests. `known` is the tree at the scan
        before. Raises OSError."""
        for name, file in tree.files.items():
            if file.digest is None:
                self._store_file(file, known.files.get(name) if known else None, batch)
        for name, child in tree.trees.items():
            if child.digest is None:
                self.store_files(child, known.trees.get(name) if known else None, batch)

    def _store_file(self, file: File, known: File | None, batch: BlobBatch) -> None:
        content = self._contents.pop(id(file))
        if isinstance(content, bytes):
            digest = hashlib.sha256(content).hexdigest()
        else:
            with trees.closing(os.open(content, os.O_RDONLY | os.O_CLOEXEC)) as fd:
                digest = trees.digest_of(fd)
        if known is not None and known.digest == digest and known.fingerprint == file.fingerprint:
            file.digest = digest  # stored already; and whoever has put it, nobody has changed it
        elif isinstance(content, bytes):
            file.digest = batch.put(content)
            file.uploaded = trees.is_still_uploaded(file, digest, known)
        else:
            batch.put_spooled(content, digest)
            file.digest = digest
            file.uploaded = trees.is_still_uploaded(file, digest, known)
        if isinstance(content, str):
            os.unlink(content)

    def close(self) -> None:
        """Remove the copies that are left. Blocks: large ones take long."""
        for content in self._contents.values():
            if isinstance(content, str):
                with suppress(FileNotFoundError):
                    os.unlink(content)
        self._contents.clear()
        self._in_memory = 0


def _check_gone(error: OSError | Changed, *, still: bool) -> None:
    """Raise `error`, unless things change and it says that something is gone or another thing by now."""
    if still or (isinstance(error, OSError) and error.errno not in trees.GONE):
        raise error


def _read(fd: int, size: int) -> bytes:
    """The first `size` bytes, or fewer if it ends before."""
    content = bytearray()
    while len(content) < size and (piece := os.read(fd, size - len(content))):
        content += piece
    return bytes(content)
