"""Hostile paths of clients, and links, pipes and modes that hostile runs put in the place of files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.api.answers import refused
from tests.api.files_api import delete, get, listed, names, put, raw
from tests.conftest import MakeSession, Run
from tests.soaking import soak_the_rest
from tests.table import table

BAD_PATHS = [
    "",
    "/etc/passwd",
    "../a",
    "a/../../b",
    "a/..",
    ".",
    "./a",
    "a//b",
    "a/",
    "a%00b",
    "a%5cb",
    "a\\b",
    "%2e%2e%2fa",
    "%2e%2e/a",
    "..%2fa",
    "%2fetc%2fpasswd",
    "%252e%252e%252fa",
    "a%255cb",
    "%ff",
    "%c0%ae%c0%ae/a",
    "%ed%a0%80",
    "a%",
    "%zz",
    "a" * 256,
    "/".join(["b" * 200] * 6),
]


@table("path", BAD_PATHS)
@table("method", ["PUT", "GET", "DELETE", "HEAD"])
def test_bad_paths_are_refused(client: httpx.Client, session: MakeSession, path: str, method: str) -> None:
    where = session()
    answer = raw(client, method, f"/api/sessions/{where}/files/{path}".encode())
    if method == "HEAD":
        assert answer.status_code == 400
    else:
        refused(answer, 400, "path")


def test_escaped_slashes_before_the_path_are_refused(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    for path in (f"/api/sessions/{where}%2ffiles/a", f"/api/sessions/{where}/files%2fa"):
        refused(raw(client, "GET", path.encode()), 400, "slash")


def test_paths_that_are_too_deep_are_refused(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    assert put(client, where, "d/" * 128 + "f", b"1").status_code == 200
    refused(put(client, where, "e/" * 129 + "f", b"1"), 413, "128")
    refused(put(client, where, "e/" * 500 + "f", b"1"), 413, "128")
    assert run(where, "print(open('d/' * 128 + 'f').read())")["state"]["committed"]


def test_names_that_are_not_utf8_are_listed_but_not_addressable(
    client: httpx.Client, session: MakeSession, run: Run
) -> None:
    where = session()
    run(where, r"open(b'\xff\xfe', 'w').write('1'); open('\ufffd', 'w').write('22')")
    assert names(client, where) == ["\ufffd", "\ufffd\ufffd"]
    assert names(client, where, limit=1) == ["\ufffd"]
    cursor = listed(client, where, limit=1)["next_cursor"]
    assert names(client, where, cursor=cursor) == ["\ufffd\ufffd"]
    assert get(client, where, "%ef%bf%bd").content == b"22"
    refused(raw(client, "GET", f"/api/sessions/{where}/files/%ff%fe".encode()), 400, "UTF-8")
    refused(get(client, where, "%ef%bf%bd%ef%bf%bd"), 404)


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


@pytest.mark.parametrize("rounds", soak_the_rest([1, 4], 1))
def test_links_swapped_during_requests_are_never_followed(
    client: httpx.Client, session: MakeSession, run: Run, canary: Path, rounds: int
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
        for _ in range(rounds):
            run(where, code)
        stop.set()
        assert set().union(*(each.result() for each in hammers)) <= {200, 404, 409}


def test_pipes_and_sockets_are_no_files_and_directories_stay(
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
        outcome = run(
            where, "import os; print(open('pipe').read(), open('sock').read()); os.unlink('pipe'); os.unlink('sock')"
        )
        assert outcome["stdout"] == "a file a file\n"


def test_runs_that_exceed_the_bounds_commit_nothing(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    put(client, where, "kept", b"1")
    for code, word in [
        ("for n in range(9):\n with open(f's{n}', 'wb') as f: f.truncate(1 << 29)", "bytes"),
        ("import os\nfor n in range(10_000):\n os.mkdir('d'); os.chdir('d')", "deeper"),
    ]:
        outcome = run(where, code, timeout=60)
        assert not outcome["state"]["committed"]
        assert word in outcome["state"]["reason"]
        assert names(client, where) == ["kept"]
        assert put(client, where, "kept", b"1").status_code == 200
    outcome = run(where, "with open('s', 'wb') as f: f.truncate(8 << 40)")
    assert outcome["status"] != "ok"
    assert client.delete(f"/api/sessions/{where}").status_code == 200
