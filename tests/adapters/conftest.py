"""The frameworks that adapters are for, which scripts/setup --test installs."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from era import AsyncEra
from era.sdk.aio.sessions import AsyncSession
from tests.conftest import Server
from tests.documents import FRAMEWORKS

FOLDER = Path(__file__).resolve().parent

sys.path.append(str(FRAMEWORKS))  # last, so that what .venv has comes from there
sys.dont_write_bytecode = False  # whatever the environment says: to compile a framework takes longer than to import it


@pytest.fixture
async def session(server: Server) -> AsyncIterator[AsyncSession]:
    async with AsyncEra(server.url) as era, era.session("python") as session:
        yield session


def pytest_configure(config: pytest.Config) -> None:
    for name in ("benchmark", "vcr", "scheduled"):
        config.addinivalue_line("markers", f"{name}: of langchain_tests, which is only used for its tests of sandboxes")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where all tests are run, only those of test_apart.py, which has the other files run, are collected here."""
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    selects = bool(config.option.keyword) or config.option.markexpr != "not soak"
    directly = selects or any(
        path == FOLDER or (path.parent == FOLDER and path.name != "test_apart.py") for path in named
    )
    if collection_path.name == "test_apart.py":
        return directly or None
    if collection_path.name.startswith("test_"):
        return not directly or None
    return None
