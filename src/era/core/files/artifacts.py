"""Artifacts: the pictures, documents and tables among the files that a run has written.

A file's type is told from the ending of its name, by a table of our own and not the machine's, so that runs are
answered alike wherever they run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

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
"""Media types by the ending of a name, in lower case."""

MOST = 100
_MAX_PATH_CHARACTERS = 32 << 10
"""What all paths of a list may take together, as JSON: each run's record holds such a list."""


def list_artifacts(files: Iterable[FileChange]) -> JsonObject:
    """The artifacts among `files`, as a run's record holds them.

    Returns `{"files": [{"type", "path", "size"}, …], "more": N}`, where N counts those beyond the bounds; without any
    artifact, `{}`. Hidden files and those in hidden directories don't count.
    """
    artifacts: list[JsonObject] = []
    more, room = 0, _MAX_PATH_CHARACTERS
    for file in files:
        kind = _type_of(file.path)
        if kind is None:
            continue
        path = file.path.encode(errors="surrogateescape").decode(errors="replace")
        needed = len(json.dumps(path))
        if len(artifacts) == MOST or needed > room:
            more += 1
            continue
        room -= needed
        artifacts.append({"type": kind, "path": path, "size": file.size})
    return {"files": artifacts, "more": more} if artifacts or more else {}


def _type_of(path: str) -> str | None:
    """The media type of an artifact; None for a file that is none."""
    name, dot, ending = path.rpartition(".")
    if not dot or not name or name.endswith("/") or path.startswith(".") or "/." in path:
        return None
    return TYPES.get(ending.lower())
