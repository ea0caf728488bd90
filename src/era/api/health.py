"""Routes of health, readiness and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.core import CollectorRegistry, GaugeMetricFamily
from prometheus_client.exposition import generate_latest

from era import __version__, languages
from era.api.context import Answer, StrictRoute, UseContext
from era.wire.base import ErrorAnswer
from era.wire.health import HealthAnswer, ReadyAnswer

router = APIRouter(tags=["health"])
metrics_router = APIRouter(tags=["health"], route_class=StrictRoute)


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
    await context.readiness.check()
    return Answer({"status": "ready"})


@metrics_router.get(
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
    counts = await context.store.counts()
    sandboxes = GaugeMetricFamily("era_sandboxes", "Sandboxes by use.", labels=["state"])
    for state, count in context.pool_counts().items():
        sandboxes.add_metric([state], count)
    runs = GaugeMetricFamily("era_runs", "Runs on record by status.", labels=["status"])
    for status, count in counts["runs"].items():
        runs.add_metric([status], count)
    sessions = GaugeMetricFamily("era_sessions", "Sessions there are.", value=counts["sessions"])

    class _Current:
        """A collector of the values read above; prometheus_client asks for an object with `collect`."""

        def collect(self) -> list[GaugeMetricFamily]:
            return [sandboxes, runs, sessions]

    registry = CollectorRegistry()
    registry.register(_Current())
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
