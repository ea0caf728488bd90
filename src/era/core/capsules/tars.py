"""Tar archives of plain files, written and read without ever holding one.

What is read is far less than what tar can say: files by short names, one after the other, and nothing else. An archive
that has anything more (links, devices, long names, sparse files) isn't one that a capsule could be.
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
    """An archive that can't be read. The message completes the sentence "the archive …"."""


class Entry(NamedTuple):
    """A file in an archive: where its content lies."""

    name: str
    offset: int
    size: int


def header(name: str, size: int, mtime: int) -> bytes:
    """What comes before a file's content."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = size, mtime
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def padding(size: int) -> bytes:
    """What comes after a file's content."""
    return bytes(-size % BLOCK)


END = bytes(2 * BLOCK)


def length(sizes: Iterator[int]) -> int:
    """How long an archive of files of these sizes is."""
    return sum(BLOCK + size + -size % BLOCK for size in sizes) + len(END)


def entries(fd: int) -> Iterator[Entry]:
    """The files of the archive open as `fd`. Raises TarProblem, at the latest at its end."""
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
    block = os.pread(fd, BLOCK, offset)
    if len(block) < BLOCK:
        raise TarProblem("is cut off: it has no end")
    return block


def _parsed(block: bytes) -> tuple[str, int]:
    """Name and size of the file whose header `block` is."""
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
    text, _, rest = field.partition(b"\0")
    if any(rest) or not text.isascii():
        raise TarProblem("has a name that no file of a capsule has")
    return text.decode("ascii")


def _number(field: bytes, what: str) -> int:
    found = _OCTAL.fullmatch(field)
    if found is None:
        raise TarProblem(f"has a {what} that isn't a number")
    return int(found[1], 8)
