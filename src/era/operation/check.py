"""Checks of a data directory: whether its rows and its blobs agree, and what can be put right.

It may be checked while its server runs; collections of garbage are held off meanwhile (see backup.py). It is repaired
only while none does, and a repair loses nothing: a blob of other content than its name says is moved aside to
`damaged/`, where it can't pass for the true one any more (content that is stored already isn't stored again), and
what is missing is brought back from a backup, if one is given, after its digest was verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, bindparam, text

from era.operation import server_data
from era.operation.server_data import ASIDE, Advance, Content, ServerData, Walk, blob_path, is_damaged

_CHUNK = 10_000
"""Digests in one query. No column has an index for them, so each query reads a whole table."""

_ROWS_WITHOUT_VERSION = (
    "SELECT id FROM sessions WHERE NOT EXISTS "
    "(SELECT 1 FROM versions WHERE session_key = sessions.key AND n = sessions.version)"
)
_WHO = (
    ("snapshot_root", "s.id || ' version ' || v.n", "versions v JOIN sessions s ON s.key = v.session_key"),
    ("environment", "id || ' packages'", "sessions"),
    *(
        (
            column,
            "s.id || ' output of ' || r.id",
            "outputs o JOIN sessions s ON s.key = o.session_key JOIN runs r ON r.key = o.run_key",
        )
        for column in ("stdout_digest", "stderr_digest", "piece_order_digest", "cell_digest")
    ),
    ("digest", "'storage of ' || owner || ', ' || kind || ' ' || namespace", "storage_items"),
)
"""Which rows name a digest in a column: their texts for people, and the tables that they are in."""


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
    """Where it is: `here` in the data directory, or `s3`; `skipped` where it wasn't looked at."""

    blobs: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"ok": not self.problems, **asdict(self)}


def check(
    server: ServerData,
    progress: Callable[[int], Advance],
    *,
    repair: bool = False,
    backup: Path | None = None,
    without_content: bool = False,
) -> Report:
    """Check a server's data, and with `repair` put right what can be; then the problems are those that are left.
    Content in S3 may be left out.

    To repair, the caller holds the data directory's lock. Raises NotFound where there is no such data directory,
    NotReady for rows that are elsewhere, Conflict for those of another version or content in S3 that isn't named,
    Unavailable, OSError, sqlite3.Error.
    """
    with server.reading() as found:
        rows = [Problem(server_data.DATABASE, why) for why in _row_problems(found)]
    if without_content and server.is_in_s3:
        return Report("skipped", problems=rows)
    with server.alone() if repair else nullcontext(), server.content() as content, content.held_off():
        report, bad = _examine(server, content, progress)
        tried: set[str] = set()
        while repair and (left := bad.repairable - tried):
            tried |= left
            repaired = [*report.repaired, *_repair(server.directory, content, bad, left, backup)]
            report, bad = _examine(server, content, progress)  # a tree that is back may name more that is missing
            report.repaired = repaired
        with server.reading() as found:
            report.problems = [*rows, *_told(found, bad)]
    return report


@dataclass(frozen=True, slots=True)
class _Bad:
    """Blobs that are missing or damaged, with why."""

    why: dict[str, str]
    walk: Walk
    """By which they were found."""

    damaged: set[str]
    """Those that are there, and not what they should be."""

    @property
    def repairable(self) -> set[str]:
        """All but what has the content of its name: no other could be brought back."""
        return {digest for digest, why in self.why.items() if why != server_data.NO_LIST}


def _examine(server: ServerData, content: Content, progress: Callable[[int], Advance]) -> tuple[Report, _Bad]:
    """Read every blob that rows need."""
    with server.reading() as rows:
        names = server_data.named(rows)
    found = server_data.walk(names, content)
    why = dict(found.problems)
    sizes = content.sizes(found.needed)
    report = Report("s3" if server.is_in_s3 else "here", len(found.needed), sum(sizes.values()))
    advance = progress(report.bytes)
    for digest in content.expect(sorted(found.needed - why.keys())):
        try:
            if server_data.digest_of(content.open(digest), advance) != digest:
                why[digest] = server_data.DAMAGED
        except FileNotFoundError:
            why[digest] = "is missing"
        except OSError as error:
            why[digest] = server_data.DAMAGED if is_damaged(error) else f"can't be read: {error.strerror}"
    return report, _Bad(why, found, {digest for digest in why if digest in sizes})


def _row_problems(rows: Connection) -> Iterator[str]:
    """What is wrong with the rows themselves."""
    if rows.dialect.name == "sqlite":  # PostgreSQL sees to this itself
        for (said,) in rows.execute(text("PRAGMA quick_check")).all():
            if said != "ok":
                yield f"is damaged: {said}"
        for table, row, other, _ in rows.execute(text("PRAGMA foreign_key_check")).all():
            yield f"has a row of {table} ({row}) whose row of {other} is missing"
    for (session,) in rows.execute(text(_ROWS_WITHOUT_VERSION)).all():
        yield f"has a session {session} whose current version is missing"


def _told(rows: Connection, bad: _Bad) -> Iterator[Problem]:
    """The problems, with who is affected."""
    above = bad.walk.above()
    who = _named_by(rows, server_data.reaching(bad.why, above))
    for digest, why in sorted(bad.why.items()):
        naming = sorted(server_data.reaching([digest], above) & who.keys())
        affects = dict.fromkeys(each for name in naming for each in who[name])
        yield Problem(blob_path(digest), why, list(affects))


def _named_by(rows: Connection, digests: set[str]) -> dict[str, list[str]]:
    """The rows that name these digests, as texts, by digest."""
    who: dict[str, list[str]] = {}
    for some in batched(sorted(digests), _CHUNK):
        for column, called, tables in _WHO:
            query = text(f"SELECT {column}, {called} FROM {tables} WHERE {column} IN :digests")  # noqa: S608 - constants
            found = rows.execute(query.bindparams(bindparam("digests", expanding=True)), {"digests": some})
            for digest, each in found:
                who.setdefault(digest, []).append(each)
    return who


def _repair(directory: Path, content: Content, bad: _Bad, digests: set[str], backup: Path | None) -> Iterator[str]:
    """Move what is damaged of these aside, bring back what the backup has. Yields what was done."""
    for digest in sorted(digests):
        path = blob_path(digest)
        if digest in bad.damaged:
            (directory / ASIDE).mkdir(mode=0o700, exist_ok=True)
            content.put_aside(digest, directory / ASIDE)
            yield f"{path} was moved to {ASIDE}/"
        if backup is not None and _bring_back(directory, content, backup, digest):
            yield f"{path} was brought back from the backup"


def _bring_back(directory: Path, content: Content, backup: Path, digest: str) -> bool:
    """Store a blob of a backup; whether that has it, undamaged. Raises OSError."""
    path = blob_path(digest)
    draft = directory / f"repair-{digest}"
    draft.unlink(missing_ok=True)
    if not (backup / path).is_file():
        return False
    try:
        if server_data.copy(backup / path, draft)[0] != digest:
            return False
        content.put(draft, digest)
        return True
    finally:
        draft.unlink(missing_ok=True)
