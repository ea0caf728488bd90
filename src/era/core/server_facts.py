"""What an operator is shown of a server: the limits that its settings set, and what its machine gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SettingInForce:
    """A setting that bounds something."""

    name: str
    """Of the variable, such as ERA_MAX_WARM."""

    value: float | None
    """What holds, in the unit that the description names; None where nothing was set, or nothing finite."""

    default: float | None
    description: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that this machine has or lacks: a runtime, or a wall around programs."""

    about: str
    """A language or a kind of sandbox."""

    there: bool
    text: str
    remedy: str = ""
    """How to get it where it isn't there."""
