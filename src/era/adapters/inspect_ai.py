"""A sandbox of Inspect that is a session: `sandbox="era"` of a task or a sample.

Commands are processes of a live session, not runs: several may go on at a time, what one leaves in /tmp is there for
the next, and servers that tools start stay.
"""

from __future__ import annotations

import errno
import os
import shlex
from typing import TYPE_CHECKING, Any, Literal, Self, overload
from uuid import uuid4

import anyio
from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxConnection,
    SandboxEnvironment,
    SandboxEnvironmentConfigType,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    SandboxUserUnsupportedError,
    sandboxenv,
)
from pydantic import BaseModel, ConfigDict

from era.errors import Conflict, NotFound
from era.sdk.aio.client import AsyncEra
from era.sdk.events import Gap, ProcessExit

if TYPE_CHECKING:
    from era.sdk.aio.processes import AsyncProcess
    from era.sdk.aio.sessions import AsyncSession
    from era.sdk.options import ProcessOptions

ROOT = "/workspace"
LABEL = "inspect_ai"
"""The name in a session's metadata under which its task is, so that what was left behind can be found."""

_KEEPER = "inspect-keeper"
_DAY = 86_400
_PIECE = 1 << 20
"""Bytes of input that are sent at a time."""

_LONG = 500_000
"""Characters of a command from which on it is sent as a file: the server bounds the words of a process."""

_IN = 'cd -- "$1" || exit 1; shift; exec "$@"'
_IS_DIRECTORY, _MISSING, _REFUSED, _TOO_LARGE = 91, 92, 93, 94
_WRITE = f"""if [ -d "$1" ]; then exit {_IS_DIRECTORY}; fi
if [ -e "$1" ] && [ ! -w "$1" ]; then exit {_REFUSED}; fi
mkdir -p -- "$(dirname -- "$1")" || exit {_REFUSED}
if [ ! -e "$1" ] && [ ! -w "$(dirname -- "$1")" ]; then exit {_REFUSED}; fi
exec cat > "$1"
"""
# Files are read over the API, which keeps pace with any reader; those outside of the working directory as a copy in it.
_READ = f"""if [ -d "$1" ]; then exit {_IS_DIRECTORY}; fi
if [ ! -e "$1" ]; then exit {_MISSING}; fi
if [ ! -r "$1" ]; then exit {_REFUSED}; fi
if [ "$(stat -L -c %s -- "$1")" -gt "$2" ]; then exit {_TOO_LARGE}; fi
file=$(realpath -- "$1")
case $file in {ROOT}/*) ;; *) cp -- "$file" "$3" || exit; file=$3 ;; esac
printf %s "$file"
"""


class EraSandboxConfig(BaseModel):
    """What a sandbox's session is made with. Fields are those of the SDK's `era.session(…)`; None: the server's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = None
    """The server; None: ERA_URL, else http://127.0.0.1:8787. The key is in ERA_API_KEY and nowhere else."""

    language: str = "python"
    setup: dict[str, Any] | None = None
    """Packages and commands, such as `{"pip": ["numpy"]}`: installed once, shared by all samples."""

    limits: dict[str, int | float] | None = None
    isolation: str | None = None
    allow_internet: bool = False

    def __hash__(self) -> int:
        """Inspect keeps what it has resolved by configuration, which has dictionaries in it."""
        return hash(self.model_dump_json())

    def options(self) -> dict[str, Any]:
        given = self.model_dump(exclude={"url", "language"})
        return {name: value for name, value in given.items() if value is not None}


