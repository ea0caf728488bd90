"""Paths of the API's routes, as its clients write them."""

from __future__ import annotations

from urllib.parse import quote


def session_path(session_id: str) -> str:
    """The path of a session's routes, whatever characters its id has."""
    return f"/api/sessions/{quoted(session_id)}"


def file_path(session_id: str, path: str) -> str:
    """The path of a session's file."""
    return f"{session_path(session_id)}/files/{file_part(path)}"


def file_part(path: str) -> str:
    """A file's path as the last part of a route."""
    return quoted(path, safe="/")


def storage_path(kind: str, namespace: str, key: str | None = None) -> str:
    """The path of a namespace of the storage (`kv`, `d1` or `r2`), or of a key in it."""
    return f"/api/storage/{kind}/{quoted(namespace)}" + ("" if key is None else f"/{quoted(key)}")


def quoted(text: str, safe: str = "") -> str:
    """`text` as part of a URL's path. HTTP clients would resolve `.` and `..` before they call: a session's id of `.`
    would name all sessions, and a file's path could lead to anything else. The server refuses both as names."""
    dots = {".": "%2E", "..": "%2E%2E"}
    return "/".join(dots.get(part, part) for part in quote(text, safe=safe).split("/"))
