from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.core.interpreters import Cells, interpreter, python_command, stage_ipython
from tests.core.lab import Lab
from tests.core.moving import Service


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    asyncio.run(made.snapshots.close())


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with Service.at(tmp_path / "here") as service:
        yield service


@pytest.fixture(scope="session")
def staged_ipython() -> None:
    stage_ipython()


@pytest.fixture
async def cells(tmp_path: Path, staged_ipython: None) -> AsyncIterator[Cells]:
    """The cells of a Python context."""
    async with interpreter(python_command(), tmp_path) as made:
        yield made
