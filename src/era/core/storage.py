"""Storage that an owner's programs and clients share: values by key (kv), bytes by key (r2), an SQL database (d1), in
namespaces.

Theory of operation
===================

Namespaces are an owner's, not a session's: all sessions of his read and write them, and they outlive those. What is
done with them is done with an owner's `Namespaces`, so no call can leave out whose it is.

A value is a row, or, where it is long, a blob that its row names by digest. The blob is durable before the row, as
everywhere; rows pin blobs against being swept away. Keys are bytes to the store, compared as bytes, and never a path.

All of it together, whoever's it is, has a bound, which is counted in `Storage`: what a put adds is reserved before it
begins, so that many at once can't get past it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from era.core.files.snapshots import BlobStore
from era.core.models import JsonObject, now
from era.errors import BadRequest, CommitFailed, NotFound, TooLarge, Unavailable

type Kind = Literal["kv", "r2"]

NAMESPACE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.:-]{0,63}")
MAX_KEY = 1024
"""Bytes of UTF-8."""

MAX_VALUE: Mapping[Kind, int] = {"kv": 1 << 20, "r2": 10 << 20}
MAX_METADATA = 8 << 10
INLINE_BYTES = 16 << 10
"""Longer values are blobs: they would make the database large and its pages slow to walk."""

ROW_BYTES = 128
"""What a row counts for, beside its key, metadata and value."""

_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Item:
    """A value by key. `value` is None where it is the blob `digest`, and in lists."""

    owner: str
    kind: Kind
    namespace: str
    key: str
    size: int
    created_at: int
    updated_at: int
    metadata: JsonObject | None = None
    digest: str | None = None
    value: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Page:
    items: Sequence[Item]
    more: bool


class ItemStore(Protocol):
    """Rows of items; see store/items.py. Every call is one transaction, durable when it returns."""

    async def put_item(self, item: Item) -> int:
        """Keep it in the place of one with its key, whose `created_at` it takes over. The bytes that one counted
        for."""
        ...

    async def item(self, owner: str, kind: Kind, namespace: str, key: str) -> Item | None: ...

    async def delete_item(self, owner: str, kind: Kind, namespace: str, key: str) -> int:
        """The bytes it counted for, 0 where there was none."""
        ...

    async def delete_items(self, owner: str, kind: Kind, namespace: str, limit: int) -> tuple[int, int]:
        """Delete some; how many, and the bytes they counted for."""
        ...

    async def items(
        self, owner: str, kind: Kind, namespace: str, *, prefix: str, after: str | None, limit: int
    ) -> Sequence[Item]: ...

    async def all_items(
        self, owner: str, kind: Kind | None, namespace: str | None, *, prefix: str, limit: int, offset: int
    ) -> tuple[Sequence[Item], int]:
        """A page of all that are an owner's, by kind, namespace and key, and how many there are."""
        ...

    async def item_counts(self, owner: str) -> Sequence[tuple[Kind, str, int, int]]:
        """Of an owner's: kind, namespace, how many, the bytes of their values."""
        ...

    async def item_bytes(self) -> int:
        """What all count for, whoever's they are."""
        ...


class Databases(Protocol):
    """SQL by owner and namespace; see store/sql.py."""

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        ...

    def sizes(self, owner: str) -> Mapping[str, int]:
        """Bytes of an owner's, by namespace."""
        ...

    async def run(
        self,
        owner: str,
        namespace: str,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] = (),
        *,
        many: bool,
        room: int,
    ) -> dict[str, Any]: ...

    async def drop(self, owner: str, namespace: str) -> bool: ...


class Storage:
    """All owners' storage, of `most_bytes` together. `open` before anything."""

    def __init__(self, store: ItemStore, blobs: BlobStore, databases: Databases, most_bytes: int) -> None:
        self.store = store
        self.blobs = blobs
        self.databases = databases
        self._most_bytes = most_bytes
        self._used = 0

    async def open(self) -> None:
        self._used = await self.store.item_bytes()

    def of(self, owner: str) -> Namespaces:
        """What is an owner's, and nothing else."""
        return Namespaces(self, owner)

    def room(self) -> int:
        """Bytes that can be added."""
        return self._most_bytes - self._used - self.databases.total

    def freed(self, size: int) -> None:
        """So much less is there."""
        self._used -= size

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """For what is being added. Raises TooLarge."""
        if size > self.room():
            raise TooLarge(
                "The storage of this server is full.",
                hint="Delete what isn't needed; ERA_STORAGE_MB sets the bound.",
                code="storage_full",
            )
        self._used += size
        try:
            yield
        except BaseException:
            self._used -= size
            raise


