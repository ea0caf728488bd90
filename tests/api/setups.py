"""Sessions with a setup: making them, waiting for the setup, listing the packages."""

from __future__ import annotations

import time
from typing import Any

import httpx

from era.wire.setup import EnvironmentAnswer
from tests.api.answers import SESSION_KEYS, checked

UNREACHABLE = (
    "These tests install small packages and need the registries that pip and npm of this machine are set up for."
)

SETTLE_SECONDS = 300.0
SETUP_KEYS = SESSION_KEYS | {"setup_status", "setup_result"}


def settled(client: httpx.Client, where: str, status: str = "completed") -> dict[str, Any]:
    """Wait until the setup has ended, with this status; returns the session."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        shown: dict[str, Any] = client.get(f"/api/sessions/{where}").json()
        if shown["setup_status"] not in ("pending", "running"):
            break
        assert shown["setup_result"] is None
        assert time.monotonic() < deadline, f"The setup takes too long. {UNREACHABLE}"
        time.sleep(0.02)
    result = shown["setup_result"]
    assert "can't be reached" not in (result["error"] or ""), f"{result['error']}\n{UNREACHABLE}"
    assert shown["setup_status"] == status, result
    assert result["success"] is (status == "completed")
    return shown


def make(client: httpx.Client, setup: Any, language: str = "python", **fields: Any) -> str:
    """Make a session with a setup, without waiting for it; returns its id."""
    answer = client.post("/api/sessions", json={"language": language, "setup": setup, **fields})
    assert answer.status_code == 201, answer.text
    assert answer.json()["setup_status"] == "pending"
    return str(answer.json()["id"])


def environment(client: httpx.Client, where: str) -> dict[str, Any]:
    """The packages of a session, as `GET …/environment` lists them."""
    keys = {"session_id", "setup_status", "environment", "pip", "npm", "go"}
    return checked(client.get(f"/api/sessions/{where}/environment"), EnvironmentAnswer, keys)
