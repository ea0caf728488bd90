"""The TypeScript client in Node and in Deno, against real servers. Its own tests are in clients/typescript/tests."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from era import __version__
from tests.conftest import MakeServer, Server, built_with, free_port
from tests.sdk.typescript import SOURCE, App, JsRuntime, app, tsc
from tests.soaking import soak_the_rest

__all__ = ["app"]  # a fixture

KEY = "the-operators-own-key"
RUNTIMES: list[JsRuntime] = ["node", "deno"]
runtimes = pytest.mark.parametrize("runtime", RUNTIMES)
by_node = pytest.mark.parametrize("runtime", soak_the_rest(RUNTIMES, ("node",)))


def check(app: App, runtime: JsRuntime, test: str, **variables: str) -> None:
    """Run a file of the client's tests, which must pass."""
    done = app.run(runtime, app.directory / "tests" / test, **variables)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


@pytest.mark.soak  # the package is built with the same options, so what is left are the types of its tests
def test_sources_and_tests_have_strict_types(app: App) -> None:
    tsc(SOURCE / "tests")


def test_types_and_errors_are_those_of_the_server(app: App, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SOURCE / "generate.py"), str(tmp_path)], check=True)
    for name in ("openapi.ts", "errors.ts"):
        committed = SOURCE / "src" / "generated" / name
        assert (tmp_path / name).read_text() == committed.read_text(), (
            "the API has changed: `make types` writes it anew"
        )


def test_the_package_needs_no_other_and_has_the_projects_version() -> None:
    package = json.loads((SOURCE / "package.json").read_text())
    lock = json.loads((SOURCE / "package-lock.json").read_text())
    assert package["version"] == lock["version"] == __version__
    assert {"dependencies", "peerDependencies", "optionalDependencies"}.isdisjoint(package)
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in package["devDependencies"].values())
    assert all("integrity" in entry for name, entry in lock["packages"].items() if name)


def test_the_packed_package_has_what_its_users_need(app: App) -> None:
    files = {
        str(path.relative_to(app.directory / "era-sessions")) for path in (app.directory / "era-sessions").rglob("*")
    }
    assert {"README.md", "LICENSE", "package.json", "dist/index.js", "dist/index.d.ts"} <= files
    assert not [name for name in files if "test" in name or name.endswith(".py") or name.startswith("src")]


def test_an_error_has_the_class_of_its_code_or_else_of_its_status(app: App) -> None:
    program = app.directory / "classes.mjs"
    program.write_text("""
        import { errorOf } from "#built/answered_errors.js";
        const bases = (kind) => (kind === Error ? [] : [kind.name, ...bases(Object.getPrototypeOf(kind))]);
        const given = [
          [404, "no_such_run"], [409, "not_persistent"], [404, "unheard_of"], [418, "x"], [500, "internal"],
          [409, "constructor"],
        ];
        const errors = given.map(([status, code]) => errorOf(status, { error: "It is so.", code }));
        console.log(JSON.stringify(errors.map((error) => bases(error.constructor))));
    """)
    assert json.loads(app.run("node", program).stdout) == [
        ["NoSuchRun", "NotFound", "EraError"],
        ["NotPersistent", "EraError"],
        ["NotFound", "EraError"],
        ["EraError"],
        ["EraError"],
        ["Conflict", "EraError"],
    ]


@runtimes
def test_the_parser_of_events(app: App, runtime: JsRuntime) -> None:
    check(app, runtime, "sse.test.ts")


@runtimes
def test_every_call(app: App, runtime: JsRuntime, server: Server) -> None:
    check(app, runtime, "client.test.ts", ERA_TEST_URL=server.url)


@by_node
def test_processes_and_terminals(app: App, runtime: JsRuntime, server: Server) -> None:
    check(app, runtime, "live.test.ts", ERA_TEST_URL=server.url)


@by_node
def test_the_scenarios_of_every_client(app: App, runtime: JsRuntime, server: Server) -> None:
    scenarios = Path(__file__).parent / "scenarios.json"
    check(app, runtime, "scenarios.test.ts", ERA_TEST_URL=server.url, ERA_TEST_SCENARIOS=str(scenarios))


@pytest.fixture
def strict_server(own_server: MakeServer) -> Server:
    """A server with a key, in whose sessions one run may wait, and which keeps the output of one run."""
    return own_server(weakness=built_with("era.parts.Turns", max_waiting=1), api_key=KEY, outputs_kept="1")


@by_node
def test_misuse(app: App, runtime: JsRuntime, strict_server: Server) -> None:
    check(app, runtime, "misuse.test.ts", ERA_TEST_URL=strict_server.url, ERA_TEST_KEY=KEY)


@by_node
def test_streams_that_break(app: App, runtime: JsRuntime, strict_server: Server) -> None:
    check(app, runtime, "streams.test.ts", ERA_TEST_URL=strict_server.url, ERA_TEST_KEY=KEY)


@pytest.mark.parametrize(("runtime", "what"), [("node", "output"), ("deno", "run")])
def test_a_stream_while_the_server_is_killed(app: App, runtime: JsRuntime, own_server: MakeServer, what: str) -> None:
    """What a run has written by then comes whole, from the server that is started in its place. A run that was still
    going on is lost, and that is what the stream says."""
    server = own_server(port=str(free_port()))
    program = subprocess.Popen(
        app.command(runtime, app.directory / "tests" / "killed.ts", what),
        cwd=app.directory,
        env=app.environment(ERA_TEST_URL=server.url),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdin is not None
        assert program.stdout is not None
        try:
            assert program.stdout.readline() == "begun\n"
            server.stop(signal.SIGKILL)
            server.start()
            program.stdin.write("go on\n")
            program.stdin.flush()
            assert program.stdout.readline() == {"output": "6000000 bytes, no gap, ok\n", "run": "RunLost\n"}[what]
        finally:
            program.kill()


@by_node
@pytest.mark.parametrize(("comes_back", "error"), [(True, "RunLost"), (False, "ConnectionLost")])
def test_a_run_while_the_server_is_killed(
    app: App, runtime: JsRuntime, own_server: MakeServer, comes_back: bool, error: str
) -> None:
    """The call goes on through a restart. If the server stays away, the error says that the run may have begun."""
    server = own_server(port=str(free_port()))
    program = subprocess.Popen(
        app.command(runtime, app.directory / "tests" / "restarted.ts", "60" if comes_back else "3"),
        cwd=app.directory,
        env=app.environment(ERA_TEST_URL=server.url),
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout is not None
        try:
            assert program.stdout.readline() == "begun\n"
            server.stop(signal.SIGKILL)
            if comes_back:
                time.sleep(4)  # longer than two attempts with pauses of up to 0.25 and 0.5 seconds
                server.start()
            assert program.stdout.readline() == f"{error}\n"
        finally:
            program.kill()
    if not comes_back:
        server.start()
