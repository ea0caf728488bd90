"""PostgreSQL, S3 and Ray for a cluster that somebody tries on one machine, as children of `era cluster up`.

All of them listen on loopback, ask for passwords that are made at the first start, and end with the command.
"""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import obstore
import psycopg
from obstore.exceptions import BaseError
from obstore.store import S3Store

from era.cluster.host_process import SERVE, last_line
from era.cluster.local import Engine
from era.errors import NotReady

LOOPBACK = "127.0.0.1"
NEEDED = {
    "postgresql": "apt-get install postgresql",
    "s3": "apt-get install radosgw",
    "ray": "pip install 'era-sessions[server,cluster]'",
}
"""What installs an engine."""

_LOOK_SECONDS = 0.02
_START_SECONDS = 240.0
"""For a server, or a node of Ray, to answer: a busy machine takes a minute to start Ray."""

_STOP_SECONDS = 120.0
_RAY_TRIES = 3
_RAY_LONGEST = 40
"""Bytes of the path of Ray's directory: those of its sockets are longer by 65, and must be shorter than 108."""

_RAY_NODE = f"""
import ray._private.services as services
services.get_node_ip_address = lambda address=None: {LOOPBACK!r}
from ray.scripts.scripts import main
main()
"""
"""The command `ray`, but for what it does with loopback as a node's address: it would take another of the machine's."""

_REGION = "us-east-1"
_BUCKET = "era"


