"""Damaged and hostile capsules: each is refused with a message, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import random
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

from era.core.capsules.imports import check
from era.core.capsules.manifest import MAX_MICROS
from era.core.capsules.trees import Objects, TreeCheck
from era.core.execution.run_messages import MAX_RECORDED_BYTES
from era.core.metadata import Retention
from era.core.models import Session
from era.core.totals import Bounds
from era.core.trees.diffs import FileChange, list_artifacts
from era.core.trees.tree_objects import PACKAGES
from era.errors import BadRequest, TooLarge
from era.network.destinations import Destinations
from era.wire.runs import RunRecordAnswer, record_answer
from tests import capsules
from tests.capsules import directory, document, edited, file, of_files, packed, parts, run, session, tree, version
from tests.core.moving import DESTINATION, EGRESS, Service, portable_fields
from tests.owners import mine
from tests.soaking import soak_the_rest

SMALL = Bounds(entries=20, total_bytes=1 << 20, depth=3)


@contextmanager
def opened(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("capsule")
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


def checked(content: bytes, bounds: Bounds = SMALL) -> Session:
    """The session that a capsule would make. All of the capsule is checked."""
    with opened(content) as fd:
        capsule = check(fd, bounds)
        assert list(capsule.document.versions())
        list(capsule.runs(Retention()))
        return capsule.session


def test_the_smallest_capsule_is_taken() -> None:
    """So those below are refused for what is wrong with each, and for nothing else."""
    made = checked(capsules.capsule())
    assert made.id == "moved"
    assert (made.limits, made.egress, made.isolation) == ({}, {}, "auto"), "an older server wrote it"
    assert made.storage
    assert made.record_code
    root = tree(directory("d", tree(file("f", b"f"))), file("f", b"f"), ("link", "l", "/etc", 1))
    assert checked(of_files(root, tree(file("f", b"f")), b"f")).snapshot.file_count == 3
    installed = tree(file("m.py", b"f"))
    root = tree(directory(PACKAGES, installed), file("f", b"f"))
    assert checked(of_files(root, installed, b"f")).snapshot.file_count == 1
    assert (
        checked(edited(capsules.capsule(), lambda _: document(runs=[run(), run(id="b", artifacts=ARTIFACTS)]))).version
        == 1
    )


def test_what_is_taken_can_be_shown() -> None:
    """Each field of a run's record at the end of what is taken, and its egress as servers have written it."""
    reports: list[Any] = [EGRESS, {"destinations": [], "more": 0, "bytes": 0}, Destinations().report()]
    reports.append({"destinations": [{**DESTINATION, "secrets": ["TOKEN"]}], "more": 0})
    latest = dict.fromkeys(("started_at", "ended_at"), MAX_MICROS)
    runs = [run(id=f"run_{n}", egress=egress, **latest) for n, egress in enumerate(reports)]
    with opened(capsules.capsule(document(runs=runs))) as fd:
        answers = [record_answer(record, "moved") for record, _ in check(fd, SMALL).runs(Retention())]
    assert [answer["egress"]["more"] for answer in answers] == [3, 0, 0, 0]
    assert [RunRecordAnswer.model_validate(answer).ended_at for answer in answers] == ["9999-12-31T23:59:59.000Z"] * 4
    for beyond in (MAX_MICROS + 1, MAX_MICROS + 999_999):
        with pytest.raises(BadRequest, match="'started_at'"):
            checked(capsules.capsule(document(runs=[run(started_at=beyond)])))


def renamed(name: str) -> bytes:
    return of_files(tree(file(name, b"")), b"")


def deep(levels: int) -> bytes:
    trees = [tree()]
    for _ in range(levels):
        trees.append(tree(directory("d", trees[-1])))
    return of_files(trees[-1], *trees[:-1])


def bomb() -> bytes:
    """Few objects that stand for 20 ** 3 directories."""
    trees = [tree()]
    for _ in range(3):
        trees.append(tree(*(directory(f"{n:02}", trees[-1]) for n in range(20))))
    return of_files(trees[-1], *trees[:-1])


