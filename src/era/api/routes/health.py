"""Routes of health, readiness, metrics, the languages, and of what the operator is shown of server and hosts."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from era import __version__, languages
from era.api.protocol.answers import Answer
from era.api.routes.owners import operator_only
from era.api.routing.context import Context, StrictRoute, UseContext, errors
from era.core.models import JsonObject
from era.errors import EraError
from era.wire.base import ErrorAnswer
from era.wire.server import (
    HealthAnswer,
    HostsAnswer,
    LanguagesAnswer,
    ReadyAnswer,
    ServerAnswer,
    host_answer,
    language_answer,
    server_answer,
)

router = APIRouter(tags=["health"])
strict = APIRouter(tags=["health"], route_class=StrictRoute)


@router.head("/health", include_in_schema=False)
@router.get(
    "/health", responses={200: {"model": HealthAnswer}, 400: {"model": ErrorAnswer}, 503: {"model": ErrorAnswer}}
)
async def health(context: UseContext) -> Response:
    """Show whether the service works, its languages, its isolation and its sandboxes."""
    await context.store.ping()
    return Answer(
        {
            "status": "ok",
            "version": __version__,
            "languages": list(languages.runtimes()),
            "isolation": context.isolation(),
            "sandboxes": context.pool_counts(),
        }
    )


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses={200: {"model": ReadyAnswer}, 400: {"model": ErrorAnswer}, 503: {"model": ErrorAnswer}})
async def ready(context: UseContext) -> Response:
    """Show whether the service can take runs now; 503 says why it can't."""
    if context.homes is not None:
        context.homes.check_lease()
        context.homes.check_reachable()
    await context.readiness.check()
    return Answer({"status": "ready", "sandboxes": context.places()})


@strict.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {}}},
        400: {"model": ErrorAnswer},
        403: {"model": ErrorAnswer},
        503: {"model": ErrorAnswer},
    },
)
async def metrics(context: UseContext) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(await context.metrics(), media_type=CONTENT_TYPE_LATEST)


@strict.get("/api/server", dependencies=[Depends(operator_only)], responses={200: {"model": ServerAnswer}, **errors()})
async def get_server(context: UseContext) -> Response:
    """Show the limits in force on this server, and what its machine has and lacks. For the operator only."""
    return Answer(server_answer(__version__, context.at_a_time(), context.limits, context.findings(context.hosts_tls)))


@strict.get("/api/languages", responses={200: {"model": LanguagesAnswer}, **errors()})
async def list_languages() -> Response:
    """List the languages. For those that this machine can't run, the answer says why and what to do."""
    return Answer({"languages": [language_answer(definition) for definition in languages.DEFINITIONS.values()]})


@strict.get("/api/hosts", dependencies=[Depends(operator_only)], responses={200: {"model": HostsAnswer}, **errors()})
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
