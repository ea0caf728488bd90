"""Ray as the engine of hosts: an actor on each node, which watches over the host there.

Ray starts, watches and restarts; it owns nothing. Which host has a session is decided by PostgreSQL alone, so whatever
Ray believes, or loses, can't do harm: a host outlives its actor, its node's Ray and Ray's head.

An actor is detached, so that it outlives the driver that made it, and bound to its node. Where the node has the
resource `era_host`, the actor claims it: to Ray's autoscaler the node is busy then, whatever the host does, until the
host has drained and its actor is gone.

What an actor is told of settings comes in a call and not at its making, since Ray keeps what an actor is made of:
passwords would be there. So an actor that Ray has restarted can watch, drain and stop its host, and start it once a
driver has told it the settings anew.

Ray is an extra of the package (`cluster`), imported by `connect` only, and never by a server.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from era.cluster.host_process import HostProcess, HostStatus, host_environment
from era.errors import NotReady, Unavailable

NAMESPACE = "era"
HOST_RESOURCE = "era_host"
"""One for each node that Ray's autoscaler may make or take away; nodes without it are left alone."""

_LOOK_SECONDS = 0.1
_AGAIN_SECONDS = 30.0
_CONNECT_SECONDS = 5.0
_REFUSED = "ERA_EGRESS_REFUSED"
"""What programs never reach, whatever else they may."""

_ANSWER_SECONDS = 10.0
"""For which actors are waited for that don't answer, as they are being started or their node has just gone."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the Ray cluster that is alive."""

    id: str
    address: str
    labels: Mapping[str, str]
    scales: bool = False
    """Whether Ray's autoscaler may take it away once it has no host."""


@dataclass(frozen=True, slots=True)
class NodeHost:
    """A node, and the host on it; None where its actor doesn't answer."""

    node: Node
    host: HostStatus | None
    problem: str = ""
    """Why it doesn't."""


class HostActor:
    """What runs on a node: one host's process, which a thread watches over. Its public methods are called by Ray."""

    def __init__(self, address: str, data_dir: str) -> None:
        """`data_dir` is the host's directory where the node's environment names none. It is known from the beginning,
        and again after a restart, so that a host which runs already can be watched, drained and stopped."""
        self._address = address
        self._problem = ""
        self._host: HostProcess | None = None
        self._lock = threading.Lock()
        self._at(os.environ.get("ERA_DATA_DIR") or data_dir)
        threading.Thread(target=self._watch, daemon=True).start()

    def ensure(self, cluster: Mapping[str, str]) -> HostStatus:
        """Have a host run with these settings, unless it was drained. One that runs already goes on with those that it
        has."""
        with self._lock:
            try:
                environment = host_environment(cluster, os.environ, self._address)
            except NotReady as error:
                self._problem = error.message
            else:
                self._at(environment["ERA_DATA_DIR"])
                if self._host is not None:
                    self._host.keep_running(environment)
        return self.status()

    def status(self) -> HostStatus:
        with self._lock:
            status = HostStatus("failing") if self._host is None else self._host.status()
            return replace(status, detail=self._problem) if self._problem else status

    def start(self) -> HostStatus:
        """Start a host that was drained."""
        with self._lock:
            if self._host is not None:
                self._host.start()
        return self.status()

    def stop(self, drain: bool) -> HostStatus:
        """Tell the host to end; `status` says when it has. See HostProcess.stop."""
        with self._lock:
            if self._host is not None:
                self._host.stop(drain=drain)
        return self.status()

    def _at(self, data_dir: str) -> None:
        """Watch over the host with this data directory; not while one with another runs."""
        if self._host is not None and self._host.status().pid and str(self._host.data_dir) != data_dir:
            self._problem = f"it runs with ERA_DATA_DIR={self._host.data_dir}: stop it first (`era host stop`)"
            return
        self._problem = ""
        if Path(data_dir).is_absolute() and (self._host is None or str(self._host.data_dir) != data_dir):
            try:
                self._host = HostProcess(Path(data_dir))
            except OSError as error:
                self._problem = str(error)

    def _watch(self) -> None:
        problem = ""
        while True:
            time.sleep(_LOOK_SECONDS)
            with self._lock:
                try:
                    if self._host is not None:
                        self._host.look()
                    if problem and self._problem == problem:
                        self._problem = problem = ""
                except Exception as error:  # A full disk, say. The next look tries again.
                    self._problem = problem = _line(error)


