"""The errors of a capsule that can't be written or accepted."""

from __future__ import annotations

from era.errors import BadRequest, TooLarge

MAX_OBJECTS = 1_000_000
"""Bound of a capsule's objects, for exports and imports alike."""

_HINT = "Export the session once more; docs/capsule.md tells what a capsule holds."


def bad_capsule(problem: str) -> BadRequest:
    """The error for a capsule that can't be accepted. `problem` completes the sentence "The capsule …"."""
    return BadRequest(f"The capsule {problem}.", hint=_HINT, code="bad_capsule")


def too_large(problem: str) -> TooLarge:
    """The error for a capsule beyond a bound. `problem` completes the sentence "The capsule …"."""
    return TooLarge(f"The capsule {problem}.", hint="Leave history out of it (?versions=current), or remove files.")
