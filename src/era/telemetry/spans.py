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
from era.core.telemetry import Trace

_SEND_SECONDS = 5.0
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_OK, _FAILED = Status(StatusCode.UNSET), Status(StatusCode.ERROR)


class _Service(Resource):
    """What spans are of. The library asks each span for its hash, and would make JSON of it each time."""

    def __init__(self, of: Resource) -> None:
        super().__init__(of.attributes, of.schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class Spans:
    """Sends spans to one collector; `close` sends what is left."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is the collector's URL."""
        self._service = _Service(Resource.create({"service.name": "era", "service.version": __version__}))
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_SECONDS))

    def close(self) -> None:
        """Send what is left; blocks for a few seconds where the collector doesn't answer."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]  # the library's, without types

    def send(
        self,
        name: str,
        place: SpanContext,
        parent: SpanContext | None,
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
                context=place,
                parent=parent,
                resource=self._service,
                attributes={key: value for key, value in attributes.items() if value is not None},
                kind=SpanKind.SERVER if served else SpanKind.INTERNAL,
                status=_FAILED if failed else _OK,
                start_time=begin,
                end_time=begin + int(seconds * 1e9),
            )
        )


def place_of(trace: Trace) -> SpanContext:
    """A span's own place in its trace."""
    return SpanContext(int(trace.trace_id, 16), int(trace.span_id, 16), is_remote=False, trace_flags=_SAMPLED)


def parent_of(trace: Trace) -> SpanContext | None:
    """The place of the span above, None where there is none."""
    if not trace.parent_id:
        return None
    return SpanContext(int(trace.trace_id, 16), int(trace.parent_id, 16), is_remote=False, trace_flags=_SAMPLED)
