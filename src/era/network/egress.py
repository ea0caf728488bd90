"""The network of runs: which programs may connect to what, and what stands of it on a run's record.

Theory of operation
===================

A sandbox has no interface but loopback. A run with internet is *supervised*: the kernel notifies this process before
it connects any of the run's programs (connect_supervisor.py), and what may be reached is reached for them
(run_connections.py). One ConnectSupervisor belongs to each sandbox that has had such a run; a SupervisedEgress is put
into it for as long as one run lasts, and takes all of the run's connections with it when that ends.

Processes beside runs (core/live/) have an egress of their own, as long as their session is live, and so a
ConnectSupervisor of their own. Both add addresses to one loopback (loopback.py). There a run without internet could
reach what stands for a process's destinations: so processes have at any time what the session's settings allow.

Where connections can't be supervised (an old kernel, a root without the capabilities), a run has no network, and its
record says why. It runs all the same: less network than asked for is reported, not refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from weakref import WeakValueDictionary

from era.core.allowlist import Address, allowlist_of
from era.core.concurrency.shares import Shares
from era.core.models import JsonObject
from era.core.ports import ProcessEgress, RunEgress, Sandbox, SocketBroker
from era.core.secrets import Secret
from era.network import authority, policy
from era.network.connect_supervisor import ConnectSupervisor, why_unsupported
from era.network.descriptors import RunDescriptors
from era.network.destinations import Destinations
from era.network.dns import Lookups
from era.network.interception import Interception
from era.network.loopback import LoopbackAddresses, Target
from era.network.run_connections import MakeServiceProtocol, RunConnections
from era.network.seccomp_notify import Notification


@cache
def certificates() -> Mapping[str, str]:
    """Variables that name the certificates this machine trusts, for programs that bring others; none where the machine
    doesn't keep them in the usual place. Python's own ssl finds them by itself, Node and `requests` don't."""
    if not os.path.exists(authority.TRUSTED):
        return {}
    return dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"), authority.TRUSTED)


class SandboxNetwork:
    """See ports.Network. `stop` comes last."""

    def __init__(
        self,
        descriptors: Shares[str],
        rules: policy.Policy,
        has_host: Callable[[Address, int], bool] = lambda *_: False,
    ) -> None:
        """`descriptors` are those of the service that owners' runs may take. `has_host` says where other hosts of the
        cluster are called, which is for programs as if they had called this one."""
        self.descriptors = descriptors
        self.policy = rules
        self.has_host = has_host
        self.lookups = Lookups()
        self.authority = authority.Authority()
        self.service: tuple[int, MakeServiceProtocol] | None = None
        """The port at which this service listens, once it does, and what serves programs that connect to it."""

        self._supervisors: dict[str, dict[SocketBroker, ConnectSupervisor]] = {}
        """By the ids of sandboxes: that of runs, and that of processes beside them."""

        self._loopbacks: WeakValueDictionary[str, LoopbackAddresses] = WeakValueDictionary()
        """By the ids of sandboxes, those that are in use."""

    def serves_at(self, port: int, make_protocol: MakeServiceProtocol) -> None:
        """This service listens at this port. Programs that connect to it there get what `make_protocol` makes: their
        connections never leave this process."""
        self.service = port, make_protocol

    def stop(self) -> None:
        for supervisors in list(self._supervisors.values()):
            for supervisor in list(supervisors.values()):
                supervisor.close()

    def run_egress(
        self, sandbox: Sandbox, *, owner: str, internet: bool, egress: JsonObject, secrets: Sequence[Secret] = ()
    ) -> RunEgress:
        return self._egress(sandbox, sandbox.broker, owner, internet, egress, secrets)

    def process_egress(
        self, sandbox: Sandbox, broker: SocketBroker | None, *, owner: str, internet: bool, egress: JsonObject
    ) -> ProcessEgress:
        made = self._egress(sandbox, broker, owner, internet, egress, ())
        if isinstance(made, SupervisedEgress):
            # Any process may come to have a secret for a host that others reach, too: so all trust the authority.
            made.certificates = authority.variables()
            made.beside = True
        return made

    def _egress(
        self,
        sandbox: Sandbox,
        broker: SocketBroker | None,
        owner: str,
        internet: bool,
        egress: JsonObject,
        secrets: Sequence[Secret],
    ) -> SupervisedEgress | NoEgress:
        if not internet:
            return NoEgress()
        supervisors = self._supervisors.get(sandbox.id, {})
        supervisor = None if broker is None else supervisors.get(broker)
        if supervisor is None:
            # What it tries must not be tried while connections of the sandbox are supervised, and needn't.
            reason = None if supervisors else why_unsupported(sandbox)
            if reason is not None or broker is None:
                return NoEgress(reason or "this kind of sandbox has no way out")
            supervisor = ConnectSupervisor(broker, partial(self._forget, sandbox.id, broker))
            self._supervisors.setdefault(sandbox.id, {})[broker] = supervisor
        made = SupervisedEgress(self, sandbox.id, supervisor, egress, owner)
        if secrets:
            made.add(secrets)
        return made

    def loopback(self, sandbox_id: str) -> LoopbackAddresses:
        """The addresses of this sandbox's loopback, the same for all who have them at a time."""
        found = self._loopbacks.get(sandbox_id)
        if found is None:
            found = self._loopbacks[sandbox_id] = LoopbackAddresses()
        return found

    def _forget(self, sandbox_id: str, broker: SocketBroker) -> None:
        supervisors = self._supervisors.get(sandbox_id, {})
        supervisors.pop(broker, None)
        if not supervisors:
            self._supervisors.pop(sandbox_id, None)


