"""What the documents' examples print, compared with what stands below them: JSON that is a part, or text with `…`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = ROOT / ".tools" / "agents"
"""Where scripts/setup --test installs the frameworks that adapters are for."""

DEFAULT_URL = "http://127.0.0.1:8787"
"""The server's address in examples."""


def prints(kind: str, expected: str, printed: str) -> bool:
    """Whether a program printed what stands in the block of this kind (`json` or `text`) below it."""
    if kind == "json":
        return is_part(json.loads(expected), last_json(printed))
    return matches(expected.strip(), printed.strip())


def is_part(expected: Any, actual: Any) -> bool:
    """Whether `actual` has everything that is expected. Objects may have more names; lists must be as long."""
    if isinstance(expected, dict):
        return isinstance(actual, dict) and all(
            name in actual and is_part(value, actual[name]) for name, value in expected.items()
        )
    if isinstance(expected, list):
        return (
            isinstance(actual, list)
            and len(expected) == len(actual)
            and all(is_part(item, other) for item, other in zip(expected, actual, strict=True))
        )
    if isinstance(expected, str):
        return isinstance(actual, str) and matches(expected, actual)
    return type(expected) is type(actual) and bool(expected == actual)


def matches(expected: str, actual: str) -> bool:
    """Whether the texts are equal, with `…` for anything."""
    pattern = ".*".join(re.escape(part) for part in expected.split("…"))
    return re.fullmatch(pattern, actual, re.DOTALL) is not None


def last_json(text: str) -> Any:
    """The last of the JSON values that follow each other in `text`."""
    decoder, rest = json.JSONDecoder(), text.strip()
    value: Any = None
    while rest:
        value, end = decoder.raw_decode(rest)
        rest = rest[end:].lstrip()
    return value
