"""Routes of the storage that programs and clients share: keys and values (kv), objects (r2), SQL databases (d1).

Clients call them with a key, programs through a guest listener of their sandbox (guest_api.py). Both get the storage of
their owner.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from typing import Annotated, Literal
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Depends, Query, Request, Response

from era.api.protocol.answers import Answer, json_bytes
from era.api.routing.context import StrictRoute, caller_of, cursor_of, errors, last_of
from era.api.routing.streaming import ClosingResponse, page_pieces
from era.core.concurrency.meter import turn
from era.core.execution.spooled_output import SpooledOutput
from era.core.models import JsonObject, timestamp
from era.core.storage.storage import INLINE_BYTES, Namespaces, Storage, check_namespace
from era.errors import BadRequest, Unavailable
from era.wire.storage import (
    ClearedAnswer,
    DoneAnswer,
    KeysAnswer,
    ObjectAnswer,
    ObjectsAnswer,
    PutObject,
    PutObjectAnswer,
    PutValue,
    ResourcesAnswer,
    SqlAnswer,
    SqlBody,
    StatsAnswer,
    ValueAnswer,
)

router = APIRouter(prefix="/api/storage", tags=["storage"], route_class=StrictRoute)
resources = APIRouter(prefix="/api/resources", tags=["storage"], route_class=StrictRoute)

_PIECE_BYTES = 3 << 14
"""Bytes of an object that become base64 at a time, a multiple of 3, and of a result that are sent at a time."""

_BASE64_PIECE = 1 << 16
"""Characters of base64 that are decoded at a time, a multiple of 4."""

_BASE64_END = 8
"""So many are decoded with what comes before: the end is valid or isn't, as if all were decoded at once."""

_ITEM = re.compile(rb"/api/storage/(?:kv|r2)/([^/]+)/(.*)", re.DOTALL)
_NAMESPACE = re.compile(rb"/api/storage/(?:kv|r2|d1)/([^/]+)(?:/(?:query|exec))?")


async def namespace_in_url(request: Request) -> str:
    """The namespace, decoded once from the raw URL. Raises BadRequest."""
    match = _NAMESPACE.fullmatch(request.scope["raw_path"]) or _ITEM.fullmatch(request.scope["raw_path"])
    namespace = unquote_to_bytes(match[1]).decode(errors="replace") if match else ""
    check_namespace(namespace)
    return namespace


async def key_in_url(request: Request) -> str:
    """The key, decoded once from the raw URL, since it may hold any character. Raises BadRequest."""
    match = _ITEM.fullmatch(request.scope["raw_path"])
    try:
        return unquote_to_bytes(match[2]).decode() if match else ""
    except UnicodeDecodeError:
        raise BadRequest("The key is not UTF-8.", hint="Escape it as %XX, byte by byte.", code="bad_key") from None


async def own_storage(request: Request) -> Namespaces:
    """The storage of the caller's owner, and no other. A client's owner follows from its key, a program's from the
    guest listener that it connected to.

    What an owner has at a time is shared by those of his who ask: each sandbox, whatever its programs send, and each
    connection of a client, since a key or an address may be that of many clients."""
    storage: Storage = request.app.state.storage
    caller = caller_of(request)
    asker = caller.sandbox or f"client {request.scope['client'] or caller.key_id}"
    return storage.of(caller.owner, asker)


UseStorage = Annotated[Namespaces, Depends(own_storage)]
Namespace = Annotated[str, Depends(namespace_in_url)]
Key = Annotated[str, Depends(key_in_url)]
Prefix = Annotated[str, Query(max_length=1024, description="Only keys that begin with this.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Items per page.")]
Cursor = Annotated[str | None, Query(max_length=1500, description="`cursor` of the page before.")]


