"""The dashboard of a server that is full, away, or wants a key."""

from __future__ import annotations

from pathlib import Path

from tests.api.dashboard import in_the_browser, some_for_soak
from tests.conftest import MakeServer, Server


@some_for_soak
def test_in_the_browser(server: Server, own_server: MakeServer, tmp_path: Path, soaked: bool) -> None:
    in_the_browser("service.spec.ts", server, tmp_path, own_server(api_key="open sesame"), soaked=soaked)
