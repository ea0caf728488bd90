"""How a run's program is called: its arguments, standard input and directory, or a command in its place."""

from __future__ import annotations

import errno
import os

from workspace import write_all

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn


class Invocation:
    """Fields of the header of a run, and its standard input. The default is what a spare is made for."""

    def __init__(self, header: Mapping[str, Any] | None = None, stdin: bytes = b"") -> None:
        header = header or {}
        self.args: list[str] = header.get("args", [])
        self.command: list[str] = header.get("command", [])
        self.directory: str = header.get("cwd", "")
        self.stdin = -1
        """A descriptor of a file in memory; -1 where the input is empty. A file, not a pipe, since nobody has to feed
        it, and since sys.stdin of a forked program was made for one."""

        if stdin:
            self.stdin = os.memfd_create("stdin")
            write_all(self.stdin, stdin)
            os.lseek(self.stdin, 0, os.SEEK_SET)

    @property
    def is_usual(self) -> bool:
        return not self.args and not self.command and not self.directory and self.stdin < 0

    def close(self) -> None:
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1


def execute(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Become `command`. Where that can't be, end as a shell does: 127 if there is no such program, else 126."""
    try:
        try:
            os.execvpe(command[0], command, environment)
        except OSError as problem:
            if problem.errno != errno.ENOEXEC:
                raise
            # A script without a first line that names its interpreter: a shell takes it for one of its own.
            os.execve("/bin/sh", ["/bin/sh", _found(command[0], environment), *command[1:]], environment)
    except OSError as problem:
        os.write(2, f"era: {command[0]}: {problem.strerror}\n".encode(errors="surrogateescape"))
        os._exit(127 if isinstance(problem, FileNotFoundError) else 126)


def _found(program: str, environment: dict[str, str]) -> str:
    """The path of a program that is there."""
    if "/" in program:
        return program
    paths = (f"{directory}/{program}" for directory in environment.get("PATH", os.defpath).split(":"))
    return next((path for path in paths if os.access(path, os.X_OK)), program)
