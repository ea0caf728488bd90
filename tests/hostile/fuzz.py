"""Requests made from the API's own description, sent and checked."""

from __future__ import annotations

import json
import math
import random
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import jsonschema_rs
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
from era.wire.versions import MAX_VERSION
from tests.conftest import Server
from tests.gvisor import HAS_GVISOR

OUT_OF_REACH = {
    # Those that take an archive, which random bytes never are.
    "PUT /api/sessions/{session_id}/archive",
    "POST /api/sessions/import",
    # Those that a server without an operator key refuses.
    "POST /api/keys",
    *(f"{method} /api/keys/{{key_id}}" for method in ("DELETE", "GET", "PATCH")),
    "POST /api/keys/{key_id}/rotate",
}
"""Operations of which no case succeeds."""

TARGETS = ("fuzz-python", "fuzz-node", "fuzz-typescript")

ENDS = ("done", "error", "exit")
"""The types of the events that come last."""

PATIENCE = 120
"""Seconds that one call may take: so long, since other programs may have the processors."""

ENDLESS = "/watch"
"""The path of the stream that lasts as long as its session is live."""

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


@schemathesis.serializer("application/x-tar", "application/gzip", "application/zip")
def serialize_archive(_context: Any, value: Any) -> Any:
    """Serialize the body of an import or an archive."""
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


