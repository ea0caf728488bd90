"""Running tools on the host: as unprivileged users, within limits, with the end of their output kept.

Names, passwords and tokens in URLs, which are the operator's, are replaced in that. Tools hide at most what follows a
colon, and many registries take a token as the name alone. So all before the `@` goes.
"""

from __future__ import annotations

import asyncio
import hashlib
import marshal
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from era.core.concurrency.tasks import log_failure, to_its_end
from era.core.setup.package_sets import SetupFailed
from era.core.setup.progress import Say

_SECRET = re.compile(rb"://[^/\s]*@")
_REDACTED = "://…".encode()
_OPEN = re.compile(rb"(?:://[^/\s]*|:/?)\Z")
"""At the end of a piece: what may go on as a URL's name or password. Both patterns take linear time, since no two of
their matches can begin before the same `/`."""

_MOST_HELD = 16 << 10


class Redaction:
    """Redacts a stream that comes in pieces, wherever these end."""

    def __init__(self) -> None:
        self._held = b""
        """The end of what came, which can't be shown before more has come."""

    def shown(self, piece: bytes) -> bytes:
        """What of the stream can be shown after this piece has come, too."""
        text = self._held + piece
        end = found.start() if (found := _OPEN.search(text)) else len(text)
        self._held = text[end:]
        shown = _SECRET.sub(_REDACTED + b"@", text[:end])
        return shown + self.rest() if len(self._held) > _MOST_HELD else shown

    def rest(self) -> bytes:
        """The rest of the stream, which has ended. It may have ended within a password, so that isn't shown either."""
        held, self._held = self._held, b""
        return _REDACTED if held.startswith(b"://") else held


_CHILD = Path(__file__).resolve().with_name("child.py")
_STAGE = "/run/era"
_FIRST_UID, _PAIRS = 1_899_000_000, 400_000
"""The uids of tools that a root service starts: below those of sandboxes. Each data directory has a pair of its own.
One fetches, and owns the shared caches; the other compiles, and owns nothing."""

_LAST_WORDS = 4 << 10
_LOOK_SECONDS = 0.25
_OUTPUT_SECONDS = 5.0
"""How long the end of a tool's output may take once the tool has ended."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a tool ended."""

    code: int
    """Its exit code, negative for a signal. `stdout` and `stderr` are the end of its output."""

    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Space:
    """A bound for what a tool writes to disk."""

    own: Path
    """Its scratch directory."""

    shared: Path
    """A directory that it writes to, too, and that has files of others: a cache."""

    most: int
    """Bytes of installed packages. The tool may write twice as many, since they are in the cache, too."""


