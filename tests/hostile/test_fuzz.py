"""Bad requests: made from the API's own description, made of raw bytes, and made by pages of other sites.

Whatever comes, the service answers in the contract's shape or hangs up, it never fails, and it serves on.
"""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from pydantic import ValidationError
from schemathesis import Case, GenerationMode, Response
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi import checks

from era.wire.base import ErrorAnswer
from era.wire.runs import RunBody
from tests.api.test_isolation import HAS_GVISOR
from tests.conftest import Server

type MakeServer = Callable[..., Server]

JSON = {"content-type": "application/json"}
CREATE = b'{"language":"python"}'

# -- from the description ---------------------------------------------------------------------------------------

SHORT_SECONDS = 25.0
SOAK_SECONDS = 75.0  # a round; pytest takes a test of two minutes for one that hangs
SOAK_ROUNDS = 4
TARGETS = ("fuzz-python", "fuzz-node", "fuzz-typescript")
PROGRAMS = (
    "print('hello')",
    "console.log('hello')",
    "const n: number = 1; console.log(n)",
    "while True: pass",
    "for (;;) {}",
    "import sys; sys.exit(3)",
    "process.exit(4)",
    "import os; os.kill(os.getpid(), 9)",
    "throw new Error('x')",
    "import sys; sys.stdout.buffer.write(bytes(range(256)) * 300)",
    "open('.session_data.json', 'w').write('{\"n\": 1}')",
    "open('.session_data.json', 'w').write('{')",
    "import os; os.remove('.session_data.json'); os.mkdir('.session_data.json')",
    "import os; os.symlink('/etc/passwd', 'link'); os.mkfifo('fifo'); open(b'\\xff', 'w')",
    "require('fs').writeFileSync('.session_data.json', '[]')",
    "import subprocess; subprocess.Popen(['sleep', '100'])",
)
CONFORMITY = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


OF_OTHER_FORMATS = {"PUT /api/sessions/{session_id}/archive", "POST /api/sessions/import"}
"""Operations that take an archive, which nobody makes up by chance."""

OF_OPERATORS = {"POST /api/keys", "DELETE /api/keys/{key_id}"}
"""Operations that a server without a key refuses: it has none and makes none."""


@schemathesis.serializer("application/x-tar", "application/gzip", "application/zip")
def archive(_context: Any, value: Any) -> Any:
    """What comes out as the body of an import or an archive."""
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