class Fuzz:
    """Cases of every operation of the API's description, sent and checked: random ones for so many seconds at most.

    Findings are collected rather than raised, the first of each kind, so that a long search reports all of them.
    """

    def __init__(self, server: Server, seconds: float = math.inf) -> None:
        self._url = server.url
        self._deadline = time.monotonic() + seconds
        self._lock = threading.Lock()
        self.findings: dict[str, str] = {}
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.schema: BaseSchema = schemathesis.openapi.from_url(f"{self._url}/openapi.json", timeout=PATIENCE)
        operations = list(self.schema.get_all_operations())
        described = [found.ok() for found in operations if isinstance(found, Ok)]
        assert len(described) == len(operations), operations
        self.operations = [operation for operation in described if not operation.path.endswith(ENDLESS)]

    @property
    def over(self) -> bool:
        return time.monotonic() > self._deadline

    def known_corners(self, most: int | None = None) -> None:
        """Schemathesis's bounds and oddities of every field, without chance: all of them, or at most so many valid and
        so many invalid cases of each operation, and valid ones until one has succeeded."""
        with self._session() as session:
            for operation in self.operations:
                chance = random.Random(operation.label)
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                    for number, case in enumerate(self._corners(operation, mode)):
                        is_enough = mode == GenerationMode.NEGATIVE or not self._is_awaited(operation.label)
                        if most is not None and number >= most and is_enough:
                            break
                        self._send(session, case, chance)

    def _is_awaited(self, label: str) -> bool:
        """Whether no case of an operation has succeeded so far, though one can."""
        succeeded = any(status < 300 for found, status in list(self.statuses) if found == label)
        return not succeeded and label not in OUT_OF_REACH

    def _corners(self, operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode) -> Iterator[Case[Any]]:
        return self.schema.iter_coverage_cases(
            operation,
            generation_modes=[mode],
            generation_config=self.schema.config.generation_for(operation=operation),
        )

    def random_cases(self, number: int, examples: int, most: int | None = None) -> None:
        """Random cases of every operation, or of so many at random, until time is up, the same for the same `number`.
        Those come first of which no case has succeeded so far."""
        operations = random.Random(number).sample(self.operations, len(self.operations))
        for operation in sorted(operations, key=lambda operation: not self._is_awaited(operation.label))[:most]:
            if self.over:  # making cases takes long, too
                break
            modes = [GenerationMode.POSITIVE]
            if operation.body or operation.query:
                modes.append(GenerationMode.NEGATIVE)
            for mode in modes:
                self._random_cases(operation, mode, number, examples)

    def never_succeeded(self, rounds: int, examples: int) -> set[str]:
        """Make random valid cases of the operations of which no case has succeeded so far though one can, in at most so
        many rounds; returns those of which still none has."""
        for number in range(rounds):
            for operation in self.operations:
                if self._is_awaited(operation.label):
                    self._random_cases(operation, GenerationMode.POSITIVE, number, examples)
        return {operation.label for operation in self.operations if self._is_awaited(operation.label)}

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
        """Send a case, made more useful where it can be, and check its answer."""
        if "session_id" in (case.path_parameters or {}) and chance.random() < 0.75:
            self._aim_at_a_session(case, chance)
        if case.headers and chance.random() < 0.5:
            case.headers.pop("Last-Event-ID", None)  # hardly any text is the number of an event
        if "token" in (case.path_parameters or {}) and chance.random() < 0.75:
            self._aim_at_a_link(case, chance.choice(TARGETS))
        if "webhook_id" in (case.path_parameters or {}) and chance.random() < 0.75:
            self._aim_at_a_webhook(case)
        if "namespace" in (case.path_parameters or {}) and chance.random() < 0.5:
            self._aim_at_an_item(case)
        if isinstance(case.body, dict):
            _bound(case.body, chance, runs=case.operation.path.endswith(("/run", "/stream", "/execute")))
        label = case.operation.label
        try:
            answer = case.call(base_url=self._url, session=session, timeout=PATIENCE)
        except Exception:
            self._found(label, "no answer", f"{case!r}\n{traceback.format_exc()}")
            return
        with self._lock:
            self.statuses[label, answer.status_code] += 1
        try:
            _check(answer)
            if _kind(answer).startswith("text/event-stream"):
                self._check_events(case, answer)
            if answer.status_code != 431:  # the URL alone was too long for any route
                case.validate_response(answer, checks=_checks_for(case, answer))
        except FailureGroup as failures:
            for failure in failures.exceptions:
                self._found(label, f"{answer.status_code} {type(failure).__name__}", f"{failures}")
        except Exception as error:
            detail = f"{error}\n{answer.text[:1000]}\n{case.as_curl_command(base_url=self._url)[:2000]}"
            self._found(label, f"{answer.status_code} {type(error).__name__}", detail)

    def _check_events(self, case: Case[Any], answer: Response) -> None:
        """Assert that each event of a stream is what the description says, and that nothing follows the last."""
        answers = self.schema.raw_schema["paths"][case.operation.path][case.method.lower()]["responses"]
        schema = answers[str(answer.status_code)]["content"]["text/event-stream"]["schema"]["contentSchema"]
        validator = jsonschema_rs.validator_for({**schema, "components": self.schema.raw_schema["components"]})
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n") if line[:6] == "data: "]
        for event in events:
            validator.validate(event)
        # Whoever asks for what follows the last event gets nothing.
        goes_on = "after" in (case.query or {}) or "Last-Event-ID" in (case.headers or {})
        assert events or goes_on, "an empty stream"
        assert all(event["type"] not in ENDS for event in events[:-1])
        assert not events or events[-1]["type"] in ENDS, events[-1]

    def _aim_at_a_session(self, case: Case[Any], chance: random.Random) -> None:
        """Let the case name an existing session; other cases may delete it meanwhile."""
        target = chance.choice(TARGETS)
        case.path_parameters["session_id"] = target
        if (
            case.headers and case.headers.get("Idempotency-Key") == "null"
        ):  # all corner cases use this key, of which only the first would run
            case.headers["Idempotency-Key"] = case.operation.label
        body = {"session_id": target, "language": target.removeprefix("fuzz-"), "default_timeout": 1}
        made = httpx.post(f"{self._url}/api/sessions", json=body, trust_env=False)
        if made.status_code not in (201, 409):
            self._found("POST /api/sessions", f"{made.status_code}", made.text)
        self._aim_within_the_session(case, f"{self._url}/api/sessions/{target}")

    def _aim_within_the_session(self, case: Case[Any], session: str) -> None:
        """Let the case name an existing run, file or delivery of that session."""
        if "run_id" in case.path_parameters:
            ran = httpx.post(f"{session}/run", json={"code": "", "timeout": 1}, timeout=PATIENCE, trust_env=False)
            case.path_parameters["run_id"] = ran.json().get("run_id", "run_gone")
        if case.operation.path.endswith("/rollback") and isinstance(case.body, dict):
            version = case.body.get("version")
            if type(version) is int and 0 < version <= MAX_VERSION:  # what is invalid stays so
                case.body["version"] = 1
        if "number" in case.path_parameters and case.operation.path.endswith("/name"):
            httpx.put(f"{session}/versions/1/name", json={"name": "first"}, timeout=PATIENCE, trust_env=False)
            case.path_parameters["number"] = 1
        if case.operation.path.endswith("/restore"):
            httpx.delete(session, timeout=PATIENCE, trust_env=False)
        if case.operation.path.endswith("/setup"):
            httpx.patch(session, json={"setup": {"envs": {"A": "1"}}}, timeout=PATIENCE, trust_env=False)
        if "/inbox" in case.operation.path:
            httpx.put(f"{session}/inbox", json={"retries": 0}, timeout=PATIENCE, trust_env=False)
        if "delivery_id" in case.path_parameters:
            url = f"{self._url}/proxy/{case.path_parameters['session_id']}/inbox/"
            delivered = httpx.post(url, timeout=PATIENCE, trust_env=False)
            case.path_parameters["delivery_id"] = delivered.json().get("delivery_id", "delivery_gone")
        if case.operation.path.endswith("/code") and case.method == "GET":
            httpx.put(f"{session}/code", json={"code": "print(1)"}, timeout=PATIENCE, trust_env=False)
        if "process" in case.path_parameters:
            self._aim_at_a_process(case, session)
        if "/contexts/" in case.operation.path:
            cell = {"code": "1", "context": "main"}
            httpx.post(f"{session}/run", json=cell, timeout=PATIENCE, trust_env=False)
            case.path_parameters["name"] = "main"
        if case.operation.path.endswith("/move") and isinstance(case.body, dict):
            httpx.put(f"{session}/files/f", content=b"x", timeout=PATIENCE, trust_env=False)
            case.body |= {"from": "f", "to": f"moved-{time.monotonic_ns()}"}
        if "path" in case.path_parameters:
            httpx.put(f"{session}/files/f", content=b"x", timeout=PATIENCE, trust_env=False)
            case.path_parameters["path"] = "f"
            if "number" in case.path_parameters:
                case.path_parameters["number"] = (
                    httpx.get(session, timeout=PATIENCE, trust_env=False).json().get("version", 1)
                )

    def _aim_at_a_process(self, case: Case[Any], session: str) -> None:
        """Let the case name a process of the session: one that has ended where its events are asked for, which would
        never end otherwise; else one that takes input, or has a terminal."""
        body: dict[str, Any] = {"command": ["cat"], "stdin": True, "timeout": 20}
        if case.operation.path.endswith("/events"):
            body = {"command": ["true"]}
        elif case.method == "PATCH":
            body = {"command": ["cat"], "pty": {"cols": 80, "rows": 24}, "timeout": 20}
        started = httpx.post(f"{session}/processes", json=body, timeout=PATIENCE, trust_env=False)
        case.path_parameters["process"] = started.json().get("process_id", "proc_gone")

    def _aim_at_a_link(self, case: Case[Any], target: str) -> None:
        """Let the case have a link to a file of this session."""
        session = f"{self._url}/api/sessions/{target}"
        httpx.put(f"{session}/files/f", content=b"x", timeout=PATIENCE, trust_env=False)
        body = {"path": "f", "method": "PUT" if case.method == "PUT" else "GET"}
        made = httpx.post(f"{session}/links", json=body, timeout=PATIENCE, trust_env=False)
        case.path_parameters["token"] = made.json().get("url", "gone").rpartition("/")[2]

    def _aim_at_a_webhook(self, case: Case[Any]) -> None:
        """Let the case name an existing webhook, made now unless there are as many as there may be, and a notice of a
        session that is made for it."""
        url = f"{self._url}/api/webhooks"
        body = {"url": "https://example.com/era", "events": ["session.created"]}
        httpx.post(url, json=body, timeout=PATIENCE, trust_env=False)
        webhooks = httpx.get(url, timeout=PATIENCE, trust_env=False).json()["webhooks"]
        case.path_parameters["webhook_id"] = webhook = webhooks[-1]["id"] if webhooks else "wh_gone"
        if "delivery_id" in case.path_parameters:
            httpx.post(f"{self._url}/api/sessions", json={"language": "python"}, timeout=PATIENCE, trust_env=False)
            answer = httpx.get(f"{url}/{webhook}/deliveries", timeout=PATIENCE, trust_env=False)
            notices = answer.json().get("deliveries")
            case.path_parameters["delivery_id"] = notices[0]["id"] if notices else "gone"

    def _aim_at_an_item(self, case: Case[Any]) -> None:
        """Let the case name an existing item of the storage, or hold valid SQL."""
        for kind, body in (("kv", {"value": "v"}), ("r2", {"content": "dg=="})):
            httpx.put(f"{self._url}/api/storage/{kind}/fuzz/k", json=body, timeout=PATIENCE, trust_env=False)
        case.path_parameters["namespace"] = "fuzz"
        if "key" in case.path_parameters:
            case.path_parameters["key"] = "k"
        if isinstance(case.body, dict) and isinstance(case.body.get("sql"), str):
            case.body["sql"] = "SELECT 1"

    def _found(self, operation: str, kind: str, detail: str) -> None:
        """Keep a finding, unless there is one of its kind."""
        with self._lock:
            self.findings.setdefault(f"{operation}: {kind}", detail)

    @contextmanager
    def _session(self) -> Iterator[requests.Session]:
        with requests.Session() as session:
            session.trust_env = False
            yield session

    def report(self) -> str:
        """The findings, and how often each operation gave each status."""
        found = "\n\n".join(f"=== {title}\n{detail}" for title, detail in self.findings.items())
        return f"{found}\n{dict(sorted(self.statuses.items()))}"


