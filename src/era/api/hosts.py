"""The route that lists the hosts of a cluster, and what each of them says of itself."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Response

from era import __version__
from era.api.api_keys import operator_only
from era.api.context import Answer, Context, StrictRoute, UseContext, errors
from era.core.models import JsonObject
from era.errors import EraError
from era.wire.hosts import HostsAnswer, host_answer

router = APIRouter(tags=["health"], route_class=StrictRoute)


@router.get("/api/hosts", dependencies=[Depends(operator_only)], responses={200: {"model": HostsAnswer}, **errors()})
async def list_hosts(context: UseContext) -> Response:
    """List the hosts of the cluster, those that died within the last hour too, and how each is. For the operator only.
    Outside of a cluster there are none."""
    if context.homes is None or context.other_hosts is None:
        return Answer({"hosts": [], "this": None})
    states = {**await context.other_hosts.states(), context.homes.host_id: await state_of_this(context)}
    records = await context.homes.records()
    shown = [host_answer(record, states.get(record.host.id)) for record in records]
    return Answer({"hosts": shown, "this": context.homes.host_id})


async def state_of_this(context: Context) -> JsonObject:
    """How this host is, as `HostState`."""
    reason = ""
    try:
        await context.readiness.check()
    except EraError as error:
        reason = error.message
    sandboxes, live = context.pool_counts(), context.live_sessions
    return {
        "version": __version__,
        "ready": not reason,
        "reason": reason or None,
        "sandboxes": dict(sandboxes),
        "live_sessions": live.count(),
        "processes": live.running_processes(),
        "moved_away": 0 if context.moves is None else context.moves.count,
    }
