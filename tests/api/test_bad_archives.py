"""Archives that are damaged, lead out of their session, or are bombs."""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from era.core.files import archives
from era.core.models import EMPTY
from era.core.totals import Bounds
from era.core.trees import pack, unpack
from era.core.trees.spool import Slots, Spool
from era.errors import BadRequest, EraError, TooLarge
from tests.api.answers import refused
from tests.api.archives_api import FORMS, MTIME, SYM, member, send, tar, zipped
from tests.api.files_api import get, names, put
from tests.conftest import MakeSession, Server
from tests.core.lab import Lab, described
from tests.owners import mine
from tests.soaking import soak_the_rest
from tests.table import table

BLOCK = tar(member("a", b"content"))[:1024]
LIES = tarfile.TarInfo("a")
LIES.size = 1 << 20


def corrupt_pax(records: bytes) -> bytes:
    """A tar archive that begins with a pax header of these records."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512) + BLOCK + bytes(1024)


def huge_header(kind: bytes) -> bytes:
    """A tar archive that begins with a header of this kind that claims 4 GiB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 1 << 32
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)


def tampered(archive: bytes, at: int, by: bytes) -> bytes:
    """`archive` with `by` written over its bytes at `at`."""
    return archive[:at] + by + archive[at + len(by) :]


def encrypted() -> bytes:
    """A zip archive whose directory says that it is encrypted."""
    archive = zipped(("a", b"x" * 100, 0o100644))
    directory = archive.index(b"PK\1\2")
    return tampered(archive, directory + 8, b"\1")