class Fuzz:
    """Cases of every operation that the server describes, sent and checked until time is up.

    Findings are collected rather than raised: one of a kind, so that a long search tells all it has found.
    """

    def __init__(self, server: Server, seconds: float) -> None:
        self._url = server.url
        self._deadline = time.monotonic() + seconds
        self._lock = threading.Lock()
        self.findings: dict[str, str] = {}
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.schema: BaseSchema = schemathesis.openapi.from_url(f"{self._url}/openapi.json")
        operations = list(self.schema.get_all_operations())
        self.operations = [found.ok() for found in operations if isinstance(found, Ok)]
        assert len(self.operations) == len(operations), operations

    @property
    def over(self) -> bool:
        return time.monotonic() > self._deadline

    def known_corners(self) -> None:
        """Schemathesis's list of bounds and oddities of every field, without chance, and all of it."""
        with self._session() as session:
            for operation in self.operations:
                chance = random.Random(operation.label)
                cases = self.schema.iter_coverage_cases(
                    operation,
                    generation_modes=list(GenerationMode),
                    generation_config=self.schema.config.generation_for(operation=operation),
                )
                for case in cases:
                    self._send(session, case, chance)

    def random_cases(self, number: int, examples: int) -> None:
        """Cases of every operation by chance, the same ones for the same `number`."""
        for operation in random.Random(number).sample(self.operations, len(self.operations)):
            modes = [GenerationMode.POSITIVE]
            if operation.body or operation.query:
                modes.append(GenerationMode.NEGATIVE)
            for mode in modes:
                self._random_cases(operation, mode, number, examples)

    def _random_cases(
        self, operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode, number: int, examples: int
    ) -> None:
        with self._session() as session:

            @seed(number)
            @settings(
                max_examples=examples,
                phases=[Phase.generate],
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy(generation_mode=mode), st.integers(0, 1 << 32))
            def attempt(case: Case[Any], chance: int) -> None:
                if not self.over:
                    self._send(session, case, random.Random(chance))

            try:
                attempt()
            except Unsatisfiable:
                if mode == GenerationMode.POSITIVE or not _takes_bytes(operation):
                    self._found(operation.label, "no cases", str(mode))

    def _send(self, session: requests.Session, case: Case[Any], chance: random.Random) -> None:
        if "session_id" in (case.path_parameters or {}) and chance.random() < 0.75:
            self._aim_at_a_session(case, chance)
        if "namespace" in (case.path_parameters or {}) and chance.random() < 0.5:
            self._aim_at_an_item(case)
        if isinstance(case.body, dict):
            _bound(case.body, chance, runs=case.operation.path.endswith(("/run", "/stream", "/execute")))
        label = case.operation.label
        try:
            answer = case.call(base_url=self._url, session=session, timeout=30)
        except Exception:
            self._found(label, "no answer", f"{case!r}\n{traceback.format_exc()}")
            return
        with self._lock:
            self.statuses[label, answer.status_code] += 1
        try:
            _check(answer)
            if answer.status_code != 431:  # the address alone was over the bound of all requests
                case.validate_response(answer, checks=CONFORMITY)
        except FailureGroup as failures:
            for failure in failures.exceptions:
                self._found(label, f"{answer.status_code} {type(failure).__name__}", f"{failures}")
        except Exception as error:
            told = f"{error}\n{answer.text[:1000]}\n{case.as_curl_command(base_url=self._url)[:2000]}"
            self._found(label, f"{answer.status_code} {type(error).__name__}", told)

    def _aim_at_a_session(self, case: Case[Any], chance: random.Random) -> None:
        """Let the case be about a session that there is; others may delete it in the meantime."""
        target = chance.choice(TARGETS)
        case.path_parameters["session_id"] = target
        if case.headers and case.headers.get("Idempotency-Key") == "null":  # of all corners: the first would use it up
            case.headers["Idempotency-Key"] = case.operation.label
        body = {"session_id": target, "language": target.removeprefix("fuzz-"), "default_timeout": 1}
        made = httpx.post(f"{self._url}/api/sessions", json=body, trust_env=False)
        if made.status_code not in (201, 409):
            self._found("POST /api/sessions", f"{made.status_code}", made.text)
        self._aim_within_the_session(case, f"{self._url}/api/sessions/{target}")

    def _aim_within_the_session(self, case: Case[Any], session: str) -> None:
        """And about a run or file of it that there is."""
        if "run_id" in case.path_parameters:
            ran = httpx.post(f"{session}/run", json={"code": "", "timeout": 1}, timeout=30, trust_env=False)
            case.path_parameters["run_id"] = ran.json().get("run_id", "run_gone")
        if case.operation.path.endswith("/rollback") and isinstance(case.body, dict):
            version = case.body.get("version")
            if type(version) is int and version > 0:
                case.body["version"] = 1
        if case.operation.path.endswith("/restore"):
            httpx.delete(session, timeout=30, trust_env=False)
        if case.operation.path.endswith("/setup"):
            httpx.patch(session, json={"setup": {"envs": {"A": "1"}}}, timeout=30, trust_env=False)
        if "/inbox" in case.operation.path:
            httpx.put(f"{session}/inbox", json={"retries": 0}, timeout=30, trust_env=False)
        if "delivery_id" in case.path_parameters:
            url = f"{self._url}/proxy/{case.path_parameters['session_id']}/inbox/"
            told = httpx.post(url, timeout=30, trust_env=False)
            case.path_parameters["delivery_id"] = told.json().get("delivery_id", "delivery_gone")
        if "path" in case.path_parameters:
            httpx.put(f"{session}/files/f", content=b"x", timeout=30, trust_env=False)
            case.path_parameters["path"] = "f"

    def _aim_at_an_item(self, case: Case[Any]) -> None:
        """Let the case be about something in the storage that there is, or SQL that means something."""
        for kind, body in (("kv", {"value": "v"}), ("r2", {"content": "dg=="})):
            httpx.put(f"{self._url}/api/storage/{kind}/fuzz/k", json=body, timeout=30, trust_env=False)
        case.path_parameters["namespace"] = "fuzz"
        if "key" in case.path_parameters:
            case.path_parameters["key"] = "k"
        if isinstance(case.body, dict) and isinstance(case.body.get("sql"), str):
            case.body["sql"] = "SELECT 1"

    def _found(self, operation: str, kind: str, detail: str) -> None:
        with self._lock:
            self.findings.setdefault(f"{operation}: {kind}", detail)

    @contextmanager
    def _session(self) -> Iterator[requests.Session]:
        with requests.Session() as session:
            session.trust_env = False
            yield session

    def report(self) -> str:
        found = "\n\n".join(f"=== {title}\n{detail}" for title, detail in self.findings.items())
        return f"{found}\n{dict(sorted(self.statuses.items()))}"


