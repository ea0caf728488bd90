"""Inboxes and their deliveries: settings as clients send them, and how both are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from era.core.models import timestamp
from era.core.public.inbox import DEFAULT_RETRIES, MAX_RETRIES, Content, Delivery, DeliveryStatus, InboxSettings
from era.core.public.relay import body_text
from era.wire.base import Body

STATUSES: tuple[DeliveryStatus, ...] = ("pending", "running", "done", "failed")


class VerifyBody(Body):
    scheme: Literal["github", "stripe", "hmac"]
    secret: str = Field(
        min_length=1, max_length=1024, repr=False, description="The secret that signatures are made with; never shown."
    )
    header: Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}$")] | None = Field(
        None, description="The header that holds the signature; left out: the scheme's own."
    )


class InboxBody(Body):
    verify: VerifyBody | None = Field(None, description="How deliveries are signed; null accepts unsigned ones.")
    retries: int = Field(
        DEFAULT_RETRIES, ge=0, le=MAX_RETRIES, description="How often a delivery that failed is tried again."
    )


class VerifyAnswer(BaseModel):
    scheme: Literal["github", "stripe", "hmac"]
    header: str


class CountsAnswer(BaseModel):
    pending: int
    running: int
    done: int
    failed: int


class InboxAnswer(BaseModel):
    session_id: str
    url: str
    verify: VerifyAnswer | None
    retries: int
    deliveries: CountsAnswer
    created_at: str
    updated_at: str


class InboxDeletedAnswer(BaseModel):
    success: bool
    session_id: str
    deleted_deliveries: int


class DeliveryAnswer(BaseModel):
    id: str
    sender_id: str | None
    received_at: str
    status: DeliveryStatus
    attempts: int
    run_ids: list[str]
    next_attempt_at: str | None
    ended_at: str | None
    answer_status: int | None
    reason: str | None
    method: str
    path: str
    size: int


class DeliveryContentAnswer(DeliveryAnswer):
    query: str
    headers: list[list[str]]
    body: str
    body_encoding: Literal["utf-8", "base64"]


class DeliveriesAnswer(BaseModel):
    deliveries: list[DeliveryAnswer]
    count: int
    next_cursor: str | None


def inbox_answer(
    session_id: str, url: str, inbox: InboxSettings, counts: Mapping[DeliveryStatus, int]
) -> dict[str, Any]:
    """An inbox at `url`, with how many deliveries of each status it holds."""
    verify = inbox.verify
    return {
        "session_id": session_id,
        "url": url,
        "verify": None if verify is None else {"scheme": verify.scheme, "header": verify.header},
        "retries": inbox.retries,
        "deliveries": {status: counts.get(status, 0) for status in STATUSES},
        "created_at": timestamp(inbox.created_at),
        "updated_at": timestamp(inbox.updated_at),
    }


def delivery_answer(delivery: Delivery) -> dict[str, Any]:
    return {
        "id": delivery.id,
        "sender_id": delivery.sender_id,
        "received_at": timestamp(delivery.received_at),
        "status": delivery.status,
        "attempts": delivery.attempts,
        "run_ids": list(delivery.run_ids),
        "next_attempt_at": timestamp(delivery.next_attempt_at) or None,
        "ended_at": timestamp(delivery.ended_at) or None,
        "answer_status": delivery.answer_status,
        "reason": delivery.reason,
        "method": delivery.method,
        "path": delivery.path,
        "size": delivery.size,
    }


def content_answer(delivery: Delivery, content: Content) -> dict[str, Any]:
    """A delivery with the request that brought it."""
    body, encoding = body_text(content.body)
    return {
        **delivery_answer(delivery),
        "query": content.query,
        "headers": [list(pair) for pair in content.headers],
        "body": body,
        "body_encoding": encoding,
    }
