"""What a model can do in a session, as functions: their names, arguments and docstrings are what it is told.

They never fail silently. What the service refuses comes back as text that says what to do, and output that is too long
says how much of it is missing, and where the whole is or what was kept of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from era.common.run_notes import run_notes
from era.errors import EraError

if TYPE_CHECKING:
    from era.sdk.aio.sessions import AsyncSession
    from era.sdk.answers import RunResult
    from era.sdk.options import RunOptions

MAX_CHARACTERS = 20_000
"""How much of an output or a file a model is shown; the rest of a longer one is left out of its middle."""

_MAX_BYTES = 16 << 20
"""Of a file, which is in memory as a whole before its middle is left out."""

_MAX_FILES = 200

type ToolFunction = Callable[..., Awaitable[str]]


class SessionTools:
    """The tools of one session. What they raise is an EraError that no answer to a model could help, such as a server
    that is away."""

    def __init__(self, session: AsyncSession, *, timeout: float | None = None) -> None:
        """`timeout` is in seconds, of each run; None: the session's own."""
        self._session = session
        self._timeout = timeout

    def functions(self) -> list[ToolFunction]:
        return [self.run_code, self.run_command, self.read_file, self.write_file, self.list_files]

    async def run_code(self, code: str) -> str:
        """Run a program in the sandbox, in the session's language. Files stay for later programs, variables don't.

        Args:
            code: The whole program. Print what you want to see.
        """
        return await self._run(code, None)

    async def run_command(self, command: str) -> str:
        """Run a shell command in the sandbox, in the same directory as programs.

        Args:
            command: A line for `sh -c`.
        """
        return await self._run(None, command)

    async def read_file(self, path: str) -> str:
        """Read a text file of the sandbox.

        Args:
            path: Relative, separated by slashes.
        """
        content = bytearray()
        pieces: Any = self._session.files.pieces(path)  # a generator, which the types don't say
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    content += piece
                    if len(content) > _MAX_BYTES:
                        break
        except EraError as error:
            return _refused(error)
        if len(content) > _MAX_BYTES:
            return f"{path} has over {_MAX_BYTES >> 20} MiB, too much for this tool. run_command can show parts of it."
        try:
            return _cut(content.decode(), f"run_command can show parts of {path}")
        except UnicodeDecodeError:
            return f"{path} is no text: {len(content)} bytes. A program can read it."

    async def write_file(self, path: str, content: str) -> str:
        """Write a text file in the sandbox, in place of the one that is there.

        Args:
            path: Relative, separated by slashes. Directories on the way are made.
            content: The whole file.
        """
        try:
            await self._session.files.write(path, content)
        except EraError as error:
            return _refused(error)
        return f"{path} is written: {len(content.encode())} bytes."

    async def list_files(self, prefix: str = "") -> str:
        """List the files of the sandbox with their sizes.

        Args:
            prefix: Only paths that begin with this.
        """
        try:
            files = await self._session.files.list(prefix)
        except EraError as error:
            return _refused(error)
        lines = [f"{file.path} ({file.size} bytes)" for file in files[:_MAX_FILES]]
        if len(files) > _MAX_FILES:
            lines.append(f"… and {len(files) - _MAX_FILES} more. A prefix lists some of them.")
        return "\n".join(lines) or "There are no such files."

    async def _run(self, code: str | None, command: str | None) -> str:
        options: RunOptions = {}
        if command is not None:
            options["command"] = command
        if self._timeout is not None:
            options["timeout"] = self._timeout
        try:
            result = await self._session.run(code, **options)
        except EraError as error:
            return _refused(error)
        return _shown(result)


def _shown(result: RunResult) -> str:
    """A run's result as a model reads it: its output, how it ended unless all is well, and what is missing."""
    parts = [_cut(result.stdout, _whole(result, result.stdout_truncated))]
    if result.stderr:
        parts.append(f"[stderr]\n{_cut(result.stderr, _whole(result, result.stderr_truncated))}")
    if result.status != "ok":
        parts.append(f"[{result.status}, exit code {result.exit_code}]")
    parts += run_notes(result.answer)
    return "\n".join(part.rstrip("\n") for part in parts if part) or "[ok, nothing was printed]"


def _whole(result: RunResult, is_truncated: bool) -> str:
    """Where there is more of a run's output than is shown."""
    more = "what was kept" if is_truncated else "the whole"
    return f"{more} is the output of {result.run_id}; a program can write what it finds to a file and show parts"


def _cut(text: str, whole: str) -> str:
    """A text's beginning and end. `whole` says how to see the rest."""
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters are left out here; {whole} …]\n{text[-half:]}"


def _refused(error: EraError) -> str:
    """An error as a model reads it. Raises it again if there was no answer of the server's: a model can't help that."""
    if not 400 <= error.status < 500 or error.status in (401, 403):
        raise error
    hint = "" if "/api/" in error.hint else error.hint  # which calls of the API there are, a model needn't know
    return f"[{error.code}] {error.message} {hint}".strip()
