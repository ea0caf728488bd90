"""RunConnections out of sandboxes: for each run with internet, a proxy of its own that ends with it.

Theory of operation
===================

A sandbox has no interface but loopback. Its supervisor has bound a socket there, the *guest listener*, and handed it to
us; nobody inside has it. A egress listens on the guest listener as long as its run lasts. So what is accepted was
connected from inside this sandbox during this run, whoever says what; and nobody else reaches it: not another sandbox,
nothing on the host.

At the end the guest listener is shut, which resets what waited at it, and each connection is closed. A guest listener
that is shut can be listened on again, by the next run, if that has internet by then.

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
from functools import cache, partial
from typing import Any

import structlog

from era.core.allowlist import Address, Range, allowlist_of
from era.core.models import JsonObject
from era.core.ports import GuestListener, RunEgress, Sandbox
from era.core.secrets import Secret
from era.network import authority, http1, policy
from era.network.accept_loop import AcceptLoop
from era.network.connect_supervisor import ConnectSupervisor
from era.network.destinations import Destinations
from era.network.dialing import NO_RULE, connected, told
from era.network.http1 import Refused, Traffic
from era.network.interception import Interception
from era.network.own import Place
from era.network.run_connections import RunConnections
from era.network.seccomp_notify import Question, Target

log = structlog.get_logger()

_RESOLVERS, _LOOKUPS = 32, 4
"""Threads, and how many of them one run may keep busy."""

_RESOLVE_SECONDS = 10.0
_MAX_ADDRESSES = 8
"""Addresses of one name that are tried."""

_NO_PROXY = "localhost,127.0.0.1,::1"


def variables(port: int) -> dict[str, str]:
    """What programs need to know of a proxy on this port, and of the certificates this machine trusts."""
    url = f"http://127.0.0.1:{port}"
    found = {name: url for one in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") for name in (one, one.lower())}
    return found | {"NO_PROXY": _NO_PROXY, "no_proxy": _NO_PROXY, "NODE_USE_ENV_PROXY": "1", **certificates()}


@cache
def certificates() -> Mapping[str, str]:
    """What programs need to know of the certificates this machine trusts."""
    if not os.path.exists(authority.TRUSTED):
        return {}
    # Python's own ssl finds these by itself; Node and requests bring others.
    return dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"), authority.TRUSTED)


class SandboxNetwork:
    """See ports.Network. `private` are private ranges that programs may reach; `start` comes first, `stop` last."""

    def __init__(self, private: Sequence[Range] = ()) -> None:
        self.policy = policy.Policy(private)
        self.authority = authority.Authority()
        self.resolvers = ThreadPoolExecutor(_RESOLVERS, "era-resolve")
        self.service: Place | None = None
        """Where this service listens, once it does."""

        self._supervisors: dict[str, ConnectSupervisor] = {}
        """By the ids of sandboxes."""

    def serves_at(self, host: str, port: int) -> None:
        """This service listens there, and programs may call what is open to everybody of it."""
        self.service = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port  # noqa: S104  nothing is bound here

    def stop(self) -> None:
        for gate in list(self._supervisors.values()):
            gate.close()
        self.resolvers.shutdown(wait=False, cancel_futures=True)

    def run_egress(
        self, sandbox: Sandbox, *, internet: bool, egress: JsonObject, secrets: Sequence[Secret] = ()
    ) -> RunEgress:
        if not internet:
            return NoEgress()
        guest_listener = sandbox.guest_listeners.get("proxy")
        if guest_listener is None:
            return NoEgress("this kind of sandbox has no way out")
        gate = self._supervisor(sandbox, guest_listener)
        interception = Interception(secrets, self.authority, allowlist_of(egress)) if secrets else None
        if isinstance(gate, ConnectSupervisor):
            return SupervisedEgress(self, gate, egress, interception)
        return ProxyEgress(self, guest_listener, egress, gate, interception)

    def _supervisor(self, sandbox: Sandbox, guest_listener: GuestListener) -> ConnectSupervisor | str:
        """The sandbox's gate, or why it has none."""
        if sandbox.broker is None or not sandbox.broker.asks:
            return "this kernel can't show us connections before it makes them (that takes Linux 5.9 or newer)"
        found = self._supervisors.get(sandbox.id)
        if found is None:
            try:
                found = ConnectSupervisor(sandbox.broker, guest_listener, partial(self._forget, sandbox.id))
            except OSError as error:
                return f"this machine doesn't let ERA open a sandbox's network ({told(error)})"
            self._supervisors[sandbox.id] = found
        return found

    def _forget(self, sandbox_id: str) -> None:
        self._supervisors.pop(sandbox_id, None)


