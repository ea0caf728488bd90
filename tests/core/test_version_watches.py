"""Watches of sessions that aren't live: what they cost, however many they are and however much changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from era.core.concurrency import meter
from era.core.concurrency.event_log import Gap
from era.core.files import watching
from era.core.files.watching import FileEvent, Watching
from era.core.models import EMPTY, OwnedId, Snapshot
from era.core.trees.diffs import entry_changes
from era.errors import Unavailable
from tests.core.lab import Lab
from tests.owners import mine

SECONDS = 60


class Store:
    """A store whose sessions all have the same files."""

    def __init__(self) -> None:
        self.current: Snapshot = EMPTY
        self.asked: list[int] = []
        """The number of sessions that each query asked for."""

        self.is_away = False

    async def session(self, session_id: OwnedId) -> Any:
        return SimpleNamespace(
            key=int(session_id.id.removeprefix("s")), id=session_id.id, owned_id=session_id, snapshot=self.current
        )

    async def snapshots_of(self, keys: Sequence[int]) -> dict[int, Snapshot]:
        if self.is_away:
            raise Unavailable("away")
        self.asked.append(len(keys))
        return dict.fromkeys(keys, self.current)


class NothingLive:
    """The live sessions of a host that has none."""

    def get(self, _: int) -> None:
        return None

    @contextmanager
    def in_use(self, _: int) -> Iterator[None]:
        yield None


def watching_in(lab: Lab) -> tuple[Watching, Store]:
    store = Store()
    return Watching(cast(Any, NothingLive()), cast(Any, store), lab.snapshots), store


async def kinds(events: AsyncIterator[list[tuple[int, FileEvent]] | Gap], count: int) -> list[str]:
    """The kinds of so many events."""
    found = list[str]()
    async with asyncio.timeout(SECONDS):
        async for piece in events:
            found += ["gap"] if isinstance(piece, Gap) else [event.kind for _, event in piece]
            if len(found) >= count:
                return found
    raise AssertionError(found)


async def test_a_watch_with_32_readers_queries_once_per_look_and_without_readers_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_LOOK_SECONDS", 0.2)
    lab = Lab(tmp_path)
    watched, store = watching_in(lab)
    async with AsyncExitStack() as readers:
        for _ in range(32):
            await readers.enter_async_context(watched.watched(mine("s1"), (), recursive=True))
        store.asked.clear()
        await asyncio.sleep(0.5)
        assert 1 <= len(store.asked) <= 3
    await asyncio.sleep(0.3)
    store.asked.clear()
    await asyncio.sleep(0.3)
    assert store.asked == [], "nobody reads"
    await lab.snapshots.close()


async def test_watches_that_nobody_reads_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_MOST_KEPT", 10)
    lab = Lab(tmp_path)
    watched, _ = watching_in(lab)
    for number in range(30):
        async with watched.watched(mine(f"s{number}"), (), recursive=False):
            pass
    assert len(watched._watches) == 10
    await lab.snapshots.close()


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_large_step_leaves_the_event_loop_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    monkeypatch.setattr(watching, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(meter, "SLICE", float("inf") if weakened else 1e-4)
    meter.install()
    lab = Lab(tmp_path)
    watched, store = watching_in(lab)
    place = lab.place()
    for number in range(5000):
        (place.workspace / str(number)).touch()
    full = await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))
    async with watched.watched(mine("s1"), (), recursive=True) as events:
        [watch] = watched._watches.values()
        noted = list[int]()

        async def others() -> None:
            while True:
                noted.append(len(watch._log._kept))
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        store.current = full
        assert len(await kinds(events, 5001)) == 5001
        task.cancel()
    steps = [now - before for before, now in pairwise(noted)]
    assert (max(steps) > 1000) == weakened, "events that are noted before others have their turn"
    await lab.snapshots.close()


async def test_step_of_too_many_changes_is_an_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_LOOK_SECONDS", 0.05)
    lab = Lab(tmp_path)
    watched, store = watching_in(lab)
    place = lab.place()
    for number in range(4):
        (place.workspace / f"{number}{'x' * 200}").touch()
    full = await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))
    for name, most in (("_MOST_CHANGES", 3), ("_KEPT_BYTES", 1000)):
        with monkeypatch.context() as bounded:
            bounded.setattr(watching, name, most)
            store.current = EMPTY
            async with watched.watched(mine("s1"), (), recursive=True) as events:
                store.current = full
                assert await kinds(events, 2) == ["watching", "overflow"]
        watched, store = watching_in(lab)
    await lab.snapshots.close()


async def test_watch_outlasts_an_outage_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_LOOK_SECONDS", 0.05)
    lab = Lab(tmp_path)
    watched, store = watching_in(lab)
    place = lab.place()
    (place.workspace / "new").touch()
    full = await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))
    async with watched.watched(mine("s1"), (), recursive=True) as events:
        store.is_away = True
        await asyncio.sleep(0.2)
        store.current, store.is_away = full, False
        assert await kinds(events, 2) == ["watching", "create"]
    await lab.snapshots.close()


async def test_old_version_that_is_gone_is_an_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_LOOK_SECONDS", 0.05)
    lab = Lab(tmp_path)
    watched, store = watching_in(lab)
    store.current = Snapshot("0" * 64, 1, 1)
    async with watched.watched(mine("s1"), (), recursive=True) as events:
        store.current = EMPTY
        assert await kinds(events, 2) == ["watching", "overflow"]
    store.current = Snapshot("0" * 64, 1, 1)
    with pytest.raises(Unavailable):
        await watched.watched(mine("s2"), ("file",), recursive=True).__aenter__()
    await lab.snapshots.close()


FILE, OTHER, RUNNABLE = (
    ["file", "x", content, 1, mode, 5] for content, mode in (("a", 0o644), ("b", 0o644), ("a", 0o755))
)
LINK = ["link", "x", "target", 5]
DIRECTORY = ["dir", "x", "tree", 0o755]
TREES: dict[str, Any] = {
    "tree": [["file", "inner", "c", 1, 0o644, 5], ["dir", "deep", "deeper", 0o755]],
    "deeper": [["file", "deepest", "c", 1, 0o644, 5]],
}
INSIDE = [("create", "x/deep"), ("create", "x/deep/deepest"), ("create", "x/inner")]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (None, FILE, [("create", "x")]),
        (FILE, None, [("remove", "x")]),
        (FILE, OTHER, [("write", "x")]),
        (FILE, RUNNABLE, [("chmod", "x")]),
        (FILE, [*FILE[:5], 6], []),
        (FILE, LINK, [("remove", "x"), ("create", "x")]),
        (LINK, ["link", "x", "other", 5], [("write", "x")]),
        (None, DIRECTORY, [("create", "x"), *INSIDE]),
        (DIRECTORY, [*DIRECTORY[:3], 0o700], [("chmod", "x")]),
        (FILE, DIRECTORY, [("remove", "x"), ("create", "x"), *INSIDE]),
        (
            DIRECTORY,
            FILE,
            [
                ("remove", "x/deep/deepest"),
                ("remove", "x/deep"),
                ("remove", "x/inner"),
                ("remove", "x"),
                ("create", "x"),
            ],
        ),
        (DIRECTORY, None, [("remove", "x/deep/deepest"), ("remove", "x/deep"), ("remove", "x/inner"), ("remove", "x")]),
    ],
)
@pytest.mark.parametrize("path", [(), ("x",)])
def test_changes_of_an_entry(old: Any, new: Any, found: list[Any], path: tuple[str, ...]) -> None:
    trees = {**TREES, "old": [old] if old else [], "new": [new] if new else []}
    assert list(entry_changes(trees.__getitem__, "old", "new", path, recursive=True)) == found
    flat = [each for each in found if each[1].count("/") <= len(path)]
    assert list(entry_changes(trees.__getitem__, "old", "new", path, recursive=False)) == flat
