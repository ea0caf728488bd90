"""Checks of a data directory: whether its rows and its blobs agree, and what can be put right.

It may be checked while its server runs; collections of garbage are held off meanwhile (see backup.py). It is repaired
only while none does, and a repair loses nothing: a blob of other content than its name says is moved aside to
`damaged/`, where it can't pass for the true one any more (content that is stored already isn't stored again), and
what is missing is brought back from a backup, if one is given, after its digest was verified.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from era.core.files.durable import sync
from era.operation import contents
from era.operation.backup import held_off
from era.operation.contents import Advance

ASIDE = "damaged"
_CHUNK = 500

_ROWS_WITHOUT_VERSION = (
    "SELECT id FROM sessions WHERE NOT EXISTS "
    "(SELECT 1 FROM versions WHERE session_key = sessions.key AND n = sessions.version)"
)
_WHO = (
    ("snapshot_root", "SELECT s.id || ' version ' || v.n FROM versions v JOIN sessions s ON s.key = v.session_key"),
    ("environment", "SELECT id || ' packages' FROM sessions"),
    *(
        (
            column,
            "SELECT s.id || ' output of ' || r.id FROM outputs o JOIN sessions s ON s.key = o.session_key "
            "JOIN runs r ON r.key = o.run_key",
        )
        for column in ("stdout_digest", "stderr_digest", "piece_order_digest", "cell_digest")
    ),
    ("digest", "SELECT 'storage of ' || owner || ', ' || kind || ' ' || namespace FROM storage_items"),
)
"""Which rows name a digest in a column, as texts for people."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong. `what` is a path in the data directory; `affects` are the sessions and versions, runs and
    namespaces that need it."""

    what: str
    why: str
    affects: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """What a check found. `repaired` says what was done."""

    content: str = "here"
    """`here`, or `s3` where blobs are in a bucket and weren't looked at."""

    blobs: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"ok": not self.problems, **asdict(self)}


def check(
    directory: Path, progress: Callable[[int], Advance], *, repair: bool = False, backup: Path | None = None
) -> Report:
    """Check a data directory, and with `repair` put right what can be; then the problems are those that are left.

    To repair, the caller holds the data directory's lock. Raises NotFound where there is no such data directory,
    Conflict for rows in PostgreSQL or of another version, OSError, sqlite3.Error.
    """
    directory = directory.resolve()
    database = directory / contents.DATABASE
    contents.check_rows_are_here(directory)
    rows = [Problem(contents.DATABASE, why) for why in _row_problems(database)]
    if (directory / contents.STORE_ID).exists():
        return Report("s3", problems=rows)
    with held_off(directory):
        report, bad = _examine(directory, progress)
        while repair and bad and (done := list(_repair(directory, bad, backup))):
            repaired = [*report.repaired, *done]
            report, bad = _examine(directory, progress)  # a tree that is back may name more that is missing
            report.repaired = repaired
        report.problems = [*rows, *_told(database, bad)]
    return report


@dataclass(frozen=True, slots=True)
class _Bad:
    """Blobs that are missing or damaged, with why, and all trees and blobs from which they are reached."""

    why: dict[str, str]
    above: dict[str, set[str]]

    def __bool__(self) -> bool:
        return bool(self.why)


def _examine(directory: Path, progress: Callable[[int], Advance]) -> tuple[Report, _Bad]:
    """Read every blob that rows need."""
    found = contents.walk(contents.named(directory / contents.DATABASE), directory)
    why = dict(found.problems)
    paths = {digest: contents.blob_path(digest) for digest in sorted(found.needed)}
    report = Report("here", len(paths), contents.sizes(directory, paths.values()))
    advance = progress(report.bytes)
    for digest, path in paths.items():
        if digest in why:
            continue
        try:
            if contents.digest_of(directory / path, advance) != digest:
                why[digest] = "has other content than its name says"
        except FileNotFoundError:
            why[digest] = "is missing"
        except OSError as error:
            why[digest] = f"can't be read: {error.strerror}"
    return report, _Bad(why, {digest: found.reaches({digest}) for digest in why})


def _row_problems(database: Path) -> Iterator[str]:
    """What is wrong with the rows themselves."""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True, timeout=60)) as connection:
        for (said,) in connection.execute("PRAGMA quick_check").fetchall():
            if said != "ok":
                yield f"is damaged: {said}"
        for table, row, other, _ in connection.execute("PRAGMA foreign_key_check").fetchall():
            yield f"has a row of {table} ({row}) whose row of {other} is missing"
        for (session,) in connection.execute(_ROWS_WITHOUT_VERSION).fetchall():
            yield f"has a session {session} whose current version is missing"


def _told(database: Path, bad: _Bad) -> Iterator[Problem]:
    """The problems, with who is affected."""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True, timeout=60)) as connection:
        for digest, why in sorted(bad.why.items()):
            affects: list[str] = []
            names = sorted(bad.above[digest])
            for start in range(0, len(names), _CHUNK):
                some = names[start : start + _CHUNK]
                marks = ",".join("?" * len(some))
                for column, query in _WHO:
                    rows = connection.execute(f"{query} WHERE {column} IN ({marks})", some)
                    affects += [text for (text,) in rows.fetchall() if text not in affects]
            yield Problem(contents.blob_path(digest), why, affects)


def _repair(directory: Path, bad: _Bad, backup: Path | None) -> Iterator[str]:
    """Move what is damaged aside, bring back what the backup has. Yields what was done."""
    for digest in sorted(bad.why):
        path = contents.blob_path(digest)
        if (directory / path).exists():
            (directory / ASIDE).mkdir(mode=0o700, exist_ok=True)
            (directory / path).rename(directory / ASIDE / digest)
            sync(directory / ASIDE)
            sync((directory / path).parent)
            yield f"{path} was moved to {ASIDE}/"
        if backup is not None and _bring_back(directory, backup, digest):
            yield f"{path} was brought back from the backup"


def _bring_back(directory: Path, backup: Path, digest: str) -> bool:
    """Copy a blob from a backup; whether that has it, undamaged. Raises OSError."""
    path = contents.blob_path(digest)
    draft = directory / "blobs" / "incoming" / f"repair-{digest}"
    draft.unlink(missing_ok=True)
    if not (backup / path).is_file():
        return False
    try:
        if contents.copy(backup / path, draft)[0] != digest:
            return False
        sync(draft)
        (directory / path).parent.mkdir(mode=0o700, exist_ok=True)
        os.rename(draft, directory / path)
        sync((directory / path).parent)
        return True
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()
