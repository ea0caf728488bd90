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

from era.core.telemetry import Event, RequestEnded, RunEnded, Trace
from era.errors import BadRequest


@contextmanager
def tracing(endpoint: str) -> Iterator[Traces | NoTraces]:
    """What sends traces to the collector with this URL within the block; with none, what sends nothing. Raises
    BadRequest where the extra is missing."""
    if not endpoint:
        yield NoTraces()
        return
    traces = Traces(endpoint)
    try:
        yield traces
    finally:
        traces.close()


class NoTraces:
    """Nobody asked for traces."""

    def begin(self, traceparent: str | None) -> Trace | None:
        return None

    def note(self, event: Event) -> None:
        return None


class Traces:
    """Sends spans to a collector. `note` is its Note; `close` sends what is left."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is the collector's URL. Raises BadRequest where the extra is missing."""
        try:
            from era.telemetry import spans
        except ImportError:
            raise BadRequest(
                "ERA_TRACES is set, but OpenTelemetry isn't installed.",
                hint="Install it: pip install 'era-sessions[server,traces]'.",
            ) from None
        self._place_of, self._parent_of = spans.place_of, spans.parent_of
        self._spans = spans.Spans(endpoint)

    def close(self) -> None:
        """Send what is left; blocks for a few seconds where the collector doesn't answer."""
        self._spans.close()

    def begin(self, traceparent: str | None) -> Trace | None:
        """Where a request with this header `traceparent` is."""
        return Trace.begun(traceparent)

    def note(self, event: Event) -> None:
        match event:
            case RequestEnded(trace=Trace(sampled=True) as trace):
                self._request(event, trace)
            case RunEnded(trace=Trace(sampled=True) as trace):
                self._run(event, trace)

    def _request(self, request: RequestEnded, trace: Trace) -> None:
        failed = request.failure is not None or (request.status >= 500 and request.code is not None)
        attributes = {
            "http.request.method": request.method,
            "http.route": request.route,
            "http.response.status_code": request.status,
            "era.request.id": request.request_id,
            "era.owner": request.owner,
            "era.session.id": request.session_id,
            "error.type": request.code,
        }
        name = f"{request.method} {request.route}"
        place, parent = self._place_of(trace), self._parent_of(trace)
        self._spans.send(name, place, parent, request.began_at, request.seconds, attributes, failed=failed, served=True)

    def _run(self, run: RunEnded, trace: Trace) -> None:
        attributes = {
            "era.run.id": run.run_id,
            "era.run.kind": run.kind,
            "era.run.outcome": run.outcome,
            "era.language": run.language,
            "era.owner": run.owner,
            "era.session.id": run.session_id,
            "era.sandbox.id": run.sandbox_id,
            "error.type": run.code,
        }
        failed = run.outcome in ("error", "not_committed")
        place, parent = self._place_of(trace), self._parent_of(trace)
        begins = run.stages.began_at
        self._spans.send(f"run {run.language}", place, parent, begins, run.stages.total, attributes, failed=failed)
        for stage, seconds in run.stages.seconds.items():
            self._spans.send(stage, self._place_of(trace.below()), place, begins, seconds, {})
            begins += seconds
