"""`era cluster`: several hosts of one cluster on this machine, started, watched over and stopped."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from era.client.failure import Failure
from era.client.grammar import Parser
from era.client.serve import server_extra

_FILE = "cluster.json"
_START_SECONDS = 120.0
_STOP_SECONDS = 60.0
_AGAIN_SECONDS = 1.0
"""Before a host is started anew that has ended."""

_LOOK_SECONDS = 0.1


def add(parser: Parser) -> None:
    command = parser.group("Serve by several hosts on this machine, which share their sessions.")
    _add_up(command("up", "start hosts, and watch over them"))
    _add_down(command("down", "stop them"))


def _add_up(parser: Parser) -> None:
    parser.describe(
        up,
        "Serve the HTTP API by several hosts on this machine.\n\nEach host is a process of its own, at a port of its "
        "own. Any of them takes any call. They share the sessions in DIR; docs/cluster.md says what that gives. A host "
        "that ends is started anew. Settings are those of `era serve`, as ERA_ variables.\n\nOnce all are ready, "
        "DIR/cluster.json has their URLs. Ctrl-C stops them all, and so does `era cluster down`.",
        (
            "era cluster up --dir ./cluster",
            "era cluster up --dir /var/lib/era --hosts 8 --port 8787",
            "era cluster up --dir ./cluster --tls",
        ),
        json=False,
    )
    option = parser.add_argument
    option("--dir", type=Path, required=True, metavar="DIR", help="directory of the whole cluster")
    option("--hosts", type=int, default=3, help="how many hosts (3)")
    option("--port", type=int, default=0, help="port of the first host; the next have the ports after it; 0: any")
    option("--tls", action="store_true", help="have the hosts talk over TLS, with certificates made for this start")


def _add_down(parser: Parser) -> None:
    parser.describe(
        down,
        "Stop the hosts that `era cluster up` has started, and wait until they have ended.",
        ("era cluster down --dir ./cluster",),
        json=False,
    )
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR", help="directory of the whole cluster")


def up(named: Any) -> int:
    if not 1 <= named.hosts <= 64:
        raise Failure("--hosts is a number from 1 to 64.")
    with server_extra():
        import era.settings  # noqa: F401  # only to tell now what is missing
    directory: Path = named.dir.resolve()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (running := _running(directory)) is not None:
        raise Failure(f"A cluster runs in {directory} already, by process {running['pid']}: era cluster down.")
    hosts = [_Host(directory, number, named.port) for number in range(1, named.hosts + 1)]
    if named.tls:
        with server_extra():
            from era.cluster.own_authority import certify
        address = os.environ.get("ERA_HOST") or "127.0.0.1"
        certified = certify(directory / "tls", [host.name for host in hosts], address)
        for host in hosts:
            host.settings = certified[host.name]
    return _Cluster(directory, hosts).run()


def down(named: Any) -> int:
    running = _running(named.dir.resolve())
    if running is None:
        raise Failure(f"No cluster runs in {named.dir}.")
    with suppress(ProcessLookupError):
        os.kill(running["pid"], signal.SIGTERM)
    until = time.monotonic() + _STOP_SECONDS
    while _running(named.dir.resolve()) is not None:
        if time.monotonic() > until:
            raise Failure(f"Process {running['pid']} has not stopped its hosts in {_STOP_SECONDS:g} seconds.")
        time.sleep(_LOOK_SECONDS)
    return 0


class _Host:
    """One host, which keeps its port and its directory when it is started anew."""

    def __init__(self, directory: Path, number: int, first_port: int) -> None:
        self.name = f"host-{number}"
        self.url = ""
        self.settings: Mapping[str, str] = {}
        """Those that are its own, besides its port and its directory."""

        self._port = first_port and first_port + number - 1
        self._data = directory / self.name
        self._log = directory / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = 0.0
        self._log_from = 0
        """Where in the log its present process begins."""

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    def start(self, environment: dict[str, str]) -> None:
        """Start it, with these variables besides its own."""
        own = {"ERA_DATA_DIR": str(self._data), "ERA_PORT": str(self._port)}
        self._begun, self.url = time.monotonic(), ""
        with self._log.open("ab") as log:
            self._log_from = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "era.client.cli", "serve"],
                env={**environment, **self.settings, **own},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us, who tell it
            )

    def look(self) -> bool:
        """Whether it has ended, after seeing where it listens. It keeps a port that the system has chosen."""
        if not self.url:
            for line in self._said().splitlines():
                if line.startswith("ERA serves"):
                    self.url = line.split()[2]
                    self._port = int(self.url.rpartition(":")[2])
        return self._process is not None and self._process.poll() is not None

    @property
    def may_start(self) -> bool:
        return time.monotonic() > self._begun + _AGAIN_SECONDS

    @property
    def last_words(self) -> str:
        return self._said().strip()[-2000:]

    def _said(self) -> str:
        """What its present process has written."""
        with self._log.open("rb") as log:
            log.seek(self._log_from)
            return log.read().decode(errors="replace")

    def stop(self) -> None:
        """Tell it to end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Wait until it has ended; kill it after so many seconds."""
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Cluster:
    """The hosts, from their start to their end."""

    def __init__(self, directory: Path, hosts: list[_Host]) -> None:
        self._directory = directory
        self._hosts = hosts
        self._stopping = False
        self._environment = {
            **os.environ,
            "ERA_SHARED_DIR": str(directory / "shared"),
            "ERA_CLUSTER_SECRET": os.environ.get("ERA_CLUSTER_SECRET") or _secret(directory / "secret"),
        }

    def run(self) -> int:
        """Start the hosts and watch over them until a signal comes; the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        try:
            self._start()
            while not self._stopping:
                self._watch()
                time.sleep(_LOOK_SECONDS)
        finally:
            for host in self._hosts:
                host.stop()
            until = time.monotonic() + _STOP_SECONDS
            for host in self._hosts:
                host.wait(max(until - time.monotonic(), 0.1))
            (self._directory / _FILE).unlink(missing_ok=True)
        return 0

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _start(self) -> None:
        """Start all hosts. Raises Failure where one doesn't come up."""
        for host in self._hosts:
            host.start(self._environment)
        until = time.monotonic() + _START_SECONDS
        while not self._stopping and not all(host.url for host in self._hosts):
            for host in self._hosts:
                if host.look():
                    raise Failure(f"{host.name} doesn't start: {host.last_words}")
            if time.monotonic() > until:
                raise Failure(f"The hosts aren't ready after {_START_SECONDS:g} seconds; see {self._directory}/*.log.")
            time.sleep(_LOOK_SECONDS)
        if not self._stopping:
            self._tell()
            for host in self._hosts:
                print(f"{host.name}   {host.url}", flush=True)

    def _watch(self) -> None:
        """Start anew what has ended, and say where it is once it listens."""
        for host in self._hosts:
            was = host.url
            if host.look() and host.may_start:
                print(f"{host.name} has ended and is started anew", file=sys.stderr, flush=True)
                host.start(self._environment)
            elif host.url and not was:
                self._tell()

    def _tell(self) -> None:
        """Write what others may know, as a whole or not at all."""
        told = {"pid": os.getpid(), "hosts": [{"url": host.url, "pid": host.pid} for host in self._hosts]}
        draft = self._directory / f"{_FILE}.new"
        draft.write_text(json.dumps(told, indent=2) + "\n")
        draft.replace(self._directory / _FILE)


def _secret(file: Path) -> str:
    """The cluster's secret, which is made at the first start."""
    if not file.exists():
        draft = file.with_suffix(".new")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as opened:
            opened.write(secrets.token_urlsafe(32))
        draft.rename(file)
    return file.read_text()


def _running(directory: Path) -> dict[str, Any] | None:
    """What DIR/cluster.json says, if the process that wrote it is there."""
    try:
        told: dict[str, Any] = json.loads((directory / _FILE).read_text())
        os.kill(told["pid"], 0)
    except (OSError, ValueError, KeyError):
        return None
    return told
