"""Paths of files as clients write them: relative, `/` between the parts, UTF-8.

They name entries of tree objects and never reach a file system from here, so a bad one could do no harm. It is refused
all the same: whoever sends one is wrong about what it means.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from era.core.models import STATE_FILE
from era.errors import BadRequest

type Parts = tuple[str, ...]
"""The names that lead to a file or directory, as tree objects have them."""

MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255

_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_HINT = "Paths are relative, separated by '/', UTF-8, with no '.', '..' or empty parts."


def bad_path(path: str, problem: str) -> BadRequest:
    return BadRequest(f"The path {path[:80]!r} {problem}.", hint=_HINT, code="bad_path")


def parse(path: str) -> Parts:
    """The parts of a path. Raises BadRequest for one that can't be meant."""
    if len(path.encode(errors="surrogatepass")) > MAX_PATH_BYTES:
        raise bad_path(path, f"is longer than {MAX_PATH_BYTES} bytes")
    parts = tuple(path.split("/"))
    if problem := next(filter(None, map(name_problem, parts)), None):
        raise bad_path(path, problem)
    if "\\" in path:
        raise bad_path(path, "has a backslash; '/' separates its parts")
    if path == STATE_FILE:
        raise state_file()
    return parts


def state_file() -> BadRequest:
    return BadRequest(
        f"'{STATE_FILE}' is no file of the session: it holds 'data'.",
        hint="Read 'data' with GET /api/sessions/{id}, change it with PATCH /api/sessions/{id}.",
        code="bad_path",
    )


def name_problem(name: str) -> str | None:
    """Why this can't be the name of a file or directory, or None."""
    if not name:
        return "is absolute, empty or has an empty part"
    if name in (".", ".."):
        return f"has a part '{name}'"
    if "\0" in name:
        return "has a NUL"
    if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        return f"has a part of more than {MAX_NAME_BYTES} bytes"
    return None


def from_url(escaped: bytes) -> Parts:
    """The parts of a path as it stands in a URL. Raises BadRequest, also where a second decoding would reveal what
    must not be: something between the client and here takes it for one that was decoded already."""
    if _BAD_ESCAPE.search(escaped):
        raise bad_path(escaped.decode("latin-1"), "has a '%' that is no escape; '%25' means '%'")
    try:
        path = unquote_to_bytes(escaped).decode()
    except UnicodeDecodeError:
        raise bad_path(escaped.decode("latin-1"), "is not UTF-8") from None
    parts = parse(path)
    again = path
    while (decoded := unquote_to_bytes(again).decode(errors="replace")) != again:
        again = decoded
        if "\\" in again or len(again.split("/")) != len(parts) or any(map(name_problem, again.split("/"))):
            raise bad_path(path, "is encoded twice")
    return parts
