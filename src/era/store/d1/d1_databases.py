"""SQL databases of programs, what `d1` of the storage API is about: an SQLite file for each namespace of an owner.

Theory of operation. The SQL runs in worker processes (d1_worker.py), of which there are a few, started when they are
needed and ended when idle. A call has a worker and its namespace to itself; so calls to one namespace come one after
the other, and never wait for SQLite's locks. A worker opens the file for each call, so no temporary table and no
setting outlives a call. A worker that doesn't answer well after its own deadline is killed, and so is one whose caller
was cancelled. One that is killed or dies has undone the call, unless it has said that it is about to commit: then
nobody knows, and the caller is told so. So one that commits, which only waits for the disk, is given much longer. Nor
does anybody know where the worker says that the disk failed its commit.

A result can be some 24 MB of JSON. To parse that would stop the event loop for long, on whatever thread. So what a
client asked for is passed on as it came from the worker, in pieces.

On several machines a database is kept in rows, and its file is a copy, which is brought up to date before each call
(d1_replicas.py).

Owners get workers in turn, and none gets all of them, so endless statements of one don't hold up another's. What an
owner has is shared in the same way by his sessions and the connections of his clients. Workers yield to the service and
to young runs (they are nice), and their deadline is in processor time: a call pays for what it does, not for what
others do meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.streams import write
from era.core.concurrency.tasks import to_its_end
from era.errors import BadRequest, EraError, Forbidden, SqlUnknown, TooLarge, Unavailable
from era.store.d1.d1_replicas import DatabaseReplicas, Name
from era.store.d1.d1_worker import COMMITTING
from era.store.engine.database import DatabaseAway

_WORKER = Path(__file__).with_name("d1_worker.py")
_WORKERS, _WORKERS_EACH = 4, 2
"""That there are, and that one owner may have at a time."""

_IDLE_SECONDS = 3.0
"""A worker without calls for this long is ended."""

_KILL_SECONDS = 17.0
"""A worker that hasn't answered for this long is killed. Its own deadlines are before that."""

_COMMIT_SECONDS = 40.0
"""After which one is killed that has begun to commit: all that is left to do is to write, and a disk may be slow. To be
killed then would leave nobody knowing what became of it. Less than the minute that clients inside wait."""

_REST_SECONDS = 1.0
"""For so long at most it is read what a worker has said before its time was over, and before it was killed."""

_MOST_DATABASES = 1000
"""That an owner may have."""

_SHARE = 16
"""One database may have a sixteenth of what all storage may have, and a MiB at least."""

_LINE_BYTES = 1 << 20
_RESULT_BYTES = 64 << 20
"""The most bytes of a line that a worker says, such as an error, and of a result as JSON. The worker's own bounds on
statements and on rows are below that."""

_PIECE_BYTES = 64 << 10
"""The most bytes of a piece of a result."""

_IN_DOUBT = ("disk", "memory")
"""Kinds of errors that a COMMIT may fail with after it was carried out. SQLite's other errors are said before that."""

_PAUSE_SECONDS = 0.05
"""Before a call is made again whose database another host has changed: at random, up to this times the tries."""

SUFFIX = ".sqlite"

type _Outcome = Sequence[bytes] | EraError
"""What a call led to: its result as JSON, in pieces, or what is wrong with its SQL."""


class _Lost(Exception):
    """A worker was killed, or died, under a call, or couldn't commit it. `error` is for a caller whose call was undone
    by that."""

    def __init__(self, error: EraError, *, in_commit: bool) -> None:
        """`in_commit`: it had said that it would commit."""
        super().__init__(error.message)
        self.error = error
        self.in_commit = in_commit


