"""The files of a session over HTTP: what clients put, get, list and delete, and what hostile runs put in their way."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from era.wire.files import FileAnswer, FileDeletedAnswer, FilesAnswer
from tests.api.test_contract import assert_recent, checked, refused
from tests.conftest import Run, Server, eventually

type MakeSession = Callable[..., str]
type MakeServer = Callable[..., Server]

LIST_KEYS = {"files", "count", "total_count", "total_size_bytes", "next_cursor"}
MIB = 1 << 20


def put(client: httpx.Client, where: str, path: str, content: Any = b"", **headers: str) -> httpx.Response:
    return client.put(f"/api/sessions/{where}/files/{path}", content=content, headers=headers)


def get(client: httpx.Client, where: str, path: str, **headers: str) -> httpx.Response:
    return client.get(f"/api/sessions/{where}/files/{path}", headers=headers)


def delete(client: httpx.Client, where: str, path: str, **headers: str) -> httpx.Response:
    return client.delete(f"/api/sessions/{where}/files/{path}", headers=headers)


def listed(client: httpx.Client, where: str, **which: Any) -> dict[str, Any]:
    return checked(client.get(f"/api/sessions/{where}/files", params=which), FilesAnswer, LIST_KEYS)


def names(client: httpx.Client, where: str, **which: Any) -> list[str]:
    return [file["path"] for file in listed(client, where, **which)["files"]]


def raw(client: httpx.Client, method: str, path: bytes) -> httpx.Response:
    """A request whose path is sent as it is: httpx would make it a better one."""
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port or 80, timeout=60)
    with closing(connection):
        connection.request(method, path.decode("latin-1"))
        answer = connection.getresponse()
        return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())


# -- putting and getting ----------------------------------------------------------------------------------------


def test_a_file_goes_in_and_comes_out(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    content = bytes(range(256)) * 100
    answer = put(client, where, "dir/sub/data.bin", content)
    body = checked(answer, FileAnswer, {"path", "size"})
    assert body == {"path": "dir/sub/data.bin", "size": 25600}
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    assert answer.headers["etag"] == etag

    found = get(client, where, "dir/sub/data.bin")
    assert (found.status_code, found.content) == (200, content)
    assert found.headers["content-length"] == "25600"
    assert found.headers["etag"] == etag
    assert found.headers["accept-ranges"] == "bytes"
    assert abs(parsedate_to_datetime(found.headers["last-modified"]).timestamp() - time.time()) < 60
    head = client.head(f"/api/sessions/{where}/files/dir/sub/data.bin")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers.items() - found.headers.items() <= {("x-request-id", head.headers["x-request-id"])} | {
        ("date", head.headers["date"])
    }

    [file] = listed(client, where)["files"]
    assert (file["path"], file["size"], file["uploaded"]) == ("dir/sub/data.bin", 25600, True)
    assert_recent(file["modified_at"])
    shown = client.get(f"/api/sessions/{where}").json()
    assert (shown["file_count"], shown["total_size_bytes"], shown["version"]) == (1, 25600, 2)
    [version, _] = client.get(f"/api/sessions/{where}/versions").json()["versions"]
    assert (version["cause"], version["run_id"]) == ("files", None)


@pytest.mark.parametrize("size", [0, 1, (64 << 10) - 1, 64 << 10, MIB, MIB + 1])
def test_every_size_and_any_way_of_sending_it(client: httpx.Client, session: MakeSession, size: int) -> None:
    where = session()
    content = os.urandom(size)

    def chunks() -> Iterator[bytes]:
        for at in range(0, size, 100_003):
            yield content[at : at + 100_003]

    assert put(client, where, "a", chunks()).json() == {"path": "a", "size": size}
    assert get(client, where, "a").content == content
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert put(client, where, "b", content, **kind).json()["size"] == size
    assert get(client, where, "b").content == content


def test_more_than_other_bodies_may_have(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    content = os.urandom(17 * MIB)
    assert put(client, where, "a", content).json()["size"] == len(content)
    assert hashlib.sha256(get(client, where, "a").content).digest() == hashlib.sha256(content).digest()
    refused(client.put(f"/api/sessions/{where}/code", content=content), 413)


def test_what_is_too_large_is_refused_at_once(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    for path in ("files/a", "archive"):
        with socket.create_connection(address) as connection:
            head = f"PUT /api/sessions/{where}/{path} HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\n"
            connection.sendall(head.encode() + b"Content-Length: 4294967297\r\n\r\n")
            assert b" 413 " in connection.recv(65536)
    assert names(client, where) == []


def test_put_then_run_then_get_then_rollback(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "in/a.txt", b"one")
    told = run(where, "print(open('in/a.txt').read()); open('out.txt', 'w').write('made')")
    assert told["stdout"] == "one\n"
    assert get(client, where, "out.txt").content == b"made"
    put(client, where, "in/a.txt", b"two")
    told = run(where, "print(open('in/a.txt').read()); open('in/a.txt', 'a').write(' and more')")
    assert told["stdout"] == "two\n"
    assert get(client, where, "in/a.txt").content == b"two and more"
    assert {file["path"]: file["uploaded"] for file in listed(client, where)["files"]} == {
        "in/a.txt": False,
        "out.txt": False,
    }
    client.post(f"/api/sessions/{where}/rollback", json={"version": 2})
    assert get(client, where, "in/a.txt").content == b"one"
    assert listed(client, where)["files"][0]["uploaded"]
    refused(get(client, where, "out.txt"), 404)
    told = run(where, "import os; print(open('in/a.txt').read(), os.path.exists('out.txt'))")
    assert told["stdout"] == "one False\n"
    assert listed(client, where)["files"][0]["uploaded"], "a run that only reads changes nothing"


def test_a_run_sees_and_may_change_what_was_put(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "d/script.sh", b"#!/bin/sh\necho ran\n")
    run(where, "import os; os.chmod('d/script.sh', 0o755); os.rename('d', 'e'); open('e/new', 'w')")
    put(client, where, "e/script.sh", b"#!/bin/sh\necho again\n")
    told = run(
        where, "import os, subprocess; print(oct(os.stat('e').st_mode)); print(subprocess.getoutput('e/script.sh'))"
    )
    assert told["stdout"] == "0o40755\nagain\n", "a file put keeps the mode that was there"


def test_the_programs_own_name_is_no_special_one(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "main.py", b"X = 41\n")
    assert run(where, "import main; print(main.X + 1)")["stdout"] == "42\n"
    assert get(client, where, "main.py").content == b"X = 41\n"


def test_a_file_during_a_run_is_the_committed_one(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "a", b"old")
    with ThreadPoolExecutor() as pool:
        going = pool.submit(run, where, "import time; open('a', 'w').write('new'); time.sleep(1)")
        assert eventually(lambda: client.get(f"/api/sessions/{where}").json()["status"] == "running")
        time.sleep(0.3)
        assert get(client, where, "a").content == b"old"
        waiting = pool.submit(put, client, where, "a", b"newest")
        time.sleep(0.2)
        assert not waiting.done(), "a put waits for the run"
        going.result()
        waiting.result()
    assert get(client, where, "a").content == b"newest"
    assert run(where, "print(open('a').read())")["stdout"] == "newest\n"


def test_puts_and_runs_at_once_come_one_after_the_other(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "a", b"x" * 1000)

    def read(_: int) -> str:
        return str(run(where, "text = open('a').read(); print(text[0] * 1000 == text)")["stdout"])

    with ThreadPoolExecutor(12) as pool:
        puts = [pool.submit(put, client, where, "a", letter * 1000) for letter in (b"a", b"b", b"c", b"d", b"e", b"f")]
        runs = [pool.submit(read, number) for number in range(6)]
    assert [each.result().status_code for each in puts] == [200] * 6
    assert {each.result() for each in runs} == {"True\n"}
    content = get(client, where, "a").content
    assert content == content[:1] * 1000
    versions = client.get(f"/api/sessions/{where}/versions").json()["versions"]
    assert [each["version"] for each in versions] == list(range(14, 0, -1))
    assert sorted(each["cause"] for each in versions) == ["create"] + ["files"] * 7 + ["run"] * 6


# -- headers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.html", "text/html"), ("a.svg", "image/svg+xml"), ("a.JSON", "application/json"), ("a.py", "text/x-python"),
        ("a.tar.gz", "application/gzip"), ("a.unknown", "application/octet-stream"), ("a", "application/octet-stream"),
        ("data:text,html", "application/octet-stream"),
    ],
)  # fmt: skip
def test_no_file_is_a_page_of_this_server(client: httpx.Client, session: MakeSession, name: str, kind: str) -> None:
    where = session()
    put(client, where, name, b"<script>alert(1)</script>")
    headers = get(client, where, name).headers
    assert headers["content-type"] == kind
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"].startswith("attachment;")
    assert "sandbox" in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_a_name_cannot_break_out_of_a_header(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    put(client, where, "a%0d%0aSet-Cookie:x=1%22;é.txt", b"1")
    answer = get(client, where, "a%0d%0aSet-Cookie:x=1%22;é.txt")
    assert answer.content == b"1"
    assert "set-cookie" not in answer.headers
    assert answer.headers["content-disposition"] == (
        "attachment; filename*=UTF-8''a%0D%0ASet-Cookie%3Ax%3D1%22%3B%C3%A9.txt"
    )


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("bytes=0-0", (0, 1)), ("bytes=2-5", (2, 6)), ("bytes=7-", (7, 10)), ("bytes=-3", (7, 10)),
        ("bytes=-30", (0, 10)), ("bytes=0-99", (0, 10)), ("bytes=9-9", (9, 10)),
        ("bytes=5-2", None), ("bytes=0-1,4-5", None), ("lines=1-2", None), ("bytes=-", None), ("bytes=a-b", None),
        ("", None),
    ],
)  # fmt: skip
def test_ranges(client: httpx.Client, session: MakeSession, wanted: str, part: tuple[int, int] | None) -> None:
    where = session()
    put(client, where, "a", b"0123456789")
    answer = get(client, where, "a", Range=wanted)
    if part is None:
        assert (answer.status_code, answer.content) == (200, b"0123456789")
        assert "content-range" not in answer.headers
    else:
        start, end = part
        assert (answer.status_code, answer.content) == (206, b"0123456789"[start:end])
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/10"
        assert answer.headers["content-length"] == str(end - start)


@pytest.mark.parametrize("wanted", ["bytes=10-", "bytes=99-100", "bytes=-0", f"bytes={10**17}-"])
def test_ranges_that_the_file_does_not_have(client: httpx.Client, session: MakeSession, wanted: str) -> None:
    where = session()
    put(client, where, "a", b"0123456789")
    put(client, where, "empty")
    answer = get(client, where, "a", Range=wanted)
    assert refused(answer, 416, "10 bytes")["code"] == "range_not_satisfiable"
    assert answer.headers["content-range"] == "bytes */10"
    assert get(client, where, "empty", Range="bytes=0-").headers["content-range"] == "bytes */0"


def test_a_range_of_what_has_changed_is_the_whole(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    etag = put(client, where, "a", b"0123456789").headers["etag"]
    assert get(client, where, "a", **{"Range": "bytes=1-2", "If-Range": etag}).status_code == 206
    assert get(client, where, "a", **{"Range": "bytes=1-2", "If-Range": '"else"'}).status_code == 200


def test_conditions(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    old = put(client, where, "a", b"1").headers["etag"]
    for known in (old, f"W/{old}", f'"x", {old}', "*"):
        answer = get(client, where, "a", **{"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", old)
    assert get(client, where, "a", **{"If-None-Match": '"x"'}).status_code == 200

    new = put(client, where, "a", b"2", **{"If-Match": old}).headers["etag"]
    body = refused(put(client, where, "a", b"3", **{"If-Match": old}), 412, "If-Match")
    assert body["code"] == "precondition_failed"
    refused(put(client, where, "a", b"3", **{"If-Match": f"W/{new}"}), 412)
    refused(put(client, where, "a", b"3", **{"If-None-Match": "*"}), 412)
    refused(put(client, where, "b", b"3", **{"If-Match": "*"}), 412)
    refused(delete(client, where, "a", **{"If-Match": old}), 412)
    refused(put(client, where, "a", b"3", **{"If-Match": "unquoted"}), 400, "if-match")
    assert put(client, where, "b", b"3", **{"If-None-Match": "*"}).status_code == 200
    assert get(client, where, "a").content == b"2"
    assert delete(client, where, "a", **{"If-Match": new}).status_code == 200
    assert names(client, where) == ["b"]


def test_of_two_who_change_the_same_one_wins(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    etag = put(client, where, "a", b"0").headers["etag"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: put(client, where, "a", f"{n}!".encode(), **{"If-Match": etag}), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] + [412] * 7


# -- deleting ---------------------------------------------------------------------------------------------------


def test_deleting(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    for path in ("a", "d/b", "d/e/c", "f/g"):
        put(client, where, path, b"1")
    answer = checked(delete(client, where, "a"), FileDeletedAnswer, {"success", "path"})
    assert answer == {"success": True, "path": "a"}
    assert refused(delete(client, where, "a"), 404, "a")["code"] == "no_file"
    refused(delete(client, where, "f/g/h"), 404)
    refused(delete(client, where, "d"), 409, "directory", "recursive=true")
    refused(delete(client, where, "d?recursive=maybe"), 400)
    assert delete(client, where, "d?recursive=true").status_code == 200
    assert delete(client, where, "f/g?recursive=true").status_code == 200
    assert names(client, where) == []
    assert run(where, "import os; print(sorted(os.listdir('.')))")["stdout"].count("'f'") == 1, "its directory stays"


def test_kinds_are_not_changed_by_a_put(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "file", b"1")
    put(client, where, "dir/file", b"1")
    run(where, "import os; os.symlink('dir', 'link'); os.symlink('file', 'flink')")
    before = client.get(f"/api/sessions/{where}").json()["version"]
    for path, word in [
        ("file/below", "'file' is a file"), ("dir", "'dir' is a directory"), ("link", "link"),
        ("link/file", "never followed"), ("flink", "link"),
    ]:  # fmt: skip
        refused(put(client, where, path, b"2"), 409, word)
    refused(get(client, where, "dir"), 409, "directory")
    refused(get(client, where, "link"), 409, "link", "not followed")
    refused(get(client, where, "link/file"), 409, "link", "never followed")
    refused(delete(client, where, "link/file"), 409, "link")
    refused(get(client, where, "file/below"), 404)
    assert client.get(f"/api/sessions/{where}").json()["version"] == before
    assert delete(client, where, "link").status_code == 200
    assert names(client, where) == ["dir/file", "file", "flink"]


# -- listing ----------------------------------------------------------------------------------------------------


def test_lists_come_in_pages(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    assert listed(client, where) == {
        "files": [], "count": 0, "total_count": 0, "total_size_bytes": 0, "next_cursor": None,
    }  # fmt: skip
    run(
        where,
        "import os\nopen('aa', 'w')\nfor d in 'ab':\n os.mkdir(d)\n for n in '01234': open(f'{d}/{n}', 'w').write('x')",
    )
    seen: list[str] = []
    cursor: str | None = None
    for _ in range(4):
        page = listed(client, where, limit=3, **({"cursor": cursor} if cursor else {}))
        assert (page["total_count"], page["total_size_bytes"], page["count"]) == (11, 10, len(page["files"]))
        seen += [file["path"] for file in page["files"]]
        cursor = page["next_cursor"]
    assert cursor is None
    assert seen == [*(f"a/{n}" for n in range(5)), "aa", *(f"b/{n}" for n in range(5))] == names(client, where)
    assert names(client, where, prefix="a") == seen[:6]
    assert names(client, where, prefix="b/") == seen[6:]
    assert names(client, where, prefix="b/3") == ["b/3"]
    assert (
        names(client, where, prefix="/b")
        == names(client, where, prefix="../")
        == names(client, where, prefix="c")
        == []
    )
    for bad in ("limit=0", "limit=1001", "limit=a", "cursor=!"):
        refused(client.get(f"/api/sessions/{where}/files?{bad}"), 400)


def test_a_page_goes_on_where_it_was_though_its_last_file_is_gone(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    for name in "abcd":
        put(client, where, name)
    page = listed(client, where, limit=2)
    delete(client, where, "b")
    put(client, where, "b/now-a-directory")
    assert names(client, where, cursor=page["next_cursor"]) == ["b/now-a-directory", "c", "d"]


def test_the_state_file_is_no_file(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(data={"n": 1})
    run(where, "print(open('.session_data.json').read())")
    assert names(client, where) == []
    for call in (put, get, delete):
        refused(call(client, where, ".session_data.json"), 400, "data", "PATCH")
    assert put(client, where, "d/.session_data.json", b"x").status_code == 200


def test_sessions_that_keep_no_files(client: httpx.Client, session: MakeSession) -> None:
    where = session(persistent=False)
    assert refused(put(client, where, "a", b"1"), 409, "persistent")["code"] == "not_persistent"
    assert names(client, where) == []


def test_no_session(client: httpx.Client) -> None:
    for answer in (put(client, "none", "a"), get(client, "none", "a"), delete(client, "none", "a")):
        refused(answer, 404, "session")
    refused(client.get("/api/sessions/none/files"), 404)


def test_files_need_the_key(own_server: MakeServer) -> None:
    server = own_server(api_key="secret")
    with server.client() as client:
        for method, path in [
            ("PUT", "files/a"),
            ("GET", "files/a"),
            ("GET", "files"),
            ("PUT", "archive"),
            ("GET", "archive"),
        ]:
            refused(client.request(method, f"/api/sessions/s/{path}"), 401)


# -- paths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../a", "a/../../b", "a/..", ".", "./a", "a//b", "a/", "a%00b", "a%5cb", "a\\b", "%2e%2e%2fa",
     "%2e%2e/a", "..%2fa", "%2fetc%2fpasswd", "%252e%252e%252fa", "a%255cb", "%ff", "%c0%ae%c0%ae/a",
     "%ed%a0%80", "a%", "%zz", "a" * 256, "/".join(["b" * 200] * 6)],
)  # fmt: skip
@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE", "HEAD"])
def test_bad_paths(client: httpx.Client, session: MakeSession, path: str, method: str) -> None:
    where = session()
    answer = raw(client, method, f"/api/sessions/{where}/files/{path}".encode())
    if method == "HEAD":
        assert answer.status_code == 400
    else:
        refused(answer, 400, "path")


def test_slashes_before_the_path_are_not_escaped(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    for path in (f"/api/sessions/{where}%2ffiles/a", f"/api/sessions/{where}/files%2fa"):
        refused(raw(client, "GET", path.encode()), 400, "slash")


def test_too_deep(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    assert put(client, where, "d/" * 128 + "f", b"1").status_code == 200
    refused(put(client, where, "e/" * 129 + "f", b"1"), 413, "128")
    refused(put(client, where, "e/" * 500 + "f", b"1"), 413, "128")
    assert run(where, "print(open('d/' * 128 + 'f').read())")["state"]["committed"]


def test_names_that_are_not_utf8(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    run(where, r"open(b'\xff\xfe', 'w').write('1'); open('\ufffd', 'w').write('22')")
    assert names(client, where) == ["\ufffd", "\ufffd\ufffd"]
    assert names(client, where, limit=1) == ["\ufffd"]
    cursor = listed(client, where, limit=1)["next_cursor"]
    assert names(client, where, cursor=cursor) == ["\ufffd\ufffd"]
    assert get(client, where, "%ef%bf%bd").content == b"22"
    refused(raw(client, "GET", f"/api/sessions/{where}/files/%ff%fe".encode()), 400, "UTF-8")
    refused(get(client, where, "%ef%bf%bd%ef%bf%bd"), 404)


# -- hostile runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host with a file that must be neither read nor changed."""
    directory = tmp_path / "canary"
    directory.mkdir()
    (directory / "secret").write_text("SECRET")
    directory.chmod(0o777)
    (directory / "secret").chmod(0o666)
    yield directory
    assert os.listdir(directory) == ["secret"]
    assert (directory / "secret").read_text() == "SECRET"


