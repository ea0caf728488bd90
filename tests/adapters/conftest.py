"""The frameworks that adapters are for, which scripts/setup --test installs."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import pytest

from era import AsyncEra
from era.sdk.aio.sessions import AsyncSession
from tests.conftest import Server
from tests.documents import FRAMEWORKS

sys.path.append(str(FRAMEWORKS))  # last, so that what .venv has comes from there
sys.dont_write_bytecode = False  # whatever the environment says: to compile a framework takes longer than to import it


@pytest.fixture
async def session(server: Server) -> AsyncIterator[AsyncSession]:
    async with AsyncEra(server.url) as era, era.session("python", ephemeral=True) as session:
        yield session


def pytest_configure(config: pytest.Config) -> None:
    for name in ("benchmark", "vcr", "scheduled"):
        config.addinivalue_line("markers", f"{name}: of langchain_tests, which is only used for its tests of sandboxes")
