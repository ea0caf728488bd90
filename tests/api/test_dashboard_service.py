"""The dashboard of a server that is full, away, or wants a key."""

from __future__ import annotations

from pathlib import Path

from tests.api.dashboard import in_the_browser
from tests.conftest import MakeServer, Server


def test_in_the_browser(server: Server, own_server: MakeServer, tmp_path: Path) -> None:
    in_the_browser("service.spec.ts", server, tmp_path, own_server(api_key="open sesame"))
