"""Exports and imports of capsules over HTTP."""

from __future__ import annotations

from typing import Any

import httpx

from era.wire.sessions import SessionAnswer
from tests.api.answers import SESSION_KEYS, checked

TAR = {"Content-Type": "application/x-tar"}


def export_capsule(client: httpx.Client, session_id: str, **query: str) -> bytes:
    """Export a session; returns the capsule."""
    answer = client.get(f"/api/sessions/{session_id}/capsule", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["content-disposition"] == f'attachment; filename="{session_id}.era.tar"'
    assert int(answer.headers["content-length"]) == len(answer.content)
    return answer.content


def send_capsule(
    client: httpx.Client, capsule: bytes, new_id: str | None = None, *, public: bool = True
) -> httpx.Response:
    """Send a capsule to be imported, as public as it was or not."""
    query = {"id": new_id, "public": str(public).lower()}
    query = {name: value for name, value in query.items() if value is not None}
    return client.post("/api/sessions/import", params=query, content=capsule, headers=TAR)


def import_capsule(
    client: httpx.Client, capsule: bytes, new_id: str | None = None, *, public: bool = True
) -> dict[str, Any]:
    """Import a capsule, which must be accepted; returns the session."""
    return checked(send_capsule(client, capsule, new_id, public=public), SessionAnswer, SESSION_KEYS, 201)
