"""Quotas and usage over HTTP: sixty-four clients at once get what may be and no more; who sets them, who sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.api.owners import Owners, client_with_key, new_key
from tests.conftest import MakeServer

CLIENTS = 64


def set_quotas(owners: Owners, owner: str, **quotas: int | None) -> dict[str, Any]:
    answer = owners.operator.patch(f"/api/owners/{owner}", json={"quotas": quotas})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.fixture
def mina(owners: Owners) -> Iterator[httpx.Client]:
    """A client of an owner who has nothing but what a test gives her."""
    with client_with_key(owners.server, new_key(owners.server, "mina")["key"]) as client:
        yield client
        client.delete("/api/sessions?purge=true")
        names = ("sessions", "disk_mb", "storage_mb", "runs_per_minute", "sandboxes")
        set_quotas(owners, "mina", **dict.fromkeys(names))


def at_once(call: Callable[[int], httpx.Response]) -> tuple[list[httpx.Response], list[httpx.Response]]:
    """What as many clients get at once: what was done, and what was refused."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(call, range(CLIENTS)))
    return [each for each in answers if each.is_success], [each for each in answers if not each.is_success]


def test_quotas_of_the_server_hold_for_owners_without_their_own(own_server: MakeServer) -> None:
    with own_server(api_key="open sesame", quotas="sessions=1 disk_mb=100").client() as client:
        client.headers["Authorization"] = "Bearer open sesame"
        assert client.post("/api/sessions", json={"language": "python"}).status_code == 201
        assert client.post("/api/sessions", json={"language": "python"}).json()["code"] == "quota_reached"
        shown = {limit["name"]: limit["value"] for limit in client.get("/api/server").json()["limits"]}
        assert (shown["ERA_QUOTAS sessions"], shown["ERA_QUOTAS disk_mb"], shown["ERA_QUOTAS sandboxes"]) == (1, 100, 0)


def test_sixty_four_clients_make_no_more_sessions_than_may_be(owners: Owners, mina: httpx.Client) -> None:
    set_quotas(owners, "mina", sessions=9)
    made, refused = at_once(
        lambda n: mina.post("/api/sessions", json={"language": "python", "session_id": f"mina-{n}"})
    )
    assert len(made) == 9
    assert {(each.status_code, each.json()["code"]) for each in refused} == {(409, "quota_reached")}
    details = refused[0].json()["details"]
    assert details == {
        "quota": "sessions",
        "of": "owner",
        "limit": 9,
        "used": 9,
        "filled_by": [each["id"] for each in reversed(mina.get("/api/sessions").json()["sessions"])],
    }
    # Neither does another way to a session get past it.
    [one, *_] = details["filled_by"]
    capsule = mina.get(f"/api/sessions/{one}/capsule").content
    archive = {"Content-Type": "application/x-tar"}
    for answer in (
        mina.post(f"/api/sessions/{one}/duplicate", json={}),
        mina.post("/api/sessions/import?id=imported", content=capsule, headers=archive),
    ):
        assert (answer.status_code, answer.json()["code"]) == (409, "quota_reached")
    assert mina.delete(f"/api/sessions/{one}").is_success
    assert mina.post("/api/sessions/import?id=imported", content=capsule, headers=archive).status_code == 201
    restored = mina.post(f"/api/sessions/{one}/restore")
    assert (restored.status_code, restored.json()["code"]) == (409, "quota_reached")
    assert mina.get("/api/quotas").json()["used"]["sessions"] == 9


def test_whoever_has_no_key_learns_nothing_of_a_quota(owners: Owners, mina: httpx.Client) -> None:
    """Above all no ids of sessions, which open their public URLs."""
    server = "import http.server as h; h.HTTPServer(('', 3000), h.SimpleHTTPRequestHandler).serve_forever()"
    for name in ("mina-busy", "mina-public"):
        mina.post("/api/sessions", json={"language": "python", "session_id": name})
    mina.put("/api/sessions/mina-public/code", json={"code": "print(1)"})
    started = mina.post("/api/sessions/mina-busy/processes", json={"command": ["python3", "-c", server]})
    assert started.status_code == 201
    made = mina.post("/api/sessions/mina-public/links", json={"path": "f", "method": "PUT"}).json()
    mina.put("/api/sessions/mina-busy/files/big", content=bytes(1 << 20))
    set_quotas(owners, "mina", sandboxes=1, disk_mb=1)
    assert "mina-busy" in mina.post("/api/sessions/mina-public/run", json={"code": "1"}).text
    with httpx.Client(base_url=owners.server.url, timeout=60) as anybody:
        for answer in (anybody.get("/proxy/mina-public/3000"), anybody.put(made["url"], content=b"1")):
            assert (answer.status_code, answer.json()["code"]) == (409, "quota_reached")
            assert "details" not in answer.json()
            assert "mina-busy" not in answer.text
            assert "1 " not in answer.json()["error"]


