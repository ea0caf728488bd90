"""API keys: who may make and revoke them, where they are kept, and what they open."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.api.owners import OPERATOR_KEY, Owners, client_with_key, headers_seen_with_keys, new_key
from tests.conftest import ERA, MakeServer, eventually


def test_only_the_operator_sees_the_limits_of_the_server(owners: Owners) -> None:
    shown = owners.operator.get("/api/server")
    assert shown.is_success
    assert OPERATOR_KEY not in shown.text
    assert str(owners.server.data_dir) not in shown.text
    for path in ("/api/server", "/api/server/", "/api//server", "/api/%73erver"):
        assert owners.mallory.get(path).status_code in (403, 404), path
    assert owners.mallory.get("/api/server").json()["code"] == "not_operator"
    with owners.server.client() as nobody:
        assert nobody.get("/api/server").status_code == 401


def test_only_the_operator_lists_makes_and_revokes_keys(owners: Owners) -> None:
    for method, path in (("GET", "/api/keys"), ("POST", "/api/keys"), ("DELETE", "/api/keys/key_1_a")):
        body = {"owner": "mallory"} if method == "POST" else None
        answer = owners.mallory.request(method, path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "not_operator")
    created = new_key(owners.server, "carol")
    assert re.fullmatch(r"era_[A-Za-z0-9_-]{43}", created["key"])
    listed = owners.operator.get("/api/keys")
    assert created["key"] not in listed.text
    assert listed.json()["keys"][-1] == {name: value for name, value in created.items() if name != "key"}
    for owner in ("", "a b", "../x", "ü", "x" * 65, "a\n"):
        assert owners.operator.post("/api/keys", json={"owner": owner}).status_code == 400, owner
    assert owners.operator.delete("/api/keys/nobodys").status_code == 404
    for given in ("x", created["key"][:-1], created["key"] + "x", created["key"].upper(), created["id"]):
        with client_with_key(owners.server, given) as client:
            assert client.get("/api/sessions").status_code == 401, given
    for header in (f"Basic {created['key']}", created["key"]):
        with owners.server.client(headers={"Authorization": header}) as client:
            assert client.get("/api/sessions").status_code == 401
    # The key is neither in the database nor in the log.
    assert owners.operator.delete(f"/api/keys/{created['id']}").json() == {"success": True, "id": created["id"]}
    rows = list(owners.server.content_dir.glob("era.sqlite*"))
    assert rows
    assert [path for path in rows if created["key"].encode() in path.read_bytes()] == []
    assert created["key"] not in owners.server.log


def test_a_revoked_key_is_refused_at_once(owners: Owners) -> None:
    """Also on connections that are open, with many calls going on."""
    created = new_key(owners.server, "dave")
    revoked = threading.Event()
    late: list[int] = []
    answered: list[list[int]] = [[] for _ in range(4)]

    def call_on(statuses: list[int]) -> list[int]:
        """Call until a call is refused; returns the statuses, which are added as they come."""
        with client_with_key(owners.server, created["key"]) as client:
            while True:
                begun_after = revoked.is_set()
                statuses.append(client.get("/api/sessions").status_code)
                if begun_after:
                    late.append(statuses[-1])
                if statuses[-1] != 200 or begun_after:
                    return statuses

    with ThreadPoolExecutor(4) as pool:
        calling = [pool.submit(call_on, statuses) for statuses in answered]
        assert eventually(lambda: all(len(statuses) > 1 for statuses in answered))
        assert owners.operator.delete(f"/api/keys/{created['id']}").status_code == 200
        revoked.set()
        for caller in calling:
            *before, last = caller.result(60)
            assert len(before) > 1
            assert set(before) == {200}
            assert last == 401
    assert set(late) <= {401}
    assert owners.operator.delete(f"/api/keys/{created['id']}").status_code == 404


def test_no_api_key_is_forwarded_to_a_session(owners: Owners) -> None:
    *keys, other = headers_seen_with_keys(owners)
    assert [answer for answer in keys if "authorization" in answer] == []
    assert "the-session's-own" in other


def test_a_server_without_an_operator_key_makes_no_keys(client: httpx.Client) -> None:
    """With a first key, nobody could call the server without one any more, nor revoke that key."""
    assert client.get("/api/keys").json() == {"keys": [], "count": 0}
    refused = client.post("/api/keys", json={"owner": "eve"})
    assert (refused.status_code, refused.json()["code"]) == (409, "no_operator")
    assert "ERA_API_KEY" in refused.json()["hint"]


def test_keys_and_their_owners_data_outlive_the_service(own_server: MakeServer) -> None:
    """Revoked keys stay revoked. A server restarted without ERA_API_KEY accepts the other keys and nobody without one,
    and has no operator who could manage keys."""
    server = own_server(api_key=OPERATOR_KEY)

    def era(*words: str) -> list[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
        environment |= {"ERA_SERVER": server.url, "ERA_API_KEY": OPERATOR_KEY}
        done = subprocess.run([ERA, "keys", *words], capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    [revoked_key] = era("create", "eve", "--description", "to go")
    valid_key = new_key(server, "eve")["key"]
    rows = [line.split("  ") for line in era("list")]
    assert [row[2:4] for row in rows] == [["eve", "to go"], ["eve", ""]]
    assert era("revoke", rows[0][0]) == []
    with client_with_key(server, valid_key) as eve:
        assert eve.post("/api/sessions", json={"language": "python", "session_id": "hers"}).is_success
        assert eve.post("/api/storage/d1/app/exec", json={"sql": "CREATE TABLE t (n)"}).is_success
    server.stop(signal.SIGKILL)
    del server.settings["ERA_API_KEY"]
    server.start()
    assert eventually(lambda: "with a stored key" in server.log)  # it is said once the server listens
    with client_with_key(server, valid_key) as eve:
        assert [each["id"] for each in eve.get("/api/sessions").json()["sessions"]] == ["hers"]
        assert eve.get("/api/resources/stats").json()["total"] == 1
        refused = eve.get("/api/keys")
        assert (refused.status_code, refused.json()["code"]) == (403, "not_operator")
        assert "ERA_API_KEY" in refused.json()["hint"]
    with (
        client_with_key(server, revoked_key) as nobody,
        client_with_key(server, OPERATOR_KEY) as operator,
        server.client() as anybody,
    ):
        assert {each.get("/api/sessions").status_code for each in (nobody, operator, anybody)} == {401}
        assert anybody.get("/health").status_code == 200
