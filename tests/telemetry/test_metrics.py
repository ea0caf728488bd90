"""The metrics: what is counted of what happens, and what they are called."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from era.core.program import Ended
from era.core.telemetry import Event, GarbageCollected, Origin, RequestEnded, RunEnded, Trace, noted, origin
from era.errors import CommitFailed, NotFound
from era.network.destinations import Destinations
from era.telemetry.metrics import Metrics
from era.telemetry.notes import later, to_all
from tests.conftest import MakeSession, Run, eventually, metrics_now

type Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    """The samples of a text in Prometheus' format, by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(of: Samples, name: str, **labels: str) -> float:
    return of.get((name, frozenset(labels.items())), 0.0)


def test_what_happens_is_counted(client: httpx.Client, session: MakeSession, run: Run) -> None:
    before = samples(metrics_now(client))
    where = session()
    for code in ("print(1)", "1/0", "open('kept', 'w').write('text of a new file')"):
        run(where, code)
    client.get("/api/sessions/nobodys")
    client.get("/no/such/path")
    client.request("PROPFIND", "/no/such/path")
    last = {"method": "other", "route": "other", "status": "404"}

    def counted() -> Samples | None:
        """The metrics, once the last of these requests is counted: that may be just after its answer."""
        now = samples(metrics_now(client))
        is_there = value(now, "era_http_requests_total", **last) > value(before, "era_http_requests_total", **last)
        return now if is_there else None

    after = eventually(counted)
    assert after

    def more(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    route = "/api/sessions/{session_id}/run"
    assert more("era_http_requests_total", method="POST", route=route, status="200") == 3
    assert more("era_http_request_duration_seconds_count", route=route) == 3
    assert more("era_http_requests_total", method="GET", route="/api/sessions/{session_id}", status="404") == 1
    assert more("era_http_requests_total", method="GET", route="other", status="404") == 1
    assert more("era_http_requests_total", method="other", route="other", status="404") == 1
    assert more("era_runs_ended_total", language="python", kind="run", outcome="ok") == 2
    assert more("era_runs_ended_total", language="python", kind="run", outcome="failed") == 1
    for stage in ("turn", "slot", "record", "sandbox", "program", "files", "outputs", "transaction"):
        assert more("era_run_stage_duration_seconds_count", stage=stage) == 3, stage
    assert more("era_run_duration_seconds_count", language="python") == 3
    assert more("era_run_cpu_seconds_total", language="python") > 0
    assert more("era_sandbox_acquire_duration_seconds_count", how="warm") == 2
    assert more("era_sandbox_acquire_duration_seconds_count", how="ready") == 1
    assert more("era_blobs_written_total") >= 1
    assert value(after, "era_ready") == 1
    assert value(after, "era_sandbox_places_taken") == 1
    assert value(after, "era_disk_free_bytes") > 0
    assert value(after, "era_admission_slots") >= 2


def test_names_are_conventional(client: httpx.Client) -> None:
    """Base units, `_total` for counters only, help for all; names and values of labels are ours."""
    families = list(text_string_to_metric_families(metrics_now(client)))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.documentation, family.name
        assert re.fullmatch(r"(era|process)_[a-z_]+", family.name), family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds"), family.name
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            names = sample.labels.keys() - {"le"}
            assert not any(re.search("id|owner|session|host", name) for name in names), sample


def test_labels_stay_few_whatever_callers_send(client: httpx.Client) -> None:
    def routes() -> set[str]:
        families = text_string_to_metric_families(metrics_now(client))
        return {sample.labels.get("route", "") for family in families for sample in family.samples}

    client.get("/api/nothing-0")
    client.get("/proxy/nobody-0/x")
    before = routes()
    for number in range(5):
        client.get(f"/api/nothing-{number}")
        client.get(f"/proxy/nobody-{number}/x")
        client.request(("LOCK", "MKCOL", "PURGE", "REPORT", "SEARCH")[number], "/api/nothing")
        client.get("/api/nothing", headers={"Host": f"h{number}.example"})
    assert routes() <= before | {"other"}


def test_all_connections_of_a_run_count() -> None:
    """Also those beyond the ones that its record names."""
    destinations, run = Destinations(), RunEnded("run_1", "me", "s", "run")
    for port in range(150):
        for reason in (None, "private"):
            destinations.note("a.test", port, None, reason)
        traffic = destinations.note("a.test", port, None, None)
        traffic.sent, traffic.received = traffic.sent + 2, traffic.received + 3
    ended = Ended(0, "exit", 1.0, None, None, False, False, 0, None, None, sandbox_alive=True)
    run.ended("ok", ended, True, destinations.report())
    metrics = Metrics()
    metrics.note(run)
    text = samples(metrics.text([]).decode())
    assert value(text, "era_run_connections_total", outcome="made") == 300
    assert value(text, "era_run_connections_total", outcome="refused") == 150
    assert value(text, "era_run_network_bytes_total", direction="sent") == 300
    assert value(text, "era_run_network_bytes_total", direction="received") == 450


def test_a_run_without_a_result_says_how_far_it_came() -> None:
    told: list[RunEnded] = []

    def note(event: object) -> None:
        assert isinstance(event, RunEnded)
        told.append(event)

    with pytest.raises(NotFound), noted(note, RunEnded("run_1", "me", "s", "run")):
        raise NotFound("There is none.")
    begun = RunEnded("run_2", "me", "s", "run")
    begun.stages.end("program")
    with pytest.raises(CommitFailed), noted(note, begun):
        raise CommitFailed("the disk is full")
    with pytest.raises(ZeroDivisionError), noted(note, RunEnded("run_3", "me", "s", "run")):
        raise ZeroDivisionError
    outcomes = [(run.outcome, run.code) for run in told]
    assert outcomes == [("refused", "not_found"), ("not_committed", "commit_failed"), ("error", "ZeroDivisionError")]
    metrics = Metrics()
    for each in told:
        metrics.note(each)
    text = samples(metrics.text([]).decode())
    assert value(text, "era_runs_ended_total", language="unknown", kind="run", outcome="refused") == 1
    assert value(text, "era_run_stage_duration_seconds_count", stage="program") == 1


def test_what_an_alert_watches_is_there_from_the_start() -> None:
    """A counter that appears with 1 has never grown, for Prometheus."""
    metrics = Metrics()
    metrics.expect(["python"])
    there = samples(metrics.text([]).decode())
    key = ("era_runs_ended_total", frozenset({"language": "python", "kind": "run", "outcome": "not_committed"}.items()))
    assert there[key] == 0
    assert ("era_garbage_collections_total", frozenset({("outcome", "failed")})) in there


TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "follows"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-00", True),
        (f"cc-{TRACE}-{PARENT}-01-more", True),
        (f"00-{TRACE}-{PARENT}-01-more", False),
        (f"ff-{TRACE}-{PARENT}-01", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{PARENT}-01", False),
        ("", False),
        (None, False),
    ],
)
def test_a_callers_trace_is_followed_where_its_header_is_valid(header: str | None, follows: bool) -> None:
    trace = Trace.begun(header)
    assert (trace.trace_id == TRACE, trace.parent_id == PARENT) == (follows, follows)
    assert trace.sampled == (not follows or not header or "-00" not in header[-3:])
    assert re.fullmatch(rf"00-{trace.trace_id}-{trace.span_id}-0[01]", trace.traceparent)
    below = trace.below()
    assert (below.trace_id, below.parent_id, below.sampled) == (trace.trace_id, trace.span_id, trace.sampled)