def as_bytes(root: bytes) -> bytes:
    return of_files(root, b"")


WITH_PACKAGES = tree(directory(PACKAGES, tree()))
EMPTY_FILE = capsules.digest(b"")
OTHER_THAN_EGRESS: list[Any] = [
    {"destinations": 1, "more": 0},
    {"destinations": ["x"], "more": 0},
    {"destinations": [{"host": "x"}], "more": 0},
    {"destinations": [{**DESTINATION, "extra": 1}], "more": 0},
    {"destinations": [{**DESTINATION, "secrets": "TOKEN"}], "more": 0},
    {"destinations": [{**DESTINATION, "port": "https"}], "more": 0},
    {"destinations": [], "more": None},
    {"destinations": [], "more": 0, "bytes": {}},
    {"destinations": []},
    {"extra": 1},
    [],
]
OTHER_THAN_INVOCATIONS: list[Any] = [
    None,
    [],
    {"extra": 1},
    {"command": None},
    {"command": 1},
    {"command": ["true", 1]},
    {"command": "x" * (MAX_RECORDED_BYTES + 1)},
    {"args": "x"},
    {"args": [None]},
    {"args": ["x" * MAX_RECORDED_BYTES] * 8},
    {"truncated": 1},
]
ARTIFACTS = list_artifacts([FileChange("a.png", None, 1), FileChange("b.txt", None, 1)])
_ARTIFACT = ARTIFACTS["files"][0]
OTHER_THAN_ARTIFACTS: list[Any] = [
    None,
    [],
    {"files": []},
    {**ARTIFACTS, "more": -1},
    {**ARTIFACTS, "more": True},
    {**ARTIFACTS, "files": [_ARTIFACT] * 101},
    *(
        {**ARTIFACTS, "files": [{**_ARTIFACT, **change}]}
        for change in ({"type": "text/x"}, {"path": 1}, {"size": "1"}, {"a": 1})
    ),
]
OTHER_THAN_LANGUAGES: list[Any] = ["cobol", "py", None, ["python"], {}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *[(renamed(name), "file name") for name in ("", ".", "..", "a/b", "/", "\0", "a\0", "x" * 256, "é" * 128)],
        *[(renamed(name), "file name") for name in ("\ud800", "\udfff", "\udcc3\udca9", "a\udcc3\udca9")],
        (renamed(".session_data.json"), "the state's"),
        (renamed(PACKAGES), "file name"),
        (of_files(tree(("link", PACKAGES, "/etc", 1))), "file name"),
        (of_files(tree(directory("d", WITH_PACKAGES)), WITH_PACKAGES, tree()), "file name"),
        (of_files(tree(directory(PACKAGES, WITH_PACKAGES)), WITH_PACKAGES, tree()), "file name"),
        (of_files(tree(file("b", b""), file("a", b"")), b""), "in order"),
        (of_files(tree(file("a", b""), file("a", b"")), b""), "in order"),
        (of_files(tree(file("a", b""), directory("a", tree())), b"", tree()), "in order"),
        (of_files(tree(file("a", b"", mode=0o1644)), b""), "mode"),
        (of_files(tree(file("a", b"", mode=0o4755)), b""), "mode"),
        (of_files(tree(file("a", b"", mode=-1)), b""), "mode"),
        (of_files(tree(directory("a", tree(), mode=0o2755)), tree()), "mode"),
        (of_files(tree(file("a", b"", mtime=(1 << 63) * 10**9)), b""), "a time"),
        (of_files(tree(("link", "a", "b", -(1 << 63) * 10**9 - 1))), "a time"),
        (of_files(tree(("link", "a", "", 1))), "link"),
        (of_files(tree(("link", "a", "b\0c", 1))), "link"),
        (of_files(tree(("link", "a", "x" * 4096, 1))), "link"),
        (of_files(tree(("file", "a", EMPTY_FILE, 1, 0o644, 1)), b""), "not as long"),
        (of_files(tree(("file", "a", EMPTY_FILE, -1, 0o644, 1)), b""), "not as long"),
        (of_files(tree(("file", "a", EMPTY_FILE, 10**18, 0o644, 1)), b""), "not as long"),
        (of_files(tree(("pipe", "a")), b""), "listed"),
        (of_files(tree(("file", "a", EMPTY_FILE, 0, 0o644)), b""), "listed"),
        (of_files(tree(("file", "a", EMPTY_FILE, 0.0, 0o644, 1)), b""), "listed"),
        (of_files(tree(("file", "a", EMPTY_FILE, True, 0o644, 1)), b""), "listed"),
        (of_files(tree(("file", "a", "../../etc/passwd", 0, 0o644, 1)), b""), "listed"),
        (of_files(tree(("dir", "a", EMPTY_FILE, 0o755)), b""), "listed"),
        *[(as_bytes(root), "lis") for root in (b"", b"{}", b"null", b"[", b"[[", b"[],", b"[ ]", b"[[]]", b"\xff")],
        (as_bytes(tree(file("a", b"")) + b" "), "after its list"),
        (as_bytes(tree(file("a", b"")).replace(b",", b", ", 1)), "listed"),
        (as_bytes(tree(file("a", b"")).replace(b'"a"', b'"\\u0061"')), "written"),
        (as_bytes(tree(file("/", b"")).replace(b'"/"', b'"\\/"')), "listed"),
        (as_bytes(tree(file("a", b""))[:-1] + b","), "listed"),
        (as_bytes(b"[" * 100_000), "listed"),
        (deep(4), "nested deeper than 3"),
        (bomb(), "more than 20 files"),
        (of_files(tree(*(file(f"{n:02}", b"") for n in range(21))), b""), "more than 20 files"),
        (of_files(tree(*(file(f"{n:02}", bytes(60_000)) for n in range(18))), bytes(60_000)), "bytes of files"),
        (of_files(tree(file("a", b""))), "lacks object"),
        (of_files(tree(directory("a", tree()))), "lacks object"),
        (capsules.capsule(None, b"x"), "nothing in it needs"),
    ],
    ids=map(str, count()),
)
def test_hostile_trees(content: bytes, words: str) -> None:
    with pytest.raises((BadRequest, TooLarge), match=words):
        checked(content)