class _Answer:
    """What a worker says to a request, as far as it was read."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self._pieces: list[bytes] | None = None
        self._left = 0
        """Bytes of the result that aren't read yet, once its first line is."""

        self.in_commit = False
        self.is_in_doubt = False
        """Whether the outcome is an error with which the call may have been committed."""

        self.bound: asyncio.Timeout | None = None
        """Until when it is waited for, if it is: for longer once there is a commit."""

        self.outcome: _Outcome | None = None
        """None as long as it isn't all there."""

    async def read(self) -> None:
        """Read to the end of the answer, or of what the worker has said. Where it is cancelled it can be called again.
        Raises ValueError for an answer that is too long."""
        while self._pieces is None:
            line = await self._stream.readline()
            if not line.endswith(b"\n"):
                return
            if line == COMMITTING:
                self.in_commit = True
                if self.bound is not None and not self.bound.expired():
                    self.bound.reschedule(asyncio.get_running_loop().time() + _COMMIT_SECONDS)
                continue
            head = json.loads(line)
            if "kind" in head:
                self.is_in_doubt = self.in_commit and head["kind"] in _IN_DOUBT
                self.outcome = _error(head["kind"], head["message"])
                return
            if head["size"] > _RESULT_BYTES:
                raise ValueError
            self._pieces, self._left = [], head["size"]
        while self._left > 0:
            piece = await self._stream.read(min(self._left, _PIECE_BYTES))
            if not piece:
                return
            self._pieces.append(piece)
            self._left -= len(piece)
        self.outcome = self._pieces

    def settled(self, outcome: _Outcome) -> _Outcome:
        """The outcome. Raises _Lost where nobody knows whether the call was committed."""
        if self.is_in_doubt and isinstance(outcome, EraError):
            raise _Lost(outcome, in_commit=True)
        return outcome

    async def read_rest(self) -> None:
        """Read what a worker has said before its time was over, or before it was killed. One that is killed ends at
        once, unless it waits for a disk."""
        with contextlib.suppress(TimeoutError, ValueError, OSError):
            async with asyncio.timeout(_REST_SECONDS) as self.bound:
                await self.read()