def test_links_to_the_host_are_never_followed(
    client: httpx.Client, session: MakeSession, run: Run, canary: Path
) -> None:
    where = session()
    run(where, f"import os; os.symlink('{canary}', 'd'); os.symlink('{canary}/secret', 'f'); os.symlink('/', 'root')")
    for path in ("d/secret", "d/new", "f", f"root{canary}/secret"):
        refused(get(client, where, path), 409, "link")
        refused(put(client, where, path, b"CHANGED"), 409, "link")
    for path in ("d/secret", f"root{canary}/secret"):
        refused(delete(client, where, path + "?recursive=true"), 409, "link")
    for path in ("d/", "f/", "d//secret"):
        for method in ("GET", "PUT", "DELETE"):
            refused(raw(client, method, f"/api/sessions/{where}/files/{path}".encode()), 400)
    assert names(client, where) == ["d", "f", "root"]
    assert b"SECRET" not in client.get(f"/api/sessions/{where}/archive").content
    assert run(where, "print(1)")["state"]["committed"]
    assert delete(client, where, "d?recursive=true").status_code == 200
    assert put(client, where, "d/secret", b"ours").status_code == 200
    assert run(where, "print(open('d/secret').read())")["stdout"] == "ours\n"


def test_links_swapped_while_clients_come_and_go(
    client: httpx.Client, session: MakeSession, run: Run, canary: Path
) -> None:
    where = session()
    put(client, where, "x/secret", b"ours")
    code = f"""
import os, shutil, time
end = time.time() + 3
while time.time() < end:
    shutil.rmtree('x', ignore_errors=True)
    os.symlink('{canary}', 'x')
    os.unlink('x')
    os.symlink('{canary}/secret', 'x')
    os.unlink('x')
    os.mkdir('x')
    os.symlink('{canary}/secret', 'x/secret')
    os.unlink('x/secret')
    open('x/secret', 'w').write('ours')
"""
    stop = threading.Event()

    def hammer(number: int) -> set[int]:
        statuses = set()
        with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False, verify=False) as own:
            while not stop.is_set():
                if number % 4 == 0:
                    answer = get(own, where, "x/secret")
                elif number % 4 == 1:
                    answer = put(own, where, "x/secret", b"ours")
                elif number % 4 == 2:
                    answer = own.get(f"/api/sessions/{where}/archive")
                else:
                    answer = delete(own, where, "x/secret")
                statuses.add(answer.status_code)
                assert b"SECRET" not in answer.content
        return statuses

    with ThreadPoolExecutor(8) as pool:
        hammers = [pool.submit(hammer, number) for number in range(8)]
        for _ in range(2):
            run(where, code)
        stop.set()
        assert set().union(*(each.result() for each in hammers)) <= {200, 404, 409}