BAD: dict[str, tuple[bytes, str]] = {
    "dot-dot": (tar(member("../a", b"1")), "'..'"),
    "dot-dot inside": (tar(member("a/../../b", b"1")), "'..'"),
    "absolute": (tar(member("/etc/passwd", b"1")), "absolute"),
    "empty part": (tar(member("a//b", b"1")), "empty part"),
    "dot": (tar(member("a/./b", b"1")), "'.'"),
    "state file": (tar(member("./.session_data.json", b"{}")), "data"),
    "below the state file": (tar(member(".session_data.json/a", b"1")), "data"),
    "long name": (tar(member("a" * 256, b"1")), "255"),
    "link up": (tar(member("l", linkname="../x", **SYM)), "leads out"),
    "link up from below": (tar(member("d/l", linkname="../../x", **SYM)), "leads out"),
    "link to the host": (tar(member("l", linkname="/etc/passwd", **SYM)), "leads out"),
    "link through a link": (tar(member("l", linkname=".", **SYM), member("m", linkname="l/..", **SYM)), "leads out"),
    "link to nothing": (tar(member("l", linkname="", **SYM)), "leads out"),
    "through a link": (tar(member("l", linkname="d", **SYM), member("l/f", b"1")), "twice"),
    "hard link": (tar(member("a", b"1"), member("b", type=tarfile.LNKTYPE, linkname="a")), "hard link"),
    "device": (tar(member("null", type=tarfile.CHRTYPE)), "device"),
    "block device": (tar(member("sda", type=tarfile.BLKTYPE)), "device"),
    "pipe": (tar(member("p", type=tarfile.FIFOTYPE)), "pipe"),
    "unknown": (tar(member("p", type=b"Z")), "not known"),
    "twice": (tar(member("a", b"1"), member("a", b"2")), "twice"),
    "directory twice": (tar(member("a", type=tarfile.DIRTYPE), member("a/", type=tarfile.DIRTYPE)), "twice"),
    "file and directory": (tar(member("a", b"1"), member("a/b", b"2")), "twice"),
    "no end": (BLOCK, "cut off"),
    "in a header": (BLOCK + BLOCK[:100], "cut off"),
    "in content": (tar(member("a", b"x" * 5000))[:3000], "cut off"),
    "size lies": (LIES.tobuf() + bytes(1024), "cut off"),
    "bad checksum": (BLOCK + tampered(BLOCK, 0, b"b") + bytes(1024), "damaged"),
    "pax without length": (corrupt_pax(b"path=x\n"), "damaged"),
    "pax too long": (corrupt_pax(b"99 path=x\n"), "damaged"),
    "pax zero": (corrupt_pax(b"0 path=x\n"), "damaged"),
    "pax bad size": (corrupt_pax(b"11 size=-1\n"), "damaged"),
    "pax endless size": (corrupt_pax(b"28 size=99999999999999999999\n"), "damaged"),
    "pax bad time": (corrupt_pax(b"15 mtime=1e999\n"), "damaged"),
    "pax NUL": (corrupt_pax(b"12 path=a\0b\n"), "NUL"),
    "pax sparse": (corrupt_pax(b"22 GNU.sparse.major=1\n"), "sparse"),
    "pax huge": (huge_header(tarfile.XHDTYPE), "1 MiB"),
    "long name huge": (huge_header(tarfile.GNUTYPE_LONGNAME), "1 MiB"),
    "gzip cut off": (gzip.compress(tar(member("a", os.urandom(5000))))[:-100], "cut off"),
    "gzip without its end": (gzip.compress(tar(member("a", b"1")))[:-8], "cut off"),
    "gzip checksum": (tampered(gzip.compress(tar(member("a", b"1"))), -8, b"\0\0\0\0")[:-4], "damaged"),
    "gzip of nothing": (gzip.compress(b""), "cut off"),
    "gzip of text": (gzip.compress(b"hello" * 1000), "damaged"),
    "gzip with a long tail": (gzip.compress(tar(member("a", b"1")) + bytes(2 << 20)), "goes on"),
    "zip dot-dot": (zipped(("../a", b"1", 0o100644)), "'..'"),
    "zip absolute": (zipped(("/a", b"1", 0o100644)), "absolute"),
    "zip backslash": (zipped(("a\\b", b"1", 0o100644)), "backslash"),
    "zip link out": (zipped(("l", b"../x", 0o120777)), "leads out"),
    "zip device": (zipped(("p", b"", 0o020666)), "no plain file"),
    "zip encrypted": (encrypted(), "encrypted"),
    "zip bzip2": (zipped(("a", b"x" * 1000, 0o100644), method=zipfile.ZIP_BZIP2), "deflate"),
    "zip cut off": (zipped(("a", b"x" * 1000, 0o100644))[:-30], "cut off"),
    "zip of nothing but a start": (b"PK\3\4" + bytes(100), "cut off"),
    "nothing": (b"", "no tar"),
    "text": (b"hello " * 1000, "no tar"),
    "one byte": (b"\0", "no tar"),
}  # fmt: skip


@table("which", BAD)
def test_bad_archives_change_nothing(client: httpx.Client, session: MakeSession, server: Server, which: str) -> None:
    archive, word = BAD[which]
    where = session()
    put(client, where, "a", b"old")
    for query in ("", "?replace=true"):
        body = refused(send(client, where, archive, query), 400, word)
        assert body["code"] in ("bad_archive", "bad_path")
    assert names(client, where) == ["a"]
    assert get(client, where, "a").content == b"old"
    assert client.get(f"/api/sessions/{where}").json()["version"] == 2
    assert os.listdir(server.data_dir / "uploads") == []
    incoming = os.listdir(server.content_dir / "blobs" / "incoming")
    assert [name for name in incoming if name != "lock"] == []  # which hosts of a cluster have


def unpacked(directory: Path, archive: bytes, **bounds: int) -> archives.Unpacked:
    """Unpack an archive without HTTP."""
    lab = Lab(directory)
    spool = Spool(directory / "uploads", Slots(1))
    spool.open()
    (directory / "archive").write_bytes(archive)
    with (directory / "archive").open("rb") as file, lab.blobs.batch() as batch:
        members = archives._members(file.fileno(), None, Bounds(**bounds))
        return archives._Unpacker(Bounds(**bounds), spool, batch).unpack(members)


def endless(info: tarfile.TarInfo, size: int) -> bytes:
    """A gzip file that expands to a header and `size` zeros, for the price of a few kilobytes."""
    packer = zlib.compressobj(9, wbits=31)
    packed = [packer.compress(info.tobuf(tarfile.GNU_FORMAT))]
    packed += [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*packed, packer.flush()])


