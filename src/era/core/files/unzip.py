"""A reader of zip archives that may be hostile; see unpack.py for why it is our own.

The format: PKWARE's APPNOTE.TXT; the timestamp and the names of fields are Info-ZIP's. Only the central directory is
believed, and content is checked against it.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from calendar import timegm
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from era.core.files.unpack import PIECE, BadArchive, Member

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
        yield _member(fd, record)
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
    record = _Record(name, mode, _time(extra.get(_EXTRA_TIME, b""), date, time), method, crc, compressed, size, at)
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


def _time(extended: bytes, date: int, time: int) -> int:
    """Seconds since 1970, from the timestamp extra field, or else from the MS-DOS date and time, taken for UTC."""
    if len(extended) >= 5 and extended[0] & 1:
        return int.from_bytes(extended[1:5], "little", signed=True)
    day = ((date >> 9) + 1980, min(date >> 5 & 15 or 1, 12), date & 31 or 1)
    return timegm((*day, time >> 11, time >> 5 & 63, (time & 31) * 2))


def _member(fd: int, record: _Record) -> Member:
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
