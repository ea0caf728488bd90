"""A service of our own on a free port, and the lightest client of it."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_START_SECONDS = 30.0
_POOL_SECONDS = 20.0
_KEEP_SECONDS = 1.0
_JSON = {"Content-Type": "application/json"}

type Answer = tuple[int, bytes]


class Arena:
    """What cases need: the service, over one connection that stays open, and a directory beside its data."""

    def __init__(self, port: int, pid: int, place: Path, *, small: bool) -> None:
        self.scratch = place / "scratch"
        self.data_dir = place / "data"
        self.port = port
        self._pid = pid
        self.small = small
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._used_at = 0.0
        self.closers = contextlib.ExitStack()
        """What cases have opened: closed with the arena."""

    # -- measured: nothing but the request and its answer -----------------------------------------------------------

    def get(self, path: str) -> Answer:
        return self._call("GET", path, None)

    def run(self, session: str, code: str) -> Answer:
        return self._call("POST", f"/api/sessions/{session}/run", json.dumps({"code": code}).encode())

    def create(self, language: str) -> Answer:
        return self._call("POST", "/api/sessions", json.dumps({"language": language}).encode())

    def post(self, path: str, body: object) -> Answer:
        return self._call("POST", path, json.dumps(body).encode())

    def put(self, path: str, body: object) -> Answer:
        return self._call("PUT", path, json.dumps(body).encode())

    def delete(self, path: str) -> Answer:
        return self._call("DELETE", path, None)

    def _call(self, method: str, path: str, body: bytes | None) -> Answer:
        self._connection.request(method, path, body, _JSON)
        response = self._connection.getresponse()
        self._used_at = time.monotonic()
        return response.status, response.read()

    # -- beside the measurement -------------------------------------------------------------------------------------

    def keep_open(self) -> None:
        """Servers close connections that nobody uses, so use a connection before a measurement on it."""
        if time.monotonic() - self._used_at > _KEEP_SECONDS:
            self._connection.close()  # it may have been closed at the other end
            self.get("/nothing")

    def size(self, count: int) -> int:
        """As many of something as a case wants, or a hundredth where it is to be quick."""
        return count // 100 if self.small else count

    def memory(self) -> int:
        """Resident bytes of the service itself."""
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]  # it is always there

    def new_session(self, language: str) -> str:
        return self.check_created(self.create(language))

    def store_code(self, session: str, code: str) -> None:
        _expect(self._call("PUT", f"/api/sessions/{session}/code", json.dumps({"code": code}).encode()), 200)

    def delete_session(self, session: str) -> None:
        _expect(self._call("DELETE", f"/api/sessions/{session}", None), 200)

    def health(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(_expect(self.get("/health"), 200))
        return told

    def wait_for_pool(self) -> None:
        """Until a sandbox of every language is ready for a first run."""
        self.keep_open()
        deadline = time.monotonic() + _POOL_SECONDS
        while (told := self.health())["sandboxes"]["ready"] < len(told["languages"]):
            if time.monotonic() > deadline:
                raise RuntimeError("The service's pool does not fill.")
            time.sleep(0.005)

    def check_created(self, answer: Answer) -> str:
        return str(json.loads(_expect(answer, 201))["id"])

    def check_run(self, answer: Answer) -> None:
        told = json.loads(_expect(answer, 200))
        if told["status"] != "ok" or told["stdout"] != "1\n" or not told["state"]["committed"]:
            raise RuntimeError(f"A run went wrong: {told}")

    def check_status(self, status: int) -> Callable[[Answer], object]:
        return lambda answer: _expect(answer, status)

    def close(self) -> None:
        self.closers.close()
        self._connection.close()


def _expect(answer: Answer, status: int) -> bytes:
    if answer[0] != status:
        raise RuntimeError(f"The service answered {answer[0]}, not {status}: {answer[1][:500]!r}")
    return answer[1]


@contextlib.contextmanager
def arena(directory: Path, *, small: bool) -> Iterator[Arena]:
    """A service with its data in a new directory below `directory`; all of it is gone afterwards."""
    place = Path(tempfile.mkdtemp(prefix="era-bench-", dir=directory))
    try:
        (place / "scratch").mkdir()
        with _service(place) as (port, pid), contextlib.closing(Arena(port, pid, place, small=small)) as made:
            yield made
    finally:
        shutil.rmtree(place, ignore_errors=True)


def service_environment(data_dir: Path) -> dict[str, str]:
    """What a service of the benchmark's own is started with."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
    environment |= {"ERA_PORT": "0", "ERA_DATA_DIR": str(data_dir)}
    return environment | {"ERA_ISOLATION": "bubblewrap"}  # what `auto` is depends on what is installed


@contextlib.contextmanager
def _service(place: Path) -> Iterator[tuple[int, int]]:
    log_path = place / "log"
    environment = service_environment(place / "data")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "era", "serve"], stdout=log, stderr=log, env=environment
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not (found := re.search(r"ERA serves\s+http://\S+:(\d+)", log_path.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The service did not start:\n{log_path.read_text()}")
            time.sleep(0.02)
        yield int(found[1]), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
