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
from typing import Any

from era.core.telemetry import DeliveryEnded, Event, NoticeTried, RequestEnded, RunEnded, SetupEnded, Trace
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
        place, parent = self._place_of(trace), self._parent_of(trace)
        failed = delivery.outcome == "failed"
        self._spans.send("delivery", place, parent, delivery.began_at, delivery.seconds, attributes, failed=failed)

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
        self._spans.send(name, self._place_of(Trace.begun(None)), None, began_at, seconds, attributes, failed=failed)
