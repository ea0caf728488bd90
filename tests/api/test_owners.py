"""Owners: what one has, no other sees, finds, changes or learns of, whichever way he tries."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from tests.capsules import parts
from tests.conftest import ERA, Server, assert_nothing_left, eventually, mounts

OPERATORS = "the operator's own key"
SECRET = "canary-7c1d90"


@dataclass
class WeakServer(Server):
    weakness: str = ""
    """Python that takes something out of it."""

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        if self.weakness:
            code = f"import sys; sys.argv[0] = 'era'; {self.weakness}; from era.client.cli import main; main()"
            command = [sys.executable, "-c", code, "serve"]
        return super()._spawn(command, environment, log)


def keyed(server: Server, key: str) -> httpx.Client:
    return server.client(headers={"Authorization": f"Bearer {key}"})


def new_key(server: Server, owner: str) -> dict[str, Any]:
    with keyed(server, OPERATORS) as operator:
        answer = operator.post("/api/keys", json={"owner": owner})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


@dataclass
class Owners:
    """Clients of two owners' on one server, beside its operator."""

    server: Server
    operator: httpx.Client
    ada: httpx.Client
    mallory: httpx.Client

    @classmethod
    def of(cls, server: Server) -> Owners:
        ada, mallory = (keyed(server, new_key(server, owner)["key"]) for owner in ("lovelace", "mallory"))
        return cls(server, keyed(server, OPERATORS), ada, mallory)

    def close(self) -> None:
        for client in (self.operator, self.ada, self.mallory):
            client.delete("/api/sessions?purge=true")
            client.close()


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owners]:
    before, data_dir = mounts(), tmp_path_factory.mktemp("owners") / "data"
    server = Server(data_dir, {"ERA_API_KEY": OPERATORS, "ERA_SPARES": "0"}).start()
    made = Owners.of(server)
    yield made
    made.close()
    processes = server.descendants()
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log
    assert_nothing_left(before, processes, data_dir)


# -- every route --------------------------------------------------------------------------------------------------

ID = "hers"
TAR = {"Content-Type": "application/x-tar"}
JSON: dict[str, Any] = {
    "PATCH /api/sessions/{session_id}": {"metadata": {"by": "whom"}},
    "POST /api/sessions/{session_id}/run": {"code": "print(1)"},
    "POST /api/sessions/{session_id}/stream": {"code": "print(1)"},
    "PUT /api/sessions/{session_id}/code": {"code": "print(2)"},
    "POST /api/sessions/{session_id}/rollback": {"version": 1},
    "PUT /api/sessions/{session_id}/inbox": {"verify": None, "retries": 0},
}
QUERIES = {"GET /api/sessions/{session_id}/host": {"port": 80}}
LAST = ["DELETE /api/sessions/{session_id}", "POST /api/sessions/{session_id}/restore"]


def routes(client: httpx.Client) -> list[str]:
    """All that name a session: those that read, those that write, those that remove, and LAST."""
    described = client.get("/openapi.json").json()["paths"]
    found = [f"{method.upper()} {path}" for path in described for method in described[path] if "{session_id}" in path]
    order = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    found.sort(key=lambda route: (route in LAST and LAST.index(route) + 1, order.index(route.split()[0]), route))
    return found


def furnish(ada: httpx.Client) -> dict[str, str]:
    """A session that has everything: what stands for the parameters of paths."""
    setup = {"envs": {"A": "1"}}
    assert ada.post("/api/sessions", json={"language": "python", "session_id": ID, "setup": setup}).status_code == 201
    assert eventually(lambda: ada.get(f"/api/sessions/{ID}").json()["setup_status"] == "completed")
    code = {"code": f"open('f', 'w').write('{SECRET}'); print('{SECRET}')"}
    assert ada.put(f"/api/sessions/{ID}/code", json=code).is_success
    ran = ada.post(f"/api/sessions/{ID}/run", json={})
    assert ran.json()["status"] == "ok", ran.text
    assert ada.put(f"/api/sessions/{ID}/inbox", json={"verify": None, "retries": 0}).is_success
    delivered = ada.post(f"/proxy/{ID}/inbox/x", content=b"{}").json()["delivery_id"]
    settled = f"/api/sessions/{ID}/inbox/deliveries/{delivered}"
    assert eventually(lambda: ada.get(settled).json()["status"] == "done")
    return {"session_id": ID, "path": "f", "number": "2", "run_id": ran.json()["run_id"], "stream": "stdout",
            "delivery_id": delivered}  # fmt: skip


