"""Calls that other services have: each is answered with the call of this API that does it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from era.api.routing import foreign_calls
from era.api.routing.foreign_calls import field_hint, path_hint, session_path_hint
from era.wire import runs, sessions, storage

ROOT = Path(__file__).parents[2]
RUN = set(runs.RunBody.model_fields)
EXECUTE = set(runs.ExecuteBody.model_fields)
CREATE = set(sessions.CreateSession.model_fields)
COPY = set(sessions.DuplicateBody.model_fields)
SQL = set(storage.SqlBody.model_fields)
PATCH = set(sessions.ChangeSession.model_fields)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/api/sessions/a/exec", "POST /api/sessions/{id}/run"),
        ("/api/sessions/a/commands/run", "/processes"),
        ("/api/sessions/a/Fork", "/duplicate"),
        ("/api/sessions/a/artifacts", "'artifacts'"),
        ("/api/sessions/a/files/upload", "PUT /api/sessions/{id}/files/{path}"),
        ("/api/sessions/a/files", "PUT /api/sessions/{id}/files/{path}"),
        ("/api/sessions/a/logs", "/runs/{run_id}/stdout"),
        ("/api/sessions/a/state/", "PATCH"),
        ("/api/sessions/a/pause", "/stop"),
        ("/api/sessions/a/packages", "'setup'"),
    ],
)
def test_a_path_below_a_session(path: str, word: str) -> None:
    assert word in (session_path_hint(path) or "")


@pytest.mark.parametrize("path", ["/api/sessions", "/api/sessions/exec", "/api/sessions/a/colour", "/exec", "/", ""])
def test_other_paths_are_none_of_a_session(path: str) -> None:
    assert session_path_hint(path) is None


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/sandboxes", "POST /api/sessions"),
        ("/v2/sandboxes/x/pause", "POST /api/sessions"),
        ("/api/vm/python-1/run", "POST /api/sessions"),
        ("/api/v2/piston/execute", "POST /api/execute"),
        ("/api/v2/execute", "POST /api/execute"),
        ("/api/v2/runtimes", "GET /api/languages"),
    ],
)
def test_a_path_of_another_service(path: str, word: str) -> None:
    assert word in (path_hint(path) or "")


@pytest.mark.parametrize("path", ["/", "", "/api", "/api/v2", "/colour"])
def test_a_path_of_no_service_that_is_known(path: str) -> None:
    assert path_hint(path) is None


@pytest.mark.parametrize(
    ("name", "known", "word"),
    [
        ("env", PATCH, "'setup'"),
        ("envVars", CREATE, "'setup'"),
        ("stream", RUN, "/stream"),
        ("language", RUN, "POST /api/execute"),
        ("language", PATCH, "POST /api/execute"),
        ("cmd", RUN, "'command'"),
        ("code", CREATE, "/code"),
        ("files", RUN, "PUT /api/sessions/{id}/files/{path}"),
        ("packages", CREATE, "'setup'"),
        ("templateID", CREATE, "no images"),
        ("version", EXECUTE, "GET /api/languages"),
        ("run_memory_limit", EXECUTE, "'limits'"),
        ("memory_mb", CREATE, "'limits'"),
        ("timeout_ms", RUN, "'timeout' here, in seconds"),
        ("timeoutMs", CREATE, "'default_timeout' here, in seconds"),
        ("update_data", RUN, ".session_data.json"),
        ("name", CREATE, "'session_id'"),
        ("secrets", CREATE, "each run or process"),
        ("session_id", COPY, "'new_id'"),
        ("query", SQL, "'sql'"),
        ("bindings", SQL, "'params'"),
    ],
)
def test_a_field_of_another_service(name: str, known: set[str], word: str) -> None:
    assert word in (field_hint(name, known) or "")


@pytest.mark.parametrize(
    ("name", "known"), [("envs", RUN), ("colour", RUN), ("cod", RUN), ("content", {"value", "metadata"})]
)
def test_a_misspelt_field_or_one_of_another_call_has_no_such_hint(name: str, known: set[str]) -> None:
    assert field_hint(name, known) is None


def hints() -> Iterator[str]:
    for value in vars(foreign_calls).values():
        if isinstance(value, dict):
            yield from (hint for hint in value.values() if isinstance(hint, str))


def test_hints_name_calls_and_pages_that_there_are() -> None:
    headings = set(re.findall(r"(?m)^### `(.*?)`", (ROOT / "docs" / "api.md").read_text()))
    calls = {call for hint in hints() for call in re.findall(r"(?:GET|PUT|POST|PATCH|DELETE) /api/[\w/{}]*", hint)}
    assert len(calls) > 15
    assert {call.replace("{run_id}/stdout", "{run_id}/{stream}") for call in calls} - headings == set()
    pages = {page for hint in hints() for page in re.findall(r"docs/[\w-]+\.md", hint)}
    assert [page for page in pages if not (ROOT / page).is_file()] == []
