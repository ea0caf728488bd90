"""Webhooks: the body that makes one, and how they and their notices are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, FailFast, Field

from era.core.models import timestamp
from era.core.owners.webhooks import EVENTS, MAX_URL, Event, Notice, NoticeStatus, Webhook
from era.wire.base import Body


class WebhookBody(Body):
    url: str = Field(
        min_length=1,
        max_length=MAX_URL,
        description="Where notices are POSTed, by https or http; a public address, as for programs.",
        examples=["https://example.com/era"],
    )
    events: Annotated[list[Event], FailFast()] = Field(
        default_factory=lambda: list(EVENTS), min_length=1, description="What is told; left out: all."
    )
    description: str = Field("", max_length=1000, description="What it is for, as a note to people.")


class WebhookAnswer(BaseModel):
    id: str
    url: str
    events: list[Event]
    description: str
    created_at: str
    pending: int = Field(description="Notices that wait to be sent.")
    done: int = Field(description="Notices that were sent, of those that are kept.")
    failed: int = Field(description="Notices that were given up, of those that are kept.")
    dropped: int = Field(description="Notices that are lost, since too many waited.")


class NewWebhookAnswer(WebhookAnswer):
    secret: str = Field(repr=False, description="What notices are signed with, which is shown in this answer only.")


class WebhooksAnswer(BaseModel):
    webhooks: list[WebhookAnswer]
    count: int


class WebhookDeletedAnswer(BaseModel):
    success: bool
    id: str


class NoticeAnswer(BaseModel):
    id: str
    event: Event
    status: NoticeStatus
    tries: int
    created_at: str
    next_attempt_at: str | None
    ended_at: str | None
    http_status: int | None = Field(description="The status of the last answer, null where there was none.")
    reason: str | None = Field(description="Why the last try failed.")


class NoticesAnswer(BaseModel):
    deliveries: list[NoticeAnswer]
    count: int


def webhook_answer(webhook: Webhook, counts: Mapping[NoticeStatus, int]) -> dict[str, Any]:
    return {
        "id": webhook.id,
        "url": webhook.url,
        "events": list(webhook.events),
        "description": webhook.description,
        "created_at": timestamp(webhook.created_at),
        "pending": counts.get("pending", 0),
        "done": counts.get("done", 0),
        "failed": counts.get("failed", 0),
        "dropped": webhook.dropped,
    }


def notice_answer(notice: Notice) -> dict[str, Any]:
    return {
        "id": notice.id,
        "event": notice.event,
        "status": notice.status,
        "tries": notice.tries,
        "created_at": timestamp(notice.created_at),
        "next_attempt_at": None if notice.next_attempt_at is None else timestamp(notice.next_attempt_at),
        "ended_at": None if notice.ended_at is None else timestamp(notice.ended_at),
        "http_status": notice.http_status,
        "reason": notice.reason,
    }