class ServerProcess:
    """A server that is a child of this process and ends with it, and the log of what it says."""

    def __init__(self, name: str, log: Path) -> None:
        """`name` is what people know it by."""
        self._name = name
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that all others of the server are below; 0 where there is none."""
        return 0 if self._process is None else self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def start(
        self,
        command: Sequence[str],
        answers: Callable[[], bool],
        *,
        dies_by: str = "KILL",
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start it, and wait until it answers. Raises NotReady.

        Args:
            command: May begin with options of setpriv, which say whose process it is.
            answers: Whether it answers by now.
            dies_by: The signal that it gets when this process ends, however that ends.
            prefix: Put before the command, as `nsenter …` is.
            env: Its environment.
            pass_fds: Descriptors that it keeps.
        """
        begin = self._log.stat().st_size if self._log.exists() else 0
        with open(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self._process = subprocess.Popen(
                [*prefix, "setpriv", "--pdeathsig", dies_by, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=env,
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C is for us, who stop it
            )
        until = time.monotonic() + _START_SECONDS
        while not answers():
            if self.has_ended or time.monotonic() > until:
                self._process.kill()  # `has_ended` from here on, so it is started again where it is watched
                self._process.wait()
                said = self._log.read_bytes()[begin:].decode(errors="replace")
                raise NotReady(f"{self._name} doesn't start ({self._log}): {last_line(said)}")
            time.sleep(_LOOK_SECONDS)

    def stop(self, number: int) -> None:
        """End it by this signal; kill it if it takes longer than it may."""
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


def postgresql_commands() -> Path | None:
    """Return the directory of the newest server's commands: Debian doesn't put them on PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parent.parent.name))
    on_path = shutil.which("initdb")
    initdb = found[-1] if found else on_path and Path(on_path).resolve()
    return initdb.parent if initdb else None


def postgresql_user() -> pwd.struct_passwd:
    """Return who runs the server if this is root: PostgreSQL refuses to be. Raises NotReady."""
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        raise NotReady("PostgreSQL doesn't run as root, and this machine has no user postgres.") from None


def _as_postgresql_user() -> list[str]:
    """Return the options of setpriv by which the server is an ordinary user's; none where this process is one's."""
    if os.geteuid() != 0:
        return []
    user = postgresql_user()
    return ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]


class PostgreSQLServer:
    """A server and its data. Its user needn't be able to enter the directories above them: it gets them opened."""

    def __init__(self, directory: Path) -> None:
        """`directory` has its data and its log."""
        self.process = ServerProcess("PostgreSQL", directory / "log")
        self._data = directory / "data"

    def initialise(self, *options: str, password: str = "") -> None:
        """Make its data, with these options of initdb, unless there are some. Raises NotReady."""
        if self._data.exists():
            return
        draft = self._data.with_name(f"{self._data.name}.new")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(draft, postgresql_user().pw_uid, postgresql_user().pw_gid)
        opened = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
        secret = os.memfd_create("password", os.MFD_CLOEXEC)
        try:
            os.write(secret, password.encode())
            command = [f"{postgresql_commands()}/initdb", "-D", f"/proc/self/fd/{opened}", "-E", "UTF8", *options]
            if password:
                command.append(f"--pwfile=/proc/self/fd/{secret}")
            done = subprocess.run(
                ["setpriv", "--pdeathsig", "KILL", *_as_postgresql_user(), *command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd="/",
                pass_fds=(opened, secret),
                check=False,
            )
        finally:
            os.close(opened)
            os.close(secret)
        if done.returncode:
            raise NotReady(f"PostgreSQL's data can't be made: {' '.join(done.stderr.split())}")
        draft.rename(self._data)

    def start(self, options: Mapping[str, str], url: str, prefix: Sequence[str] = ()) -> None:
        """Start it, and wait until it answers at this URL. `prefix` is put before its command. Raises NotReady."""

        def answers() -> bool:
            with suppress(psycopg.OperationalError):
                psycopg.connect(url).close()
                return True
            return False

        opened = os.open(self._data, os.O_RDONLY | os.O_DIRECTORY)
        command = [f"{postgresql_commands()}/postgres", "-D", f"/proc/self/fd/{opened}"]
        command += [f"-c{name}={value}" for name, value in options.items()]
        try:
            self.process.start(
                [*_as_postgresql_user(), *command], answers, dies_by="QUIT", prefix=prefix, pass_fds=(opened,)
            )
        finally:
            os.close(opened)


class PostgreSQL:
    """The database of a cluster for trying: at a port, by a password, durable."""

    name = "postgresql"
    keeps_hosts = False

    def __init__(self, directory: Path, hosts: int) -> None:
        """`directory` has its data, its log and its password."""
        self._directory = directory
        self._server = PostgreSQLServer(directory)
        self._options = {
            "listen_addresses": LOOPBACK,
            "unix_socket_directories": "",
            "max_connections": str(40 + 25 * hosts),
            "max_pred_locks_per_transaction": "512",
        }

    @property
    def has_ended(self) -> bool:
        return self._server.process.has_ended

    def start(self, environment: dict[str, str]) -> str:
        """See Engine."""
        keys = _kept(self._directory, lambda: {"password": secrets.token_urlsafe(24)})
        url = f"postgresql://era:{keys['password']}@{LOOPBACK}:{keys['port']}/"
        self._server.initialise("-U", "era", "-A", "scram-sha-256", "--locale=C", password=keys["password"])
        self._server.start({**self._options, "port": keys["port"]}, f"{url}postgres")
        try:
            with closing(psycopg.connect(f"{url}postgres", autocommit=True)) as connection:
                if connection.execute("SELECT 1 FROM pg_database WHERE datname = 'era'").fetchone() is None:
                    connection.execute("CREATE DATABASE era TEMPLATE template0")
        except psycopg.Error as error:
            raise NotReady(f"PostgreSQL has no database for ERA: {' '.join(str(error).split())}") from error
        environment["ERA_DATABASE_URL"] = f"{url}era"
        return f"{LOOPBACK}:{keys['port']}"

    def stop(self) -> None:
        self._server.process.stop(signal.SIGINT)


# -- S3 ----------------------------------------------------------------------------------------------------------------


def has_s3() -> bool:
    return shutil.which("radosgw") is not None and shutil.which("radosgw-admin") is not None


class S3Server:
    """Ceph's radosgw, which can run alone on a database file, and its data, with one user."""

    def __init__(self, directory: Path) -> None:
        """`directory` has its data and its log."""
        self.process = ServerProcess("radosgw", directory / "log")
        self._log = directory / "log"
        self._data = directory / "data"

    def initialise(self, *options: str) -> dict[str, str]:
        """Make its data anew, and a user, with these options of radosgw-admin. Returns the user's `access_key` and
        `secret_key`, which radosgw-admin makes: all users of the machine see a command's arguments. Raises NotReady."""
        shutil.rmtree(self._data, ignore_errors=True)
        self._data.mkdir(mode=0o700)
        command = ["setpriv", "--pdeathsig", "KILL", "radosgw-admin", *self._options(), "user", "create", "--uid=era"]
        command += ["--display-name=era", *options]
        with (
            self._log.open("ab") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as admin,
        ):
            killing = threading.Timer(_START_SECONDS, admin.kill)
            killing.start()
            # It prints the user as JSON. When all is stored and said, it now and then hangs, so its end isn't awaited.
            printed = ""
            for line in admin.stdout or ():
                printed += line
                if line == "}\n":
                    break
            killing.cancel()
            admin.kill()
        if not printed.endswith("\n}\n"):
            raise NotReady(f"radosgw-admin can't make a user: {last_line(self._log.read_text(errors='replace'))}")
        (key,) = json.loads(printed)["keys"]
        return {name: key[name] for name in ("access_key", "secret_key")}

    def start(self, address: str, port: int, prefix: Sequence[str] = ()) -> None:
        """Start it, and wait until it answers. `prefix` is put before its command. Raises NotReady."""
        command = ["radosgw", "-f", *self._options()]
        command.append(f"--rgw-frontends=beast endpoint={address}:{port} tcp_nodelay=1")
        self.process.start(command, lambda: _listens(address, port), prefix=prefix)

    def _options(self) -> list[str]:
        return [
            "--no-mon-config",
            "--conf=/dev/null",
            "--rgw-backend-store=dbstore",
            "--rgw-config-store=dbstore",
            f"--dbstore-config-uri=file:{self._data}/config.db",
            f"--dbstore-db-dir={self._data}",
            f"--rgw-data={self._data}",
            f"--run-dir={self._data}",
            f"--log-file={self._data}/log",
        ]


def s3_bucket(name: str, prefix: str | None, endpoint: str, access_key: str, secret_key: str) -> S3Store:
    """Return a bucket of such a server."""
    return S3Store(
        name,
        prefix=prefix,
        endpoint=endpoint,
        region=_REGION,
        access_key_id=access_key,
        secret_access_key=secret_key,
        client_options={"allow_http": True},
    )


def make_bucket(bucket: S3Store) -> None:
    # A put of the name "" makes the bucket. The answer has no ETag, which the library then misses.
    with suppress(BaseError):
        obstore.put(bucket, "", b"", use_multipart=False)


def blobs_url(bucket: str, prefix: str, endpoint: str) -> str:
    """Return a bucket as ERA_BLOBS names it."""
    return f"s3://{bucket}/{prefix}?endpoint={endpoint}&region={_REGION}"


class S3:
    """Where a cluster for trying has the content of files: at a port, by keys."""

    name = "s3"
    keeps_hosts = False

    def __init__(self, directory: Path) -> None:
        """`directory` has its data, its log and its keys."""
        self._directory = directory
        self._server = S3Server(directory)

    @property
    def has_ended(self) -> bool:
        return self._server.process.has_ended

    def start(self, environment: dict[str, str]) -> str:
        """See Engine."""
        keys = _kept(self._directory, self._server.initialise)
        port, names = keys["port"], (keys["access_key"], keys["secret_key"])
        self._server.start(LOOPBACK, port)
        endpoint = f"http://{LOOPBACK}:{port}"
        make_bucket(s3_bucket(_BUCKET, None, endpoint, *names))
        environment["ERA_BLOBS"] = blobs_url(_BUCKET, "blobs", endpoint)
        environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"] = names
        return f"{LOOPBACK}:{port}"

    def stop(self) -> None:
        self._server.process.stop(signal.SIGTERM)


# -- Ray ---------------------------------------------------------------------------------------------------------------


class RayNodes:
    """The nodes, of which the first is the head. They ask for a token."""

    name = "ray"
    keeps_hosts = True

    def __init__(self, directory: Path, hosts: Sequence[Mapping[str, str]]) -> None:
        """`directory` has the token, logs, and what Ray writes. `hosts` are the settings that each node's host has of
        its own."""
        self._directory = directory
        self._hosts = hosts
        self._nodes: list[ServerProcess] = []
        self._written: Path | None = None
        self.address = ""
        """Where the head is."""

    @property
    def has_ended(self) -> bool:
        return any(node.has_ended for node in self._nodes)

    def start(self, environment: dict[str, str]) -> str:
        """Start all nodes anew. See Engine."""
        self.stop()
        self._directory.mkdir(mode=0o700, exist_ok=True)
        keep(self._directory / "token", secrets.token_hex(32))
        token = {"RAY_AUTH_TOKEN_PATH": str(self._directory / "token"), "RAY_AUTH_MODE": "token"}
        environment |= token
        # The driver tells hosts what all of them share.
        base = {name: value for name, value in environment.items() if not name.startswith(("ERA_", "AWS_", "RAY_"))}
        self._written = self._directory / "temp"
        if len(bytes(self._written)) > _RAY_LONGEST:
            self._written = Path(tempfile.mkdtemp(prefix="era-ray-"))
        port = free_port()
        self.address = f"{LOOPBACK}:{port}"
        head = ["--head", f"--port={port}", "--include-dashboard=false", "--disable-usage-stats"]
        head.append(f"--temp-dir={self._written}")
        for number, own in enumerate(self._hosts, 1):
            command = [sys.executable, "-c", _RAY_NODE, "start", "--block", "--num-cpus=0"]
            command += [f"--node-ip-address={LOOPBACK}", "--object-store-memory=80000000"]
            command += head if number == 1 else [f"--address={self.address}"]
            self._start(number, command, {**base, **token, **own})
        return self.address

    def _start(self, number: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a node, with several tries: Ray's own patience is a few seconds for some steps, and a busy machine, or
        one that reads Ray from its disk for the first time, takes longer."""
        log = self._directory / f"node-{number}.log"
        log.unlink(missing_ok=True)
        node = ServerProcess("Ray", log)
        self._nodes.append(node)
        for left in reversed(range(_RAY_TRIES)):
            try:
                node.start(command, lambda: b"Ray runtime started" in log.read_bytes(), dies_by="TERM", env=environment)
                return
            except NotReady:
                if not left:
                    raise

    def stop(self) -> None:
        for node in reversed(self._nodes):
            node.stop(signal.SIGTERM)
        self._nodes.clear()
        if self._written is not None:
            shutil.rmtree(self._written, ignore_errors=True)
            self._written = None


class RayDriver:
    """`era serve --cluster`, which ends once it has stopped the hosts."""

    name = "driver"
    keeps_hosts = True

    def __init__(self, directory: Path, nodes: RayNodes) -> None:
        self._nodes = nodes
        self._process = ServerProcess("The driver", directory / "driver.log")
        self._address = ""

    @property
    def has_ended(self) -> bool:
        """Also if it is that of nodes which have been started anew."""
        return self._process.has_ended or self._address != self._nodes.address

    def start(self, environment: dict[str, str]) -> str:
        """Start it; when hosts are ready their notes say. See Engine."""
        self._process.stop(signal.SIGKILL)  # so that hosts go on, if there are any
        self._address = self._nodes.address
        self._process.start([*SERVE, "--cluster", self._address], lambda: True, dies_by="TERM", env=environment)
        return f"keeps a host on each node of {self._address}"

    def stop(self) -> None:
        self._process.stop(signal.SIGTERM)


# -- all of them -------------------------------------------------------------------------------------------------------


def is_there(name: str) -> bool:
    """Return whether what an engine needs is installed."""
    if name == "ray":
        return find_spec("ray") is not None
    return has_s3() if name == "s3" else postgresql_commands() is not None


def check(directory: Path, wanted: Set[str], variables: Mapping[str, str]) -> None:
    """Raise NotReady where a cluster in this directory can't have the wanted engines, or had others."""
    if missing := [f"--{name}: {needed}" for name, needed in NEEDED.items() if name in wanted and not is_there(name)]:
        raise NotReady(f"What these options start isn't installed here. To install it: {'; '.join(missing)}")
    for name, variable in (("postgresql", "ERA_DATABASE_URL"), ("s3", "ERA_BLOBS")):
        if name in wanted and variables.get(variable):
            raise NotReady(f"--{name} starts one of its own, and {variable} names another: leave one of them out.")
        has_it = (directory / name / "keys.json").exists()
        if has_it and name not in wanted:
            raise NotReady(f"The cluster in {directory} was started with --{name}: say that again.")
        if name in wanted and not has_it and (directory / "shared").exists():
            raise NotReady(f"The cluster in {directory} was started without --{name}: name another --dir.")
    if "ray" in wanted and "postgresql" not in wanted and not variables.get("ERA_DATABASE_URL"):
        raise NotReady("--ray needs --postgresql, or ERA_DATABASE_URL.")


def engines(directory: Path, wanted: Set[str], hosts: Sequence[Mapping[str, str]]) -> list[Engine]:
    """Return the wanted engines in the order in which they start. `hosts` are the settings that each host has of its
    own."""
    found: list[Engine] = []
    if "postgresql" in wanted:
        found.append(PostgreSQL(directory / "postgresql", len(hosts)))
    if "s3" in wanted:
        found.append(S3(directory / "s3"))
    if "ray" in wanted:
        nodes = RayNodes(directory / "ray", hosts)
        found += [nodes, RayDriver(directory / "ray", nodes)]
    return found


def keep(file: Path, content: str) -> None:
    """Write a file that nobody else may read, durably, and as a whole or not at all."""
    draft = file.with_name(f"{file.name}.new")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    draft.replace(file)
    parent = os.open(file.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _kept(directory: Path, make: Callable[[], dict[str, str]]) -> dict[str, Any]:
    """Return a server's port and what `make` makes besides, which are kept from the first start on.

    Raises NotReady where that is damaged, or somebody listens at the port: it could be anybody, who would be told
    passwords.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    file = directory / "keys.json"
    if not file.exists():
        keep(file, json.dumps({"port": free_port(), **make()}))
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except ValueError:
        raise NotReady(f"{file} is damaged. Restore it: the data beside it is of no use without.") from None
    if _listens(LOOPBACK, found["port"]):
        raise NotReady(f"Port {found['port']} of {LOOPBACK}, which {directory} has, is taken.")
    return found


def _listens(address: str, port: int) -> bool:
    """Return whether somebody takes connections there."""
    with suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


def free_port() -> int:
    """Return a free port below the range from which the kernel assigns ports, so that nobody else is likely to get it
    before it is used."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server((LOOPBACK, port)):
            return port
