from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.core.lab import Lab
from tests.core.moving import Service


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with Service.at(tmp_path / "here") as service:
        yield service
