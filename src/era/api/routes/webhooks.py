"""Routes of webhooks: each owner's own."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from era.api.protocol.answers import Answer
from era.api.routing.context import Owner, StrictRoute, UseContext, caller_of, errors
from era.wire.webhooks import (
    NewWebhookAnswer,
    NoticeAnswer,
    NoticesAnswer,
    WebhookBody,
    WebhookDeletedAnswer,
    WebhooksAnswer,
    notice_answer,
    webhook_answer,
)

router = APIRouter(prefix="/api/webhooks", tags=["webhooks"], route_class=StrictRoute)

WebhookId = Annotated[str, Path(max_length=128)]


@router.post("", status_code=201, responses={201: {"model": NewWebhookAnswer}, **errors(409)})
async def create_webhook(body: WebhookBody, request: Request, context: UseContext) -> Response:
    """Make a webhook. Only this answer shows the secret that its notices are signed with."""
    caller, events = caller_of(request), tuple(dict.fromkeys(body.events))
    webhook = await context.webhooks.create(caller.owner, body.url, events, body.description)
    await context.audit.record(caller, "webhook.create", webhook.id, events=list(events))
    answer = {**webhook_answer(webhook, {}), "secret": context.webhooks.secret(webhook)}
    return Answer(answer, 201, headers={"Cache-Control": "no-store"})


@router.get("", responses={200: {"model": WebhooksAnswer}, **errors()})
async def list_webhooks(owner: Owner, context: UseContext) -> Response:
    """List the caller's webhooks, oldest first."""
    webhooks = [webhook_answer(*each) for each in await context.webhooks.store.webhooks(owner)]
    return Answer({"webhooks": webhooks, "count": len(webhooks)})


@router.delete("/{webhook_id}", responses={200: {"model": WebhookDeletedAnswer}, **errors(404)})
async def delete_webhook(webhook_id: WebhookId, request: Request, context: UseContext) -> Response:
    """Delete a webhook, with what waits to be told to it."""
    caller = caller_of(request)
    await context.webhooks.store.drop_webhook(caller.owner, webhook_id)
    await context.audit.record(caller, "webhook.delete", webhook_id)
    return Answer({"success": True, "id": webhook_id})


@router.get("/{webhook_id}/deliveries", responses={200: {"model": NoticesAnswer}, **errors(404)})
async def list_notices(webhook_id: WebhookId, owner: Owner, context: UseContext) -> Response:
    """List what waits to be told to a webhook, and the last hundred that were told or given up, newest first."""
    notices = [notice_answer(notice) for notice in await context.webhooks.store.notices(owner, webhook_id)]
    return Answer({"deliveries": notices, "count": len(notices)})


@router.post("/{webhook_id}/deliveries/{delivery_id}/replay", responses={202: {"model": NoticeAnswer}, **errors(404)})
async def replay_notice(webhook_id: WebhookId, delivery_id: WebhookId, owner: Owner, context: UseContext) -> Response:
    """Send a notice once more, with the same id, after those that wait. One that waits itself skips its delay, but not
    the notices before it."""
    return Answer(notice_answer(await context.webhooks.replay(owner, webhook_id, delivery_id)), 202)
