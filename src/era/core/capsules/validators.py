"""How what comes from outside is told to be what it must be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from era.errors import BadRequest, TooLarge

type Check = Callable[[Any], bool]

MAX_NUMBER = (1 << 53) - 1
MAX_MICROS = 253_402_300_799_999_999
"""The end of the year 9999, beyond which no time can be shown."""

MAX_OBJECTS = 1_000_000
"""Of one capsule, written or read."""

_DIGEST = re.compile("[0-9a-f]{64}")
_HINT = "Export the session once more; docs/capsule.md tells what a capsule holds."


def refused(problem: str) -> BadRequest:
    """An error for a capsule that can't be taken; `problem` completes the sentence "The capsule …"."""
    return BadRequest(f"The capsule {problem}.", hint=_HINT, code="bad_capsule")


def too_large(problem: str) -> TooLarge:
    return TooLarge(f"The capsule {problem}.", hint="Leave history out of it (?versions=current), or remove files.")


def checked(value: Any, fields: Mapping[str, Check], where: str) -> dict[str, Any]:
    """`value` if it is an object with these very fields. Raises BadRequest, naming the field."""
    if not isinstance(value, dict):
        raise refused(f"has {where} that is no object")
    for name in value.keys() - fields.keys():
        raise refused(f"has {where} with a field '{name[:40]}' that this server doesn't know")
    for name, check in fields.items():
        if name not in value:
            raise refused(f"has {where} without '{name}'")
        if not check(value[name]):
            raise refused(f"has {where} whose '{name}' can't be right")
    return value


def integer(least: int = 0, most: int = MAX_NUMBER) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def matching(pattern: str) -> Check:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def one_of(*values: str) -> Check:
    return lambda value: isinstance(value, str) and value in values


def text(longest: int) -> Check:
    return lambda value: isinstance(value, str) and len(value) <= longest


def optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def boolean(value: Any) -> bool:
    return isinstance(value, bool)


def an_object(value: Any) -> bool:
    return isinstance(value, dict)


def seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e9


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


time = integer(0, MAX_MICROS)
