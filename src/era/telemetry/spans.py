"""Spans in OpenTelemetry's own form, handed to its library, which sends them in batches from a thread of its own.

This module imports OpenTelemetry, which is an extra, so it is itself imported only where traces are asked for.
"""

from __future__ import annotations

from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from era import __version__
from era.core.telemetry import DeliveryEnded, Event, NoticeTried, RequestEnded, RunEnded, SetupEnded, Trace

_SEND_SECONDS = 5.0
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_OK, _FAILED = Status(StatusCode.UNSET), Status(StatusCode.ERROR)


class Traces:
    """Sends spans to a collector. `note` is its Note; `close` sends what is left."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is the collector's URL."""
        self._service = Resource.create({"service.name": "era", "service.version": __version__})
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_SECONDS))

    def close(self) -> None:
        """Send what is left; blocks for a few seconds where the collector doesn't answer."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]  # the library's, without types

    def begin(self, traceparent: str | None) -> Trace | None:
        """Where a request with this header `traceparent` is."""
        return Trace.begun(traceparent)

    def note(self, event: Event) -> None:
        match event:
            case RequestEnded(trace=Trace(sampled=True) as trace):
                self._request(event, trace)
            case RunEnded(trace=Trace(sampled=True) as trace):
                self._run(event, trace)
            case DeliveryEnded(trace=Trace(sampled=True) as trace):
                self._delivery(event, trace)
            case SetupEnded():
                self._setup(event)
            case NoticeTried():
                self._notice(event)

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
        begins = run.stages.began_at
        self._send(f"run {run.language}", trace, begins, run.stages.total, attributes, failed=failed)
        for stage, seconds in run.stages.seconds.items():
            self._send(stage, trace.below(), begins, seconds, {})
            begins += seconds

    def _delivery(self, delivery: DeliveryEnded, trace: Trace) -> None:
        attributes = {
            "era.delivery.id": delivery.delivery_id,
            "era.delivery.outcome": delivery.outcome,
            "era.delivery.attempts": delivery.attempts,
            "era.run.id": delivery.run_id,
            "era.owner": delivery.owner,
            "era.session.id": delivery.session_id,
            "http.response.status_code": delivery.answer,
        }
        failed = delivery.outcome == "failed"
        self._send("delivery", trace, delivery.began_at, delivery.seconds, attributes, failed=failed)

    def _setup(self, setup: SetupEnded) -> None:
        attributes = {
            "era.setup.outcome": setup.outcome,
            "era.setup.packages": setup.packages,
            "era.setup.commands": setup.commands,
            "era.owner": setup.owner,
            "era.session.id": setup.session_id,
        }
        self._alone("setup", setup.began_at, setup.seconds, attributes, failed=setup.outcome == "failed")

    def _notice(self, notice: NoticeTried) -> None:
        attributes = {
            "era.webhook.id": notice.webhook_id,
            "era.webhook.event": notice.event,
            "era.webhook.outcome": notice.outcome,
            "era.webhook.tries": notice.tries,
            "era.notice.id": notice.notice_id,
            "era.owner": notice.owner,
            "http.response.status_code": notice.answer,
        }
        self._alone("webhook", notice.began_at, notice.seconds, attributes, failed=notice.outcome != "done")

    def _alone(self, name: str, began_at: float, seconds: float, attributes: dict[str, Any], *, failed: bool) -> None:
        """A span of what nobody waits for: a trace of its own."""
        self._send(name, Trace.begun(None), began_at, seconds, attributes, failed=failed)

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
        """Send a span soon. `began_at` is in seconds since 1970. Attributes that are None are left out."""
        begin = int(began_at * 1e9)
        self._processor.on_end(
            ReadableSpan(
                name,
                context=_place_of(trace),
                parent=_parent_of(trace),
                resource=self._service,
                attributes={key: value for key, value in attributes.items() if value is not None},
                kind=SpanKind.SERVER if served else SpanKind.INTERNAL,
                status=_FAILED if failed else _OK,
                start_time=begin,
                end_time=begin + int(seconds * 1e9),
            )
        )


def _place_of(trace: Trace) -> SpanContext:
    """A span's own place in its trace."""
    return SpanContext(int(trace.trace_id, 16), int(trace.span_id, 16), is_remote=False, trace_flags=_SAMPLED)


def _parent_of(trace: Trace) -> SpanContext | None:
    """The place of the span above, None where there is none."""
    if not trace.parent_id:
        return None
    return SpanContext(int(trace.trace_id, 16), int(trace.parent_id, 16), is_remote=False, trace_flags=_SAMPLED)
