from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.core.interpreters import Cells, interpreter, python_command, stage_ipython
from tests.core.lab import CountingBlobs, Lab
from tests.core.moving import Service


@pytest.fixture(scope="module", autouse=True)
def quickly_opened_labs() -> Iterator[None]:
    """Labs make their blob stores without a sync of each of the 257 directories of one, which would take a second. No
    lab loses its power; what is put later is synced as anywhere."""
    whole = CountingBlobs.open

    def open_quickly(blobs: CountingBlobs) -> None:
        with patch("era.store.blobs.sync"):
            whole(blobs)

    with patch.object(CountingBlobs, "open", open_quickly):
        yield


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
