"""Validators for untrusted input: predicates for the fields of capsule.json, and the errors of a bad capsule."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from era.errors import BadRequest, TooLarge

type Check = Callable[[Any], bool]
"""Whether a JSON value is valid for a field."""

MAX_NUMBER = (1 << 53) - 1  # the largest integer that every JSON reader can represent
MAX_MICROS = 253_402_300_799_000_000
"""The last second of the year 9999 in microseconds since 1970, the last that RFC 3339 can express."""

MAX_OBJECTS = 1_000_000
"""Bound of a capsule's objects, for exports and imports alike."""

_DIGEST = re.compile("[0-9a-f]{64}")
_HINT = "Export the session once more; docs/capsule.md tells what a capsule holds."


def bad_capsule(problem: str) -> BadRequest:
    """The error for a capsule that can't be accepted. `problem` completes the sentence "The capsule …"."""
    return BadRequest(f"The capsule {problem}.", hint=_HINT, code="bad_capsule")


def too_large(problem: str) -> TooLarge:
    """The error for a capsule beyond a bound. `problem` completes the sentence "The capsule …"."""
    return TooLarge(f"The capsule {problem}.", hint="Leave history out of it (?versions=current), or remove files.")


def check_fields(value: Any, fields: Mapping[str, Check], where: str) -> dict[str, Any]:
    """`value`, if it is an object with exactly these fields, all valid. Raises BadRequest, which names the field.

    `where` says what the object is, with an article.
    """
    if not isinstance(value, dict):
        raise bad_capsule(f"has {where} that is no object")
    for name in value.keys() - fields.keys():
        raise bad_capsule(f"has {where} with a field '{name[:40]}' that this server doesn't know")
    for name, check in fields.items():
        if name not in value:
            raise bad_capsule(f"has {where} without '{name}'")
        if not check(value[name]):
            raise bad_capsule(f"has {where} whose '{name}' can't be right")
    return value


def integer(least: int = 0, most: int = MAX_NUMBER) -> Check:
    """An integer in this range, both ends included."""
    return lambda value: type(value) is int and least <= value <= most


def matching(pattern: str) -> Check:
    """A string that matches a regular expression as a whole."""
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def one_of(*values: str) -> Check:
    return lambda value: isinstance(value, str) and value in values


def text(longest: int) -> Check:
    """A string of up to `longest` characters."""
    return lambda value: isinstance(value, str) and len(value) <= longest


def optional(check: Check) -> Check:
    """null, or what `check` accepts."""
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    """A list, of what `check` accepts."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def object_of(needed: Mapping[str, Check], others: Mapping[str, Check]) -> Check:
    """An object with the fields `needed`, some of the `others`, and no more."""
    every = {**needed, **others}
    return lambda value: (
        isinstance(value, dict)
        and needed.keys() <= value.keys() <= every.keys()
        and all(every[name](field) for name, field in value.items())
    )


def is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_seconds(value: Any) -> bool:
    """A timeout: a positive number of seconds, up to some 30 years."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e9


def is_digest(value: Any) -> bool:
    """A SHA-256 in hexadecimal."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


is_time = integer(0, MAX_MICROS)
"""A time in microseconds since 1970."""
