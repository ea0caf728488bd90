"""The worker process of d1_databases.py, which runs programs' SQL: a line of JSON in, an answer of a few lines out.

Theory of operation
===================

*Why a process.* SQL is a program. A sort can want gigabytes, one call of a function can take minutes during which
SQLite can't be interrupted, and an SQLite with a bug would take the service with it. Here memory has a limit, and a
worker that doesn't answer is killed from outside (d1_databases.py); SQLite undoes the killed transaction when the
database is opened next.

*What is allowed.* An authorizer sees each statement before it runs, and refuses what reaches beyond this database:
ATTACH (which VACUUM uses, too), PRAGMAs except a few that describe tables, modules and functions that touch files. It
refuses BEGIN and COMMIT as well: a call is one transaction, all or nothing.

*Bounds.* On statements, values, rows, pages of the database; deadlines, checked every few thousand steps. Exceeding
one is an error, never a truncated answer.

*What is said, and when.* The answer is a line that says how long the result is, and the result as JSON, which the
service passes on as it is; or a line with an error. Before a COMMIT of anything that has changed there is a line more,
`COMMITTING`: who gets no answer after that can't know whether there was a commit, and before it knows that there was
none. So whatever may fail is done before: what an answer needs is there when the COMMIT begins. But for the disk: where
that fails the COMMIT, after the journal was truncated, the changes are there all the same.

Run as a script, with the standard library only. It imports nothing of ERA and starts in 20 ms.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

CPU_SECONDS = 5.0
"""The deadline of a call, in processor time: what others on the machine do doesn't count."""

SECONDS = 15.0
"""The same in all: a call on a busy machine, or one that waits for the disk, doesn't hold its worker for ever."""

_KILL_CPU_SECONDS = 7
"""Of processor time, after which the kernel kills a worker that SQLite doesn't let look at the deadline."""

_NICENESS = 10

MEMORY_BYTES = 128 << 20
"""The most that SQLite may allocate; the process as a whole may have three times as much address space."""

MAX_ROWS = 10_000
MAX_ANSWER_BYTES = 4 << 20
"""Bytes of an answer, counted roughly, with the names of the columns in each row. As JSON it may have six times as
many: a control character is `\\u0001`."""

MAX_TABLES = 500
"""Entries of a schema: tables, indexes, views and triggers together."""

COMMITTING = b"committing\n"
"""What is said before a COMMIT of anything that has changed."""

_NO_VACUUM = "cannot VACUUM from within a transaction"
"""SQLite's message about a VACUUM. No authorizer is asked about that; the transaction is what prevents it."""

_STEPS = 5_000
"""Instructions of SQLite's virtual machine between two looks at the deadline."""

_LITTLE = 1 << 20
"""A disk with less free bytes than this is full: a journal needs some of them, too."""

_PAGE = 4096
"""Bytes of a page, SQLite's default."""

_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 2 << 20,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 100,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 100,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 1000,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 50,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_PRAGMAS = frozenset(
    {"table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "foreign_key_list"}
)
_READ_PRAGMAS = frozenset({"data_version", "page_size"})
"""What fts5 and rtree read when a table of theirs is made or opened. Allowed without a value only, so never set."""

_MODULES = frozenset({"fts5", "rtree"})
_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"})
_REFUSED = frozenset(
    {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT}
)
_KINDS = {
    sqlite3.SQLITE_INTERRUPT: "time",
    sqlite3.SQLITE_AUTH: "forbidden",
    sqlite3.SQLITE_TOOBIG: "large",
    sqlite3.SQLITE_FULL: "full",
    sqlite3.SQLITE_NOMEM: "memory",
    sqlite3.SQLITE_BUSY: "busy",
    sqlite3.SQLITE_IOERR: "disk",
    sqlite3.SQLITE_CANTOPEN: "disk",
    sqlite3.SQLITE_CORRUPT: "disk",
    sqlite3.SQLITE_NOTADB: "disk",
}


class Refused(Exception):
    """SQL that can't be run. `kind` selects the error in d1_databases.py."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def authorize(action: int, first: str | None, second: str | None, _database: str | None, _trigger: str | None) -> int:
    """SQLITE_OK where a statement may take this action, otherwise SQLITE_DENY. An authorizer as in
    https://www.sqlite.org/c3ref/set_authorizer.html, where the actions stand with their arguments."""
    refused = (
        action in _REFUSED
        or (action == sqlite3.SQLITE_PRAGMA and not _is_harmless((first or "").lower(), second))
        or (action == sqlite3.SQLITE_CREATE_VTABLE and (second or "").lower() not in _MODULES)
        or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FUNCTIONS)
    )
    return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK


