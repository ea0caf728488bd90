"""Owners: sessions and storage of one owner can't be seen, found, changed or noticed by another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.owners import (
    EVERYTHING,
    ID,
    LIST_STORAGE,
    NOTHING,
    OPERATOR_KEY,
    SECRET,
    TAR,
    Owners,
    call_every_route,
    client_with_key,
    error_without_id,
    fill_storage,
    headers_seen_with_keys,
    make_full_session,
    new_key,
    request_route,
    routes,
    service_after_attack,
    stdout_of,
)
from tests.capsules import parts
from tests.conftest import Server


def test_no_route_finds_another_owners_session(owners: Owners) -> None:
    """Each route answers as for a session that doesn't exist. The owner's calls show that each would have found it."""
    ada, mallory = owners.ada, owners.mallory
    values = make_full_session(ada)
    before = ada.get(f"/api/sessions/{ID}?include=files").json()
    nobodys = {route: request_route(mallory, route, values | {"session_id": "nobodys"}) for route in routes(mallory)}
    for stranger in (mallory, owners.operator):
        for route, answer in call_every_route(stranger, values, ada).items():
            assert answer.status_code == 404, (route, answer.text)
            assert error_without_id(answer, ID) == error_without_id(nobodys[route], "nobodys"), route
            assert SECRET not in answer.text
        assert ada.post(f"/api/sessions/{ID}/restore").status_code == 200
        assert ada.get(f"/api/sessions/{ID}?include=files").json() == before
        assert len(ada.get(f"/api/sessions/{ID}/inbox/deliveries").json()["deliveries"]) == 1
    for route, answer in call_every_route(ada, values, ada).items():
        assert answer.is_success, (route, answer.text)
    ada.delete("/api/sessions?purge=true")


def test_lists_counts_and_delete_all_are_per_owner(owners: Owners) -> None:
    ada, mallory = owners.ada, owners.mallory
    for client, names in ((ada, ("a1", "a2", "a3")), (mallory, ("m1",))):
        for name in names:
            body = {"language": "python", "session_id": name, "metadata": {"team": "x"}}
            assert client.post("/api/sessions", json=body).status_code == 201

    def ids(client: httpx.Client, **query: Any) -> list[str]:
        listing = client.get("/api/sessions", params=query).json()
        assert listing["count"] == len(listing["sessions"])
        return [one["id"] for one in listing["sessions"]]

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
    # Whoever takes the id of a deleted session gets nothing of it, and its owner can't restore it meanwhile.
    assert mallory.post("/api/sessions", json={"language": "python", "session_id": "a1"}).status_code == 201
    refused = ada.post("/api/sessions/a1/restore")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert mallory.delete("/api/sessions/a1?purge=true").is_success
    assert ada.post("/api/sessions/a1/restore").json()["metadata"] == {"team": "x"}
    for client in (ada, mallory):
        client.delete("/api/sessions?purge=true")


def test_a_taken_id_reveals_nothing_of_its_session(owners: Owners) -> None:
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
    assert len({json.dumps(error_without_id(answer, "one")) for answer in taken.values()}) == 1

    # An imported session belongs to whoever imports it, and a duplicate to its source's owner.
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


def test_idempotency_keys_are_per_owner(owners: Owners) -> None:
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
    # The same key in his own session replays nothing of her answers.
    mine = other.json()["id"]
    for client, session_id in ((ada, first.json()["id"]), (mallory, mine)):
        code = {"code": f"print('{client is ada}')"}
        ran = client.post(f"/api/sessions/{session_id}/run", json=code, headers=key)
        assert (ran.json()["stdout"], "Idempotent-Replay" in ran.headers) == (f"{client is ada}\n", False)
    for client in (ada, mallory):
        client.delete("/api/sessions?purge=true")


def test_nobody_gets_a_turn_in_another_owners_session(owners: Owners) -> None:
    """Neither to hold up its runs, nor to learn of it by waiting, nor to end its service."""
    assert service_after_attack(owners) == "running"


FORGED = """
import os, urllib.request
url = os.environ['ERA_STORAGE_URL'] + '/api/storage/kv/app/k'
headers = {'Authorization': 'Bearer KEY', 'X-Era-Owner': 'lovelace', 'Owner': 'lovelace', 'Cookie': 'owner=lovelace'}
try: print(urllib.request.urlopen(urllib.request.Request(url, headers=headers)).read())
except urllib.request.HTTPError as error: print(error.code)
"""


def test_storage_is_per_owner_from_inside_and_outside(owners: Owners) -> None:
    ada, mallory = owners.ada, owners.mallory
    fill_storage(ada)
    assert stdout_of(ada, LIST_STORAGE) == EVERYTHING
    for stranger in (mallory, owners.operator):
        assert stdout_of(stranger, LIST_STORAGE) == NOTHING
        assert stranger.get("/api/storage/kv/app/k").status_code == 404
        assert stranger.get("/api/storage/r2/app/o").status_code == 404
        assert stranger.post("/api/storage/d1/app/query", json={"sql": "SELECT s FROM t"}).status_code == 400
        assert stranger.get("/api/storage/kv/app").json()["keys"] == []
        assert stranger.get("/api/storage/r2/app").json()["objects"] == []
        listed = stranger.get("/api/resources/list").json()
        assert (listed["resources"], listed["total"]) == ([], 0)
        stats = stranger.get("/api/resources/stats").json()
        assert (stats["total"], stats["by_namespace"], stats["total_size"]) == (0, {}, 0)
        # What he writes and clears is in his own storage.
        assert stranger.put("/api/storage/kv/app/k", json={"value": "his"}).is_success
        for kind in ("kv", "r2", "d1"):
            assert stranger.delete(f"/api/storage/{kind}/app").is_success
    # Whatever a program sends: its owner follows from the guest listener that it came through.
    her_key = ada.headers["Authorization"].removeprefix("Bearer ")
    assert stdout_of(mallory, FORGED.replace("KEY", her_key)) == "404\n"
    assert stdout_of(ada, LIST_STORAGE) == EVERYTHING
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
    """The variable is unset, and nothing listens at its address; from the next run on, the storage can be had again."""
    ada, name = owners.ada, f"shut-{language}"
    made = ada.post("/api/sessions", json={"language": language, "session_id": name})
    assert made.json()["storage"] is True

    def run(code: str, **env: str) -> list[str]:
        outcome = ada.post(f"/api/sessions/{name}/run", json={"code": code, "env": env}).json()
        assert outcome["status"] == "ok", outcome
        return str(outcome["stdout"]).splitlines()

    [url] = run(SHOWN[language])
    code = SHUT_OUT[language].replace("= URL", f"= '{url}'")
    assert ada.patch(f"/api/sessions/{name}", json={"storage": False}).json()["metadata"]["storage"] is False
    for env in ({}, {"ERA_STORAGE_URL": url}):  # a variable of the caller's doesn't open it
        none, why, unreachable = run(code, **env)
        assert (none, unreachable) == ("None", "unreachable")
        assert why.startswith("no_storage There is no storage here.")
        assert '"storage": false' in why
    assert ada.get(f"/api/sessions/{name}").json()["storage"] is False
    assert ada.patch(f"/api/sessions/{name}", json={"storage": True}).json()["metadata"]["storage"] is True
    assert run(code) == [url, "None", "None"]
    ada.delete(f"/api/sessions/{name}?purge=true")


WEAK = """
from era.core.storage import storage
from era.core.public import headers
from era.core.owners.api_keys import ApiKeys
from era.core.models import OwnedId
from era.store import session_lookup

