"""Local directories that `era push` reads and `era pull` writes.

A session's paths come from hostile code. So a directory is written one name of a path at a time, relative to the
descriptor of the directory above and never through a link; and a file is replaced by a complete one, or not at all.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from era.client.failure import Failure

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

_LEFT_OUT = {".git", ".session_data.json"}
"""Names that are no part of a project, in any directory: git's own, and the session's data."""

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

type _Rules = tuple[tuple[str, GitIgnoreSpec], ...]
"""The .gitignore files above a path, outermost first: the directory that each is in (as `a/b/`), and its patterns."""


def files(top: Path) -> Iterator[str]:
    """The regular files below `top` that no .gitignore leaves out, as sorted relative paths. Links aren't followed."""
    yield from _files_below(top, "", ())


def _files_below(top: Path, directory: str, rules: _Rules) -> Iterator[str]:
    """`files` for one directory, "" for `top` itself, else ending with a slash; paths are relative to `top`."""
    try:
        with os.scandir(top / directory) as iterator:
            entries = sorted(iterator, key=lambda entry: entry.name)
    except OSError as error:
        raise Failure(f"{top / directory} can't be read: {error.strerror}") from None
    if any(entry.name == ".gitignore" and entry.is_file(follow_symlinks=False) for entry in entries):
        from pathspec import GitIgnoreSpec

        lines = (top / directory / ".gitignore").read_text(errors="replace").splitlines()
        rules = (*rules, (directory, GitIgnoreSpec.from_lines(lines)))
    for entry in entries:
        path = f"{directory}{entry.name}"
        is_directory = entry.is_dir(follow_symlinks=False)
        if entry.name in _LEFT_OUT or _is_ignored(f"{path}/" if is_directory else path, rules):
            continue
        if is_directory:
            yield from _files_below(top, f"{path}/", rules)
        elif entry.is_file(follow_symlinks=False):
            yield path


def _is_ignored(path: str, rules: _Rules) -> bool:
    """Whether git ignores a path. The innermost .gitignore that has a matching pattern decides."""
    for directory, spec in reversed(rules):
        include = spec.check_file(path.removeprefix(directory)).include
        if include is not None:
            return bool(include)
    return False


@contextmanager
def temporary_tar(top: Path, paths: Iterable[str]) -> Iterator[Path]:
    """A temporary tar archive of these files, paths relative to `top`."""
    with tempfile.NamedTemporaryFile(prefix="era-push-", suffix=".tar") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for path in paths:
                try:
                    archive.add(top / path, path, recursive=False, filter=_without_owner)
                except OSError as error:
                    raise Failure(f"{top / path} can't be read: {error.strerror}") from None
        file.flush()
        yield Path(file.name)


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


class Directory:
    """A directory that a session's files are compared with and written to. A context manager."""

    def __init__(self, path: Path) -> None:
        """Open it, and make it first if it doesn't exist. Raises Failure."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._top = os.open(path, _OPEN_DIRECTORY & ~os.O_NOFOLLOW)
        except OSError as error:
            raise Failure(f"{path} can't be used: {error.strerror}") from None
        self._path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._top)

    def digest(self, path: str) -> str | None:
        """The SHA-256 of a regular file's content, in hex; None if there is no such file."""
        try:
            with self._parent(path, make=False) as (parent, name):
                fd = os.open(name, _OPEN_FILE, dir_fd=parent)
        except OSError:
            return None
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            return hashlib.file_digest(file, "sha256").hexdigest()

    def write(self, path: str, chunks: Iterable[bytes], advance: Callable[[int], None]) -> None:
        """Write a file: all of it or nothing. A link of that name is replaced, not followed. Raises Failure.

        Parameters
        ----------
        path
            Relative to this directory; directories on the way are made.
        chunks
            The content.
        advance
            Called with the number of bytes of each chunk written.
        """
        try:
            with self._parent(path, make=True) as (parent, name):
                temporary = f".era-{os.urandom(8).hex()}"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(temporary, flags, 0o666, dir_fd=parent)
                try:
                    with os.fdopen(fd, "wb") as file:
                        for chunk in chunks:
                            file.write(chunk)
                            advance(len(chunk))
                    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(temporary, dir_fd=parent)
                    raise
        except OSError as error:
            raise Failure(f"{self._path / path} can't be written: {error.strerror}") from None

    def remove(self, path: str) -> None:
        """Delete a file. Raises Failure."""
        try:
            with self._parent(path, make=False) as (parent, name):
                os.unlink(name, dir_fd=parent)
        except OSError as error:
            raise Failure(f"{self._path / path} can't be removed: {error.strerror}") from None

    @contextmanager
    def _parent(self, path: str, *, make: bool) -> Iterator[tuple[int, str]]:
        """A descriptor of the directory that a path's last name is in, and that name. `make` makes missing directories.

        Raises Failure if the path could lead out of this directory, OSError if a part of it is a link or no directory.
        """
        *directories, name = path.split("/")
        for part in (*directories, name):
            if part in ("", ".", "..") or "\0" in part:
                raise Failure(f"The server names a file that can't be: {path[:200]!r}.")
        here = os.dup(self._top)
        try:
            for part in directories:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=here)
                below = os.open(part, _OPEN_DIRECTORY, dir_fd=here)
                os.close(here)
                here = below
            yield here, name
        finally:
            os.close(here)
