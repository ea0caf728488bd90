"""The route that tells what changes in the files of a session."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from functools import lru_cache
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from era.api.context import SessionId, StrictRoute, UseContext, until_barred
from era.api.event_stream import After, Event, described, encoded, event_stream
from era.core.event_log import Gap
from era.core.files.paths import parse_place
from era.core.live.watching import FileEvent
from era.wire.files import path_text
from era.wire.watching import FileWatchEvent

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["files"], route_class=StrictRoute)


@router.get(
    "/watch",
    **described(
        "First `watching`, then `create`, `write`, `remove`, `rename`, `chmod`; `overflow` or `gap` for what was lost.",
        "FileWatchEvent",
        FileWatchEvent,
        404,
        409,
    ),
)
async def watch_files(
    session_id: SessionId,
    request: Request,
    context: UseContext,
    after: After,
    path: Annotated[str, Query(max_length=4096, description="A directory or file; empty or `.` for all.")] = "",
    recursive: Annotated[bool, Query(description="Also what is in directories below.")] = False,
) -> Response:
    """Follow what changes in a session's files, from now on, or from where a connection broke. Those of a session that
    isn't live are followed by its versions."""
    async with AsyncExitStack() as stack:
        watched = context.watching.watched(session_id, parse_place(path), recursive=recursive, after=after)
        items = await stack.enter_async_context(watched)
        kept = stack.pop_all()

    async def events() -> AsyncGenerator[bytes | Gap]:
        async with kept:
            async for piece in items:
                yield piece if isinstance(piece, Gap) else b"".join(_encoded(*numbered) for numbered in piece)

    made = events()
    return event_stream(_begun(await anext(made), made), barred=until_barred(context, request, "read"))


@lru_cache(1000)
def _encoded(number: int, event: FileEvent) -> bytes:
    """An event as it is sent, encoded once for all readers."""
    fields = {"path": event.path, "to": event.to}
    return encoded(Event(number, event.kind, {name: path_text(at) for name, at in fields.items() if at is not None}))


async def _begun(first: bytes | Gap, others: AsyncGenerator[bytes | Gap]) -> AsyncGenerator[bytes | Gap]:
    """All events. The others have begun by then, so that the watch ends also where nobody asks for the first."""
    try:
        yield first
        async for event in others:
            yield event
    finally:
        await others.aclose()