def test_a_tree_of_many_versions_is_read_once() -> None:
    """Short lines may each name the same tree, and that may be as large as one can be."""
    root, read = tree(("link", "l", "/etc", 1)), list[str]()

    def reading(digest: str) -> bytes:
        read.append(digest)
        return root

    trees = TreeCheck(Objects(reading, lambda _: len(root)), SMALL)
    first = trees.snapshot(capsules.digest(root))
    assert read.count(first.root or "") == len(read) > 0
    read.clear()
    assert trees.snapshot(capsules.digest(root)) == first
    assert read == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (document(format=2), "format 2"),
        (document(format=999_999_999), "reads format 1"),
        (document(format="1"), "format number"),
        (b"", "format number"),
        (b"{}", "format number"),
        (b"\0" * 1000, "format number"),
        (document(extra=1), "'extra'"),
        (document(session(extra=1)), "'extra'"),
        (document(session(env={"A": "b"})), "'env'"),
        (document({"id": "x"}), "without"),
        (document(session=[]), "'session'"),
        *[(document(session(id=bad)), "'id'") for bad in ("", "a/b", "..", "a b", "x" * 129, "a\n", None, 7)],
        *[(document(session(language=bad)), "'language'") for bad in OTHER_THAN_LANGUAGES],
        *[
            (document(session(default_timeout=bad)), "'default_timeout'")
            for bad in (0, -1, True, "1", None, 10**400, 1e10)
        ],
        (document(session(default_timeout=float("nan"))), "NaN"),
        *[(document(session(ttl=bad)), "'ttl'") for bad in (0, -1, 1.5, True, 10**18)],
        *[(document(session(created_at=bad)), "'created_at'") for bad in (-1, 1.0, None, 10**18, True)],
        (document(session(persistent=1)), "'persistent'"),
        (document(session(metadata=[])), "'metadata'"),
        (document(session(metadata={"a": "x" * (1 << 20)})), "'metadata'"),
        (document(session(code="print()")), "'code'"),
        (document(session(code={"code": 1, "description": None, "updated_at": 1})), "'code'"),
        (document(session(code={"code": "x" * (5 << 20), "description": None, "updated_at": 1})), "'code'"),
        (document(session(version=2)), "current version"),
        (document(versions=[]), "current version"),
        (document(session(version=1 << 60), [version(version=1 << 60)]), "'version'"),
        (document(session(version=1), [version(version=2), version()]), "follow one another"),
        (document(session(version=1), [version(), version()]), "follow one another"),
        (document(versions=[version(cause="magic")]), "'cause'"),
        (document(versions=[version(snapshot="../../x")]), "'snapshot'"),
        (document(versions=[version(snapshot="A" * 64)]), "'snapshot'"),
        (document(versions=[version(run_id="a/b")]), "'run_id'"),
        (document(versions=[version(data=[])]), "'data'"),
        (document(versions=[version(data={"a": "x" * (1 << 20)})]), "'data'"),
        (document(versions=[json.dumps(version()).replace("{}", '{"a":' * 65 + "1" + "}" * 65)]), "nested deeper"),
        (document(versions=[json.dumps(version()).replace("{}", "[" * 100_000)]), "nested deeper|not JSON"),
        (document(versions=[json.dumps(version()).replace("{}", '{"a":1e999}')]), "out of range"),
        (document(versions=[json.dumps(version()).replace("{}", '{"a":NaN}')]), "NaN"),
        (document(versions=[json.dumps(version()).replace("{}", '{"a":"\\ud800"}')]), "surrogate"),
        (document(versions=[json.dumps(version()).replace("{}", '{"a":' + "9" * 5000 + "}")]), "digits"),
        (document(versions=[[]]), "no object"),
        (document(versions=["what"]), "not JSON"),
        (document(runs=[run(status="running")]), "'status'"),
        (document(runs=[run(status="fine")]), "'status'"),
        (document(runs=[run(exit_code=1 << 31)]), "'exit_code'"),
        (document(runs=[run(duration_us=-1)]), "'duration_us'"),
        (document(runs=[run(stdout_bytes=1.5)]), "'stdout_bytes'"),
        (document(runs=[run(reason=["x"])]), "'reason'"),
        (document(runs=[run(started_at=10**19)]), "'started_at'"),
        (document(runs=[run(enforced=[])]), "'enforced'"),
        (document(runs=[run(enforced={"a": "x" * 70_000})]), "'enforced'"),
        (document(runs=[json.dumps(run()).replace("{}", '{"a":' * 70 + "1" + "}" * 70)]), "nested deeper"),
        *[(document(runs=[run(egress=bad)]), "'egress'") for bad in OTHER_THAN_EGRESS],
        *[(document(runs=[run(artifacts=bad)]), "'artifacts'") for bad in OTHER_THAN_ARTIFACTS],
        *[(document(runs=[run(code=bad)]), "'code'") for bad in (1, ["x"], "x" * (MAX_RECORDED_BYTES + 1))],
        *[(document(runs=[run(invocation=bad)]), "'invocation'") for bad in OTHER_THAN_INVOCATIONS],
        *[(document(session(record_code=bad)), "'record_code'") for bad in (None, 1, "false")],
        (document(runs=[run(id="a b")]), "'id'"),
        (document(runs=[run(stdout=EMPTY_FILE)]), "one output"),
        (document(runs=[run(stdout=EMPTY_FILE, stderr=EMPTY_FILE)]), "lacks object"),
        (document(runs=[run(key=1)]), "'key'"),
        (document().replace(b"\n", b" "), "first line|ends in the middle"),
        (document().replace(b"],\n", b"]\n,"), "line by line|no object|not JSON"),
        (document() + b"{}\n", "after its end"),
        (document()[:-1], "ends in the middle"),
        (document()[:-4], "line"),
        (document(session(version=2), [version(), version(version=2)]).replace(b"},\n{", b"}\n{"), "line by line"),
        (document(versions=[json.dumps(version()) + ","]), "line by line|not JSON|empty"),
        (b'{"format":1,' + b" " * (25 << 20) + b"\n", "too long"),
    ],
    ids=map(str, count()),
)
def test_hostile_documents(text: bytes, words: str) -> None:
    with pytest.raises((BadRequest, TooLarge), match=words):
        checked(capsules.capsule(text))


