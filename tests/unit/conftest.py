from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from era.core.concurrency import late_ends
from era.core.owners import deliveries
from era.core.setup import setups
from era.store.metadata import SqlStore
from tests.unit.core import Core

_MEMORY = Path("/dev/shm")
"""Where a flush costs nothing: no test here is about losing power."""


@pytest.fixture(scope="session", autouse=True)
def quick_retries() -> Iterator[None]:
    """Shorten the pauses between attempts, which tests of what fails at first wait out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(late_ends, "FIRST_DELAY", 0.1)
        patch.setattr(deliveries, "_POLL_SECONDS", 0.1)
        patch.setattr(setups, "_LOOK_SECONDS", 0.1)
        patch.setattr(setups, "_FIRST_DELAY", 0.1)
        yield


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A directory that is in memory, where this machine has such."""
    with tempfile.TemporaryDirectory(prefix="era-unit-", dir=_MEMORY if _MEMORY.is_dir() else None) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def template(memory: Path) -> Path:
    """An empty database with all its tables."""
    path = memory / "template.sqlite"

    async def make() -> None:
        store = SqlStore(f"sqlite:///{path}")
        await store.open()
        await store.close()

    asyncio.run(make())
    return path


@pytest.fixture
def directory(memory: Path) -> Path:
    """An empty directory of the test's own."""
    return Path(tempfile.mkdtemp(dir=memory))


@pytest.fixture
async def core(directory: Path, template: Path) -> AsyncIterator[Core]:
    async with Core.opened(directory, template) as core:
        yield core


@pytest.fixture
async def small(directory: Path, template: Path) -> AsyncIterator[Core]:
    """Room for two sandboxes."""
    async with Core.opened(directory, template, max_warm=2) as core:
        yield core
