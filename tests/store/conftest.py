"""A metadata store on a real SQLite file, and an S3 server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from era.store.metadata import SqlStore
from tests.store.rows import opened
from tests.store.s3 import bucket, faulty, s3

__all__ = ["bucket", "faulty", "s3"]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The URL of a database that doesn't exist yet."""
    return f"sqlite:///{tmp_path}/era.db"


@pytest.fixture
async def store(url: str) -> AsyncIterator[SqlStore]:
    """An open store in a database of its own."""
    async with opened(url) as store:
        yield store
