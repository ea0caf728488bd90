"""Routes of API keys, for the operator only."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response

from era.api import scopes
from era.api.context import Answer, StrictRoute, UseContext, caller_of, errors, moment
from era.core.api_keys import ApiKey
from era.core.models import now
from era.errors import BadRequest
from era.wire.api_keys import (
    ApiKeyAnswer,
    ApiKeysAnswer,
    ChangeKey,
    KeyBody,
    KeyRevokedAnswer,
    NewKeyAnswer,
    RotateKey,
    key_answer,
)


async def operator_only(request: Request) -> None:
    """Raises Forbidden for callers other than the operator."""
    scopes.check(caller_of(request), request.method, request.url.path)


router = APIRouter(prefix="/api/keys", tags=["keys"], route_class=StrictRoute, dependencies=[Depends(operator_only)])

KeyId = Annotated[str, Path(max_length=128)]


def _end(expires_at: str | None) -> int | None:
    """When a key is to end, in microseconds. Raises BadRequest for what isn't to come."""
    if expires_at is None:
        return None
    at = moment("expires_at", expires_at)
    if at <= now():
        raise BadRequest(
            "'expires_at' is over already.",
            hint="Give a time to come, such as 2030-01-31T12:00:00Z; DELETE revokes a key at once.",
            code="invalid_field",
        )
    return at


def _shown(key: ApiKey, text: str | None = None, status: int = 200) -> Answer:
    """A key; with its `text` where that is new."""
    if text is None:
        return Answer(key_answer(key, now()), status)
    return Answer({**key_answer(key, now()), "key": text}, status, headers={"Cache-Control": "no-store"})


@router.post("", status_code=201, responses={201: {"model": NewKeyAnswer}, **errors(409)})
async def create_api_key(body: KeyBody, request: Request, context: UseContext) -> Response:
    """Make a key for an owner. Only this answer shows it."""
    quotas = {} if body.quotas is None else body.quotas.model_dump(exclude_none=True)
    key, text = await context.api_keys.create(
        body.owner, body.description, tuple(dict.fromkeys(body.scopes)), _end(body.expires_at), quotas
    )
    await context.tell_hosts()
    await context.audit.record(caller_of(request), "key.create", key.id, owner=key.owner)
    return _shown(key, text, 201)


@router.get("", responses={200: {"model": ApiKeysAnswer}, **errors()})
async def list_api_keys(context: UseContext) -> Response:
    """List the keys, oldest first, without the secret parts."""
    keys = [key_answer(key, now()) for key in context.api_keys.list()]
    return Answer({"keys": keys, "count": len(keys)})


@router.get("/{key_id}", responses={200: {"model": ApiKeyAnswer}, **errors(404)})
async def get_api_key(key_id: KeyId, context: UseContext) -> Response:
    """Show a key, without the secret part."""
    return _shown(context.api_keys.get(key_id))


@router.patch("/{key_id}", responses={200: {"model": ApiKeyAnswer}, **errors(404)})
async def change_api_key(key_id: KeyId, body: ChangeKey, request: Request, context: UseContext) -> Response:
    """Change what a key is for, what it is good for, when it ends, or its quotas. It holds from the next call on."""
    changes: dict[str, Any] = {} if body.description is None else {"description": body.description}
    if body.scopes is not None:
        changes["scopes"] = tuple(dict.fromkeys(body.scopes))
    if "expires_at" in body.model_fields_set:
        changes["expires_at"] = _end(body.expires_at)
    if body.quotas is not None:
        changes["quotas"] = body.quotas.model_dump(exclude_unset=True)
    key = await context.api_keys.change(key_id, **changes)
    await context.tell_hosts()
    shown = key_answer(key, now())
    await context.audit.record(
        caller_of(request), "key.change", key_id, **{name: shown[name] for name in changes if name != "description"}
    )
    return _shown(key)


@router.post("/{key_id}/rotate", responses={200: {"model": NewKeyAnswer}, **errors(404, 409)})
async def rotate_api_key(key_id: KeyId, body: RotateKey, request: Request, context: UseContext) -> Response:
    """Give a key another secret, which only this answer shows. The one before stays good for `grace_seconds`."""
    key, text = await context.api_keys.rotate(key_id, body.grace_seconds)
    await context.tell_hosts()
    await context.audit.record(caller_of(request), "key.rotate", key_id, grace_seconds=body.grace_seconds)
    return _shown(key, text)


@router.delete("/{key_id}", responses={200: {"model": KeyRevokedAnswer}, **errors(404)})
async def revoke_api_key(key_id: KeyId, request: Request, context: UseContext) -> Response:
    """Revoke a key, at once. Its owner's sessions and storage stay."""
    await context.api_keys.revoke(key_id)
    await context.tell_hosts()
    await context.audit.record(caller_of(request), "key.revoke", key_id)
    return Answer({"success": True, "id": key_id})
