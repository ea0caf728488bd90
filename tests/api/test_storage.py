# ruff: noqa: E501  programs are as their users write them
"""Storage shared by sessions: over HTTP, and inside by the clients that every session has."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.conftest import MakeServer, Server, eventually
from tests.gvisor import BOTH_KINDS
from tests.soaking import soak_the_rest
from tests.table import table

LANGUAGES = ("python", "node", "typescript")
NOTHING_ELSE = """
import os, socket
host, port = os.environ['ERA_STORAGE_URL'].removeprefix('http://').split(':')
def get(path, *headers):
    with socket.create_connection((host, int(port)), 5) as s:
        s.sendall(f'GET {path} HTTP/1.1\\r\\nHost: {host}:{port}\\r\\nConnection: close\\r\\n'.encode() + b''.join(headers) + b'\\r\\n')
        return int(s.makefile('rb').readline().split()[1])
for path in PATHS: print(get(path))
"""


class StorageUser:
    """Sessions without internet, one for each language, and a client of the API."""

    def __init__(self, server: Server) -> None:
        self.client = server.client()
        self.made: dict[str, str] = {}

    def session(self, language: str, **fields: Any) -> str:
        if language not in self.made:
            body = {"language": language, "allowInternetAccess": False, **fields}
            answer = self.client.post("/api/sessions", json=body)
            assert answer.status_code == 201, answer.text
            self.made[language] = answer.json()["id"]
        return self.made[language]

    def run(self, language: str, code: str, **fields: Any) -> dict[str, Any]:
        answer = self.client.post(f"/api/sessions/{self.session(language)}/run", json={"code": code, **fields})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def says(self, language: str, code: str, **fields: Any) -> str:
        """Run a program that must succeed; returns what it prints."""
        outcome = self.run(language, code, **fields)
        assert outcome["status"] == "ok", outcome
        printed: str = outcome["stdout"]
        return printed

    def close(self) -> None:
        for session in self.made.values():
            self.client.delete(f"/api/sessions/{session}?purge=true")
        self.client.close()


@pytest.fixture(scope="module")
def inside(shared_server: Server) -> Iterator[StorageUser]:
    """One user of the storage for all tests of this module."""
    user = StorageUser(shared_server)
    yield user
    user.close()


@pytest.fixture
def api(inside: StorageUser) -> Iterator[httpx.Client]:
    """The user's client; the storage is emptied after the test."""
    yield inside.client
    for kind in ("kv", "r2", "d1"):
        for namespace in ("app", "other"):
            assert inside.client.delete(f"/api/storage/{kind}/{namespace}").status_code == 200


# -- as users write it ------------------------------------------------------------------------------------------

