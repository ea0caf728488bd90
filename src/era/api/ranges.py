"""Range requests: the header Range, for a single range of bytes (RFC 9110, 14.2)."""

from __future__ import annotations

import re

from era.errors import RangeNotSatisfiable

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


def requested_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The range that a Range header asks for, of a body of `size` bytes: its start and its end (exclusive).

    None means the whole body. As HTTP allows, so does a header that is invalid or asks for several ranges. Raises
    RangeNotSatisfiable for a range that begins beyond the end.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise RangeNotSatisfiable(f"'{header}' is not a part of {size} bytes.", size)
    return start, end
