"""Writes a snapshot as a tar, tar.gz or zip archive, in pieces, with memory independent of the size of its files."""

from __future__ import annotations

import os
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator

from era.core.trees import trees
from era.core.trees.diffs import ReadTree
from era.core.trees.edits import Entry, walk
from era.core.trees.paths import Parts
from era.core.trees.tree_objects import name_bytes
from era.core.trees.unpack import PIECE

type OpenBlob = Callable[[str], int]
"""Opens a blob by its digest; the descriptor is the caller's to close."""

_SECOND = 1_000_000_000
_RECORD = 20 * 512  # tar archives are padded to a multiple of this
_FAST = 1
"""The compression level that keeps up with a disk. A client that wants a smaller archive can compress it again."""

_SENT = 256 << 10
_ZIP_FIRST, _ZIP_LAST = (1980, 1, 1, 0, 0, 0), (2107, 12, 31, 23, 59, 58)  # the dates that zip can express


def tar_pieces(read: ReadTree, open_blob: OpenBlob, root: str | None, made_at: int) -> Iterator[bytes]:
    """A tar archive of a tree. Snapshots keep no times of directories, so they get `made_at` (seconds since 1970)."""
    written = 0
    for path, entry in walk(read, root):
        for piece in _tar_entry(open_blob, path, entry, made_at):
            written += len(piece)
            yield piece
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(written + end) % _RECORD)


def _tar_entry(open_blob: OpenBlob, path: Parts, entry: Entry, made_at: int) -> Iterator[bytes]:
    """A member: its header, content and padding."""
    info = tarfile.TarInfo("/".join(path))
    mtime_ns = made_at * _SECOND
    match entry:
        case "file", _, digest, size, mode, mtime_ns, *_:
            info.size, info.mode = size, mode
        case "link", _, target, mtime_ns:
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, target, 0o777
        case "dir", _, _, mode:
            info.type, info.mode = tarfile.DIRTYPE, mode
    info.mtime = max(mtime_ns // _SECOND, 0)
    if mtime_ns % _SECOND or mtime_ns < 0:
        sign = "-" if mtime_ns < 0 else ""
        info.pax_headers = {"mtime": f"{sign}{abs(mtime_ns) // _SECOND}.{abs(mtime_ns) % _SECOND:09d}"}
    yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    if info.isreg():
        yield from blob_pieces(open_blob, digest, info.size)
        yield bytes(-info.size % tarfile.BLOCKSIZE)


def blob_pieces(open_blob: OpenBlob, digest: str, size: int) -> Iterator[bytes]:
    """The content of a file. Raises OSError where the blob has fewer than `size` bytes."""
    with trees.closing(open_blob(digest)) as fd:
        while size > 0 and (piece := os.read(fd, min(size, PIECE))):
            size -= len(piece)
            yield piece
    if size:
        raise OSError(5, "a file is not as long as it was")


def gzip_pieces(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """`pieces`, compressed as one gzip file."""
    packer = zlib.compressobj(_FAST, wbits=31)
    for piece in pieces:
        yield packer.compress(piece)
    yield packer.flush()


def zip_pieces(read: ReadTree, open_blob: OpenBlob, root: str | None, made_at: int) -> Iterator[bytes]:
    """A zip archive of a tree, whose names must be UTF-8. Its central directory is held in memory until the end."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[call-overload]  # it only writes
        for path, entry in walk(read, root):
            info, content = _zip_entry(open_blob, path, entry, made_at)
            with archive.open(info, "w") as file:
                for piece in content:
                    file.write(piece)
                    yield from sink.take()
            yield from sink.take()
    yield from sink.take()


def _zip_entry(open_blob: OpenBlob, path: Parts, entry: Entry, made_at: int) -> tuple[zipfile.ZipInfo, Iterable[bytes]]:
    """The header and the content of a member, with Unix modes and a timestamp extra field (0x5455)."""
    name, seconds = "/".join(path), made_at
    content: Iterable[bytes] = ()
    size = 0
    match entry:
        case "file", _, digest, size, mode, mtime_ns, *_:
            kind, seconds = stat.S_IFREG | mode, mtime_ns // _SECOND
            content = blob_pieces(open_blob, digest, size)
        case "link", _, target, mtime_ns:
            kind, seconds = stat.S_IFLNK | 0o777, mtime_ns // _SECOND
            content = [name_bytes(target)]
        case _:
            kind, name = stat.S_IFDIR | entry[3], f"{name}/"
    info = zipfile.ZipInfo(name, min(max(_date(seconds), _ZIP_FIRST), _ZIP_LAST))
    info.create_system = 3
    info.external_attr = kind << 16 | (0x10 if name.endswith("/") else 0)
    info.compress_type = zipfile.ZIP_DEFLATED if size else zipfile.ZIP_STORED
    info.file_size = size
    if -(1 << 31) <= seconds < 1 << 31:
        info.extra = struct.pack("<HHBl", 0x5455, 5, 1, seconds)
    return info, content


def _date(seconds: int) -> tuple[int, int, int, int, int, int]:
    """The date in UTC of a time in seconds since 1970. Extreme times are cut off: gmtime fails on them."""
    year, month, day, hour, minute, second, *_ = time.gmtime(min(max(seconds, 0), 1 << 33))
    return year, month, day, hour, minute, second


class _Sink:
    """A write-only file that keeps its content in memory until it is taken."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, piece: bytes) -> int:
        self._pieces.append(bytes(piece))
        return len(piece)

    def flush(self) -> None:
        pass

    def take(self) -> list[bytes]:
        pieces, self._pieces = self._pieces, []
        return pieces


def larger_pieces(pieces: Iterable[bytes]) -> Generator[bytes]:
    """`pieces` joined into fewer, larger ones, since each piece costs a hop through a thread and a send."""
    gathering: list[bytes] = []
    size = 0
    for piece in pieces:
        gathering.append(piece)
        size += len(piece)
        if size >= _SENT:
            yield b"".join(gathering)
            gathering, size = [], 0
    if gathering:
        yield b"".join(gathering)