PROGRAMS = {
    "python": """
import era_storage
import json
print(era_storage.kv.set("app", "user:123", json.dumps({"name": "Mina"}), {"plan": "free"}))
print(json.loads(era_storage.kv.get("app", "user:123"))["name"], era_storage.kv.get("app", "user:124"))
print([key["name"] for key in era_storage.kv.list("app", prefix="user:", limit=100)])
era_storage.d1.exec("app", '''
    CREATE TABLE IF NOT EXISTS todos (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        title TEXT NOT NULL,
        done BOOLEAN DEFAULT 0
    )
''')
era_storage.d1.exec("app", "INSERT INTO todos (title) VALUES (?)", ["Water the ferns"])
for todo in era_storage.d1.query("app", "SELECT * FROM todos WHERE done = ?", [0]):
    print(f"Todo: {todo['title']}")
print(era_storage.r2.put("app", "img/7.jpg", bytes(range(256)), metadata={"by": "mina"}))
print(era_storage.r2.get("app", "img/7.jpg") == bytes(range(256)), era_storage.r2.get("app", "none"))
print([(one["key"], one["size"]) for one in era_storage.r2.list("app", prefix="img/", limit=50)])
print(era_storage.kv.delete("app", "user:123"), era_storage.r2.delete("app", "img/7.jpg"))
""",
    "node": """
const { KVStorage, D1Storage, R2Storage } = require('./era_storage.js');
(async () => {
  console.log(await KVStorage.set('app', 'user:123', JSON.stringify({ name: 'Mina' }), { plan: 'free' }));
  console.log(JSON.parse(await KVStorage.get('app', 'user:123')).name, await KVStorage.get('app', 'user:124'));
  console.log((await KVStorage.list('app', 'user:', 100)).map((key) => key.name));
  await D1Storage.exec('app', `
    CREATE TABLE IF NOT EXISTS todos (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        title TEXT NOT NULL,
        done BOOLEAN DEFAULT 0
    )
  `);
  await D1Storage.exec('app', 'INSERT INTO todos (title) VALUES (?)', ['Water the ferns']);
  for (const todo of await D1Storage.query('app', 'SELECT * FROM todos WHERE done = ?', [0])) console.log(`Todo: ${todo.title}`);
  const bytes = Buffer.from([...Array(256).keys()]);
  console.log(await R2Storage.put('app', 'img/7.jpg', bytes, { by: 'mina' }));
  console.log((await R2Storage.get('app', 'img/7.jpg')).equals(bytes), await R2Storage.get('app', 'none'));
  console.log((await R2Storage.list('app', 'img/', 50)).map((one) => [one.key, one.size]));
  console.log(await KVStorage.delete('app', 'user:123'), await R2Storage.delete('app', 'img/7.jpg'));
})();
""",
}
PROGRAMS["typescript"] = (
    PROGRAMS["node"]
    .replace(
        "const { KVStorage, D1Storage, R2Storage } = require('./era_storage.js');",
        "import { KVStorage, D1Storage, R2Storage } from './era_storage.js';\nconst limit: number = 100;",
    )
    .replace("100))", "limit))")
)
PRINTED = {
    "python": "True\nMina None\n['user:123']\nTodo: Water the ferns\nTrue\nTrue None\n[('img/7.jpg', 256)]\nTrue True\n",
    "node": "true\nMina null\n[ 'user:123' ]\nTodo: Water the ferns\ntrue\ntrue null\n[ [ 'img/7.jpg', 256 ] ]\ntrue true\n",
}


@pytest.mark.parametrize(
    ("language", "env"),
    [
        ("python", {}),
        ("python", {"PYTHONHASHSEED": "0"}),
        ("node", {"NODE_OPTIONS": "--stack-trace-limit=5"}),
        ("typescript", {}),
    ],
    ids=str,
)
def test_programs_use_the_storage_without_internet_and_without_a_key(
    inside: StorageUser, api: httpx.Client, language: str, env: dict[str, str]
) -> None:
    assert inside.says(language, PROGRAMS[language], env=env) == PRINTED.get(language, PRINTED["node"])
    rows = api.post("/api/storage/d1/app/query", json={"sql": "SELECT title FROM todos"}).json()["results"]
    assert rows == [{"title": "Water the ferns"}]


def test_sessions_share_what_is_in_a_namespace(inside: StorageUser, api: httpx.Client) -> None:
    inside.says("python", "import era_storage; era_storage.kv.set('app', 'from', 'python')")
    code = "require('./era_storage.js').KVStorage.get('app', 'from').then(console.log)"
    assert inside.says("node", code) == "python\n"
    assert api.get("/api/storage/kv/app/from").json() == {"value": "python", "metadata": None}


def test_refusals_become_exceptions_with_a_message(inside: StorageUser) -> None:
    outcome = inside.run("python", "import era_storage; era_storage.d1.query('app', 'SELECT * FROM nowhere')")
    assert outcome["status"] == "failed"
    assert "StorageError: SQL: no such table: nowhere." in outcome["stderr"]
    code = "require('./era_storage.js').KVStorage.set('a/b', 'k', 'v').catch((e) => console.log(e.status, e.code))"
    assert inside.says("node", code) == "400 bad_namespace\n"