class Namespaces:
    """An owner's namespaces. There needn't be any, and nothing has to be made first."""

    def __init__(self, storage: Storage, owner: str) -> None:
        self._storage = storage
        self._owner = owner
        self._store = storage.store
        self._blobs = storage.blobs
        self._databases = storage.databases

    async def put(self, kind: Kind, namespace: str, key: str, value: bytes, metadata: JsonObject | None) -> None:
        """Keep a value. It is durable when this returns. Raises TooLarge, CommitFailed."""
        check_namespace(namespace)
        raw = check_key(key)
        if len(value) > MAX_VALUE[kind]:
            hint = "Put it into r2, which takes more." if kind == "kv" else "Keep larger things in a session's files."
            raise TooLarge(f"The value is {len(value)} bytes, {MAX_VALUE[kind]} are allowed.", hint=hint)
        noted = 0 if metadata is None else len(json.dumps(metadata).encode())
        if noted > MAX_METADATA:
            raise TooLarge(f"'metadata' is {noted} bytes, {MAX_METADATA} are allowed.", hint="Make it shorter.")
        await _to_the_end(self._put(kind, namespace, key, value, metadata, len(raw) + noted + len(value) + ROW_BYTES))

    async def get(self, kind: Kind, namespace: str, key: str) -> tuple[Item, bytes]:
        """Raises NotFound, Unavailable."""
        check_namespace(namespace)
        check_key(key)
        for last in (False, True):
            item = await self._store.item(self._owner, kind, namespace, key)
            if item is None:
                raise NotFound(f"'{namespace}' has no such key.", hint="GET the namespace to list its keys.")
            if item.value is not None:
                return item, item.value
            try:
                return item, await asyncio.to_thread(self._blobs.get, item.digest or "")
            except OSError as error:
                if last or not isinstance(error, FileNotFoundError):  # else replaced, and cleared away, meanwhile
                    raise Unavailable(f"The value could not be read: {error.strerror}.") from error
        raise AssertionError

    async def delete(self, kind: Kind, namespace: str, key: str) -> None:
        """It is gone, durably, when this returns; also where it has not been there."""
        check_namespace(namespace)
        check_key(key)
        await _to_the_end(self._delete(kind, namespace, key))

    async def page(self, kind: Kind, namespace: str, *, prefix: str, after: str | None, limit: int) -> Page:
        check_namespace(namespace)
        found = await self._store.items(self._owner, kind, namespace, prefix=prefix, after=after, limit=limit + 1)
        return Page(found[:limit], len(found) > limit)

    async def clear(self, kind: Kind, namespace: str) -> int:
        """Delete all keys of a namespace, in many transactions; how many."""
        check_namespace(namespace)
        total = 0
        while True:
            count = await _to_the_end(self._delete_some(kind, namespace))
            total += count
            if count < _BATCH:
                return total

    async def sql(
        self, namespace: str, sql: str, params: Sequence[Any] | Mapping[str, Any], *, many: bool
    ) -> dict[str, Any]:
        """Run SQL as one transaction. Raises BadRequest, Forbidden, TooLarge, Unavailable."""
        check_namespace(namespace)
        return await self._databases.run(self._owner, namespace, sql, params, many=many, room=self._storage.room())

    async def drop_database(self, namespace: str) -> bool:
        check_namespace(namespace)
        return await self._databases.drop(self._owner, namespace)

    async def resources(
        self, kind: str | None, namespace: str | None, *, prefix: str, limit: int, offset: int
    ) -> tuple[list[JsonObject], int]:
        """A page of all there is: tables of databases, then keys. And how many there are."""
        if namespace is not None:
            check_namespace(namespace)
        tables = [] if kind in ("kv", "r2") else await self._tables(namespace, prefix)
        page: list[JsonObject] = [{"type": "d1", "namespace": of, "key": name} for of, name in tables]
        page = page[offset : offset + limit]
        if kind == "d1":
            return page, len(tables)
        which: Kind | None = "kv" if kind == "kv" else "r2" if kind == "r2" else None
        left, skipped = limit - len(page), max(offset - len(tables), 0)
        items, count = await self._store.all_items(
            self._owner, which, namespace, prefix=prefix, limit=left, offset=skipped
        )
        return page + [_resource(item) for item in items], len(tables) + count

    async def stats(self) -> JsonObject:
        counts = await self._store.item_counts(self._owner)
        tables = await self._tables(None, "")
        by_type = {"kv": 0, "d1": len(tables), "r2": 0}
        by_namespace: dict[str, int] = {}
        for kind, namespace, count, _ in counts:
            by_type[kind] += count
            by_namespace[namespace] = by_namespace.get(namespace, 0) + count
        for namespace, _name in tables:
            by_namespace[namespace] = by_namespace.get(namespace, 0) + 1
        size = sum(size for *_, size in counts) + sum(self._databases.sizes(self._owner).values())
        return {"total": sum(by_type.values()), "by_type": by_type, "by_namespace": by_namespace, "total_size": size}

    async def _tables(self, namespace: str | None, prefix: str) -> list[tuple[str, str]]:
        """Namespace and name of each table."""
        wanted = [name for name in sorted(self._databases.sizes(self._owner)) if namespace in (None, name)]
        sql = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite!_%' ESCAPE '!' ORDER BY 1"
        found = []
        for name in wanted:
            answer = await self._databases.run(self._owner, name, sql, many=False, room=0)
            found += [(name, row["name"]) for row in answer["results"] if row["name"].startswith(prefix)]
        return found

    async def _put(
        self, kind: Kind, namespace: str, key: str, value: bytes, metadata: JsonObject | None, counted: int
    ) -> None:
        with self._storage.reserved(counted):
            digest = await asyncio.to_thread(self._keep, value) if len(value) > INLINE_BYTES else None
            at = now()
            item = Item(
                self._owner, kind, namespace, key, len(value), at, at, metadata, digest, None if digest else value
            )
            freed = await self._store.put_item(item)  # not in one line: others count meanwhile
            self._storage.freed(freed)

    async def _delete(self, kind: Kind, namespace: str, key: str) -> None:
        freed = await self._store.delete_item(self._owner, kind, namespace, key)
        self._storage.freed(freed)

    async def _delete_some(self, kind: Kind, namespace: str) -> int:
        count, freed = await self._store.delete_items(self._owner, kind, namespace, _BATCH)
        self._storage.freed(freed)
        return count

    def _keep(self, value: bytes) -> str:
        try:
            with self._blobs.batch() as batch:
                return batch.put(value)
        except OSError as error:
            raise CommitFailed(f"The value could not be kept: {error.strerror}.", hint="Try again later.") from error


async def _to_the_end[T](work: Coroutine[Any, Any, T]) -> T:
    """Do it all, also where the caller goes away meanwhile: what is written must be counted."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # somebody has seen it
    return await asyncio.shield(task)


def check_namespace(namespace: str) -> None:
    """Raises BadRequest."""
    if not NAMESPACE.fullmatch(namespace):
        raise BadRequest(
            "That can't be a namespace.",
            hint="Use 1 to 64 letters, digits, '_', '-', '.' and ':', the first none of the last two.",
            code="bad_namespace",
        )


def check_key(key: str) -> bytes:
    """The key as it is kept. Raises BadRequest."""
    raw = key.encode(errors="surrogatepass")
    if not 0 < len(raw) <= MAX_KEY or "\0" in key:
        raise BadRequest("That can't be a key.", hint=f"Use 1 to {MAX_KEY} bytes of UTF-8 without NUL.", code="bad_key")
    return raw


def _resource(item: Item) -> JsonObject:
    return {
        "type": item.kind,
        "namespace": item.namespace,
        "key": item.key,
        "size": item.size,
        "metadata": item.metadata,
        "created_at": item.created_at,
        "updated_at": item.updated_at,
    }