def call(client: httpx.Client, route: str, values: dict[str, str]) -> httpx.Response:
    """A request that this route takes."""
    method, path = route.split(" ")
    more: dict[str, Any] = {"params": QUERIES.get(route)}
    if route in JSON:
        more["json"] = JSON[route]
    elif route.endswith("/archive") and method == "PUT":
        more |= {"content": b"\0" * 1024, "headers": TAR}
    return client.request(method, re.sub(r"{(\w+)}", lambda found: values[found[1]], path), **more)


def everything(client: httpx.Client, values: dict[str, str], ada: httpx.Client) -> dict[str, httpx.Response]:
    answers = {}
    for route in routes(client):
        if route == LAST[-1]:
            ada.delete(f"/api/sessions/{ID}")  # only a session that is gone can be restored
        answers[route] = call(client, route, values)
    return answers


def said(answer: httpx.Response, session_id: str) -> dict[str, Any]:
    """An error, without what is of this one request only."""
    return json.loads(answer.text.replace(session_id, "ID")) | {"request_id": ""}


def test_no_route_finds_another_owners_session(owners: Owners) -> None:
    """Each answers as for a session that there isn't. That each would have found it, its owner's calls show."""
    ada, mallory = owners.ada, owners.mallory
    values = furnish(ada)
    before = ada.get(f"/api/sessions/{ID}?include=files").json()
    nobodys = {route: call(mallory, route, values | {"session_id": "nobodys"}) for route in routes(mallory)}
    for stranger in (mallory, owners.operator):
        for route, answer in everything(stranger, values, ada).items():
            assert answer.status_code == 404, (route, answer.text)
            assert said(answer, ID) == said(nobodys[route], "nobodys"), route
            assert SECRET not in answer.text
        assert ada.post(f"/api/sessions/{ID}/restore").status_code == 200
        assert ada.get(f"/api/sessions/{ID}?include=files").json() == before
        assert len(ada.get(f"/api/sessions/{ID}/inbox/deliveries").json()["deliveries"]) == 1
    for route, answer in everything(ada, values, ada).items():
        assert answer.is_success, (route, answer.text)
    ada.delete("/api/sessions?purge=true")


# -- what is not named by its id ----------------------------------------------------------------------------------


def test_lists_counts_and_deleting_all_are_ones_own(owners: Owners) -> None:
    ada, mallory = owners.ada, owners.mallory
    for client, names in ((ada, ("a1", "a2", "a3")), (mallory, ("m1",))):
        for name in names:
            body = {"language": "python", "session_id": name, "metadata": {"team": "x"}}
            assert client.post("/api/sessions", json=body).status_code == 201

    def ids(client: httpx.Client, **query: Any) -> list[str]:
        told = client.get("/api/sessions", params=query).json()
        assert told["count"] == len(told["sessions"])
        return [one["id"] for one in told["sessions"]]

    assert ids(ada) == ["a3", "a2", "a1"]
    assert ids(mallory) == ["m1"]
    assert ids(owners.operator) == []
    assert ids(mallory, **{"metadata.team": "x"}) == ["m1"]
    first = ada.get("/api/sessions", params={"limit": 1}).json()
    assert ids(mallory, cursor=first["next_cursor"]) == []
    assert ids(ada, cursor=first["next_cursor"]) == ["a2", "a1"]

    assert mallory.delete("/api/sessions").json()["deleted_sessions"] == ["m1"]
    assert ids(ada) == ["a3", "a2", "a1"]
    assert ada.delete("/api/sessions/a1").is_success
    assert ids(mallory, status="deleted") == ["m1"]
    # Who takes the id of one that is gone has nothing of it, and its owner can't have it back meanwhile.
    assert mallory.post("/api/sessions", json={"language": "python", "session_id": "a1"}).status_code == 201
    refused = ada.post("/api/sessions/a1/restore")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert mallory.delete("/api/sessions/a1?purge=true").is_success
    assert ada.post("/api/sessions/a1/restore").json()["metadata"] == {"team": "x"}
    for client in (ada, mallory):
        client.delete("/api/sessions?purge=true")