class NoEgress:
    """No network. `reason` says why, where one was asked for."""

    def __init__(self, reason: str = "") -> None:
        self.supervised = False
        self.certificates: Mapping[str, str] = {}
        self.enforced: JsonObject = {"network": "none", **({"network_reason": reason} if reason else {})}

    async def __aenter__(self) -> NoEgress:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def add(self, secrets: Sequence[Secret]) -> None:
        pass

    def remove(self, secrets: Sequence[Secret]) -> None:
        pass

    def report(self) -> JsonObject:
        return {"destinations": [], "more": 0, "bytes": 0}


class SupervisedEgress:
    """Decides about the connections of one run, or of a session's processes. Nothing is made before the first one."""

    supervised = True

    def __init__(
        self,
        network: SandboxNetwork,
        sandbox_id: str,
        supervisor: ConnectSupervisor,
        egress: JsonObject,
        owner: str,
    ) -> None:
        self._descriptors = RunDescriptors(network.descriptors, owner)
        self._lookup_turn = partial(network.lookups.turn, owner, sandbox_id)
        self._network, self._sandbox_id, self._supervisor, self._egress = network, sandbox_id, supervisor, egress
        self._interception: Interception | None = None
        self._destinations = Destinations()
        self._connections: RunConnections | None = None
        self.certificates: Mapping[str, str] = certificates()
        self.enforced: JsonObject = {"network": "full"}
        self.beside = False
        """Whether it is that of processes."""

    def add(self, secrets: Sequence[Secret]) -> None:
        """Swap the placeholders of these for their values from now on, too."""
        if self._interception is None:
            allow = allowlist_of(self._egress)
            self._interception = Interception((), self._network.authority, allow, self._descriptors)
            self.certificates = authority.variables()
            if self._connections is not None:
                self._connections.interception = self._interception
        self._interception.add(secrets)

    def remove(self, secrets: Sequence[Secret]) -> None:
        """Swap these no longer."""
        if self._interception is not None:
            self._interception.remove(secrets)

    async def __aenter__(self) -> SupervisedEgress:
        self._supervisor.add(self, beside=self.beside)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._supervisor.remove(self)
        shared = self._supervisor.handler is not None
        if self._connections is not None:
            await self._connections.close(shared=shared)
        if not shared:
            await self._network.loopback(self._sandbox_id).release()

    def report(self) -> JsonObject:
        return self._destinations.report()

    def handle(self, notify_fd: int, notification: Notification, targets: Sequence[Target]) -> None:
        """See ConnectHandler."""
        if self._connections is None:
            self._connections = RunConnections(
                self._supervisor.broker,
                self._network.loopback(self._sandbox_id),
                self._network.policy,
                allowlist_of(self._egress),
                self._destinations,
                self._service_protocol,
                self._descriptors,
                self._lookup_turn,
                self._supervisor.decide,
                self._interception,
            )
        self._connections.handle(notify_fd, notification, targets)

    def is_service(self, target: Target) -> bool:
        """See ConnectHandler."""
        return self._service_protocol(target) is not None

    def _service_protocol(self, target: Target) -> MakeServiceProtocol | None:
        """What serves programs that connect to this target, if that is this service itself."""
        address, port = target
        if self._network.service is None or address.is_unspecified:
            return None
        own_port, make_protocol = self._network.service
        is_own = port == own_port and (address.is_loopback or policy.is_own(address))
        return make_protocol if is_own or self._network.has_host(address, port) else None
