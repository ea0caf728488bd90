"""The service that the failpoint tests kill, forked from a process that has imported all of it so that it starts fast.

It is the real service with four differences. Each thread pool has a single thread whose name tracers can see, so that
the nth call of a thread is the same in every attempt. Garbage is collected on SIGUSR1, without a grace period. From
SIGUSR2 on, the iterations of its event loop are timed. And a weakness breaks one of the rules that the tests watch
over, to prove that they would notice.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Any, cast

from sqlalchemy import Connection

from era import app, parts
from era.api.protocol import exchange
from era.api.protocol.protocol import Protocol
from era.api.routing import event_stream, streaming
from era.api.routing.event_stream import Event
from era.core.concurrency import meter
from era.core.concurrency.event_log import Gap
from era.core.execution import spooled_output
from era.core.execution.spooled_output import SpooledOutput
from era.core.metadata import MetadataStore
from era.core.models import Session
from era.core.operation.garbage import collect_once
from era.core.sessions.versions import HistoryBound
from era.core.trees import file_threads
from era.core.trees.pins import Pins
from era.core.trees.snapshots import Snapshots
from era.mcp import results
from era.settings import Settings
from era.store import sessions
from era.store.blobs.blobs import Batch, LocalBlobs
from era.store.metadata import SqlStore
from era.store.session_lookup import session_with_key
from tests.conftest import Server, eventually

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


class _Fork:
    """The part of `subprocess.Popen` that `Server` uses."""

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
    """A server in a forked process."""

    named_weakness: str | None = None
    """A key of WEAKNESSES."""

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        process = _forks.Process(target=_serve, args=(environment, log.name, self.named_weakness))
        process.start()
        return cast("subprocess.Popen[bytes]", _Fork(process))

    def time_iterations(self) -> None:
        """Begin to time the iterations of its event loop."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGUSR2)
        assert eventually(lambda: _TIMING in self.log)

    def longest_iteration(self) -> float:
        """How long an iteration of its event loop took at most since then, in seconds of its thread on a processor: so
        whatever else is busy on the machine doesn't count. It's known once an iteration is the longest so far."""
        return max([float(taken) for taken in re.findall(_LONGEST + r"([0-9.]+)\n", self.log)], default=0.0)

    def processor_seconds(self) -> float:
        """How long its process has been on processors."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _serve(environment: dict[str, str], log: str, weakness: str | None) -> None:
    """Serve in this forked process until the service ends."""
    os.environ.clear()
    os.environ.update(environment)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    _name_threads()
    _patch(app, collect_garbage=_collect_on_signal)
    _patch(parts, Snapshots=partial(Snapshots, grace_seconds=0.0))
    if weakness is not None:
        WEAKNESSES[weakness]()
    app.run_service(Settings(), lambda line: print(line, flush=True))


def _name_threads() -> None:
    """Name threads as tracers see them, and limit each thread pool to one."""
    run, make = threading.Thread.run, ThreadPoolExecutor.__init__

    def named_run(self: threading.Thread) -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(self.name[:15])
        run(self)

    def make_single(self: ThreadPoolExecutor, max_workers: int | None = None, *rest: Any, **options: Any) -> None:
        make(self, 1, *rest, **options)

    _patch(threading.Thread, run=named_run)
    _patch(ThreadPoolExecutor, __init__=make_single)


def _patch(target: object, **replacements: object) -> None:
    """Replace attributes of a module or class for the rest of this process."""
    for name, replacement in replacements.items():
        setattr(target, name, replacement)


_TIMING = "The iterations of the event loop are timed."
_LONGEST = "The longest iteration: "


def _time_iterations() -> None:
    """Time each iteration of this loop, for the rest of its life, and print each that takes longer than all before."""
    print(_TIMING, flush=True)
    loop = asyncio.get_running_loop()
    began, longest = time.thread_time(), 0.0

    def next_iteration() -> None:
        nonlocal began, longest
        now = time.thread_time()
        if now - began > longest:
            longest = now - began
            print(f"{_LONGEST}{longest:.6f}", flush=True)
        began = now
        loop.call_soon(next_iteration)

    loop.call_soon(next_iteration)


async def _collect_on_signal(snapshots: Snapshots, store: MetadataStore, pins: Pins, *_: object) -> None:
    """Collect garbage at each SIGUSR1, in the place of the service's own loop; time iterations from SIGUSR2 on."""
    requested = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, requested.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, _time_iterations)
    while True:
        await requested.wait()
        requested.clear()
        await collect_once(snapshots, store, pins)