def _takes_bytes(operation: APIOperation[Any, Any, Any, Any]) -> bool:
    """Whether any body will do, so that none is wrong."""
    return operation.path.endswith(("/files/{path}", "/archive", "/import"))


def _bound(body: dict[str, Any], chance: random.Random, *, runs: bool) -> None:
    """Keep what a body asks for small, so that the search is not spent on waiting. What is wrong in it stays so."""
    for name in ("timeout", "default_timeout"):
        asked = body.get(name)
        if isinstance(asked, int | float) and asked > 1 and chance.random() < 0.9:
            body[name] = chance.choice((0.01, 0.3, 1))
    if isinstance(body.get("code"), str) and chance.random() < 0.5:
        body["code"] = chance.choice(PROGRAMS)
        asked = body.get("timeout")
        if runs and (asked is None or (isinstance(asked, int | float) and asked > 1)):
            body["timeout"] = chance.choice((0.1, 0.5, 1))
    for name in ("env", "files"):  # most of the names made up are none, and the run would never begin
        given = body.get(name)
        if (
            isinstance(given, dict)
            and all(isinstance(value, str) for value in given.values())
            and chance.random() < 0.5
        ):
            body[name] = {"A": "1"}
    if _is_valid(body.get("secrets")):  # even more so with the names of hosts
        body["secrets"] = {"S": {"value": "1", "hosts": ["api.example.com"]}}
    if isinstance(body.get("language"), str) and chance.random() < 0.5:
        body["language"] = chance.choice(("python", "node", "typescript"))


def _is_valid(secrets: Any) -> bool:
    """Whether these are secrets as the description has them."""
    try:
        RunBody.model_validate({"secrets": secrets})
    except ValidationError:
        return False
    return True


def _check(answer: Response) -> None:
    """Raises AssertionError for an answer that this service must never give."""
    lacks_gvisor = not HAS_GVISOR and answer.status_code == 503 and answer.json()["code"] == "no_isolation"
    assert answer.status_code < 500 or lacks_gvisor, "it failed"
    assert re.fullmatch("req_[0-9a-f]{16}", answer.headers["x-request-id"][0])
    kind = answer.headers["content-type"][0]
    if answer.status_code >= 400:
        assert kind == "application/json"
        body = answer.json()
        ErrorAnswer.model_validate(body, strict=True, extra="forbid")
        assert body["request_id"] == answer.headers["x-request-id"][0]
        assert body["error"], "no sentence"
        assert body["hint"], "no hint"
    elif kind.startswith("text/event-stream"):
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n") if line[:6] == "data: "]
        assert events, "an empty stream"
        assert events[-1]["type"] == "done" or events[-1].get("code") == "session_deleted", events[-1]
        assert all(event["type"] in ("stdout", "stderr") for event in events[:-1])


def test_no_request_that_the_description_leads_to_makes_the_service_fail(server: Server) -> None:
    fuzz = Fuzz(server, SHORT_SECONDS)
    fuzz.known_corners()
    fuzz.random_cases(number=1, examples=25)
    if fuzz.findings:
        pytest.fail(fuzz.report())
    reached = {operation for operation, status in fuzz.statuses if status < 300}
    assert {operation.label for operation in fuzz.operations} - reached <= OF_OTHER_FORMATS | OF_OPERATORS


