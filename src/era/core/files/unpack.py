"""Readers of tar and tar.gz archives that may be hostile; zip is in unzip.py.

The standard library's readers trust what archives say about themselves: a header of a few bytes can make them allocate
gigabytes, and a damaged header in the middle passes for the end. So these are our own. They read an archive from front
to end, in memory independent of its size, and yield its members. Anything invalid raises BadArchive. Bounds are for the
caller to apply: it gets each member's size before its content is read.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from era.errors import BadRequest

type Kind = Literal["file", "dir", "link"]
type Format = Literal["tar", "tar.gz", "zip"]

PIECE = 1 << 20
_COMPRESSED_PIECE = 1 << 15
"""What is read at once to be decompressed. The rest of it is copied at the end of each gzip member."""

_BLOCK = 512
_MAX_HEADER = 1 << 20
_MAX_HEADERS = 16
MAX_TRAILER = 1 << 20
_MAX_GZIP_MEMBERS, _GZIP_MEMBER_BYTES = 1000, 512
"""A gzip file may have so many members, and one more for each so many bytes of content: an empty one of 20 bytes takes
as long to begin as a thousand bytes take to be decompressed."""

_SECOND = 1_000_000_000
_EARLIEST, _LATEST = -(1 << 31), (1 << 34) - (1 << 31) - 1
"""The times that common file systems can store, in seconds since 1970."""

_DECIMAL = re.compile(rb"(-?)(\d{1,20})(?:\.(\d*))?")
_NUMBER = re.compile(rb"\d{1,19}")
_REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class BadArchive(BadRequest):
    """An archive that is damaged or can't be unpacked here."""

    code = "bad_archive"
    hint = "Nothing was changed. Send a tar, tar.gz or zip of plain files, directories and links within it."


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive. Bytes of `name` and `target` that aren't UTF-8 are lone surrogates."""

    name: str
    kind: Kind
    mode: int | None
    mtime_ns: int
    size: int = 0
    target: str = ""
    content: Callable[[], Iterator[bytes]] = field(default=lambda: iter(()), repr=False)
    """Pieces of exactly `size` bytes in all. They must be read, if at all, before the next member."""


def format_of(fd: int) -> Format | None:
    """The format of an archive, told from its first bytes; None for anything else."""
    head = os.pread(fd, _BLOCK, 0)
    if head.startswith(b"\x1f\x8b"):
        return "tar.gz"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if len(head) == _BLOCK and (not any(head) or _header(head) is not None):
        return "tar"
    return None


class Source(Protocol):
    """A stream of bytes to read an archive from."""

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end."""
        ...


class PlainSource:
    """The content of a file, from its start."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0

    def read(self, size: int) -> bytes:
        piece = os.pread(self._fd, size, self._at)
        self._at += len(piece)
        return piece


class GzipSource:
    """The decompressed content of a gzip file, which may have several members. Decompressed only as far as it is read.

    Raises BadArchive for damaged data.
    """

    def __init__(self, fd: int) -> None:
        self._source = PlainSource(fd)
        self._expander = zlib.decompressobj(31)
        self._compressed = b""
        self._has_more = False
        self._ready = bytearray()
        self._members = self._expanded = 0

    def read(self, size: int) -> bytes:
        while len(self._ready) < size and self._expand():
            pass
        piece = bytes(self._ready[:size])
        del self._ready[:size]
        return piece

    def _expand(self) -> bool:
        """Decompress up to PIECE more bytes. Returns False at the end. Raises BadArchive."""
        if self._expander.eof:
            self._compressed = self._expander.unused_data or self._source.read(_COMPRESSED_PIECE)
            if not self._compressed:
                return False
            self._members += 1
            if self._members > _MAX_GZIP_MEMBERS + self._expanded // _GZIP_MEMBER_BYTES:
                raise BadArchive("The archive has too many gzip members for its content.")
            self._expander = zlib.decompressobj(31)
        if not self._compressed and not self._has_more:
            self._compressed = self._source.read(_COMPRESSED_PIECE)
            if not self._compressed:
                raise BadArchive("The archive is cut off: its compressed data ends early.")
        try:
            expanded = self._expander.decompress(self._compressed, PIECE)
        except zlib.error:
            raise BadArchive("The archive is damaged: its compressed data can't be read.") from None
        self._has_more = len(expanded) == PIECE
        self._ready += expanded
        self._expanded += len(expanded)
        self._compressed = self._expander.unconsumed_tail
        return True


class ExactReader:
    """Reads from a source, and raises BadArchive where it ends early."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def read(self, size: int) -> bytes:
        """Exactly the next `size` bytes. Raises BadArchive."""
        content = self._source.read(size)
        while len(content) < size:
            if not (more := self._source.read(size - len(content))):
                raise BadArchive("The archive is cut off: it ends in the middle.")
            content += more
        return content

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, in pieces."""
        while size > 0:
            piece = self.read(min(size, PIECE))
            size -= len(piece)
            yield piece


@dataclass(slots=True)
class _Extended:
    """Values from the extended headers before a member, which override those of its own header."""

    name: bytes | None = None
    target: bytes | None = None
    size: int | None = None
    mtime_ns: int | None = None


