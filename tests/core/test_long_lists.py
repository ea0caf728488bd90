"""Directories of very many entries: their lists are written and read in slices, and have a bound."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from era.core import limits
from era.core.models import EMPTY
from era.core.totals import Bounds, Totals
from era.core.trees import edits, tree_objects
from era.core.trees.edits import Changes, PutFile, PutLink
from era.core.trees.tree_objects import decode, encode
from era.core.trees.trees import SnapshotRefused, WorkspaceFull
from era.errors import TooLarge
from tests.core.lab import LIMITS, Lab, Place
from tests.owners import mine

ODD = ('],["file","', '],["dir"', "],[", '"', "\\", '\\"],["link",', "\udcff\udcfe", "é\n", "]", " ")


def many() -> list[Any]:
    """Entries of every kind, with names that look like what is between entries."""
    names = [f"{odd}{n:05}{odd}" for n in range(3000) for odd in ODD]
    kinds = (
        lambda name: ["file", name, "a" * 64, 1, 0o644, 2**64],
        lambda name: ["link", name, name, -1],
        lambda name: ["dir", name, "b" * 64, 0o700],
    )
    return [kinds[n % 3](name) for n, name in enumerate(names)]


def test_a_list_is_the_same_as_if_it_was_written_at_once() -> None:
    entries = many()
    content = encode(entries)
    assert content == json.dumps(entries, separators=(",", ":")).encode()
    assert len(content) > 8 * tree_objects._SLICE_BYTES
    assert decode(content) == entries
    assert [decode(encode(entries[:n])) for n in (0, 1, 1000, 1001)] == [entries[:n] for n in (0, 1, 1000, 1001)]


def test_no_more_than_a_slice_is_written_or_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else in the process waits for that: it was 3 s with 190,000 long names."""
    sizes: list[int] = []
    loads, dumps = json.loads, json.dumps

    def noted(text: Any) -> Any:
        sizes.append(len(text))
        return loads(text)

    def written(value: Any, **options: Any) -> str:
        sizes.append(len(text := dumps(value, **options)))
        return text

    monkeypatch.setattr(json, "loads", noted)
    monkeypatch.setattr(json, "dumps", written)
    assert len(decode(encode(many()))) == 30_000
    assert len(sizes) > 30
    assert max(sizes) < 1 << 20


async def test_a_directory_whose_list_is_too_long_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tmp_path)
    monkeypatch.setattr(tree_objects, "MAX_LIST_BYTES", 400)
    place = lab.place()
    below = place.workspace / "d"
    below.mkdir()
    for name in ("a", "b", "c"):
        (below / name).touch()
    kept = await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))
    (below / "d").touch()
    with pytest.raises(SnapshotRefused, match="has a directory whose list of names takes over 400 bytes"):
        await lab.snapshots.take(place.sandbox, kept, session_id=mine("s"))
    with lab.blobs.batch() as batch:
        changes = Changes()
        changes.add(("d", "d"), PutFile(batch.put(b""), 0, 0))
    with pytest.raises(TooLarge, match="list of names"):
        await lab.snapshots.edit(kept, changes, lambda _: None, limits.bounds(LIMITS), mine("s"))
    await lab.snapshots.close()


def put_links(place: Place, how_many: int) -> None:
    for number in range(how_many):
        os.symlink(b"\xff" * 4000, os.fsencode(place.workspace) + b"/link%d" % number)


async def test_long_links_count_as_several_entries(lab: Lab) -> None:
    """200,000 of them took gigabytes of the service's memory as long as their session was warm."""
    place, snapshots = lab.place(), lab.snapshots
    place.limits = replace(LIMITS, files=50)
    put_links(place, 3)
    kept = await snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))
    assert (kept.file_count, kept.total_bytes) == (3, 12_000)
    (place.workspace / "file").touch()
    (place.workspace / "short").symlink_to("x" * 256)
    with pytest.raises(WorkspaceFull):
        await snapshots.take(place.sandbox, kept, session_id=mine("s"))
    (place.workspace / "short").unlink()
    kept = await snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))
    few = Bounds(entries=50)
    changes = Changes()
    changes.add(("new",), PutLink("x" * 256, 0))
    with pytest.raises(TooLarge, match="more than 50"):
        await snapshots.edit(kept, changes, lambda _: None, few, mine("s"))
    changes = Changes()
    changes.add(("link1",), PutLink("y", 0))
    shorter = await snapshots.edit(kept, changes, lambda _: None, few, mine("s"))
    assert edits.count(snapshots.read_tree, shorter.root) == Totals(34, 4, 8001)
    changes = Changes()
    changes.add(("other",), PutLink("\udcff" * 4000, 0))
    assert (await snapshots.edit(shorter, changes, lambda _: None, few, mine("s"))).file_count == 5
    changes.add(("more",), PutLink("y", 0))
    with pytest.raises(TooLarge, match="more than 50"):
        await snapshots.edit(shorter, changes, lambda _: None, few, mine("s"))