@pytest.mark.soak
@pytest.mark.parametrize("round_", range(SOAK_ROUNDS))
def test_minutes_of_requests_at_a_time_do_not_make_the_service_fail(server: Server, round_: int) -> None:
    """Several at a time, so that sessions are deleted, changed and run at once; other requests every time."""
    fuzz = Fuzz(server, SOAK_SECONDS)
    first = random.SystemRandom().randrange(1 << 30)
    print(f"round {round_}, numbers from {first}")

    def search(worker: int) -> None:
        number = first + 10_000 * worker
        while not fuzz.over:
            if worker == 0:
                fuzz.known_corners()
            fuzz.random_cases(number, examples=25)
            number += 1

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(search, range(3)))
    print(fuzz.report())
    if fuzz.findings:
        pytest.fail(fuzz.report())


# -- raw bytes --------------------------------------------------------------------------------------------------

SERVED, REFUSED = "served", "refused"
PATIENCE = 10.0

GET = b"GET /api/sessions HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n"
POST = b"POST /api/sessions HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SIZED = b"Content-Length: 21\r\n"


def target(text: bytes) -> bytes:
    return b"GET " + text + b" HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n\r\n"


# SELF stands for the server's own address.
REQUESTS: dict[str, tuple[bytes, str]] = {
    # so that the others are refused for what they are
    "a right one": (GET + b"\r\n", SERVED),
    "a right one with a body": (POST + SIZED + b"\r\n" + CREATE, SERVED),
    "a right one in chunks": (CHUNKED + b"15\r\n" + CREATE + b"\r\n0\r\n\r\n", SERVED),
    # how long the body is
    "length and chunks": (POST + SIZED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", REFUSED),
    "chunks and length": (POST + b"Transfer-Encoding: chunked\r\n" + SIZED + b"\r\n0\r\n\r\n", REFUSED),
    "two lengths": (POST + SIZED + b"Content-Length: 22\r\n\r\n" + CREATE, REFUSED),
    "a list of lengths": (POST + b"Content-Length: 21, 21\r\n\r\n" + CREATE, REFUSED),
    "negative length": (POST + b"Content-Length: -21\r\n\r\n" + CREATE, REFUSED),
    "length with a sign": (POST + b"Content-Length: +21\r\n\r\n" + CREATE, REFUSED),
    "length in hex": (POST + b"Content-Length: 0x15\r\n\r\n" + CREATE, REFUSED),
    "length in other digits": (POST + b"Content-Length: \xb2\r\n\r\n" + CREATE, REFUSED),
    "length beyond 64 bits": (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + CREATE, REFUSED),
    "a terabyte": (POST + b"Content-Length: 1000000000000\r\n\r\n" + CREATE, REFUSED),
    "blank before the colon": (POST + b"Content-Length : 21\r\n\r\n" + CREATE, REFUSED),
    "unknown encoding": (POST + b"Transfer-Encoding: xchunked\r\n\r\n15\r\n" + CREATE + b"\r\n0\r\n\r\n", REFUSED),
    "chunked and more": (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", REFUSED),
    "chunked, hidden": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", REFUSED),
    # chunks
    "chunk without a number": (CHUNKED + b"zz\r\n" + CREATE + b"\r\n0\r\n\r\n", REFUSED),
    "negative chunk": (CHUNKED + b"-15\r\n" + CREATE + b"\r\n0\r\n\r\n", REFUSED),
    "chunk beyond 64 bits": (CHUNKED + b"f" * 17 + b"\r\n" + CREATE + b"\r\n0\r\n\r\n", REFUSED),
    "chunk longer than told": (CHUNKED + b"3\r\n" + CREATE + b"\r\n0\r\n\r\n", REFUSED),
    "chunks without CR": (CHUNKED + b"15\n" + CREATE + b"\n0\n\n", REFUSED),
    "chunk that is not JSON": (CHUNKED + b"5;" + b"x" * 100_000 + b"\r\nhello\r\n0\r\n\r\n", REFUSED),
    # headers
    "folded header": (GET + b"X-A: 1\r\n 2\r\n\r\n", REFUSED),
    "CR in a header": (GET + b"X-A: 1\rX-B: 2\r\n\r\n", REFUSED),
    "NUL in a header": (GET + b"X-A: 1\x002\r\n\r\n", REFUSED),
    "no colon": (GET + b"garbage\r\n\r\n", REFUSED),
    "no name": (GET + b": x\r\n\r\n", REFUSED),
    "name not ASCII": (GET + b"X-\xc3\x9c: x\r\n\r\n", REFUSED),
    "two hosts, ours first": (GET + b"Host: evil.example\r\n\r\n", REFUSED),
    "two hosts, ours last": (b"GET /api/sessions HTTP/1.1\r\nHost: evil.example\r\n" + GET[28:] + b"\r\n", REFUSED),
    "no host": (b"GET /api/sessions HTTP/1.1\r\nConnection: close\r\n\r\n", REFUSED),
    "host with a path": (b"GET /api/sessions HTTP/1.1\r\nHost: SELF/@x\r\nConnection: close\r\n\r\n", REFUSED),
    "host not ASCII": (b"GET /api/sessions HTTP/1.1\r\nHost: \xff\r\nConnection: close\r\n\r\n", REFUSED),
    "origin that is no URL": (GET + b"Origin: http://[::1\r\n\r\n", REFUSED),
    "origin not ASCII": (GET + b"Origin: http://\xe2\x84\x80\r\n\r\n", REFUSED),
    "only LF": (GET.replace(b"\r", b"") + b"\n", REFUSED),
    # targets
    "absolute": (target(b"http://SELF/api/sessions"), SERVED),
    "absolute, with another host": (
        b"GET http://SELF/api/sessions HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        REFUSED,
    ),
    "of a proxy": (b"CONNECT evil.example:80 HTTP/1.1\r\nHost: SELF\r\n\r\n", REFUSED),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n\r\n", REFUSED),
    "no slash": (target(b"health"), REFUSED),
    "NUL": (target(b"/api/sessions/a\0b"), REFUSED),
    "not ASCII": (target(b"/api/sessions/\xff"), REFUSED),
    "blank": (target(b"/health x"), REFUSED),
    "100 KB": (target(b"/" + b"a" * 100_000), REFUSED),
    "escaped NUL": (target(b"/api/sessions/a%00b"), REFUSED),
    "escaped slash": (target(b"/api/sessions/a%2Fb"), REFUSED),
    "escaped dots": (target(b"/assets/..%2Findex.html"), REFUSED),
    "escaped dots out of the pages": (target(b"/assets/%2e%2e%2f%2e%2e%2fwire.py"), REFUSED),
    "escaped line break": (target(b"/api/sessions/a%0d%0aX-A:%201"), REFUSED),
    "escapes that are none": (target(b"/api/sessions/%zz"), REFUSED),
    "escaped bytes that are not UTF-8": (target(b"/api/sessions/%ff%fe"), REFUSED),
    "query that is not UTF-8": (target(b"/api/sessions?cursor=%ff&metadata.%00=%ed%a0%80"), REFUSED),
    # what is no request of this protocol
    "method with a bracket": (b"G(T / HTTP/1.1\r\nHost: SELF\r\n\r\n", REFUSED),
    "method of 100 KB": (b"A" * 100_000 + b" / HTTP/1.1\r\nHost: SELF\r\n\r\n", REFUSED),
    "HTTP/9.9": (b"GET / HTTP/9.9\r\nHost: SELF\r\n\r\n", REFUSED),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", REFUSED),
    "TLS": (bytes.fromhex("16030100c8010000c40303") + b"\0" * 190, REFUSED),
    "a second one that is none": (GET.replace(b"close", b"keep-alive") + b"\r\ngarbage\r\n\r\n", REFUSED),
}


class Connection:
    """A connection on which bytes go out as they are."""

    def __init__(self, server: Server) -> None:
        self.host = server.url.removeprefix("http://").encode()
        name, _, port = self.host.decode().rpartition(":")
        self.socket = socket.create_connection((name, int(port)), timeout=PATIENCE)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send as much as the server takes: it may hang up in the middle."""
        with suppress(ConnectionError):
            self.socket.sendall(data.replace(b"SELF", self.host))

    def end(self) -> None:
        """Tell that nothing more comes."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def receive(self, seconds: float = PATIENCE) -> bytes:
        """All that comes until the server hangs up. Raises TimeoutError if it does not."""
        self.socket.settimeout(seconds)
        received = b""
        with suppress(ConnectionError):
            while data := self.socket.recv(1 << 16):
                received += data
        return received


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", received, re.MULTILINE)]


def assert_serves(server: Server) -> None:
    with server.client() as client:
        assert client.get("/health", timeout=2).json()["status"] == "ok"


@pytest.mark.parametrize("name", REQUESTS)
def test_a_malformed_request_is_refused_and_its_connection_closed(server: Server, name: str) -> None:
    request, expected = REQUESTS[name]
    with Connection(server) as connection:
        connection.send(request)
        received = connection.receive()
    if expected == SERVED:
        assert statuses(received) in ([200], [201]), received
    else:
        assert all(400 <= status < 500 for status in statuses(received)), received
        assert statuses(received), "it hung up without a word"
        with server.client() as client:
            assert client.get("/api/sessions").json()["count"] == 0
    assert_serves(server)


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\r\n" * 1000,
        b"GET /health HT",
        GET,
        POST + SIZED + b"\r\n",
        POST + SIZED + b"\r\n" + CREATE[:9],
        POST + SIZED + b"Expect: 100-continue\r\n\r\n",
        CHUNKED,
        CHUNKED + b"15\r\n" + CREATE[:9],
        CHUNKED + b"15\r\n" + CREATE + b"\r\n",
    ],
    ids=lambda request: str(len(request)),
)
@pytest.mark.parametrize("how", ["told", "untold"])
def test_half_a_request_is_nothing_when_its_sender_goes(server: Server, request_: bytes, how: str) -> None:
    with Connection(server) as connection:
        connection.send(request_)
        if how == "told":
            connection.end()
            assert set(statuses(connection.receive())) <= {100, 400}
    assert_serves(server)
    with server.client() as client:
        assert client.get("/api/sessions").json()["count"] == 0


