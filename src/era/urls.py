"""Paths of the API's routes, as its clients write them."""

from __future__ import annotations

from urllib.parse import quote


def session_path(session_id: str) -> str:
    """The path of a session's routes, whatever characters its id has."""
    return f"/api/sessions/{_quoted(session_id, safe='')}"


def file_path(session_id: str, path: str) -> str:
    """The path of a session's file."""
    return f"{session_path(session_id)}/files/{_quoted(path)}"


def _quoted(text: str, safe: str = "/") -> str:
    """`text` as part of a URL's path. HTTP clients would resolve `.` and `..` before they call: a session's id of `.`
    would name all sessions, and a file's path could lead to anything else. The server refuses both as names."""
    dots = {".": "%2E", "..": "%2E%2E"}
    return "/".join(dots.get(part, part) for part in quote(text, safe=safe).split("/"))
