"""Processes, terminals and notebooks of the dashboard."""

from __future__ import annotations

from pathlib import Path

from tests.api.dashboard import in_the_browser, some_for_soak
from tests.conftest import Server


@some_for_soak
def test_in_the_browser(server: Server, tmp_path: Path, soaked: bool) -> None:
    in_the_browser("live.spec.ts", server, tmp_path, soaked=soaked)
