"""Installed packages in a session's tree: kept like files, and never shown as such."""

from __future__ import annotations

import asyncio
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from era.core.models import EMPTY, Snapshot
from era.core.totals import Bounds
from era.core.trees import edits
from era.core.trees.diffs import FileChange
from era.core.trees.edits import Changes, PutFile, Remove
from era.core.trees.trees import SnapshotRefused
from era.errors import SandboxFailed
from tests.core.lab import LIMITS, Lab, Place, described, file_changes, mutate
from tests.owners import mine
from tests.soaking import soak_the_rest

NPM_LIST = ".package-lock.json"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def packages(place: Place) -> Path:
    return place.workspace.parent / "packages"


def listed(lab: Lab, snapshot: Snapshot) -> list[str]:
    return [entry.path for entry in asyncio.run(lab.snapshots.entries(snapshot, mine("s")))]


def edit(lab: Lab, snapshot: Snapshot, changes: Changes, *, replace: bool = False) -> Snapshot:
    return asyncio.run(lab.snapshots.edit(snapshot, changes, lambda _: None, Bounds(), mine("s"), replace=replace))


def put(lab: Lab, *paths: str) -> Changes:
    """Changes by which a client puts empty files."""
    with lab.blobs.batch() as batch:
        digest = batch.put(b"")
    changes = Changes()
    for path in paths:
        changes.add(tuple(path.split("/")), PutFile(digest, 0, 0))
    return changes


def test_packages_that_are_not_known_any_more_are_not_taken_for_none(lab: Lab) -> None:
    place = lab.place_with_packages()
    (packages(place) / "lib").mkdir()
    asyncio.run(lab.snapshots.restore(edit(lab, EMPTY, put(lab, "a")), place.sandbox, session_id=mine("s")))
    (place.workspace / "a").unlink()
    (packages(place) / "lib" / "m.py").write_text("x")
    lab.take(place)
    lab.snapshots.forget(place.sandbox.id)
    with pytest.raises(SandboxFailed, match="isn't known"):
        asyncio.run(lab.snapshots.restore(EMPTY, place.sandbox, session_id=mine("s")))


@pytest.mark.parametrize("seed", soak_the_rest(range(8), 2))
def test_whatever_is_done_to_them_they_come_back(lab: Lab, seed: int) -> None:
    """Small trees and large ones, which are watched; for a service that knows the place, and one that doesn't."""
    chance = random.Random(seed)
    place = lab.place_with_packages()
    for n in range(seed % 2 * 60):
        (packages(place) / f"m{n}").write_text("x")
    before, taken = EMPTY, []
    for _ in range(12):
        for _ in range(chance.randrange(4)):
            mutate(chance.choice([place.workspace, packages(place)]), chance)
        before = lab.take(place, before)
        assert lab.from_scratch(place).root == before.root
        taken.append((before, described(place.workspace), described(packages(place))))
    other = lab.place_with_packages()
    inode = packages(other).stat().st_ino
    for snapshot, workspace, installed in chance.sample(taken, len(taken)):
        asyncio.run(lab.snapshots.restore(snapshot, other.sandbox, session_id=mine("s")))
        assert described(other.workspace) == workspace
        # Directories alone are no packages.
        if any(kind != "dir" for kind, *_ in installed.values()):
            assert described(packages(other)) == installed
        else:
            assert described(packages(other)) == {}
        assert packages(other).stat().st_ino == inode, "the sandbox has this directory mounted"


def test_they_are_no_files(lab: Lab) -> None:
    place = lab.place_with_packages()
    (place.workspace / "a").write_text("12")
    plain = lab.take(place)
    (packages(place) / "lib").mkdir()
    (packages(place) / "lib/plot.png").write_text("installed")
    for name in (NPM_LIST, "m/index.png"):
        path = place.workspace / "node_modules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    snapshot = lab.take(place, plain)
    assert snapshot.root != plain.root
    assert (snapshot.file_count, snapshot.total_bytes) == (1, 2)
    assert listed(lab, snapshot) == ["a"]
    assert [path for path, _ in edits.walk(lab.snapshots.read_tree, snapshot.root)] == [("a",)]
    assert asyncio.run(lab.snapshots.artifacts(plain, snapshot, mine("s"))) == {}
    assert file_changes(lab.snapshots, plain, snapshot) == {"added": [], "changed": [], "removed": []}
    # But each file of npm's can be had by its path, as programs can.
    assert asyncio.run(lab.snapshots.find(snapshot, ("node_modules", "m", "index.png"), mine("s")))[0] == "file"


