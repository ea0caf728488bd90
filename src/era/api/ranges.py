"""Parts of a body: the Range header, for one range of bytes."""

from __future__ import annotations

import re

from fastapi import Request, Response

from era.errors import RangeNotSatisfiable

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


def wanted_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The first byte and the one after the last that `header` asks for of `size`; None is all of them.

    As HTTP has it, a header that makes no sense or asks for several ranges counts as none. Raises RangeNotSatisfiable.
    """
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found[1], found[2]
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise RangeNotSatisfiable(f"'{header}' is not a part of {size} bytes.", size)
    return start, end


def part_of(request: Request, content: bytes, media_type: str, headers: dict[str, str]) -> Response:
    """`content`, or the part of it that the request asks for."""
    headers = {"Accept-Ranges": "bytes", **headers}
    wanted = wanted_range(request.headers.get("range"), len(content))
    if wanted is None:
        return Response(content, 200, headers, media_type)
    start, end = wanted
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
    return Response(content[start:end], 206, headers, media_type)
