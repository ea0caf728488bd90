"""Storage items: the values that the sessions of an owner share as KV pairs (`kv`) or R2 objects (`r2`).

An item's key is neither an API key nor an idempotency key. Tables of D1 are no items: see d1_databases.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, func, insert, select

from era.core.storage.storage import ROW_BYTES, Item, Kind, NoRoom
from era.store.blobs.condemned import check_alive
from era.store.engine.dialects import Precompiled, bytewise
from era.store.engine.tables import storage_items
from era.store.rows import Rows, reads, writes

_t = storage_items.c
_COUNTED = _t.size + func.length(_t.key) + func.coalesce(func.length(_t.metadata), 0) + ROW_BYTES
"""The bytes that an item counts for; core/storage/storage.py adds up the same for one that is to be put."""

_LISTED = (_t.owner, _t.kind, _t.namespace, _t.key, _t.size, _t.created_at, _t.updated_at, _t.metadata, _t.digest)

_NAMES = ("owner", "kind", "namespace", "key")
_before = Precompiled(select(_t.created_at, _COUNTED).where(*(_t[name] == bindparam(name) for name in _NAMES)))


class StorageItemRows(Rows):
    @writes
    def put_item(self, connection: Connection, item: Item, most: int | None = None) -> int:
        this = _is_item(item.owner, item.kind, item.namespace, item.key)
        before = _find_alive(connection, item.owner, item.kind, item.namespace, item.key)
        if before is not None:
            connection.execute(delete(storage_items).where(this))
        values = {
            "owner": item.owner,
            "kind": item.kind,
            "namespace": item.namespace,
            "key": item.key.encode(),
            "size": item.size,
            "created_at": item.created_at if before is None else before[0],
            "updated_at": item.updated_at,
            "metadata": None if item.metadata is None else json.dumps(item.metadata),
            "digest": item.digest,
            "value": item.value,
        }
        connection.execute(insert(storage_items).values(values))
        counted = select(func.sum(_COUNTED)).where(_t.owner == item.owner)
        if most is not None and connection.execute(counted).scalar_one() > most:
            raise NoRoom
        return 0 if before is None else int(before[1])

    @reads
    def item(self, connection: Connection, owner: str, kind: Kind, namespace: str, key: str) -> Item | None:
        query = select(*_LISTED, _t.value).where(_is_item(owner, kind, namespace, key))
        row = connection.execute(query).one_or_none()
        return None if row is None else _item_from_row(row, row.value)

    @writes
    def delete_item(self, connection: Connection, owner: str, kind: Kind, namespace: str, key: str) -> int:
        before = _find_alive(connection, owner, kind, namespace, key)
        if before is None:
            return 0
        connection.execute(delete(storage_items).where(_is_item(owner, kind, namespace, key)))
        return int(before[1])

    @writes
    def delete_items(
        self, connection: Connection, owner: str, kind: Kind, namespace: str, limit: int
    ) -> tuple[int, int]:
        check_alive(connection)
        in_namespace = and_(_t.owner == owner, _t.kind == kind, _t.namespace == namespace)
        first = select(_t.key, _COUNTED).where(in_namespace).order_by(_t.key).limit(limit)
        rows = connection.execute(first).all()
        if rows:
            connection.execute(delete(storage_items).where(in_namespace, _t.key <= rows[-1][0]))
        return len(rows), sum(int(row[1]) for row in rows)

    @reads
    def items(
        self,
        connection: Connection,
        owner: str,
        kind: Kind,
        namespace: str,
        *,
        prefix: str,
        after: str | None,
        limit: int,
    ) -> Sequence[Item]:
        query = select(*_LISTED).where(
            _t.owner == owner, _t.kind == kind, _t.namespace == namespace, *_has_prefix(prefix)
        )
        if after is not None:
            query = query.where(_t.key > after.encode())
        return [_item_from_row(row) for row in connection.execute(query.order_by(_t.key).limit(limit))]

    async def all_items(
        self, owner: str, kind: Kind | None, namespace: str | None, *, prefix: str, limit: int, offset: int
    ) -> tuple[Sequence[Item], int]:
        which = [_t.owner == owner, *_has_prefix(prefix)]
        if kind is not None:
            which.append(_t.kind == kind)
        if namespace is not None:
            which.append(_t.namespace == namespace)
        order = (_t.kind, bytewise(_t.namespace), _t.key)
        page = select(*_LISTED).where(*which).order_by(*order).limit(limit).offset(offset)
        count = select(func.count()).select_from(storage_items).where(*which)

        def job(connection: Connection) -> tuple[Sequence[Item], int]:
            return [_item_from_row(row) for row in connection.execute(page)], connection.execute(count).scalar_one()

        return await self.database.read_for(owner, job)

    async def item_counts(self, owner: str) -> Sequence[tuple[Kind, str, int, int]]:
        query = select(_t.kind, _t.namespace, func.count(), func.sum(_t.size))
        query = query.where(_t.owner == owner).group_by(_t.kind, _t.namespace)

        def job(connection: Connection) -> Sequence[tuple[Kind, str, int, int]]:
            return [(row[0], row[1], int(row[2]), int(row[3])) for row in connection.execute(query)]

        return await self.database.read_for(owner, job)

    @reads
    def item_bytes(self, connection: Connection, owner: str | None = None) -> Mapping[str, int]:
        query = select(_t.owner, func.sum(_COUNTED)).group_by(_t.owner)
        if owner is not None:
            query = query.where(_t.owner == owner)
        return {owner: int(size) for owner, size in connection.execute(query)}


def _is_item(owner: str, kind: Kind, namespace: str, key: str) -> ColumnElement[bool]:
    return and_(_t.owner == owner, _t.kind == kind, _t.namespace == namespace, _t.key == key.encode())


def _find_alive(connection: Connection, owner: str, kind: Kind, namespace: str, key: str) -> Any:
    """When an item was made and what it counts for, or None, in a transaction that changes it. Raises HostLost."""
    values = {"owner": owner, "kind": kind, "namespace": namespace, "key": key.encode()}
    return check_alive(connection, (_before, values))[0].row


def _has_prefix(prefix: str) -> list[ColumnElement[bool]]:
    """The conditions for keys that begin with `prefix`, as a range that the primary key's index serves. UTF-8 never has
    the byte 255, so it is above all that can follow."""
    raw = prefix.encode()
    return [_t.key >= raw, _t.key < raw + b"\xff"] if raw else []


def _item_from_row(row: Any, value: bytes | None = None) -> Item:
    """Convert a row of `_LISTED`, with the value where that was read, too."""
    return Item(
        row.owner,
        row.kind,
        row.namespace,
        bytes(row.key).decode(),
        row.size,
        row.created_at,
        row.updated_at,
        None if row.metadata is None else json.loads(row.metadata),
        row.digest,
        value,
    )