def test_an_id_is_one_sessions_and_taken_says_no_more(owners: Owners) -> None:
    ada, mallory = owners.ada, owners.mallory
    body = {"language": "python", "session_id": "one", "data": {"secret": SECRET}, "storage": False}
    assert ada.post("/api/sessions", json=body).status_code == 201
    capsule = ada.get("/api/sessions/one/capsule").content
    assert b"lovelace" not in dict(parts(capsule))["capsule.json"]
    taken = {
        "his own": ada.post("/api/sessions", json=body),
        "created": mallory.post("/api/sessions", json={"language": "python", "session_id": "one"}),
        "imported": mallory.post("/api/sessions/import", content=capsule, headers=TAR),
    }
    assert mallory.post("/api/sessions", json={"language": "python", "session_id": "two"}).status_code == 201
    taken["copied"] = mallory.post("/api/sessions/two/duplicate", json={"id": "one"})
    assert {answer.status_code for answer in taken.values()} == {409}
    assert len({json.dumps(said(answer, "one")) for answer in taken.values()}) == 1

    # A capsule becomes the session of whoever imports it, and a copy that of its source's owner.
    imported = mallory.post("/api/sessions/import", params={"id": "mine"}, content=capsule, headers=TAR)
    assert (imported.status_code, imported.json()["data"], imported.json()["storage"]) == (
        201,
        {"secret": SECRET},
        False,
    )
    assert mallory.post("/api/sessions/mine/duplicate", json={"id": "copy"}).json()["storage"] is False
    for name in ("mine", "copy"):
        assert mallory.get(f"/api/sessions/{name}").is_success
        assert ada.get(f"/api/sessions/{name}").status_code == 404
    for client in (ada, mallory):
        client.delete("/api/sessions?purge=true")


def test_an_idempotency_key_is_ones_own(owners: Owners) -> None:
    ada, mallory = owners.ada, owners.mallory
    key = {"Idempotency-Key": "the same"}
    first = ada.post("/api/sessions", json={"language": "python", "data": {"secret": SECRET}}, headers=key)
    again = ada.post("/api/sessions", json={"language": "python", "data": {"secret": SECRET}}, headers=key)
    assert (again.json(), again.headers["Idempotent-Replay"]) == (first.json(), "true")
    for body in ({"language": "python", "data": {"secret": SECRET}}, {"language": "python"}):
        other = mallory.post("/api/sessions", json=body, headers=key if body.get("data") else {})
        assert other.status_code == 201
        assert other.json()["id"] != first.json()["id"]
        assert "Idempotent-Replay" not in other.headers
    # With a session of his own he gets nothing of what hers was answered.
    mine = other.json()["id"]
    for client, session_id in ((ada, first.json()["id"]), (mallory, mine)):
        code = {"code": f"print('{client is ada}')"}
        ran = client.post(f"/api/sessions/{session_id}/run", json=code, headers=key)
        assert (ran.json()["stdout"], "Idempotent-Replay" in ran.headers) == (f"{client is ada}\n", False)
    for client in (ada, mallory):
        client.delete("/api/sessions?purge=true")


def service_after_attack(owners: Owners) -> str:
    """The status of a service that waits for calls, once somebody else has asked for its session's turn."""
    ada = owners.ada
    service = "python3 -m http.server $PORT"
    assert ada.post("/api/sessions", json={"language": "python", "session_id": "busy", "service": service}).is_success
    assert ada.get("/proxy/busy/8000/").status_code == 200
    [run] = ada.get("/api/sessions/busy/runs").json()["runs"]
    for method, path, body in (
        ("POST", "run", {"code": "1"}),
        ("PATCH", "", {"data": {}}),
        ("POST", "rollback", {"version": 1}),
        ("DELETE", "files/f", None),
    ):
        owners.mallory.request(method, f"/api/sessions/busy/{path}".rstrip("/"), json=body, timeout=5)
    status: str = ada.get(f"/api/sessions/busy/runs/{run['run_id']}").json()["status"]
    ada.delete("/api/sessions?purge=true")
    return status


def test_nobody_gets_into_the_queue_of_another_owners_session(owners: Owners) -> None:
    """Neither to hold up its runs, nor to learn of it by waiting, nor to end its service."""
    assert service_after_attack(owners) == "running"


# -- storage ------------------------------------------------------------------------------------------------------

