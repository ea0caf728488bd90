"""Paths of files in requests: relative, parts separated by `/`, UTF-8.

They name entries of tree objects and never reach a file system, so a bad one could do no harm. It is refused all the
same, because it can't mean what its sender thinks.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from era.core.models import STATE_FILE
from era.errors import BadRequest

type Parts = tuple[str, ...]
"""A path as a tuple of names; bytes that aren't UTF-8 are lone surrogates, as in tree objects."""

MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255

ROOT = ("", ".", "./")
"""How a request names the working directory itself."""

_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_HINT = "Paths are relative, separated by '/', UTF-8, with no '.', '..' or empty parts."


def bad_path(path: str, problem: str) -> BadRequest:
    return BadRequest(f"The path {path[:80]!r} {problem}.", hint=_HINT, code="bad_path")


def parse(path: str) -> Parts:
    """The parts of a path. Raises BadRequest for one that is invalid, or begins with the
    state file's name."""
    if len(path.encode(errors="surrogatepass")) > MAX_PATH_BYTES:
        raise bad_path(path, f"is longer than {MAX_PATH_BYTES} bytes")
    parts = tuple(path.split("/"))
    if problem := next(filter(None, map(name_problem, parts)), None):
        raise bad_path(path, problem)
    if "\\" in path:
        raise bad_path(path, "has a backslash; '/' separates its parts")
    if parts[0] == STATE_FILE:  # nor is there anything below it: a directory of that name gives way to the state
        raise state_file()
    return parts


def parse_place(path: str) -> Parts:
    """The parts of the path of a directory or file, none for the working directory itself. Raises as `parse` does."""
    return () if path in ROOT else parse(path)


def state_file() -> BadRequest:
    """The error for the path of the state file, which isn't one of the session's files."""
    return BadRequest(
        f"'{STATE_FILE}' is no file of the session: it holds 'data'.",
        hint="Read 'data' with GET /api/sessions/{id}, change it with PATCH /api/sessions/{id}.",
        code="bad_path",
    )


def name_problem(name: str) -> str | None:
    """What is wrong with the name of a file or directory, to complete "The path …"; None for a valid one."""
    if not name:
        return "is absolute, empty or has an empty part"
    if name in (".", ".."):
        return f"has a part '{name}'"
    if "\0" in name:
        return "has a NUL"
    if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        return f"has a part of more than {MAX_NAME_BYTES} bytes"
    return None


def from_url(escaped: bytes, *, root: bool = False) -> Parts:
    """The parts of a percent-encoded path. With `root` it may be that of the working directory itself, of no parts.

    Raises BadRequest for an invalid one, also where it would become invalid if it were decoded again: then it was
    encoded twice, and some proxy may have checked another path than the one that we see.
    """
    if _BAD_ESCAPE.search(escaped):
        raise bad_path(escaped.decode("latin-1"), "has a '%' that is no escape; '%25' means '%'")
    try:
        path = unquote_to_bytes(escaped).decode()
    except UnicodeDecodeError:
        raise bad_path(escaped.decode("latin-1"), "is not UTF-8") from None
    if root and path in ROOT:
        return ()
    parts = parse(path)
    again = path
    while (decoded := unquote_to_bytes(again).decode(errors="replace")) != again:
        again = decoded
        if "\\" in again or len(again.split("/")) != len(parts) or any(map(name_problem, again.split("/"))):
            raise bad_path(path, "is encoded twice")
    return parts
