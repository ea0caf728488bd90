"""What is known of an installation while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from era.core.models import JsonObject
from era.core.setup.progress import Say


@dataclass(slots=True)
class Making:
    """An installation under way."""

    scratch: Path
    deadline: float
    """Of the monotonic clock."""

    say: Say | None
    variables: Mapping[str, str]
    """Environment variables of the tools."""

    waits_as: str | None = None
    """The owner in whose turn its tools wait for a slot; None where it has one for as long as it lasts."""

    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    npm: list[JsonObject] = field(default_factory=list)
    """The lock's entries for node_modules."""

    built_for: str | None = None
    """The session that it belongs to (Build.owner), if some of it was built."""
