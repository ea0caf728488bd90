"""The header of a request that one host of a cluster passes on to another: who makes the call, signed.

It has who makes the call, as the guard found, at which address, and an HMAC of that, of the request's method and
target, of both hosts and of the time by the database's clock. So a caller's API key doesn't travel on, and what is
signed for one host is good at no other, and for half a minute at most. Hosts take the header from nobody who hasn't got
their secret, and where they talk over TLS (host_tls.py) nowhere but at the port that is for hosts. There they take
nothing else.

While a cluster is upgraded, hosts of two versions pass calls on to each other. So what a header says grows by new names
only, which older hosts don't look at; those that an older host needs stay as they are, for one version after the last
that reads them. What isn't said has a default that gives nobody more than he has, or that comes from the request.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import Scope

from era.api.protocol.addresses import base_url, served_port
from era.core.cluster.homes import Homes
from era.core.owners.api_keys import Caller
from era.core.public.relay import ascii_target
from era.core.telemetry import new_request_id
from era.errors import Forbidden, SessionMoved
from era.settings import Settings

HEADER = b"x-era-hop"
_GOOD_SECONDS = 30
_NOBODY: tuple[Any, ...] = ("", False, "", ())


@dataclass(frozen=True, slots=True)
class Hop:
    """What another host says about a request that it passes on."""

    caller: Caller | None
    """None for a public URL, a link, or a ticket that the home is to take."""

    client: tuple[str, int] | None
    """The address from which the caller connected."""

    request_id: str
    scheme: str
    """Of the URL that was called."""

    base_url: str | None
    """The URL for the programs of this call (addresses.py); None where it isn't said: that of the home."""

    again: bool
    """Another host had passed the call on to the one that says this, from where the session has just moved."""

    port: int | None
    """The port at which the host that was called serves; None where it isn't said: that of the home."""


class Hops:
    """Signs what this host passes on, and checks what is passed on to it."""

    def __init__(self, secret: str, homes: Homes, settings: Settings) -> None:
        self._key = hmac.digest(secret.encode(), b"era hop", hashlib.sha256)
        self._homes = homes
        self._settings = settings
        self._has_own_port = settings.cluster_certificate is not None

    @property
    def host_id(self) -> str:
        return self._homes.host_id

    def header(self, scope: Scope, to: str) -> bytes:
        """The header of a request that goes to the host with this id."""
        state, client, request = scope["state"], scope.get("client"), Request(scope)
        caller: Caller | None = state.get("caller")
        said = {
            "from": self._homes.host_id,
            "to": to,
            "at": self._homes.time(),
            "caller": caller and [caller.owner, caller.is_operator, caller.key_id, sorted(caller.scopes)],
            "digest": caller and caller.digest,
            "client": client and list(client),
            "request_id": state["request_id"],
            "scheme": scope["scheme"],
            "base_url": base_url(request, self._settings),
            "port": served_port(request, self._settings),
            "again": "hop" in state,
        }
        content = base64.urlsafe_b64encode(json.dumps(said, separators=(",", ":")).encode())
        return content + b"." + self._mac(scope, content)

    def received(self, scope: Scope, value: bytes) -> Hop:
        """What the header of a request says. Raises Forbidden for one that no host of this cluster has made for this
        one just now, or that hasn't come over TLS where hosts talk so."""
        if self._has_own_port and not is_from_host(scope):
            raise Forbidden(
                "The hosts of this cluster talk over TLS, and this isn't the port for that.",
                hint="Give each host ERA_CLUSTER_CERTIFICATE. Clients don't send this header.",
                code="bad_hop",
            )
        content, _, mac = value.rpartition(b".")
        if not hmac.compare_digest(mac, self._mac(scope, content)):
            raise _no_hop()
        said = json.loads(base64.urlsafe_b64decode(content))
        if abs(self._homes.time() - said["at"]) > _GOOD_SECONDS * 1_000_000:
            raise _no_hop()
        if said["to"] != self._homes.host_id:
            raise SessionMoved("This call was passed on to a host that isn't there any more.")
        return Hop(
            _caller(said.get("caller"), said.get("digest")),
            tuple(said["client"]) if said.get("client") else None,
            said.get("request_id") or new_request_id(),
            said.get("scheme") or scope["scheme"],
            said.get("base_url"),
            bool(said.get("again")),
            said.get("port"),
        )

    async def takes_tickets(self, session_id: str) -> bool:
        """Whether the session is at home elsewhere, so that the tickets for it were given there and are taken there."""
        return await self._homes.elsewhere(session_id, take=False) is not None

    def _mac(self, scope: Scope, content: bytes) -> bytes:
        """The HMAC of a header's content, bound to the request."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        parts = [b"1", scope["method"].encode(), target_of(scope), *hosts, content]
        return hmac.digest(self._key, b"\n".join(parts), hashlib.sha256).hex().encode()


def is_from_host(scope: Scope) -> bool:
    """Whether a request has come at the port for hosts, from one with a certificate."""
    return "from_host" in scope["state"]


def target_of(scope: Scope) -> bytes:
    """The target of a request, as it is written."""
    query = "?" + ascii_target(scope["query_string"]) if scope["query_string"] else ""
    return (ascii_target(scope["raw_path"]) + query).encode()


def _caller(said: list[Any] | None, digest: str | None) -> Caller | None:
    """The caller of a header: owner, whether he is the operator, key, scopes. Older hosts take no more than these four,
    in this order, and don't say the `digest`. Whose rights aren't said has none."""
    if not said:
        return None
    owner, is_operator, key_id, scopes, *_ = [*said, *_NOBODY[len(said) :]]
    return Caller(owner, is_operator, key_id, scopes=frozenset(scopes), digest=digest or "")


def _no_hop() -> Forbidden:
    return Forbidden(
        "This request says that another host passes it on, and that isn't so.",
        hint="Hosts of a cluster have the same ERA_CLUSTER_SECRET. Clients don't send this header.",
        code="bad_hop",
    )
