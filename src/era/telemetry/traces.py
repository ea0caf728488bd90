"""Traces: spans from a request to its run's commit, sent to a collector by OpenTelemetry's protocol (OTLP over HTTP).

A span is made when its note comes, with the ids that the core has given it and the times that it has measured. So
nothing of OpenTelemetry is in the way of a run, and spans say what the log says. They are sent in batches, by a thread
of the library's; what can't be sent is dropped, and logged by it.

OpenTelemetry is an extra of the package (`traces`), imported only where traces are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from era import __version__
from era.core.telemetry import Event, RequestEnded, RunEnded, Trace
from era.errors import BadRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import SpanContext

_SEND_SECONDS = 5.0


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
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise BadRequest(
                "ERA_TRACES is set, but OpenTelemetry isn't installed.",
                hint="Install it: pip install 'era-sessions[server,traces]'.",
            ) from None
        self._resource = Resource.create({"service.name": "era", "service.version": __version__})
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_SECONDS)
        self._processor: SpanProcessor = BatchSpanProcessor(exporter)

    def close(self) -> None:
        """Send what is left; blocks for a few seconds where the collector doesn't answer."""
        self._processor.shutdown()

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
        self._send(name, trace, request.began_at, request.seconds, attributes, failed=failed, served=True)

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
        self._send(f"run {run.language}", trace, run.stages.began_at, run.stages.total, attributes, failed=failed)
        begins = run.stages.began_at
        for stage, seconds in run.stages.seconds.items():
            self._send(stage, trace.below(), begins, seconds, {})
            begins += seconds

    def _send(
        self,
        name: str,
        trace: Trace,
        began_at: float,
        seconds: float,
        attributes: dict[str, Any],
        *,
        failed: bool = False,
        served: bool = False,
    ) -> None:
        """Send a span. Attributes that are None are left out."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanKind, Status, StatusCode

        begin = int(began_at * 1e9)
        self._processor.on_end(
            ReadableSpan(
                name,
                context=_context(trace, trace.span_id),
                parent=_context(trace, trace.parent_id) if trace.parent_id else None,
                resource=self._resource,
                attributes={key: value for key, value in attributes.items() if value is not None},
                kind=SpanKind.SERVER if served else SpanKind.INTERNAL,
                status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
                start_time=begin,
                end_time=begin + int(seconds * 1e9),
            )
        )


def _context(trace: Trace, span_id: str) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(int(trace.trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(1))