@pytest.mark.parametrize("warm", [False, True])
def test_directories_alone_cost_a_full_session_nothing(tmp_path: Path, warm: bool) -> None:
    """They are no packages, though programs make some there, and so are none of what it holds."""
    lab = Lab(tmp_path, limits=replace(LIMITS, files=40))
    place = lab.place_with_packages()
    for number in range(40 if not warm else 39):
        (place.workspace / f"{number}").touch()
    before = lab.take(place) if warm else EMPTY
    if warm:
        (place.workspace / "39").touch()
    (packages(place) / "etc" / "below").mkdir(parents=True)
    snapshot = lab.take(place, before)
    assert snapshot.file_count == 40
    (packages(place) / "etc" / "file").touch()
    with pytest.raises(SnapshotRefused, match="more than 40"):
        lab.take(place, snapshot)
    (packages(place) / "etc" / "file").unlink()
    for number in range(41):
        (packages(place) / f"{number}").mkdir()
    with pytest.raises(SnapshotRefused, match="more than 40"):
        lab.take(place, snapshot)


def test_modules_that_a_client_has_put_are_files(lab: Lab) -> None:
    paths = [f"node_modules/{name}" for name in (NPM_LIST, "m.js")]
    uploaded = edit(lab, EMPTY, put(lab, *paths))
    assert (listed(lab, uploaded), uploaded.file_count) == (paths, 2)
    place = lab.place_with_packages()
    asyncio.run(lab.snapshots.restore(uploaded, place.sandbox, session_id=mine("s")))
    (place.workspace / "node_modules/n.js").touch()
    after = lab.take(place, uploaded)
    assert (listed(lab, after), after.file_count) == ([*paths, "node_modules/n.js"], 3)
    # Until npm takes it over.
    (place.workspace / "node_modules" / NPM_LIST).write_text("{}")
    after = lab.take(place, after)
    assert (listed(lab, after), after.file_count) == ([], 0)


def test_edits_leave_them(lab: Lab) -> None:
    place = lab.place_with_packages()
    (packages(place) / "installed").touch()
    (place.workspace / "node_modules").mkdir()
    (place.workspace / "node_modules" / NPM_LIST).touch()
    (place.workspace / "old").write_text("old")
    snapshot = lab.take(place)
    assert snapshot.file_count == 1
    more = edit(lab, snapshot, put(lab, "new"))
    assert (listed(lab, more), more.file_count) == (["new", "old"], 2)
    within = edit(lab, more, put(lab, "node_modules/m.js"))
    assert (listed(lab, within), within.file_count) == (["new", "old"], 2)
    replaced = edit(lab, within, put(lab, "only"), replace=True)
    assert (listed(lab, replaced), replaced.file_count, replaced.total_bytes) == (["only"], 1, 0)
    other = lab.place_with_packages()
    asyncio.run(lab.snapshots.restore(replaced, other.sandbox, session_id=mine("s")))
    assert set(described(packages(other))) == {b"installed"}
    assert (other.workspace / "node_modules/m.js").exists()
    # What is in the way can be deleted, and then counts for nothing.
    changes = Changes()
    changes.add(("node_modules",), Remove(recursive=True))
    removed = edit(lab, replaced, changes)
    assert (listed(lab, removed), removed.file_count, removed.total_bytes) == (["only"], 1, 0)
    assert file_changes(lab.snapshots, within, removed)["removed"] == [
        FileChange("new", 0, None),
        FileChange("old", 3, None),
    ]


def test_they_count_for_the_limits(lab: Lab) -> None:
    place = lab.place_with_packages()
    for n in range(20):
        (packages(place) / str(n)).touch()
    small = Lab(lab.directory / "small", limits=place.limits.__class__(1, 1.0, 1, 1 << 20, 10, 1, 1))
    limited = Place(place.workspace, place.id, small.limits, has_packages=True)
    with pytest.raises(Exception, match="more than 10 files"):
        small.take(limited)
    shutil.rmtree(packages(place))
    packages(place).mkdir()
    assert small.take(limited) == EMPTY


def test_the_mode_of_their_own_directory_is_kept(lab: Lab) -> None:
    """Nothing but a look tells of it."""
    place = lab.place_with_packages()
    for number in range(60):
        (place.workspace / f"f{number}").write_text("")
    (packages(place) / "tool").write_text("")
    snapshot = lab.take(place)
    packages(place).chmod(0o700)
    assert lab.take(place, snapshot).root == lab.from_scratch(place).root != snapshot.root