@contextlib.asynccontextmanager
async def _usable() -> AsyncIterator[None]:
    """Raises Unavailable for what the machine refuses within the block: room on the disk, a process, a descriptor."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"The database can't be used: {error.strerror}.") from error


class D1Databases:
    """The databases of all owners: a port of core/storage/storage.py. `open` before anything, `close` when done."""

    def __init__(
        self,
        directory: Path,
        most_bytes: int,
        *,
        kept: DatabaseReplicas | None = None,
        is_shared: bool = False,
    ) -> None:
        """`directory` has a directory for each owner. It belongs to one process or, if it `is_shared`, to the hosts of
        a cluster, between which SQLite's locks decide. A database has at most `most_bytes`.
        With `kept` the directory has copies of what is kept there, and nothing else."""
        self._directory = directory
        self._is_shared = is_shared
        self._kept = kept
        self._most_bytes = most_bytes
        self._slots = FairLimiter(_WORKERS, of_owner=_WORKERS_EACH, each=1)
        """The workers, by owner and who of his asks."""

        self._idle: list[tuple[asyncio.subprocess.Process, asyncio.TimerHandle]] = []
        self._locks: WeakValueDictionary[Name, asyncio.Lock] = WeakValueDictionary()
        self._ending: set[asyncio.Task[int]] = set()
        self._sizes: dict[str, dict[str, int]] = {}
        """Bytes of each database, by owner and namespace."""

        self._total = 0

        self._owners: set[str] = set()
        """Owners whose directory is durable."""

    def open(self) -> None:
        """Find the databases. Where they are kept in rows, `measure_all` does that. Raises OSError."""
        if self._kept is not None and self._directory.exists():
            shutil.rmtree(self._directory)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (self._directory.parent, self._directory):
            _sync(directory)
        self._owners = {path.name for path in self._directory.iterdir()}
        self._note_all({name: path.stat().st_size for name, path in files(self._directory)})

    async def measure_all(self) -> None:
        """Find the databases that there are: hosts of a cluster share them. Raises OSError, Unavailable."""
        if self._kept is not None:
            self._note_all(await self._kept.sizes())
            return
        self._note_all(
            await asyncio.to_thread(lambda: {name: path.stat().st_size for name, path in files(self._directory)})
        )

    async def close(self) -> None:
        """End the workers and wait for them. No call may be in progress."""
        while self._idle:
            worker, timer = self._idle.pop()
            timer.cancel()
            self._end(worker)
        await asyncio.gather(*self._ending)

    @property
    def total(self) -> int:
        """Bytes of all databases."""
        return self._total

    @property
    def most_bytes(self) -> int:
        """How large one may be."""
        return self._most_bytes

    def sizes(self, owner: str) -> Mapping[str, int]:
        """Bytes of each of an owner's databases, by namespace."""
        return self._sizes.get(owner, {})

    @_usable()
    async def run_as_json(
        self,
        owner: str,
        namespace: str,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] = (),
        *,
        many: bool,
        room: int,
        asker: str = "",
    ) -> Sequence[bytes]:
        """Run SQL in a transaction, on a database that is made if there is none.

        `asker` is whoever of the owner's asks. `params` are the values of `?` or `:name`. With `many`, `sql` may be
        several statements, but then without params. The database may grow by `room` bytes. The result is an object of
        JSON, in pieces: `results`, the rows of the last statement that has any, and `meta`; d1_worker.py makes it.

        Raises BadRequest, Forbidden or TooLarge for what the SQL does, Unavailable where the database can't be used,
        SqlUnknown where nobody knows whether it was committed.
        """
        name = (owner, namespace)
        async with self._locked(name):
            path = self._path(name)
            if owner not in self._owners:
                await asyncio.to_thread(self._make_directory, path.parent)
                self._owners.add(owner)
            request = {"path": str(path), "sql": sql, "params": params, "many": many}
            try:
                async with self._slots.slot(owner, asker):
                    self._check_number(name)
                    if self._kept is None:
                        outcome = await self._run_here(name, request, room)
                    else:
                        outcome = await self._run_shared(self._kept, name, request, room)
            except _Lost as lost:
                if lost.in_commit and self._kept is None:  # what is kept in rows isn't changed by the worker's commit
                    raise SqlUnknown from None
                raise lost.error from None
            except DatabaseAway as away:
                if away.may_have_committed:
                    raise SqlUnknown from away
                raise
            finally:
                if self._kept is None or path.exists():  # or it couldn't be had, which says nothing about the rows
                    self._measure(name, path)
        if isinstance(outcome, EraError):
            raise outcome
        return outcome

    def _check_number(self, name: Name) -> None:
        """Raises TooLarge for a new database of an owner who has as many as there may be. The caller holds one of his
        slots, of which there are few: so few are made at the same time."""
        owner, namespace = name
        of_owner = self.sizes(owner)
        if namespace not in of_owner and len(of_owner) >= _MOST_DATABASES:
            raise TooLarge(f"You have {_MOST_DATABASES} databases already.", hint="Delete one that isn't needed.")

    async def _run_here(self, name: Name, request: Mapping[str, Any], room: int) -> _Outcome:
        """Run a call on the database's file as it is; see `_call_worker`."""
        self._measure(name, self._path(name))  # another host of a cluster may have written to it
        owner, namespace = name
        most = min(self._most_bytes, self.sizes(owner).get(namespace, 0) + max(room, 0))
        try:
            return await self._call_worker({**request, "most_bytes": most})
        finally:
            if not self._is_shared:  # or another host's transaction may be the first, and be lost with the file
                self._remove_if_empty(self._path(name))

    async def _run_shared(self, kept: DatabaseReplicas, name: Name, request: Mapping[str, Any], room: int) -> _Outcome:
        """Run a call on a copy of what is kept, and store what it changes. Raises as `_call_worker` does, Unavailable
        where the rows can't be had, or other hosts change them all the time."""
        path, until = self._path(name), time.monotonic() + _KILL_SECONDS
        for tries in itertools.count(1):
            await to_its_end(kept.pull(name, path))
            try:
                outcome = await self._run_here(name, request, room)
            except BaseException:
                kept.forget(name)  # The file may have half a transaction, or one that doesn't count.
                raise
            if isinstance(outcome, EraError) or await to_its_end(kept.push(name, path)):
                return outcome
            if time.monotonic() > until:
                raise Unavailable("Other hosts change this database all the time.", hint="Try again.")
            await asyncio.sleep(random.uniform(0, _PAUSE_SECONDS * tries))  # noqa: S311  no secret
        raise AssertionError

    @_usable()
    async def drop(self, owner: str, namespace: str) -> bool:
        """Remove a namespace's database; whether there was one. Raises Unavailable."""
        name = (owner, namespace)
        async with self._locked(name):
            path = self._path(name)
            existed = path.exists() if self._kept is None else await self._kept.drop(name)
            await to_its_end(asyncio.to_thread(_remove, path))
            self._measure(name, path)
            return existed

    def _make_directory(self, directory: Path) -> None:
        """Make an owner's directory, durably. Raises OSError."""
        directory.mkdir(mode=0o700, exist_ok=True)
        _sync(self._directory)

    def _remove_if_empty(self, path: Path) -> None:
        """Remove a database's file if nothing was ever committed to it."""
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()

    def _path(self, name: Name) -> Path:
        owner, namespace = name
        return self._directory / owner / f"{namespace}{SUFFIX}"

    def _measure(self, name: Name, path: Path) -> None:
        """Note the size of a database, or that it doesn't exist."""
        owner, namespace = name
        of_owner = self._sizes.setdefault(owner, {})
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            size = 0
        except OSError:  # what was noted before is the best there is; a call that was committed doesn't fail by this
            return
        self._total += size - of_owner.pop(namespace, 0)
        if size:
            of_owner[namespace] = size

    def _note_all(self, sizes: Mapping[Name, int]) -> None:
        """Note the size of all databases that there are."""
        self._sizes = {}
        for (owner, namespace), size in sizes.items():
            if size:  # else hosts have a file to which nothing was committed
                self._sizes.setdefault(owner, {})[namespace] = size
        self._total = sum(sizes.values())

    def _locked(self, name: Name) -> asyncio.Lock:
        """The lock that calls to this database take."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    async def _call_worker(self, request: Mapping[str, Any]) -> _Outcome:
        """Send a request to a worker and receive its answer; see d1_worker.py. The caller holds a slot.

        Raises _Lost where the worker had to be killed or died, or nobody knows what became of the commit, Unavailable
        or OSError where it can't be used.
        """
        worker = await self._worker()
        if worker.stdin is None or worker.stdout is None:
            raise Unavailable("An SQL worker has no pipes.")
        answer, error = _Answer(worker.stdout), None
        try:
            try:
                async with asyncio.timeout(_KILL_SECONDS) as answer.bound:
                    write(worker.stdin, json.dumps(request).encode() + b"\n")
                    await worker.stdin.drain()
                    await answer.read()
            except TimeoutError:
                await answer.read_rest()  # It may have said more while the service had no processor to read it.
                if answer.outcome is None:
                    raise
        except TimeoutError:
            error = _error("time", "interrupted")
            self._end(worker, kill=True)
            await answer.read_rest()
        except ValueError:
            error = _error("large", "The answer is too long")
        except OSError:
            pass  # it has ended
        except BaseException:
            self._end(worker, kill=True)
            await to_its_end(_exited(worker, worker.stdout))  # until then it may write, and counts as one there is
            raise
        if answer.outcome is not None and error is None:
            timer = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._retire, worker)
            self._idle.append((worker, timer))
            return answer.settled(answer.outcome)
        self._end(worker, kill=True)
        if answer.outcome is not None:
            return answer.settled(answer.outcome)
        if error is None and await worker.wait() == -signal.SIGXCPU:
            error = _error("time", "interrupted")
        if error is None:
            error = _error(
                "memory", "The statement ended the process that ran it: it most likely wanted too much memory."
            )
        raise _Lost(error, in_commit=answer.in_commit)

    async def _worker(self) -> asyncio.subprocess.Process:
        """An idle worker, or a new one. Raises OSError."""
        while self._idle:
            worker, timer = self._idle.pop()
            timer.cancel()
            if worker.returncode is None and worker.stdin is not None and not worker.stdin.is_closing():
                return worker
            self._end(worker, kill=True)  # it has died, but that may not be known yet
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(_WORKER), str(self._most_bytes)),
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.DEVNULL,
            cwd="/",
            env={},
            limit=_LINE_BYTES,
        )

    def _retire(self, worker: asyncio.subprocess.Process) -> None:
        """End a worker that has been idle."""
        self._idle = [(each, timer) for each, timer in self._idle if each is not worker]
        self._end(worker)

    def _end(self, worker: asyncio.subprocess.Process, *, kill: bool = False) -> None:
        """Close a worker's input, upon which it exits, or kill it, and have its exit awaited."""
        if kill:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
        if worker.stdin is not None:
            worker.stdin.close()
        ending = asyncio.create_task(worker.wait())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


