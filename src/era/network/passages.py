"""Ways out of sandboxes: for each run with internet, a proxy of its own that ends with it.

Theory of operation
===================

A sandbox has no interface but loopback. Its supervisor has bound a socket there, the *door*, and handed it to us;
nobody inside has it. A passage listens on the door as long as its run lasts. So what is accepted was connected from
inside this sandbox during this run, whoever says what; and nobody else reaches it: not another sandbox, nothing on the
host.

At the end the door is shut, which resets what waited at it, and each connection is closed. A door that is shut can be
listened on again, by the next run, if that has internet by then.

Names are resolved here, on threads of their own since the resolver blocks, a few at a time for each run, so that one
with many slow names can't hold up all the others.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

import structlog

from era.core.egress import Address, Range, allowlist_of
from era.core.models import JsonObject
from era.core.ports import Door, Passage, Sandbox
from era.errors import SandboxFailed
from era.network import policy, proxy
from era.network.proxy import Refused, Traffic

log = structlog.get_logger()

MAX_CONNECTIONS = 64
"""Of one run at a time. More wait at the door."""

MAX_DESTINATIONS = 100
"""Of one run that are named on its record."""

_BACKLOG = 128
_RESOLVERS, _LOOKUPS = 32, 4
"""Threads, and how many of them one run may keep busy."""

_RESOLVE_SECONDS = _CONNECT_SECONDS = 10.0
_MAX_ADDRESSES = 8
"""Addresses of one name that are tried."""

_NO_PROXY = "localhost,127.0.0.1,::1"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
"""Where Debian and others keep what this machine trusts, which sandboxes have too."""

_NO_RULE = policy.Rule("not_in_allowlist", "the session's egress.allow doesn't have it")


def variables(port: int) -> dict[str, str]:
    """What programs need to know of a proxy on this port, and of the certificates this machine trusts."""
    url = f"http://127.0.0.1:{port}"
    found = {name: url for one in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") for name in (one, one.lower())}
    found |= {"NO_PROXY": _NO_PROXY, "no_proxy": _NO_PROXY, "NODE_USE_ENV_PROXY": "1"}
    if os.path.exists(_CERTIFICATES):
        # Python's own ssl finds these by itself; Node and requests bring others.
        found |= dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"), _CERTIFICATES)
    return found


class ProxyNetwork:
    """See ports.Network. `private` are private ranges that programs may reach; `start` comes first, `stop` last."""

    def __init__(self, private: Sequence[Range] = ()) -> None:
        self.policy = policy.Policy(private)
        self.resolvers = ThreadPoolExecutor(_RESOLVERS, "era-resolve")

    def stop(self) -> None:
        self.resolvers.shutdown(wait=False, cancel_futures=True)

    def passage(self, sandbox: Sandbox, *, internet: bool, egress: JsonObject) -> Passage:
        if not internet:
            return NoPassage()
        if sandbox.door is None:
            return NoPassage("this kind of sandbox has no way out")
        return ProxyPassage(self, sandbox.door, egress)


class NoPassage:
    """No way out. `reason` tells why, where one was asked for."""

    def __init__(self, reason: str = "") -> None:
        self.env: Mapping[str, str] = {}
        self.enforced: JsonObject = {"network": "none", **({"network_reason": reason} if reason else {})}

    async def __aenter__(self) -> Passage:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def report(self) -> JsonObject:
        return {"destinations": [], "more": 0}


@dataclass(slots=True)
class _Destination:
    """One that was tried; what all connections to it have in common."""

    connections: int = 0
    traffic: Traffic = field(default_factory=Traffic)


class ProxyPassage:
    """A proxy behind a door, for one run."""

    def __init__(self, network: ProxyNetwork, door: Door, egress: JsonObject) -> None:
        self._network = network
        self._allow = allowlist_of(egress)
        self._door = door.dup()  # the sandbox may be closed under us
        self._door.setblocking(False)
        self._listening = False
        self._connections: set[asyncio.Task[None]] = set()
        self._lookups = asyncio.Semaphore(_LOOKUPS)
        self._tried: dict[tuple[str, int, str | None, str | None], _Destination] = {}
        self._more = 0
        self.env: Mapping[str, str] = variables(door.getsockname()[1])
        self.enforced: JsonObject = {"network": "proxy"}

    async def __aenter__(self) -> Passage:
        try:
            self._door.listen(_BACKLOG)
        except OSError as error:
            self._door.close()
            raise SandboxFailed("The sandbox's door can't be used.") from error
        self._listen(True)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listen(False)
        with suppress(OSError):  # not connected, it says of a socket that listened
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

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
                }
                for (host, port, address, reason), tried in self._tried.items()
            ],
            "more": self._more,
        }

    def _listen(self, wanted: bool) -> None:
        """Take connections, or let them wait."""
        if wanted != self._listening:
            self._listening = wanted
            loop = asyncio.get_running_loop()
            if wanted:
                loop.add_reader(self._door, self._accept)
            else:
                loop.remove_reader(self._door)

    def _accept(self) -> None:
        try:
            client, _ = self._door.accept()
        except OSError:
            return  # whoever wanted in has gone, or there is no descriptor left for him
        client.setblocking(False)
        connection = asyncio.get_running_loop().create_task(self._serve(client))
        self._connections.add(connection)
        connection.add_done_callback(self._ended)
        self._listen(len(self._connections) < MAX_CONNECTIONS)

    def _ended(self, connection: asyncio.Task[None]) -> None:
        self._connections.discard(connection)
        if self._door.fileno() >= 0:
            self._listen(True)

    async def _serve(self, client: socket.socket) -> None:
        try:
            await proxy.serve(client, self._connect)
        except Exception:
            log.exception("proxy_failed")
        finally:
            client.close()

    async def _connect(self, host: str, port: int) -> tuple[socket.socket, Traffic]:
        """A connection to where this run may go. Raises Refused."""
        named = self._allow.has_name(host)
        if not named and not self._allow.ranges:  # not even the resolver hears of it
            self._note(host, port, None, _NO_RULE.name)
            raise Refused(403, _NO_RULE.name, f"{host} is refused: {_NO_RULE.why}")
        try:
            addresses = await self._resolve(host, port)
        except Refused as refusal:
            self._note(host, port, None, refusal.rule)
            raise
        refusals, failures = [], []
        for address in addresses:
            rule = self._network.policy.refuses(address)
            if rule is None and not (named or self._allow.has_address(address)):
                rule = _NO_RULE
            if rule is not None:
                refusals.append((address, rule))
                continue
            try:
                sock = await _connected(address, port)
            except OSError as error:
                failures.append((address, error))
                continue
            return sock, self._note(host, port, address, None)
        if failures:
            address, failure = failures[0]
            late = isinstance(failure, TimeoutError)
            rule_name, why = ("timed_out", "nothing answered") if late else ("unreachable", _told(failure))
            self._note(host, port, address, rule_name)
            raise Refused(504 if late else 502, rule_name, f"{host} port {port} can't be reached: {why}")
        address, rule = refusals[0]
        self._note(host, port, address, rule.name)
        raise Refused(403, rule.name, f"{host} is refused: its address is {address}, and {rule.why}")

    async def _resolve(self, host: str, port: int) -> list[Address]:
        """The addresses of a host, at least one. Raises Refused."""
        loop = asyncio.get_running_loop()
        await self._lookups.acquire()
        try:
            lookup = self._network.resolvers.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        except RuntimeError:
            raise Refused(503, "stopping", "this server is about to stop") from None

        def over(_: Future[Any]) -> None:
            with suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(self._lookups.release)

        lookup.add_done_callback(over)  # a thread that is given up is still busy
        waiting = asyncio.wrap_future(lookup)
        try:
            done, _ = await asyncio.wait({waiting}, timeout=_RESOLVE_SECONDS)
        finally:
            lookup.cancel()  # where no thread has begun with it
            waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # somebody has seen it
        if not done:
            raise Refused(504, "no_such_name", f"{host} could not be resolved in time")
        try:
            found = [policy.parsed(str(entry[4][0])) for entry in waiting.result()]
        except (OSError, ValueError) as error:  # also what is no host name at all
            raise Refused(502, "no_such_name", f"{host} can't be resolved: {_told(error)}") from None
        if not found:
            raise Refused(502, "no_such_name", f"{host} has no address")
        return list(dict.fromkeys(found))[:_MAX_ADDRESSES]

    def _note(self, host: str, port: int, address: Address | None, reason: str | None) -> Traffic:
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


async def _connected(address: Address, port: int) -> socket.socket:
    """A connection to this very address. Raises OSError, of which TimeoutError is one."""
    family = socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except BaseException:
        sock.close()
        raise
    return sock


def _told(error: Exception) -> str:
    """What is wrong, in the system's words."""
    if isinstance(error, socket.gaierror):
        return str(error.strerror).lower()
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()  # the event loop's own words name the address once more
    return "that is no host name"
