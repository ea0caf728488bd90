"""Where programs may connect to, as a session says it: an allowlist of host names and ranges of addresses.

The allowlist narrows what the server's own policy lets through (network/policy.py) and never widens it. An entry is a
host name (`api.example.com`), all names below one (`*.example.com`, which isn't `example.com` itself), an address or a
range of addresses (`203.0.113.0/24`). No entries at all are no narrowing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from era.core.models import JsonObject
from era.errors import BadRequest

type Address = IPv4Address | IPv6Address
type Range = IPv4Network | IPv6Network

MAX_ENTRIES = 256
MAX_HOST = 253
"""Characters of a host name, by the rules of DNS."""

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


class NotAnEntry(ValueError):
    """This can't be an entry of an allowlist. The message begins with the entry and says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Allowlist:
    """A parsed allowlist."""

    names: frozenset[str]
    below: tuple[str, ...]
    """The domains all names below which are allowed, each with a leading dot."""

    ranges: tuple[Range, ...]

    @property
    def everything(self) -> bool:
        """Whether it has no entries, and so narrows nothing."""
        return not (self.names or self.below or self.ranges)

    def has_name(self, host: str) -> bool:
        """Whether a host of this name may be connected to, whatever its address."""
        host = folded(host)
        return self.everything or host in self.names or host.endswith(self.below)

    def has_address(self, address: Address) -> bool:
        """Whether this address may be connected to, whatever name it has."""
        return any(address in allowed for allowed in self.ranges)


def folded(host: str) -> str:
    """A host name in the form in which names are compared: lower case, ASCII (IDNA), without a dot at its end."""
    host = host.removesuffix(".")
    if len(host) > MAX_HOST:  # so it is none, and IDNA would take half a second for 60 KiB of it
        return host.lower()
    try:
        return host.encode("ascii" if host.isascii() else "idna").decode().lower()
    except UnicodeError:
        return host.lower()


def allowlist(entries: Sequence[str]) -> Allowlist:
    """Parse an allowlist. Raises NotAnEntry."""
    names, below, ranges = set(), [], []
    for entry in entries:
        if (addresses := _range(entry)) is not None:
            ranges.append(addresses)
        elif entry.startswith("*."):
            below.append(f".{_name(entry, entry[2:])}")
        else:
            names.add(_name(entry, entry))
    return Allowlist(frozenset(names), tuple(below), tuple(ranges))


def allowlist_of(egress: JsonObject) -> Allowlist:
    """The allowlist in a session's `egress`, which was checked when it was stored."""
    return allowlist(egress.get("allow", []))


def check(egress: JsonObject) -> None:
    """Raises BadRequest for an allowlist that can't be kept."""
    try:
        allowlist_of(egress)
    except NotAnEntry as problem:
        raise BadRequest(
            f"'egress.allow' has an entry that can't be used: {problem}.",
            hint="An entry is a host (api.example.com), all below one (*.example.com), or addresses (203.0.113.0/24).",
        ) from None


def can_be_egress(value: object) -> bool:
    """Whether this untrusted value may be a session's `egress`."""
    if not isinstance(value, dict) or value.keys() - {"allow"}:
        return False
    entries = value.get("allow", [])
    if (
        not isinstance(entries, list)
        or len(entries) > MAX_ENTRIES
        or not all(isinstance(entry, str) for entry in entries)
    ):
        return False
    try:
        allowlist(entries)
    except NotAnEntry:
        return False
    return True


def _range(entry: str) -> Range | None:
    """The range of addresses that an entry is, None where it is a name. Raises NotAnEntry."""
    try:
        return ip_network(entry)
    except ValueError:
        if "/" in entry or ":" in entry:
            raise NotAnEntry(f"{entry[:80]!r} is no range of addresses (10.1.0.0/16)") from None
        return None


def _name(entry: str, host: str) -> str:
    """The host name in an entry, folded. Raises NotAnEntry."""
    name = folded(host)
    labels = name.split(".")
    if len(name) > MAX_HOST or not all(map(_LABEL.fullmatch, labels)):
        raise NotAnEntry(f"{entry[:80]!r} is no host name")
    if _NUMBER.fullmatch(labels[-1]):
        raise NotAnEntry(f"{entry[:80]!r} is a number; write the address out")  # else it would be one that never fits
    return name
