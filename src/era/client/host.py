"""`era host`: look at the hosts on the nodes of a Ray cluster, drain, start and stop them."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from era.client.command import Command, Group, argument
from era.client.failure import Failure
from era.client.output import print_json, table
from era.client.serve import server_extra

_ANSWER_SECONDS = 30.0
_LOOK_SECONDS = 0.2


def show(named: Any) -> int:
    _print(_connect(named).known(), named)
    return 0


def drain(named: Any) -> int:
    hosts = _connect(named)
    node = _node(hosts, named.node)
    while True:  # Its actor sees to it that it ends.
        found = hosts.stop(node, drain=True)
        if found.host is None or found.host.state == "failing":
            raise Failure(f"The host of {node.address} can't be drained: {found.problem or found.host.detail}.")
        if found.host.state == "drained":
            _print([found], named)
            return 0
        time.sleep(_LOOK_SECONDS)


def start(named: Any) -> int:
    hosts = _connect(named)
    found = hosts.start(_node(hosts, named.node))
    if found.host is None:
        raise Failure(f"The host of {found.node.address} can't be started: {found.problem}.")
    _print([found], named)
    return 0


def stop(named: Any) -> int:
    left = _connect(named).stop_all(_ANSWER_SECONDS)
    _print(left, named)
    return 1 if left else 0


def _connect(named: Any) -> Any:
    """The hosts of the cluster, a RayHosts."""
    with server_extra():
        from era.cluster.ray_hosts import connect
    return connect(named.cluster)


def _node(hosts: Any, wanted: str | None) -> Any:
    """The node with this address or id. Raises Failure where there is none, or several have the address."""
    wanted = wanted or hosts.own_node
    found = [node for node in hosts.nodes() if wanted in (node.address, node.id)]
    if len(found) != 1:
        raise Failure(f"{len(found)} nodes are {wanted}; `era host list` has their ids.")
    return found[0]


def _print(found: Any, named: Any) -> None:
    """Print what is known of hosts, NodeHosts."""
    rows = [
        {"node": each.node.id, "address": each.node.address}
        | ({"state": "unknown", "detail": each.problem} if each.host is None else asdict(each.host))
        for each in found
    ]
    if named.json:
        print_json({"hosts": rows})
        return
    names = ("address", "node", "state", "url", "pid", "restarts", "detail")
    table(names, [[row.get(name, "") for name in names] for row in rows])


_CLUSTER = argument(
    "--cluster", default="auto", metavar="ADDRESS", help="Ray's head, HOST:PORT; left out: this machine's cluster"
)
_NODE = argument("node", nargs="?", help="address or id of the node; left out: the one that this runs on")

COMMANDS = {
    "host": Group(
        "Look at and operate the hosts on the nodes of a Ray cluster, which `era serve --cluster` has started.",
        {
            "list": Command(
                "List the nodes' hosts: node, state, URL, process, and how often it was started anew.",
                show,
                ["era host list", "era host list --cluster 10.0.0.1:6379 --json"],
                [_CLUSTER],
                summary="list them",
            ),
            "drain": Command(
                "Stop a node's host for good, and wait until it has ended.\n\nIt lets runs end, and gives its sessions "
                "to the other hosts. It isn't started again before `era host start`. For a node that is to be taken "
                "away, and for an upgrade, node after node.",
                drain,
                ["era host drain", "era host drain 10.0.0.7"],
                [_NODE, _CLUSTER],
                summary="stop one",
            ),
            "start": Command(
                "Start a node's host that was drained.",
                start,
                ["era host start 10.0.0.7"],
                [_NODE, _CLUSTER],
                summary="start one again",
            ),
            "stop": Command(
                "Stop all hosts, and wait until they have ended.\n\nEnd `era serve --cluster` first: it would start "
                "them again.",
                stop,
                ["era host stop"],
                [_CLUSTER],
                summary="stop them all",
            ),
        },
    )
}
