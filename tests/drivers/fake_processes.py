"""Processes beside runs for the fake driver: plain processes of the host's, with pipes only. Never part of ERA."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from era.core.models import JsonObject
from era.core.ports import SocketBroker
from era.core.process import ProcessEnded, ProcessOutput, ProcessSpec, TerminalSize
from era.errors import SandboxFailed


class FakeProcess:
    """See ports.GuestProcess."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid
        self.sizes: list[TerminalSize] = []
        self.died_with_sandbox = False

    async def events(self) -> AsyncIterator[ProcessOutput | ProcessEnded]:
        queue: asyncio.Queue[ProcessOutput | None] = asyncio.Queue()

        async def read(name: str, stream: asyncio.StreamReader | None) -> None:
            while stream is not None and (data := await stream.read(1 << 16)):
                queue.put_nowait(ProcessOutput(name, data))  # type: ignore[arg-type]

        async def end() -> None:
            await asyncio.gather(read("stdout", self._process.stdout), read("stderr", self._process.stderr))
            await self._process.wait()
            queue.put_nowait(None)

        ending = asyncio.create_task(end())
        while event := await queue.get():
            yield event
        await ending
        code = self._process.returncode or 0
        if self.died_with_sandbox:
            yield ProcessEnded(137, 9, "sandbox_died")
        else:
            yield ProcessEnded(128 - code if code < 0 else code, -code if code < 0 else None, "exit")

    async def write(self, data: bytes) -> None:
        if self._process.stdin is None or self._process.stdin.is_closing():
            raise BrokenPipeError
        self._process.stdin.write(data)
        with contextlib.suppress(ConnectionError):
            await self._process.stdin.drain()

    async def close_stdin(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def send(self, data: bytes) -> None:
        raise BrokenPipeError

    async def signal(self, number: int, *, group: bool = True) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def kill(self) -> None:
        await self.signal(signal.SIGKILL)

    async def resize(self, size: TerminalSize) -> None:
        self.sizes.append(size)


class FakeSupervisor:
    """See ports.ProcessSupervisor."""

    broker: SocketBroker | None = None

    def __init__(self, workspace: Path) -> None:
        self.enforced: JsonObject = {"separated_by": "nothing"}
        self._workspace = workspace
        self._processes: list[FakeProcess] = []
        self._ended = asyncio.Event()
        self.alive = True

    async def start(self, spec: ProcessSpec, may_begin: Callable[[], Awaitable[None]] | None = None) -> FakeProcess:
        if not self.alive:
            raise SandboxFailed("The supervisor is gone.")
        if may_begin is not None:
            await may_begin()
        process = await asyncio.create_subprocess_exec(
            *spec.command,
            cwd=self._workspace / spec.cwd,
            env={"PATH": os.environ["PATH"], **spec.env},
            stdin=PIPE if spec.stdin or spec.pty else DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
        )
        self._processes.append(FakeProcess(process))
        return self._processes[-1]

    async def is_empty(self) -> bool:
        return all(process._process.returncode is not None for process in self._processes)

    async def wait(self) -> None:
        await self._ended.wait()

    async def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        """End all at once, as their namespace's end does."""
        self.alive = False
        for process in self._processes:
            if process._process.returncode is None:
                process.died_with_sandbox = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        self._ended.set()
