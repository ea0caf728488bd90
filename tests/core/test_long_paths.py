"""Lists of files whose paths are far longer than what is kept of them: they are told some at a time."""

from __future__ import annotations

import asyncio
import json
import tracemalloc

import pytest

from era.api.routing.streaming import listing_response, with_files
from era.core.models import EMPTY, Snapshot
from era.core.trees import pages
from era.core.trees.pages import change_pages, file_pages
from era.core.trees.tree_objects import encode
from tests.core.lab import Lab
from tests.owners import mine

FILES, DEPTH, NAME = 2000, 40, "d" * 250


@pytest.fixture
def deep(lab: Lab) -> Snapshot:
    """Many files in a directory of a very long path. No call of the system takes so long a one."""

    def put(lab: Lab) -> str:
        with lab.blobs.batch() as batch:
            content = batch.put(b"")
            tree = [["file", f"f{number:04}", content, 0, 0o644, 1] for number in range(FILES)]
            digest = str(batch.put(encode(tree)))
            for _ in range(DEPTH):
                digest = str(batch.put(encode([["dir", NAME, digest, 0o755]])))
        return digest

    return Snapshot(put(lab), FILES, 0)


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
def test_they_take_little_memory(lab: Lab, deep: Snapshot, weakened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if weakened:
        monkeypatch.setattr(pages, "_PAGE_CHARACTERS", 1 << 40)

    async def look() -> tuple[int, int]:
        files = changes = 0
        async for page in file_pages(lab.snapshots, deep, mine("s")):
            files += len(page)
        async for added in change_pages(lab.snapshots, EMPTY, deep, mine("s"), "added"):
            changes += len(added)
        return files, changes

    tracemalloc.start()
    try:
        assert asyncio.run(look()) == (FILES, FILES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (peak > FILES * DEPTH * len(NAME)) is weakened


def test_an_answer_has_all_of_them(lab: Lab, deep: Snapshot) -> None:
    async def answer() -> bytes:
        response = await listing_response(with_files({"id": "x"}, file_pages(lab.snapshots, deep, mine("s"))))
        return b"".join([bytes(piece) async for piece in response.body_iterator])  # type: ignore[attr-defined]

    told = json.loads(asyncio.run(answer()))
    assert [file["path"].rpartition("/")[2] for file in told["files"]] == [f"f{number:04}" for number in range(FILES)]
    assert told["id"] == "x"
