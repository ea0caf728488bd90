"""Capsules of strangers: what of them is run, by whom, and with whose storage."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.answers import refused
from tests.api.capsule_api import TAR, import_capsule, send_capsule
from tests.api.setups import settled
from tests.capsules import capsule, document, session

TAKES = "from era_storage import kv; kv.set('hers', 'taken', 'by a stranger'); print('taken')"
CODE = {"code": TAKES, "description": "", "updated_at": 1}


def of_stranger(**fields: Any) -> bytes:
    """A capsule whose code would take something, with these fields changed."""
    return capsule(document(session(id="hers", code=CODE, **fields)))


@pytest.mark.parametrize("public", [False, True], ids=["closed", "opened by the importer"])
def test_strangers_have_no_code_of_their_capsules_run(client: httpx.Client, public: bool) -> None:
    """Whoever made one knows the session's public URL, and its code has the storage of whoever imported it."""
    shown = import_capsule(client, of_stranger(), public=public)
    assert (shown["allowPublicAccess"], shown["storage"]) == (public, True)
    called = client.post("/proxy/hers/3000/")
    taken = client.get("/api/storage/kv/hers/taken")
    if public:
        assert (called.status_code, called.text, taken.json()["value"]) == (200, "taken\n", "by a stranger")
        client.delete("/api/storage/kv/hers/taken").raise_for_status()
        return
    refused(called, 403, "not public")
    assert taken.status_code == 404
    assert client.get("/api/sessions/hers/runs").json()["count"] == 0
    # Its owner's own calls run it.
    assert client.post("/api/sessions/hers/run", json={"code": "print(1)"}).json()["stdout"] == "1\n"


def test_an_import_opens_no_session_that_was_closed(client: httpx.Client) -> None:
    closed = of_stranger(allowPublicAccess=False)
    assert import_capsule(client, closed, public=True)["allowPublicAccess"] is False
    asked = client.post("/api/sessions/import?id=other&public=perhaps", content=closed, headers=TAR)
    refused(asked, 400, "public")
    refused(send_capsule(client, closed, public=True), 409, "hers")


def test_an_import_runs_only_the_setup_and_without_storage(client: httpx.Client) -> None:
    commands = ["env > seen"]
    assert send_capsule(client, of_stranger(setup={"commands": commands}), public=False).status_code == 201
    assert settled(client, "hers")["setup_result"]["commands_run"] == commands
    seen = client.get("/api/sessions/hers/files/seen").text
    assert "ERA_SESSION_ID=hers" in seen
    assert "ERA_STORAGE" not in seen
    assert client.get("/api/sessions/hers/runs").json()["count"] == 0