class Processes:
    """Runs tools. As root each tool gets an unprivileged uid and sees its files in a directory that is made for it."""

    def __init__(self, directory: Path, shown: Mapping[str, Path]) -> None:
        """`directory` is the data directory, which settles the uids. `shown` are the files and directories that tools
        may be given, by name."""
        self._privileged = os.geteuid() == 0
        digest = int(hashlib.sha256(bytes(directory)).hexdigest(), 16)
        first = _FIRST_UID + digest % _PAIRS * 2
        self.fetcher: int | None = first if self._privileged else None
        self.compiler: int | None = first + 1 if self._privileged else None
        self._shown = {name: os.fspath(path) for name, path in shown.items()}

    def path(self, name: str, scratch: Path) -> str:
        """The path by which a tool sees what it is given under this name. `work` is its scratch directory."""
        if self._privileged:
            return f"{_STAGE}/{name}"
        return os.fspath(scratch) if name == "work" else self._shown[name]

    def change_owner(self, path: Path, uid: int | None) -> None:
        """Make a tool's user the owner of a directory or file. Nothing in it may come from a stranger."""
        if uid is not None:
            os.chown(path, uid, uid)

    async def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        scratch: Path,
        uid: int | None,
        deadline: float,
        space: Space,
        names: Sequence[str],
        say: Say | None = None,
        most_memory: int | None = None,
    ) -> Ran:
        """Run a tool in its scratch directory, as `uid`, with the files `names`. `deadline` is of the monotonic clock.
        `say` gets the output as it comes; it is redacted, as is that in the result. `most_memory` is how many bytes
        each of its processes may take. Raises SetupFailed where it takes too long or too much space."""
        shown = {"work": os.fspath(scratch), **{name: self._shown[name] for name in names}}
        rlimits = {"RLIMIT_FSIZE": space.most, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 4096}
        if most_memory is not None:
            rlimits["RLIMIT_AS"] = most_memory
        plan = {
            "parent": os.getpid(),
            "uid": uid,
            "stage": _STAGE,
            "binds": shown,
            "rlimits": rlimits,
            "directory": self.path("work", scratch),
            "command": list(command),
            "environment": dict(environment),
        }
        begun, free = time.time(), _free(scratch)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(_CHILD),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={}, start_new_session=True,
        )  # fmt: skip
        assert process.stdin and process.stdout and process.stderr  # noqa: S101, PT018 - they are pipes
        streams = {"stdout": process.stdout, "stderr": process.stderr}
        outputs = [asyncio.create_task(_end_of(name, stream, say)) for name, stream in streams.items()]
        try:
            process.stdin.write(marshal.dumps(plan))  # which it can read without importing anything
            process.stdin.close()
            while process.returncode is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await process.wait()
                if time.monotonic() > deadline:
                    raise SetupFailed("It took too long. The server's ERA_SETUP_SECONDS sets the bound.")
                if free - _free(scratch) > space.most and await asyncio.to_thread(_used, space, begun) > space.most * 2:
                    raise too_large(space.most)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has left would keep its output open
            await asyncio.wait(outputs, timeout=_OUTPUT_SECONDS)
            process._transport.close()  # type: ignore[attr-defined]  # or what isn't in its group any more would, too
            await process.wait()
            await asyncio.gather(*outputs, return_exceptions=True)  # no failure of theirs takes another's place
        return Ran(process.returncode, *(output.result() for output in outputs))


def too_large(most: int) -> SetupFailed:
    """The error for packages of more than `most` bytes."""
    return SetupFailed(f"The packages take more than {most >> 20} MiB. The server's ERA_DISK_MB sets the bound.")


async def _end_of(name: str, stream: asyncio.StreamReader, say: Say | None) -> str:
    """Read a stream to its end, and redact it. Returns its last bytes, as text."""
    kept, redaction, is_open = b"", Redaction(), True
    while is_open:
        piece = await stream.read(1 << 16)
        is_open = bool(piece)
        shown = redaction.shown(piece) if is_open else redaction.rest()
        kept = (kept + shown)[-_LAST_WORDS:]  # once it is redacted, or a password could lack its begin
        if say is not None and shown:
            say(name, shown)
    return kept.decode(errors="replace").strip()


def _free(directory: Path) -> int:
    """Free bytes of the file system."""
    status = os.statvfs(directory)
    return status.f_bfree * status.f_frsize


def _used(space: Space, since: float) -> int:
    """Bytes on disk of the scratch directory, and of files in the shared one that have changed since `since` (seconds
    since the epoch)."""
    return size_of(space.own) + size_of(space.shared, since)


def size_of(directory: Path, since: float = 0) -> int:
    """Bytes on disk of the files below a directory that have changed since `since` (seconds since the epoch)."""
    total = 0
    for where, _, files in os.walk(directory):
        for name in files:
            with suppress(OSError):
                stat = os.lstat(f"{where}/{name}")
                total += stat.st_blocks * 512 if stat.st_ctime >= since else 0
    return total


_THREADS = ThreadPoolExecutor(4, thread_name_prefix="era-packages")
"""Packing, unpacking and copying large sets takes long, and what watches the memory and the disk of runs waits for a
thread of the loop's own executor."""


async def in_thread[**P, T](work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """What `work` returns, done in another thread. Unlike asyncio.to_thread, being cancelled waits for the thread: it
    would go on making files in a scratch directory while that is removed."""
    return await to_its_end(asyncio.get_running_loop().run_in_executor(_THREADS, partial(work, *given, **named)))


def in_background(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    """Run a coroutine in a task of its own, which is in `tasks` until it has ended. If it fails, that is logged."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    task.add_done_callback(partial(log_failure, event="package_work_failed"))
