"""Routes of a session's inbox: its settings and its deliveries. Deliveries themselves come in by proxy.py."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from era.api.protocol.addresses import called_url
from era.api.protocol.answers import Answer
from era.api.routing.context import Context, Cursor, Limit, SessionId, StrictRoute, UseContext, errors, key_of
from era.api.routing.streaming import paged_response
from era.core.models import OwnedId
from era.core.public.inbox import DeliveryStatus
from era.core.signatures import HEADERS, Verify
from era.wire.inbox import (
    DeliveriesAnswer,
    DeliveryAnswer,
    DeliveryContentAnswer,
    InboxAnswer,
    InboxBody,
    InboxDeletedAnswer,
    content_answer,
    delivery_answer,
    inbox_answer,
)

router = APIRouter(prefix="/api/sessions/{session_id}/inbox", tags=["inbox"], route_class=StrictRoute)

Status = Annotated[DeliveryStatus | None, Query(description="Only those in this state.")]


@router.put("", responses={200: {"model": InboxAnswer}, **errors(404)})
async def put_inbox(session_id: SessionId, body: InboxBody, request: Request, context: UseContext) -> Response:
    """Give the session an inbox, or change its settings. Deliveries stay."""
    verify = None
    if (settings := body.verify) is not None:
        verify = Verify(settings.scheme, settings.secret, (settings.header or HEADERS[settings.scheme]).lower())
    await context.inbox.store.put_inbox(session_id, verify, body.retries)
    return await _shown(session_id, request, context)


@router.get("", responses={200: {"model": InboxAnswer}, **errors(404)})
async def get_inbox(session_id: SessionId, request: Request, context: UseContext) -> Response:
    """Show the session's inbox, without its secret."""
    return await _shown(session_id, request, context)


@router.delete("", responses={200: {"model": InboxDeletedAnswer}, **errors(404)})
async def delete_inbox(session_id: SessionId, context: UseContext) -> Response:
    """Remove the session's inbox with all its deliveries, pending ones included."""
    dropped = await context.inbox.store.delete_inbox(session_id)
    return Answer({"success": True, "session_id": session_id.id, "deleted_deliveries": dropped})


@router.get("/deliveries", responses={200: {"model": DeliveriesAnswer}, **errors(404)})
async def list_deliveries(
    session_id: SessionId, context: UseContext, status: Status = None, limit: Limit = 100, cursor: Cursor = None
) -> Response:
    """List deliveries, newest first."""
    found = await context.inbox.store.deliveries(session_id, status=status, limit=limit + 1, before=key_of(cursor))
    return await paged_response("deliveries", found, limit, delivery_answer, lambda delivery: delivery.key)


@router.get("/deliveries/{delivery_id}", responses={200: {"model": DeliveryContentAnswer}, **errors(404)})
async def get_delivery(session_id: SessionId, delivery_id: str, context: UseContext) -> Response:
    """Show a delivery with the request that brought it."""
    return Answer(content_answer(*await context.inbox.store.delivery(session_id, delivery_id)))


@router.post("/deliveries/{delivery_id}/replay", responses={202: {"model": DeliveryAnswer}, **errors(404, 409, 429)})
async def replay_delivery(session_id: SessionId, delivery_id: str, context: UseContext) -> Response:
    """Run a delivery again, with the code that is stored by then. A pending one skips its delay, but not the deliveries
    before it."""
    return Answer(delivery_answer(await context.inbox.replay(session_id, delivery_id)), 202)


async def _shown(session_id: OwnedId, request: Request, context: Context) -> Response:
    """The answer that shows an inbox."""
    inbox, counts = await context.inbox.store.inbox(session_id)
    url = f"{called_url(request, context.settings)}/proxy/{session_id}/inbox"
    return Answer(inbox_answer(session_id.id, url, inbox, counts))
