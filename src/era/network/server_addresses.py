"""The addresses of what a server works with: PostgreSQL, S3, the other hosts of its cluster. Programs reach none.

Theory of operation. Most have private addresses, which are closed to programs anyway. But some are public, and some are
in a range that ERA_EGRESS_PRIVATE opens for the sake of others there. So whoever judges an address (policy.py) asks
here, too. What stands in settings may be names, and a name may lead elsewhere once a database has failed over: names
are looked up again and again, and where that fails, what was found before stays.

Public URLs are for programs as for anybody. Any host takes any call, so a program that calls another host is served by
this one, in its own process (egress.py), and reaches no other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

import structlog

from era.core.allowlist import Address
from era.network.dialing import Resolve, resolve

log = structlog.get_logger()

_LOOK_SECONDS = 2.0
_AGAIN_SECONDS = 30.0
"""After which a name is looked up once more."""


class ServerAddresses:
    """They, as they were when it was last looked. `look` before the first program runs, and `keep` from then on."""

    def __init__(
        self,
        names: Iterable[str] = (),
        hosts: Callable[[], Iterable[str]] = tuple,
        lookup: Resolve = resolve,
    ) -> None:
        """`names` are names and addresses of servers; `hosts` says the URLs of the hosts of the cluster."""
        self._names = tuple(names)
        self._hosts = hosts
        self._lookup = lookup
        self._found: dict[str, Sequence[Address]] = {}
        self._looked_at: dict[str, float] = {}
        self._addresses: frozenset[Address] = frozenset()
        self._plain: frozenset[tuple[Address, int]] = frozenset()

    def __contains__(self, address: object) -> bool:
        return address in self._addresses

    def has_host(self, address: Address, port: int) -> bool:
        """Whether a host of the cluster is called there, not over TLS."""
        return (address, port) in self._plain

    async def look(self) -> None:
        """Find out which they are now."""
        urls = [urlsplit(url) for url in self._hosts()]
        names = {*self._names, *(url.hostname for url in urls if url.hostname)}
        found = {name: await self._of(name) for name in names}
        self._addresses = frozenset(address for some in found.values() for address in some)
        self._plain = frozenset(
            (address, url.port or 80)
            for url in urls
            if url.scheme == "http" and url.hostname
            for address in found[url.hostname]
        )
        self._found = found

    async def keep(self) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self.look()

    async def _of(self, name: str) -> Sequence[Address]:
        """The addresses of a name, or those that were found before."""
        try:
            return [ip_address(name)]
        except ValueError:
            pass
        before = self._found.get(name, ())
        if name in self._found and time.monotonic() < self._looked_at[name] + _AGAIN_SECONDS:
            return before
        self._looked_at[name] = time.monotonic()
        try:
            return await self._lookup(name, 0)
        except (OSError, UnicodeError) as error:
            log.warning("server_not_found", name=name, error=str(error), then="programs may reach its new addresses")
            return before
