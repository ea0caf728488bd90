"""The dashboard is there; that all its tests in the browser (web/tests) are run."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.api.dashboard import WEB


def test_it_is_at_the_root_and_its_pages_are_its_own(client: httpx.Client) -> None:
    """The page names scripts and styles by their content, so browsers may keep them for good."""
    page = client.get("/")
    assert page.status_code == 200
    assert "<script" in page.text or "make setup" in page.text


def test_each_file_of_tests_in_the_browser_is_run() -> None:
    specs = {path.name.removesuffix(".spec.ts") for path in (WEB / "tests").glob("*.spec.ts")}
    files = {path.stem.removeprefix("test_dashboard_") for path in Path(__file__).parent.glob("test_dashboard_*.py")}
    assert specs == files
    soaked = {path.name for path in (WEB / "tests").glob("*.spec.ts") if " (soak)'" in path.read_text()}
    assert soaked == {
        f"{path.stem.removeprefix('test_dashboard_')}.spec.ts"
        for path in Path(__file__).parent.glob("test_dashboard_*.py")
        if "@some_for_soak" in path.read_text()
    }
