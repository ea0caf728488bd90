"""Which addresses programs may be connected to.

Theory of operation. A name can mean anything: `2130706433` and `0177.1` are the loopback address to every resolver, a
name of an attacker's own may lead anywhere, and to somewhere else a moment later. So nothing is decided by name: the
address is judged that a program connects to, and the connection is made to that address.

An IPv6 address may embed an IPv4 address that some router or the kernel unwraps. Such a one is judged by the embedded
address too.

Whether an address is one of this machine's own only the kernel knows, and only now: interfaces come and go. It says so
by letting a socket be bound to it.

*The server's own addresses.* Programs reach none of PostgreSQL, S3 and the other hosts of the cluster. Most have
private addresses, which are closed to programs anyway. But some are public, and some are in a range that
ERA_EGRESS_PRIVATE opens for the sake of others there. So they are checked for each address, too. What stands in
settings may be names, and a name may lead elsewhere once a database has failed over: names are looked up again and
again, and where that fails, what was found before stays.

Public URLs are for programs as for anybody. Any host takes any call, so a program that calls another host is served by
this one, in its own process (egress.py), and reaches no other.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address, ip_network
from urllib.parse import urlsplit

import structlog

from era.core.allowlist import Address, Range
from era.errors import BadRequest
from era.network.dialing import Resolve, family, resolve


@dataclass(frozen=True, slots=True)
class Rule:
    """Why an address is refused."""

    name: str
    why: str
    may_be_lifted: bool = False
    """Whether the setting ERA_EGRESS_PRIVATE may allow ranges of these."""


NOT_IN_ALLOWLIST = Rule("not_in_allowlist", "the session's egress.allow doesn't have it")
OWN = Rule("own_address", "it is an address of the machine that ERA runs on")
SERVER = Rule("server_address", "it is an address of what ERA works with, such as its database or another host")
CLOSED = Rule("closed", "the server's ERA_EGRESS_REFUSED has it")
_UNSPECIFIED = Rule("unspecified", "it is no address of anything")
_LOOPBACK = Rule("loopback", "it is a loopback address")
_LINK_LOCAL = Rule("link_local", "it is a link-local address, where clouds serve credentials")
_PLATFORM = Rule("cloud_platform", "it is where a cloud serves its machines, and may give them credentials")
_PRIVATE = Rule("private", "it is in a private network", may_be_lifted=True)
_SHARED = Rule("shared", "it is in a provider's own network (CGNAT)", may_be_lifted=True)
_MULTICAST = Rule("multicast", "it is a multicast address")
_RESERVED = Rule("reserved", "it is reserved")

_RANGES: tuple[tuple[Range, Rule], ...] = tuple(
    (ip_network(text), rule)
    for rule, texts in (
        (_UNSPECIFIED, ("0.0.0.0/8", "::/128")),
        (_LOOPBACK, ("127.0.0.0/8", "::1/128")),
        (_LINK_LOCAL, ("169.254.0.0/16", "fe80::/10")),
        # Azure, Alibaba, Oracle; AWS, Google. Before the ranges that hold them, which may be lifted.
        (_PLATFORM, ("168.63.129.16/32", "100.100.100.200/32", "192.0.0.192/32", "fd00:ec2::/32", "fd20:ce::254/128")),
        (_PRIVATE, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fec0::/10", "198.18.0.0/15")),
        (_SHARED, ("100.64.0.0/10",)),
        (_MULTICAST, ("224.0.0.0/4", "ff00::/8")),
        # The last three: Teredo, whose servers we don't know; NAT64 of a network's own; discarded by routers.
        (_RESERVED, ("192.0.0.0/24", "240.0.0.0/4", "2001::/32", "64:ff9b:1::/48", "100::/64")),
    )
    for text in texts
)
_EMBEDDED = tuple(
    # Addresses in this range embed an IPv4 address, whose lowest bit is this one counted from the right.
    (ip_network(text), bit)
    for text, bit in (
        ("::ffff:0:0/96", 0),
        ("::/96", 0),
        ("::ffff:0:0:0/96", 0),
        ("64:ff9b::/96", 0),
        ("2002::/16", 80),
    )
)
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)
"""The 32 bits before the IPv4 address in the lower half of an ISATAP address (RFC 5214), whatever its upper half."""


class Policy:
    """The server's policy, the same for all sessions."""

    def __init__(
        self, private: Sequence[Range] = (), closed: Sequence[Range] = (), servers: Container[Address] = ()
    ) -> None:
        """`private` are ranges that may be connected to although they are private, `closed` those that may not be
        whatever they are, and `servers` addresses of what ERA works with."""
        self._private = tuple(private)
        self._closed = tuple(closed)
        self._servers = servers

    def refuses(self, address: Address) -> Rule | None:
        """The rule that refuses this address, None where it may be connected to."""
        forms = [address, *embedded(address)]
        for form in forms:
            for network, rule in _RANGES:
                if form in network and not (rule.may_be_lifted and self._is_lifted(form)):
                    # ::1 and :: embed IPv4 addresses too, but their own rules come first.
                    return rule
            if form in self._servers:
                return SERVER
            if any(form in network for network in self._closed):
                return CLOSED
        return OWN if any(map(is_own, forms)) else None

    def _is_lifted(self, address: Address) -> bool:
        return any(address in network for network in self._private)


def embedded(address: Address) -> list[IPv4Address]:
    """The IPv4 addresses that an IPv6 address embeds."""
    if isinstance(address, IPv4Address):
        return []
    number = int(address)
    found = [IPv4Address(number >> bit & 0xFFFF_FFFF) for network, bit in _EMBEDDED if address in network]
    if number >> 32 & 0xFFFF_FFFF in _ISATAP:
        found.append(IPv4Address(number & 0xFFFF_FFFF))
    return found


def is_own(address: Address) -> bool:
    """Whether this machine has this address now."""
    try:
        with socket.socket(family(address), socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        # Any other error than "no such address" or "no such family" proves nothing, so the worse is assumed.
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def ranges(text: str, setting: str) -> list[Range]:
    """Parse a setting: ranges and addresses separated by commas. Raises BadRequest."""
    found: list[Range] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(ip_network(entry))
        except ValueError:
            raise BadRequest(
                f"{setting} has {entry[:80]!r}, which is no range of addresses.",
                hint="Write ranges as 10.1.0.0/16, separated by commas.",
            ) from None
    return found


def private_ranges(text: str) -> list[Range]:
    """Parse ERA_EGRESS_PRIVATE. Raises BadRequest for a range that may not be allowed."""
    found = ranges(text, "ERA_EGRESS_PRIVATE")
    for network in found:
        liftable = [known for known, rule in _RANGES if rule.may_be_lifted]
        if not any(network.version == known.version and network.subnet_of(known) for known in liftable):  # type: ignore[arg-type]  # both of one version
            raise BadRequest(
                f"ERA_EGRESS_PRIVATE has '{network}', which is not within a private range.",
                hint="It may name ranges of " + ", ".join(map(str, liftable)) + "; all else is decided already.",
            )
    return found


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