LOOK = """
from era_storage import kv, d1, r2
print(kv.get('app', 'k'), [one['name'] for one in kv.list('app')])
print(r2.get('app', 'o'), [one['key'] for one in r2.list('app')])
print(d1.query('app', 'SELECT name FROM sqlite_schema'))
"""
NOTHING = "None []\nNone []\n[]\n"
ALL = f"{SECRET} ['k']\nb'secret' ['o']\n[{{'name': 't'}}]\n"
FORGED = """
import os, urllib.request
url = os.environ['ERA_STORAGE_URL'] + '/api/storage/kv/app/k'
headers = {'Authorization': 'Bearer KEY', 'X-Era-Owner': 'lovelace', 'Owner': 'lovelace', 'Cookie': 'owner=lovelace'}
try: print(urllib.request.urlopen(urllib.request.Request(url, headers=headers)).read())
except urllib.request.HTTPError as error: print(error.code)
"""


def printed(client: httpx.Client, code: str) -> str:
    told = client.post("/api/execute", json={"language": "python", "code": code}).json()
    assert told["status"] == "ok", told
    text: str = told["stdout"]
    return text


def fill_storage(client: httpx.Client) -> None:
    assert client.put("/api/storage/kv/app/k", json={"value": SECRET}).is_success
    assert client.put("/api/storage/r2/app/o", json={"content": "c2VjcmV0"}).is_success
    sql = f"CREATE TABLE t AS SELECT '{SECRET}' AS s"
    assert client.post("/api/storage/d1/app/exec", json={"sql": sql}).is_success


def test_storage_is_its_owners_from_inside_and_outside(owners: Owners) -> None:
    ada, mallory = owners.ada, owners.mallory
    fill_storage(ada)
    assert printed(ada, LOOK) == ALL
    for stranger in (mallory, owners.operator):
        assert printed(stranger, LOOK) == NOTHING
        assert stranger.get("/api/storage/kv/app/k").status_code == 404
        assert stranger.get("/api/storage/r2/app/o").status_code == 404
        assert stranger.post("/api/storage/d1/app/query", json={"sql": "SELECT s FROM t"}).status_code == 400
        assert stranger.get("/api/storage/kv/app").json()["keys"] == []
        assert stranger.get("/api/storage/r2/app").json()["objects"] == []
        listed = stranger.get("/api/resources/list").json()
        assert (listed["resources"], listed["total"]) == ([], 0)
        stats = stranger.get("/api/resources/stats").json()
        assert (stats["total"], stats["by_namespace"], stats["total_size"]) == (0, {}, 0)
        # What he writes and clears is his own.
        assert stranger.put("/api/storage/kv/app/k", json={"value": "his"}).is_success
        for kind in ("kv", "r2", "d1"):
            assert stranger.delete(f"/api/storage/{kind}/app").is_success
    # A program may say what it likes: whose it is, the guest listener tells that it came through.
    her_key = ada.headers["Authorization"].removeprefix("Bearer ")
    assert printed(mallory, FORGED.replace("KEY", her_key)) == "404\n"
    assert printed(ada, LOOK) == ALL
    assert ada.get("/api/resources/stats").json()["total"] == 3
    for kind in ("kv", "r2", "d1"):
        assert ada.delete(f"/api/storage/{kind}/app").json()["deleted"] == 1


SHOWN = {
    "python": "import os; print(os.environ['ERA_STORAGE_URL'])",
    "node": "console.log(process.env.ERA_STORAGE_URL)",
}
SHUT_OUT = {
    "python": """
import os, socket, era_storage
print(os.environ.get('ERA_STORAGE_URL'))
try: print(era_storage.kv.get('app', 'k'))
except era_storage.StorageError as error: print(error.code, error)
os.environ['ERA_STORAGE_URL'] = URL
try: print(era_storage.kv.get('app', 'k'))
except era_storage.StorageError as error: print(error.code)
""",
    "node": """
const { KVStorage } = require('./era_storage.js');
console.log(process.env.ERA_STORAGE_URL ?? 'None');
const tried = () => KVStorage.get('app', 'k').then((value) => console.log(value ?? 'None'));
await tried().catch((error) => console.log(error.code, error.message));
process.env.ERA_STORAGE_URL = URL;
await tried().catch((error) => console.log(error.code));
""",
}


