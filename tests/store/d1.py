"""SQL databases of programs, for tests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from era.core.models import DEFAULT_OWNER
from era.store.d1.d1_databases import D1Databases

ROOM = 1 << 30
A = (DEFAULT_OWNER, "a")


@pytest.fixture
async def databases(tmp_path: Path) -> AsyncIterator[D1Databases]:
    made = D1Databases(tmp_path / "d1", 4 << 20)
    made.open()
    yield made
    await made.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


async def run(
    databases: D1Databases, owner: str, namespace: str, sql: str, params: Any = (), **options: Any
) -> dict[str, Any]:
    """Run SQL as `run_as_json` does. Returns its result, parsed."""
    pieces = await databases.run_as_json(owner, namespace, sql, params, **options)
    result: dict[str, Any] = json.loads(b"".join(pieces))
    return result


async def query(databases: D1Databases, sql: str, params: Any = ()) -> list[dict[str, Any]]:
    """The rows of a statement on the database `A`."""
    rows: list[dict[str, Any]] = (await run(databases, *A, sql, params, many=False, room=ROOM))["results"]
    return rows