def test_half_requests_hold_up_nobody(server: Server) -> None:
    """And a body that comes a byte at a time is a body."""
    with ExitStack() as stack:
        for number in range(200):
            waiting = stack.enter_context(Connection(server))
            waiting.send((GET, CHUNKED, POST + SIZED + b"\r\n" + CREATE[:5], b"")[number % 4])
        slow = stack.enter_context(Connection(server))
        for number, byte in enumerate((POST + SIZED + b"\r\n" + CREATE).replace(b"SELF", slow.host)):
            slow.send(bytes([byte]))
            if number % 16 == 0:
                assert_serves(server)
        assert statuses(slow.receive()) == [201]


@pytest.mark.parametrize(
    "header", [b"X-A: " + b"a" * (1 << 20) + b"\r\n", b"X-A: a\r\n" * 20_000], ids=["long", "many"]
)
def test_huge_headers_do_no_harm(server: Server, header: bytes) -> None:
    with Connection(server) as connection:
        connection.send(GET + header + b"\r\n")
        assert all(status < 500 for status in statuses(connection.receive()))
    assert_serves(server)


ODD = (
    *(b"\r\n", b"\r", b"\n", b"\0", b" ", b"\t", b":", b";", b",", b"%", b"/", b"..", b"\xff", b"{", b"]", b'"'),
    *(b"\\ud800", b"0", b"9" * 20, b"-1", b"1e999", b"NaN", b"chunked", b"Content-Length: 5\r\n", b"Host: x\r\n"),
)


