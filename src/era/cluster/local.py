"""The hosts of a cluster on this machine, and what they need: started, watched over and stopped (`era cluster up`)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Protocol

from era.cluster.host_process import HostProcess, served_by
from era.errors import NotReady
from era.network.issuer import YEARS, Issuer

FILE = "cluster.json"
"""What others may know, in the cluster's directory, once all hosts are ready."""

_STOP_SECONDS = 100.0
"""For which all hosts are waited for: what one may take by host_process.stop_seconds, and some more."""

_AGAIN_SECONDS = 1.0
"""Before a host is started anew that has ended."""

_LOOK_SECONDS = 0.1


class Engine(Protocol):
    """One that is a child of this process, with its data in a directory of its own."""

    name: str
    keeps_hosts: bool
    """Whether it starts hosts anew that have ended."""

    @property
    def has_ended(self) -> bool: ...

    def start(self, environment: dict[str, str]) -> str:
        """Start it, the first time or again, and add to the environment what those are told that start after it.

        Returns:
            Where it is, for people.

        Raises:
            NotReady, OSError: It doesn't start.
        """

    def stop(self) -> None: ...


class LocalHost:
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
    def own(self) -> dict[str, str]:
        """Its settings that others don't have."""
        return {**self.settings, "ERA_DATA_DIR": str(self._data), "ERA_PORT": str(self._port)}

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    def start(self, environment: dict[str, str]) -> None:
        """Start it, with these variables besides its own."""
        # It ends with this process, however that ends.
        parented = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
        self._begun, self.url = time.monotonic(), ""
        with self._log.open("ab") as log:
            self._log_from = log.tell()
            self._process = subprocess.Popen(
                [*parented, sys.executable, "-m", "era.client.cli", "serve"],
                env={**environment, **self.own},
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


class HostOfNode(LocalHost):
    """One host that a node of Ray keeps running: it is only looked at here."""

    _pid = 0

    @property
    def pid(self) -> int:
        return self._pid

    def start(self, environment: dict[str, str]) -> None:
        """Nothing: its node does."""

    def look(self) -> bool:
        self.url, self._pid = served_by(self._data)
        return False

    def stop(self) -> None:
        """Nothing: the driver does."""

    def wait(self, seconds: float) -> None:
        """Nothing: the driver does."""


class LocalCluster:
    """The hosts and what they need, from their start to their end."""

    def __init__(
        self,
        directory: Path,
        hosts: Sequence[LocalHost],
        engines: Sequence[Engine],
        environment: dict[str, str],
        pid: int,
    ) -> None:
        """`environment` is that of all hosts; engines add to it. `pid` is that of the process which
        is to be told to stop it."""
        self._directory = directory
        self._hosts = hosts
        self._engines = engines
        self._environment = environment
        self._pid = pid
        self._stopping = False
        self._told: list[tuple[str, int]] = []
        self._again_at = 0.0

    def run(self, seconds: float) -> int:
        """Start all and watch over it until a signal comes; the exit code. Raises NotReady where an engine doesn't
        start, or hosts don't within so many seconds."""
        started: list[Engine] = []
        try:
            self._on_signals(self._stop)
            with suppress(_Stopped):
                for engine in self._engines:
                    started.append(engine)
                    self._start_engine(engine)
                self._start(seconds)
                while not self._stopping:
                    self._watch()
                    time.sleep(_LOOK_SECONDS)
        finally:
            for host in self._hosts:
                host.stop()
            until = time.monotonic() + _STOP_SECONDS
            for host in self._hosts:
                host.wait(max(until - time.monotonic(), 0.1))
            # Hosts that a killed driver or head of Ray left need the database and the bucket to leave the cluster, and
            # would be started anew as long as Ray runs.
            for engine in reversed([engine for engine in started if engine.keeps_hosts]):
                engine.stop()
            left = end_hosts(self._directory)
            for engine in reversed([engine for engine in started if not engine.keeps_hosts]):
                engine.stop()
            (self._directory / FILE).unlink(missing_ok=True)
        return 1 if left else 0

    def _on_signals(self, do: Callable[..., None]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, do)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _break_off(self, *_: object) -> NoReturn:
        self._on_signals(self._stop)  # Ctrl-C is two signals: the terminal's, and that of the process above
        raise _Stopped

    def _start_engine(self, engine: Engine) -> None:
        """Start an engine, which a signal breaks off. Raises NotReady, OSError, _Stopped."""
        self._on_signals(self._break_off)
        try:
            if self._stopping:
                raise _Stopped
            where = engine.start(self._environment)
        finally:
            self._on_signals(self._stop)
        print(f"{engine.name}   {where}", flush=True)

    def _start(self, seconds: float) -> None:
        """Start all hosts. Raises NotReady where one doesn't come up."""
        for host in self._hosts:
            host.start(self._environment)
        until = time.monotonic() + seconds
        while not self._stopping and not all(host.url for host in self._hosts):
            for host in self._hosts:
                if host.look():
                    raise NotReady(f"{host.name} doesn't start: {host.last_words}")
            if time.monotonic() > until:
                raise NotReady(f"The hosts aren't ready after {seconds:g} seconds; see the logs in {self._directory}.")
            time.sleep(_LOOK_SECONDS)
        if not self._stopping:
            self._tell()
            for host in self._hosts:
                print(f"{host.name}   {host.url}", flush=True)

    def _watch(self) -> None:
        """Start anew what has ended, and say where it is once it listens."""
        for engine in self._engines:
            if engine.has_ended and time.monotonic() > self._again_at:
                print(f"{engine.name} has ended and is started anew", file=sys.stderr, flush=True)
                self._again_at = time.monotonic() + _AGAIN_SECONDS
                try:
                    self._start_engine(engine)
                except (NotReady, OSError) as error:
                    print(error, file=sys.stderr, flush=True)
        for host in self._hosts:
            if host.look() and host.may_start:
                print(f"{host.name} has ended and is started anew", file=sys.stderr, flush=True)
                host.start(self._environment)
        if any(host.url and (host.url, host.pid) not in self._told for host in self._hosts):
            self._tell()

    def _tell(self) -> None:
        """Write what others may know, as a whole or not at all."""
        self._told = [(host.url, host.pid) for host in self._hosts]
        told = {"pid": self._pid, "hosts": [{"url": url, "pid": pid} for url, pid in self._told]}
        draft = self._directory / f"{FILE}.new"
        draft.write_text(json.dumps(told, indent=2) + "\n")
        draft.replace(self._directory / FILE)


def end_hosts(directory: Path, seconds: float = _STOP_SECONDS) -> dict[str, int]:
    """End the hosts of a cluster that still run, for instance after Ray's driver was killed.

    Args:
        directory: The cluster's directory.
        seconds: Time for all to end. Each host is killed earlier, once the time that its own settings give it is over.

    Returns:
        Hosts that could not be ended: their names and process ids.
    """
    left = _hosts(directory)
    until = time.monotonic() + seconds
    for host in left:
        with suppress(OSError):  # somebody else's process, or a full disk: it is looked at below
            host.stop()
    while left and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
        for host in left:
            with suppress(OSError):
                host.look()
        left = [host for host in left if host.status().pid]
    return {host.data_dir.name: host.status().pid for host in left}


def has_hosts(directory: Path) -> bool:
    """Return whether hosts of the cluster run, supervised or not."""
    return bool(_hosts(directory))


def _hosts(directory: Path) -> list[HostProcess]:
    """Return the hosts of the cluster that run."""
    return [host for each in sorted(directory.glob("host-*/")) if (host := HostProcess(each)).status().pid]


class _Stopped(BaseException):
    """A signal came while an engine was started."""


def certify(directory: Path, hosts: Sequence[str], address: str) -> Mapping[str, Mapping[str, str]]:
    """The settings of each of these hosts, all at this address, by its name. Their files are in the directory, and are
    those of nobody else: with the authority's key, which is kept nowhere, no more can be made. Raises OSError."""
    directory.mkdir(mode=0o700, exist_ok=True)
    issuer = Issuer("ERA, hosts of a cluster")
    authority = directory / "authority.pem"
    _write_private(authority, issuer.certificate)
    found = {}
    for host in hosts:
        certificate, key = directory / f"{host}.pem", directory / f"{host}.key"
        for file, content in zip((key, certificate), issuer.issue([address], YEARS, calls=True), strict=True):
            _write_private(file, content)
        found[host] = {
            "ERA_CLUSTER_AUTHORITY": str(authority),
            "ERA_CLUSTER_CERTIFICATE": str(certificate),
            "ERA_CLUSTER_CERTIFICATE_KEY": str(key),
        }
    return found


def _write_private(file: Path, content: bytes) -> None:
    """Write a file for nobody else to read, in the place of the one before."""
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as opened:
        opened.write(content)