def test_storage_and_files_of_an_owner(owners: Owners, mina: httpx.Client) -> None:
    set_quotas(owners, "mina", storage_mb=1, disk_mb=1)
    value = "x" * 100_000
    put, refused = at_once(lambda n: mina.put(f"/api/storage/kv/mine/{n}", json={"value": value}))
    assert len(put) == 10
    assert {(each.status_code, each.json()["code"]) for each in refused} == {(409, "quota_reached")}
    filled = mina.post(
        "/api/storage/d1/mine/exec", json={"sql": "CREATE TABLE t (x); INSERT INTO t VALUES (zeroblob(90000))"}
    )
    assert (filled.status_code, filled.json()["code"]) == (409, "quota_reached")
    assert mina.delete("/api/storage/kv/mine").is_success
    assert mina.put("/api/storage/kv/mine/again", json={"value": value}).is_success
    mina.delete("/api/storage/kv/mine")

    mina.post("/api/sessions", json={"language": "python", "session_id": "mina-disk"})
    url = "/api/sessions/mina-disk/files"
    assert mina.put(f"{url}/a", content=bytes(1 << 20)).is_success
    full = mina.put(f"{url}/b", content=b"1")
    assert (full.status_code, full.json()["code"]) == (409, "quota_reached")
    assert full.json()["details"]["filled_by"] == ["mina-disk"]
    assert mina.get("/api/sessions/mina-disk/files").json()["count"] == 1
    run = mina.post("/api/sessions/mina-disk/run", json={"code": "open('b', 'w').write('1')"}).json()
    assert (run["status"], run["state"]["committed"]) == ("disk_full", False)
    assert mina.delete(f"{url}/a").is_success
    assert mina.put(f"{url}/b", content=b"1").is_success


def test_what_is_set_and_who_may(owners: Owners, mina: httpx.Client) -> None:
    for method, path in (("GET", "/api/owners"), ("GET", "/api/owners/mina"), ("PATCH", "/api/owners/mina")):
        refused = mina.request(method, path, json={"quotas": {"sessions": 1}} if method == "PATCH" else None)
        assert (refused.status_code, refused.json()["code"]) == (403, "not_operator")
    set_quotas(owners, "mina", sessions=3)
    shown = set_quotas(owners, "mina", sandboxes=2)
    assert shown["set"] == {"sessions": 3, "sandboxes": 2}
    assert (shown["quotas"]["sessions"], shown["quotas"]["disk_mb"]) == (3, 0)
    assert set_quotas(owners, "mina", sessions=None)["set"] == {"sandboxes": 2}
    assert [each["owner"] for each in owners.operator.get("/api/owners").json()["owners"]].count("mina") == 1
    own = mina.get("/api/quotas").json()
    assert own["owner"] == "mina"
    assert own["key"]["scopes"] == ["read", "run", "write"]
    for wrong, said in (
        ({"sesions": 1}, "sessions"),
        ({"sessions": -1}, "sessions"),
        ({"sessions": 1.5}, "sessions"),
        ({"sessions": True}, "sessions"),
        ({"sessions": 1 << 60}, "sessions"),
    ):
        answer = owners.operator.patch("/api/owners/mina", json={"quotas": wrong})
        assert answer.status_code == 400, wrong
        assert said in answer.text
    misspelt = owners.operator.patch("/api/owners/mina", json={"quotas": {"sesions": 1}}).json()
    assert misspelt["hint"] == "Did you mean 'sessions'?"
    of_key = owners.operator.post("/api/keys", json={"owner": "mina", "quotas": {"storage_mb": 1}})
    assert of_key.status_code == 400
    assert "runs_per_minute" in of_key.json()["hint"]
    assert owners.operator.patch("/api/owners/a%20b", json={"quotas": {}}).status_code == 400


def test_usage_of_a_day(owners: Owners, mina: httpx.Client) -> None:
    mina.post("/api/sessions", json={"language": "python", "session_id": "mina-usage"})

    def today(client: httpx.Client, **query: str) -> dict[str, Any]:
        answer = client.get("/api/usage", params=query)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["count"] == len(body["usage"])
        found: dict[str, Any] = next((day for day in body["usage"] if day["owner"] == "mina"), {"runs": 0})
        return found

    before = today(mina)["runs"]
    for _ in range(3):
        assert mina.post("/api/sessions/mina-usage/run", json={"code": "open('f', 'w').write('12345')"}).is_success
    assert mina.post("/api/execute", json={"language": "python", "code": "1"}).is_success
    after = today(mina)
    assert after["runs"] == before + 4
    assert after["disk_bytes"] >= 5
    assert after["cpu_seconds"] >= 0
    assert {day["owner"] for day in mina.get("/api/usage").json()["usage"]} == {"mina"}
    assert today(owners.operator, owner="mina")["runs"] == after["runs"]
    assert "mina" in {day["owner"] for day in owners.operator.get("/api/usage").json()["usage"]}
    assert mina.get("/api/usage?owner=default").status_code == 403
    for query in ("since=yesterday", "until=2026-13-01", "since=2026-1-1x", "owner=a%20b"):
        assert owners.operator.get(f"/api/usage?{query}").status_code == 400, query
    assert mina.get("/api/usage?since=2020-01-01&until=2020-01-02").json() == {"usage": [], "count": 0}