def _rows_before_blobs() -> None:
    """Content gets its name and becomes durable a while after the row that names it."""
    waiting: set[str] = set()

    @contextmanager
    def batch(self: LocalBlobs) -> Iterator[Batch]:
        made = Batch(self)
        yield made
        waiting.update(made._new)
        threading.Timer(5.0, finish, [made]).start()  # the row is there before, however busy the machine is

    def finish(made: Batch) -> None:
        made._finish()
        made._clean_up()

    get, open_blob = LocalBlobs.get, LocalBlobs.open_blob

    def patient(real: Callable[[LocalBlobs, str], Any], self: LocalBlobs, digest: str) -> Any:
        """Wait for content that is still to be written, as if it came from a cache."""
        while digest in waiting and not os.path.exists(self._path(digest)):
            time.sleep(0.01)
        return real(self, digest)

    async def no_artifacts(*_: object) -> dict[str, object]:
        return {}

    _patch(
        LocalBlobs,
        batch=batch,
        get=lambda self, digest: patient(get, self, digest),
        open_blob=lambda self, digest: patient(open_blob, self, digest),
    )
    _patch(Snapshots, artifacts=no_artifacts)  # the real one would wait for the blobs before the row is written


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

    _patch(Batch, put=put)


def _no_transactions() -> None:
    """Each statement is a commit of its own."""
    execute = Connection.exec_driver_sql

    def without_begin(self: Connection, statement: str, *rest: Any) -> Any:
        return None if statement == "BEGIN IMMEDIATE" else execute(self, statement, *rest)

    _patch(Connection, exec_driver_sql=without_begin)


def _no_lost_runs() -> None:
    """Runs that were cut off are not marked `lost` at the start."""

    async def mark_lost(_: SqlStore) -> int:
        return 0

    _patch(SqlStore, mark_lost=mark_lost)


def _imports_visible_early() -> None:
    """An imported session is visible before it is complete."""

    def insert(connection: Connection, session: Session) -> int:
        fields = {name: getattr(session, name) for name in ("created_at", "updated_at", "version", "id")}
        return sessions.insert_session(connection, sessions.settings_of(session) | fields)

    def complete(connection: Connection, key: int, _session: Session, _key_id: str) -> Session:
        return session_with_key(connection, key)

    _patch(sessions, insert_incomplete_session=insert, complete_session=complete)


def _no_bound_of_history() -> None:
    """Whatever a session's versions hold stays."""

    async def trim(*_: object) -> None:
        return None

    _patch(HistoryBound, trim=trim)


def _no_meter() -> None:
    """Whoever parses bytes goes on as long as there are any."""
    _patch(meter, SLICE=float("inf"))
    _patch(Protocol, _parse=lambda self, data, **_: self._parse_piece(memoryview(data), memoryview(b"")))


def _endless_1xx() -> None:
    """The same, and informational responses may come for ever."""
    _no_meter()
    _patch(exchange, _MAX_INFORMATIONAL=1 << 60)


def _outputs_in_memory() -> None:
    """What runs print is in memory as a whole, and answers are made in one piece."""
    _patch(spooled_output, MEMORY_BYTES=1 << 40)
    _patch(streaming, _SMALL=1 << 40)

    async def in_one_piece(events: AsyncGenerator[Event | Gap]) -> AsyncGenerator[bytes]:
        yield b"".join([piece async for piece in encoded(events)])

    async def read_at_once(self: SpooledOutput, start: int, end: int) -> AsyncGenerator[bytes]:
        yield await self.read(start, end)

    encoded = event_stream._encoded
    _patch(event_stream, _encoded=in_one_piece)
    _patch(SpooledOutput, pieces=read_at_once)

    def hold(self: results.Shortened, piece: str) -> None:
        add(self, piece)
        vars(self).setdefault("held", []).append(piece)

    add = results.Shortened.add
    _patch(results.Shortened, add=hold)


def _no_threads_for_large_commits() -> None:
    """Commits have the same threads, however large they are."""
    _patch(file_threads, LARGE_BYTES=1 << 60, LARGE_ENTRIES=1 << 60)


WEAKNESSES = {
    "rows before blobs": _rows_before_blobs,
    "blobs in place": _blobs_in_place,
    "no transactions": _no_transactions,
    "no lost runs": _no_lost_runs,
    "imports visible early": _imports_visible_early,
    "no bound of history": _no_bound_of_history,
    "no meter": _no_meter,
    "endless 1xx": _endless_1xx,
    "outputs in memory": _outputs_in_memory,
    "no threads for large commits": _no_threads_for_large_commits,
}
