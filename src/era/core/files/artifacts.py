"""What a run leaves that people want to see: pictures, documents and tables among the files it wrote.

A file is taken for what its name says it is. A list of our own and not the machine's decides that, so that a run is
answered the same wherever it ran.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from era.core.files.diffs import FileChange
from era.core.models import JsonObject

TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "webp": "image/webp",
    "avif": "image/avif",
    "svg": "image/svg+xml",
    "bmp": "image/bmp",
    "tif": "image/tiff",
    "tiff": "image/tiff",
    "pdf": "application/pdf",
    "html": "text/html",
    "htm": "text/html",
    "csv": "text/csv",
    "tsv": "text/tab-separated-values",
    "parquet": "application/vnd.apache.parquet",
    "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
}
"""By the endings of names, in whatever case."""

MOST = 100
_PATHS = 32 << 10
"""Characters that all paths of one list may take as JSON, since each run's record holds one."""


def listed(files: Iterable[FileChange]) -> JsonObject:
    """Those of `files` that are artifacts: `files`, each its `type`, `path` and `size`, and how many `more` there are.
    Nothing where there are none. What is in a hidden place isn't for people to see."""
    found: list[JsonObject] = []
    more, room = 0, _PATHS
    for file in files:
        kind = _type_of(file.path)
        if kind is None:
            continue
        path = file.path.encode(errors="surrogateescape").decode(errors="replace")
        needed = len(json.dumps(path))
        if len(found) == MOST or needed > room:
            more += 1
            continue
        room -= needed
        found.append({"type": kind, "path": path, "size": file.size})
    return {"files": found, "more": more} if found or more else {}


def can_be_artifacts(value: Any) -> bool:
    """Whether this is what a run's record may hold of them."""
    if value == {}:
        return True
    if not isinstance(value, dict) or value.keys() != {"files", "more"} or not isinstance(value["files"], list):
        return False
    return _is_count(value["more"]) and len(value["files"]) <= MOST and all(map(_is_artifact, value["files"]))


def _type_of(path: str) -> str | None:
    name, dot, ending = path.rpartition(".")
    if not dot or not name or name.endswith("/") or path.startswith(".") or "/." in path:
        return None
    return TYPES.get(ending.lower())


def _is_artifact(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"type", "path", "size"}
        and value["type"] in TYPES.values()
        and isinstance(value["path"], str)
        and _is_count(value["size"])
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
