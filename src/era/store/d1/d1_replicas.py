"""Replicas of programs' SQL databases, which hosts on several machines share: the original is in rows, in chunks, and
each host has a copy as a file of those that it uses (d1_databases.py).

Theory of operation. A host has a copy of a database, a file, as long as it likes. Before each call it reads the
database's row: its mark is new with each change, so a copy with the same mark is as new as the row, and any other gets
the chunks that have changed since. What a call changes is compared with what was there, by chunks, and stored in one
transaction, on the condition that the row still has the mark that the call began with. Else another host was quicker:
nothing of the call counts, and it is made again on what is there now. So calls come one after the other for all hosts
together, whichever host is called, and a host that was paused or cut off changes nothing that it hasn't seen. An answer
is given once that is stored. SQLite's locks, which network file systems don't keep, have no part in it.

Why rows, and not blobs: to collect garbage in a bucket is slow, and a database that is written to leaves some behind
with each call.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection, bindparam, delete, insert, or_, select, update

from era.core.trees.durable import sync
from era.errors import HostLost, SqlUnknown
from era.store.blobs.condemned import check_alive
from era.store.engine.database import Database
from era.store.engine.dialects import Precompiled
from era.store.engine.tables import d1_chunks, d1_databases

log = structlog.get_logger()

CHUNK = 64 << 10
_AT_A_TIME = 16
"""Chunks that are in memory at a time."""

_COUNTER = slice(24, 28)
"""Of a database's first bytes: its change counter, which each transaction that changes anything increments
(https://www.sqlite.org/fileformat.html)."""

MOVED = ".moved"
"""What the name of a file ends with whose content is in rows."""

type Name = tuple[str, str]
"""A database: its owner and namespace."""

_IS = (d1_databases.c.owner == bindparam("of_owner")) & (d1_databases.c.namespace == bindparam("of_namespace"))
_FIND = select(d1_databases.c.key, d1_databases.c.version, d1_databases.c.mark, d1_databases.c.size).where(_IS)
_find = Precompiled(_FIND)


@dataclass(slots=True)
class _Copy:
    """What is known of a host's copy of a database."""

    key: int
    version: int
    mark: str
    digests: list[bytes]
    """Of its chunks."""

    counter: bytes
    diverged: set[int] = field(default_factory=set)
    """Chunks that a call changed in the copy and that weren't stored, so that the next pull has to bring them again."""


class DatabaseReplicas:
    """The rows of databases, and what this host has of them as files."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._copies: dict[Name, _Copy] = {}

    async def pull(self, name: Name, path: Path) -> None:
        """Make the file what the rows say; no file where there is no such database. Nothing else uses it meanwhile.
        Raises Unavailable, OSError."""
        copy = self._copies.pop(name, None)
        try:
            self._copies.update(await self._database.read(_pull, name, path, copy))
        except OSError:
            with suppress(OSError):  # half a file is of no use, and the disk may be full
                path.unlink()
            raise

    async def push(self, name: Name, path: Path) -> bool:
        """Store what has changed in the file since it was pulled; false where the rows have changed, too, and nothing
        was stored. Raises SqlUnknown where nobody can tell any more, Unavailable; then it may have been. Raises OSError
        where the file can't be read, and nothing was stored."""
        copy = self._copies.pop(name, None)
        new = await asyncio.to_thread(_scanned, path)
        if new is None or (copy is not None and new.counter == copy.counter):
            if copy is not None:
                self._copies[name] = copy
            return True
        changed = _changed(copy, new)
        new.mark = secrets.token_hex(16)
        stored = await self._database.write_once(_push, name, path, copy, new, changed, patient=False)
        if stored is not None:
            new.key, new.version = stored
            self._copies[name] = new
        elif copy is not None:
            copy.diverged |= changed.union(range(len(new.digests), len(copy.digests)))
            self._copies[name] = copy
        return stored is not None

    def forget(self, name: Name) -> None:
        """The file is in an unknown state: the next pull makes it anew."""
        self._copies.pop(name, None)

    async def drop(self, name: Name) -> bool:
        """Delete a database; whether there was one."""
        self.forget(name)
        return await self._database.write(_drop, name)

    async def sizes(self) -> Mapping[Name, int]:
        """Bytes of each database."""
        query = select(d1_databases.c.owner, d1_databases.c.namespace, d1_databases.c.size)
        found = await self._database.read(lambda connection: connection.execute(query).all())
        return {(owner, namespace): size for owner, namespace, size in found}

    async def import_files(self, files: Iterable[tuple[Name, Path]]) -> None:
        """Put databases that are files into rows. The files stay, under other names. Raises Unavailable, OSError."""
        for name, path in files:
            draft = path.with_suffix(".taken-in")
            draft.unlink(missing_ok=True)
            await asyncio.to_thread(_copied, path, draft)
            if not await self.push(name, draft):
                log.warning("database_kept_already", file=str(path), then=f"the file is kept as *{MOVED}")
            self.forget(name)
            draft.unlink(missing_ok=True)
            path.rename(f"{path}{MOVED}")

    async def export_files(self, directory: Path, suffix: str) -> None:
        """Make files of all databases that are in rows: from now on they are those. Raises Unavailable, OSError."""
        for name in await self.sizes():
            path = directory / name[0] / f"{name[1]}{suffix}"
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = path.with_suffix(".given-out")
            await self.pull(name, draft)
            await asyncio.to_thread(sync, draft)
            draft.rename(path)
            for each in (path.parent, directory):
                await asyncio.to_thread(sync, each)
            await self.drop(name)


def _pull(connection: Connection, name: Name, path: Path, copy: _Copy | None) -> dict[Name, _Copy]:
    """See DatabaseReplicas.pull; what is known of the copy then, by name."""
    row = connection.execute(_FIND, _named(name)).one_or_none()
    if row is None or copy is None or copy.key != row.key:
        copy = None
        for each in (path, Path(f"{path}-journal")):
            each.unlink(missing_ok=True)
    if row is None:
        return {}
    if copy is not None and copy.mark == row.mark and not copy.diverged:
        return {name: copy}
    new = _Copy(row.key, row.version, row.mark, [] if copy is None else copy.digests, b"")
    is_wanted = d1_chunks.c.database_key == row.key
    if copy is not None:
        is_wanted &= or_(d1_chunks.c.version > copy.version, d1_chunks.c.number.in_(copy.diverged))
    query = select(d1_chunks.c.number, d1_chunks.c.content).where(is_wanted).order_by(d1_chunks.c.number)
    count = -(-row.size // CHUNK)
    new.digests[count:] = []
    new.digests += [b""] * (count - len(new.digests))
    with (
        open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file,
        connection.execute(query, execution_options={"yield_per": _AT_A_TIME}) as chunks,
    ):
        for number, content in chunks:
            file.seek(number * CHUNK)
            file.write(content)
            new.digests[number] = _digest(content)
        file.truncate(row.size)
        file.seek(0)
        new.counter = file.read(_COUNTER.stop)[_COUNTER]
    return {name: new}


def _push(
    connection: Connection, name: Name, path: Path, copy: _Copy | None, new: _Copy, changed: set[int], *, again: bool
) -> tuple[int, int] | None:
    """See DatabaseReplicas.push; the key and version of what was stored."""
    try:
        return _store(connection, name, path, copy, new, changed, again=again)
    except (HostLost, OSError):
        if again:  # what was committed before is unknown, and these say that nothing was: clients send the call again
            raise SqlUnknown from None
        raise


def _store(
    connection: Connection, name: Name, path: Path, copy: _Copy | None, new: _Copy, changed: set[int], *, again: bool
) -> tuple[int, int] | None:
    """See `_push`."""
    size = path.stat().st_size
    if again and (stored := _find.first(connection, _named(name))) is not None and stored[2] == new.mark:
        return stored[0], stored[1]
    row = check_alive(connection, (_find, _named(name)))[0].row
    key, version, mark, _ = row or (0, 0, "", 0)
    if (row and (key, mark)) != (copy and (copy.key, copy.mark)):
        if again:  # another host may have changed, or dropped, what this was committed to before
            raise SqlUnknown
        return None
    if row is None:
        owner, namespace = name
        values = {"owner": owner, "namespace": namespace, "version": 1, "mark": new.mark, "size": size}
        made: Any = connection.execute(insert(d1_databases).values(values)).inserted_primary_key
        key, version = made[0], 1
    else:
        version += 1
        is_it = d1_databases.c.key == key
        connection.execute(update(d1_databases).where(is_it).values(version=version, mark=new.mark, size=size))
        of_it = d1_chunks.c.database_key == key
        connection.execute(
            delete(d1_chunks).where(of_it, or_(d1_chunks.c.number.in_(changed), d1_chunks.c.number >= len(new.digests)))
        )
    for some in _pieces(path, changed):
        rows = [{"database_key": key, "number": each, "version": version, "content": piece} for each, piece in some]
        connection.execute(insert(d1_chunks), rows)
    return key, version


def _drop(connection: Connection, name: Name) -> bool:
    row = check_alive(connection, (_find, _named(name)))[0].row
    if row is None:
        return False
    connection.execute(delete(d1_chunks).where(d1_chunks.c.database_key == row[0]))
    connection.execute(delete(d1_databases).where(d1_databases.c.key == row[0]))
    return True


def _scanned(path: Path) -> _Copy | None:
    """What a file holds that isn't kept yet; None where there is none."""
    try:
        with path.open("rb") as file:
            head = file.read(_COUNTER.stop)
            file.seek(0)
            digests = [_digest(piece) for piece in iter(lambda: file.read(CHUNK), b"")]
    except FileNotFoundError:
        return None
    return _Copy(0, 0, "", digests, head[_COUNTER])


def _changed(copy: _Copy | None, new: _Copy) -> set[int]:
    """The numbers of chunks that aren't as they were."""
    before = [] if copy is None else copy.digests
    return {number for number, digest in enumerate(new.digests) if before[number : number + 1] != [digest]}


def _pieces(path: Path, numbers: Iterable[int]) -> Iterator[list[tuple[int, bytes]]]:
    """These chunks of a file, some at a time."""
    some: list[tuple[int, bytes]] = []
    with path.open("rb") as file:
        for number in sorted(numbers):
            file.seek(number * CHUNK)
            some.append((number, file.read(CHUNK)))
            if len(some) == _AT_A_TIME:
                yield some
                some = []
    if some:
        yield some


def _copied(path: Path, draft: Path) -> None:
    """Copy a database as of one moment, page by page. Raises OSError."""
    try:
        with (
            closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as source,
            closing(sqlite3.connect(draft)) as made,
        ):
            source.backup(made)
    except sqlite3.Error as error:
        draft.unlink(missing_ok=True)
        raise OSError(None, f"{path} can't be read: {error}") from error


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _named(name: Name) -> dict[str, str]:
    return {"of_owner": name[0], "of_namespace": name[1]}
