"""A backend of LangChain's deepagents that is a session: its files, and its shell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepagents.backends.protocol import (
    ExecuteResponse,
    FileDownloadResponse,
    FileUploadResponse,
)
from deepagents.backends.sandbox import BaseSandbox

from era.errors import EraError

if TYPE_CHECKING:
    from era.sdk.options import RunOptions
    from era.sdk.sync.sessions import Session

ROOT = "/workspace"
"""The session's working directory, as its programs and the agent see it."""

_CODES = {
    "no_file": "file_not_found",
    "is_a_directory": "is_directory",
    "is_a_link": "permission_denied",
    "bad_path": "invalid_path",
}


class SessionBackend(BaseSandbox):
    """A backend for `create_deep_agent(backend=…)`. Paths are absolute, and files below /workspace stay.

    Each command is a run of the session, with its limits and its timeout. What is outside of /workspace lasts no longer
    than a command does, so nothing can be uploaded there.
    """

    def __init__(self, session: Session, *, timeout: float | None = None) -> None:
        """`timeout` is in seconds, of commands that come without one; None: the session's own."""
        self._session = session
        self._timeout = timeout

    @property
    def id(self) -> str:
        return str(self._session.id)

    def execute(self, command: str, *, timeout: int | None = None) -> ExecuteResponse:
        """Run a line of shell. Its output and its errors come in the order in which they were written."""
        options: RunOptions = {"command": ["sh", "-c", f"exec 2>&1\n{command}"]}
        seconds = timeout or self._timeout
        if seconds is not None:
            options["timeout"] = seconds
        result = self._session.run(**options)
        return ExecuteResponse(output=result.stdout, exit_code=result.exit_code, truncated=result.stdout_truncated)

    def upload_files(self, files: list[tuple[str, bytes]]) -> list[FileUploadResponse]:
        return [FileUploadResponse(path=path, error=self._put(path, content)) for path, content in files]

    def download_files(self, paths: list[str]) -> list[FileDownloadResponse]:
        return [self._get(path) for path in paths]

    def _put(self, path: str, content: bytes) -> str | None:
        """Write a file; what went wrong, in the framework's words."""
        relative = _below(path)
        if relative is None:
            return _outside(path)
        try:
            self._session.files.write(relative, content)
        except EraError as error:
            return _code(error)
        return None

    def _get(self, path: str) -> FileDownloadResponse:
        relative = _below(path)
        if relative is None:
            return FileDownloadResponse(path=path, error=_outside(path))
        try:
            return FileDownloadResponse(path=path, content=self._session.files.read(relative))
        except EraError as error:
            return FileDownloadResponse(path=path, error=_code(error))


def _below(path: str) -> str | None:
    """An absolute path below the working directory as one of the session's; None for any other."""
    return path.removeprefix(f"{ROOT}/") if path.startswith(f"{ROOT}/") else None


def _outside(path: str) -> str:
    return "permission_denied" if path.startswith("/") else "invalid_path"


def _code(error: EraError) -> str:
    """An error in the framework's words, or the server's where it has none. Raises it where it isn't about the file."""
    if error.status in (0, 401, 403) or error.status >= 500:
        raise error
    return _CODES.get(error.code, f"{error.code}: {error.message}")
