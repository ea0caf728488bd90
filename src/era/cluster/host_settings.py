"""The settings of a host that is started on a node: those of its cluster, and what is the node's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from era.errors import NotReady

_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  they are only compared
_PORT = "8787"
_NEEDED = {
    "ERA_DATABASE_URL": "the PostgreSQL database of all hosts",
    "ERA_SHARED_DIR": "the directory that all hosts share",
    "ERA_CLUSTER_SECRET": "the secret by which hosts know each other",
    "ERA_DATA_DIR": "a directory of the host's own",
}
"""What a host must be told, and in which words it is asked for."""


def of_cluster(variables: Mapping[str, str]) -> dict[str, str]:
    """Of these variables, what all hosts of a cluster are to have: settings, and credentials of S3."""
    return {name: value for name, value in variables.items() if name.startswith(("ERA_", "AWS_"))}


def host_environment(cluster: Mapping[str, str], node: Mapping[str, str], address: str) -> dict[str, str]:
    """The environment of the host on a node.

    `cluster` is what all hosts are given, `node` the node's own environment, which goes before it, and `address` where
    other nodes reach this one. What is of Ray, its token too, is no business of a host's. Raises NotReady for what is
    missing, and for a directory that depends on where a process was started.
    """
    found = {**cluster, **{name: value for name, value in node.items() if not name.startswith("RAY_")}}
    for name, what in _NEEDED.items():
        if not found.get(name):
            raise NotReady(f"{name} isn't set: give `era serve --cluster`, or this node, {what}.")
    for name in ("ERA_DATA_DIR", "ERA_SHARED_DIR"):
        if not Path(found[name]).is_absolute():
            raise NotReady(f"{name} is {found[name]}: on the nodes of a cluster it must be an absolute path.")
    found.setdefault("ERA_HOST", address)
    port = found.setdefault("ERA_PORT", _PORT)
    scheme = "http"
    if found.get("ERA_CLUSTER_CERTIFICATE"):
        scheme, port = "https", found.get("ERA_CLUSTER_PORT") or "0"
    if found["ERA_HOST"] in _EVERYWHERE and port != "0":
        found.setdefault("ERA_HOST_URL", f"{scheme}://{f'[{address}]' if ':' in address else address}:{port}")
    return found
