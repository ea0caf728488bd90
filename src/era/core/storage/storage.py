"""Storage that an owner's programs and clients share: values by key (kv), objects by key (r2) and an SQL database (d1)
for each namespace.

Theory of operation
===================

Namespaces are an owner's, not a session's: all sessions of his read and write them, and they outlive those. All access
is by an owner's `Namespaces`, so no call can leave out the owner.

A value is a row, or, where it is long, a blob that its row names by digest. The blob is durable before the row, as
everywhere; rows pin blobs against being swept away. Keys are bytes to the store, compared as bytes, and never a path.

The storage of all owners together has a bound, which is counted in `Storage`: what a put adds is reserved before it
begins, so that many at once can't get past it. An owner's quota is counted the same. How much SQL will add nobody knows
before, so it may use all the room there is; where there is a quota, an owner's calls that add something therefore go
one after the other.

What is counted is what rows said once, and what has passed here since. So where other hosts of a cluster change rows,
or a commit had no answer, rows are counted again: now and then, and before a put is refused. Between its transaction
and its being noted nothing is counted, else a change might count twice, or not at all; what is reserved is kept apart.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol
from weakref import WeakValueDictionary

from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.tasks import Threads, to_its_end
from era.core.execution.spooled_output import SpooledOutput
from era.core.models import JsonObject, OwnedId, now
from era.core.owners.quotas import Bound, Quotas
from era.core.trees.blob_store import BlobStore
from era.errors import BadRequest, CommitFailed, NotFound, TooLarge, Unavailable


class Databases(Protocol):
    """SQL databases by owner and namespace; see store/d1/d1_databases.py."""

    @property
    def total(self) -> int:
        """Bytes of all databases."""
        ...

    @property
    def most_bytes(self) -> int:
        """How large one may be."""
        ...

    def sizes(self, owner: str) -> Mapping[str, int]:
        """Bytes of an owner's databases, by namespace."""
        ...

    async def run_as_json(
        self,
        owner: str,
        namespace: str,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] = (),
        *,
        many: bool,
        room: int,
        asker: str = "",
    ) -> Sequence[bytes]:
        """Run SQL as one transaction: one statement, or with `many` any number. The database may grow by `room` bytes.
        `asker` is whoever of the owner's asks, in turn with his others.

        Returns pieces of a JSON object with `results`, the rows, and `meta`. They may be too many to be parsed on the
        event loop. Raises BadRequest, Forbidden, TooLarge, Unavailable."""
        ...

    async def drop(self, owner: str, namespace: str) -> bool:
        """Delete a database; whether there was one."""
        ...


type Kind = Literal["kv", "r2"]

NAMESPACE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.:-]{0,63}")
MAX_KEY = 1024
"""Bytes of UTF-8."""

MAX_VALUE: Mapping[Kind, int] = {"kv": 1 << 20, "r2": 10 << 20}
MAX_METADATA = 8 << 10
INLINE_BYTES = 16 << 10
"""Longer values are blobs: they would make the database large and its pages slow to walk."""

ROW_BYTES = 128
"""Bytes that a row counts for, beside its key, metadata and value."""

_MIB = 1 << 20
_BATCH = 1000
"""Items that one transaction deletes at most."""

_COUNT_SECONDS = 60.0
"""How often items are counted where other hosts change them."""

_RECOUNT_SECONDS = 3.0
"""How often at most, where they seem to leave no room, and how long after a commit without an answer: it may still be
carried out."""

_COUNT_PART = 20
"""Counting takes one part of so many of the time at most: with millions of items it takes seconds."""

_THREADS, _THREADS_OF_OWNER = 8, 4
"""For blobs, of all owners and of one. They are the storage's own: a bucket that doesn't answer may keep them for most
of a minute, and those of the event loop are for what everybody needs, such as watching the memory of runs."""


