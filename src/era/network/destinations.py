"""Where a run went, or tried to: what its record says of that."""

from __future__ import annotations

from dataclasses import dataclass, field

from era.core.allowlist import Address
from era.core.models import JsonObject
from era.network.http1 import Traffic

MAX_DESTINATIONS = 100
"""Of one run that are named on its record."""


@dataclass(slots=True)
class _Destination:
    """One that was tried; what all connections to it have in common."""

    connections: int = 0
    traffic: Traffic = field(default_factory=Traffic)


class Destinations:
    """Those of one run."""

    def __init__(self) -> None:
        self._tried: dict[tuple[str, int, str | None, str | None], _Destination] = {}
        self._more = 0

    def note(self, host: str, port: int, address: Address | None, reason: str | None) -> Traffic:
        """Put a connection on record; where to count what goes through it."""
        key = (host, port, None if address is None else str(address), reason)
        tried = self._tried.get(key)
        if tried is None:
            tried = _Destination()
            if len(self._tried) < MAX_DESTINATIONS:
                self._tried[key] = tried
            else:
                self._more += 1
        tried.connections += 1
        return tried.traffic

    def report(self) -> JsonObject:
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
            "more": self._more,
        }
