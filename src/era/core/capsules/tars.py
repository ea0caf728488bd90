"""Tar archives of plain files, written and read piece by piece.

The reader accepts far less than tar can express: files with short names, one after the other. An archive with anything
else (links, devices, long names, sparse files) can't be a capsule.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
_CHUNK = 1 << 20
_OCTAL = re.compile(rb" *([0-7]{1,12})[ \0]*")
_PLAIN_FILE = (b"0", b"\0")


class TarProblem(ValueError):
    """An archive that can't be read. The message completes the sentence "It …"."""


class Entry(NamedTuple):
    """A file in an archive: the offset and size in bytes of its content."""

    name: str
    offset: int
    size: int


def header(name: str, size: int, mtime: int) -> bytes:
    """The header of a file (512 bytes). `mtime` is in seconds since 1970."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = size, mtime
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def padding(size: int) -> bytes:
    """The padding after a file's content."""
    return bytes(-size % BLOCK)


END = bytes(2 * BLOCK)
"""The blocks that end an archive."""


def length(sizes: Iterator[int]) -> int:
    """The length in bytes of an archive of files of these sizes."""
    return sum(BLOCK + size + -size % BLOCK for size in sizes) + len(END)


def entries(fd: int) -> Iterator[Entry]:
    """The files of the archive open as `fd`. Raises TarProblem, at the latest after the last one."""
    total = os.fstat(fd).st_size
    offset = 0
    while any(block := _block(fd, offset)):
        name, size = _parsed(block)
        start = offset + BLOCK
        offset = start + size + -size % BLOCK
        if offset > total:
            raise TarProblem(f"ends in the middle of {name!r}")
        if any(os.pread(fd, offset - start - size, start + size)):
            raise TarProblem(f"has something between {name!r} and what comes after it")
        yield Entry(name, start, size)
    if total - offset < len(END):
        raise TarProblem("has no end: the blocks that mark it are missing")
    for at in range(offset, total, _CHUNK):
        if any(os.pread(fd, _CHUNK, at)):
            raise TarProblem("goes on after its end")


def _block(fd: int, offset: int) -> bytes:
    """The block at an offset. Raises TarProblem at the end of the file."""
    block = os.pread(fd, BLOCK, offset)
    if len(block) < BLOCK:
        raise TarProblem("is cut off: it has no end")
    return block


def _parsed(block: bytes) -> tuple[str, int]:
    """Name and size of a file, from its header. Raises TarProblem."""
    if block[257:262] != b"ustar":
        raise TarProblem("is not a tar archive as ERA writes it")
    blanked = block[:148] + b" " * 8 + block[156:]
    if _number(block[148:156], "checksum") != sum(blanked):
        raise TarProblem("is damaged: a header's checksum is wrong")
    name = _text(block[:100])
    if block[156:157] not in _PLAIN_FILE or any(block[157:257]) or any(block[345:500]):
        raise TarProblem(f"has {name!r}, which isn't a plain file with a short name")
    return name, _number(block[124:136], f"size of {name!r}")


def _text(field: bytes) -> str:
    """The ASCII text of a field, which is padded with NULs. Raises TarProblem."""
    text, _, rest = field.partition(b"\0")
    if any(rest) or not text.isascii():
        raise TarProblem("has a name that no file of a capsule has")
    return text.decode("ascii")


def _number(field: bytes, what: str) -> int:
    """The octal number of a field. Raises TarProblem, which names `what` it is."""
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise TarProblem(f"has a {what} that isn't a number")
    return int(match[1], 8)
