"""The destinations of one run, as its record shows them."""

from __future__ import annotations

from dataclasses import dataclass, field

from era.core.allowlist import Address
from era.core.models import JsonObject

MAX_DESTINATIONS = 100
"""Of one run that are named on its record."""


@dataclass(slots=True)
class Traffic:
    """Bytes that a program has `sent` and `received`, and the names of `secrets` whose values were swapped in."""

    sent: int = 0
    received: int = 0
    secrets: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Destination:
    """What all connections to one destination have in common."""

    connections: int = 0
    traffic: Traffic = field(default_factory=Traffic)


class Destinations:
    """Counts the connections of one run, those that were refused among them."""

    def __init__(self) -> None:
        self._tried: dict[tuple[str, int, str | None, str | None], _Destination] = {}
        self._rest = _Destination()
        """What isn't named: how much goes there is counted all the same."""

        self._made = self._refused = 0

    def note(self, host: str, port: int, address: Address | None, reason: str | None) -> Traffic:
        """Put a connection on record, and return where to count its bytes.

        `host` is the name that the run asked for, else the address; `address` is None for a name that wasn't resolved;
        `reason` is the rule or failure because of which there is no connection, None where there is one."""
        key = (host, port, None if address is None else str(address), reason)
        tried = self._tried.get(key)
        if tried is None:
            tried = self._rest
            if len(self._tried) < MAX_DESTINATIONS:
                tried = self._tried[key] = _Destination()
        tried.connections += 1
        self._made += reason is None
        self._refused += reason is not None
        return tried.traffic

    def report(self) -> JsonObject:
        """The record's `egress`: up to MAX_DESTINATIONS of `destinations`, and how many `more` connections there were.
        Of all of them, how many were `made` and `refused`, and the bytes `sent` and `received`, together `bytes`."""
        every = [self._rest.traffic, *(tried.traffic for tried in self._tried.values())]
        sent, received = sum(each.sent for each in every), sum(each.received for each in every)
        return {
            "destinations": [
                {
                    "host": host,
                    "port": port,
                    "address": address,
                    "allowed": reason is None,
                    "reason": reason,
                    "connections": tried.connections,
                    "sent": tried.traffic.sent,
                    "received": tried.traffic.received,
                    **({"secrets": sorted(tried.traffic.secrets)} if tried.traffic.secrets else {}),
                }
                for (host, port, address, reason), tried in self._tried.items()
            ],
            "more": self._rest.connections,
            "made": self._made,
            "refused": self._refused,
            "sent": sent,
            "received": received,
            "bytes": sent + received,
        }