@dataclass(frozen=True, slots=True)
class Item:
    """A value by key."""

    owner: str
    kind: Kind
    namespace: str
    key: str
    size: int
    """Bytes of the value."""

    created_at: int
    updated_at: int
    metadata: JsonObject | None = None
    digest: str | None = None
    """The blob that holds a long value."""

    value: bytes | None = field(default=None, repr=False)
    """None for a long value, and in lists."""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a namespace, in the order of keys."""

    items: Sequence[Item]
    more: bool
    """Whether there are items after these."""


class NoRoom(Exception):
    """An item wasn't put: its owner's would count for too much."""


class ItemStore(Protocol):
    """Rows of items; see store/storage_items.py. Every call is one transaction, durable when it returns."""

    async def put_item(self, item: Item, most: int | None = None) -> int:
        """Put an item. If it replaces one, it takes over that one's `created_at`. Returns the bytes that the replaced
        one counted for. Raises NoRoom where the owner's items would count for more than `most` then, whoever else puts
        some meanwhile."""
        ...

    async def item(self, owner: str, kind: Kind, namespace: str, key: str) -> Item | None: ...

    async def delete_item(self, owner: str, kind: Kind, namespace: str, key: str) -> int:
        """Delete an item if there is one. Returns the bytes that it counted for."""
        ...

    async def delete_items(self, owner: str, kind: Kind, namespace: str, limit: int) -> tuple[int, int]:
        """Delete at most `limit` items. Returns how many, and the bytes that they counted for."""
        ...

    async def items(
        self, owner: str, kind: Kind, namespace: str, *, prefix: str, after: str | None, limit: int
    ) -> Sequence[Item]:
        """At most `limit` items whose keys begin with `prefix` and come after `after`, in the order of keys, without
        their values."""
        ...

    async def all_items(
        self, owner: str, kind: Kind | None, namespace: str | None, *, prefix: str, limit: int, offset: int
    ) -> tuple[Sequence[Item], int]:
        """A page of an owner's items in the order of kind, namespace and key, and how many there are in all."""
        ...

    async def item_counts(self, owner: str) -> Sequence[tuple[Kind, str, int, int]]:
        """For each of an owner's kinds and namespaces: kind, namespace, number of items, bytes of their values."""
        ...

    async def item_bytes(self, owner: str | None = None) -> Mapping[str, int]:
        """The bytes that items count for, by owner; of one owner, if one is named and has any."""
        ...


