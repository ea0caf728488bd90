"""The audit log: what is recorded, and who sees it."""

from __future__ import annotations

from typing import Any

import httpx

from tests.api.owners import Owners, new_key


def entries(client: httpx.Client, **query: Any) -> list[dict[str, Any]]:
    """The newest entries that a caller sees."""
    answer = client.get("/api/audit", params=query)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["count"] == len(body["entries"])
    found: list[dict[str, Any]] = body["entries"]
    return found


def done(client: httpx.Client, target: str) -> list[tuple[str, dict[str, Any]]]:
    """What was done to something, in order."""
    return [(each["action"], each["details"]) for each in reversed(entries(client, target=target))]


def test_what_is_done_to_a_session_is_recorded(owners: Owners) -> None:
    ada = owners.ada
    made = ada.post("/api/sessions", json={"language": "python", "session_id": "told", "allowPublicAccess": False})
    assert ada.patch("/api/sessions/told", json={"metadata": {"a": "b"}}).is_success
    assert ada.patch("/api/sessions/told", json={"allowPublicAccess": True}).is_success
    assert ada.post("/api/sessions/told/links", json={"path": "f"}).is_success
    assert ada.post("/api/sessions/told/duplicate", json={"id": "copied"}).is_success
    capsule = ada.get("/api/sessions/told/capsule").content
    headers = {"Content-Type": "application/x-tar"}
    assert ada.post("/api/sessions/import?id=brought&public=true", content=capsule, headers=headers).is_success
    assert ada.post("/api/sessions/import?id=closed", content=capsule, headers=headers).is_success
    assert ada.delete("/api/sessions/told").is_success
    assert ada.post("/api/sessions/told/restore").is_success
    assert ada.delete("/api/sessions?purge=true").is_success
    assert done(ada, "told") == [
        ("session.create", {"public": False}),
        ("session.public", {"public": True}),
        ("link.create", {"method": "GET"}),
        ("session.delete", {"purge": False}),
        ("session.restore", {}),
        ("session.delete", {"purge": True}),
    ]
    assert done(ada, "copied")[0] == ("session.create", {"public": True, "copy_of": "told"})
    assert done(ada, "brought")[0] == ("session.create", {"public": True, "how": "import"})
    assert done(ada, "closed")[0] == ("session.create", {"public": False, "how": "import"})
    first = entries(ada, target="told")[-1]
    assert first["request_id"] == made.headers["X-Request-Id"]
    assert first["owner"] == "lovelace"
    assert first["key"].startswith("key_")


def test_the_use_of_secrets_is_recorded_without_their_values(owners: Owners) -> None:
    ada = owners.ada
    ada.post("/api/sessions", json={"language": "python", "session_id": "hush"})
    secrets = {"TOKEN": {"value": "canary-of-the-secret", "hosts": ["api.example.test", "*.example.test"]}}
    where, body = "/api/sessions/hush", {"code": "1", "secrets": secrets}
    assert ada.post(f"{where}/run", json=body).json()["status"] == "ok"
    assert ada.post(f"{where}/stream", json=body).is_success
    assert ada.post(f"{where}/run", json={**body, "background": True}).status_code == 202
    assert ada.post(f"{where}/processes", json={"command": "true", "secrets": secrets}).is_success
    assert ada.post("/api/execute", json={**body, "language": "python"}).is_success
    assert ada.post(f"{where}/run", json={"code": "1"}).is_success
    used = {"secrets": {"TOKEN": ["*.example.test", "api.example.test"]}, "count": 1}
    assert done(ada, "hush") == [("session.create", {"public": True}), *[("secret.use", used)] * 4]
    (outside,) = [each for each in entries(ada, action="secret.use") if each["target"] is None]
    assert outside["details"] == used
    assert "canary" not in str(entries(owners.operator, limit=1000))
    assert "canary" not in owners.server.log
    rows = b"".join(path.read_bytes() for path in owners.server.content_dir.glob("era.sqlite*"))
    assert b"api.example.test" in rows
    assert b"canary-of-the-secret" not in rows


def test_keys_are_recorded_for_the_operator(owners: Owners) -> None:
    key = new_key(owners.server, "short")
    assert owners.operator.delete(f"/api/keys/{key['id']}").is_success
    assert done(owners.operator, key["id"]) == [("key.create", {"owner": "short"}), ("key.revoke", {})]
    newest = entries(owners.operator, action="key.revoke")[0]
    assert (newest["owner"], newest["key"]) == ("default", "operator")
    assert key["key"] not in str(entries(owners.operator, limit=1000))


def test_changes_of_keys_and_quotas_are_recorded(owners: Owners) -> None:
    operator, key = owners.operator, new_key(owners.server, "changing")
    where = f"/api/keys/{key['id']}"
    change = {"scopes": ["read"], "expires_at": "2999-01-31T12:00:00Z", "quotas": {"sessions": 2}}
    assert operator.patch(where, json={**change, "description": "its own business"}).is_success
    rotated = operator.post(f"{where}/rotate", json={"grace_seconds": 5}).json()
    assert operator.patch(where, json={"quotas": {"disk_mb": 3}}).is_success
    assert operator.patch(where, json={"scopes": ["nothing"]}).status_code == 400
    assert operator.post("/api/keys/never/rotate").status_code == 404
    assert done(operator, key["id"]) == [
        ("key.create", {"owner": "changing"}),
        ("key.change", {"scopes": ["read"], "expires_at": "2999-01-31T12:00:00.000Z", "quotas": {"sessions": 2}}),
        ("key.rotate", {"grace_seconds": 5}),
        ("key.change", {"quotas": {"sessions": 2, "disk_mb": 3}}),
    ]
    assert operator.patch("/api/owners/changing", json={"quotas": {"sessions": 9, "disk_mb": None}}).is_success
    assert operator.patch("/api/owners/changing", json={"quotas": {"horses": 9}}).status_code == 400
    assert done(operator, "changing") == [("quotas.change", {"quotas": {"sessions": 9, "disk_mb": None}})]
    assert rotated["key"] not in str(entries(operator, limit=1000))


def test_owners_see_their_own_and_the_operator_all(owners: Owners) -> None:
    for name, client in (("ada", owners.ada), ("mallory", owners.mallory), ("op", owners.operator)):
        assert client.post("/api/sessions", json={"language": "python", "session_id": f"of-{name}"}).is_success
    assert {each["owner"] for each in entries(owners.mallory, limit=1000)} == {"mallory"}
    assert done(owners.mallory, "of-ada") == []
    assert entries(owners.mallory, owner="mallory")
    refused = owners.mallory.get("/api/audit", params={"owner": "lovelace"})
    assert (refused.status_code, refused.json()["code"]) == (403, "not_operator")
    assert done(owners.operator, "of-ada") == [("session.create", {"public": True})]
    assert {each["owner"] for each in entries(owners.operator, limit=1000)} >= {"lovelace", "mallory", "default"}
    assert {each["owner"] for each in entries(owners.operator, owner="mallory")} == {"mallory"}
    assert httpx.get(f"{owners.server.url}/api/audit", timeout=60, trust_env=False).status_code == 401
