"""A session's limits of memory, processors, processes, disk and output: what it asks for, and what it gets.

A session stores only what it asked for, in the units of the API (`memory_mb`, `cpus` and so on). What it gets is worked
out anew for each run: so it follows the server's defaults where it asked for nothing, and never goes over the server's
maxima, whatever those were when it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from era.core.jsontext import number
from era.core.models import JsonObject
from era.core.program import Limits
from era.core.totals import Bounds
from era.errors import BadRequest

_MIB = 1 << 20
_FIELDS = {
    "memory_mb": ("memory_bytes", _MIB),
    "cpus": ("cpus", 1),
    "pids": ("pids", 1),
    "disk_mb": ("disk_bytes", _MIB),
    "files": ("files", 1),
    "output_bytes": ("output_bytes", 1),
}
"""By limit of the API: the field of Limits, and how many of its units one unit of the API is."""

LEAST = {"memory_mb": 64, "cpus": 0.05, "pids": 16, "disk_mb": 1, "files": 16, "output_bytes": 1024}
"""The least that may be asked for, by API limit: with less no program would run."""

_TIMES = 4
"""How many times the default a session may ask for, where the server sets no bound."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The server's limits."""

    defaults: Limits
    """What a session gets that asks for nothing."""

    maxima: Limits
    """The most that a session may ask for."""

    @classmethod
    def of(cls, defaults: Limits, most: Mapping[str, float]) -> Rules:
        """Make rules with these maxima, by API limit. One that is below its default is raised to it."""
        maxima: dict[str, Any] = {}
        for name, (field, unit) in _FIELDS.items():
            default = getattr(defaults, field)
            maxima[field] = max(default, most[name] * unit if name in most else default * _TIMES)
        return cls(defaults, replace(defaults, **maxima))

    @property
    def most(self) -> JsonObject:
        """The maxima by API limit, in the units of the API."""
        return {name: self._in_api(self.maxima, name) for name in _FIELDS}

    @property
    def largest_tree(self) -> Bounds:
        """What the working directory of any session may hold."""
        return bounds(self.maxima)

    def check(self, requested: Mapping[str, float | None]) -> None:
        """Raises BadRequest for a limit over the server's maximum."""
        for name, value in requested.items():
            most = self._in_api(self.maxima, name)
            if value is not None and value > most:
                raise BadRequest(
                    f"'limits.{name}' is {value:g}, at most {most:g} may be asked for.",
                    hint="The server's ERA_MAX_LIMITS sets the bound.",
                )

    def granted(self, requested: Mapping[str, float]) -> Limits:
        """The limits in force for a session that requests these, by API limit; the defaults for the rest."""
        changes: dict[str, Any] = {}
        for name, value in requested.items():
            field, unit = _FIELDS[name]
            changes[field] = min(value * unit, getattr(self.maxima, field))
        if "memory_bytes" in changes:  # of which what is in /tmp is a part
            share = changes["memory_bytes"] / self.defaults.memory_bytes
            changes["tmp_bytes"] = int(self.defaults.tmp_bytes * max(1.0, share))
        return replace(self.defaults, **changes) if changes else self.defaults

    def in_api_units(self, requested: Mapping[str, float]) -> JsonObject:
        """The limits in force, as `granted`, by API limit and in the units of the API."""
        granted = self.granted(requested)
        return {name: self._in_api(granted, name) for name in _FIELDS}

    def _in_api(self, limits: Limits, name: str) -> float:
        field, unit = _FIELDS[name]
        value: float = getattr(limits, field)
        return number(value) if unit == 1 else int(value) // unit


def bounds(limits: Limits) -> Bounds:
    """What a working directory may hold under these limits."""
    return Bounds(entries=limits.files, total_bytes=limits.disk_bytes)


def can_be_limits(value: object) -> bool:
    """Whether this untrusted value is an object of limits that some server could grant."""
    return isinstance(value, dict) and all(
        name in LEAST
        and isinstance(limit, int | float if name == "cpus" else int)
        and not isinstance(limit, bool)
        and LEAST[name] <= limit < 1 << 53
        for name, limit in value.items()
    )


def merged(before: Mapping[str, float], change: Mapping[str, float | None]) -> JsonObject:
    """The limits that a session requests after a change, in which None takes a request back."""
    return {name: value for name, value in {**before, **change}.items() if value is not None}
