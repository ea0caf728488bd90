"""The network of runs: which programs may connect to what, and what stands of it on a run's record.

Theory of operation
===================

A sandbox has no interface but loopback. A run with internet is *supervised*: the kernel notifies this process before
it connects any of the run's programs (connect_supervisor.py), and what may be reached is reached for them
(run_connections.py). One ConnectSupervisor belongs to each sandbox that has had such a run; a SupervisedEgress is put
into it for as long as one run lasts, and takes all of the run's connections with it when that ends.

Where connections can't be supervised (an old kernel, a root without the capabilities), a run has no network, and its
record says why. It runs all the same: less network than asked for is reported, not refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache, partial

from era.core.allowlist import Range, allowlist_of
from era.core.models import JsonObject
from era.core.ports import RunEgress, Sandbox
from era.core.secrets import Secret
from era.core.shares import Shares
from era.network import authority, policy
from era.network.connect_supervisor import ConnectSupervisor, why_unsupported
from era.network.descriptors import RunDescriptors
from era.network.destinations import Destinations
from era.network.interception import Interception
from era.network.run_connections import MakeServiceProtocol, RunConnections
from era.network.sandbox_sockets import Target
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

    def __init__(self, descriptors: Shares[str], private: Sequence[Range] = ()) -> None:
        """`descriptors` are those of the service that owners' runs may take, and `private` the private ranges that
        programs may reach."""
        self.descriptors = descriptors
        self.policy = policy.Policy(private)
        self.authority = authority.Authority()
        self.service: tuple[int, MakeServiceProtocol] | None = None
        """The port at which this service listens, once it does, and what serves programs that connect to it."""

        self._supervisors: dict[str, ConnectSupervisor] = {}
        """By the ids of sandboxes."""

    def serves_at(self, port: int, make_protocol: MakeServiceProtocol) -> None:
        """This service listens at this port. Programs that connect to it there get what `make_protocol` makes: their
        connections never leave this process."""
        self.service = port, make_protocol

    def stop(self) -> None:
        for supervisor in list(self._supervisors.values()):
            supervisor.close()

    def run_egress(
        self, sandbox: Sandbox, *, owner: str, internet: bool, egress: JsonObject, secrets: Sequence[Secret] = ()
    ) -> RunEgress:
        if not internet:
            return NoEgress()
        supervisor = self._supervisors.get(sandbox.id)
        if supervisor is None:
            reason = why_unsupported(sandbox)
            if reason is not None or sandbox.broker is None:
                return NoEgress(reason or "")
            supervisor = ConnectSupervisor(sandbox.broker, partial(self._forget, sandbox.id))
            self._supervisors[sandbox.id] = supervisor
        descriptors, interception = RunDescriptors(self.descriptors, owner), None
        if secrets:
            interception = Interception(secrets, self.authority, allowlist_of(egress), descriptors)
        return SupervisedEgress(self, supervisor, egress, interception, descriptors)

    def _forget(self, sandbox_id: str) -> None:
        self._supervisors.pop(sandbox_id, None)


class NoEgress:
    """No network. `reason` says why, where one was asked for."""

    def __init__(self, reason: str = "") -> None:
        self.supervised = False
        self.certificates: Mapping[str, str] = {}
        self.enforced: JsonObject = {"network": "none", **({"network_reason": reason} if reason else {})}

    async def __aenter__(self) -> RunEgress:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def report(self) -> JsonObject:
        return {"destinations": [], "more": 0}


class SupervisedEgress:
    """Decides about the connections of one run. Nothing is made before the run's first one."""

    supervised = True

    def __init__(
        self,
        network: SandboxNetwork,
        supervisor: ConnectSupervisor,
        egress: JsonObject,
        interception: Interception | None,
        descriptors: RunDescriptors,
    ) -> None:
        self._descriptors = descriptors
        self._network, self._supervisor, self._egress, self._interception = network, supervisor, egress, interception
        self._destinations = Destinations()
        self._connections: RunConnections | None = None
        self.certificates: Mapping[str, str] = authority.variables() if interception else certificates()
        self.enforced: JsonObject = {"network": "full"}

    async def __aenter__(self) -> RunEgress:
        self._supervisor.handler = self
        return self

    async def __aexit__(self, *_: object) -> None:
        self._supervisor.handler = None
        if self._connections is not None:
            await self._connections.close()

    def report(self) -> JsonObject:
        return self._destinations.report()

    def handle(self, notify_fd: int, notification: Notification, targets: Sequence[Target]) -> None:
        """See ConnectHandler."""
        if self._connections is None:
            self._connections = RunConnections(
                self._supervisor.broker,
                self._network.policy,
                allowlist_of(self._egress),
                self._destinations,
                self._service_protocol,
                self._descriptors,
                self._interception,
            )
        self._connections.handle(notify_fd, notification, targets)

    def is_service(self, target: Target) -> bool:
        """See ConnectHandler."""
        return self._service_protocol(target) is not None

    def _service_protocol(self, target: Target) -> MakeServiceProtocol | None:
        """What serves programs that connect to this target, if that is this service itself."""
        address, port = target
        if self._network.service is None or port != self._network.service[0] or address.is_unspecified:
            return None
        return self._network.service[1] if address.is_loopback or policy.is_own(address) else None