NO_KEY = {
    "python": """
import era_storage
for get in (era_storage.kv.get, era_storage.r2.get, era_storage.kv.delete):
    try: print(get('app', ''))
    except era_storage.StorageError as error: print(error.status, error.code)
""",
    "node": """
const { KVStorage, R2Storage } = require('./era_storage.js');
(async () => {
  for (const get of [KVStorage.get, R2Storage.get, KVStorage.delete])
    await get('app', '').then(console.log, (error) => console.log(error.status, error.code));
})();
""",
}


@table("language", NO_KEY)
def test_an_empty_key_is_refused_in_programs(inside: StorageUser, api: httpx.Client, language: str) -> None:
    """Its path would be that of the namespace, whose keys are listed."""
    assert inside.says(language, NO_KEY[language]) == "400 bad_key\n" * 3


def test_a_result_of_sql_is_json_whatever_is_in_it_and_however_long(api: httpx.Client) -> None:
    """It is passed on as it comes from the worker, in pieces."""
    hard = 'é\x01"'
    text = "replace(hex(zeroblob(:n)), '00', 'é' || char(1) || '\"')"
    for size in (0, 1, 100_000, 300_000):
        sql = f'SELECT zeroblob(:n) AS b, {text} AS "é""", 9e999 AS inf, :bytes AS given'
        answer = api.post("/api/storage/d1/app/query", json={"sql": sql, "params": {"n": size, "bytes": [0, 255]}})
        assert answer.headers["content-type"] == "application/json"
        assert int(answer.headers["content-length"]) == len(answer.content)
        told = json.loads(answer.content)
        assert list(told) == ["success", "results", "meta"]
        assert told["success"] is True
        assert told["results"] == [{"b": [0] * size, 'é"': hard * size, "inf": None, "given": [0, 255]}]
        assert told["meta"].keys() == {"changes", "last_row_id", "changed_db", "size_after", "duration"}


@table("language", ["python", "node"])
def test_programs_get_long_results_of_sql(inside: StorageUser, api: httpx.Client, language: str) -> None:
    sql = "SELECT zeroblob(300000) AS b"
    code = {
        "python": f"import era_storage; print(len(era_storage.d1.query('app', '{sql}')[0]['b']))",
        "node": f"require('./era_storage.js').D1Storage.query('app', '{sql}').then((rows) => console.log(rows[0].b.length))",
    }
    assert inside.says(language, code[language]) == "300000\n"


# -- where the clients are ----------------------------------------------------------------------------------------


@table("language", LANGUAGES)
def test_the_clients_are_no_files_of_the_session(inside: StorageUser, api: httpx.Client, language: str) -> None:
    inside.says(language, PROGRAMS[language])
    files = api.get(f"/api/sessions/{inside.session(language)}/files").json()["files"]
    assert files == []


def test_modules_in_directories_find_the_clients(inside: StorageUser, api: httpx.Client) -> None:
    files = {
        "python": (
            "lib/db.py",
            "import era_storage\ndef get(k): return era_storage.kv.get('app', k)",
            "from lib.db import get\nprint(get('k'))",
        ),
        "node": (
            "lib/db.js",
            "const { KVStorage } = require('../era_storage.js');\nconst near = require('./era_storage.js');\nmodule.exports = (k) => near.KVStorage === KVStorage && KVStorage.get('app', k);",
            "require('./lib/db.js')('k').then(console.log)",
        ),
        "typescript": (
            "lib/db.ts",
            "import { KVStorage } from '../era_storage.js';\nexport const get = (k: string): Promise<string> => KVStorage.get('app', k);",
            "// with era_storage\nimport { get } from './lib/db.ts';\nconsole.log(await get('k'));",
        ),
    }
    api.put("/api/storage/kv/app/k", json={"value": "deep"})
    for language, (path, content, code) in files.items():
        url = f"/api/sessions/{inside.session(language)}/files/lib"
        assert api.put(f"{url}/{path.removeprefix('lib/')}", content=content).status_code == 200
        assert inside.says(language, code) == "deep\n", language
        assert api.delete(url, params={"recursive": "true"}).status_code == 200


