"""A Ray of several nodes on this machine, and the driver that has a host on each of them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from era.cluster.engines.process import LOOPBACK, ServerProcess, free_port, keep
from era.cluster.host_process import SERVE
from era.errors import NotReady

MISSING = "there is no Ray here: pip install 'era-sessions[server,cluster]'"
_TRIES = 3
_START_SECONDS = 240.0
"""For a try. A busy machine takes a minute to start Ray."""

_NODE = f"""
import ray._private.services as services
services.get_node_ip_address = lambda address=None: {LOOPBACK!r}
from ray.scripts.scripts import main
main()
"""
"""The command `ray`, but for what it does with loopback as a node's address: it would take another of the machine's."""

_STOP_SECONDS = 60.0
_LONGEST = 40
"""Bytes of the path of Ray's directory: those of its sockets are longer by 65, and must be shorter than 108."""


def is_there() -> bool:
    return find_spec("ray") is not None


class RayNodes:
    """The nodes, of which the first is the head. They listen on loopback, and ask for a token."""

    name = "ray"
    keeps_hosts = True

    def __init__(self, directory: Path, hosts: Sequence[Mapping[str, str]]) -> None:
        """`directory` has the token, logs, and what Ray writes. `hosts` are the settings that each node's host has of
        its own."""
        self._directory = directory
        self._hosts = hosts
        self._nodes: list[ServerProcess] = []
        self._written: Path | None = None

    @property
    def has_ended(self) -> bool:
        return any(node.has_ended for node in self._nodes)

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self._port}"

    def start(self) -> str:
        """Start all nodes anew, and return where the head is. Raises NotReady, OSError."""
        self.stop()
        self._directory.mkdir(mode=0o700, exist_ok=True)
        keep(self._directory / "token", secrets.token_hex(32))
        self._written = self._directory / "temp"
        if len(bytes(self._written)) > _LONGEST:
            self._written = Path(tempfile.mkdtemp(prefix="era-ray-"))
        self._port = free_port()
        head = ["--head", f"--port={self._port}", "--include-dashboard=false", "--disable-usage-stats"]
        head += [f"--temp-dir={self._written}"]
        for number, own in enumerate(self._hosts, 1):
            log = self._directory / f"node-{number}.log"
            node = ServerProcess("Ray", log)
            self._nodes.append(node)
            command = [sys.executable, "-c", _NODE, "start", "--block", "--num-cpus=0"]
            command += [f"--node-ip-address={LOOPBACK}", "--object-store-memory=80000000"]
            command += head if number == 1 else [f"--address={self.address}"]
            log.unlink(missing_ok=True)
            self._start(node, log, command, {**self._environment(), **own})
        return self.address

    def _start(self, node: ServerProcess, log: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a node, with several tries: Ray's own patience is a few seconds for some steps, and a busy machine, or
        one that reads Ray from its disk for the first time, takes longer."""
        for left in reversed(range(_TRIES)):
            try:
                node.start(command, _says(log, "Ray runtime started"), _START_SECONDS, dies_by="TERM", env=environment)
                return
            except NotReady:
                if not left:
                    raise

    def settings(self) -> dict[str, str]:
        """Those of nodes and of the driver."""
        return {"RAY_AUTH_TOKEN_PATH": str(self._directory / "token"), "RAY_AUTH_MODE": "token"}

    def _environment(self) -> dict[str, str]:
        """That of nodes: what hosts share the driver tells them."""
        base = {name: value for name, value in os.environ.items() if not name.startswith(("ERA_", "AWS_", "RAY_"))}
        return base | self.settings()

    def stop(self) -> None:
        for node in reversed(self._nodes):
            node.stop(signal.SIGTERM, _STOP_SECONDS)
        self._nodes.clear()
        if self._written is not None:
            shutil.rmtree(self._written, ignore_errors=True)
            self._written = None


class Driver:
    """`era serve --cluster`, which ends once it has stopped the hosts."""

    name = "driver"
    keeps_hosts = True

    def __init__(self, directory: Path, nodes: RayNodes, environment: Mapping[str, str]) -> None:
        """`environment` is known in full only once what was started before it is."""
        self._nodes = nodes
        self._environment = environment
        self._process = ServerProcess("The driver", directory / "driver.log")
        self._address = ""

    @property
    def has_ended(self) -> bool:
        """Also if it is that of nodes which have been started anew."""
        return self._process.has_ended or self._address != self._nodes.address

    def start(self) -> str:
        """Start it; when hosts are ready their notes say. Raises NotReady, OSError."""
        self._process.stop(signal.SIGKILL)  # so that hosts go on, if there are any
        self._address = self._nodes.address
        command = [*SERVE, "--cluster", self._address]
        self._process.start(command, lambda: True, _STOP_SECONDS, dies_by="TERM", env=self._environment)
        return f"keeps a host on each node of {self._address}"

    def settings(self) -> dict[str, str]:
        return {}

    def stop(self) -> None:
        self._process.stop(signal.SIGTERM, 2 * _STOP_SECONDS)


def _says(log: Path, words: str) -> Callable[[], bool]:
    return lambda: log.exists() and words in log.read_text(errors="replace")