session_lookup._find_by_owned_id = session_lookup._find_by_id
session_lookup._LAST_REMOVED = session_lookup._LAST_REMOVED_OF_ANY_OWNER
OwnedId.__eq__, OwnedId.__hash__ = lambda one, other: one.id == other.id, lambda one: hash(one.id)
storage.Storage.of = lambda self, owner, *_: storage.Namespaces(self, 'everybody', '')
headers.contains_api_key = lambda text: False
ApiKeys.revoke = lambda self, key_id: self._store.drop_api_key(key_id)
"""


def test_each_attack_succeeds_on_a_weakened_service(tmp_path: Path) -> None:
    settings = {"ERA_API_KEY": OPERATOR_KEY}
    server = Server(tmp_path / "weak", settings, weakness=WEAK).start()
    try:
        weak = Owners.of(server)
        values = make_full_session(weak.ada)
        successful = {
            route for route, answer in call_every_route(weak.mallory, values, weak.ada).items() if answer.is_success
        }
        assert successful == set(routes(weak.ada))
        assert service_after_attack(weak) != "running"
        fill_storage(weak.ada)
        assert stdout_of(weak.mallory, LIST_STORAGE) == EVERYTHING
        assert weak.mallory.get("/api/resources/list").json()["total"] == 3
        assert [answer for answer in headers_seen_with_keys(weak) if "authorization" in answer] != []
        made = new_key(server, "dave")
        assert weak.operator.delete(f"/api/keys/{made['id']}").is_success
        with client_with_key(server, made["key"]) as revoked:
            assert revoked.get("/api/sessions").status_code == 200
        weak.close()
    finally:
        server.stop()