@pytest.mark.parametrize(
    "env", [{}, {"PYTHONHASHSEED": "0", "NODE_OPTIONS": "--stack-trace-limit=5"}], ids=["warm", "cold"]
)
def test_a_file_of_the_users_own_wins(inside: StorageUser, api: httpx.Client, env: dict[str, str]) -> None:
    own = {
        "python": ("era_storage.py", "mine = 'mine'", "import era_storage; print(era_storage.mine)"),
        "node": (
            "era_storage.js",
            "module.exports = 'mine'",
            "console.log(require('./era_storage.js'), require('./era_storage'))",
        ),
        "typescript": (
            "era_storage.js",
            "module.exports = 'mine'",
            "import mine from './era_storage.js'; console.log(mine)",
        ),
    }
    for language, (name, content, code) in own.items():
        url = f"/api/sessions/{inside.session(language)}/files/{name}"
        assert api.put(url, content=content).status_code == 200
        assert set(inside.says(language, code, env=env).split()) == {"mine"}
        assert api.get(url).text == content
        assert api.delete(url).status_code == 200


# -- HTTP -------------------------------------------------------------------------------------------------------


def test_keys_may_hold_anything(api: httpx.Client) -> None:
    keys = ["a/b:c", "a//b", "/", "..", "a/../b", "%2F", "q?x=1#y", "line\nbreak", "é😀", " ", "+", "x" * 1024]
    for key in keys:
        path = f"/api/storage/kv/app/{quote(key, safe='')}"
        assert raw(api, "PUT", path, {"value": key})[0] == 200, key
        assert raw(api, "GET", path)[1]["value"] == key
    listed = [one["name"] for one in api.get("/api/storage/kv/app").json()["keys"]]
    assert sorted(listed) == sorted(keys)
    assert raw(api, "GET", "/api/storage/kv/app/a/b:c")[1]["value"] == "a/b:c"


