"""The route that tells what changes in the files of a live session."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from era.api.context import SessionId, StrictRoute, UseContext, until_barred
from era.api.event_stream import After, Event, described, event_stream
from era.core.event_log import Gap
from era.core.files.paths import parse
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
    path: Annotated[str, Query(max_length=4096, description="A directory or file; empty for all.")] = "",
    recursive: Annotated[bool, Query(description="Also what is in directories below.")] = False,
) -> Response:
    """Follow what changes in the files of a live session, from now on, or from where a connection broke."""
    async with AsyncExitStack() as stack:
        parts = parse(path) if path else ()
        watched = context.watching.watched(session_id, parts, recursive=recursive, after=after)
        items = await stack.enter_async_context(watched)
        kept = stack.pop_all()

    async def events() -> AsyncGenerator[Event | Gap]:
        async with kept:
            async for item in items:
                if isinstance(item, Gap):
                    yield item
                    continue
                number, event = item
                fields = {"path": event.path, "to": event.to}
                yield Event(number, event.kind, {name: path_text(at) for name, at in fields.items() if at is not None})

    made = events()
    return event_stream(_begun(await anext(made), made), barred=until_barred(context, request, "read"))


async def _begun(first: Event | Gap, others: AsyncGenerator[Event | Gap]) -> AsyncGenerator[Event | Gap]:
    """All events. The others have begun by then, so that the watch ends also where nobody asks for the first."""
    try:
        yield first
        async for event in others:
            yield event
    finally:
        await others.aclose()
