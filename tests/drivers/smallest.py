"""The smallest driver: what the core needs, and no capability. It isolates nothing, so it must never serve anybody."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from era.core.models import JsonObject, Language
from era.core.ports import Sandbox
from era.core.program import Ended, Limits, Output, Program
from era.drivers import processes
from era.errors import SandboxFailed


class SmallestSandbox(Sandbox):
    def __init__(self, directory: Path, limits: Limits) -> None:
        self.id, self.limits, self.enforced = directory.name, limits, {"driver": "smallest"}
        self.workspace = directory / "workspace"
        self.workspace.mkdir(parents=True)
        self._process: Process | None = None
        self._is_ended = False

    @property
    def alive(self) -> bool:
        return not self._is_ended

    async def run(self, program: Program) -> AsyncIterator[Output | Ended]:
        if not self.alive:
            raise SandboxFailed("The sandbox is gone.")
        if program.may_begin is not None:
            await program.may_begin()
        command = program.invocation.command or ["sh", "-c", program.code.decode()]
        began = time.monotonic()
        self._process = process = await asyncio.create_subprocess_exec(
            *command, cwd=self.workspace, env={**program.env}, stdout=PIPE, stderr=STDOUT
        )
        timer = asyncio.get_running_loop().call_later(program.timeout, process.kill)
        assert process.stdout is not None
        while piece := await process.stdout.read(1 << 16):
            yield Output("stdout", piece)
        code = await process.wait()
        timer.cancel()
        yield Ended(
            exit_code=128 - code if code < 0 else code,
            cause="killed" if code < 0 else "exit",
            duration=time.monotonic() - began,
            state=program.state,
            state_problem=None,
            stdout_truncated=False,
            stderr_truncated=False,
            reaped=0,
            peak_memory_bytes=None,
            cpu_us=None,
            sandbox_alive=self.alive,
        )

    async def kill_run(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def stop_run(self) -> None:
        await self.kill_run()

    def cpu_seconds(self) -> float:
        return processes.cpu_seconds(self._pids())

    def wants_processor(self) -> bool:
        return processes.want_processor(self._pids())

    def memory_bytes(self) -> int:
        return processes.memory_bytes(self._pids())

    async def put_away(self) -> None:
        self._is_ended = True
        await self.kill_run()

    async def close(self) -> None:
        await self.put_away()
        shutil.rmtree(self.workspace.parent, ignore_errors=True)

    def _pids(self) -> list[int]:
        return [] if self._process is None else processes.below(self._process.pid)


class SmallestDriver:
    name = "smallest"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: list[SmallestSandbox] = []

    async def clear(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    async def start(self) -> None:
        """Prove that sandboxes work; here nothing can fail."""

    def isolation(self) -> JsonObject:
        return {"driver": self.name, "summary": "none at all"}

    async def create(
        self, language: Language, limits: Limits, package_set: str | None = None, heir_to: Sandbox | None = None
    ) -> SmallestSandbox:
        self._made.append(SmallestSandbox(self._directory / f"sb-{secrets.token_hex(8)}", limits))
        return self._made[-1]

    async def stop(self) -> None:
        for sandbox in self._made:
            await sandbox.close()