def _checks_for(case: Case[Any], answer: Response) -> list[Any]:
    """What an answer is held to. Schemathesis takes the schema of an event's data for that of the event around it, so
    `_check_events` does that instead. The description has whole sessions, of which a list has fewer fields where that
    is asked for."""
    is_stream = _kind(answer).startswith("text/event-stream")
    has_fewer_fields = case.operation.label == "GET /api/sessions" and {"fields", "data"} & set(case.query or {})
    left_out = set[Any]()
    if is_stream or (has_fewer_fields and answer.status_code == 200):
        left_out.add(checks.response_schema_conformance)
    if answer.status_code == 404 and str(answer.request.url).partition("?")[0].endswith("%0A"):
        # "$" in a pattern is before a last line break for Python, which makes the cases, but not for the description.
        left_out.add(checks.status_code_conformance)
    return [check for check in CONFORMITY if check not in left_out]


def _kind(answer: Response) -> str:
    """Its content type; empty where there is no content."""
    return str(answer.headers.get("content-type", [""])[0])


def _takes_bytes(operation: APIOperation[Any, Any, Any, Any]) -> bool:
    """Whether the operation accepts any bytes, so that no body is invalid."""
    return operation.path.endswith(("/files/{path}", "/archive", "/import", "/links/{token}"))