def numbered_files(count: int) -> bytes:
    """A tar archive of so many empty files, whose headers differ in name and checksum only: 20 times as fast as
    tarfile makes it."""
    blank = bytearray(tarfile.TarInfo("000000").tobuf(tarfile.USTAR_FORMAT))
    blank[148:156] = b" " * 8  # so it is summed up
    until, after, least = bytes(blank[6:148]), bytes(blank[156:]), sum(blank) - sum(b"000000")
    names = (b"%06d" % number for number in range(count))
    headers = [b"%b%b%06o\0 %b" % (name, until, least + sum(name), after) for name in names]
    return b"".join([*headers, bytes(1024)])


def many_times(content: bytes, times: int) -> bytes:
    """A zip archive whose directory names the same content so many times, as that of empty files."""
    deep = zlib.compressobj(9, wbits=-15)
    blocks = b"".join([b"\0\0\0\xff\xff" * (len(content) // 5), deep.compress(b""), deep.flush()])
    one = bytearray(zipped(("000000", b"", 0o100644), method=zipfile.ZIP_DEFLATED))
    directory = one.index(b"PK\1\2")
    local, record = one[: one.index(b"000000") + 6], one[directory : one.index(b"PK\5\6")]
    struct.pack_into("<LLL", record, 16, 0, len(blocks), 0)  # checksum and sizes
    records = b"".join(bytes(record).replace(b"000000", b"%06d" % number) for number in range(times))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, times, times, len(records), len(local) + len(blocks), 0)
    return bytes(local) + blocks + records + end


def deep_files(count: int) -> bytes:
    """A tar archive of so many files, each in 100 directories of its own that no member names."""
    return tar(*(member(f"{number}/{'d/' * 99}f") for number in range(count)))


def long_links(count: int) -> bytes:
    return tar(*(member(f"l{n}", linkname="x" * (1 << 19), **SYM) for n in range(count)), form=tarfile.GNU_FORMAT)


def commented(count: int) -> bytes:
    """A tar archive of so many empty files, each with a comment of nearly 1 MiB."""
    record = b"1000000 comment=" + b"x" * (1_000_000 - 17) + b"\n"
    header = tarfile.TarInfo("h")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    piece = header.tobuf() + record + bytes(-len(record) % 512)
    return b"".join(piece + tar(member(f"f{number}"))[:512] for number in range(count)) + bytes(1024)


BOMBS = [
    "one file", "many files", "zip", "zip entries", "zip lies", "headers", "directories", "zip overlaps", "links",
    "gzip members", "comments",
]  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_archive_bombs_are_refused_before_they_expand(tmp_path: Path, name: str) -> None:
    big = tarfile.TarInfo("a")
    big.size = 1 << 40
    header = tarfile.TarInfo("h")
    header.type, header.size = tarfile.XHDTYPE, 512
    record = b"512 comment=" + b"x" * 499 + b"\n"
    zeros = zipped(("a", bytes(50 << 20), 0o100644))
    lying = bytearray(zeros)
    directory = lying.index(b"PK\1\2")
    struct.pack_into("<L", lying, directory + 24, 10)  # it says to expand to 10 bytes
    made: dict[str, tuple[Callable[[], bytes], int]] = {
        "one file": (lambda: endless(big, 64 << 20), 413),
        "many files": (lambda: gzip.compress(numbered_files(3000)), 413),
        "zip": (lambda: zeros, 413),
        "zip entries": (lambda: zipped(*((f"f{n}", b"", 0o100644) for n in range(3000))), 413),
        "zip lies": (lambda: bytes(lying), 400),
        "headers": (lambda: gzip.compress((header.tobuf() + record) * 30_000), 400),
        "directories": (lambda: deep_files(11), 413),
        "zip overlaps": (lambda: many_times(bytes(1 << 20), 900), 400),
        "links": (lambda: gzip.compress(long_links(30)), 400),
        "gzip members": (lambda: gzip.compress(b"") * 100_000 + gzip.compress(tar()), 400),
        "comments": (lambda: gzip.compress(commented(40)), 413),
    }
    make, status = made[name]
    archive = make()
    started = time.process_time()
    with pytest.raises(EraError) as raised:
        unpacked(tmp_path, archive, entries=1000, total_bytes=10 << 20)
    assert raised.value.status == status
    assert time.process_time() - started < 3
    written = sum(path.stat().st_size for path in (tmp_path / "blobs").rglob("*") if path.is_file())
    assert written == 0


def test_bounds_of_archives_hold_over_http(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    big = tarfile.TarInfo("a")
    big.size = (4 << 30) + 1
    refused(send(client, where, endless(big, 1 << 20)), 413, "4294967296")
    refused(send(client, where, tar(member("d/" * 129 + "f", b"1"))), 413, "128")
    assert send(client, where, tar(member("d/" * 128 + "f", b"1"))).status_code == 200
    assert client.get(f"/api/sessions/{where}").json()["version"] == 2


@pytest.mark.parametrize("changes", soak_the_rest([25, 100], 1))
@pytest.mark.parametrize("form", FORMS)
def test_damage_anywhere_is_an_error_or_harmless(tmp_path: Path, form: str, changes: int) -> None:
    """Whatever byte is changed or end cut off: an error that names it, or a tree."""
    chance = random.Random(7)
    members = [
        ("d/a", os.urandom(3000), 0o100644),
        ("b", b"x" * 3000, 0o100755),
        ("l", b"b", 0o120777),
        ("e/", b"", 0o40755),
    ]
    if form == "zip":
        archive = zipped(*members)
    else:
        tree = [member(name, content) for name, content, _ in members[:2]]
        tree += [
            member("l", linkname="b", **SYM),
            member("e", type=tarfile.DIRTYPE),
            member("n" * 150, b"1", mtime=1.5),
        ]
        archive = tar(*tree)
        if form == "tar.gz":
            archive = gzip.compress(archive)
    assert unpacked(tmp_path, archive).files == (3 if form == "zip" else 4)
    for number in range(changes):
        at = chance.randrange(len(archive))
        broken = bytearray(archive)
        if number % 3:
            broken[at] = chance.randrange(256)
        else:
            del broken[at:]
        with suppress(BadRequest, TooLarge):
            unpacked(tmp_path, bytes(broken))


@table("depth, target, out", [
        (0, "a", False), (0, "a/b", False), (0, "..", True), (1, "..", False), (1, "../..", True),
        (2, "../../a", False), (2, "../a/..", True), (5, "a/../b", True), (0, "/a", True), (0, "", True),
        (0, "./a", False), (0, "...", False),
    ])  # fmt: skip
def test_links_that_lead_out_are_recognised(depth: int, target: str, out: bool) -> None:
    assert unpack.link_leads_out(depth, target) is out


def test_a_restored_archive_is_what_was_archived(tmp_path: Path) -> None:
    """With times to the nanosecond, and names and modes that no client could write in a URL."""
    lab = Lab(tmp_path)
    place = lab.place()
    for name, mode, mtime in [(b"\xff", 0, 1), (b"a\nb", 0o600, 1_500_000_000_000_000_001), (b"\\", 0o777, 2**62)]:
        path = os.path.join(os.fsencode(place.workspace), name)
        Path(os.fsdecode(path)).write_bytes(name)
        os.chmod(path, mode)
        os.utime(path, ns=(mtime, mtime))
    os.symlink(b"\xfe", os.path.join(os.fsencode(place.workspace), b"link"))
    (place.workspace / "d" / "e").mkdir(parents=True)
    snapshot = lab.take(place)
    archive = b"".join(pack.tar_pieces(lab.snapshots.read_tree, lab.blobs.open_blob, snapshot.root, MTIME))
    changes = unpacked(tmp_path, archive).changes
    again = asyncio.run(lab.snapshots.edit(EMPTY, changes, lambda _: None, Bounds(), mine("s")))
    assert described(lab.restore(again).workspace) == described(place.workspace)
