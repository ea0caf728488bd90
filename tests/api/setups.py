"""Sessions with a setup: made, waited for, and their packages listed."""

from __future__ import annotations

import time
from typing import Any

import httpx

from era.wire.setup import EnvironmentAnswer
from tests.api.answers import SESSION_KEYS, checked

UNREACHABLE = (
    "These tests install small packages and need the registries that pip and npm of this machine are set up for."
)


SETUP_KEYS = SESSION_KEYS | {"setup_status", "setup_result"}


def settled(client: httpx.Client, where: str, status: str = "completed") -> dict[str, Any]:
    """The session, once its setup has ended as it should."""
    deadline = time.monotonic() + 60
    while (found := client.get(f"/api/sessions/{where}").json())["setup_status"] in ("pending", "running"):
        assert found["setup_result"] is None
        assert time.monotonic() < deadline, f"The setup takes too long. {UNREACHABLE}"
        time.sleep(0.02)
    told = found["setup_result"]
    assert "can't be reached" not in (told["error"] or ""), f"{told['error']}\n{UNREACHABLE}"
    assert found["setup_status"] == status, told
    assert told["success"] is (status == "completed")
    result: dict[str, Any] = found
    return result


def make(client: httpx.Client, setup: Any, language: str = "python", **fields: Any) -> str:
    answer = client.post("/api/sessions", json={"language": language, "setup": setup, **fields})
    assert answer.status_code == 201, answer.text
    assert answer.json()["setup_status"] == "pending"
    return str(answer.json()["id"])


def environment(client: httpx.Client, where: str) -> dict[str, Any]:
    keys = {"session_id", "setup_status", "environment", "pip", "npm", "go"}
    return checked(client.get(f"/api/sessions/{where}/environment"), EnvironmentAnswer, keys)
