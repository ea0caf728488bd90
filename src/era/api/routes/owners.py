"""Routes of API keys, for the operator; of quotas, usage and the audit log: the operator's of all owners,
everybody's of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from era.api.protocol.answers import Answer
from era.api.routing import scopes
from era.api.routing.context import (
    Context,
    Cursor,
    Limit,
    Owner,
    StrictRoute,
    UseContext,
    caller_of,
    errors,
    key_of,
    moment,
)
from era.api.routing.streaming import paged_response
from era.core.models import JsonObject, now
from era.core.owners.api_keys import OWNER, SCOPES, ApiKey
from era.core.owners.audit import Action, AuditFilter
from era.core.owners.quotas import OF_HOSTS
from era.core.owners.usage import day_of
from era.errors import BadRequest, Forbidden
from era.wire.api_keys import (
    ApiKeyAnswer,
    ApiKeysAnswer,
    ChangeKey,
    ChangeOwner,
    KeyBody,
    KeyRevokedAnswer,
    NewKeyAnswer,
    OwnerAnswer,
    OwnersAnswer,
    QuotasAnswer,
    RotateKey,
    key_answer,
    owner_answer,
)
from era.wire.usage import AuditAnswer, UsageAnswer, audit_answer, day_answer, day_number


async def operator_only(request: Request) -> None:
    """Raises Forbidden for callers other than the operator."""
    scopes.check(caller_of(request), request.method, request.url.path)


keys = APIRouter(prefix="/api/keys", tags=["keys"], route_class=StrictRoute, dependencies=[Depends(operator_only)])

KeyId = Annotated[str, Path(max_length=128)]


def _key_end(expires_at: str | None) -> int | None:
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


def _shown_key(key: ApiKey, text: str | None = None, status: int = 200) -> Answer:
    """A key; with its `text` where that is new."""
    if text is None:
        return Answer(key_answer(key, now()), status)
    return Answer({**key_answer(key, now()), "key": text}, status, headers={"Cache-Control": "no-store"})


@keys.post("", status_code=201, responses={201: {"model": NewKeyAnswer}, **errors(409)})
async def create_api_key(body: KeyBody, request: Request, context: UseContext) -> Response:
    """Make a key for an owner. Only this answer shows it."""
    quotas = {} if body.quotas is None else body.quotas.model_dump(exclude_none=True)
    key, text = await context.api_keys.create(
        body.owner, body.description, tuple(dict.fromkeys(body.scopes)), _key_end(body.expires_at), quotas
    )
    await context.tell_hosts()
    await context.audit.record(caller_of(request), "key.create", key.id, owner=key.owner)
    return _shown_key(key, text, 201)


@keys.get("", responses={200: {"model": ApiKeysAnswer}, **errors()})
async def list_api_keys(context: UseContext) -> Response:
    """List the keys, oldest first, without the secret parts."""
    keys = [key_answer(key, now()) for key in context.api_keys.list()]
    return Answer({"keys": keys, "count": len(keys)})


@keys.get("/{key_id}", responses={200: {"model": ApiKeyAnswer}, **errors(404)})
async def get_api_key(key_id: KeyId, context: UseContext) -> Response:
    """Show a key, without the secret part."""
    return _shown_key(context.api_keys.get(key_id))


@keys.patch("/{key_id}", responses={200: {"model": ApiKeyAnswer}, **errors(404)})
async def change_api_key(key_id: KeyId, body: ChangeKey, request: Request, context: UseContext) -> Response:
    """Change what a key is for, what it is good for, when it ends, or its quotas. It holds from the next call on."""
    changes: dict[str, Any] = {} if body.description is None else {"description": body.description}
    if body.scopes is not None:
        changes["scopes"] = tuple(dict.fromkeys(body.scopes))
    if "expires_at" in body.model_fields_set:
        changes["expires_at"] = _key_end(body.expires_at)
    if body.quotas is not None:
        changes["quotas"] = body.quotas.model_dump(exclude_unset=True)
    key = await context.api_keys.change(key_id, **changes)
    await context.tell_hosts()
    shown = key_answer(key, now())
    await context.audit.record(
        caller_of(request), "key.change", key_id, **{name: shown[name] for name in changes if name != "description"}
    )
    return _shown_key(key)


@keys.post("/{key_id}/rotate", responses={200: {"model": NewKeyAnswer}, **errors(404, 409)})
async def rotate_api_key(key_id: KeyId, body: RotateKey, request: Request, context: UseContext) -> Response:
    """Give a key another secret, which only this answer shows. The one before stays good for `grace_seconds`."""
    key, text = await context.api_keys.rotate(key_id, body.grace_seconds)
    await context.tell_hosts()
    await context.audit.record(caller_of(request), "key.rotate", key_id, grace_seconds=body.grace_seconds)
    return _shown_key(key, text)


@keys.delete("/{key_id}", responses={200: {"model": KeyRevokedAnswer}, **errors(404)})
async def revoke_api_key(key_id: KeyId, request: Request, context: UseContext) -> Response:
    """Revoke a key, at once. Its owner's sessions and storage stay."""
    await context.api_keys.revoke(key_id)
    await context.tell_hosts()
    await context.audit.record(caller_of(request), "key.revoke", key_id)
    return Answer({"success": True, "id": key_id})


router = APIRouter(tags=["quotas"], route_class=StrictRoute)
_OPERATOR = [Depends(operator_only)]

OwnerName = Annotated[str, Path(pattern=OWNER, description="The owner's name.")]


async def _elsewhere(context: Context) -> Sequence[JsonObject]:
    """What owners use at other hosts of the cluster."""
    return [] if context.other_hosts is None else await context.other_hosts.in_use()


