"""A process that runs people's SQL: a line of JSON in, a line of JSON out, until its input ends.

Theory of operation
===================

*Why a process.* SQL is a program. A sort can want gigabytes, one call of a function can take minutes within which
nothing can be asked, and an SQLite with a bug would take the service with it. Here memory has a limit, and what doesn't
end is killed from outside (sql.py); a killed transaction is undone by whoever opens the database next.

*What may be said.* An authorizer sees each statement before it runs, and refuses what reaches beyond this database:
ATTACH (which VACUUM is, too), PRAGMAs but for a few that tell of tables, modules and functions that touch files. It
refuses BEGIN and COMMIT as well: a call is one transaction, all or nothing.

*Bounds.* On statements, values, rows, pages of the database; a deadline, looked at every few thousand steps. What is
over one is an error, never an answer cut short.

Run as a script, with the standard library only. It knows nothing of ERA and starts in 20 ms.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

SECONDS = 5.0
MEMORY_BYTES = 128 << 20
"""Of SQLite's own; of the process as a whole some more."""

MAX_ROWS = 10_000
MAX_ANSWER_BYTES = 4 << 20
MAX_TABLES = 500
"""Entries of a schema: tables, indexes, views and triggers together."""

_STEPS = 5_000
_PAGE = 4096
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
    """`kind` is what the service makes an error of."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def authorize(action: int, first: str | None, second: str | None, _database: str | None, _trigger: str | None) -> int:
    """sqlite3's authorizer: whether a statement may do this."""
    refused = (
        action in _REFUSED
        or (action == sqlite3.SQLITE_PRAGMA and (first or "").lower() not in _PRAGMAS)
        or (action == sqlite3.SQLITE_CREATE_VTABLE and (second or "").lower() not in _MODULES)
        or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FUNCTIONS)
    )
    return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK


def statements(sql: str) -> Iterator[str]:
    """The statements of a text, each with its semicolon, where SQLite says that it ends."""
    start = at = 0
    while (at := sql.find(";", at) + 1) > 0:
        if sqlite3.complete_statement(sql[start:at]):
            yield sql[start:at]
            start = at
    if sql[start:].strip():
        yield sql[start:]


def opened(path: str, most_bytes: int) -> sqlite3.Connection:
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


def run(path: str, sql: str, params: Any, many: bool, most_bytes: int) -> dict[str, Any]:
    """Run `sql` on the database at `path` as one transaction. Raises Refused or sqlite3.Error, with nothing changed."""
    begun = time.monotonic()
    connection = opened(path, most_bytes)
    try:
        before = connection.execute("PRAGMA schema_version").fetchone()[0]
        connection.execute("BEGIN")
        connection.set_authorizer(authorize)
        connection.set_progress_handler(lambda: time.monotonic() - begun > SECONDS, _STEPS)
        values = (
            params if isinstance(params, dict) else [bytes(one) if isinstance(one, list) else one for one in params]
        )
        texts = list(statements(sql)) if many else [sql]
        if len(texts) > 1 and values:
            raise Refused("bad", "'params' go with one statement, and there are several.")
        rows: list[dict[str, Any]] = []
        room = MAX_ANSWER_BYTES
        for text in texts:
            cursor = connection.execute(text, values)
            if cursor.description is None:
                continue
            names = [column[0] for column in cursor.description]
            rows = []
            for row in cursor:
                room -= sum(len(one) if isinstance(one, str | bytes) else 8 for one in row) + 8 * len(names)
                if len(rows) >= MAX_ROWS or room < 0:
                    raise Refused("large", f"The answer has over {MAX_ROWS} rows or {MAX_ANSWER_BYTES} bytes.")
                rows.append(dict(zip(names, map(plain, row), strict=True)))
        connection.set_authorizer(None)
        changed = connection.execute("PRAGMA schema_version").fetchone()[0] != before
        if changed and connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] > MAX_TABLES:
            raise Refused("large", f"The database would have over {MAX_TABLES} tables, indexes, views and triggers.")
        connection.set_progress_handler(None, 0)
        last = connection.execute("SELECT last_insert_rowid()").fetchone()[0]
        connection.execute("COMMIT")
        size = connection.execute("PRAGMA page_count").fetchone()[0] * _PAGE
        changes = connection.total_changes
        return {
            "results": rows,
            "meta": {
                "changes": changes,
                "last_row_id": last,
                "changed_db": changed or changes > 0,
                "size_after": size,
                "duration": round((time.monotonic() - begun) * 1000, 3),
            },
        }
    finally:
        connection.close()
        with suppress(FileNotFoundError):
            if os.path.getsize(path) == 0:  # nothing was ever committed
                os.unlink(path)


def plain(value: Any) -> Any:
    """A value as JSON has it: bytes as a list of numbers, and no infinity."""
    if isinstance(value, bytes):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def answer(line: bytes) -> dict[str, Any]:
    try:
        return {"ok": run(**json.loads(line))}
    except Refused as refusal:
        return {"kind": refusal.kind, "message": str(refusal)}
    except (MemoryError, RecursionError):
        return {"kind": "memory", "message": "The statement needs more memory than it may have."}
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        kind = "large" if isinstance(error, sqlite3.DataError) else _KINDS.get(code, "sql")
        return {"kind": kind, "message": str(error)}
    except (ValueError, TypeError, OverflowError) as error:  # values that SQLite has no place for
        return {"kind": "sql", "message": str(error)}


def main(most_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES * 3, MEMORY_BYTES * 3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes + (1 << 20), most_bytes + (1 << 20)))
    with sqlite3.connect(":memory:") as memory:
        memory.execute(f"PRAGMA hard_heap_limit = {MEMORY_BYTES}")
    memory.close()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(answer(line)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
