"""Every page of the dashboard by axe-core, in both colours and at all widths."""

from __future__ import annotations

from pathlib import Path

from tests.api.dashboard import in_the_browser
from tests.conftest import Server


def test_in_the_browser(server: Server, tmp_path: Path) -> None:
    in_the_browser("accessible.spec.ts", server, tmp_path)
