"""Checks of HTTP answers against the contract: successes by their documented model, errors by their one shape."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import httpx
from pydantic import BaseModel

from era.wire.base import ErrorAnswer
from era.wire.runs import RunRecordAnswer

JSON = {"content-type": "application/json"}

SESSION_KEYS = {
    "id", "session_id", "created_at", "last_run_at", "language", "persistent", "file_count", "total_size_bytes",
    "metadata", "data", "setup", "allowInternetAccess", "allowPublicAccess", "default_timeout", "version",
    "ttl", "expires_at", "limits", "isolation", "egress", "service", "storage", "status", "processes", "record_code",
}  # fmt: skip

RUN_KEYS = {
    "exit_code", "stdout", "stderr", "duration", "duration_ms", "session_id", "data", "run_id", "status",
    "stdout_truncated", "stderr_truncated", "state", "artifacts", "artifacts_more",
}  # fmt: skip


def checked(answer: httpx.Response, model: type[BaseModel], keys: set[str], status: int = 200) -> dict[str, Any]:
    """Assert this status and a body of exactly `keys` that `model` accepts without conversion; returns the body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch("req_[0-9a-f]{16}", answer.headers["x-request-id"])
    body: dict[str, Any] = answer.json()
    assert body.keys() == keys
    model.model_validate(body, strict=True, extra="forbid")
    return body


def refused(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """Assert an error in the contract's shape, with `words` in its sentence or its hint; returns its body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, Any] = answer.json()
    assert body.keys() - {"details"} == {"error", "code", "hint", "request_id"}
    ErrorAnswer.model_validate(body, strict=True, extra="forbid")
    assert re.fullmatch("[a-z]+(_[a-z]+)*", body["code"])
    assert body["request_id"] == answer.headers["x-request-id"]
    assert len(body["error"]) > 10
    assert len(body["hint"]) > 10
    for word in words:
        assert word in body["error"] + body["hint"], body
    return body


def assert_recent(text: str) -> None:
    """Assert a time in RFC 3339 and UTC, of the last minute."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", text)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()) < 60


def send_json(client: httpx.Client, method: str, path: str, body: str | bytes) -> httpx.Response:
    """Send `body` as it is, with the content type of JSON."""
    return client.request(method, path, content=body, headers=JSON)


RECORD_KEYS = {
    "run_id", "session_id", "status", "started_at", "ended_at", "duration", "duration_ms", "exit_code", "stdout_bytes",
    "stderr_bytes", "stdout_truncated", "stderr_truncated", "state", "peak_memory_bytes", "cpu_seconds", "reaped",
    "enforced", "egress", "artifacts", "artifacts_more", "code", "command", "args", "code_truncated",
}  # fmt: skip


def run_record(client: httpx.Client, where: str, run_id: str) -> dict[str, Any]:
    """The record of a run."""
    return checked(client.get(f"/api/sessions/{where}/runs/{run_id}"), RunRecordAnswer, RECORD_KEYS)


def artifact_paths(outcome: dict[str, Any]) -> list[str]:
    """The paths of a run's artifacts, of which all must be listed."""
    assert outcome["artifacts_more"] == 0
    return [each["path"] for each in outcome["artifacts"]]
