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
import pytest

from era.wire.files import FileAnswer, FileDeletedAnswer
from tests.api.answers import assert_recent, checked, refused
from tests.api.files_api import MIB, delete, get, listed, names, put
from tests.api.guest_servers import start_in_background
from tests.api.told import WAITS, tell
from tests.conftest import MakeServer, MakeSession, Run, Server, at_best, eventually
from tests.soaking import soak_the_rest


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


@pytest.mark.parametrize("size", [0, 1, (64 << 10) - 1, 64 << 10, MIB, MIB + 1])
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


def test_a_file_may_be_larger_than_other_bodies(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    content = os.urandom(17 * MIB)
    assert put(client, where, "a", content).json()["size"] == len(content)
    assert hashlib.sha256(get(client, where, "a").content).digest() == hashlib.sha256(content).digest()
    refused(client.put(f"/api/sessions/{where}/code", content=content), 413)


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


def test_a_run_sees_and_may_change_what_was_put(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "d/script.sh", b"#!/bin/sh\necho ran\n")
    run(where, "import os; os.chmod('d/script.sh', 0o755); os.rename('d', 'e'); open('e/new', 'w')")
    put(client, where, "e/script.sh", b"#!/bin/sh\necho again\n")
    outcome = run(
        where, "import os, subprocess; print(oct(os.stat('e').st_mode)); print(subprocess.getoutput('e/script.sh'))"
    )
    assert outcome["stdout"] == "0o40755\nagain\n", "a file put keeps the mode that was there"


def test_a_file_may_have_the_name_of_the_program(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "main.py", b"X = 41\n")
    assert run(where, "import main; print(main.X + 1)")["stdout"] == "42\n"
    assert get(client, where, "main.py").content == b"X = 41\n"


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


def test_puts_and_runs_at_once_come_one_after_the_other(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "a", b"x" * 1000)

    def read(number: int) -> str:
        code = f"text = open('a').read(); print(text[0] * 1000 == text); open('of run {number}', 'w')"
        return str(run(where, code)["stdout"])

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


def test_paging_goes_on_after_a_file_that_was_deleted(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    for name in "abcd":
        put(client, where, name)
    page = listed(client, where, limit=2)
    delete(client, where, "b")
    put(client, where, "b/now-a-directory")
    assert names(client, where, cursor=page["next_cursor"]) == ["b/now-a-directory", "c", "d"]


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


def test_sessions_that_are_not_persistent_take_no_files(client: httpx.Client, session: MakeSession) -> None:
    where = session(persistent=False)
    assert refused(put(client, where, "a", b"1"), 409, "persistent")["code"] == "not_persistent"
    assert names(client, where) == []


def test_files_of_a_missing_session_are_404(client: httpx.Client) -> None:
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


@pytest.mark.parametrize("each", soak_the_rest([500, 2_000, 10_000], 1))
def test_files_of_a_session_with_very_many(client: httpx.Client, session: MakeSession, run: Run, each: int) -> None:
    where = session()
    code = f"""
import os
for d in range(10):
    os.mkdir(f'd{{d}}')
    for n in range({each}): open(f'd{{d}}/{{n}}', 'w').close()
"""
    client.timeout = httpx.Timeout(300)
    assert run(where, code, timeout=120)["state"]["committed"]

    def use() -> float:
        started = time.monotonic()
        assert listed(client, where)["total_count"] == 10 * each
        assert put(client, where, "d5/new", b"1").status_code == 200
        assert get(client, where, "d5/new").content == b"1"
        assert delete(client, where, "d5/new").status_code == 200
        return time.monotonic() - started

    assert at_best(5, use) < 5
    assert delete(client, where, "d3?recursive=true").status_code == 200
    assert listed(client, where, prefix="d3/")["count"] == 0
    assert (
        run(where, "import os; print(len(os.listdir('d4')), os.path.exists('d3'))", timeout=60)["stdout"]
        == f"{each} False\n"
    )


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


def test_a_put_at_once_waits_for_other_puts(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    with ThreadPoolExecutor(8) as pool:
        urls = [f"/api/sessions/{where}/files/f{n}?wait=false" for n in range(24)]
        assert [answer.status_code for answer in pool.map(lambda url: client.put(url, content=b"x"), urls)] == [
            200
        ] * 24