class Storage:
    """The storage of all owners. `open` before anything."""

    def __init__(
        self,
        store: ItemStore,
        blobs: BlobStore,
        databases: Databases,
        most_bytes: int,
        quotas: Quotas | None = None,
        *,
        is_shared: bool = False,
        directory: Path | None = None,
    ) -> None:
        """`most_bytes` is what all of it may take together, `quotas` say what an owner's may. With `is_shared`, other
        hosts of a cluster change it, too. `directory` is for temporary files of long results."""
        self.store = store
        self.blobs = blobs
        self.databases = databases
        self._most_bytes = most_bytes
        self._quotas = quotas
        self._is_shared = is_shared
        self.directory = directory
        self._stored: Counter[str] = Counter()
        """Bytes that items count for, by owner, as far as is known."""

        self._reserved: Counter[str] = Counter()
        """Bytes that puts under way will add."""

        self._in_doubt = False
        """Whether a commit had no answer since items were counted."""

        self._counted_at = self._counted_for = 0.0
        """When that was, and how many seconds it took."""

        self._counting = asyncio.Lock()
        self._changes = 0
        """How many calls are changing rows of items."""

        self._unchanging = asyncio.Event()
        self._unchanging.set()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.threads = Threads(_THREADS, "era-storage", FairLimiter(_THREADS, of_owner=_THREADS_OF_OWNER))
        """Make calls for blobs, by owner."""

    async def open(self) -> None:
        """Count what is there."""
        await self._count()

    async def count_again(self, seconds: float = _COUNT_SECONDS) -> None:
        """Count what is there if that may be something else than what is known here, and wasn't counted within the last
        `seconds`. Raises Unavailable."""
        async with self._counting:
            age = time.monotonic() - self._counted_at
            if (self._is_shared or self._in_doubt) and age >= max(seconds, _COUNT_PART * self._counted_for):
                await self._unchanging.wait()
                await self._count()

    async def _count(self) -> None:
        began = time.monotonic()
        self._stored = Counter(await self.store.item_bytes())
        self._in_doubt = False
        self._counted_at = time.monotonic()
        self._counted_for = self._counted_at - began

    async def close(self) -> None:
        """Wait for calls under way."""
        await self.threads.close()

    def of(self, owner: str, sandbox_id: str = "") -> Namespaces:
        """An owner's storage, for the programs of one of his sandboxes, or for clients."""
        return Namespaces(self, owner, sandbox_id)

    def room(self) -> int:
        """Bytes that can be added."""
        return self._most_bytes - self._stored.total() - self._reserved.total() - self.databases.total

    async def room_for(self, size: int) -> int:
        """`room`; if that is less than `size`, what is there is counted again first. Raises Unavailable."""
        if self.room() < size:
            await self.count_again(_RECOUNT_SECONDS)
        return self.room()

    def used(self, owner: str) -> int:
        """Bytes that an owner's storage counts for."""
        return self._stored[owner] + self._reserved[owner] + sum(self.databases.sizes(owner).values())

    async def stored_bytes(
        self, sizes: Callable[[], Awaitable[Mapping[str, tuple[int, int]]]]
    ) -> Mapping[str, tuple[int, int]]:
        """By owner: bytes in storage, and bytes of the files of sessions, of which `sizes` tells."""
        await self.count_again()
        files = await sizes()
        return {owner: (self.used(owner), files.get(owner, (0, 0))[1]) for owner in {*files, *self._stored}}

    def bound(self, owner: str) -> Bound | None:
        """The quota that an owner has."""
        return next(iter(self._quotas.bounds(OwnedId(owner, ""), "storage_mb")), None) if self._quotas else None

    def refuse(self, bound: Bound) -> NoReturn:
        """Raises QuotaReached."""
        raise bound.reached(round(self.used(bound.subject) / _MIB, 3), sorted(self.databases.sizes(bound.subject)))

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """The block adds to the storage of an owner, and where he has a quota nothing else does meanwhile at this host.
        What others have put and deleted counts, then."""
        if self._in_doubt:
            await self.count_again(_RECOUNT_SECONDS)
        if self.bound(owner) is None:
            yield
            return
        lock = self._turns.setdefault(owner, asyncio.Lock())
        async with lock:
            if self._is_shared:
                self._stored[owner] = (await self.store.item_bytes(owner)).get(owner, 0)
            yield

    def most_items(self, bound: Bound | None) -> int | None:
        """The bytes that an owner's items may count for in rows. None where no other host puts any, so that what is
        counted here is enough."""
        if bound is None or not self._is_shared:
            return None
        return bound.most * _MIB - sum(self.databases.sizes(bound.subject).values())

    @asynccontextmanager
    async def changing(self, owner: str, size: int = 0) -> AsyncIterator[None]:
        """The block changes rows of items, so that they count for at most `size` bytes more, and says `changed`; they
        aren't counted meanwhile. Where it isn't known whether they were changed, these bytes count until they are
        counted."""
        async with self._counting:
            self._changes += 1
            self._unchanging.clear()
        try:
            yield
        except Unavailable as error:
            if error.may_have_committed:
                self._in_doubt, self._counted_at = True, time.monotonic()
                self.changed(owner, size)
            raise
        finally:
            self._changes -= 1
            if not self._changes:
                self._unchanging.set()

    def changed(self, owner: str, by: int) -> None:
        """An owner's items count for so many bytes more, or less."""
        self._stored[owner] = max(0, self._stored[owner] + by)  # another host may have put what is deleted here

    @asynccontextmanager
    async def reserved(self, owner: str, size: int) -> AsyncIterator[None]:
        """Keep `size` bytes of room for what the block adds. Raises TooLarge where there is less, QuotaReached where
        the owner may not have so much, Unavailable."""
        room, bound = await self.room_for(size), self.bound(owner)
        if bound is not None and self.used(owner) + size > bound.most * _MIB:
            self.refuse(bound)
        if size > room:
            raise TooLarge(
                "The storage of this server is full.",
                hint="Delete what isn't needed; ERA_STORAGE_MB sets the bound.",
                code="storage_full",
            )
        self._reserved[owner] += size
        try:
            yield
        finally:
            self._reserved[owner] -= size
            if not self._reserved[owner]:
                del self._reserved[owner]


