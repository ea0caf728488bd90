"""What a caller takes, by its header Accept (RFC 9110, section 12.5.1)."""

from __future__ import annotations

import re

_WEIGHT = re.compile(r"q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*", re.IGNORECASE)


def prefers(accept: str, wanted: str, usual: str) -> bool:
    """Whether a caller with this header wants the media type `wanted` more than `usual`. Who takes both alike, or says
    nothing of either, gets the usual one."""
    weights = _weights(accept)
    return _weight(weights, wanted) > _weight(weights, usual)


def takes(accept: str, wanted: str) -> bool:
    """Whether a caller with this header names the media type `wanted`, or all of its kind, as one that he takes. `*/*`
    doesn't name any."""
    weights = _weights(accept)
    weights.pop("*/*", None)
    return _weight(weights, wanted) > 0


def _weight(weights: dict[str, float], kind: str) -> float:
    """From 0 to 1, as the narrowest range says that the media type is in."""
    ranges = (kind, f"{kind.partition('/')[0]}/*", "*/*")
    return next((weights[each] for each in ranges if each in weights), 0.0)


def _weights(accept: str) -> dict[str, float]:
    """The weight of each range of media types that the header names; parameters apart."""
    found: dict[str, float] = {}
    for item in accept.split(","):
        kind, *parameters = item.split(";")
        given = [match for each in parameters if (match := _WEIGHT.fullmatch(each.strip()))]
        weight = float(given[0][1]) if given else 1.0
        kind = kind.strip().lower()
        found[kind] = max(weight, found.get(kind, 0.0))
    return found
