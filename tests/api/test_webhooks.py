"""Webhooks over HTTP: each owner's own; what can't be one is refused; what happens is told."""

from __future__ import annotations

import pytest

from tests.api.owners import Owners
from tests.api.test_audit import done

NOWHERE = "http://203.0.113.7/era"
"""An address that is for documents (RFC 5737): public, and nobody's."""


def test_a_webhook_is_made_shown_and_deleted_by_its_owner_only(owners: Owners) -> None:
    ada, mallory = owners.ada, owners.mallory
    made = ada.post("/api/webhooks", json={"url": NOWHERE, "events": ["run.ended", "run.ended"], "description": "mine"})
    assert (made.status_code, made.headers["Cache-Control"]) == (201, "no-store")
    webhook = made.json()
    secret = webhook.pop("secret")
    assert secret.startswith("whsec_")
    assert webhook == {
        "id": webhook["id"],
        "url": NOWHERE,
        "events": ["run.ended"],
        "description": "mine",
        "created_at": webhook["created_at"],
        "pending": 0,
        "done": 0,
        "failed": 0,
        "dropped": 0,
    }
    listed = ada.get("/api/webhooks")
    assert listed.json() == {"webhooks": [webhook], "count": 1}
    path = f"/api/webhooks/{webhook['id']}"
    for stranger in (mallory, owners.operator):
        assert stranger.get("/api/webhooks").json() == {"webhooks": [], "count": 0}
        assert stranger.get(f"{path}/deliveries").status_code == 404
        assert stranger.delete(path).status_code == 404
    rows = b"".join(file.read_bytes() for file in owners.server.content_dir.glob("era.sqlite*"))
    assert NOWHERE.encode() in rows
    assert secret.encode() not in rows
    assert secret not in owners.server.log
    assert ada.delete(path).json() == {"success": True, "id": webhook["id"]}
    assert ada.delete(path).status_code == 404
    assert done(ada, webhook["id"]) == [("webhook.create", {"events": ["run.ended"]}), ("webhook.delete", {})]


def test_what_happens_is_on_its_way_when_it_is_answered(owners: Owners) -> None:
    ada = owners.ada
    path = f"/api/webhooks/{ada.post('/api/webhooks', json={'url': NOWHERE}).json()['id']}"
    assert ada.post("/api/sessions", json={"language": "python", "session_id": "told-of"}).status_code == 201
    run = ada.post("/api/sessions/told-of/run", json={"code": "print(1)"}).json()
    assert run["status"] == "ok"
    answer = ada.get(f"{path}/deliveries").json()
    newest, oldest = answer["deliveries"]
    assert (newest["event"], oldest["event"], answer["count"]) == ("run.ended", "session.created", 2)
    assert {each["status"] for each in (newest, oldest)} == {"pending"}
    assert ada.get("/api/webhooks").json()["webhooks"][0]["pending"] == 2
    assert ada.delete(path).is_success
    assert ada.delete("/api/sessions/told-of?purge=true").is_success


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ({"url": "http://127.0.0.1:1/"}, "webhook_refused", "loopback"),
        ({"url": "http://[::ffff:10.0.0.1]/"}, "webhook_refused", "private"),
        ({"url": "http://169.254.169.254/latest"}, "webhook_refused", "link-local"),
        ({"url": "ftp://203.0.113.7/"}, "invalid_field", "https://"),
        ({"url": "http://user:pass@203.0.113.7/"}, "invalid_field", "password"),
        ({"url": ""}, "invalid_field", "url"),
        ({}, "invalid_field", "url"),
        ({"url": NOWHERE, "events": []}, "invalid_field", "events"),
        ({"url": NOWHERE, "events": ["run.begun"]}, "invalid_field", "'run.ended'"),
        ({"url": NOWHERE, "secret": "mine"}, "invalid_field", "secret"),
    ],
)
def test_what_can_be_no_webhook_is_a_400(owners: Owners, body: dict[str, object], code: str, said: str) -> None:
    answer = owners.ada.post("/api/webhooks", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, code), answer.text
    assert said in answer.text
    assert answer.json()["hint"]
    assert owners.ada.get("/api/webhooks").json()["count"] == 0
