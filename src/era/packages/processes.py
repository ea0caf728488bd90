"""Starting tools on the host: as nobody in particular, within limits, their last words kept."""

from __future__ import annotations

import asyncio
import hashlib
import marshal
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from era.core.setup.package_sets import SetupFailed
from era.core.setup.progress import Say

_CHILD = Path(__file__).resolve().with_name("child.py")
_STAGE = "/run/era"
_FIRST_UID, _PAIRS = 1_899_000_000, 400_000
"""uids of tools that a root service starts: below those of sandboxes. Each data directory has a pair of its own: one
fetches, and owns the shared caches; the other compiles, and owns nothing."""

_LAST_WORDS = 4 << 10
_LOOK_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Ran:
    """How a tool ended. `stdout` and `stderr` are the end of what it said."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Space:
    """A bound for what a tool writes: `own` is its scratch directory, `shared` has more than its files."""

    own: Path
    shared: Path
    most: int
    """Bytes; twice as many count, since what is installed lies in a cache too."""


class Processes:
    """Starts tools. `shown` are files and directories that tools need, by name; `path` tells where they see one."""

    def __init__(self, directory: Path, shown: Mapping[str, Path]) -> None:
        self._privileged = os.geteuid() == 0
        digest = int(hashlib.sha256(bytes(directory)).hexdigest(), 16)
        first = _FIRST_UID + digest % _PAIRS * 2
        self.fetcher: int | None = first if self._privileged else None
        self.compiler: int | None = first + 1 if self._privileged else None
        self._shown = {name: os.fspath(path) for name, path in shown.items()}

    def path(self, name: str, scratch: Path) -> str:
        """Where a tool sees what is shown by this name, or its scratch directory as `work`."""
        if self._privileged:
            return f"{_STAGE}/{name}"
        return os.fspath(scratch) if name == "work" else self._shown[name]

    def give(self, directory: Path, uid: int | None) -> None:
        """Let a directory, which holds nothing of a stranger's, belong to a tool's user."""
        if uid is not None:
            os.chown(directory, uid, uid)

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
    ) -> Ran:
        """Run a tool that is shown `names` and its scratch directory, where it starts. Raises SetupFailed where it
        takes too long (until `deadline`, of the monotonic clock) or too much space. `say` hears what it says."""
        shown = {"work": os.fspath(scratch), **{name: self._shown[name] for name in names}}
        plan = {
            "uid": uid,
            "stage": _STAGE,
            "binds": shown,
            "rlimits": {"RLIMIT_FSIZE": space.most, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 4096},
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
        said = [asyncio.create_task(_end_of(name, stream, say)) for name, stream in streams.items()]
        try:
            process.stdin.write(marshal.dumps(plan))  # which it reads without importing anything
            process.stdin.close()
            while process.returncode is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await process.wait()
                if time.monotonic() > deadline:
                    raise SetupFailed("It took too long. The server's ERA_SETUP_SECONDS sets the bound.")
                if (
                    free - _free(scratch) > space.most
                    and await asyncio.to_thread(_taken, space, begun) > space.most * 2
                ):
                    raise too_large(space.most)
            return Ran(process.returncode, await said[0], await said[1])
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            await asyncio.gather(*said)


def too_large(most: int) -> SetupFailed:
    return SetupFailed(f"The packages take more than {most >> 20} MiB. The server's ERA_DISK_MB sets the bound.")


async def _end_of(name: str, stream: asyncio.StreamReader, say: Say | None) -> str:
    kept = b""
    while piece := await stream.read(1 << 16):
        kept = (kept + piece)[-_LAST_WORDS:]
        if say is not None:
            say(name, piece)
    return kept.decode(errors="replace").strip()


def _free(directory: Path) -> int:
    room = os.statvfs(directory)
    return room.f_bfree * room.f_frsize


def _taken(space: Space, since: float) -> int:
    """Bytes of the scratch directory, and of what was changed in the shared one since then."""
    return size_of(space.own) + size_of(space.shared, since)


def size_of(directory: Path, since: float = 0) -> int:
    """Bytes that files below a directory take on disk, those that were changed since then."""
    total = 0
    for where, _, files in os.walk(directory):
        for name in files:
            with suppress(OSError):
                stat = os.lstat(f"{where}/{name}")
                total += stat.st_blocks * 512 if stat.st_ctime >= since else 0
    return total
