"""Routes of API keys, for the operator only."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from era.api.context import Answer, StrictRoute, UseContext, caller_of, errors
from era.errors import Forbidden
from era.wire.api_keys import ApiKeysAnswer, KeyBody, KeyRevokedAnswer, NewKeyAnswer, key_answer


async def operator_only(request: Request) -> None:
    """Raises Forbidden for callers other than the operator."""
    if not caller_of(request).is_operator:
        raise Forbidden(
            "Only this server's operator may see to keys.",
            hint="Call with the key in the server's ERA_API_KEY; start the server with one if it has none.",
            code="not_operator",
        )


router = APIRouter(prefix="/api/keys", tags=["keys"], route_class=StrictRoute, dependencies=[Depends(operator_only)])


@router.post("", status_code=201, responses={201: {"model": NewKeyAnswer}, **errors(409)})
async def create_api_key(body: KeyBody, request: Request, context: UseContext) -> Response:
    """Make a key for an owner. Only this answer shows it."""
    key, text = await context.api_keys.create(body.owner, body.description)
    await context.audit.record(caller_of(request), "key.create", key.id, owner=key.owner)
    return Answer({**key_answer(key), "key": text}, 201, headers={"Cache-Control": "no-store"})


@router.get("", responses={200: {"model": ApiKeysAnswer}, **errors()})
async def list_api_keys(context: UseContext) -> Response:
    """List the keys, oldest first, without the secret parts."""
    keys = [key_answer(key) for key in context.api_keys.list()]
    return Answer({"keys": keys, "count": len(keys)})


@router.delete("/{key_id}", responses={200: {"model": KeyRevokedAnswer}, **errors(404)})
async def revoke_api_key(key_id: str, request: Request, context: UseContext) -> Response:
    """Revoke a key, at once. Its owner's sessions and storage stay."""
    await context.api_keys.revoke(key_id)
    await context.audit.record(caller_of(request), "key.revoke", key_id)
    return Answer({"success": True, "id": key_id})