async def opened(
    kept: DatabaseReplicas, directory: Path, copies: Path | None, storage_bytes: int, *, is_shared: bool
) -> D1Databases:
    """The databases of programs: files in a directory, which hosts may share, or kept in rows, with `copies` of what is
    used. What is in the other place is brought there; nobody else does so meanwhile. All storage may have
    `storage_bytes`. Raises Unavailable, OSError."""
    most_bytes = max(storage_bytes // _SHARE, 1 << 20)
    as_files = D1Databases(directory / "sql", most_bytes, is_shared=is_shared)
    if copies is None:
        await kept.export_files(directory / "sql", SUFFIX)
        as_files.open()
        return as_files
    as_files.open()
    await kept.import_files(files(directory / "sql"))
    databases = D1Databases(copies, most_bytes, kept=kept)
    databases.open()
    await databases.measure_all()
    return databases


def files(directory: Path) -> Iterator[tuple[Name, Path]]:
    """The databases that are files in a directory."""
    for path in directory.glob(f"*/*{SUFFIX}"):
        yield (path.parent.name, path.name.removesuffix(SUFFIX)), path


async def _exited(worker: asyncio.subprocess.Process, stdout: asyncio.StreamReader) -> None:
    """Wait for the exit of a worker that was killed. What it has said is read: else asyncio may never see the end."""
    with contextlib.suppress(OSError):
        while await stdout.read(_PIECE_BYTES):
            pass
    await worker.wait()


def _error(kind: str, message: str) -> EraError:
    """The error for a kind of `d1_worker.answer`. `message` is SQLite's, about the caller's own statement."""
    match kind:
        case "time":
            return BadRequest(
                "The SQL took too long, and was undone.",
                hint="A call may take 5 seconds of processor time, and 15 in all. Do less in one, or add an index.",
                code="sql_timeout",
            )
        case "forbidden":
            return Forbidden(
                f"This SQL may not be run here: {message}.",
                hint="What reaches beyond the database is refused, and so are BEGIN and COMMIT: use exec for several "
                "statements at once, all or nothing.",
                code="sql_refused",
            )
        case "large":
            return TooLarge(f"{message.rstrip('.')}.", hint="Ask for less: LIMIT, fewer columns, shorter values.")
        case "full":
            return TooLarge(
                "The database is as large as it may be.",
                hint="Delete what isn't needed; one database may have a sixteenth of ERA_STORAGE_MB.",
                code="storage_full",
            )
        case "memory":
            return TooLarge(message, hint="Sort and group less at a time.", code="sql_memory")
        case "busy":
            return Unavailable("The database is locked.")
        case "disk" | "room":
            return Unavailable(f"The database can't be used: {message}.")
        case "bad":
            return BadRequest(message)
        case _:
            return BadRequest(f"SQL: {message}.", hint="The dialect is SQLite's.", code="sql_error")


def _remove(path: Path) -> None:
    """Remove a database's files durably. Blocks, for long where they are large; raises OSError."""
    for file in (path, Path(f"{path}-journal")):
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
    if path.parent.exists():
        _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
