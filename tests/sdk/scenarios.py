"""The scenarios that every client of the API runs (scenarios.json says what a step is), and how results compare."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.documents import is_part

LIST = json.loads((Path(__file__).parent / "scenarios.json").read_text())["scenarios"]


class Refused(Exception):
    """A step ended with an error of this code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Names:
    """What @S and $NAME stand for in one scenario."""

    prefix: str = field(default_factory=lambda: f"s{uuid4().hex[:10]}")
    saved: dict[str, str] = field(default_factory=dict)

    def filled(self, value: Any) -> Any:
        """A value with names replaced, in all its strings."""
        if isinstance(value, str):
            value = value.replace("@S", self.prefix)
            return re.sub(r"\$([A-Z]+)", lambda match: self.saved.get(match[1], match[0]), value)
        if isinstance(value, list):
            return [self.filled(each) for each in value]
        if isinstance(value, dict):
            return {self.filled(name): self.filled(each) for name, each in value.items()}
        return value

    def save(self, step: dict[str, Any], value: Any) -> None:
        for name, path in step.get("save", {}).items():
            found = value
            for part in path:
                found = found[part]
            self.saved[name] = found


def compare(step: dict[str, Any], value: Any, error: str | None) -> None:
    """Assert that a step, whose names are filled in, came out as it says."""
    assert error == step.get("error"), f"{step['call']}: {error or 'no error'}, not {step.get('error')}: {value!r}"
    if "expect" in step:
        assert is_part(step["expect"], value), f"{step['call']} gives\n{value!r}, not\n{step['expect']!r}"


def bytes_of(content: Any) -> bytes:
    """The content of a file, as a scenario writes it."""
    return content.encode() if isinstance(content, str) else base64.b64decode(content["base64"])


def shown(content: bytes | None) -> Any:
    return None if content is None else {"base64": base64.b64encode(content).decode()}