class Namespaces:
    """An owner's storage. Namespaces needn't be created; those that hold nothing look empty."""

    def __init__(self, storage: Storage, owner: str, asker: str) -> None:
        """`asker` is whoever of the owner's uses it; see Databases.run."""
        self._storage = storage
        self._owner = owner
        self._asker = asker
        self._store = storage.store
        self._blobs = storage.blobs
        self._databases = storage.databases

    async def put(self, kind: Kind, namespace: str, key: str, value: bytes, metadata: JsonObject | None) -> None:
        """Put a value; it is durable when this returns. Raises BadRequest, TooLarge, CommitFailed."""
        check_namespace(namespace)
        raw = check_key(key)
        if len(value) > MAX_VALUE[kind]:
            hint = "Put it into r2, which takes more." if kind == "kv" else "Keep larger things in a session's files."
            raise TooLarge(f"The value is {len(value)} bytes, {MAX_VALUE[kind]} are allowed.", hint=hint)
        noted = 0 if metadata is None else len(json.dumps(metadata).encode())
        if noted > MAX_METADATA:
            raise TooLarge(f"'metadata' is {noted} bytes, {MAX_METADATA} are allowed.", hint="Make it shorter.")
        # What is written must be counted, and whoever hangs up has his slot and his room until then.
        await to_its_end(self._put(kind, namespace, key, value, metadata, len(raw) + noted + len(value) + ROW_BYTES))

    async def get(self, kind: Kind, namespace: str, key: str) -> tuple[Item, bytes]:
        """An item with its value. Raises BadRequest, NotFound, Unavailable."""
        item, long = await self._found(kind, namespace, key, self._blobs.get)
        return item, long or item.value or b""

    async def open(self, kind: Kind, namespace: str, key: str) -> tuple[Item, SpooledOutput]:
        """An item, and what reads its value and must be closed. Raises as `get` does."""
        item, opened = await self._found(kind, namespace, key, self._opened)
        if opened is None:
            opened = SpooledOutput()
            await opened.append(item.value or b"")
        return item, opened

    def _opened(self, digest: str) -> SpooledOutput:
        return SpooledOutput.of_file(self._blobs.open_blob(digest))  # closed also where nobody waits for it any more

    async def _found[T](self, kind: Kind, namespace: str, key: str, read: Callable[[str], T]) -> tuple[Item, T | None]:
        """An item, with what reading its blob gives if it has one."""
        check_namespace(namespace)
        check_key(key)
        for last in (False, True):
            item = await self._store.item(self._owner, kind, namespace, key)
            if item is None:
                raise NotFound(f"'{namespace}' has no such key.", hint="GET the namespace to list its keys.")
            if item.value is not None:
                return item, None
            try:
                return item, await self._storage.threads.in_turn(self._owner, read, item.digest or "")
            except OSError as error:
                if last or not isinstance(error, FileNotFoundError):  # else replaced, and cleared away, meanwhile
                    raise Unavailable(f"The value could not be read: {error.strerror}.") from error
        raise AssertionError

    async def delete(self, kind: Kind, namespace: str, key: str) -> None:
        """Delete a value, if there is one; it is durably gone when this returns. Raises BadRequest."""
        check_namespace(namespace)
        check_key(key)
        await to_its_end(self._delete(kind, namespace, key))

    async def page(self, kind: Kind, namespace: str, *, prefix: str, after: str | None, limit: int) -> Page:
        """At most `limit` items whose keys begin with `prefix` and come after `after`. Raises BadRequest."""
        check_namespace(namespace)
        items = await self._store.items(self._owner, kind, namespace, prefix=prefix, after=after, limit=limit + 1)
        return Page(items[:limit], len(items) > limit)

    async def clear(self, kind: Kind, namespace: str) -> int:
        """Delete all items of a namespace, in many transactions. Returns how many. Raises BadRequest."""
        check_namespace(namespace)
        total = 0
        while True:
            count = await to_its_end(self._delete_batch(kind, namespace))
            total += count
            if count < _BATCH:
                return total

    async def sql(
        self, namespace: str, sql: str, params: Sequence[Any] | Mapping[str, Any], *, many: bool
    ) -> Sequence[bytes]:
        """Run SQL as one transaction; see Databases.run_as_json. Raises BadRequest, Forbidden, TooLarge, QuotaReached,
        Unavailable."""
        check_namespace(namespace)
        async with self._storage.turn(self._owner):
            most = self._databases.most_bytes - self._databases.sizes(self._owner).get(namespace, 0)
            room, bound = await self._storage.room_for(most), self._storage.bound(self._owner)
            if bound is not None:
                room = min(room, bound.most * _MIB - self._storage.used(self._owner))
            is_quota = bound is not None and room < min(self._storage.room(), most)
            try:
                return await self._databases.run_as_json(
                    self._owner, namespace, sql, params, many=many, room=room, asker=self._asker
                )
            except TooLarge as error:
                if error.code == "storage_full" and bound is not None and is_quota:
                    self._storage.refuse(bound)
                raise

    async def drop_database(self, namespace: str) -> bool:
        """Delete a namespace's database; whether there was one. Raises BadRequest."""
        check_namespace(namespace)
        return await self._databases.drop(self._owner, namespace)

    async def resources(
        self, kind: str | None, namespace: str | None, *, prefix: str, limit: int, offset: int
    ) -> tuple[list[JsonObject], int]:
        """A page of all there is, first tables of databases, then items; and how many there are in all. `kind` is kv,
        d1, r2 or None for all. Raises BadRequest."""
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
        """How many items and tables there are, by kind and by namespace, and how many bytes they take."""
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
        """Namespace and name of each table, in one namespace or, with None, in all."""
        namespaces = [name for name in sorted(self._databases.sizes(self._owner)) if namespace in (None, name)]
        sql = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite!_%' ESCAPE '!' ORDER BY 1"
        tables = []
        for name in namespaces:
            pieces = await self._databases.run_as_json(self._owner, name, sql, many=False, room=0, asker=self._asker)
            names = [row["name"] for row in json.loads(b"".join(pieces))["results"]]
            tables += [(name, table) for table in names if table.startswith(prefix)]
        return tables

    async def _put(
        self, kind: Kind, namespace: str, key: str, value: bytes, metadata: JsonObject | None, counted: int
    ) -> None:
        """Store an item whose value is long as a blob first. `counted` is how many bytes count towards the bound."""
        owner, digest = self._owner, None
        async with self._storage.turn(owner), self._storage.reserved(owner, counted):
            with self._blobs.naming():
                if len(value) > INLINE_BYTES:
                    digest = await self._storage.threads.in_turn(owner, self._put_blob, value)
                inline, at, bound = None if digest else value, now(), self._storage.bound(owner)
                item = Item(owner, kind, namespace, key, len(value), at, at, metadata, digest, inline)
                try:
                    async with self._storage.changing(owner, counted):
                        freed = await self._store.put_item(item, self._storage.most_items(bound))
                        self._storage.changed(owner, counted - freed)
                except NoRoom:
                    if bound is None:
                        raise
                    self._storage.refuse(bound)

    async def _delete(self, kind: Kind, namespace: str, key: str) -> None:
        async with self._storage.changing(self._owner):
            freed = await self._store.delete_item(self._owner, kind, namespace, key)
            self._storage.changed(self._owner, -freed)

    async def _delete_batch(self, kind: Kind, namespace: str) -> int:
        """Delete at most _BATCH items and release their bytes. Returns how many were deleted."""
        async with self._storage.changing(self._owner):
            count, freed = await self._store.delete_items(self._owner, kind, namespace, _BATCH)
            self._storage.changed(self._owner, -freed)
        return count

    def _put_blob(self, value: bytes) -> str:
        """Put a blob; its digest. Raises CommitFailed."""
        try:
            with self._blobs.batch() as batch:
                return batch.put(value)
        except OSError as error:
            raise CommitFailed(f"The value could not be kept: {error.strerror}.", hint="Try again later.") from error


def check_namespace(namespace: str) -> None:
    """Raises BadRequest."""
    if not NAMESPACE.fullmatch(namespace):
        raise BadRequest(
            "That can't be a namespace.",
            hint="Use 1 to 64 letters, digits, '_', '-', '.' and ':', the first none of the last two.",
            code="bad_namespace",
        )


def check_key(key: str) -> bytes:
    """The key as the bytes that are stored. Raises BadRequest."""
    raw = key.encode(errors="surrogatepass")
    if not 0 < len(raw) <= MAX_KEY or "\0" in key:
        raise BadRequest("That can't be a key.", hint=f"Use 1 to {MAX_KEY} bytes of UTF-8 without NUL.", code="bad_key")
    return raw


def _resource(item: Item) -> JsonObject:
    """An item in a list of all there is."""
    return {
        "type": item.kind,
        "namespace": item.namespace,
        "key": item.key,
        "size": item.size,
        "metadata": item.metadata,
        "created_at": item.created_at,
        "updated_at": item.updated_at,
    }
