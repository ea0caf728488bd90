"""Routes of owners' quotas and of usage: the operator's of all owners, everybody's of his own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from era.api.api_keys import operator_only
from era.api.context import Answer, Context, Owner, StrictRoute, UseContext, caller_of, errors
from era.core.api_keys import OWNER, SCOPES
from era.core.models import JsonObject, now
from era.core.quotas import OF_HOSTS
from era.core.usage import day_of
from era.errors import Forbidden
from era.wire.api_keys import ChangeOwner, OwnerAnswer, OwnersAnswer, QuotasAnswer, owner_answer
from era.wire.usage import UsageAnswer, day_answer, day_number

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
