"""The service as failpoint tests want it, forked from a process that has imported all of it, so that it starts fast.

It is the real one, with three differences. Each pool of threads has one, which carries its name where tracers see it,
so that the nth call of a thread is the same in every attempt. Garbage is collected when SIGUSR1 says so, and then
without a grace period. And with a weakness, it breaks one of the rules that the tests are to watch over.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Any, cast

from sqlalchemy import Connection

from era import app
from era.core.capsules.pins import Pins
from era.core.files.snapshots import Snapshots
from era.core.garbage import collect_once
from era.core.models import Session
from era.settings import Settings
from era.store import sessions
from era.store.blobs import Batch, LocalBlobs
from era.store.metadata import SqlStore
from tests.conftest import Server

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


class _Fork:
    """As much of a Popen as servers need."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the service doesn't end"
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


@dataclass
class ForkedServer(Server):
    """A server as above."""

    weakness: str | None = None

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        process = _forks.Process(target=_serve, args=(environment, log.name, self.weakness))
        process.start()
        return cast("subprocess.Popen[bytes]", _Fork(process))


def _serve(environment: dict[str, str], log: str, weakness: str | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    _give_threads_names()
    app.collect_garbage = _collect_when_told  # type: ignore[assignment]
    app.Snapshots = partial(Snapshots, grace_seconds=0.0)  # type: ignore[misc,assignment]
    if weakness is not None:
        WEAKNESSES[weakness]()
    app.run_service(Settings(), lambda line: print(line, flush=True))


def _give_threads_names() -> None:
    run, make = threading.Thread.run, ThreadPoolExecutor.__init__

    def named_run(self: threading.Thread) -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(self.name[:15])
        run(self)

    def make_one(self: ThreadPoolExecutor, max_workers: int | None = None, *rest: Any, **options: Any) -> None:
        make(self, 1, *rest, **options)

    threading.Thread.run = named_run  # type: ignore[method-assign]
    ThreadPoolExecutor.__init__ = make_one  # type: ignore[method-assign,assignment]


async def _collect_when_told(snapshots: Snapshots, store: SqlStore, pins: Pins) -> None:
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, told.set)
    while True:
        await told.wait()
        told.clear()
        await collect_once(snapshots, store, pins)


def _rows_before_blobs() -> None:
    """Content gets its name and becomes durable a while after the row that names it."""
    waiting: set[str] = set()

    @contextmanager
    def batch(self: LocalBlobs) -> Iterator[Batch]:
        made = Batch(self)
        yield made
        waiting.update(made._new)
        threading.Timer(1.0, made._finish).start()

    get, open_blob = LocalBlobs.get, LocalBlobs.open_blob

    def patient(real: Callable[[LocalBlobs, str], Any], self: LocalBlobs, digest: str) -> Any:
        """As if it came from a cache of what is still to be written."""
        while digest in waiting and not os.path.exists(self._path(digest)):
            time.sleep(0.01)
        return real(self, digest)

    async def none(*_: object) -> dict[str, object]:
        return {}

    LocalBlobs.batch = batch  # type: ignore[assignment]
    Snapshots.artifacts = none  # type: ignore[method-assign]  # it would wait for them before the row is written
    LocalBlobs.get = lambda self, digest: patient(get, self, digest)  # type: ignore[method-assign]
    LocalBlobs.open_blob = lambda self, digest: patient(open_blob, self, digest)  # type: ignore[method-assign]


def _blobs_in_place() -> None:
    """Content is written under its name at once, instead of getting the name when it is complete."""

    def put(self: Batch, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        path = self._store._path(digest)
        if not os.path.exists(path):
            with open(path, "wb", buffering=0) as file:
                file.write(content[: len(content) // 2])
                file.write(content[len(content) // 2 :])
                os.fsync(file.fileno())
        return digest

    Batch.put = put  # type: ignore[method-assign]


def _no_transactions() -> None:
    """Each statement is a commit of its own."""
    execute = Connection.exec_driver_sql

    def without_begin(self: Connection, statement: str, *rest: Any) -> Any:
        return None if statement == "BEGIN IMMEDIATE" else execute(self, statement, *rest)

    Connection.exec_driver_sql = without_begin  # type: ignore[method-assign,assignment]


def _no_reckoning() -> None:
    """Runs that were cut off are not looked for at the start."""

    async def mark_lost(_: SqlStore) -> int:
        return 0

    SqlStore.mark_lost = mark_lost  # type: ignore[method-assign]


def _imports_in_sight() -> None:
    """An imported session is there before it is complete."""

    def insert(self: sessions.SessionRows, connection: Connection, session: Session) -> int:
        fields = {name: getattr(session, name) for name in ("created_at", "updated_at", "version", "id")}
        return self._insert(connection, sessions._settings_of(session) | fields)

    def show(self: sessions.SessionRows, connection: Connection, key: int, _: Session, at: int) -> Session:
        return self._of_key(connection, key)

    sessions.SessionRows._insert_hidden = insert  # type: ignore[method-assign]
    sessions.SessionRows._show = show  # type: ignore[method-assign]


WEAKNESSES = {
    "rows before blobs": _rows_before_blobs,
    "blobs in place": _blobs_in_place,
    "no transactions": _no_transactions,
    "no reckoning": _no_reckoning,
    "imports in sight": _imports_in_sight,
}
