"""What is at a path, moving it elsewhere, new directories, permissions: over HTTP, for sessions that aren't live."""

from __future__ import annotations

from typing import Any

import httpx

from era.wire.files import DirectoryMadeAnswer, ListedFile, MovedAnswer
from tests.api.answers import assert_recent, checked, refused
from tests.api.files_api import get, listed, names, put
from tests.conftest import MakeSession, Run

FILE_KEYS = set(ListedFile.model_fields)


def stat(client: httpx.Client, where: str, path: str) -> httpx.Response:
    return client.get(f"/api/sessions/{where}/stat/{path}")


def move(client: httpx.Client, where: str, source: str, target: str, **more: Any) -> httpx.Response:
    return client.post(f"/api/sessions/{where}/move", json={"from": source, "to": target, **more})


def mkdir(client: httpx.Client, where: str, path: str, **more: Any) -> httpx.Response:
    return client.post(f"/api/sessions/{where}/mkdir", json={"path": path, **more})


def version(client: httpx.Client, where: str) -> int:
    number: int = client.get(f"/api/sessions/{where}").json()["version"]
    return number


def test_stat_shows_files_links_and_directories(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "d/a.txt", b"four")
    run(where, "import os; os.symlink('d/a.txt', 'l'); os.chmod('d', 0o750); os.chmod('d/a.txt', 0o640)")
    file = checked(stat(client, where, "d/a.txt"), ListedFile, FILE_KEYS)
    assert (file["path"], file["type"], file["size"], file["mode"]) == ("d/a.txt", "file", 4, "0640")
    assert_recent(file["modified_at"])
    assert f'"{file["etag"]}"' == get(client, where, "d/a.txt").headers["etag"]
    link = checked(stat(client, where, "l"), ListedFile, FILE_KEYS)
    assert (link["type"], link["link"], link["size"], link["mode"], link["etag"]) == ("link", "d/a.txt", 7, None, None)
    directory = checked(stat(client, where, "d"), ListedFile, FILE_KEYS)
    assert (directory["type"], directory["mode"], directory["modified_at"]) == ("dir", "0750", None)
    refused(stat(client, where, "none"), 404)
    refused(stat(client, where, "l/a.txt"), 409, "symbolic link")
    for bad in ("..%2fa", "d/", "d//a.txt", "%00", ".session_data.json"):
        refused(stat(client, where, bad), 400)


def test_the_list_has_types_and_on_request_directories(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    for path in ("a/b/f", "a/g", "a.txt", "z"):
        put(client, where, path, b"1")
    mkdir(client, where, "a/empty")
    run(where, "import os; os.symlink('z', 'l')")
    body = listed(client, where)
    assert [file["type"] for file in body["files"]] == ["file", "file", "file", "link", "file"]
    assert body["count"] == body["total_count"] == 5
    everything = ["a", "a/b", "a/b/f", "a/empty", "a/g", "a.txt", "l", "z"]
    body = listed(client, where, directories="true")
    assert [file["path"] for file in body["files"]] == everything
    assert (body["count"], body["total_count"]) == (8, 5)
    paged, cursor = [], None
    while True:
        page = listed(client, where, directories="true", limit=1, **({"cursor": cursor} if cursor else {}))
        paged += [file["path"] for file in page["files"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert paged == everything
    assert names(client, where, directories="true", prefix="a/") == ["a/b", "a/b/f", "a/empty", "a/g"]
    number = version(client, where)
    old = client.get(f"/api/sessions/{where}/versions/{number}/files", params={"directories": "true"}).json()
    assert [file["path"] for file in old["files"]] == everything


def test_move_a_file_a_link_and_a_directory(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "d/sub/a.txt", b"four")
    run(where, "import os; os.symlink('x', 'd/l'); os.chmod('d/sub/a.txt', 0o755); os.mkdir('d/empty')")
    before = version(client, where)
    body = checked(move(client, where, "d", "new/place"), MovedAnswer, {"success", "from", "to"})
    assert body == {"success": True, "from": "d", "to": "new/place"}
    assert version(client, where) == before + 1
    assert names(client, where) == ["new/place/l", "new/place/sub/a.txt"]
    assert move(client, where, "new/place/sub/a.txt", "b.sh").is_success
    assert move(client, where, "new/place/l", "link").is_success
    shown = client.get(f"/api/sessions/{where}").json()
    assert (shown["file_count"], shown["total_size_bytes"]) == (2, 5)
    assert stat(client, where, "b.sh").json()["mode"] == "0755"
    look = "import os; print(sorted(os.listdir('new/place')), os.path.lexists('link'), oct(os.stat('b.sh').st_mode))"
    assert run(where, look)["stdout"] == "['empty', 'sub'] True 0o100755\n"
    [latest, *_] = client.get(f"/api/sessions/{where}/versions").json()["versions"]
    assert latest["cause"] == "files"


def test_a_move_may_replace_files_and_links(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "new", b"new!")
    put(client, where, "old", b"old")
    run(where, "import os; os.symlink('x', 'l')")
    assert move(client, where, "new", "old", replace=True).is_success
    assert get(client, where, "old").content == b"new!"
    assert move(client, where, "old", "l", replace=True).is_success
    assert names(client, where) == ["l"]
    shown = client.get(f"/api/sessions/{where}").json()
    assert (shown["file_count"], shown["total_size_bytes"]) == (1, 4)
    assert run(where, "print(open('l').read())")["stdout"] == "new!\n"


def test_mkdir_makes_what_is_missing_once(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    keys = {"success", "path", "created"}
    assert checked(mkdir(client, where, "a/b/c"), DirectoryMadeAnswer, keys)["created"] is True
    before = version(client, where)
    assert checked(mkdir(client, where, "a/b"), DirectoryMadeAnswer, keys)["created"] is False
    assert version(client, where) == before
    assert mkdir(client, where, "private", mode="0700").is_success
    look = "import os; print(os.listdir('a/b'), oct(os.stat('a/b/c').st_mode), oct(os.stat('private').st_mode))"
    assert run(where, look)["stdout"] == "['c'] 0o40755 0o40700\n"
    put(client, where, "f", b"")
    refused(mkdir(client, where, "f"), 409)
    refused(mkdir(client, where, "f/x"), 409)
    refused(mkdir(client, where, "../x"), 400)
    refused(mkdir(client, where, "x", mode="4755"), 400)
    refused(mkdir(client, where, "/".join("x" * 129)), 413)
