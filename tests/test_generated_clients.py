"""Clients that are generated from the API's description: they compile at their strictest, and call every operation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import MakeServer, Server, eventually
from tests.generated.by_typescript import program
from tests.generated.calls import CALLS, as_json
from tests.test_description import NPM_TOOLS, ROOT, done, npm_tool, operations

PYTHON_GENERATOR = ROOT / ".tools" / "bin" / "openapi-python-client"
GENERATED = Path(__file__).parent / "generated"
KEY = "operator-of-the-walk"


@pytest.fixture
def server(own_server: MakeServer) -> Server:
    """A server with an operator, and a session that has had a delivery."""
    server = own_server(api_key=KEY)
    with server.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "received"}).raise_for_status()
        client.put("/api/sessions/received/code", json={"code": "print(1)"}).raise_for_status()
        client.put("/api/sessions/received/inbox", json={}).raise_for_status()
        httpx.post(f"{server.url}/proxy/received/inbox/hook", json={"n": 1}).raise_for_status()
        path = "/api/sessions/received/inbox/deliveries"
        assert eventually(lambda: client.get(path, params={"status": "done"}).json()["deliveries"])
    return server


def document_of(server: Server, directory: Path) -> tuple[dict[str, Any], Path]:
    """The description, and the file that it is in."""
    with server.client() as client:
        document: dict[str, Any] = client.get("/openapi.json").json()
    path = directory / "openapi.json"
    path.write_text(json.dumps(document))
    return document, path


def named(document: dict[str, Any]) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Method, path and description of the operations, by name."""
    return {each["operationId"]: (*where.split(" ", 1), each) for where, each in operations(document)}  # type: ignore[misc]  # of two


def assert_walked(document: dict[str, Any], printed: str) -> None:
    """Every operation was called, and answered as the calls say, with something of a type that the client knows."""
    answers = [json.loads(line) for line in printed.splitlines()]
    described = {operation["operationId"]: operation for _, operation in operations(document)}
    for call, (name, status, typed, shown) in zip(CALLS, answers, strict=False):
        assert name == call.operation
        wanted = call.status or int(min(described[name]["responses"]))
        assert (status, typed != "NoneType") == (wanted, True), (name, status, typed, shown)
    assert len(answers) == len(CALLS)
    assert not described.keys() - {name for name, *_ in answers}, "never called"


def python_client(document: dict[str, Any], path: Path, directory: Path) -> tuple[Path, Path]:
    """Generate one by openapi-python-client, with every warning an error; where it is, and a Python that it runs in."""
    if not PYTHON_GENERATOR.exists():
        pytest.skip(f"needs {PYTHON_GENERATOR.name}, which scripts/setup --test installs where it can")
    made = directory / "made"
    config = ROOT / "tests" / "openapi_python_client.yml"
    options = ["--output-path", made, "--meta", "none", "--fail-on-warning", "--config", config]
    done(PYTHON_GENERATOR, "generate", "--path", path, *options)
    modules = {file.stem for file in made.glob("api/*/*.py")} - {"__init__"}
    assert modules == {operation["operationId"] for _, operation in operations(document)}
    return made, PYTHON_GENERATOR.resolve().parent / "python"  # the generator has what its clients need


def test_a_generated_python_client_calls_everything(server: Server, tmp_path: Path) -> None:
    document, path = document_of(server, tmp_path)
    _, libraries = python_client(document, path, tmp_path)
    (tmp_path / "calls.json").write_text(json.dumps(as_json()))
    walk = [libraries, GENERATED / "by_python.py", tmp_path, server.url, KEY, tmp_path / "calls.json"]
    ran = subprocess.run([str(each) for each in walk], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, f"{ran.stdout[-500:]}\n{ran.stderr[-3000:]}"
    assert_walked(document, ran.stdout)


@pytest.mark.soak  # mypy takes twice as long over it as it takes to generate it and to call everything
def test_a_generated_python_client_is_typed(shared_server: Server, tmp_path: Path) -> None:
    """For mypy at its strictest."""
    made, libraries = python_client(*document_of(shared_server, tmp_path), tmp_path)
    strict = ["--strict", "--config-file", "/dev/null", "--python-executable", libraries]
    done(sys.executable, "-m", "mypy", *strict, "--cache-dir", tmp_path / "cache", made)


@pytest.mark.soak
def test_a_generated_typescript_client_is_typed_and_calls_everything(server: Server, tmp_path: Path) -> None:
    """openapi-typescript with openapi-fetch, and tsc at its strictest."""
    document, path = document_of(server, tmp_path)
    done(*npm_tool("openapi-typescript"), path, "--default-non-nullable", "false", "-o", tmp_path / "api.ts")
    (tmp_path / "node_modules").symlink_to(NPM_TOOLS.parent)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "walk.ts").write_text(program(as_json(), named(document)))
    strict = ["--strict", "--exactOptionalPropertyTypes", "--noUncheckedIndexedAccess", "--skipLibCheck"]
    done(*npm_tool("tsc"), *strict, "--module", "nodenext", "--target", "es2022", tmp_path / "walk.ts", cwd=tmp_path)
    node = npm_tool("tsc")[0]
    ran = subprocess.run(
        [node, str(tmp_path / "walk.js"), server.url, KEY], capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, f"{ran.stdout[-500:]}\n{ran.stderr[-3000:]}"
    assert_walked(document, ran.stdout)