def _owner(
    context: Context, owner: str, sizes: Mapping[str, tuple[int, int]], elsewhere: Sequence[JsonObject]
) -> dict[str, Any]:
    """An owner's quotas, and how much there is of each."""
    sessions, disk_bytes = sizes.get(owner, (0, 0))
    in_use = context.quotas.in_use(owner)
    for name in OF_HOSTS:
        in_use[name] += sum(host.get(owner, {}).get(name, 0) for host in elsewhere)
    used = {
        **in_use,
        "sessions": sessions,
        "disk_mb": _in_mib(disk_bytes),
        "storage_mb": _in_mib(context.storage.used(owner)),
    }
    return owner_answer(owner, context.quotas.of_owner(owner), context.quotas.own(owner), used)


async def _one(context: Context, owner: str) -> dict[str, Any]:
    return _owner(context, owner, await context.store.sizes(), await _elsewhere(context))


def _in_mib(size: int) -> float:
    return round(size / (1 << 20), 3)


@router.get("/api/owners", dependencies=_OPERATOR, responses={200: {"model": OwnersAnswer}, **errors()})
async def list_owners(context: UseContext) -> Response:
    """List the owners who have a key, sessions or quotas of their own, with their quotas and what is used."""
    names = {key.owner for key in context.api_keys.list()} | set(context.quotas.owners())
    sizes, elsewhere = await context.store.sizes(), await _elsewhere(context)
    owners = [_owner(context, name, sizes, elsewhere) for name in sorted(names | set(sizes))]
    return Answer({"owners": owners, "count": len(owners)})


@router.get("/api/owners/{owner}", dependencies=_OPERATOR, responses={200: {"model": OwnerAnswer}, **errors()})
async def get_owner(owner: OwnerName, context: UseContext) -> Response:
    """Show an owner's quotas and what is used of them. An owner of whom nothing is known has the defaults."""
    return Answer(await _one(context, owner))


@router.patch("/api/owners/{owner}", dependencies=_OPERATOR, responses={200: {"model": OwnerAnswer}, **errors()})
async def change_owner(owner: OwnerName, body: ChangeOwner, request: Request, context: UseContext) -> Response:
    """Set quotas of an owner's. What there is already stays, also where it is more than may be from now on."""
    quotas = body.quotas.model_dump(exclude_unset=True)
    await context.quotas.set(owner, quotas)
    await context.tell_hosts()
    await context.audit.record(caller_of(request), "quotas.change", owner, quotas=quotas)
    return Answer(await _one(context, owner))


@router.get("/api/quotas", responses={200: {"model": QuotasAnswer}, **errors()})
async def get_quotas(request: Request, owner: Owner, context: UseContext) -> Response:
    """Show the caller's quotas, and how much is used of them."""
    caller = caller_of(request)
    key = None
    if caller.key_id:
        scopes = [scope for scope in SCOPES if scope in caller.scopes]
        key = {"id": caller.key_id, "scopes": scopes, "quotas": dict(context.api_keys.quotas_of(caller.key_id))}
    return Answer({**await _one(context, owner), "key": key})


_DAYS = 30
"""That are shown if none are asked for."""

Day = Annotated[str | None, Query(max_length=10, description="A date in UTC, such as 2026-01-31.")]


@router.get("/api/usage", responses={200: {"model": UsageAnswer}, **errors()})
async def get_usage(
    request: Request,
    context: UseContext,
    owner: Annotated[str | None, Query(pattern=OWNER, description="The operator's only; left out: all owners.")] = None,
    since: Day = None,
    until: Day = None,
) -> Response:
    """Show what was used on each day, newest first: the caller's, or for the operator everybody's. Without `since`, of
    the last 30 days."""
    caller = caller_of(request)
    if owner not in (None, caller.owner) and not caller.is_operator:
        raise Forbidden("Only this server's operator may see the usage of others.", hint="Leave 'owner' out.")
    last = day_of(now()) if until is None else day_number("until", until)
    first = last - _DAYS + 1 if since is None else day_number("since", since)
    days = await context.usage.days(owner if caller.is_operator else caller.owner, first, last)
    return Answer({"usage": [day_answer(day) for day in days], "count": len(days)})


audit = APIRouter(prefix="/api/audit", tags=["audit"], route_class=StrictRoute)


@audit.get("", responses={200: {"model": AuditAnswer}, **errors()})
async def list_audit(
    request: Request,
    context: UseContext,
    action: Annotated[Action | None, Query(description="Only this.")] = None,
    target: Annotated[str | None, Query(max_length=128, description="Only what was done to this.")] = None,
    owner: Annotated[
        str | None,
        Query(pattern=OWNER, description="Only what this owner did. Others than the operator see their own."),
    ] = None,
    since: Annotated[str | None, Query(description="Only from then on (RFC 3339).")] = None,
    until: Annotated[str | None, Query(description="Only before then (RFC 3339).")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """List what was done, newest first: by the caller's owner, or with the operator's key by all."""
    caller = caller_of(request)
    if not caller.is_operator and owner not in (None, caller.owner):
        raise Forbidden(
            "Only this server's operator may see what other owners did.",
            hint="Leave 'owner' out.",
            code="not_operator",
        )
    entries = await context.audit.list(
        AuditFilter(
            limit + 1,  # one more tells whether there is a next page
            owner if caller.is_operator else caller.owner,
            action,
            target,
            None if since is None else moment("since", since),
            None if until is None else moment("until", until),
            key_of(cursor),
        )
    )
    return await paged_response("entries", entries, limit, audit_answer, lambda entry: entry.key)