def _is_harmless(pragma: str, value: str | None) -> bool:
    return pragma in _PRAGMAS or (pragma in _READ_PRAGMAS and value is None)


def statements(sql: str) -> Iterator[str]:
    """Split SQL into statements, each with its semicolon, where SQLite says that a statement is complete."""
    start = at = 0
    while (at := sql.find(";", at) + 1) > 0:
        if sqlite3.complete_statement(sql[start:at]):
            yield sql[start:at]
            start = at
    if sql[start:].strip():
        yield sql[start:]


def connect(path: str, most_bytes: int) -> sqlite3.Connection:
    """A connection with all settings that keep it within its bounds, to a database of at most `most_bytes`."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=SECONDS, cached_statements=0)
    connection.text_factory = lambda raw: raw.decode(errors="replace")
    connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
    connection.setconfig(sqlite3.SQLITE_DBCONFIG_TRUSTED_SCHEMA, False)
    for pragma in (
        "journal_mode = TRUNCATE",
        "synchronous = FULL",
        "temp_store = MEMORY",  # or what is sorted would be a file without a bound
        "foreign_keys = ON",
        "cell_size_check = ON",
        f"max_page_count = {max(most_bytes // _PAGE, 1)}",
    ):
        connection.execute(f"PRAGMA {pragma}")
    for which, value in _LIMITS.items():
        connection.setlimit(which, value)
    return connection


def run(
    path: str, sql: str, params: Any, many: bool, most_bytes: int, *, committing: Callable[[], object] = lambda: None
) -> tuple[bytes, dict[str, Any]]:
    """Run `sql` on the database at `path`, of at most `most_bytes`, as one transaction.

    `many` allows several statements. Returns the rows as objects of the last statement that has any, as JSON, and what
    there is to say about the call. `committing` is called before a COMMIT of anything that has changed. Raises Refused
    or sqlite3.Error, with nothing changed.
    """
    begun, begun_cpu = time.monotonic(), time.process_time()
    is_forbidden = False

    def is_late() -> bool:
        return time.process_time() - begun_cpu > CPU_SECONDS or time.monotonic() - begun > SECONDS

    def check(*action: Any) -> int:
        nonlocal is_forbidden
        verdict = authorize(*action)
        is_forbidden |= verdict != sqlite3.SQLITE_OK
        return verdict

    connection = connect(path, most_bytes)
    try:
        before = connection.execute("PRAGMA schema_version").fetchone()[0]
        connection.execute("BEGIN")
        connection.set_authorizer(check)
        connection.set_progress_handler(is_late, _STEPS)
        try:
            rows = _rows(connection, sql, params, many)
        except sqlite3.Error as error:
            # SQLite's own code doesn't say so everywhere: that a function was refused is a plain error.
            if is_forbidden or str(error) == _NO_VACUUM:
                error.sqlite_errorcode = sqlite3.SQLITE_AUTH
            raise
        connection.set_authorizer(None)
        changed = connection.execute("PRAGMA schema_version").fetchone()[0] != before
        if changed and connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] > MAX_TABLES:
            raise Refused("large", f"The database would have over {MAX_TABLES} tables, indexes, views and triggers.")
        connection.set_progress_handler(None, 0)
        changes = connection.total_changes
        meta = {
            "changes": changes,
            "last_row_id": connection.execute("SELECT last_insert_rowid()").fetchone()[0],
            "changed_db": changed or changes > 0,
            "size_after": connection.execute("PRAGMA page_count").fetchone()[0] * _PAGE,
        }
        if meta["changed_db"] or _has_journal(path):
            committing()
        connection.execute("COMMIT")
        return rows, {**meta, "duration": round((time.monotonic() - begun) * 1000, 3)}
    finally:
        connection.close()


def _rows(connection: sqlite3.Connection, sql: str, params: Any, many: bool) -> bytes:
    """Carry out the statements of a call; see `run`. Returns the rows as JSON."""
    values: Any
    if isinstance(params, dict):
        values = {name: _sql_value(value) for name, value in params.items()}
    else:
        values = [_sql_value(value) for value in params]
    texts = list(statements(sql)) if many else [sql]
    if len(texts) > 1 and values:
        raise Refused("bad", "'params' go with one statement, and there are several.")
    rows: list[dict[str, Any]] = []
    left = MAX_ANSWER_BYTES
    for text in texts:
        cursor = connection.execute(text, values)
        if cursor.description is None:
            continue
        names = [column[0] for column in cursor.description]
        of_names = sum(len(name) + 8 for name in names)
        rows = []
        for row in cursor:
            left -= sum(len(value) if isinstance(value, str | bytes) else 8 for value in row) + of_names
            if len(rows) >= MAX_ROWS or left < 0:
                raise Refused("large", f"The answer has over {MAX_ROWS} rows or {MAX_ANSWER_BYTES} bytes.")
            rows.append(dict(zip(names, map(json_value, row), strict=True)))
    return _json(rows)


def _has_journal(path: str) -> bool:
    """Whether a transaction has written to the database: its journal has what was there before. Not everything that is
    written counts as a change of rows, such as what ANALYZE finds."""
    with suppress(FileNotFoundError):
        return os.path.getsize(f"{path}-journal") > 0
    return False


def _is_disk_full(path: str, most_bytes: int) -> bool:
    """Whether the disk had no room for a database, and not the bound on its size: SQLite's error is the same. What the
    call has written may be undone by now; so the disk is full if it has less room than the bound leaves."""
    try:
        disk, size = os.statvfs(os.path.dirname(path)), os.path.getsize(path)
    except OSError:
        return False
    free = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail  # of which some may be kept for root
    return disk.f_blocks > 0 and free * disk.f_frsize < max(most_bytes - size, _LITTLE)


def _sql_value(value: Any) -> Any:
    """Convert a value from JSON for SQLite: a list of numbers becomes bytes."""
    return bytes(value) if isinstance(value, list) else value


def _json(value: Any) -> bytes:
    """A value as JSON in the form of the API's answers (api/routing/context.py)."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def json_value(value: Any) -> Any:
    """Convert a value of SQLite's for JSON: bytes become a list of numbers, infinity and NaN become null."""
    if isinstance(value, bytes):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def answer(line: bytes, *, committing: Callable[[], object] = lambda: None) -> tuple[dict[str, Any], Sequence[bytes]]:
    """Run a request, the arguments of `run` as JSON. The answer is what its first line says, and the result in pieces:
    `size` in bytes of the result, an object with `results` and `meta`; or `kind` and `message` of an error."""
    request: dict[str, Any] = {}
    try:
        request = json.loads(line)
        rows, meta = run(**request, committing=committing)
    except Refused as refusal:
        return {"kind": refusal.kind, "message": str(refusal)}, ()
    except (MemoryError, RecursionError):
        return {"kind": "memory", "message": "The statement needs more memory than it may have."}, ()
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        kind = "large" if isinstance(error, sqlite3.DataError) else _KINDS.get(code, "sql")
        if kind == "full" and _is_disk_full(request["path"], request["most_bytes"]):
            return {"kind": "room", "message": "there is no room left on the disk"}, ()
        return {"kind": kind, "message": str(error)}, ()
    except (ValueError, TypeError, OverflowError) as error:  # values that SQLite can't store
        return {"kind": "sql", "message": str(error)}, ()
    pieces = (b'{"results":', rows, b',"meta":', _json(meta), b"}")  # not joined: that could want too much memory
    return {"size": sum(map(len, pieces))}, pieces


def say(*pieces: bytes) -> None:
    """Write to the service."""
    for piece in pieces:
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def main(most_bytes: int) -> None:
    """Answer requests on stdin until it ends. No file may become larger than a database of `most_bytes`, and a bit."""
    # Ctrl-C is for the service. A session of its own wouldn't do: the kernel may share processors among sessions before
    # it looks at niceness (sched_autogroup_enabled).
    os.setpgid(0, 0)
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES * 3, MEMORY_BYTES * 3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes + (1 << 20), most_bytes + (1 << 20)))
    with sqlite3.connect(":memory:") as memory:
        memory.execute(f"PRAGMA hard_heap_limit = {MEMORY_BYTES}")
    memory.close()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    for line in sys.stdin.buffer:
        last = int(time.process_time()) + 1 + _KILL_CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (last if hard < 0 else min(last, hard), hard))
        head, result = answer(line, committing=lambda: say(COMMITTING))
        say(json.dumps(head).encode() + b"\n", *result)


if __name__ == "__main__":
    main(int(sys.argv[1]))