def changed(**fields: Any) -> bytes:
    """An archive with a different header on each file."""

    def change(member: tarfile.TarInfo) -> None:
        for name, value in fields.items():
            setattr(member, name, value)

    return packed(parts(GOOD), change)


GOOD = of_files(tree(file("a", b"a"), file("b", b"")), b"a", b"")


def resummed(header: bytes) -> bytes:
    """A header with the right checksum."""
    blanked = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blanked) + header[156:]


def with_size(field: bytes) -> bytes:
    """An archive whose first file claims to be of another size."""
    return resummed(GOOD[:124] + field.ljust(12, b"\0") + GOOD[136:512]) + GOOD[512:]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut off"),
        (b"x" * 600, "not a tar"),
        (b"\0" * 1024, "nothing where capsule.json"),
        (b"PK\3\4" + bytes(1000), "not a tar"),
        *[(GOOD[:size], "no end|ends in|cut off") for size in (1, 511, 512, 600, 1024, 3000, 5120)],
        (packed(parts(GOOD))[: len(GOOD.rstrip(b"\0")) + 512], "no end|cut off|ends in"),
        (GOOD + b"more", "after its end"),
        (GOOD + GOOD, "after its end"),
        (changed(name="capsule.json"), "README.txt belongs"),
        *[(changed(type=kind), "plain file") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE)],
        *[(changed(type=kind), "plain file") for kind in (tarfile.FIFOTYPE, tarfile.BLKTYPE, tarfile.CHRTYPE)],
        (changed(type=b"x"), "plain file"),
        (changed(type=b"L"), "plain file"),
        (changed(type=b"S"), "plain file"),
        (changed(linkname="/etc/passwd"), "plain file"),
        (packed(parts(GOOD)[1:]), "capsule.json belongs"),
        (packed(parts(GOOD)[:1]), "README.txt belongs"),
        (packed([parts(GOOD)[0], *parts(GOOD)[2:]]), "README.txt belongs"),
        (packed([*parts(GOOD)[:2], *parts(GOOD)[3:]]), "SHA256SUMS belongs"),
        (packed([*parts(GOOD)[3:], *parts(GOOD)[:3]]), "capsule.json belongs"),
        (packed([*parts(GOOD)[:3], *reversed(parts(GOOD)[3:])]), "out of order"),
        (packed([*parts(GOOD), parts(GOOD)[-1]]), "one twice"),
        (packed([*parts(GOOD), ("README.txt", b"")]), "no capsule has"),
        *[
            (packed([*parts(GOOD), (name, b"")]), "no capsule has|plain file")
            for name in ("../x", "/etc/passwd", "objects/", "objects/../../x", "objects/" + "A" * 64, "zzz", "")
        ],
        (packed([*parts(GOOD), ("objects/" + "f" * 63, b"")]), "no capsule has"),
        (packed([*parts(GOOD), ("objects/" + "f" * 64, b"")]), "nothing in it needs"),
        (packed([*parts(GOOD), ("x" * 90 + "/" + "y" * 90, b"")]), "plain file"),
        (packed(parts(GOOD)[:-1]), "lacks object"),
        (packed([("capsule.json", document()), *parts(GOOD)[1:]]), "damaged, or was edited"),
        (packed([parts(GOOD)[0], ("README.txt", b"x"), *parts(GOOD)[2:]]), "damaged, or was edited"),
        (with_size(b"77777777777"), "ends in the middle"),
        (with_size(b"\x80" + b"\xff" * 11), "isn't a number"),
        (with_size(b"-0000000001"), "isn't a number"),
        (with_size(b""), "isn't a number"),
        (with_size(b"00000000000"), "format number"),
    ],
    ids=map(str, count()),
)
def test_hostile_archives(content: bytes, words: str) -> None:
    with pytest.raises((BadRequest, TooLarge), match=words):
        checked(content)


