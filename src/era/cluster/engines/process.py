"""A server that is a child of this process: started and waited for, stopped, and ended with this process."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from era.cluster.host_process import last_line
from era.errors import NotReady

LOOPBACK = "127.0.0.1"
_LOOK_SECONDS = 0.02


class ServerProcess:
    """The process, and the log of what it says. The next one may be started after its end."""

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
        seconds: float,
        *,
        dies_by: str = "KILL",
        prefix: Sequence[str] = (),
        user: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start it, and wait until it answers.

        It gets the signal `dies_by` when this process ends, however that ends. `prefix` is put before the command, as
        `nsenter …` is, and `user` are options of setpriv that say whose process it is. Raises NotReady where it doesn't
        start.
        """
        begin = self._log.stat().st_size if self._log.exists() else 0
        parented = [*prefix, "setpriv", "--pdeathsig", dies_by, *user, *command]
        with open(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self._process = subprocess.Popen(
                parented,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=env,
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C is for us, who stop it
            )
        until = time.monotonic() + seconds
        while not answers():
            if self.has_ended or time.monotonic() > until:
                self._process.kill()  # `has_ended` from here on, so it is started again where it is watched
                self._process.wait()
                raise NotReady(f"{self._name} doesn't start ({self._log}): {last_line(self._said(begin))}")
            time.sleep(_LOOK_SECONDS)

    def _said(self, begin: int) -> str:
        """What is in its log from there on."""
        with self._log.open("rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace")

    def stop(self, number: int, seconds: float = 60.0) -> None:
        """End it by this signal; kill it if it takes longer."""
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def listens(address: str, port: int) -> bool:
    """Whether somebody takes connections there."""
    with suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


def check_port(port: int, directory: Path, what: str) -> None:
    """Raises NotReady where somebody listens at the port of a server that is to be started. It could be anybody, who
    would be told passwords."""
    if listens(LOOPBACK, port):
        raise NotReady(f"Port {port} of {LOOPBACK}, which {directory} has for {what}, is taken.")


def free_port() -> int:
    """A port that nobody has now, below those that the system gives to whoever leaves the choice to it: so nobody is
    likely to get it before it is used."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server((LOOPBACK, port)):
            return port


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


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in such a file, made at the first start. Raises NotReady."""
    if not file.exists():
        keep(file, json.dumps(make()))
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except ValueError:
        raise NotReady(f"{file} is damaged. Restore it: the data beside it is of no use without.") from None
    return found