def spoiled(chance: random.Random) -> bytes:
    """A request that was right before a few of its bytes were taken, doubled, replaced or moved."""
    body = chance.choice(
        (CREATE, b'{"language":"python","session_id":"a","data":{"a":[1,2.5,null]},"default_timeout":1}')
    )
    chunked = CHUNKED + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    sized = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    request = bytearray(chance.choice((chunked, sized, GET + b"\r\n", target(b"/api/sessions/a?include=files"))))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(request))
        to = min(len(request), at + chance.choice((0, 1, 1, 8)))
        request[at:to] = chance.choice((b"", chance.choice(ODD), request[at:to] * 2, chance.randbytes(3)))
    return bytes(request)


def test_spoiled_requests_do_not_make_the_service_fail(server: Server) -> None:
    chance = random.Random(7)
    failures = []
    for _ in range(400):
        request = spoiled(chance)
        with Connection(server) as connection:
            connection.send(request)
            try:
                received = connection.receive(0.05)
            except TimeoutError:  # it waits for the rest
                connection.end()
                received = connection.receive()
            if any(status >= 500 for status in statuses(received)):
                failures.append((request, received))
    assert failures == []
    assert "Traceback" not in server.log
    assert_serves(server)


# -- other sites ------------------------------------------------------------------------------------------------