@router.get("/kv/{namespace}", responses={200: {"model": KeysAnswer}, **errors()})
async def list_keys(
    namespace: Namespace,
    storage: UseStorage,
    request: Request,
    prefix: Prefix = "",
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """List the keys of a namespace, in the order of their bytes."""
    page = await storage.page(
        "kv", namespace, prefix=prefix, after=last_of(cursor, "cursor") if cursor else None, limit=limit
    )
    rest = {"list_complete": not page.more, "cursor": cursor_of(page.items[-1].key) if page.more else None}
    return await _page("keys", page.items, lambda item: {"name": item.key, "metadata": item.metadata}, rest, request)


async def _page[T](
    name: str, items: Sequence[T], shown: Callable[[T], JsonObject], rest: JsonObject, request: Request
) -> Response:
    """The answer with a page of a list, made in pieces."""
    pieces = [piece async for piece in page_pieces(name, items, shown, rest)]
    return await _kept(pieces, request)


async def _kept(pieces: Sequence[bytes], request: Request) -> Response:
    """The answer that has these pieces, with a Content-Length, on which the clients in sandboxes rely. A long one is in
    a file, as a run's output is: nobody knows when it will be taken. Raises Unavailable where the disk fails."""
    if sum(map(len, pieces)) <= _PIECE_BYTES:
        return Response(b"".join(pieces), media_type=Answer.media_type)
    storage: Storage = request.app.state.storage
    kept = SpooledOutput(storage.directory)
    try:
        for piece in pieces:
            await kept.append(piece)
    except OSError as error:
        hint = "What was asked for has been done. Ask for less, or again later."
        problem = Unavailable(f"The answer could not be kept: {error.strerror}.", hint=hint)
        problem.retry_after = None  # or clients would send SQL that has been done again by themselves
        raise problem from error
    paced = _paced(kept)
    headers = {"Content-Length": str(kept.size)}
    return ClosingResponse(paced, kept.close, media_type=Answer.media_type, headers=headers)


async def _paced(kept: SpooledOutput) -> AsyncIterator[bytes]:
    """The pieces, of which a client that takes them quickly doesn't get all at once: others have their turn between."""
    async for piece in kept.pieces(0, kept.size):
        yield piece
        await turn()


@router.delete("/kv/{namespace}", responses={200: {"model": ClearedAnswer}, **errors()})
async def clear_keys(namespace: Namespace, storage: UseStorage) -> Response:
    """Delete every key of a namespace."""
    return Answer({"success": True, "deleted": await storage.clear("kv", namespace)})


@router.get("/kv/{namespace}/{key:rest}", responses={200: {"model": ValueAnswer}, **errors(404)})
async def get_value(namespace: Namespace, key: Key, request: Request, storage: UseStorage) -> Response:
    """Get a value."""
    item, value = await storage.get("kv", namespace, key)
    return await _kept([json_bytes({"value": value.decode(), "metadata": item.metadata})], request)


@router.put("/kv/{namespace}/{key:rest}", responses={200: {"model": DoneAnswer}, **errors(413)})
async def put_value(namespace: Namespace, key: Key, body: PutValue, storage: UseStorage) -> Response:
    """Store a value, replacing any that was there."""
    await storage.put("kv", namespace, key, body.value.encode(), body.metadata)
    return Answer({"success": True})


@router.delete("/kv/{namespace}/{key:rest}", responses={200: {"model": DoneAnswer}, **errors()})
async def delete_value(namespace: Namespace, key: Key, storage: UseStorage) -> Response:
    """Delete a value. Succeeds where there is none, too."""
    await storage.delete("kv", namespace, key)
    return Answer({"success": True})


@router.get("/r2/{namespace}", responses={200: {"model": ObjectsAnswer}, **errors()})
async def list_objects(
    namespace: Namespace, storage: UseStorage, prefix: Prefix = "", limit: Limit = 100, cursor: Cursor = None
) -> Response:
    """List the objects of a namespace, in the order of their keys' bytes."""
    page = await storage.page(
        "r2", namespace, prefix=prefix, after=last_of(cursor, "cursor") if cursor else None, limit=limit
    )
    objects = [{"key": item.key, "size": item.size, "uploaded": timestamp(item.updated_at)} for item in page.items]
    return Answer(
        {"objects": objects, "truncated": page.more, "cursor": cursor_of(page.items[-1].key) if page.more else None}
    )


@router.delete("/r2/{namespace}", responses={200: {"model": ClearedAnswer}, **errors()})
async def clear_objects(namespace: Namespace, storage: UseStorage) -> Response:
    """Delete every object of a namespace."""
    return Answer({"success": True, "deleted": await storage.clear("r2", namespace)})


@router.get("/r2/{namespace}/{key:rest}", responses={200: {"model": ObjectAnswer}, **errors(404)})
async def get_object(namespace: Namespace, key: Key, request: Request, storage: UseStorage) -> Response:
    """Get an object."""
    item, value = await storage.open("r2", namespace, key)
    answer = {
        "content": "",
        "size": item.size,
        "uploaded": timestamp(item.updated_at),
        "customMetadata": item.metadata or {},
    }
    if value.size <= INLINE_BYTES:
        with closing(value):
            return Answer({**answer, "content": base64.b64encode(await value.whole()).decode()})
    rest = json_bytes(answer)
    headers = {"Content-Length": str(len(rest) + -(-value.size // 3) * 4)}
    pieces = _in_pieces(value, rest)
    return ClosingResponse(pieces, value.close, media_type="application/json", headers=headers)


async def _in_pieces(value: SpooledOutput, without_content: bytes) -> AsyncIterator[bytes]:
    """The answer with an object, the same bytes as if it had been made in one piece. Little of it is in memory, however
    slowly it is taken, and others have their turn. `without_content` is that of an empty one."""
    begin = without_content.index(b'""') + 1
    yield without_content[:begin]
    for at in range(0, value.size, _PIECE_BYTES):
        yield base64.b64encode(await value.read(at, min(at + _PIECE_BYTES, value.size)))
        await turn()
    yield without_content[begin:]


@router.put("/r2/{namespace}/{key:rest}", responses={200: {"model": PutObjectAnswer}, **errors(413)})
async def put_object(
    namespace: Namespace, key: Key, body: PutObject, request: Request, storage: UseStorage
) -> Response:
    """Store an object, replacing any that was there."""
    try:
        content = await _decoded(body.content)
    except (binascii.Error, ValueError):
        raise BadRequest("'content' is not base64.", hint="Encode the bytes as base64, without line breaks.") from None
    await storage.put("r2", namespace, key, content, body.metadata)
    return Answer({"success": True, "size": len(content)})


async def _decoded(content: str) -> bytes:
    """The bytes that this is the base64 of, decoded in pieces, between which others have their turn. Raises
    ValueError."""
    pieces, at = [], 0
    while len(content) - at > _BASE64_PIECE + _BASE64_END:
        piece = base64.b64decode(content[at : at + _BASE64_PIECE], validate=True)
        if len(piece) < _BASE64_PIECE // 4 * 3:
            raise ValueError("what ends base64 is in the middle of it")
        pieces.append(piece)
        at += _BASE64_PIECE
        await turn()
    return b"".join([*pieces, base64.b64decode(content[at:], validate=True)])


@router.delete("/r2/{namespace}/{key:rest}", responses={200: {"model": DoneAnswer}, **errors()})
async def delete_object(namespace: Namespace, key: Key, storage: UseStorage) -> Response:
    """Delete an object. Succeeds where there is none, too."""
    await storage.delete("r2", namespace, key)
    return Answer({"success": True})


@router.post("/d1/{namespace}/query", responses={200: {"model": SqlAnswer}, **errors(413)})
async def run_statement(namespace: Namespace, body: SqlBody, request: Request, storage: UseStorage) -> Response:
    """Run one SQL statement on the namespace's database."""
    return await _sql_answer(await storage.sql(namespace, body.sql, body.params or [], many=False), request)


@router.post("/d1/{namespace}/exec", responses={200: {"model": SqlAnswer}, **errors(413)})
async def run_statements(namespace: Namespace, body: SqlBody, request: Request, storage: UseStorage) -> Response:
    """Run SQL statements on the namespace's database, in one transaction."""
    return await _sql_answer(await storage.sql(namespace, body.sql, body.params or [], many=True), request)


async def _sql_answer(result: Sequence[bytes], request: Request) -> Response:
    """The answer with a result of SQL, an object of JSON in pieces, which are passed on as they are."""
    return await _kept([b'{"success":true,', result[0].removeprefix(b"{"), *result[1:]], request)


@router.delete("/d1/{namespace}", responses={200: {"model": ClearedAnswer}, **errors()})
async def drop_database(namespace: Namespace, storage: UseStorage) -> Response:
    """Delete the namespace's database."""
    return Answer({"success": True, "deleted": int(await storage.drop_database(namespace))})


@resources.get("/list", responses={200: {"model": ResourcesAnswer}, **errors()})
async def list_resources(
    storage: UseStorage,
    request: Request,
    type: Annotated[Literal["kv", "d1", "r2"] | None, Query(description="Of this kind only.")] = None,
    namespace: Annotated[str | None, Query(description="Of this namespace only.")] = None,
    key_prefix: Prefix = "",
    limit: Limit = 100,
    offset: Annotated[int, Query(ge=0, le=1 << 40, description="How many to skip.")] = 0,
) -> Response:
    """List everything in storage: keys, objects, and tables of databases."""
    page, total = await storage.resources(type, namespace, prefix=key_prefix, limit=limit, offset=offset)
    rest = {"total": total, "limit": limit, "offset": offset, "has_more": offset + len(page) < total}
    return await _page("resources", page, _resource_answer, rest, request)


def _resource_answer(resource: JsonObject) -> JsonObject:
    return resource | {name: timestamp(resource[name]) for name in ("created_at", "updated_at") if name in resource}


@resources.get("/stats", responses={200: {"model": StatsAnswer}, **errors()})
async def resource_stats(storage: UseStorage) -> Response:
    """Show how much is in storage: counts and bytes."""
    stats: JsonObject = await storage.stats()
    return Answer(stats)
