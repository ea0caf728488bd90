"""A development server in a live session, at its public URL in a real browser. It needs npm's registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.dashboard import in_the_browser
from tests.conftest import Server


@pytest.mark.soak
def test_a_module_is_replaced_while_its_page_stays(server: Server, tmp_path: Path) -> None:
    in_the_browser("vite.soak.ts", server, tmp_path)