def raw(api: httpx.Client, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Send a request whose path goes out as it is; httpx would normalise it."""
    content = b"" if body is None else json.dumps(body).encode()
    host, port = api.base_url.host, api.base_url.port or 80
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, port), 10) as sock:
        sock.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    head_of, _, rest = answer.partition(b"\r\n\r\n")
    return int(head_of.split()[1]), json.loads(rest)


@table("path", [
        "kv/../app/k", "kv/%2e%2e/k", "kv/a%2Fb/k", "kv/a%00/k", "kv/%ff/k", "kv/app/%ff", "kv/app/a%00b", "kv/app/",
        f"kv/app/{'x' * 1025}", f"kv/{'n' * 65}/k", "kv/.app/k", "r2/..%2F..%2Fetc/passwd", "d1/..%2Fera/query",
        "d1/..%2F..%2F..%2Fera.sqlite/query", "d1//query", "kv//k",
        "kv/:a/k", "kv/a%20b/k", "kv/a%0A/k", "kv/%C3%A9/k", f"kv/app/{'%C3%A9' * 513}", "d1/a%00/query",
    ])  # fmt: skip
def test_invalid_namespaces_and_keys_are_refused(api: httpx.Client, path: str) -> None:
    if path.startswith("d1"):
        status, error = raw(api, "POST", f"/api/storage/{path}", {"sql": "SELECT 1"})
    else:
        body = {"value": "v"} if path.startswith("kv") else {"content": ""}
        status, error = raw(api, "PUT", f"/api/storage/{path}", body)
    assert status in (400, 404), error
    assert error["hint"]


@table(
    "path, body, status",
    [
        ("kv/app/k", {"value": 1}, 400),
        ("kv/app/k", {}, 400),
        ("kv/app/k", {"value": "v", "more": 1}, 400),
        ("kv/app/k", {"value": "v", "metadata": []}, 400),
        ("kv/app/k", {"value": "v", "metadata": {"m": "x" * 9000}}, 413),
        ("kv/app/k", {"value": "x" * ((1 << 20) + 1)}, 413),
        ("r2/app/k", {"content": "no base64!"}, 400),
        ("r2/app/k", {"content": base64.b64encode(bytes((10 << 20) + 1)).decode()}, 413),
        ("d1/app/query", {"sql": "SELECT ?", "params": [[1, 300]]}, 400),
        ("d1/app/query", {"sql": "SELECT ?", "params": [[1, "2"]]}, 400),
        ("d1/app/query", {"sql": "SELECT :a", "params": {"a": [False]}}, 400),
        ("d1/app/query", {"sql": "SELECT ?", "params": [{"a": 1}]}, 400),
        ("d1/app/query", {"sql": "SELECT ?", "params": [1 << 70]}, 400),
        ("d1/app/query", {"sql": "SELECT 1; SELECT 2"}, 400),
        ("d1/app/exec", {"sql": "SELECT ?; SELECT 2", "params": [1]}, 400),
        ("d1/app/query", {"sql": "ATTACH '/etc/passwd' AS p"}, 403),
        ("d1/app/query", {"sql": "SELECT zeroblob(1000000000)"}, 413),
    ],
)
def test_invalid_and_too_large_requests_are_refused(api: httpx.Client, path: str, body: Any, status: int) -> None:
    method = "POST" if path.startswith("d1") else "PUT"
    answer = api.request(method, f"/api/storage/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["hint"]
    assert api.get("/api/storage/kv/app").json()["keys"] == []


@pytest.mark.parametrize("uid", soak_the_rest([54_321, None], 1), ids=["ordinary user", "own user"])
def test_what_was_acknowledged_outlives_a_kill_and_programs_need_no_key(
    own_server: MakeServer, uid: int | None
) -> None:
    """Also on a server of an ordinary user if the tests run as root; all other tests here use the tests' own user."""
    server = own_server(uid=uid if os.geteuid() == 0 else None, api_key="sesame")
    long = base64.b64encode(b"long" * 20_000).decode()
    with server.client() as client:
        assert client.get("/api/storage/kv/app").status_code == 401
        client.headers["Authorization"] = "Bearer sesame"
        code = "import os, era_storage\nera_storage.kv.set('app', 'k', 'v')\nprint([k for k, v in os.environ.items() if 'sesame' in v])"
        body = {"language": "python", "code": code, "allowInternetAccess": False}
        assert client.post("/api/execute", json=body).json()["stdout"] == "[]\n"
        assert client.put("/api/storage/r2/app/k", json={"content": long}).status_code == 200
        sql = "CREATE TABLE t (x); INSERT INTO t VALUES (1)"
        assert client.post("/api/storage/d1/app/exec", json={"sql": sql}).status_code == 200
    server.stop(signal.SIGKILL)
    server.start()
    with server.client(headers={"Authorization": "Bearer sesame"}) as client:
        assert client.get("/api/storage/kv/app/k").json()["value"] == "v"
        assert client.get("/api/storage/r2/app/k").json()["content"] == long
        assert client.post("/api/storage/d1/app/query", json={"sql": "SELECT x FROM t"}).json()["results"] == [{"x": 1}]


# -- hostile ----------------------------------------------------------------------------------------------------


def test_no_other_route_is_served_inside(inside: StorageUser, api: httpx.Client) -> None:
    """The paths answer 200 outside, so a guest listener that served them would too."""
    paths = ["/api/sessions", "/health", "/metrics", "/openapi.json", "/docs", "/api/resources/list", "/"]
    paths.append(f"/proxy/{inside.session('python')}/80/")
    for path in paths[:-1]:
        assert api.get(path).status_code == 200, path
    seen = inside.says("python", NOTHING_ELSE.replace("PATHS", repr([*paths, "/api/storage/kv/app"])))
    assert seen.split() == ["404"] * len(paths) + ["200"]


def test_no_connection_outlives_its_run(inside: StorageUser, shared_server: Server, api: httpx.Client) -> None:
    """Connections that a program leaves open end with its run, and the next run can connect again."""
    leave = "import os, socket\nhost, port = os.environ['ERA_STORAGE_URL'].removeprefix('http://').split(':')\nmany = [socket.create_connection((host, int(port))) for _ in range(30)]\nmany[0].sendall(b'PUT /api/storage/kv/app/late HTTP/1.1\\r\\nContent-Length: 20\\r\\n')\nos._exit(0)"
    for _ in range(3):
        assert inside.run("python", leave)["status"] == "ok"
    assert inside.says("python", "import era_storage; print(era_storage.kv.list('app'))") == "[]\n"


def test_a_thousand_connections_and_slow_ones_hold_up_nobody_else(inside: StorageUser, api: httpx.Client) -> None:
    code = """
import os, socket, era_storage
host, port = os.environ['ERA_STORAGE_URL'].removeprefix('http://').split(':')
held = []
for n in range(900):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex((host, int(port)))
    held.append(s)
for s in held[:60]:
    try: s.send(b'GET /api/sto')
    except OSError: pass
import time
print('held', flush=True)
time.sleep(2)
"""
    with ThreadPoolExecutor(1) as pool:
        hostile = pool.submit(inside.run, "python", code)
        for _ in range(10):
            assert inside.says("node", "require('./era_storage.js').KVStorage.list('app').then(console.log)") == "[]\n"
        assert api.put("/api/storage/kv/app/k", json={"value": "v"}).status_code == 200
        assert hostile.result()["stdout"] == "held\n"
    assert inside.says("python", "import era_storage; print(era_storage.kv.get('app', 'k'))") == "v\n"


ENDLESS_SQL = """
import era_storage, threading
sql = 'WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c'
def go(n):
    try: era_storage.d1.query(f'busy{n}', sql)
    except Exception: pass
for n in range(20): threading.Thread(target=go, args=(n,), daemon=True).start()
print('begun', flush=True)
threading.Event().wait()
"""

NO_TURNS = """
from era.api import guest_api
from era.core.concurrency.fair_limiter import FairLimiter
from era.store.d1.d1_databases import D1Databases
init = D1Databases.__init__
def without_turns(self, *given, **named):
    init(self, *given, **named)
    self._slots = FairLimiter(4)
D1Databases.__init__ = without_turns
guest_api.MAX_HEAVY = guest_api.MAX_REQUESTS
"""
"""Whoever comes first has all workers, also by one run."""


@contextmanager
def endless_sql(client: httpx.Client, session: str) -> Iterator[Callable[[], bool]]:
    """A run with 20 statements that don't end, until the end of the block; and what says whether it goes on."""
    answer = client.post(f"/api/sessions/{session}/run", json={"code": ENDLESS_SQL, "timeout": 120, "background": True})
    run = f"/api/sessions/{session}/runs/{answer.json()['run_id']}"
    assert eventually(lambda: client.get(f"{run}/stdout").text == "begun\n")
    yield lambda: bool(client.get(run).json()["status"] == "running")
    assert client.delete(run).status_code == 200


def counts_to_one(client: httpx.Client, seconds: float) -> bool:
    """Whether a statement of another client is answered in this time."""
    try:
        answer = client.post("/api/storage/d1/app/query", json={"sql": "SELECT 1 AS one"}, timeout=seconds)
    except httpx.TimeoutException:
        return False
    assert answer.json()["results"] == [{"one": 1}]
    return True


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_endless_sql_of_one_run_holds_up_nobody_else(
    shared_server: Server, api: httpx.Client, request: pytest.FixtureRequest, kind: str
) -> None:
    hostile_user = StorageUser(shared_server)
    request.addfinalizer(hostile_user.close)
    with endless_sql(hostile_user.client, hostile_user.session("python", isolation=kind)) as goes_on:
        for _ in range(5):
            assert counts_to_one(api, 60)
            assert goes_on(), "it was held up until the other run ended"


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_without_turns_endless_sql_of_one_run_holds_up_others(own_server: MakeServer, kind: str) -> None:
    server = own_server(weakness=NO_TURNS)
    # The other one asks the host that has the run: each executes the statements that it is asked for.
    with server.client() as client, server.client(base_url=server.own_url) as other:
        made = {"language": "python", "session_id": "s", "isolation": kind, "allowInternetAccess": False}
        assert client.post("/api/sessions", json=made).status_code == 201
        with endless_sql(client, "s"):
            assert eventually(lambda: not counts_to_one(other, 2))