@pytest.mark.parametrize("language", ["python", "node"])
def test_a_session_can_be_shut_out_of_the_storage(owners: Owners, language: str) -> None:
    """The variable is gone, and nobody listens where it led to; from the next run on it's the other way round."""
    ada, name = owners.ada, f"shut-{language}"
    made = ada.post("/api/sessions", json={"language": language, "session_id": name})
    assert made.json()["storage"] is True

    def run(code: str, **env: str) -> list[str]:
        told = ada.post(f"/api/sessions/{name}/run", json={"code": code, "env": env}).json()
        assert told["status"] == "ok", told
        return str(told["stdout"]).splitlines()

    [url] = run(SHOWN[language])
    code = SHUT_OUT[language].replace("= URL", f"= '{url}'")
    assert ada.patch(f"/api/sessions/{name}", json={"storage": False}).json()["metadata"]["storage"] is False
    for env in ({}, {"ERA_STORAGE_URL": url}):  # nor can a caller let it in
        none, why, unreachable = run(code, **env)
        assert (none, unreachable) == ("None", "unreachable")
        assert why.startswith("no_storage There is no storage here.")
        assert '"storage": false' in why
    assert ada.get(f"/api/sessions/{name}").json()["storage"] is False
    assert ada.patch(f"/api/sessions/{name}", json={"storage": True}).json()["metadata"]["storage"] is True
    assert run(code) == [url, "None", "None"]
    ada.delete(f"/api/sessions/{name}?purge=true")


# -- keys ---------------------------------------------------------------------------------------------------------


def test_only_the_operator_sees_to_keys(owners: Owners) -> None:
    for method, path in (("GET", "/api/keys"), ("POST", "/api/keys"), ("DELETE", "/api/keys/key_1_a")):
        body = {"owner": "mallory"} if method == "POST" else None
        answer = owners.mallory.request(method, path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "not_operator")
    made = new_key(owners.server, "carol")
    assert re.fullmatch(r"era_[A-Za-z0-9_-]{43}", made["key"])
    listed = owners.operator.get("/api/keys")
    assert made["key"] not in listed.text
    assert listed.json()["keys"][-1] == {name: made[name] for name in ("id", "owner", "description", "created_at")}
    for owner in ("", "a b", "../x", "ü", "x" * 65, "a\n"):
        assert owners.operator.post("/api/keys", json={"owner": owner}).status_code == 400, owner
    assert owners.operator.delete("/api/keys/nobodys").status_code == 404
    for given in ("x", made["key"][:-1], made["key"] + "x", made["key"].upper(), made["id"]):
        with keyed(owners.server, given) as client:
            assert client.get("/api/sessions").status_code == 401, given
    for header in (f"Basic {made['key']}", made["key"]):
        with owners.server.client(headers={"Authorization": header}) as client:
            assert client.get("/api/sessions").status_code == 401
    # Neither the database nor the log has it.
    assert owners.operator.delete(f"/api/keys/{made['id']}").json() == {"success": True, "id": made["id"]}
    kept = [path for path in owners.server.data_dir.glob("era.sqlite*") if made["key"].encode() in path.read_bytes()]
    assert kept == []
    assert made["key"] not in owners.server.log


def test_a_key_that_is_revoked_lets_nobody_in_from_that_moment_on(owners: Owners) -> None:
    """Not even on connections that are open, with many calls going on."""
    made = new_key(owners.server, "dave")
    revoked = threading.Event()
    late: list[int] = []

    def call_on() -> list[int]:
        """Until one is refused."""
        seen = []
        with keyed(owners.server, made["key"]) as client:
            while True:
                begun_after = revoked.is_set()
                seen.append(client.get("/api/sessions").status_code)
                if begun_after:
                    late.append(seen[-1])
                if seen[-1] != 200 or begun_after:
                    return seen

    with ThreadPoolExecutor(4) as pool:
        calling = [pool.submit(call_on) for _ in range(4)]
        time.sleep(0.2)
        assert owners.operator.delete(f"/api/keys/{made['id']}").status_code == 200
        revoked.set()
        for one in calling:
            *before, last = one.result(20)
            assert len(before) > 1
            assert set(before) == {200}
            assert last == 401
    assert set(late) <= {401}
    assert owners.operator.delete(f"/api/keys/{made['id']}").status_code == 404


def told_with_keys(owners: Owners) -> list[str]:
    """What a public session has been told of calls that bring keys of the API's."""
    ada, told = owners.ada, []
    seen = "import os, json; print(json.dumps({'body': os.environ['ERA_HTTP_HEADERS']}))"
    assert ada.post("/api/sessions", json={"language": "python", "session_id": "public"}).is_success
    assert ada.put("/api/sessions/public/code", json={"code": seen}).is_success
    key = owners.mallory.headers["Authorization"].removeprefix("Bearer ")
    basic = base64.b64encode(f"user:{key}".encode()).decode()
    for value in (f"Bearer {key}", f"Basic {basic}", f"Bearer {OPERATORS}", "Bearer the-session's-own"):
        with owners.server.client(headers={"Authorization": value}) as client:
            told.append(client.get("/proxy/public/80/").text)
    ada.delete("/api/sessions?purge=true")
    return told