def test_pipes_sockets_and_directories_in_the_place_of_a_file(
    client: httpx.Client, session: MakeSession, run: Run
) -> None:
    where = session()
    code = "import os, socket; os.mkfifo('pipe'); s = socket.socket(socket.AF_UNIX); s.bind('sock'); os.mkdir('dir')"
    for more in ("", "; [open(f'f{n}', 'w') for n in range(40)]"):
        assert run(where, f"import os; [os.unlink(n) for n in ('pipe', 'sock') if os.path.lexists(n)]; "
                   f"os.path.exists('dir') and os.rmdir('dir'); {code}{more}")["state"]["committed"]  # fmt: skip
        for path in ("pipe", "sock"):
            refused(get(client, where, path), 404)
            refused(delete(client, where, path), 404)
            assert put(client, where, path, b"a file").status_code == 200
        refused(put(client, where, "dir", b"a file"), 409, "directory")
        told = run(
            where, "import os; print(open('pipe').read(), open('sock').read()); os.unlink('pipe'); os.unlink('sock')"
        )
        assert told["stdout"] == "a file a file\n"


def test_hard_links_become_files_of_their_own(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    run(where, "import os; open('a', 'w').write('1'); os.link('a', 'b')")
    put(client, where, "a", b"2")
    told = run(where, "print(open('a').read(), open('b').read()); open('a', 'a').write('3')")
    assert told["stdout"] == "2 1\n"
    assert (get(client, where, "a").content, get(client, where, "b").content) == (b"23", b"1")


def test_modes_that_forbid_everything(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    run(where, "import os; os.mkdir('d'); open('d/f', 'w').write('1'); os.chmod('d/f', 0); os.chmod('d', 0)")
    assert get(client, where, "d/f").content == b"1"
    assert put(client, where, "d/f", b"2").status_code == 200
    assert put(client, where, "d/g", b"3").status_code == 200
    told = run(where, "import os; os.chmod('d', 0o700); print(oct(os.stat('d/f').st_mode), open('d/g').read())")
    assert told["stdout"] == "0o100000 3\n"
    assert delete(client, where, "d?recursive=true").status_code == 200
    assert names(client, where) == []


def test_what_runs_leave_beyond_the_bounds(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "kept", b"1")
    for code, word in [
        ("for n in range(9):\n with open(f's{n}', 'wb') as f: f.truncate(1 << 29)", "bytes"),
        ("import os\nfor n in range(10_000):\n os.mkdir('d'); os.chdir('d')", "deeper"),
    ]:
        told = run(where, code, timeout=60)
        assert not told["state"]["committed"]
        assert word in told["state"]["reason"]
        assert names(client, where) == ["kept"]
        assert put(client, where, "kept", b"1").status_code == 200
    told = run(where, "with open('s', 'wb') as f: f.truncate(8 << 40)")
    assert told["status"] != "ok"
    assert client.delete(f"/api/sessions/{where}").status_code == 200


def test_a_hundred_thousand_files(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    code = "import os\nfor d in range(10):\n os.mkdir(f'd{d}')\n for n in range(10_000): open(f'd{d}/{n}', 'w').close()"
    assert run(where, code, timeout=120)["state"]["committed"]
    started = time.monotonic()
    assert listed(client, where)["total_count"] == 100_000
    assert put(client, where, "d5/new", b"1").status_code == 200
    assert get(client, where, "d5/new").content == b"1"
    assert delete(client, where, "d5/new").status_code == 200
    assert time.monotonic() - started < 5
    assert delete(client, where, "d3?recursive=true").status_code == 200
    assert listed(client, where, prefix="d3/")["count"] == 0
    assert (
        run(where, "import os; print(len(os.listdir('d4')), os.path.exists('d3'))", timeout=60)["stdout"]
        == "10000 False\n"
    )


# -- bad days ---------------------------------------------------------------------------------------------------


def test_a_client_that_hangs_up_has_changed_nothing(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    put(client, where, "a", b"old")
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    for length in (1000, 10 * MIB):
        with socket.create_connection(address) as connection:
            head = f"PUT /api/sessions/{where}/files/a HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\n"
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + bytes(length - 1))
            time.sleep(0.1)
    with socket.create_connection(address) as connection:
        head = f"GET /api/sessions/{where}/files/a HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\n\r\n"
        connection.sendall(head.encode())
    uploads = server.data_dir / "uploads"
    assert eventually(lambda: not os.listdir(uploads))
    assert get(client, where, "a").content == b"old"
    assert client.get(f"/api/sessions/{where}").json()["version"] == 2


def test_a_disk_that_fails(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    put(client, where, "a", b"old")
    uploads = server.data_dir / "uploads"
    uploads.rename(server.data_dir / "away")
    try:
        for path in ("files/a", "archive"):
            refused(client.put(f"/api/sessions/{where}/{path}", content=bytes(MIB)), 503, "could not be kept")
    finally:
        (server.data_dir / "away").rename(uploads)
    assert get(client, where, "a").content == b"old"
    [file] = [
        path for path in (server.data_dir / "blobs").rglob("*") if path.name == hashlib.sha256(b"old").hexdigest()
    ]
    file.unlink()
    refused(get(client, where, "a"), 503, "could not be read")


def test_a_session_deleted_while_a_put_waits(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    with ThreadPoolExecutor() as pool:
        going = pool.submit(client.post, f"/api/sessions/{where}/run", json={"code": "import time; time.sleep(30)"})
        assert eventually(lambda: client.get(f"/api/sessions/{where}").json()["status"] == "running")
        waiting = pool.submit(put, client, where, "a", b"1")
        time.sleep(0.3)
        client.delete(f"/api/sessions/{where}")
        refused(waiting.result(), 404)
        going.result()
    session(session_id=where)
    assert names(client, where) == []


def test_kill_9_in_the_middle_of_a_put(own_server: MakeServer) -> None:
    """What was there before, or what was put: nothing in between, and nothing acknowledged is lost."""
    server = own_server(spares="0")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        put(client, "s", "a", b"0" * (2 * MIB))
    acknowledged = 0
    for round_number in range(8):
        tried = [acknowledged]

        def work(start: int = acknowledged, tried: list[int] = tried) -> None:
            with server.client() as own, suppress(httpx.TransportError):
                for number in range(start + 1, start + 1000):
                    tried.append(number)
                    assert put(own, "s", "a", str(number % 10).encode() * (2 * MIB)).status_code == 200
                    tried.pop(0)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.05 + 0.07 * round_number)
        server.stop(signal.SIGKILL)
        thread.join()
        server.start()
        assert os.listdir(server.data_dir / "uploads") == []
        with server.client() as client:
            content = get(client, "s", "a").content
            assert len(content) == 2 * MIB
            assert content == content[:1] * len(content)
            possible = [number for number in tried if number % 10 == int(content[:1])]
            assert possible, (content[:1], tried)
            acknowledged = possible[0]
    assert acknowledged > 0


def resident(server: Server, what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def up_and_down(server: Server, size: int) -> None:
    piece = os.urandom(MIB)

    def pieces() -> Iterator[bytes]:
        for number in range(size // MIB):
            yield number.to_bytes(8, "big") + piece[8:]

    expected = hashlib.sha256()
    for each in pieces():
        expected.update(each)
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "big"})
        put(client, "big", "warm", bytes(MIB))
        Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the peak starts anew
        before = resident(server, "VmRSS")
        answer = client.put("/api/sessions/big/files/a", content=pieces(), timeout=600)
        assert answer.json() == {"path": "a", "size": size}
        assert answer.headers["etag"] == f'"{expected.hexdigest()}"'
        for path in ("files/a", "archive"):
            got, found = 0, hashlib.sha256()
            with client.stream("GET", f"/api/sessions/big/{path}") as stream:
                for each in stream.iter_bytes(MIB):
                    got += len(each)
                    found.update(each)
            assert got >= size
            assert path == "archive" or found.hexdigest() == expected.hexdigest()
        with client.stream("GET", "/api/sessions/big/archive") as stream:
            client.put("/api/sessions/big/archive", content=stream.iter_bytes(MIB), timeout=600).raise_for_status()
        assert resident(server, "VmHWM") - before < 64 * MIB


def test_128_mib_up_and_down_in_flat_memory(own_server: MakeServer) -> None:
    up_and_down(own_server(spares="0"), 128 * MIB)


@pytest.mark.soak
def test_1_gib_up_and_down_in_flat_memory(own_server: MakeServer) -> None:
    up_and_down(own_server(spares="0"), 1024 * MIB)
