"""Which name somebody meant who wrote another one."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LONGEST = 128
"""Characters of a name that is compared: comparing takes time that grows with the product of the lengths."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The known name that `name` was probably meant to be, None where none is near.

    Case and separators don't count; a word of a name, or its beginning, is near (`id` to `session_id`, `lang` to
    `language`). `cutoff` is how much of two names must be the same otherwise, from 0 to 1.
    """
    from difflib import get_close_matches  # only who has made a mistake waits for this import

    if not 1 < len(name) <= _LONGEST:
        return None
    plain = {_plain(each): each for each in known}
    wanted = _plain(name)
    if wanted in plain:
        return plain[wanted]
    close = get_close_matches(wanted, plain, 1, cutoff)
    if close:
        return plain[close[0]]
    if cutoff > 0.7:  # where names must be nearly the same, a part of one is not enough
        return None
    return next(
        (
            each
            for short, each in plain.items()
            if wanted in re.split(r"[_.-]", each.lower()) or (len(wanted) > 2 and short.startswith(wanted))
        ),
        None,
    )


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The hint for a name that there isn't: the one that was probably meant, or `otherwise`."""
    found = nearest(name, known)
    return otherwise if found is None else f"Did you mean '{found}'?"


def _plain(name: str) -> str:
    return re.sub(r"[_.\s-]", "", name).lower()
