"""The compiler of package sets: Python sources of strangers to bytecode, within bounds of memory and time.

Python's parser takes hundreds of bytes for a byte of source, so a wheel of a few megabytes could take all memory of the
machine. Each process of the compiler has a bound, and one set is compiled at a time. What doesn't fit has no bytecode,
and programs compile it for themselves, within the memory of their sandbox.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from era.core.setup.package_sets import SetupFailed
from era.packages import trees
from era.packages.processes import Processes, Space, in_thread

_SECONDS = 120.0
_MOST_MEMORY = 1 << 30
"""Bytes of address space that each process may take."""

_PROCESSES = 2
"""For a large set. As many as there are processors would take that much memory each."""


class Compiler:
    """Compiles one package set at a time."""

    def __init__(self, processes: Processes, names: Sequence[str], *, most_bytes: int, most_files: int) -> None:
        """`names` are the files that the compiler's interpreter needs, as for Processes.run. `most_bytes` and
        `most_files` bound a package set without its bytecode."""
        self._processes = processes
        self._names = names
        self._most_bytes, self._most_files = most_bytes, most_files
        self._slot = asyncio.Semaphore()

    @asynccontextmanager
    async def turn(self, patience: float | None = None) -> AsyncIterator[bool]:
        """Hold the compiler for the block; False where others still hold it after `patience` seconds."""
        try:
            async with asyncio.timeout(patience):
                await self._slot.acquire()
        except TimeoutError:
            yield False
            return
        try:
            yield True
        finally:
            self._slot.release()

    async def compile(self, scratch: Path, interpreter: str, site: str, deadline: float, *, is_large: bool) -> None:
        """Compile the sources of `scratch/made/python` that are below `site` to bytecode beside them. A file that can't
        be compiled is left as it is. The caller has the turn. `interpreter` is the path by which the compiler sees
        itself, `deadline` is of the monotonic clock. Raises SetupFailed, OSError."""
        uid, bare = self._processes.compiler, scratch / "compiled"
        bare.mkdir()
        (scratch / "made/python").rename(bare / "python")
        await in_thread(trees.own, bare, uid)
        work = self._processes.path("work", bare)
        command = [interpreter, "-I", "-S", "-m", "compileall", "-q", "-j", str(_PROCESSES if is_large else 1)]
        command += ["-s", f"{work}/python"]  # or the bytecode would have this machine's path
        command += ["--invalidation-mode", "unchecked-hash", f"{work}/python/{site}"]
        with suppress(SetupFailed):
            await self._processes.run(
                command, {"PATH": "/usr/bin:/bin"}, scratch=bare, uid=uid,
                deadline=min(deadline, time.monotonic() + _SECONDS), space=Space(bare, bare, self._most_bytes),
                names=self._names, most_memory=_MOST_MEMORY,
            )  # fmt: skip
        if uid is not None:
            os.chown(bare, 0, 0)
        bare.chmod(0o700)
        await in_thread(trees.check, bare, most_files=2 * self._most_files, most_bytes=4 * self._most_bytes)
        (bare / "python").rename(scratch / "made/python")
