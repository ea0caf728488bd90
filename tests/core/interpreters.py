"""Contexts whose interpreters are plain processes of this machine, without a sandbox."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from era.core.live.context import CellOutcome, Context
from era.core.models import JsonObject
from era.core.process import ProcessEnded, ProcessOutput, ProcessStream, TerminalSize
from era.core.program import CellEvent, Invocation, Output, Program
from era.drivers import processes
from era.languages import ipython, node
from era.languages.python import base_executable
from era.languages.typescript import LANGUAGE as TYPESCRIPT

GUEST = Path(__file__).resolve().parents[2] / "src/era/guest"


async def until_ended(
    events: asyncio.Queue[ProcessOutput | ProcessEnded],
) -> AsyncIterator[ProcessOutput | ProcessEnded]:
    """The events of a process as they come, the last of which is its end."""
    while True:
        event = await events.get()
        yield event
        if isinstance(event, ProcessEnded):
            return


class LocalProcess:
    """A ports.GuestProcess of this machine's."""

    def __init__(self, process: asyncio.subprocess.Process, channel: socket.socket) -> None:
        self.pid = process.pid
        self._process = process
        self._channel = channel
        self._events: asyncio.Queue[ProcessOutput | ProcessEnded] = asyncio.Queue()
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            asyncio.create_task(self._read(process.stdout, "stdout")),
            asyncio.create_task(self._read(process.stderr, "stderr")),
            asyncio.create_task(self._read_channel()),
        ]
        self._ending = asyncio.create_task(self._end())

    @classmethod
    async def start(cls, command: list[str], environment: Mapping[str, str], directory: Path) -> LocalProcess:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        fd = theirs.fileno()

        def connect() -> None:
            os.setsid()
            os.dup2(fd, 3)

        process = await asyncio.create_subprocess_exec(
            *command,
            env={"PATH": os.environ["PATH"], "HOME": str(directory), **environment},
            cwd=directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=connect,
            pass_fds=(3,),
        )
        theirs.close()
        return cls(process, ours)

    def events(self) -> AsyncIterator[ProcessOutput | ProcessEnded]:
        return until_ended(self._events)

    async def write(self, data: bytes) -> None:
        raise BrokenPipeError

    async def close_stdin(self) -> None: ...

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._channel, data)

    async def signal(self, number: int, *, group: bool = True) -> None:
        if self._process.returncode is None:
            os.killpg(self.pid, number)

    async def kill(self) -> None:
        await self.signal(signal.SIGKILL)

    async def resize(self, size: TerminalSize) -> None: ...

    async def _read(self, reader: asyncio.StreamReader, stream: ProcessStream) -> None:
        while data := await reader.read(1 << 16):
            self._events.put_nowait(ProcessOutput(stream, data))

    async def _read_channel(self) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._channel, 1 << 16):
            for _ in range(4):  # what was read of the pipes before comes before, as from the supervisor
                await asyncio.sleep(0)
            self._events.put_nowait(ProcessOutput("channel", data))

    async def _end(self) -> None:
        code = await self._process.wait()
        await asyncio.wait(self._readers[:2], timeout=0.2)  # what it has left behind may hold the pipes
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._channel.close()
        number = -code if code < 0 else None
        self._events.put_nowait(
            ProcessEnded(128 - code if code < 0 else code, number, "exit" if number is None else "signal")
        )


def python_command() -> list[str]:
    """Python's kernel. IPython is staged first, where that hasn't been done."""
    place = ipython.packages().ready_place()
    assert place is not None
    return [str(base_executable()), "-u", str(GUEST / "python_kernel.py"), str(place / "ready")]


def node_command(language: str = "node") -> list[str]:
    runtime = node.LANGUAGE.find() if language == "node" else TYPESCRIPT.find()
    assert runtime.kernel is not None
    program = runtime.mounts[node.NODE] / "bin/node"
    return [str(program), *runtime.kernel.command[1:-2], str(GUEST / "node_kernel.cjs"), language]


class Written:
    """What a cell wrote, by stream, and what it showed."""

    def __init__(self) -> None:
        self.stdout = self.stderr = ""
        self.events: list[JsonObject] = []
        """Events and output in order; output of one stream that comes in pieces is one `stdout` or `stderr`."""

    async def write(self, output: Output | CellEvent) -> None:
        if isinstance(output, CellEvent):
            self.events.append(json.loads(output.content))
            return
        content = output.data.decode()
        if output.stream == "stdout":
            self.stdout += content
        else:
            self.stderr += content
        if self.events and self.events[-1]["type"] == output.stream:
            self.events[-1]["content"] += content
        else:
            self.events.append({"type": output.stream, "content": content})


class Cells:
    """Executes cells in one context."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def run(
        self,
        code: str,
        *,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
        cwd: str = "",
        timeout: float = 60,
        output_bytes: int = 1 << 20,
        written: Written | None = None,
    ) -> tuple[CellOutcome, Written]:
        """What the cell writes is added to `written`, if that is given."""
        written = Written() if written is None else written
        invocation = Invocation(stdin=stdin.encode(), cwd=cwd)
        cell = Program(code.encode(), env=env or {}, timeout=timeout, invocation=invocation)
        return await self.context.execute(cell, output_bytes, written.write), written

    async def value(self, code: str, **options: str) -> str:
        """The text of the cell's main result, which it must have."""
        outcome, written = await self.run(code, stdin=options.get("stdin", ""))
        assert outcome.error is None, (outcome.error, written.stderr)
        [text] = [result["data"]["text/plain"] for result in outcome.results if result["main"]]
        return str(text)


@asynccontextmanager
async def interpreter(
    command: list[str], directory: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Cells]:
    """A context with this interpreter, and with `directory` as its working directory."""
    process = await LocalProcess.start(command, environment or {}, directory)
    own = [process.pid]
    cpu_seconds, wants_processor = partial(processes.cpu_seconds, own), partial(processes.want_processor, own)
    context = Context("c", "python", process, cpu_seconds, wants_processor)
    try:
        await context.ready()
        yield Cells(context)
    finally:
        async with asyncio.timeout(60):  # one that isn't killed would never end
            await context.close("The test is over.")


def stage_ipython() -> None:
    ipython.prepare()


type Interpreter = Callable[[], object]

if __name__ == "__main__":
    sys.exit("This is for tests.")