@sandboxenv(name="era")
class EraSandboxEnvironment(SandboxEnvironment):
    """A session as a sample's sandbox. Its programs have one user; another can't be asked for."""

    def __init__(self, era: AsyncEra, session: AsyncSession) -> None:
        super().__init__()
        self._era = era
        self._session = session

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        return EraSandboxConfig(**config)

    @classmethod
    def default_concurrency(cls) -> int | None:
        """How many samples have a sandbox at a time: a server bounds the sessions that are live."""
        return 8

    @classmethod
    async def open(cls, task_name: str, config: EraSandboxConfig) -> Self:
        """Make a sandbox. Its session is deleted by `close`, and by its `ttl` of a day if that never comes."""
        era = AsyncEra(config.url)
        try:
            session = await era.sessions.create(
                config.language, metadata={LABEL: task_name}, ttl=_DAY, storage=False, **config.options()
            )
            try:
                await session.process(["sleep", "infinity"], tag=_KEEPER)  # so that the session stays live
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await session.delete(purge=True)
                raise
        except BaseException:
            with anyio.CancelScope(shield=True):
                await era.close()
            raise
        return cls(era, session)

    async def close(self) -> None:
        """Delete the session, whatever runs in it."""
        try:
            await self._session.delete(purge=True)
        except NotFound:
            pass
        finally:
            await self._era.close()

    @classmethod
    async def sample_init(
        cls, task_name: str, config: SandboxEnvironmentConfigType | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        if isinstance(config, str):
            raise ValueError("The configuration of the sandbox era is an EraSandboxConfig, not a file.")
        return {"default": await cls.open(task_name, config or EraSandboxConfig())}

    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,
        config: SandboxEnvironmentConfigType | None,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        with anyio.CancelScope(shield=True):
            for environment in environments.values():
                await environment.as_type(cls).close()

    @classmethod
    async def cli_cleanup(cls, id: str | None) -> None:
        """Delete the session of this id, or all that Inspect's sandboxes have left on the server that ERA_URL names."""
        async with AsyncEra() as era:
            for session in await era.sessions.infos():
                if LABEL in session.metadata and id in (None, session.id):
                    await era.sessions.delete(session.id, purge=True)

    async def connection(self, *, user: str | None = None) -> SandboxConnection:
        if user is not None:
            raise SandboxUserUnsupportedError(_ONE_USER)
        command = f"era shell {shlex.quote(self._session.id)} --server {shlex.quote(self._era.url)}"
        return SandboxConnection(type="era", command=command, container=self._session.id)

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        if user is not None:
            raise SandboxUserUnsupportedError(_ONE_USER)
        content = input.encode() if isinstance(input, str) else input
        result = await self._command(cmd, content, cwd or ".", env or {}, timeout)
        if result.returncode == 126 and "ermission denied" in result.stderr:
            raise PermissionError(errno.EACCES, result.stderr.strip(), cmd[0])
        return result

    async def write_file(self, file: str, contents: str | bytes) -> None:
        content = contents.encode() if isinstance(contents, str) else contents
        result = await self._script(_WRITE, content, _absolute(file))
        _check(result, file)

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        copy = f".inspect-{uuid4().hex}"
        most = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        result = await self._script(_READ, None, _absolute(file), str(most), f"{ROOT}/{copy}")
        if result.returncode == _TOO_LARGE:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
        _check(result, file)
        path = result.stdout.removeprefix(f"{ROOT}/")
        try:
            content = await self._session.files.read(path)
        except NotFound:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file) from None
        finally:
            if path == copy:
                await self._session.files.remove(copy)
        return content.decode() if text else content

    async def _script(self, script: str, content: bytes | None, *arguments: str) -> ExecResult[str]:
        return await self._command(["/bin/sh", "-c", script, "sh", *arguments], content, ".", {}, None)

    async def _command(
        self, command: list[str], content: bytes | None, cwd: str, env: dict[str, str], timeout: float | None
    ) -> ExecResult[str]:
        """Run a command with this input to its end.

        Raises TimeoutError, OutputLimitExceededError, and SandboxUnavailableError where the session is gone.
        """
        options: ProcessOptions = {"env": env, "stdin": content is not None}
        if timeout is not None:
            options["timeout"] = timeout
        whole = ["/bin/sh", "-c", _IN, "sh", cwd, *command]
        try:
            if sum(map(len, command)) > _LONG:
                script = f".inspect-{uuid4().hex}"
                await self._session.files.write(
                    script, f"rm -f {script}\nset -- {shlex.join(whole[4:])}\n{_IN}\n".encode()
                )
                whole = ["/bin/sh", script]
            process = await self._session.process(whole, **options)
        except NotFound as error:
            raise SandboxUnavailableError(f"{error.message} {error.hint}".strip()) from error
        try:
            async with anyio.create_task_group() as group:
                if content is not None:
                    group.start_soon(_feed, process, content)
                written, end = await _follow(process)
                group.cancel_scope.cancel()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await process.stop()
            if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                raise error.exceptions[0] from None
            raise
        if end.exit_code == 124 and end.reason:
            raise TimeoutError(end.reason)
        code = end.exit_code if end.exit_code is not None else 1
        stdout, stderr = (bytes(written[name]).decode(errors="replace") for name in ("stdout", "stderr"))
        return ExecResult(success=code == 0, returncode=code, stdout=stdout, stderr=stderr)


_ONE_USER = "Programs of an ERA session have one user, and no other can be chosen."


async def _feed(process: AsyncProcess, content: bytes) -> None:
    """Write a process's input, and end it. A process may end before it has read all."""
    try:
        for start in range(0, len(content), _PIECE):
            await process.write(content[start : start + _PIECE])
        await process.close_stdin()
    except Conflict:
        pass


async def _follow(process: AsyncProcess) -> tuple[dict[str, bytearray], ProcessExit]:
    """What a process writes, and its end. Raises OutputLimitExceededError."""
    most = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE
    written = {"stdout": bytearray(), "stderr": bytearray()}
    async for event in process.events():
        if isinstance(event, ProcessExit):
            return written, event
        if isinstance(event, Gap) or len(written[event.type]) + len(event.data) > most:
            shown = written["stdout"].decode(errors="replace")
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, shown)
        written[event.type] += event.data
    raise SandboxUnavailableError("The session went away while a command was running in it.")


def _absolute(file: str) -> str:
    return file if file.startswith("/") else f"{ROOT}/{file}"


def _check(result: ExecResult[str], file: str) -> None:
    """Raise what a script of ours that failed means, in Python's words."""
    number = {_IS_DIRECTORY: errno.EISDIR, _MISSING: errno.ENOENT, _REFUSED: errno.EACCES}.get(result.returncode)
    if number is not None:
        raise OSError(number, os.strerror(number).lower(), file)
    if not result.success:
        raise OSError(errno.EIO, result.stderr.strip() or f"failed with {result.returncode}", file)
