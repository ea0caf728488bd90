"""The service that is measured, on a free port, with a client that adds as little as it can."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

DISK = next(filter(Path.is_dir, (Path("/var/tmp"), Path(tempfile.gettempdir()))))
"""Where the service's data lies: /tmp is memory on many machines, where a durable commit costs nothing."""

_START_SECONDS = 120.0
_POOL_SECONDS = 120.0
_KEEP_SECONDS = 1.0
ISOLATION = os.environ.get("BENCH_ISOLATION", "bubblewrap")
"""Of all sessions; `auto` would depend on what is installed."""

ERA = Path(sys.executable).parent / "era"
"""The command of the working tree."""

_JSON = {"Content-Type": "application/json"}

type Answer = tuple[int, bytes]


class Arena:
    """What cases work with: the service, over one connection that stays open, and a directory for their own files.

    `port` and `pid` are the service's, `directory` holds its data and `scratch`, the directory for cases on the same
    disk. `small` asks for a hundredth of the usual sizes. `connection` is one to the service, where it takes more than
    the port to connect.
    """

    def __init__(
        self,
        port: int,
        pid: int,
        directory: Path,
        *,
        small: bool,
        connection: http.client.HTTPConnection | None = None,
    ) -> None:
        self.scratch = directory / "scratch"
        self.data_dir = directory / "data"
        self.port = port
        self.pid = pid
        self.small = small
        self._connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._used_at = 0.0
        self.closers = contextlib.ExitStack()
        """Closes what cases have opened, when the arena is closed."""

    # -- measured: only the request and its answer ------------------------------------------------------------------

    def get(self, path: str) -> Answer:
        return self._call("GET", path, None)

    def run(self, session: str, code: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self._call("POST", f"/api/sessions/{session}/run", json.dumps({"code": code}).encode(), headers)

    def create(self, language: str) -> Answer:
        return self._call("POST", "/api/sessions", json.dumps({"language": language}).encode())

    def post(self, path: str, body: object) -> Answer:
        return self._call("POST", path, json.dumps(body).encode())

    def put(self, path: str, body: object) -> Answer:
        return self._call("PUT", path, json.dumps(body).encode())

    def delete(self, path: str) -> Answer:
        return self._call("DELETE", path, None)

    def _call(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None = None) -> Answer:
        self._connection.request(method, path, body, {**_JSON, **(headers or {})})
        response = self._connection.getresponse()
        self._used_at = time.monotonic()
        return response.status, response.read()

    # -- not measured -----------------------------------------------------------------------------------------------

    def keep_open(self) -> None:
        """Make sure that the connection is open. The server closes one that has been idle for a while."""
        if time.monotonic() - self._used_at > _KEEP_SECONDS:
            self._connection.close()  # the server may have closed it
            self.get("/nothing")

    def hang_up(self) -> None:
        """Close the connection, so that the next call makes another one."""
        self._connection.close()

    def size(self, count: int) -> int:
        """`count`, or a hundredth of it in a small arena."""
        return count // 100 if self.small else count

    def memory(self) -> int:
        """Resident bytes of the service's own process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]  # it is always there

    def new_session(self, language: str) -> str:
        return self.check_created(self.create(language))

    def store_code(self, session: str, code: str) -> None:
        _expect(self._call("PUT", f"/api/sessions/{session}/code", json.dumps({"code": code}).encode()), 200)

    def delete_session(self, session: str) -> None:
        _expect(self._call("DELETE", f"/api/sessions/{session}", None), 200)

    def health(self) -> dict[str, Any]:
        health: dict[str, Any] = json.loads(_expect(self.get("/health"), 200))
        return health

    def wait_for_pool(self) -> None:
        """Wait until a sandbox of every language is ready for a first run. Raises RuntimeError after two minutes."""
        self.keep_open()
        deadline = time.monotonic() + _POOL_SECONDS
        while (health := self.health())["sandboxes"]["ready"] < len(health["languages"]):
            if time.monotonic() > deadline:
                raise RuntimeError("The service's pool does not fill.")
            time.sleep(0.005)

    def check_created(self, answer: Answer) -> str:
        """Return the id of the session that was created. Raises RuntimeError if none was."""
        return str(json.loads(_expect(answer, 201))["id"])

    def check_run(self, answer: Answer) -> None:
        """Raise RuntimeError unless the run printed `1`, ended well and was committed."""
        run = json.loads(_expect(answer, 200))
        if run["status"] != "ok" or run["stdout"] != "1\n" or not run["state"]["committed"]:
            raise RuntimeError(f"A run went wrong: {run}")

    def check_status(self, status: int) -> Callable[[Answer], object]:
        """A check that raises RuntimeError for an answer with another status."""
        return lambda answer: _expect(answer, status)

    def close(self) -> None:
        self.closers.close()
        self._connection.close()


def _expect(answer: Answer, status: int) -> bytes:
    if answer[0] != status:
        raise RuntimeError(f"The service answered {answer[0]}, not {status}: {answer[1][:500]!r}")
    return answer[1]


@contextlib.contextmanager
def arena(directory: Path, *, small: bool, era: Path = ERA) -> Iterator[Arena]:
    """A service with its data in a new directory below `directory`, which is removed afterwards. `era` is its
    command."""
    own = Path(tempfile.mkdtemp(prefix="era-bench-", dir=directory))
    try:
        (own / "scratch").mkdir()
        with service(own, era=era) as (port, pid), contextlib.closing(Arena(port, pid, own, small=small)) as made:
            yield made
    finally:
        shutil.rmtree(own, ignore_errors=True)


def service_environment(data_dir: Path) -> dict[str, str]:
    """Environment variables for a service that is measured."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
    environment |= {"ERA_PORT": "0", "ERA_DATA_DIR": str(data_dir)}
    return environment | {"ERA_ISOLATION": ISOLATION}


def wait_for_port(process: subprocess.Popen[bytes], log: Path) -> int:
    """Wait until `era serve`, which writes to `log`, serves. Return its port. Raises RuntimeError after two
    minutes."""
    deadline = time.monotonic() + _START_SECONDS
    while not (serves := re.search(r"ERA serves\s+http://\S+:(\d+)", log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"The service did not start:\n{log.read_text()}")
        time.sleep(0.02)
    return int(serves[1])


@contextlib.contextmanager
def service(
    directory: Path, *, era: Path = ERA, settings: Mapping[str, str] | None = None
) -> Iterator[tuple[int, int]]:
    """`era serve` with its data in `directory`: its port and its process id. `era` is the command.
    `settings` are those that differ from the defaults: `{"max_warm": "2"}` sets ERA_MAX_WARM."""
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [era, "serve"],
            stdout=output,
            stderr=output,
            env=service_environment(directory / "data")
            | {f"ERA_{name.upper()}": value for name, value in (settings or {}).items()},
        )
    try:
        yield wait_for_port(process, log), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@cache
def with_settings(arena: Arena, name: str, **settings: str) -> Arena:
    """The arena of a service of its own with these settings, which ends with the other one."""
    directory = arena.scratch / name
    directory.mkdir()
    port, pid = arena.closers.enter_context(service(directory, settings=settings))
    made = Arena(port, pid, directory, small=arena.small)
    arena.closers.callback(made.close)
    return made
