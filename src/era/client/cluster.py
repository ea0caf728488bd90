"""`era cluster`: several hosts of one cluster on this machine, started, watched over and stopped."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from era.client.failure import Failure
from era.client.grammar import Parser
from era.client.serve import server_extra
from era.errors import NotReady

if TYPE_CHECKING:
    from era.cluster.engines.trial import Engine

_FILE = "cluster.json"
_LOCK = "lock"
"""The file that is locked as long as a cluster of this directory runs, or is just being started or stopped."""

_ENGINES = ("postgresql", "s3", "ray")
_START_SECONDS = 120.0
_RAY_START_SECONDS = 300.0
_STOP_SECONDS = 60.0
_DOWN_SECONDS = 240.0
"""For hosts, and the engines after them."""

_AGAIN_SECONDS = 1.0
"""Before a host is started anew that has ended."""

_LOOK_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


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
        "DIR/cluster.json has their URLs. Ctrl-C stops them all, and so does `era cluster down`.\n\nThe hosts need "
        "nothing besides. With --postgresql, --s3 and --ray the command starts these, too, at loopback, their data in "
        "DIR, and stops them after the hosts.",
        (
            "era cluster up --dir ./cluster",
            "era cluster up --dir /var/lib/era --hosts 8 --port 8787",
            "era cluster up --dir ./cluster --tls",
            "era cluster up --dir ./cluster --full",
        ),
        json=False,
    )
    option = parser.add_argument
    option("--dir", type=Path, required=True, metavar="DIR", help="directory of the whole cluster")
    option("--hosts", type=int, default=3, help="how many hosts (3)")
    option("--port", type=int, default=0, help="port of the first host; the next have the ports after it; 0: any")
    option("--tls", action="store_true", help="have the hosts talk over TLS, with certificates made for this start")
    option("--postgresql", action="store_true", help="start a PostgreSQL for the rows")
    option("--s3", action="store_true", help="start an S3 server, Ceph's radosgw, for the content of files")
    option("--ray", action="store_true", help="start a Ray with a node for each host, which keeps it running")
    option("--full", action="store_true", help="all three")


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
        from era.cluster.engines.trial import check
    directory: Path = named.dir.resolve()
    wanted = {name for name in _ENGINES if named.full or getattr(named, name)}
    if (running := _running(directory)) is not None:
        raise Failure(f"A cluster runs in {directory} already, by process {running['pid']}: era cluster down.")
    check(directory, wanted, os.environ)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _take_lock(directory):
        raise Failure(f"A cluster in {directory} is just being started or stopped.")
    return _in_child(lambda pid: _run(named, directory, wanted, pid))


def _run(named: Any, directory: Path, wanted: set[str], pid: int) -> int:
    make = _RayHost if "ray" in wanted else _Host
    hosts = [make(directory, number, named.port) for number in range(1, named.hosts + 1)]
    if named.tls:
        with server_extra():
            from era.cluster.own_authority import certify
        address = os.environ.get("ERA_HOST") or "127.0.0.1"
        certified = certify(directory / "tls", [host.name for host in hosts], address)
        for host in hosts:
            host.settings = certified[host.name]
    return _Cluster(directory, hosts, wanted, pid).run()


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
    running = _running(named.dir.resolve())
    if running is None:
        raise Failure(f"No cluster runs in {named.dir}.")
    with suppress(ProcessLookupError):
        os.kill(running["pid"], signal.SIGTERM)
    until = time.monotonic() + _DOWN_SECONDS
    while not _take_lock(named.dir.resolve()):
        if time.monotonic() > until:
            raise Failure(f"Process {running['pid']} has not stopped its hosts in {_DOWN_SECONDS:g} seconds.")
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


class _RayHost(_Host):
    """One host that a node of Ray keeps running: it is only looked at here."""

    _pid = 0

    @property
    def pid(self) -> int:
        return self._pid

    def start(self, environment: dict[str, str]) -> None:
        """Nothing: its node does."""

    def look(self) -> bool:
        from era.cluster.host_process import served_by

        self.url, self._pid = served_by(self._data)
        return False

    def stop(self) -> None:
        """Nothing: the driver does."""

    def wait(self, seconds: float) -> None:
        """Nothing: the driver does."""


class _Cluster:
    """The hosts and what they need, from their start to their end."""

    def __init__(self, directory: Path, hosts: Sequence[_Host], wanted: set[str], pid: int) -> None:
        """`pid` is that of the process which is to be told to stop it."""
        from era.cluster.engines.trial import engines

        self._directory = directory
        self._hosts = hosts
        self._pid = pid
        self._stopping = False
        self._told: list[tuple[str, int]] = []
        self._environment = {
            **os.environ,
            "ERA_SHARED_DIR": str(directory / "shared"),
            "ERA_CLUSTER_SECRET": os.environ.get("ERA_CLUSTER_SECRET") or _secret(directory / "secret"),
        }
        self._start_seconds = _RAY_START_SECONDS if "ray" in wanted else _START_SECONDS
        self._engines = engines(directory, wanted, [host.own for host in hosts], self._environment)
        self._again_at = 0.0

    def run(self) -> int:
        """Start all and watch over it until a signal comes; the exit code."""
        started: list[Engine] = []
        try:
            self._on_signals(self._break_off)
            with suppress(_Stopped):
                for engine in self._engines:
                    started.append(engine)
                    self._start_engine(engine)
                self._on_signals(self._stop)
                self._start()
                while not self._stopping:
                    self._watch()
                    time.sleep(_LOOK_SECONDS)
        finally:
            self._on_signals(self._stop)
            for host in self._hosts:
                host.stop()
            until = time.monotonic() + _STOP_SECONDS
            for host in self._hosts:
                host.wait(max(until - time.monotonic(), 0.1))
            for engine in reversed(started):
                engine.stop()
            (self._directory / _FILE).unlink(missing_ok=True)
        return 0

    def _on_signals(self, do: Callable[..., None]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, do)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _break_off(self, *_: object) -> NoReturn:
        self._on_signals(self._stop)  # Ctrl-C is two signals: the terminal's, and that of the process above
        raise _Stopped

    def _start_engine(self, engine: Engine) -> None:
        where = engine.start()
        self._environment.update(engine.settings())
        print(f"{engine.name}   {where}", flush=True)

    def _start(self) -> None:
        """Start all hosts. Raises Failure where one doesn't come up."""
        for host in self._hosts:
            host.start(self._environment)
        until = time.monotonic() + self._start_seconds
        while not self._stopping and not all(host.url for host in self._hosts):
            for host in self._hosts:
                if host.look():
                    raise Failure(f"{host.name} doesn't start: {host.last_words}")
            if time.monotonic() > until:
                raise Failure(
                    f"The hosts aren't ready after {self._start_seconds:g} seconds; see the logs in {self._directory}."
                )
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
        draft = self._directory / f"{_FILE}.new"
        draft.write_text(json.dumps(told, indent=2) + "\n")
        draft.replace(self._directory / _FILE)


class _Stopped(BaseException):
    """A signal came while engines were started."""


def _secret(file: Path) -> str:
    """The cluster's secret, which is made at the first start."""
    from era.cluster.engines.process import keep

    if not file.exists():
        keep(file, secrets.token_urlsafe(32))
    return file.read_text()


def _take_lock(directory: Path) -> bool:
    """Take the directory's lock, until this process and its forks end; False where another process has it."""
    lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    return True


def _running(directory: Path) -> dict[str, Any] | None:
    """What DIR/cluster.json says, if the process that wrote it is there."""
    try:
        told: dict[str, Any] = json.loads((directory / _FILE).read_text())
        os.kill(told["pid"], 0)
    except (OSError, ValueError, KeyError):
        return None
    return told