# Every way in, and what it takes to be let in.
ROUTES: list[tuple[str, str, bytes | None]] = [
    ("GET", "/api/sessions", None),
    ("POST", "/api/sessions", CREATE),
    ("GET", "/api/sessions/there", None),
    ("PATCH", "/api/sessions/there", b'{"metadata":{"a":1}}'),
    ("PUT", "/api/sessions/there/code", b'{"code":"1"}'),
    ("GET", "/api/sessions/there/code", None),
    ("POST", "/api/sessions/there/run", b'{"code":"1"}'),
    ("POST", "/api/sessions/there/stream", b'{"code":"1"}'),
    ("POST", "/api/execute", b'{"language":"python","code":"1"}'),
    ("DELETE", "/api/sessions/there", None),
    ("DELETE", "/api/sessions", None),
]
PAGES = ("/", "/docs", "/openapi.json", "/metrics")

# URL and SELF stand for the server's own. `""` is a header that is there and empty.
FOREIGN: dict[str, dict[str, str]] = {
    "another site": {"origin": "http://evil.example"},
    "no site": {"origin": "null"},
    "an empty site": {"origin": ""},
    "a site that is no URL": {"origin": "http://[::1"},
    "another port": {"origin": "http://127.0.0.1:1"},
    "another name of here": {"origin": "http://127.0.0.2:8787"},
    "a site with ours in front": {"origin": "URL.evil.example"},
    "a site with ours as its user": {"origin": "http://SELF@evil.example"},
    "ours with a path": {"origin": "URL/x"},
    "a browser that tells another site": {"sec-fetch-site": "cross-site"},
    "a browser that tells another port": {"sec-fetch-site": "same-site"},
    "a browser that tells what nobody knows": {"sec-fetch-site": "new-site"},
    "ours, told from another": {"origin": "URL", "sec-fetch-site": "cross-site"},
    "a name that resolves to here": {"host": "evil.example"},
    "a name that resolves to here, with our port": {"host": "evil.example:8787"},
    "a name that resolves to here, as its own origin": {
        "host": "evil.example:8787",
        "origin": "http://evil.example:8787",
        "sec-fetch-site": "same-origin",
    },
    "a name that begins as ours": {"host": "127.0.0.1.evil.example"},
    "a name that ends as ours": {"host": "evil.localhost"},
    "a user of ours": {"host": "evil@127.0.0.1"},
    "an address of everywhere": {"host": "0.0.0.0"},
    "an empty name": {"host": ""},
}
OWN: dict[str, dict[str, str]] = {
    "no browser": {},
    "its address": {"host": "SELF"},
    "localhost": {"host": "localhost:8787"},
    "its name in capitals": {"host": "LOCALHOST"},
    "IPv6": {"host": "[::1]:8787"},
    "a page of ours": {"origin": "URL", "sec-fetch-site": "same-origin"},
    "a page of ours at localhost": {"host": "localhost:8787", "origin": "http://localhost:8787"},
    "typed by somebody": {"sec-fetch-site": "none"},
}


def of(server: Server, headers: dict[str, str]) -> dict[str, str]:
    own = server.url.removeprefix("http://")
    return {name: value.replace("URL", server.url).replace("SELF", own) for name, value in headers.items()}


def call(client: httpx.Client, route: tuple[str, str, bytes | None], headers: dict[str, str]) -> httpx.Response:
    method, path, body = route
    return client.request(method, path, content=body, headers={**(JSON if body else {}), **headers})


