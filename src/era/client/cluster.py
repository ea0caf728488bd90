"""`era cluster`: several hosts of one cluster on this machine; `era host`: the hosts on the nodes of a Ray cluster."""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from era.client.command import Command, Group, argument
from era.client.output import Failure, print_json, table
from era.client.serve import server_extra

_LOCK = "lock"
"""The file that is locked as long as a cluster of this directory runs, or is just being started or stopped. In it is
the id of the process that is to be told to stop it."""

_ENGINES = ("postgresql", "s3", "ray")
_START_SECONDS = 300.0
_RAY_START_SECONDS = 600.0
_DOWN_SECONDS = 240.0
"""For hosts, and the engines after them."""

_LOOK_SECONDS = 0.1
_PID_DIGITS = 10
_PR_SET_PDEATHSIG = 1


def up(named: Any) -> int:
    if not 1 <= named.hosts <= 64:
        raise Failure("--hosts is a number from 1 to 64.")
    with server_extra():
        import era.settings  # noqa: F401  # only to tell now what is missing
        from era.cluster.trial import check
    directory: Path = named.dir.resolve()
    wanted = {name for name in _ENGINES if named.full or getattr(named, name)}
    if pid := _running(directory):
        raise Failure(f"A cluster runs in {directory} already, by process {pid}: era cluster down.")
    check(directory, wanted, os.environ)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _take_lock(directory):
        raise Failure(f"A cluster in {directory} is just being started or stopped.")
    return _in_child(lambda pid: _run(named, directory, wanted, pid))


def _run(named: Any, directory: Path, wanted: set[str], pid: int) -> int:
    from era.cluster.local import HostOfNode, LocalCluster, LocalHost
    from era.cluster.trial import engines

    make, seconds = (HostOfNode, _RAY_START_SECONDS) if "ray" in wanted else (LocalHost, _START_SECONDS)
    hosts = [make(directory, number, named.port) for number in range(1, named.hosts + 1)]
    if named.tls:
        with server_extra():
            from era.cluster.local import certify
        address = os.environ.get("ERA_HOST") or "127.0.0.1"
        certified = certify(directory / "tls", [host.name for host in hosts], address)
        for host in hosts:
            host.settings = certified[host.name]
    environment = {
        **os.environ,
        "ERA_SHARED_DIR": str(directory / "shared"),
        "ERA_CLUSTER_SECRET": os.environ.get("ERA_CLUSTER_SECRET") or _secret(directory / "secret"),
    }
    started = engines(directory, wanted, [host.own for host in hosts])
    return LocalCluster(directory, hosts, started, environment, pid).run(seconds)


def _in_child(run: Callable[[int], int]) -> int:
    """Call `run` with this process's id, in a child; the exit code that it returns. The child is told to end when this
    process ends, also if that is killed: so there is still somebody who stops hosts and engines one after the other."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        return run(parent) if os.getppid() == parent else 1

    def tell(*_: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, tell)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def down(named: Any) -> int:
    with server_extra():
        from era.cluster.local import end_hosts, has_hosts
    directory: Path = named.dir.resolve()
    pid = _running(directory)
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    elif not has_hosts(directory):
        raise Failure(f"No cluster runs in {named.dir}.")
    until = time.monotonic() + _DOWN_SECONDS
    while _running(directory):
        if time.monotonic() > until:
            raise Failure(f"Process {pid} has not stopped its hosts in {_DOWN_SECONDS:g} seconds.")
        time.sleep(_LOOK_SECONDS)
    if left := end_hosts(directory):
        names = ", ".join(f"{name} (process {process})" for name, process in left.items())
        raise Failure(f"These hosts still run: {names}. End them: kill -9 {' '.join(map(str, left.values()))}")
    return 0


def _secret(file: Path) -> str:
    """The cluster's secret, which is made at the first start."""
    from era.cluster.trial import keep

    if not file.exists():
        keep(file, secrets.token_urlsafe(32))
    return file.read_text()


def _take_lock(directory: Path) -> bool:
    """Take the directory's lock, until this process and its forks end; False where another process has it."""
    lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _lock(lock):
        os.close(lock)
        return False
    os.pwrite(lock, f"{os.getpid():<{_PID_DIGITS}}".encode(), 0)
    return True


def _running(directory: Path) -> int:
    """The process that is to be told to stop the directory's cluster; 0 where none runs."""
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return 0 if _lock(lock) else int(os.pread(lock, _PID_DIGITS, 0) or 0)
    finally:
        os.close(lock)


def _lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_DIRECTORY = argument("--dir", type=Path, required=True, metavar="DIR", help="directory of the whole cluster")


_ANSWER_SECONDS = 30.0


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
    "cluster": Group(
        "Serve by several hosts on this machine, which share their sessions.",
        {
            "up": Command(
                "Serve the HTTP API by several hosts on this machine.\n\n"
                "Each host is a process of its own, at a port of its own. Any of them takes any call. They share the "
                "sessions in DIR; docs/cluster.md says what that gives. A host that ends is started anew. Settings are "
                "those of `era serve`, as ERA_ variables.\n\n"
                "Once all are ready, DIR/cluster.json has their URLs. Ctrl-C stops them all, and so does `era cluster "
                "down`.\n\n"
                "The hosts need nothing besides. With --postgresql, --s3 and --ray the command starts these, too, at "
                "loopback, their data in DIR, and stops them after the hosts.",
                up,
                [
                    "era cluster up --dir ./cluster",
                    "era cluster up --dir /var/lib/era --hosts 8 --port 8787",
                    "era cluster up --dir ./cluster --tls",
                    "era cluster up --dir ./cluster --full",
                ],
                [
                    _DIRECTORY,
                    argument("--hosts", type=int, default=3, help="how many hosts (3)"),
                    argument(
                        "--port",
                        type=int,
                        default=0,
                        help="port of the first host; the next have the ports after it; 0: any",
                    ),
                    argument(
                        "--tls",
                        action="store_true",
                        help="have the hosts talk over TLS, with certificates made for this start",
                    ),
                    argument("--postgresql", action="store_true", help="start a PostgreSQL for the rows"),
                    argument(
                        "--s3", action="store_true", help="start an S3 server, Ceph's radosgw, for the content of files"
                    ),
                    argument(
                        "--ray",
                        action="store_true",
                        help="start a Ray with a node for each host, which keeps it running",
                    ),
                    argument("--full", action="store_true", help="all three"),
                ],
                summary="start hosts, and watch over them",
                has_json=False,
            ),
            "down": Command(
                "Stop the hosts that `era cluster up` has started, and wait until they have ended.",
                down,
                ["era cluster down --dir ./cluster"],
                [_DIRECTORY],
                summary="stop them",
                has_json=False,
            ),
        },
    ),
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
    ),
}