def test_a_run_is_below_its_request() -> None:
    told: list[object] = []
    token = origin.set(Origin("req_1", Trace.begun(None)))
    try:
        with noted(told.append, RunEnded("run_1", "me", "s", "run")) as run:
            pass
        request = origin.get()
        assert request is not None
        assert request.trace is not None
        assert run.trace is not None
        assert run.trace.parent_id == request.trace.span_id
    finally:
        origin.reset(token)


def test_a_taker_that_fails_costs_no_other() -> None:
    taken: list[object] = []

    def failing(event: object) -> None:
        raise ValueError("a fault of its own")

    with capture_logs() as logged:
        to_all(failing, taken.append)(note := GarbageCollected(1.0))
    assert taken == [note]
    assert [line["event"] for line in logged] == ["note_not_taken"]


async def test_lines_are_written_together_each_with_its_request() -> None:
    taken: list[tuple[Event, str]] = []

    def take(event: Event) -> None:
        request = origin.get()
        taken.append((event, request.request_id if request else ""))

    first, second = GarbageCollected(1.0), GarbageCollected(2.0)
    failed = RequestEnded("req_2", "GET", "/x", 500, 0.0, 0.1, failure=ValueError())
    with later(take) as note:
        token = origin.set(Origin("req_1"))
        note(first)
        origin.reset(token)
        note(second)
        assert taken == [], "whoever noted it doesn't wait"
        async with asyncio.timeout(30):
            while not taken:  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.01)
        assert taken == [(first, "req_1"), (second, "")]
        note(failed)
        assert taken[2:] == [(failed, "")], "at once, or the server that called us would log it first"
        note(first)
    assert taken[3:] == [(first, "")], "what waits is written when the service ends"
