"""The files of a session over HTTP: what clients put, get, list and delete."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime

import httpx

from era.wire.files import FileAnswer, FileDeletedAnswer
from tests.api.answers import assert_recent, checked, refused
from tests.api.files_api import MIB, delete, get, listed, names, put
from tests.api.guest_servers import start_in_background
from tests.api.told import WAITS, tell
from tests.conftest import MakeSession, Run, Server, eventually
from tests.table import table


def test_a_file_goes_in_and_comes_out(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    content = bytes(range(256)) * 100
    answer = put(client, where, "dir/sub/data.bin", content)
    body = checked(answer, FileAnswer, {"path", "size"})
    assert body == {"path": "dir/sub/data.bin", "size": 25600}
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    assert answer.headers["etag"] == etag

    fetched = get(client, where, "dir/sub/data.bin")
    assert (fetched.status_code, fetched.content) == (200, content)
    assert fetched.headers["content-length"] == "25600"
    assert fetched.headers["etag"] == etag
    assert fetched.headers["accept-ranges"] == "bytes"
    assert abs(parsedate_to_datetime(fetched.headers["last-modified"]).timestamp() - time.time()) < 60
    head = client.head(f"/api/sessions/{where}/files/dir/sub/data.bin")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers.items() - fetched.headers.items() <= {("x-request-id", head.headers["x-request-id"])} | {
        ("date", head.headers["date"])
    }

    [file] = listed(client, where)["files"]
    assert (file["path"], file["size"], file["uploaded"]) == ("dir/sub/data.bin", 25600, True)
    assert_recent(file["modified_at"])
    shown = client.get(f"/api/sessions/{where}").json()
    assert (shown["file_count"], shown["total_size_bytes"], shown["version"]) == (1, 25600, 2)
    [version, _] = client.get(f"/api/sessions/{where}/versions").json()["versions"]
    assert (version["cause"], version["run_id"]) == ("files", None)


@table("size", [0, 1, (64 << 10) - 1, 64 << 10, MIB, MIB + 1])
def test_files_of_any_size_chunked_or_not(client: httpx.Client, session: MakeSession, size: int) -> None:
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


def test_too_large_a_length_is_refused_before_the_body(
    client: httpx.Client, session: MakeSession, server: Server
) -> None:
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
    outcome = run(where, "print(open('in/a.txt').read()); open('out.txt', 'w').write('made')")
    assert outcome["stdout"] == "one\n"
    assert get(client, where, "out.txt").content == b"made"
    put(client, where, "in/a.txt", b"two")
    outcome = run(where, "print(open('in/a.txt').read()); open('in/a.txt', 'a').write(' and more')")
    assert outcome["stdout"] == "two\n"
    assert get(client, where, "in/a.txt").content == b"two and more"
    assert {file["path"]: file["uploaded"] for file in listed(client, where)["files"]} == {
        "in/a.txt": False,
        "out.txt": False,
    }
    client.post(f"/api/sessions/{where}/rollback", json={"version": 2})
    assert get(client, where, "in/a.txt").content == b"one"
    assert listed(client, where)["files"][0]["uploaded"]
    refused(get(client, where, "out.txt"), 404)
    outcome = run(where, "import os; print(open('in/a.txt').read(), os.path.exists('out.txt'))")
    assert outcome["stdout"] == "one False\n"
    assert listed(client, where)["files"][0]["uploaded"], "a run that only reads changes nothing"


def test_a_file_during_a_run_is_the_committed_one(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "a", b"old")
    with ThreadPoolExecutor() as pool:
        going = pool.submit(run, where, "open('a', 'w').write('new')\n" + WAITS, timeout=120)
        assert eventually(lambda: client.get(f"/api/sessions/{where}").json()["status"] == "running")
        time.sleep(0.3)
        assert get(client, where, "a").content == b"old"
        waiting = pool.submit(put, client, where, "a", b"newest")
        time.sleep(0.2)
        assert not waiting.done(), "a put waits for the run"
        tell(client)
        going.result()
        waiting.result()
    assert get(client, where, "a").content == b"newest"
    assert run(where, "print(open('a').read())")["stdout"] == "newest\n"


def test_files_and_directories_can_be_deleted(client: httpx.Client, session: MakeSession, run: Run) -> None:
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


def test_a_put_replaces_no_directory_or_link(client: httpx.Client, session: MakeSession, run: Run) -> None:
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


def test_lists_of_files_come_in_pages(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    assert listed(client, where) == {
        "files": [], "count": 0, "total_count": 0, "total_size_bytes": 0, "next_cursor": None,
    }  # fmt: skip
    run(
        where,
        "import os\nopen('aa', 'w')\nfor d in 'ab':\n os.mkdir(d)\n for n in '01234': open(f'{d}/{n}', 'w').write('x')",
    )
    paths: list[str] = []
    cursor: str | None = None
    for _ in range(4):
        page = listed(client, where, limit=3, **({"cursor": cursor} if cursor else {}))
        assert (page["total_count"], page["total_size_bytes"], page["count"]) == (11, 10, len(page["files"]))
        paths += [file["path"] for file in page["files"]]
        cursor = page["next_cursor"]
    assert cursor is None
    assert paths == [*(f"a/{n}" for n in range(5)), "aa", *(f"b/{n}" for n in range(5))] == names(client, where)
    assert names(client, where, prefix="a") == paths[:6]
    assert names(client, where, prefix="b/") == paths[6:]
    assert names(client, where, prefix="b/3") == ["b/3"]
    assert (
        names(client, where, prefix="/b")
        == names(client, where, prefix="../")
        == names(client, where, prefix="c")
        == []
    )
    for bad in ("limit=0", "limit=1001", "limit=a", "cursor=!"):
        refused(client.get(f"/api/sessions/{where}/files?{bad}"), 400)


def test_the_state_file_is_not_one_of_the_files(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(data={"n": 1})
    run(where, "print(open('.session_data.json').read())")
    assert names(client, where) == []
    for call in (put, get, delete):
        refused(call(client, where, ".session_data.json"), 400, "data", "PATCH")
    assert put(client, where, "d/.session_data.json", b"x").status_code == 200


def test_nothing_is_put_where_the_next_run_would_drop_it(client: httpx.Client, session: MakeSession, run: Run) -> None:
    """Below the state file: its directory would give way to it."""
    where = session()
    assert put(client, where, "a", b"1").status_code == 200
    refused(put(client, where, ".session_data.json/a", b"1"), 400, "data", "PATCH")
    for call, body in (
        ("move", {"from": "a", "to": ".session_data.json/a"}),
        ("mkdir", {"path": ".session_data.json/d"}),
    ):
        refused(client.post(f"/api/sessions/{where}/{call}", json=body), 400, "data", "PATCH")
    run(where, "open('b', 'w').close()")
    assert names(client, where) == ["a", "b"]


def test_a_put_during_a_run_is_answered_at_once_if_asked_to(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    put(client, where, "old", b"1")
    run_id = start_in_background(client, where, "import time; time.sleep(600)")
    assert eventually(lambda: client.get(f"/api/sessions/{where}").json()["status"] == "running")
    for method, path in (("PUT", "files/a"), ("DELETE", "files/old"), ("PUT", "archive")):
        content, kind = b"" if method == "PUT" else None, {"content-type": "application/x-tar"}
        answer = client.request(method, f"/api/sessions/{where}/{path}?wait=false", content=content, headers=kind)
        problem = refused(answer, 409, where, "wait=false", "DELETE /api/sessions/{id}/runs/{run_id}")
        assert problem["code"] == "run_under_way"
    assert names(client, where) == ["old"]
    # The way out that it names:
    assert client.get(f"/api/sessions/{where}/runs?limit=1").json()["runs"][0]["run_id"] == run_id
    assert client.delete(f"/api/sessions/{where}/runs/{run_id}").status_code == 200
    assert client.put(f"/api/sessions/{where}/files/a?wait=false", content=b"x").status_code == 200
