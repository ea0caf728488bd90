"""Whole trees in and out as archives, and archives that mean harm."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import random
import stat
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from era.core.files import archives, pack, unpack
from era.core.files.spool import Slots, Spool
from era.core.files.trees import Bounds
from era.core.models import EMPTY
from era.errors import BadRequest, EraError, TooLarge
from era.wire.files import ArchiveAnswer
from tests.api.test_contract import checked, refused
from tests.api.test_files import get, listed, names, put
from tests.conftest import Run, Server
from tests.core.lab import Lab, described

type MakeSession = Callable[..., str]

KEYS = {"success", "count", "total_count", "total_size_bytes"}
MTIME = 1_700_000_000


def fetch(client: httpx.Client, where: str, form: str = "tar") -> bytes:
    answer = client.get(f"/api/sessions/{where}/archive", params={"format": form})
    assert answer.status_code == 200, answer.text
    kind = {"tar": "application/x-tar", "tar.gz": "application/gzip", "zip": "application/zip"}[form]
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-disposition"] == f'attachment; filename="{where}.{form}"'
    return answer.content


def send(client: httpx.Client, where: str, archive: bytes, query: str = "", **headers: str) -> httpx.Response:
    return client.put(f"/api/sessions/{where}/archive{query}", content=archive, headers=headers)


def sent(client: httpx.Client, where: str, archive: bytes, query: str = "") -> dict[str, Any]:
    return checked(send(client, where, archive, query), ArchiveAnswer, KEYS)


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), MTIME
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:  # type: ignore[call-overload]
        for info, content in members:
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


def zipped(*members: tuple[str, bytes, int], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name, (2023, 11, 14, 22, 13, 20))
            info.create_system, info.external_attr, info.compress_type = 3, mode << 16, method
            archive.writestr(info, content)
    return buffer.getvalue()


FORMS = ["tar", "tar.gz", "zip"]

MAKE_TREE = """
import os
os.makedirs('d/empty'); os.makedirs('d/full')
open('d/full/run.sh', 'w').write('#!/bin/sh')
os.chmod('d/full/run.sh', 0o750)
open('big', 'wb').write(bytes(range(256)) * 20_000)
open('é 😀', 'w').close()
os.symlink('full/run.sh', 'd/link')
os.symlink('nowhere', 'dangling')
os.utime('d/full/run.sh', ns=(0, 1_234_567_890_123_456_789))
os.utime('big', ns=(0, 4_000_000_000_000_000_000))
open('long' * 40, 'w').close()
os.chmod('d/empty', 0o500)
"""


def test_what_an_archive_holds(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(data={"n": 1})
    assert run(where, MAKE_TREE)["state"]["committed"]
    with tarfile.open(fileobj=io.BytesIO(fetch(client, where))) as archive:
        found = {info.name: info for info in archive}
        assert list(found) == [
            "big",
            "d",
            "d/empty",
            "d/full",
            "d/full/run.sh",
            "d/link",
            "dangling",
            "long" * 40,
            "é 😀",
        ]
        script = found["d/full/run.sh"]
        assert (script.mode, script.pax_headers["mtime"], script.uid) == (0o750, "1234567890.123456789", 0)
        assert found["d/link"].issym()
        assert found["d/link"].linkname == "full/run.sh"
        assert found["d/empty"].isdir()
        assert found["d/empty"].mode == 0o500
        opened = archive.extractfile("big")
        assert opened is not None
        assert opened.read() == bytes(range(256)) * 20_000
    assert gzip.decompress(fetch(client, where, "tar.gz")) == fetch(client, where)
    with zipfile.ZipFile(io.BytesIO(fetch(client, where, "zip"))) as archive:
        assert archive.testzip() is None
        assert [info.filename for info in archive.infolist()] == [name + "/" * found[name].isdir() for name in found]
        assert stat.S_ISLNK(archive.getinfo("d/link").external_attr >> 16)
        assert archive.getinfo("d/full/run.sh").date_time == (2009, 2, 13, 23, 31, 30)
        assert archive.read("big") == bytes(range(256)) * 20_000
    refused(client.get(f"/api/sessions/{where}/archive?format=rar"), 400, "format")


@pytest.mark.parametrize("form", FORMS)
def test_a_tree_that_comes_back_is_the_same(client: httpx.Client, session: MakeSession, run: Run, form: str) -> None:
    where, other = session(), session()
    run(where, MAKE_TREE)
    archive = fetch(client, where, form)
    body = sent(client, other, archive)
    assert (body["count"], body["total_count"]) == (6, 6)
    assert client.get(f"/api/sessions/{other}").json()["version"] == 2
    show = (
        "import os\nfor at, ds, fs in sorted(os.walk('.')):\n for n in sorted(ds + fs):\n"
        "  p = os.path.join(at, n); s = os.lstat(p)\n"
        "  if n in ('main.py', '.session_data.json'): continue\n"
        f"  t = 0 if os.path.isdir(p) else s.st_mtime_ns // {10**9 if form == 'zip' else 1}\n"
        "  print(p, oct(s.st_mode), t, os.readlink(p) if os.path.islink(p) else s.st_size * os.path.isfile(p))"
    )
    assert run(where, show)["stdout"] == run(other, show)["stdout"]
    assert sent(client, other, archive)["total_count"] == 6, "and once more"


def test_adding_and_replacing(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "old", b"1")
    put(client, where, "d/both", b"1")
    assert sent(client, where, tar(member("d/both", b"22"), member("./d/new", b"3")))["total_count"] == 3
    assert run(where, "print(open('d/both').read(), open('old').read(), open('d/new').read())")["stdout"] == "22 1 3\n"
    body = sent(client, where, tar(member("e", b"4")), "?replace=true")
    assert body == {"success": True, "count": 1, "total_count": 1, "total_size_bytes": 1}
    assert run(where, "import os; print(os.path.exists('d'), open('e').read())")["stdout"] == "False 4\n"
    [file] = listed(client, where)["files"]
    assert (file["path"], file["uploaded"], file["modified_at"]) == ("e", True, "2023-11-14T22:13:20.000Z")
    assert sent(client, where, tar(), "?replace=true")["total_count"] == 0
    assert client.get(f"/api/sessions/{where}/versions").json()["versions"][0]["cause"] == "files"
    assert fetch(client, where) == bytes(10240)


def test_what_tools_make(client: httpx.Client, session: MakeSession, tmp_path: Path) -> None:
    source = tmp_path / "source"
    long = "n" * 90
    (source / "sub" / long / long).mkdir(parents=True)
    (source / "sub" / long / long / "file").write_text("deep")
    (source / "a").write_text("a" * 3000)
    (source / "link").symlink_to("a")
    os.chmod(source / "a", 0o4755)
    where = session()
    for form in ("gnu", "pax", "ustar"):
        for flags in ("-c", "-cz"):
            archive = subprocess.run(
                ["tar", flags, f"--format={form}", "-C", str(source), "-f", "-", "."], capture_output=True, check=True
            ).stdout
            assert sent(client, where, archive, "?replace=true")["count"] == 3
            assert names(client, where) == ["a", "link", f"sub/{long}/{long}/file"]
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["tar", "-xf", "-", "-C", str(out)], input=fetch(client, where), check=True)
    assert (out / "sub" / long / long / "file").read_text() == "deep"
    assert stat.S_IMODE((out / "a").stat().st_mode) == 0o755, "setuid is not kept"
    assert os.readlink(out / "link") == "a"
    old = tar(member("v7", b"1"), form=tarfile.USTAR_FORMAT)
    assert sent(client, where, old)["count"] == 1


def test_names_that_are_not_utf8(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where, other = session(), session()
    run(where, r"import os; open(b'\xff', 'w').write('1'); os.symlink(b'\xfe', b'l')")
    sent(client, other, fetch(client, where))
    told = run(other, r"import os; print(open(b'\xff').read(), os.readlink(b'l'))")
    assert told["stdout"] == "1 b'\\xfe'\n"
    refused(client.get(f"/api/sessions/{where}/archive?format=zip"), 409, "UTF-8", "tar")


def test_kinds_are_not_changed_by_an_archive(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    sent(client, where, tar(member("d/f", b"1"), member("link", type=tarfile.SYMTYPE, linkname="d")))
    for bad in (
        member("d", b"2"), member("d/f/g", b"2"), member("link", b"2"), member("link/f", b"2"),
        member("link", type=tarfile.DIRTYPE), member("d/f", type=tarfile.SYMTYPE, linkname="x"),
    ):  # fmt: skip
        refused(send(client, where, tar(member("new", b"1"), bad)), 409, bad[0].name.split("/")[0])
    assert names(client, where) == ["d/f", "link"]
    assert get(client, where, "d/f").content == b"1"


BLOCK = tar(member("a", b"content"))[:1024]
LIES = tarfile.TarInfo("a")
LIES.size = 1 << 20


def corrupt_pax(records: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512) + BLOCK + bytes(1024)


def huge_header(kind: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 1 << 32
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)


def tampered(archive: bytes, at: int, by: bytes) -> bytes:
    return archive[:at] + by + archive[at + len(by) :]


def encrypted() -> bytes:
    archive = zipped(("a", b"x" * 100, 0o100644))
    directory = archive.index(b"PK\1\2")
    return tampered(archive, directory + 8, b"\1")


SYM = {"type": tarfile.SYMTYPE}
BAD: dict[str, tuple[bytes, str]] = {
    "dot-dot": (tar(member("../a", b"1")), "'..'"),
    "dot-dot inside": (tar(member("a/../../b", b"1")), "'..'"),
    "absolute": (tar(member("/etc/passwd", b"1")), "absolute"),
    "empty part": (tar(member("a//b", b"1")), "empty part"),
    "dot": (tar(member("a/./b", b"1")), "'.'"),
    "state file": (tar(member("./.session_data.json", b"{}")), "data"),
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


@pytest.mark.parametrize("which", BAD)
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
    assert os.listdir(server.data_dir / "blobs" / "incoming") == []


def test_what_the_content_type_says(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    archive = tar(member("a", b"1"))
    for kind in ("application/x-tar", "application/octet-stream", "text/plain; charset=utf-8"):
        assert send(client, where, archive, **{"Content-Type": kind}).status_code == 200
    refused(send(client, where, archive, **{"Content-Type": "application/zip"}), 400, "Content-Type", "zip")
    packed = gzip.compress(archive)
    assert send(client, where, packed, **{"Content-Type": "application/x-gzip"}).status_code == 200
    assert (
        send(client, where, packed[:0] + gzip.compress(archive[:700]) + gzip.compress(archive[700:])).status_code == 200
    )


# -- bombs ------------------------------------------------------------------------------------------------------


def unpacked(directory: Path, archive: bytes, **bounds: int) -> archives.Unpacked:
    """What the unpacking itself makes of an archive, beneath all of HTTP."""
    lab = Lab(directory)
    spool = Spool(directory / "uploads", Slots(1))
    spool.open()
    (directory / "archive").write_bytes(archive)
    with (directory / "archive").open("rb") as file, lab.blobs.batch() as batch:
        members = archives._members(file.fileno(), None)
        return archives._Unpacker(Bounds(**bounds), spool, batch).unpack(members)


def endless(info: tarfile.TarInfo, size: int) -> bytes:
    """A gzip file that expands to a header and `size` zeros, for the price of a few kilobytes."""
    packer = zlib.compressobj(9, wbits=31)
    packed = [packer.compress(info.tobuf(tarfile.GNU_FORMAT))]
    packed += [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*packed, packer.flush()])


@pytest.mark.parametrize("name", ["one file", "many files", "zip", "zip entries", "zip lies", "headers"])
def test_bombs_are_refused_before_they_go_off(tmp_path: Path, name: str) -> None:
    big = tarfile.TarInfo("a")
    big.size = 1 << 40
    header = tarfile.TarInfo("h")
    header.type, header.size = tarfile.XHDTYPE, 512
    record = b"512 comment=" + b"x" * 499 + b"\n"
    zeros = zipped(("a", bytes(50 << 20), 0o100644))
    lying = bytearray(zeros)
    directory = lying.index(b"PK\1\2")
    struct.pack_into("<L", lying, directory + 24, 10)  # it says to expand to 10 bytes
    archive, status = {
        "one file": (endless(big, 64 << 20), 413),
        "many files": (gzip.compress(tar(*(member(f"f{n}") for n in range(3000)))), 413),
        "zip": (zeros, 413),
        "zip entries": (zipped(*((f"f{n}", b"", 0o100644) for n in range(3000))), 413),
        "zip lies": (bytes(lying), 400),
        "headers": (gzip.compress((header.tobuf() + record) * 30_000), 400),
    }[name]
    started = time.monotonic()
    with pytest.raises(EraError) as raised:
        unpacked(tmp_path, archive, entries=1000, total_bytes=10 << 20)
    assert raised.value.status == status
    assert time.monotonic() - started < 3
    written = sum(path.stat().st_size for path in (tmp_path / "blobs").rglob("*") if path.is_file())
    assert written == 0


def test_bounds_hold_over_http(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    big = tarfile.TarInfo("a")
    big.size = (4 << 30) + 1
    refused(send(client, where, endless(big, 1 << 20)), 413, "4294967296")
    refused(send(client, where, tar(member("d/" * 129 + "f", b"1"))), 413, "128")
    assert send(client, where, tar(member("d/" * 128 + "f", b"1"))).status_code == 200
    many = tar(*(member(f"{number}") for number in range(200_001)), form=tarfile.USTAR_FORMAT)
    started = time.monotonic()
    refused(send(client, where, gzip.compress(many, 1)), 413, "200000")
    assert time.monotonic() - started < 60
    assert client.get(f"/api/sessions/{where}").json()["version"] == 2


@pytest.mark.parametrize("form", FORMS)
def test_damage_anywhere_is_found_or_does_no_harm(tmp_path: Path, form: str) -> None:
    """Any byte changed, any end cut off: a clear error or a tree, never anything else."""
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
    for number in range(300):
        at = chance.randrange(len(archive))
        broken = bytearray(archive)
        if number % 3:
            broken[at] = chance.randrange(256)
        else:
            del broken[at:]
        with suppress(BadRequest, TooLarge):
            unpacked(tmp_path, bytes(broken))


@pytest.mark.parametrize(
    ("depth", "target", "out"),
    [
        (0, "a", False), (0, "a/b", False), (0, "..", True), (1, "..", False), (1, "../..", True),
        (2, "../../a", False), (2, "../a/..", True), (5, "a/../b", True), (0, "/a", True), (0, "", True),
        (0, "./a", False), (0, "...", False),
    ],
)  # fmt: skip
def test_links_that_lead_out(depth: int, target: str, out: bool) -> None:
    assert unpack.link_leads_out(depth, target) is out


def test_a_restored_archive_is_what_was_archived(tmp_path: Path) -> None:
    """To the nanosecond, and with names and modes that no client could write in a URL."""
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
    again = asyncio.run(lab.snapshots.edit(EMPTY, changes, lambda _: None, Bounds()))
    assert described(lab.restore(again).workspace) == described(place.workspace)
