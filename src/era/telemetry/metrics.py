"""The metrics, in Prometheus' text format, by its conventions for names.

Counters and histograms are made of the notes of core/telemetry.py. Gauges are read when somebody asks. Labels have few
values each, all of them ours: routes, languages, outcomes. None names an owner, a session or a host, so `/metrics`
needs no key. Labels that an alert watches are there from the start, with 0: Prometheus can't see a counter's first step
else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from era.core.telemetry import (
    DeliveryEnded,
    Event,
    GarbageCollected,
    NoticeTried,
    RequestEnded,
    RunEnded,
    SandboxAcquired,
    SandboxClosed,
    SandboxStarted,
    SetupEnded,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST

_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_SLOW = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


@dataclass(frozen=True, slots=True)
class Gauge:
    """What is read when somebody asks for the metrics."""

    name: str
    help: str
    values: Mapping[str, float] | float
    """A value, or one for each value of `label`."""

    label: str = ""


@dataclass(slots=True, eq=False)
class _Gauges:
    """A collector of values that were read just now."""

    given: Iterable[Gauge] = field(default_factory=list)
    counters: Iterable[Gauge] = field(default_factory=list)

    def collect(self) -> Iterable[Metric]:
        for kind, gauges in ((GaugeMetricFamily, self.given), (CounterMetricFamily, self.counters)):
            for gauge in gauges:
                family = kind(gauge.name, gauge.help, labels=[gauge.label] if gauge.label else [])
                if isinstance(gauge.values, Mapping):
                    for label, value in gauge.values.items():
                        family.add_metric([label], value)
                else:
                    family.add_metric([], gauge.values)
                yield family


class Metrics:
    """The counters and histograms of one service. `note` is its Note."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # series that nobody reads, in all of this process
        self._registry = CollectorRegistry()
        self._gauges = _Gauges()
        self._registry.register(self._gauges)
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("http_requests", "Requests answered.", "method", "route", "status")
        self._request_seconds = self._histogram("http_request", "From a request to the end of its answer", "route")
        self._runs = self._counter("runs_ended", "Runs that ended or were refused.", "language", "kind", "outcome")
        self._run_seconds = self._histogram("run", "From a run's request to its commit, the queue included", "language")
        self._stages = self._histogram("run_stage", "Each stage of a run", "stage")
        self._cpu = self._counter("run_cpu_seconds", "Processor time of programs.", "language")
        self._connections = self._counter("run_connections", "Connections of programs to the outside.", "outcome")
        self._bytes = self._counter("run_network_bytes", "Bytes of programs to and from the outside.", "direction")
        self._acquired = self._histogram("sandbox_acquire", "Until a session has its sandbox", "how")
        self._started = self._counter("sandbox_starts", "Sandboxes made.", "language", "use", "outcome")
        self._start_seconds = self._histogram("sandbox_start", "To make a sandbox", "use")
        self._closed = self._counter("sandboxes_closed", "Sandboxes closed.", "reason")
        self._setups = self._counter("setups_ended", "Setups of sessions that ended.", "outcome")
        self._setup_seconds = self._histogram("setup", "A setup", buckets=_SLOW)
        self._deliveries = self._counter("deliveries_ended", "Attempts to deliver to inboxes.", "outcome")
        self._lag = self._histogram("delivery_lag", "From a delivery's receipt to the end of an attempt", buckets=_SLOW)
        self._notices = self._counter("webhook_tries", "Tries to send a notice to a webhook.", "outcome")
        self._notice_seconds = self._histogram("webhook_try", "A try to send a notice to a webhook")
        self._notice_lag = self._histogram("webhook_lag", "From what is told to the end of a try", buckets=_SLOW)
        self._collections = self._counter("garbage_collections", "Removals of unneeded content.", "outcome")
        self._collection_seconds = self._histogram("garbage_collection", "A removal", buckets=_SLOW)
        self._removed = self._counter("blobs_removed", "Blobs that nothing needed any more.")
        for status in ("500", "503"):
            self._requests.labels("POST", "/api/sessions/{session_id}/run", status)
        for reason in ("evicted", "failed", "died"):
            self._closed.labels(reason)
        for outcome in ("made", "refused"):
            self._connections.labels(outcome)
        for direction in ("sent", "received"):
            self._bytes.labels(direction)
        for counter, outcomes in (
            (self._setups, ("completed", "failed", "put_off")),
            (self._deliveries, ("done", "failed", "pending")),
            (self._notices, ("done", "failed", "pending")),
            (self._collections, ("ok", "failed")),
        ):
            for outcome in outcomes:
                counter.labels(outcome)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"era_{name}_total", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _QUICK) -> Histogram:
        name, text = f"era_{name}_duration_seconds", f"{text}, in seconds."
        return Histogram(name, text, labels, registry=self._registry, buckets=buckets)

    def expect(self, languages: Iterable[str]) -> None:
        """Have what alerts watch for each of these languages from the start."""
        for language in languages:
            for outcome in ("ok", "not_committed", "error", "refused"):
                self._runs.labels(language, "run", outcome)
            for use in ("spare", "session"):
                for outcome in ("ok", "failed"):
                    self._started.labels(language, use, outcome)

    def note(self, event: Event) -> None:
        """Count what has happened."""
        match event:
            case RequestEnded():
                method = event.method if event.method in _METHODS else "other"
                self._requests.labels(method, event.route, str(event.status)).inc()
                self._request_seconds.labels(event.route).observe(event.seconds)
            case RunEnded():
                self._run(event)
            case SandboxAcquired():
                self._acquired.labels(event.how).observe(event.seconds)
            case SandboxStarted():
                self._started.labels(event.language, event.use, "failed" if event.message else "ok").inc()
                if event.message is None:
                    self._start_seconds.labels(event.use).observe(event.seconds)
            case SandboxClosed():
                self._closed.labels(event.reason).inc()
            case SetupEnded():
                self._setups.labels(event.outcome).inc()
                self._setup_seconds.observe(event.seconds)
            case DeliveryEnded():
                self._deliveries.labels(event.outcome).inc()
                self._lag.observe(event.lag_seconds)
            case NoticeTried():
                self._notices.labels(event.outcome).inc()
                self._notice_seconds.observe(event.seconds)
                self._notice_lag.observe(event.lag_seconds)
            case GarbageCollected():
                outcome = "put_off" if event.put_off else "failed" if event.message else "ok"
                self._collections.labels(outcome).inc()
                self._collection_seconds.observe(event.seconds)
                self._removed.inc(event.blobs)

    def _run(self, run: RunEnded) -> None:
        self._runs.labels(run.language, run.kind, run.outcome).inc()
        self._run_seconds.labels(run.language).observe(run.stages.total)
        for stage, seconds in run.stages.seconds.items():
            self._stages.labels(stage).observe(seconds)
        if run.cpu_seconds:
            self._cpu.labels(run.language).inc(run.cpu_seconds)
        if run.connections or run.refused_connections:
            self._connections.labels("made").inc(run.connections)
            self._connections.labels("refused").inc(run.refused_connections)
            self._bytes.labels("sent").inc(run.sent_bytes)
            self._bytes.labels("received").inc(run.received_bytes)

    def text(self, gauges: Iterable[Gauge], counters: Iterable[Gauge] = ()) -> bytes:
        """All metrics as text, with these gauges, and these counters that are kept elsewhere."""
        self._gauges.given, self._gauges.counters = list(gauges), list(counters)
        return generate_latest(self._registry)