async def test_swapped_objects_are_found(service: Service) -> None:
    """Two objects of the same length, each under the other's digest."""
    content = of_files(tree(file("a", b"1"), file("b", b"2")), b"1", b"2")
    swapped = [(name, {b"1": b"2", b"2": b"1"}.get(inside, inside)) for name, inside in parts(content)]
    with pytest.raises(BadRequest, match="other content"):
        await service.load(packed(swapped))
    assert service.stored() == set()


@pytest.mark.slow
@pytest.mark.parametrize("times", soak_the_rest([300, 1500], 1))
async def test_damage_anywhere(service: Service, times: int) -> None:
    """Bytes are flipped, cut out, doubled or moved: the capsule is refused, or makes the very session."""
    await service.make("s")
    content = await service.export("s")
    whole = checked(content, Bounds())
    kept = service.stored()
    taken = 0
    chance = random.Random(7)
    for number in range(times):
        bad = damaged(content, chance, number)
        try:
            made = await service.load(bad, f"n{number}")
        except (BadRequest, TooLarge):
            continue
        taken += 1
        assert portable_fields(made) == portable_fields(whole)
        await service.store.purge_session(mine(f"n{number}"))
    assert taken < times / 10
    assert await service.collect() == 0
    assert service.stored() == kept
    assert (await service.store.counts())["sessions"] == 1