def tar_members(source: Source) -> Iterator[Member]:
    """The members of a tar archive, whether of pax, ustar, GNU or old form. Raises BadArchive."""
    reader = ExactReader(source)
    extended, headers = _Extended(), 0
    while any(block := reader.read(_BLOCK)):
        info = _header(block)
        headers += 1
        if info is None:
            raise BadArchive("The archive is damaged: a header can't be read.")
        if headers > _MAX_HEADERS:
            raise BadArchive(f"The archive has more than {_MAX_HEADERS} headers for one member.")
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
            records = _records(_padded(reader, info.size))
            if info.type != tarfile.XGLTYPE:
                extended = _extended(records)
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            extended.name = _padded(reader, info.size).rstrip(b"\0")
        elif info.type == tarfile.GNUTYPE_LONGLINK:
            extended.target = _padded(reader, info.size).rstrip(b"\0")
        else:
            yield from _member(reader, info, extended)
            extended, headers = _Extended(), 0
    _check_trailer(source)


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The parsed header of a member; None for an invalid one."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return info if info.size >= 0 else None


def _member(reader: ExactReader, info: tarfile.TarInfo, extended: _Extended) -> Iterator[Member]:
    """Yield one member; when resumed, skip what the caller hasn't read of it. Raises BadArchive for other kinds."""
    name = info.name if extended.name is None else _text(extended.name)
    target = info.linkname if extended.target is None else _text(extended.target)
    size = info.size if extended.size is None else extended.size
    mtime_ns = _time(int(info.mtime) * _SECOND) if extended.mtime_ns is None else extended.mtime_ns
    member = Member(name, "file", info.mode & 0o777, mtime_ns)
    if info.isdir():
        yield replace(member, kind="dir")  # whose size, like a link's, says of no content that follows
    elif info.issym():
        yield replace(member, kind="link", target=target)
    elif info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        content = reader.pieces(size)
        yield replace(member, size=size, content=lambda: content)
        for _ in content:  # skip what the caller hasn't read
            pass
        reader.read(-size % _BLOCK)
    else:
        what = _REFUSED.get(info.type, "of a kind that is not known")
        raise BadArchive(f"The archive has '{_shown(name)}', which is {what}.")


def _padded(reader: ExactReader, size: int) -> bytes:
    """The content of an extended header; its padding is skipped. Raises BadArchive."""
    if size > _MAX_HEADER:
        raise BadArchive("The archive has a header of more than 1 MiB.")
    return reader.read(size + -size % _BLOCK)[:size]


def _records(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The records of a pax header as pairs of name and value. Each is written as `LENGTH name=value` and a newline."""
    at = 0
    while at < len(block):
        digits = block[at : at + 20].partition(b" ")[0]
        length = int(digits) if _NUMBER.fullmatch(digits) else 0
        record = block[at : at + length]
        name, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or len(record) != length or not record.endswith(b"\n"):
            raise BadArchive("The archive is damaged: an extended header can't be read.")
        yield name, value
        at += length


def _extended(records: Iterator[tuple[bytes, bytes]]) -> _Extended:
    """The values of a pax header that matter here. Raises BadArchive for invalid ones, and for sparse files."""
    extended = _Extended()
    for name, value in records:
        if name == b"path":
            extended.name = value
        elif name == b"linkpath":
            extended.target = value
        elif name == b"size":
            if not _NUMBER.fullmatch(value):
                raise BadArchive("The archive is damaged: a size can't be read.")
            extended.size = int(value)
        elif name == b"mtime":
            extended.mtime_ns = _exact_time(value)
        elif name.startswith(b"GNU.sparse."):
            raise BadArchive("The archive has a sparse file.")
    return extended


def _exact_time(value: bytes) -> int:
    """A decimal number of seconds since 1970, in nanoseconds. Raises BadArchive."""
    if not (match := _DECIMAL.fullmatch(value)):
        raise BadArchive("The archive is damaged: a time can't be read.")
    sign, seconds, fraction = match.groups()
    nanoseconds = int(seconds) * _SECOND + int((fraction or b"")[:9].ljust(9, b"0"))
    return _time(-nanoseconds if sign else nanoseconds)


def _time(nanoseconds: int) -> int:
    """The nearest time that common file systems can store."""
    return min(max(nanoseconds, _EARLIEST * _SECOND), _LATEST * _SECOND)


def _check_trailer(source: Source) -> None:
    """Read the padding after the end, so that the checksum of a compressed archive is verified. Raises BadArchive."""
    left = MAX_TRAILER
    while left > 0 and (piece := source.read(min(left, 1 << 16))):
        left -= len(piece)
    if left <= 0:
        raise BadArchive("The archive goes on after its end.")


def link_leads_out(depth: int, target: str) -> bool:
    """Whether a symbolic link in a directory `depth` levels below the top may lead out of the tree.

    `..` parts are allowed only at the beginning of a target: there they go through real directories, and not through
    other links.
    """
    parts = target.split("/")
    up = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    return not target or target.startswith("/") or up > depth or ".." in parts[up:]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _shown(name: str) -> str:
    return name[:200].encode(errors="surrogateescape").decode(errors="replace")
