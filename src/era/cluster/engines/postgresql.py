"""A PostgreSQL server on this machine: found, initialised, started, stopped."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import psycopg

from era.cluster.engines.process import LOOPBACK, ServerProcess, check_port, free_port, kept
from era.errors import NotReady

MISSING = "there is no PostgreSQL here: apt-get install postgresql"
START_SECONDS = 120.0


def commands() -> Path | None:
    """The directory of the newest server's commands: Debian doesn't put them on PATH."""
    on_path = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parent.parent.name))
    if found:
        return found[-1].parent
    return None if on_path is None else Path(on_path).resolve().parent


def ordinary_user() -> pwd.struct_passwd:
    """Who runs the server if this is root: PostgreSQL refuses to be. Raises NotReady."""
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise NotReady("PostgreSQL doesn't run as root, and this machine has neither a user postgres nor nobody.")


def _as_ordinary_user() -> list[str]:
    """Options of setpriv by which the server is an ordinary user's; none where this process is one's."""
    if os.geteuid() != 0:
        return []
    user = ordinary_user()
    return ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]


class Server:
    """A server and its data. Its user needn't be able to enter the directories above them: it gets them opened."""

    def __init__(self, commands: Path, data: Path, log: Path) -> None:
        self._commands = commands
        self._data = data
        self._process = ServerProcess("PostgreSQL", log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.has_ended

    def initialise(self, *options: str, password: str = "") -> None:
        """Make its data, with these options of initdb. Raises NotReady."""
        draft = self._data.with_name(f"{self._data.name}.new")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(draft, ordinary_user().pw_uid, ordinary_user().pw_gid)
        opened = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
        secret = os.memfd_create("password", os.MFD_CLOEXEC)
        try:
            os.write(secret, password.encode())
            command = [str(self._commands / "initdb"), "-D", f"/proc/self/fd/{opened}", "-E", "UTF8", *options]
            if password:
                command.append(f"--pwfile=/proc/self/fd/{secret}")
            done = subprocess.run(
                ["setpriv", "--pdeathsig", "KILL", *_as_ordinary_user(), *command],
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

    def start(self, options: Mapping[str, str], answers: Callable[[], bool], prefix: Sequence[str] = ()) -> None:
        """Start it, and wait until it answers. See ServerProcess."""
        opened = os.open(self._data, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._process.start(
                [str(self._commands / "postgres"), "-D", f"/proc/self/fd/{opened}"]
                + [f"-c{name}={value}" for name, value in options.items()],
                answers,
                START_SECONDS,
                dies_by="QUIT",
                prefix=prefix,
                user=_as_ordinary_user(),
                pass_fds=(opened,),
            )
        finally:
            os.close(opened)

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it: SIGINT cuts connections off, SIGQUIT crashes it."""
        self._process.stop(number, START_SECONDS)


class PostgreSQL:
    """The database of a cluster for trying: at a port of loopback, by a password, durable."""

    name = "postgresql"
    keeps_hosts = False

    def __init__(self, directory: Path, hosts: int) -> None:
        """`directory` has its data, its log and its password. Raises NotReady."""
        found = commands()
        if found is None:
            raise NotReady(MISSING)
        self._directory = directory
        self._server = Server(found, directory / "data", directory / "log")
        self._options = {
            "listen_addresses": LOOPBACK,
            "unix_socket_directories": "",
            "max_connections": str(40 + 25 * hosts),
            "max_pred_locks_per_transaction": "512",
        }

    @property
    def has_ended(self) -> bool:
        return self._server.has_ended

    def start(self) -> str:
        """Start it, and return where it is, for people. Raises NotReady, OSError."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        keys = kept(self._directory / "keys.json", lambda: {"port": free_port(), "password": secrets.token_urlsafe(24)})
        check_port(keys["port"], self._directory, "PostgreSQL")
        self._url = f"postgresql://era:{keys['password']}@{LOOPBACK}:{keys['port']}/"
        if not (self._directory / "data").exists():
            options = ("-U", "era", "-A", "scram-sha-256", "--locale=C")
            self._server.initialise(*options, password=keys["password"])
        self._server.start({**self._options, "port": keys["port"]}, self._answers)
        try:
            with closing(psycopg.connect(f"{self._url}postgres", autocommit=True)) as connection:
                if connection.execute("SELECT 1 FROM pg_database WHERE datname = 'era'").fetchone() is None:
                    connection.execute("CREATE DATABASE era TEMPLATE template0")
        except psycopg.Error as error:
            raise NotReady(f"PostgreSQL has no database for ERA: {' '.join(str(error).split())}") from error
        return f"{LOOPBACK}:{keys['port']}"

    def _answers(self) -> bool:
        try:
            psycopg.connect(f"{self._url}postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def settings(self) -> dict[str, str]:
        """Those of hosts that use it, once it is started."""
        return {"ERA_DATABASE_URL": f"{self._url}era"}

    def stop(self) -> None:
        self._server.stop()