def _bound(body: dict[str, Any], chance: random.Random, *, runs: bool) -> None:
    """Replace long timeouts, endless programs and names that would be refused, so that cases get further and wait less.
    Invalid values stay invalid."""
    for name in ("timeout", "default_timeout"):
        seconds = body.get(name)
        if isinstance(seconds, int | float) and seconds > 1 and chance.random() < 0.9:
            body[name] = chance.choice((0.01, 0.3, 1))
    if isinstance(body.get("code"), str) and chance.random() < 0.5:
        body["code"] = chance.choice(PROGRAMS)
        seconds = body.get("timeout")
        if runs and (seconds is None or (isinstance(seconds, int | float) and seconds > 1)):
            body["timeout"] = chance.choice((0.1, 0.5, 1))
    if runs and chance.random() < 0.5:  # these exclude each other, and what else there may be
        for name in ("command", "context", "cwd", "atomic", "background"):
            if name in body and _is_valid(name, body[name]):
                del body[name]
    for name in ("env", "files"):  # most generated names are invalid, and the run would never begin
        given = body.get(name)
        if (
            isinstance(given, dict)
            and all(isinstance(value, str) for value in given.values())
            and chance.random() < 0.5
        ):
            body[name] = {"A": "1"}
    if _is_valid("secrets", body.get("secrets")):  # the same holds for host names
        body["secrets"] = {"S": {"value": "1", "hosts": ["api.example.com"]}}
    if isinstance(body.get("language"), str) and chance.random() < 0.5:
        body["language"] = chance.choice(("python", "node", "typescript"))


def _is_valid(name: str, value: Any) -> bool:
    """Whether a field of a run may have this value."""
    try:
        RunBody.model_validate({name: value})
    except ValidationError:
        return False
    return True


def _check(answer: Response) -> None:
    """Assert what every answer of this service must be."""
    lacks_gvisor = not HAS_GVISOR and answer.status_code == 503 and answer.json()["code"] == "no_isolation"
    assert answer.status_code < 500 or lacks_gvisor, "it failed"
    assert re.fullmatch("req_[0-9a-f]{16}", answer.headers["x-request-id"][0])
    kind = _kind(answer)
    if answer.status_code >= 400:
        assert kind == "application/json"
        body = answer.json()
        ErrorAnswer.model_validate(body, strict=True, extra="forbid")
        assert body["request_id"] == answer.headers["x-request-id"][0]
        assert body["error"], "no sentence"
        assert body["hint"], "no hint"
