"""Edits of snapshots, compared with a model (a dictionary) and with the directories that they are restored to."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from era.core.models import EMPTY, Snapshot
from era.core.totals import Bounds
from era.core.trees import paths
from era.core.trees.blob_store import BlobBatch
from era.core.trees.edits import Changes, PutFile, PutLink, Remove
from era.core.trees.tree_objects import name_bytes
from era.errors import BadRequest, Conflict, EraError, NotFound, TooLarge
from tests.core.lab import SETTLE, Lab, described, file_changes
from tests.owners import mine

NAMES = st.sampled_from(["a", "b", "c.txt", "a.b", "a-b", "é", "😀", "\udcff", "\ud7ff", "Z", "-"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), PATHS, st.binary(max_size=20), st.sampled_from([None, 0o600, 0o755, 0])),
        st.tuples(st.just("link"), PATHS, st.sampled_from(["a", "../b", "/etc/passwd"])),
        st.tuples(st.just("dir"), PATHS, st.sampled_from([0o700, 0o755, 0])),
        st.tuples(st.just("remove"), PATHS, st.booleans()),
    ),
    max_size=12,
)
EVERYTHING = Bounds()
MTIME = 1_700_000_000_123_456_789

type Model = dict[paths.Parts, tuple[Any, ...]]
"""The entries of a directory by path, in the form of `described`."""


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def edited(lab: Lab, snapshot: Snapshot, *edits: tuple[Any, ...], bounds: Bounds = EVERYTHING) -> Snapshot:
    """The snapshot after these edits, applied together."""
    changes, contents = Changes(), []
    for kind, path, *rest in edits:
        match kind, rest:
            case "put", (content, mode):
                contents.append(content)
                changes.add(path, PutFile(digest_of(content), len(content), MTIME, mode))
            case "link", (target,):
                changes.add(path, PutLink(target, MTIME))
            case "dir", (mode,):
                changes.add_directory(path, mode)
            case "remove", (recursive,):
                changes.add(path, Remove(recursive))

    def put(batch: BlobBatch) -> None:
        for content in contents:
            batch.put(content)

    return asyncio.run(lab.snapshots.edit(snapshot, changes, put, bounds, mine("s")))


def model_edit(model: Model, kind: str, path: paths.Parts, *rest: Any) -> Model:
    """The model after an edit. Raises the error that the edit must raise."""
    new = dict(model)
    for depth in range(1, len(path)):
        was = new.setdefault(path[:depth], ("dir", 0o755))
        if was[0] != "dir":
            raise Conflict("")
    old = new.get(path)
    if kind == "remove":
        if old is None:
            raise NotFound("")
        if old[0] == "dir" and not rest[0]:
            raise Conflict("")
        return {each: value for each, value in model.items() if each[: len(path)] != path}
    if old is not None and old[0] != {"put": "file", "link": "link", "dir": "dir"}[kind]:
        raise Conflict("")
    match kind, rest:
        case "put", (content, mode):
            new[path] = ("file", content, mode if mode is not None else old[2] if old else 0o644, MTIME)
        case "link", (target,):
            new[path] = ("link", target.encode(), MTIME)
        case "dir", (mode,):
            new[path] = ("dir", mode)
    return new


def on_disk(model: Model) -> dict[bytes, tuple[Any, ...]]:
    return {b"/".join(map(name_bytes, path)): value for path, value in model.items()}


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EDITS)
def test_random_edits_do_what_the_model_does(edits: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        model: Model = {}
        snapshot = EMPTY
        warm = lab.place()
        asyncio.run(lab.snapshots.restore(EMPTY, warm.sandbox, session_id=mine("s")))
        for edit in edits:
            try:
                expected: Model | type[EraError] = model_edit(model, *edit)
            except EraError as error:
                expected = type(error)
            if isinstance(expected, type):
                with pytest.raises(expected):
                    edited(lab, snapshot, edit)
                continue
            model, snapshot = expected, edited(lab, snapshot, edit)
            files = [value for value in model.values() if value[0] != "dir"]
            assert snapshot.file_count == len(files)
            assert snapshot.total_bytes == sum(len(value[1]) for value in files)
        restored = lab.restore(snapshot)
        # Before `described`, which must chmod some files where the tests aren't root's.
        assert lab.take(restored, snapshot) == snapshot
        assert described(restored.workspace) == on_disk(model)
        asyncio.run(lab.snapshots.restore(snapshot, warm.sandbox, session_id=mine("s")))
        assert described(warm.workspace) == on_disk(model), "a warm sandbox catches up"
        taken = lab.from_scratch(restored)
        assert (taken.file_count, taken.total_bytes) == (snapshot.file_count, snapshot.total_bytes)
        assert not any(file_changes(lab.snapshots, taken, snapshot).values()), (
            "except for the marks of uploads it is what a run would have left"
        )
        listed = asyncio.run(lab.snapshots.entries(snapshot, mine("s")))
        assert [each.path for each in listed] == [
            "/".join(path)
            for path, value in sorted(model.items(), key=lambda item: tuple(map(name_bytes, item[0])))
            if value[0] != "dir"
        ]


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.lists(PATHS, max_size=25), PATHS, PATHS, st.integers(1, 4))
def test_pages_are_the_whole_list_cut(
    all_paths: list[paths.Parts], after: paths.Parts, prefix: paths.Parts, limit: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        snapshot = EMPTY
        for path in all_paths:
            try:
                snapshot = edited(lab, snapshot, ("put", path, b"", None))
            except Conflict:
                continue

        def listed(**which: Any) -> list[str]:
            return [each.path for each in asyncio.run(lab.snapshots.entries(snapshot, mine("s"), **which))]

        whole = listed()
        seen: list[str] = []
        while found := listed(after=tuple(seen[-1].split("/")) if seen else (), limit=limit):
            seen += found
        assert seen == whole

        def key(path: str) -> tuple[bytes, ...]:
            return tuple(map(name_bytes, path.split("/")))

        assert listed(after=after) == [path for path in whole if key(path) > key("/".join(after))]
        assert listed(prefix=prefix) == [path for path in whole if path.startswith("/".join(prefix))]
        assert listed(prefix=(*prefix, "")) == [path for path in whole if path.startswith("/".join(prefix) + "/")]


def test_what_is_beside_the_change_is_neither_read_nor_written(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    before = edited(
        lab,
        EMPTY,
        ("put", ("a", "deep", "x"), b"1", None),
        ("put", ("b", "y"), b"2", None),
        ("put", ("z",), b"3", None),
    )
    old = {entry[1]: entry for entry in lab.snapshots.read_tree(before.root or "")}
    read: list[str] = []
    get = lab.blobs.get

    def noting(digest: str) -> bytes:
        read.append(digest)
        return get(digest)

    monkeypatch.setattr(lab.blobs, "get", noting)
    after = edited(lab, before, ("put", ("b", "y"), b"22", None))
    assert read == [before.root, old["b"][2]]
    new = {entry[1]: entry for entry in lab.snapshots.read_tree(after.root or "")}
    assert (new["a"], new["z"]) == (old["a"], old["z"])
    assert new["b"][2] != old["b"][2]
    assert edited(lab, after, ("put", ("b", "y"), b"2", None)) == before


def test_nothing_left_is_the_empty_snapshot(lab: Lab) -> None:
    one = edited(lab, EMPTY, ("put", ("a",), b"1", None))
    assert edited(lab, one, ("remove", ("a",), False)) == EMPTY
    assert edited(lab, EMPTY) == EMPTY


def test_an_emptied_directory_stays(lab: Lab) -> None:
    one = edited(lab, EMPTY, ("put", ("d", "a"), b"1", None))
    left = edited(lab, one, ("remove", ("d", "a"), False))
    assert described(lab.restore(left).workspace) == {b"d": ("dir", 0o755)}


def test_bounds_hold_for_edits(tmp_path: Path) -> None:
    lab, few = Lab(tmp_path), Bounds(entries=4, total_bytes=10, depth=3)
    full = edited(lab, EMPTY, ("put", ("d", "a"), b"12345", None), ("put", ("b",), b"12345", None), bounds=few)
    with pytest.raises(TooLarge, match="10"):
        edited(lab, full, ("put", ("c",), b"1", None), bounds=few)
    assert edited(lab, full, ("put", ("b",), b"54321", None), bounds=few).total_bytes == 10
    with pytest.raises(TooLarge, match="4"):
        edited(lab, full, ("put", ("e", "f"), b"", None), bounds=few)
    edited(lab, full, ("put", ("c",), b"", None), bounds=few)
    with pytest.raises(TooLarge):
        edited(lab, full, ("dir", ("x", "y"), 0o755), bounds=few)
    forgetful, few = Lab(tmp_path), Bounds(entries=4)
    with pytest.raises(TooLarge):
        edited(forgetful, full, ("put", ("e", "f"), b"", None), bounds=few)
    assert edited(forgetful, full, ("remove", ("d",), True), bounds=few).file_count == 1


def test_changes_that_contradict_each_other(lab: Lab) -> None:
    for first, second in [
        (("put", ("a",), b"", None), ("put", ("a",), b"", None)),
        (("put", ("a",), b"", None), ("put", ("a", "b"), b"", None)),
        (("put", ("a", "b"), b"", None), ("put", ("a",), b"", None)),
        (("dir", ("a",), 0o755), ("dir", ("a",), 0o755)),
        (("link", ("a",), "b"), ("dir", ("a",), 0o755)),
    ]:
        with pytest.raises(BadRequest, match="twice"):
            edited(lab, EMPTY, first, second)
    both = edited(lab, EMPTY, ("put", ("a", "b"), b"", None), ("dir", ("a",), 0o700))
    assert both.file_count == 1


def test_a_file_that_a_run_writes_is_no_longer_an_upload(lab: Lab) -> None:
    snapshot = edited(lab, EMPTY, *(("put", (name,), b"old", None) for name in ("kept", "changed", "rewritten")))
    place = lab.restore(snapshot)
    time.sleep(SETTLE)
    (place.workspace / "changed").write_bytes(b"new")
    (place.workspace / "rewritten").write_bytes(b"old")
    (place.workspace / "made").write_bytes(b"new")
    after = lab.take(place, snapshot)
    listed = {each.path: each.uploaded for each in asyncio.run(lab.snapshots.entries(after, mine("s")))}
    assert listed == {"kept": True, "changed": False, "rewritten": False, "made": False}
    assert edited(lab, after, ("remove", ("made",), False)).file_count == 3


def test_tree_objects_without_marks_of_uploads_are_read(lab: Lab) -> None:
    """Entries without the mark are what runs write. All were like that before clients could put files."""
    place = lab.place()
    (place.workspace / "a").write_bytes(b"1")
    snapshot = lab.take(place)
    assert [len(entry) for entry in lab.snapshots.read_tree(snapshot.root or "")] == [6]
    after = edited(lab, snapshot, ("put", ("b",), b"2", None))
    assert [len(entry) for entry in lab.snapshots.read_tree(after.root or "")] == [6, 7]


@pytest.mark.parametrize(
    "escaped",
    ["", "/", "/etc/passwd", "a//b", "a/", ".", "..", "a/../b", "a/./b", "%2e%2e%2fa", "%2E", "a%00", "a%5cb", "a\\b",
     "%ff", "%C0%AF", "%ed%a0%80", "a%", "a%2", "a%zz", "%252e%252e%252fa", "%25252e%25252e", "a%255cb", "a%2500",
     "x%252fy", "a" * 256, "/".join(["a"] * 513), ".session_data.json", "%2esession_data.json"],
)  # fmt: skip
def test_invalid_paths(escaped: str) -> None:
    with pytest.raises(BadRequest):
        paths.from_url(escaped.encode())


@pytest.mark.parametrize(
    ("escaped", "parts"),
    [("a", ("a",)), ("a/b%20c", ("a", "b c")), ("a%2Fb", ("a", "b")), ("%C3%A9", ("é",)), ("100%25", ("100%",)),
     ("...", ("...",)), ("a%0Ab", ("a\nb",)), ("d/.session_data.json", ("d", ".session_data.json")),
     ("%253Cb", ("%3Cb",)), ("a" * 255, ("a" * 255,))],
)  # fmt: skip
def test_valid_paths(escaped: str, parts: paths.Parts) -> None:
    assert paths.from_url(escaped.encode()) == parts