class RayHosts:
    """The hosts on the nodes of a Ray cluster, as a driver sees them. Calls raise Unavailable where Ray fails."""

    def __init__(self, ray: Any, labels: Mapping[str, str]) -> None:
        """`ray` is the module, connected; nodes that have all of `labels` get hosts. See `connect`."""
        self._ray = ray
        self._labels = labels
        self._actors: dict[str, Any] = {}
        self._requested: int | None = None
        self._requested_at = 0.0

    @property
    def own_node(self) -> str:
        """The id of the node that this driver is on."""
        return str(self._ray.get_runtime_context().get_node_id())

    def nodes(self) -> list[Node]:
        """The nodes that are alive and are to have a host."""
        with _translated():
            found = [
                Node(
                    each["NodeID"],
                    each["NodeManagerAddress"],
                    each.get("Labels", {}),
                    HOST_RESOURCE in each.get("Resources", {}),
                )
                for each in self._ray.nodes()
                if each["Alive"]
            ]
        return [node for node in found if self._labels.items() <= node.labels.items()]

    def ensure(self, cluster: Mapping[str, str], leaving: Container[str] = ()) -> list[NodeHost]:
        """See to it that each node has a host, with these settings, but for the nodes with the ids `leaving`: hosts
        there drain, and then their actors end, so that Ray takes the nodes for idle."""
        nodes = self.nodes()
        for gone in self._actors.keys() - {node.id for node in nodes}:
            # Ray would have it wait for its node, which never comes back under this id.
            self._kill(self._actors.pop(gone))
        staying = [node for node in nodes if node.id not in leaving]
        for node in staying:
            if node.id not in self._actors:
                with _translated():
                    self._actors[node.id] = self._make(node, cluster.get("ERA_DATA_DIR", ""))
        seen = self._ask(staying, "ensure", {**cluster, _REFUSED: self._addresses(cluster.get(_REFUSED, ""))})
        return seen + [self._send_away(node) for node in nodes if node.id in leaving]

    def _addresses(self, others: str) -> str:
        """The addresses of all nodes that are alive, also of those without a host, such as Ray's head, and `others`."""
        with _translated():
            found = {str(each["NodeManagerAddress"]) for each in self._ray.nodes() if each["Alive"]}
        return ",".join([*filter(None, [others]), *sorted(found)])

    def _send_away(self, node: Node) -> NodeHost:
        """Have a node's host drain, then end its actor. Told again each time: an actor that was restarted meanwhile
        doesn't know."""
        found = self._tell(node, "stop", False)
        if found.host is not None and found.host.pid == 0:
            self._kill(self._actors.pop(node.id))
        return found

    def leaving(self) -> set[str]:
        """The ids of nodes that Ray is told to drain, as one of which the cloud takes back the machine."""
        try:
            from ray._private.state import state  # as Ray's own libraries ask: there is no public call

            draining = state.get_draining_nodes
        except (ImportError, AttributeError):  # Another version of Ray: such a node's host has no warning then.
            return set()
        with _translated():
            return set(draining())

    def request(self, count: int) -> None:
        """Have Ray's autoscaler see to it that so many nodes can have a host; with 0, to no more than have one. It is
        said again from time to time: a head that was started anew doesn't know."""
        from ray.autoscaler.sdk import request_resources

        if count == self._requested and time.monotonic() < self._requested_at + _AGAIN_SECONDS:
            return
        with _translated():
            request_resources(bundles=[{HOST_RESOURCE: 1}] * count)
        self._requested, self._requested_at = count, time.monotonic()

    def known(self) -> list[NodeHost]:
        """The nodes that have a host's actor."""
        return self._ask(self._with_actors(), "status")

    def start(self, node: Node) -> NodeHost:
        return self._tell(node, "start")

    def stop(self, node: Node, *, drain: bool) -> NodeHost:
        return self._tell(node, "stop", drain)

    def stop_all(self, seconds: float) -> list[NodeHost]:
        """Stop all hosts, then their actors: those see to it that hosts end. Returns what didn't answer for so many
        seconds."""
        left = self._ask(self._with_actors(), "stop", False)
        answered_at = time.monotonic()
        while True:
            for each in left:
                if each.host is not None and each.host.pid == 0:
                    self._kill(self._actors.pop(each.node.id))
            left = [each for each in left if each.node.id in self._actors]
            if any(each.host is not None for each in left):
                answered_at = time.monotonic()
            if not left or time.monotonic() > answered_at + seconds:
                return left
            time.sleep(_LOOK_SECONDS)
            alive = {node.id for node in self.nodes()}
            # Told again each time: an actor that has been restarted meanwhile doesn't know.
            left = self._ask([each.node for each in left if each.node.id in alive], "stop", False)

    def _with_actors(self) -> list[Node]:
        """The nodes that have an actor, whoever made it."""
        return [node for node in self.nodes() if node.id in self._actors or self._find(node)]

    def _find(self, node: Node) -> bool:
        with _translated():
            try:
                self._actors[node.id] = self._ray.get_actor(_name(node), namespace=NAMESPACE)
            except ValueError:
                return False
        return True

    def _make(self, node: Node, data_dir: str) -> Any:
        """The node's actor, made if there is none."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "name": _name(node),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "resources": {HOST_RESOURCE: 1} if node.scales else {},
            "max_restarts": -1,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
        }
        return self._ray.remote(HostActor).options(**options).remote(node.address, data_dir)

    def _tell(self, node: Node, method: str, *arguments: object) -> NodeHost:
        if node.id not in self._actors and not self._find(node):
            return NodeHost(node, None, "it has no host")
        return self._ask([node], method, *arguments)[0]

    def _ask(self, nodes: Sequence[Node], method: str, *arguments: object) -> list[NodeHost]:
        """Call a method of the actors of these nodes, all at once."""
        with _translated():
            asked = {node.id: getattr(self._actors[node.id], method).remote(*arguments) for node in nodes}
            if not asked:
                return []
            done, _ = self._ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_SECONDS)
            return [self._answer(node, asked[node.id], asked[node.id] in done) for node in nodes]

    def _answer(self, node: Node, reference: Any, is_done: bool) -> NodeHost:
        if not is_done:
            return NodeHost(node, None, "Ray is still starting its actor, or its node doesn't answer")
        try:
            return NodeHost(node, self._ray.get(reference))
        except (self._ray.exceptions.ActorDiedError, self._ray.exceptions.ActorUnschedulableError) as error:
            self._actors.pop(node.id, None)  # The next call makes, or finds, another one.
            return NodeHost(node, None, _line(error))
        except self._ray.exceptions.RayError as error:
            return NodeHost(node, None, _line(error))

    def _kill(self, actor: Any) -> None:
        with suppress(Exception):  # It is dead already.
            self._ray.kill(actor, no_restart=True)


def connect(address: str, labels: Mapping[str, str] | None = None) -> RayHosts:
    """Connect to the Ray cluster at HOST:PORT, or with `auto` to the one that this machine is a node of. Raises
    NotReady where it can't be reached, or Ray isn't installed."""
    if address != "auto":
        _check_reachable(address)
    # It is there, so one try will do. Where Ray refuses the token, each of its twenty takes up to 40 seconds.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    if address.startswith(("127.", "localhost:")):
        # Ray would take another address of this machine. In spite of its name this counts on Linux, too.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as Ray itself does for `auto`
    try:
        import ray
    except ModuleNotFoundError as error:
        raise NotReady(
            f"This needs Ray ({error.name} is missing): pip install 'era-sessions[server,cluster]'"
        ) from None
    try:
        with _quiet():
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="CRITICAL")
    except Exception as error:  # Ray raises plain ones, too.
        raise NotReady(
            f"Ray at {address} can't be used ({_line(error)}): start it on this machine with `ray start`, as a node of "
            "the cluster, by the same version of Ray and Python and with the same token (RAY_AUTH_MODE=token)."
        ) from None
    return RayHosts(ray, labels or {})


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block nothing is written to standard error: Ray's libraries write many lines for one problem."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _has_token() -> bool:
    """Whether this user has a token of Ray's, where Ray looks for it."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()


def _check_reachable(address: str) -> None:
    """Ray itself would wait for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise NotReady(f"--cluster is {address}, and must be HOST:PORT of Ray's head, or auto.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise NotReady(f"Ray at {address} can't be reached ({why}): correct --cluster, or start Ray's head.") from None


@contextmanager
def _translated() -> Iterator[None]:
    """Within the block, what Ray raises becomes Unavailable."""
    try:
        yield
    except Exception as error:  # Ray raises plain ones, too.
        raise Unavailable(f"Ray fails: {_line(error)}") from None


def _name(node: Node) -> str:
    return f"host-{node.id}"


def _line(error: BaseException) -> str:
    """What an error says, in a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
