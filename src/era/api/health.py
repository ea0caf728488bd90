"""Routes of health, readiness, metrics, and of what the operator is shown of the server."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from era import __version__, languages
from era.api.api_keys import operator_only
from era.api.context import Answer, StrictRoute, UseContext, errors
from era.wire.base import ErrorAnswer
from era.wire.health import HealthAnswer, ReadyAnswer
from era.wire.server import ServerAnswer, server_answer

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
