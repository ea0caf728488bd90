"""What the tests of the users' guide share."""

from __future__ import annotations

from typing import Any

LANGUAGES = ("python", "node", "typescript")
SHELF: dict[str, Any] = {"visits": 0, "readers": ["mina", "otto"], "shelf": {"colour": "green", "room_for": 40}}