def damaged(content: bytes, chance: random.Random, number: int) -> bytes:
    """The archive with one of several kinds of damage."""
    bad = bytearray(content)
    at = chance.randrange(len(bad))
    size = chance.choice([1, 10, 512, 4096])
    match number % 6:
        case 0 | 1:
            bad[at] ^= 1 << chance.randrange(8)
        case 2:
            # Most of the archive is one long output; damage what is before it, too.
            at = chance.randrange(8000)
            bad[at] = chance.randrange(256)
        case 3:
            del bad[at : at + size]
        case 4:
            bad[at:at] = bad[at : at + size]
        case 5:
            other = chance.randrange(len(bad))
            bad[at : at + size], bad[other : other + size] = bad[other : other + size], bad[at : at + size]
    return bytes(bad)


def test_a_flipped_bit_in_any_byte_is_found() -> None:
    """In the small capsule, for all bytes before the end."""
    end = len(GOOD.rstrip(b"\0")) + 100
    unnoticed = [at for at in range(end) if flipped_is_taken(at)]
    assert unnoticed == []


def flipped_is_taken(at: int) -> bool:
    bad = bytearray(GOOD)
    bad[at] ^= 1
    try:
        with opened(bytes(bad)) as fd:
            capsule = check(fd, SMALL)
            return all(
                capsules.digest(os.pread(fd, entry.size, entry.offset)) == digest
                for digest, entry in capsule.objects.items()
            )
    except (BadRequest, TooLarge):
        return False


@pytest.mark.parametrize("which", ["deep", "long", "odd"])
async def test_what_is_just_within_the_bounds(which: str, service: Service) -> None:
    """It is imported, and its files can be restored."""
    made = await service.load({"deep": deep(128), "long": renamed("x" * 255), "odd": renamed("\udcff")}[which])
    found = await service.restored(made.snapshot)
    assert len(found) == (128 if which == "deep" else 1)
    assert all(stat.S_IMODE(each[1]) == each[1] for each in found.values() if each[0] == "dir")
