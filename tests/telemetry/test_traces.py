"""Traces: what a collector gets of a request, and what programs learn of it."""

from __future__ import annotations

import gzip
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from era.core.telemetry import NoticeTried, RequestEnded, Trace
from era.telemetry.spans import Traces
from tests.conftest import Server, assert_nothing_left, eventually, mounts

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CANARY = "canary-of-the-traces"


@dataclass
class Collector:
    """A collector of OTLP over HTTP."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    raw: bytes = b""

    def of(self, trace_id: str) -> dict[str, Span]:
        """The spans of a trace, by name."""
        return {span.name: span for span in list(self.spans) if span.trace_id.hex() == trace_id}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            collector.raw += body
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    collector.spans += scope.spans
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    yield collector
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that sends traces, soon, and tells programs of theirs."""
    before, data_dir = mounts(), tmp_path_factory.mktemp("traces") / "data"
    settings = {"ERA_TRACES": collector.url, "ERA_TRACE_PROGRAMS": "true"}
    server = Server(data_dir, {**settings, "OTEL_BSP_SCHEDULE_DELAY": "50"}).start()
    yield server
    processes = server.descendants()
    assert server.stop() == 0
    assert_nothing_left(before, processes, data_dir)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
        client.delete("/api/sessions?purge=true")


def attributes(span: Span) -> dict[str, str]:
    return {each.key: each.value.string_value or str(each.value.int_value) for each in span.attributes}


def test_a_request_and_its_run_are_spans_below_the_callers(client: httpx.Client, collector: Collector) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "traced"})
    code = f"import os; print(os.environ['TRACEPARENT'])  # {CANARY}"
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    answer = client.post("/api/sessions/traced/run", json={"code": code, "env": {"A": CANARY}}, headers=headers)
    assert answer.json()["status"] == "ok", answer.text
    name = "POST /api/sessions/{session_id}/run"
    assert eventually(lambda: name in collector.of(TRACE))
    spans = collector.of(TRACE)
    request, run = spans[name], spans["run python"]
    assert request.parent_span_id.hex() == PARENT
    assert request.kind == Span.SPAN_KIND_SERVER
    assert run.parent_span_id == request.span_id
    stages = ["turn", "slot", "record", "sandbox", "program", "files", "outputs", "transaction"]
    assert {span.parent_span_id for name, span in spans.items() if name in stages} == {run.span_id}
    begins = [spans[stage].start_time_unix_nano for stage in stages]
    assert begins == sorted(begins)
    assert answer.json()["stdout"] == f"00-{TRACE}-{run.span_id.hex()}-01\n"
    told = attributes(request)
    assert told["http.response.status_code"] == "200"
    assert told["era.request.id"] == answer.headers["X-Request-Id"]
    assert attributes(run).items() >= {"era.run.id": answer.json()["run_id"], "era.run.outcome": "ok"}.items()
    assert CANARY.encode() not in collector.raw


def test_what_no_request_waits_for_has_a_trace_of_its_own(client: httpx.Client, collector: Collector) -> None:
    """A delivery goes on in its sender's trace, and its run is below it."""
    setup = {"commands": [f"echo {CANARY}"]}
    body = {"language": "python", "session_id": "alone", "setup": setup, "allowPublicAccess": True}
    assert client.post("/api/sessions", json=body).status_code == 201
    assert client.put("/api/sessions/alone/inbox", json={"retries": 0}).is_success
    assert client.put("/api/sessions/alone/code", json={"code": "print('{}')"}).is_success
    sender = "d" * 32
    headers = {"traceparent": f"00-{sender}-{PARENT}-01"}
    assert client.post("/proxy/alone/inbox/orders", content=CANARY, headers=headers).is_success
    assert eventually(lambda: collector.of(sender).keys() >= {"delivery", "run python"})
    delivery, run = (collector.of(sender)[name] for name in ("delivery", "run python"))
    assert delivery.parent_span_id.hex() == PARENT
    assert run.parent_span_id == delivery.span_id
    told = attributes(delivery)
    assert (told["era.delivery.outcome"], told["era.session.id"]) == ("done", "alone")
    assert eventually(lambda: [span for span in list(collector.spans) if span.name == "setup"])
    [setup_span] = [span for span in collector.spans if span.name == "setup"]
    assert setup_span.parent_span_id == b""
    assert attributes(setup_span).items() >= {"era.setup.outcome": "completed", "era.session.id": "alone"}.items()
    assert CANARY.encode() not in collector.raw


def test_a_try_of_a_webhook_has_a_trace_of_its_own(collector: Collector) -> None:
    traces = Traces(collector.url)
    traces.note(NoticeTried("evt_1", "wh_1", "me", "run.ended", "pending", 2, 503, 1.0, 1_000.0, 0.5))
    traces.close()
    [span] = [span for span in collector.spans if span.name == "webhook"]
    assert (span.parent_span_id, span.start_time_unix_nano) == (b"", 10**12)
    assert span.end_time_unix_nano - span.start_time_unix_nano == 500_000_000
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert attributes(span).items() >= {"era.webhook.event": "run.ended", "http.response.status_code": "503"}.items()


def test_a_trace_that_its_caller_does_not_sample_is_not_sent(client: httpx.Client, collector: Collector) -> None:
    unsampled, sampled = TRACE[::-1], "a" * 32
    body = {"language": "python", "code": "import os; print(os.environ['TRACEPARENT'])"}
    for trace_id, flags in ((unsampled, "00"), (sampled, "01")):
        headers = {"traceparent": f"00-{trace_id}-{PARENT}-{flags}"}
        told = client.post("/api/execute", json=body, headers=headers).json()["stdout"]
        assert told.startswith(f"00-{trace_id}-")
        assert told.endswith(f"-{flags}\n")
    assert eventually(lambda: "POST /api/execute" in collector.of(sampled))
    assert collector.of(unsampled) == {}


def test_a_programs_own_variable_wins(client: httpx.Client) -> None:
    body = {"language": "python", "code": "import os; print(os.environ['TRACEPARENT'])", "env": {"TRACEPARENT": "mine"}}
    assert client.post("/api/execute", json=body).json()["stdout"] == "mine\n"


def test_programs_are_told_nothing_unasked(shared_server: Server) -> None:
    body = {"language": "python", "code": "import os; print(os.environ.get('TRACEPARENT'))"}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with shared_server.client() as client:
        assert client.post("/api/execute", json=body, headers=headers).json()["stdout"] == "None\n"


def test_a_collector_that_is_away_disturbs_nobody() -> None:
    traces = Traces("http://127.0.0.1:1/v1/traces")
    for _ in range(3):
        traces.note(RequestEnded("req_1", "GET", "/x", 200, 0.0, 0.1, trace=Trace.begun(None)))
    traces.close()


def test_without_the_extra_the_start_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry.exporter'] = None\n"
        "from era.errors import BadRequest\nfrom era.telemetry.traces import tracing\n"
        "try:\n    with tracing('http://127.0.0.1:1/v1/traces'): pass\n"
        "except BadRequest as error: print(error.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "traces]" in done.stdout


def test_without_traces_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys\nfrom era.telemetry.traces import tracing\n"
        "with tracing('') as traces: assert traces.begin('00-x') is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
