"""Readers of tar, tar.gz and zip archives that may be hostile.

The standard library's readers trust what archives say about themselves: a header of a few bytes can make them allocate
gigabytes, and a damaged header in the middle passes for the end. So these are our own. They read an archive from front
to end, in memory independent of its size, and yield its members. Anything invalid raises BadArchive. Bounds are for the
caller to apply: it gets each member's size before its content is read.

The format of zip: PKWARE's APPNOTE.TXT; the timestamp and the names of fields are Info-ZIP's. Only the central
directory is believed, and content is checked against it.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import tarfile
import zlib
from calendar import timegm
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

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


_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_RECORD = struct.Struct("<4s2B5H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 0xFFFF
_UNIX = 3
_ENCRYPTED, _UTF_8 = 0x1, 0x800
_STORED, _DEFLATED = 0, 8
_EXTRA_64, _EXTRA_TIME = 1, 0x5455


class _Record(NamedTuple):
    """A member's record in the central directory."""

    name: str
    mode: int
    """st_mode of stat(2); 0 if the archive wasn't made on Unix."""

    mtime: int
    """Seconds since 1970."""

    method: int
    crc: int
    compressed: int
    """Size in bytes before decompression."""

    size: int
    at: int
    """Offset of the member's local header."""


def zip_members(fd: int) -> Iterator[Member]:
    """The members of a zip archive. Raises BadArchive."""
    at, length = _directory(fd)
    end, left = at + length, os.fstat(fd).st_size
    while at < end:
        record, size = _record(fd, at)
        at += size
        left -= record.compressed
        if left < 0:  # some are read again and again
            raise BadArchive("The archive is damaged: its members overlap.")
        yield _zip_member(fd, record)
    if at != end:
        raise _damaged()


def _directory(fd: int) -> tuple[int, int]:
    """Offset and length of the central directory. Raises BadArchive."""
    length = os.fstat(fd).st_size
    first = max(0, length - _LONGEST_COMMENT - _END.size)
    tail = os.pread(fd, length - first, first)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise BadArchive("The archive is cut off: it has no directory.")
    _, disk, first_disk, _, count, size, start, _ = _END.unpack_from(tail, at)
    end = first + at
    if 0xFFFF in (disk, first_disk, count) or 0xFFFFFFFF in (size, start):
        end, size, start = _directory_64(fd, end)
    if start + size > end:
        raise _damaged()
    return start, size


def _directory_64(fd: int, end: int) -> tuple[int, int, int]:
    """From the Zip64 records before `end`: the offset of their start, and length and offset of the directory."""
    mark, _, at, _ = _LOCATOR_64.unpack(_exactly(fd, end - _LOCATOR_64.size, _LOCATOR_64.size))
    if mark != b"PK\x06\x07":
        raise _damaged()
    mark, *_, size, start = _END_64.unpack(_exactly(fd, at, _END_64.size))
    if mark != b"PK\x06\x06":
        raise _damaged()
    return at, size, start


def _record(fd: int, start: int) -> tuple[_Record, int]:
    """The record at offset `start` of the central directory, and its length. Raises BadArchive."""
    fields = _RECORD.unpack(_exactly(fd, start, _RECORD.size))
    mark, _, system, _, flags, method, time, date, crc, compressed, size, *lengths = fields[:14]
    name_size, extra_size, comment_size = lengths
    attributes, at = fields[-2:]
    if mark != b"PK\x01\x02":
        raise _damaged()
    rest = _exactly(fd, start + _RECORD.size, name_size + extra_size)
    name, extra = _name(rest[:name_size], flags), _extra(rest[name_size:])
    if "\\" in name:
        raise BadArchive(f"The archive's name '{name[:200]}' has a backslash; '/' separates its parts.")
    if flags & _ENCRYPTED:
        raise BadArchive(f"The archive has '{name[:200]}', which is encrypted.")
    wide = iter(struct.unpack_from(f"<{len(extra.get(_EXTRA_64, b'')) // 8}Q", extra.get(_EXTRA_64, b"")))
    size, compressed, at = [next(wide, -1) if value == 0xFFFFFFFF else value for value in (size, compressed, at)]
    if size < 0 or compressed < 0:
        raise _damaged()
    mode = attributes >> 16 if system == _UNIX else 0
    record = _Record(name, mode, _zip_time(extra.get(_EXTRA_TIME, b""), date, time), method, crc, compressed, size, at)
    return record, _RECORD.size + len(rest) + comment_size