def test_no_key_is_handed_on_to_a_session(owners: Owners) -> None:
    *keys, other = told_with_keys(owners)
    assert [answer for answer in keys if "authorization" in answer] == []
    assert "the-session's-own" in other


def test_a_server_without_a_key_makes_none(client: httpx.Client) -> None:
    """Nobody could call it any more, nor revoke that key."""
    assert client.get("/api/keys").json() == {"keys": [], "count": 0}
    refused = client.post("/api/keys", json={"owner": "eve"})
    assert (refused.status_code, refused.json()["code"]) == (409, "no_operator")
    assert "ERA_API_KEY" in refused.json()["hint"]


def test_keys_and_what_they_open_outlive_the_service(own_server: Callable[..., Server]) -> None:
    """Revoked ones stay revoked. Without ERA_API_KEY the others work on, nobody comes in without one, and nobody sees
    to keys."""
    server = own_server(spares="0", api_key=OPERATORS)

    def era(*words: str) -> list[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
        environment |= {"ERA_SERVER": server.url, "ERA_API_KEY": OPERATORS}
        done = subprocess.run([ERA, "keys", *words], capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    [gone] = era("create", "eve", "--description", "to go")
    kept = new_key(server, "eve")["key"]
    rows = [line.split("  ") for line in era("list")]
    assert [row[2:] for row in rows] == [["eve", "to go"], ["eve"]]
    assert era("revoke", rows[0][0]) == []
    with keyed(server, kept) as eve:
        assert eve.post("/api/sessions", json={"language": "python", "session_id": "hers"}).is_success
        assert eve.post("/api/storage/d1/app/exec", json={"sql": "CREATE TABLE t (n)"}).is_success
    server.stop(signal.SIGKILL)
    del server.settings["ERA_API_KEY"]
    server.start()
    assert "with a stored key" in server.log
    with keyed(server, kept) as eve:
        assert [one["id"] for one in eve.get("/api/sessions").json()["sessions"]] == ["hers"]
        assert eve.get("/api/resources/stats").json()["total"] == 1
        refused = eve.get("/api/keys")
        assert (refused.status_code, refused.json()["code"]) == (403, "not_operator")
        assert "ERA_API_KEY" in refused.json()["hint"]
    with keyed(server, gone) as nobody, keyed(server, OPERATORS) as operator, server.client() as anybody:
        assert {one.get("/api/sessions").status_code for one in (nobody, operator, anybody)} == {401}
        assert anybody.get("/health").status_code == 200


# -- that these tests would notice ----------------------------------------------------------------------------------

WEAK = """
from era.core import storage
from era.core.public import headers
from era.core.api_keys import ApiKeys
from era.core.models import OwnedId
from era.store import session_lookup

session_lookup._find_by_owned_id = session_lookup._find_by_id
session_lookup._LAST_REMOVED = session_lookup._LAST_REMOVED_OF_ANY_OWNER
OwnedId.__eq__, OwnedId.__hash__ = lambda one, other: one.id == other.id, lambda one: hash(one.id)
storage.Storage.of = lambda self, owner: storage.Namespaces(self, 'everybody')
headers.gives_away = lambda text: False
ApiKeys.revoke = lambda self, key_id: self._store.drop_api_key(key_id)
"""


def test_each_attack_succeeds_where_owners_are_not_looked_at(tmp_path: Path) -> None:
    settings = {"ERA_API_KEY": OPERATORS, "ERA_SPARES": "0"}
    server = WeakServer(tmp_path / "weak", settings, weakness=f"exec({WEAK!r})").start()
    try:
        weak = Owners.of(server)
        values = furnish(weak.ada)
        found = {route for route, answer in everything(weak.mallory, values, weak.ada).items() if answer.is_success}
        assert found == set(routes(weak.ada))
        assert service_after_attack(weak) != "running"
        fill_storage(weak.ada)
        assert printed(weak.mallory, LOOK) == ALL
        assert weak.mallory.get("/api/resources/list").json()["total"] == 3
        assert [answer for answer in told_with_keys(weak) if "authorization" in answer] != []
        made = new_key(server, "dave")
        assert weak.operator.delete(f"/api/keys/{made['id']}").is_success
        with keyed(server, made["key"]) as revoked:
            assert revoked.get("/api/sessions").status_code == 200
        weak.close()
    finally:
        server.stop()