def assert_refused(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, (answer.request.method, answer.url, answer.text)
    ErrorAnswer.model_validate(answer.json(), strict=True, extra="forbid")
    assert answer.json()["code"] == code
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def make(client: httpx.Client) -> None:
    """The session of ROUTES, with code."""
    assert client.post("/api/sessions", json={"language": "python", "session_id": "there"}).status_code in (201, 409)
    assert client.put("/api/sessions/there/code", json={"code": "2"}).status_code == 200


@pytest.mark.parametrize("name", FOREIGN)
def test_a_page_of_another_site_is_refused_and_changes_nothing(server: Server, client: httpx.Client, name: str) -> None:
    headers = of(server, FOREIGN[name])
    make(client)
    before = client.get("/api/sessions").json(), client.get("/api/sessions/there/code").json()
    for route in ROUTES:
        assert_refused(call(client, route, headers), 403, "forbidden")
    assert (client.get("/api/sessions").json(), client.get("/api/sessions/there/code").json()) == before
    for page in PAGES:
        if headers.keys() & {"host", "origin"} and name != "ours, told from another":
            assert_refused(client.get(page, headers=headers), 403, "forbidden")
        else:  # a link from another site may lead to a page
            assert client.get(page, headers=headers).status_code == 200


@pytest.mark.parametrize("name", OWN)
def test_the_same_requests_are_answered_when_they_come_from_here(
    server: Server, client: httpx.Client, name: str
) -> None:
    headers = of(server, OWN[name])
    for route in ROUTES:
        make(client)
        answer = call(client, route, headers)
        assert answer.status_code in (200, 201), (route, answer.text)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    for page in PAGES:
        assert client.get(page, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain; application/json",
        "text/plain;charset=application/json",
        "text/plain, application/json",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        None,
    ],
)
def test_a_body_that_a_page_may_send_without_asking_is_no_json(client: httpx.Client, kind: str | None) -> None:
    """The kinds that need no preflight, from a browser that tells nothing about the page."""
    make(client)
    before = client.get("/api/sessions").json()
    for method, path, body in ROUTES:
        if body is not None:
            headers = {} if kind is None else {"content-type": kind}
            assert_refused(client.request(method, path, content=body, headers=headers), 400, "invalid_field")
    assert client.get("/api/sessions").json() == before


@pytest.mark.parametrize(
    "form",
    [
        {"data": {"language": "python", "code": "1"}},
        {"data": {'{"language":"python","code":"1","env":{"A': '":""}}'}},
        {"files": {'{"language":"python"}': b"x"}},
        {"params": {"language": "python", "code": "1"}},
    ],
    ids=["form", "JSON in a form", "files", "query"],
)
def test_a_form_does_nothing(client: httpx.Client, form: dict[str, Any]) -> None:
    make(client)
    before = client.get("/api/sessions").json()
    for path in ("/api/sessions", "/api/execute", "/api/sessions/there/run", "/api/sessions/there/stream"):
        assert_refused(client.post(path, **form), 400, "invalid_field")
    assert client.get("/api/sessions").json() == before


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON"])
def test_the_same_body_counts_as_json(client: httpx.Client, kind: str) -> None:
    for route in ROUTES:
        if route[2] is not None:
            make(client)
            assert call(client, route, {"content-type": kind}).status_code in (200, 201)


def test_a_preflight_allows_nothing(server: Server, client: httpx.Client) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for _, path, _ in ROUTES:
        answer = client.options(path, headers={"origin": "http://evil.example", **asks})
        assert_refused(answer, 403, "forbidden")
        assert_refused(client.options(path, headers={"origin": server.url, **asks}), 405, "method_not_allowed")


def test_with_a_key_it_is_the_key_that_counts(own_server: MakeServer) -> None:
    """Wherever a request comes from: no page of another site knows the key."""
    server = own_server(api_key="the-key", spares="0")
    key = {"authorization": "Bearer the-key"}
    with server.client() as client:
        for name in FOREIGN:
            headers = of(server, FOREIGN[name])
            for route in ROUTES:
                assert_refused(call(client, route, headers), 401, "unauthorized")
                assert_refused(call(client, route, {**headers, "authorization": "Bearer the-ke"}), 401, "unauthorized")
            assert call(client, ("POST", "/api/sessions", CREATE), {**headers, **key}).status_code == 201