def _name(raw: bytes, flags: int) -> str:
    """A name as UTF-8, or else as code page 437, zip's original encoding. Raises BadArchive."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        if flags & _UTF_8:
            raise BadArchive("The archive has a name that is not UTF-8, though it says so.") from None
        return raw.decode("cp437")


def _extra(block: bytes) -> dict[int, bytes]:
    """The extra fields of a record, by id."""
    fields = {}
    while len(block) >= 4:
        kind, size = struct.unpack_from("<2H", block)
        fields[kind] = block[4 : 4 + size]
        block = block[4 + size :]
    return fields


def _zip_time(extended: bytes, date: int, time: int) -> int:
    """Seconds since 1970, from the timestamp extra field, or else from the MS-DOS date and time, taken for UTC."""
    if len(extended) >= 5 and extended[0] & 1:
        return int.from_bytes(extended[1:5], "little", signed=True)
    day = ((date >> 9) + 1980, min(date >> 5 & 15 or 1, 12), date & 31 or 1)
    return timegm((*day, time >> 11, time >> 5 & 63, (time & 31) * 2))


def _zip_member(fd: int, record: _Record) -> Member:
    """The member of a record. Raises BadArchive for what is no file, directory or link."""
    kind = stat.S_IFMT(record.mode)
    is_directory = record.name.endswith("/")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK) or (kind == stat.S_IFDIR) > is_directory:
        raise BadArchive(f"The archive has '{record.name[:200]}', which is no plain file, directory or link.")
    mode = record.mode & 0o777 if record.mode else None
    member = Member(record.name, "file", mode, record.mtime * 1_000_000_000)
    if is_directory:
        return replace(member, kind="dir")
    if kind == stat.S_IFLNK:
        if record.size > 1 << 16:
            raise BadArchive(f"The archive has a link '{record.name[:200]}' that is too long.")
        target = b"".join(_content(fd, record)).decode("utf-8", "surrogateescape")
        return replace(member, kind="link", target=target)
    return replace(member, size=record.size, content=lambda: _content(fd, record))


def _content(fd: int, record: _Record) -> Iterator[bytes]:
    """The content of a member. Raises BadArchive where its size or checksum isn't what the record says."""
    mark, *_, name_size, extra_size = _LOCAL.unpack(_exactly(fd, record.at, _LOCAL.size))
    if mark != b"PK\x03\x04":
        raise _damaged()
    pieces = _compressed(fd, record.at + _LOCAL.size + name_size + extra_size, record.compressed)
    if record.method == _DEFLATED:
        pieces = _expanded(pieces)
    elif record.method != _STORED:
        raise BadArchive(f"The archive has '{record.name[:200]}', which is compressed in another way than deflate.")
    crc = total = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
        total += len(piece)
        if total > record.size:
            raise _damaged()
        yield piece
    if (crc, total) != (record.crc, record.size):
        raise _damaged()


def _compressed(fd: int, at: int, size: int) -> Iterator[bytes]:
    """`size` bytes of the archive from offset `at`, in pieces."""
    while size > 0:
        piece = _exactly(fd, at, min(size, PIECE))
        at += len(piece)
        size -= len(piece)
        yield piece


def _expanded(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Deflated `pieces`, decompressed. Raises BadArchive."""
    expander = zlib.decompressobj(-15)
    try:
        for piece in pieces:
            if expander.eof:
                break
            left, full = piece, True
            while (left or full) and not expander.eof:
                expanded = expander.decompress(left, PIECE)
                left, full = expander.unconsumed_tail, len(expanded) == PIECE
                yield expanded
    except zlib.error:
        raise _damaged() from None
    if not expander.eof:
        raise _damaged()


def _exactly(fd: int, at: int, size: int) -> bytes:
    """`size` bytes of the archive from offset `at`. Raises BadArchive where there are fewer."""
    content = os.pread(fd, size, at) if 0 <= at < 1 << 62 else b""
    if len(content) < size:
        raise BadArchive("The archive is cut off: it ends in the middle.")
    return content


def _damaged() -> BadArchive:
    return BadArchive("The archive is damaged: it is not what its directory says.")