class NoEgress:
    """No way out. `reason` tells why, where one was asked for."""

    def __init__(self, reason: str = "") -> None:
        self.supervised = False
        self.env: Mapping[str, str] = {}
        self.enforced: JsonObject = {"network": "none", **({"network_reason": reason} if reason else {})}

    async def __aenter__(self) -> RunEgress:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def report(self) -> JsonObject:
        return {"destinations": [], "more": 0}


class SupervisedEgress:
    """The gate of a sandbox, open for one run. Nothing is made before the run wants out."""

    supervised = True

    def __init__(
        self, network: SandboxNetwork, gate: ConnectSupervisor, egress: JsonObject, interception: Interception | None
    ) -> None:
        self._network, self._supervisor, self._egress, self._interception = network, gate, egress, interception
        self._destinations = Destinations()
        self._connections: RunConnections | None = None
        self.env: Mapping[str, str] = authority.variables() if interception else certificates()
        self.enforced: JsonObject = {"network": "full"}

    async def __aenter__(self) -> RunEgress:
        self._supervisor.run = self
        return self

    async def __aexit__(self, *_: object) -> None:
        self._supervisor.run = None
        if self._connections is not None:
            await self._connections.close()

    def report(self) -> JsonObject:
        return self._destinations.report()

    def take(self, listener: int, asked: Question, wanted: Sequence[Target]) -> None:
        """See gates.Run."""
        if self._connections is None:
            self._connections = RunConnections(
                self._supervisor.broker,
                self._network.policy,
                allowlist_of(self._egress),
                self._destinations,
                self._own,
                self._interception,
            )
        self._connections.take(listener, asked, wanted)

    def _own(self, target: Target) -> Place | None:
        return self._network.service if self.is_own(target) else None

    def is_own(self, target: Target) -> bool:
        """See gates.Run."""
        service = self._network.service
        if service is None or target[1] != service[1] or target[0].is_unspecified:
            return False
        return target[0].is_loopback or policy.is_own(target[0])


class ProxyEgress:
    """A proxy behind a guest listener, for one run. `reason` is why there is no more."""

    supervised = False

    def __init__(
        self,
        network: SandboxNetwork,
        guest_listener: GuestListener,
        egress: JsonObject,
        reason: str,
        interception: Interception | None,
    ) -> None:
        self._network, self._interception = network, interception
        self._allow = allowlist_of(egress)
        self._listener = AcceptLoop(guest_listener, self._serve)
        self._lookups = asyncio.Semaphore(_LOOKUPS)
        self._destinations = Destinations()
        trusted = authority.variables() if interception else {}
        self.env: Mapping[str, str] = {**variables(guest_listener.getsockname()[1]), **trusted}
        self.enforced: JsonObject = {"network": "proxy", "network_reason": reason}

    async def __aenter__(self) -> RunEgress:
        await self._listener.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._listener.__aexit__()

    def report(self) -> JsonObject:
        return self._destinations.report()

    async def _serve(self, client: socket.socket) -> None:
        try:
            await http1.serve(client, self._connect, self._interception)
        except Exception:
            log.exception("proxy_failed")
        finally:
            client.close()

    async def _connect(self, host: str, port: int) -> tuple[socket.socket, Traffic]:
        """A connection to where this run may go. Raises Refused."""
        named = self._allow.has_name(host)
        if not named and not self._allow.ranges:  # not even the resolver hears of it
            self._destinations.note(host, port, None, NO_RULE.name)
            raise Refused(403, NO_RULE.name, f"{host} is refused: {NO_RULE.why}")
        try:
            addresses = await self._resolve(host, port)
        except Refused as refusal:
            self._destinations.note(host, port, None, refusal.rule)
            raise
        refusals, failures = [], []
        for address in addresses:
            rule = self._network.policy.refuses(address)
            if rule is None and not (named or self._allow.has_address(address)):
                rule = NO_RULE
            if rule is not None:
                refusals.append((address, rule))
                continue
            try:
                sock = await connected(address, port)
            except OSError as error:
                failures.append((address, error))
                continue
            return sock, self._destinations.note(host, port, address, None)
        if failures:
            address, failure = failures[0]
            late = isinstance(failure, TimeoutError)
            rule_name, why = ("timed_out", "nothing answered") if late else ("unreachable", told(failure))
            self._destinations.note(host, port, address, rule_name)
            raise Refused(504 if late else 502, rule_name, f"{host} port {port} can't be reached: {why}")
        address, rule = refusals[0]
        self._destinations.note(host, port, address, rule.name)
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
            raise Refused(502, "no_such_name", f"{host} can't be resolved: {told(error)}") from None
        if not found:
            raise Refused(502, "no_such_name", f"{host} has no address")
        return list(dict.fromkeys(found))[:_MAX_ADDRESSES]
