"""Traces: spans from a request to its run's commit, sent to a collector by OpenTelemetry's protocol (OTLP over HTTP).

A span is made when its note comes, with the ids that the core has given it and the times that it has measured. So
nothing of OpenTelemetry is in the way of a run, and spans say what the log says. They are sent in batches, by a thread
of the library's; what can't be sent is dropped, and logged by it.

OpenTelemetry is an extra of the package (`traces`). All that needs it is in spans.py, imported only where traces are
asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from era.core.telemetry import BeginTrace, Note, ignore, untraced
from era.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Tracer:
    """Begins traces and sends their spans. Without traces it does nothing."""

    begin: BeginTrace = untraced
    note: Note = ignore


@contextmanager
def tracing(endpoint: str) -> Iterator[Tracer]:
    """What sends traces to the collector with this URL within the block; with none, what sends nothing. Raises
    BadRequest where the extra is missing."""
    if not endpoint:
        yield Tracer()
        return
    try:
        from era.telemetry.spans import Traces
    except ImportError:
        raise BadRequest(
            "ERA_TRACES is set, but OpenTelemetry isn't installed.",
            hint="Install it: pip install 'era-sessions[server,traces]'.",
        ) from None
    traces = Traces(endpoint)
    try:
        yield Tracer(traces.begin, traces.note)
    finally:
        traces.close()
