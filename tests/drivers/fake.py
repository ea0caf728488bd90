"""A driver without any isolation, for tests of what needs a driver and not its walls. Programs are plain processes of
the host's, so only code of the tests' own may run here. It must never become part of ERA."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Literal

from era import languages
from era.core.models import JsonObject, Language
from era.core.ports import Sandbox
from era.core.process import HeldFiles
from era.core.program import Ended, Limits, Output, Program
from era.drivers import guest, processes
from era.drivers.staging import remove_tree
from era.errors import SandboxFailed
from era.guest.workspace import STATE_FILE, write_file
from era.languages.node import NODE
from tests.drivers.fake_processes import FakeSupervisor

_GRACE = 2.0


class FakeSandbox(Sandbox):
    """A working directory, and programs that are plain processes."""

    alive = True
    opens_on_host = True

    def __init__(self, directory: Path, language: Language, limits: Limits) -> None:
        self.id = directory.name
        self.enforced: JsonObject = {"driver": "fake"}
        self.workspace = directory / "workspace"
        self.workspace.mkdir(parents=True)
        self._language = language
        self.limits = limits
        self._process = self  # what to kill, for those that kill a sandbox from outside
        self._program: Process | None = None
        self._supervisor: FakeSupervisor | None = None

    async def run(self, program: Program) -> AsyncIterator[Output | Ended]:
        if not self.alive:
            raise SandboxFailed("The sandbox is gone.")
        entry = self.workspace / languages.DEFINITIONS[self._language].entry
        for path, content in {**program.files, STATE_FILE: program.state, entry.name: program.code}.items():
            (self.workspace / path).parent.mkdir(parents=True, exist_ok=True)
            write_file(str(self.workspace / path), content)
        node = [
            str(languages.runtime("node").mounts[NODE] / "bin/node"),
            "--experimental-transform-types",
            "--disable-warning=ExperimentalWarning",
        ]
        causes: list[Literal["timeout", "killed"]] = []
        self._killed: Callable[[], None] = lambda: causes.append("killed")
        self._program = None
        if program.may_begin is not None:
            await program.may_begin()
        interpreter = [sys.executable, "-u"] if self._language == "python" else node
        call = program.invocation
        with tempfile.TemporaryFile() as stdin:
            stdin.write(call.stdin)
            stdin.seek(0)
            process = self._program = await asyncio.create_subprocess_exec(
                *(call.command or [*interpreter, str(entry) if call.cwd else entry.name, *call.args]),
                cwd=self.workspace / call.cwd,
                env={**guest.program_environment(self._language), **program.certificates, **program.env},
                stdin=stdin,
                stdout=PIPE,
                stderr=PIPE,
                start_new_session=True,
            )
        begun = time.monotonic()
        queue: asyncio.Queue[Output | None] = asyncio.Queue()
        truncated = {"stdout": False, "stderr": False}
        if causes:
            _signal(process, signal.SIGKILL)
        assert process.stdout
        assert process.stderr

        async def read(name: Literal["stdout", "stderr"], stream: asyncio.StreamReader) -> None:
            room = self.limits.output_bytes
            while data := await stream.read(1 << 16):
                truncated[name] |= len(data) > room
                if room:
                    queue.put_nowait(Output(name, data[:room]))
                room -= min(room, len(data))

        async def deadline() -> None:
            await asyncio.sleep(program.timeout)
            causes.append("timeout")
            _signal(process, signal.SIGTERM)
            await asyncio.sleep(_GRACE)
            _signal(process, signal.SIGKILL)

        async def end() -> None:
            clock = asyncio.create_task(deadline())
            await process.wait()
            clock.cancel()
            await asyncio.gather(*readers)
            queue.put_nowait(None)

        readers = [
            asyncio.create_task(read("stdout", process.stdout)),
            asyncio.create_task(read("stderr", process.stderr)),
        ]
        ending = asyncio.create_task(end())
        while event := await queue.get():
            yield event
        await ending
        code = process.returncode or 0
        entry.unlink(missing_ok=True)
        state_file = self.workspace / STATE_FILE
        regular = state_file.is_file() and not state_file.is_symlink()
        problem = None if regular or not os.path.lexists(state_file) else "is not a regular file"
        state = state_file.read_bytes() if regular else None
        if program.ephemeral:
            shutil.rmtree(self.workspace)
            self.workspace.mkdir()
        yield Ended(
            exit_code=124 if causes[:1] == ["timeout"] else 128 - code if code < 0 else code,
            cause=causes[0] if causes else "signal" if code < 0 else "exit",
            duration=time.monotonic() - begun,
            state=state,
            state_problem=problem,
            stdout_truncated=truncated["stdout"],
            stderr_truncated=truncated["stderr"],
            reaped=0,
            peak_memory_bytes=None,
            cpu_us=None,
            sandbox_alive=self.alive,
        )

    def held_files(self, device: int) -> HeldFiles | None:
        pids = [] if self._program is None else processes.below(self._program.pid)
        return processes.held(pids, device)

    def cpu_seconds(self) -> float:
        return 0.0 if self._program is None else processes.cpu_seconds(processes.below(self._program.pid))

    def wants_processor(self) -> bool:
        return self._program is not None and processes.want_processor(processes.below(self._program.pid))

    def memory_bytes(self) -> int:
        return 10 << 20

    async def kill_run(self) -> None:
        self._killed()
        _signal(self._program, signal.SIGKILL)

    async def stop_run(self) -> None:
        self._killed()
        _signal(self._program, signal.SIGTERM)

    async def process_supervisor(self) -> FakeSupervisor:
        if not self.alive:
            raise SandboxFailed("The sandbox is gone.")
        if self._supervisor is None or not self._supervisor.alive:
            self._supervisor = FakeSupervisor(self.workspace)
        return self._supervisor

    def kill(self) -> None:
        self.alive = False
        if self._supervisor is not None:
            self._supervisor.kill()
        _signal(self._program, signal.SIGKILL)

    async def put_away(self) -> None:
        self.kill()

    async def close(self) -> None:
        self.kill()
        remove_tree(self.workspace.parent)


class FakeDriver:
    """See ports.Driver."""

    name = "fake"
    self_tested: Iterable[Language] = ()

    def __init__(self, directory: Path, limits: Limits, *, cgroup_name: str) -> None:
        self.directory = directory / "live"
        self._made: list[FakeSandbox] = []

    async def clear(self) -> None:
        remove_tree(self.directory)

    async def start(self) -> None:
        pass

    def isolation(self) -> JsonObject:
        return {"driver": "fake", "summary": "none at all"}

    async def create(
        self, language: Language, limits: Limits, package_set: str | None = None, heir_to: Sandbox | None = None
    ) -> FakeSandbox:
        self._made.append(FakeSandbox(self.directory / f"sb-{secrets.token_hex(8)}", language, limits))
        return self._made[-1]

    async def stop(self) -> None:
        for sandbox in self._made:
            await sandbox.close()


def _signal(process: Process | None, number: int) -> None:
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
