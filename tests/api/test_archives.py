"""Whole trees in and out as archives."""

from __future__ import annotations

import gzip
import io
import os
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import httpx

from tests.api.answers import refused
from tests.api.archives_api import FORMS, fetch, member, send, send_accepted, tar
from tests.api.files_api import get, listed, names, put
from tests.conftest import MakeSession, Run
from tests.table import table

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


def test_an_archive_holds_names_modes_times_and_content(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(data={"n": 1})
    assert run(where, MAKE_TREE)["state"]["committed"]
    with tarfile.open(fileobj=io.BytesIO(fetch(client, where))) as archive:
        members = {info.name: info for info in archive}
        assert list(members) == [
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
        script = members["d/full/run.sh"]
        assert (script.mode, script.pax_headers["mtime"], script.uid) == (0o750, "1234567890.123456789", 0)
        assert members["d/link"].issym()
        assert members["d/link"].linkname == "full/run.sh"
        assert members["d/empty"].isdir()
        assert members["d/empty"].mode == 0o500
        opened = archive.extractfile("big")
        assert opened is not None
        assert opened.read() == bytes(range(256)) * 20_000
    assert gzip.decompress(fetch(client, where, "tar.gz")) == fetch(client, where)
    with zipfile.ZipFile(io.BytesIO(fetch(client, where, "zip"))) as archive:
        assert archive.testzip() is None
        assert [info.filename for info in archive.infolist()] == [
            name + "/" * members[name].isdir() for name in members
        ]
        assert stat.S_ISLNK(archive.getinfo("d/link").external_attr >> 16)
        assert archive.getinfo("d/full/run.sh").date_time == (2009, 2, 13, 23, 31, 30)
        assert archive.read("big") == bytes(range(256)) * 20_000
    refused(client.get(f"/api/sessions/{where}/archive?format=rar"), 400, "format")


@table("form", FORMS)
def test_a_tree_sent_back_is_the_same(client: httpx.Client, session: MakeSession, run: Run, form: str) -> None:
    where, other = session(), session()
    run(where, MAKE_TREE)
    archive = fetch(client, where, form)
    body = send_accepted(client, other, archive)
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
    assert send_accepted(client, other, archive)["total_count"] == 6, "and once more"


def test_an_archive_adds_files_or_replaces_them_all(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "old", b"1")
    put(client, where, "d/both", b"1")
    assert send_accepted(client, where, tar(member("d/both", b"22"), member("./d/new", b"3")))["total_count"] == 3
    assert run(where, "print(open('d/both').read(), open('old').read(), open('d/new').read())")["stdout"] == "22 1 3\n"
    body = send_accepted(client, where, tar(member("e", b"4")), "?replace=true")
    assert body == {"success": True, "count": 1, "total_count": 1, "total_size_bytes": 1}
    assert run(where, "import os; print(os.path.exists('d'), open('e').read())")["stdout"] == "False 4\n"
    [file] = listed(client, where)["files"]
    assert (file["path"], file["uploaded"], file["modified_at"]) == ("e", True, "2023-11-14T22:13:20.000Z")
    assert send_accepted(client, where, tar(), "?replace=true")["total_count"] == 0
    assert client.get(f"/api/sessions/{where}/versions").json()["versions"][0]["cause"] == "files"
    assert fetch(client, where) == bytes(10240)


def test_archives_of_tar_are_read_and_ours_are_read_by_tar(
    client: httpx.Client, session: MakeSession, tmp_path: Path
) -> None:
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
            assert send_accepted(client, where, archive, "?replace=true")["count"] == 3
            assert names(client, where) == ["a", "link", f"sub/{long}/{long}/file"]
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["tar", "-xf", "-", "-C", str(out)], input=fetch(client, where), check=True)
    assert (out / "sub" / long / long / "file").read_text() == "deep"
    assert stat.S_IMODE((out / "a").stat().st_mode) == 0o755, "setuid is not kept"
    assert os.readlink(out / "link") == "a"
    old = tar(member("v7", b"1"), form=tarfile.USTAR_FORMAT)
    assert send_accepted(client, where, old)["count"] == 1


def test_an_archive_turns_no_file_into_a_directory_or_link(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    send_accepted(client, where, tar(member("d/f", b"1"), member("link", type=tarfile.SYMTYPE, linkname="d")))
    for bad in (
        member("d", b"2"), member("d/f/g", b"2"), member("link", b"2"), member("link/f", b"2"),
        member("link", type=tarfile.DIRTYPE), member("d/f", type=tarfile.SYMTYPE, linkname="x"),
    ):  # fmt: skip
        refused(send(client, where, tar(member("new", b"1"), bad)), 409, bad[0].name.split("/")[0])
    assert names(client, where) == ["d/f", "link"]
    assert get(client, where, "d/f").content == b"1"
