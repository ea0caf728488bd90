"""What programs write can do nothing to the dashboard."""

from __future__ import annotations

from pathlib import Path

from tests.api.dashboard import in_the_browser
from tests.conftest import Server


def test_in_the_browser(server: Server, tmp_path: Path) -> None:
    in_the_browser("hostile.spec.ts", server, tmp_path)
