"""The connections of callers: how many there are at a time, of each and in all.

Whoever can connect can open connections on which no request ever arrives, without any key. They end when their time is
up (protocol.py), but in that time there could be more than the service has descriptors. So callers share the number of
connections (core/shares.py), by the addresses that they come from. A caller who may have no more loses the oldest of
those that are *half-open*: whose request isn't there yet, unless it came with a key. Only if there is none, the new one
is refused. So who floods the service harms himself, and even from his own address requests that come at once, as all
ordinary ones do, are answered. Uploads of those with a key are never cut off, however slow they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import Protocol

from era.core.shares import Shares


class Connection(Protocol):
    """A connection of a caller."""

    @property
    def is_half_open(self) -> bool:
        """Whether a request is still awaited, or its body, from somebody unknown."""
        ...

    def give_up(self) -> None:
        """Close it to make room for another one."""
        ...


class Callers:
    """All connections, of whom each is, and which of them is given up when there are too many."""

    def __init__(self, most: int) -> None:
        self._shares: Shares[str] = Shares(most)
        self._holders: dict[Connection, str] = {}
        """Whose each one is. The connections that have waited longest come first."""

        self._of: dict[str, dict[Connection, None]] = {}
        """The same by holder."""

    def __len__(self) -> int:
        return len(self._holders)

    def opened(self, connection: Connection, address: str) -> bool:
        """Count a connection from this address in, or return False where there is no room for it."""
        holder = _holder(address)
        if not self._shares.take(holder):
            # Who has none yet doesn't suffer from others who have all.
            candidates: Iterable[Connection] = self._of.get(holder, {}) or self._holders
            oldest = next((each for each in candidates if each.is_half_open), None)
            if oldest is None:
                return False
            self._shares.hand_over(self._holders[oldest], holder)
            self._forget(oldest)
            oldest.give_up()
        self._holders[connection] = holder
        self._of.setdefault(holder, {})[connection] = None
        return True

    def waits(self, connection: Connection) -> None:
        """A connection awaits another request."""
        if (holder := self._holders.pop(connection, None)) is not None:
            self._holders[connection] = holder
            self._of[holder][connection] = self._of[holder].pop(connection)

    def closed(self, connection: Connection) -> None:
        if (holder := self._holders.get(connection)) is not None:
            self._shares.give_back(holder)
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        holder = self._holders.pop(connection)
        del self._of[holder][connection]
        if not self._of[holder]:
            del self._of[holder]


def _holder(address: str) -> str:
    """Who counts as one caller: an IPv4 address, or the /64 network of an IPv6 address, which is what one is given."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4:
        return str(parsed)
    return str(parsed.ipv4_mapped or ip_network((int(parsed), 64), strict=False))
