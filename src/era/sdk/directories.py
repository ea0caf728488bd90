"""Local directories that are copied into sessions, and sessions' files that are copied into local ones.

A session's paths come from hostile code. So a directory is written one name of a path at a time, relative to the
descriptor of the directory above and never through a link; and a file is replaced by a complete one, or not at all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, Self

from era.sdk.errors import LocalError

if TYPE_CHECKING:
    import tarfile

    from pathspec import GitIgnoreSpec

type _Advance = Callable[[int], object] | None
"""Is told how many bytes more have been written."""

type _Write = Callable[[bytes], None]

_LEFT_OUT = {".git", ".session_data.json"}
"""Names that are no part of a project, in any directory: git's own, whose settings name programs that git runs, and
the session's data."""

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

type _Rules = tuple[tuple[str, GitIgnoreSpec], ...]
"""The .gitignore files above a path, outermost first: the directory that each is in (as `a/b/`), and its patterns."""


class Synced(NamedTuple):
    """What a push or pull did: paths that were copied and deleted, how many files there are in all, and how many were
    left out. A pull leaves out links, what is git's own, what can't be read, and names that aren't UTF-8; a push with
    `delete` doesn't delete what the session's git has, nor such names."""

    copied: list[str]
    deleted: list[str]
    total: int
    left_out: int


def is_left_out(path: str) -> bool:
    """Whether a path has a name that is left out. For many file systems `.GIT` is the same name."""
    return not _LEFT_OUT.isdisjoint(path.lower().split("/"))


def is_gits(path: str) -> bool:
    """Whether a path is git's own."""
    return ".git" in path.lower().split("/")


def files(top: str | os.PathLike[str]) -> Iterator[str]:
    """The regular files below `top` that no .gitignore leaves out, as sorted relative paths. Links aren't followed."""
    yield from _files_below(Path(top), "", ())


def digests(top: str | os.PathLike[str]) -> dict[str, str]:
    """The SHA-256 of each of these files, in hex, by path. Raises LocalError."""
    if not os.path.isdir(top):
        raise LocalError(f"{top} is no directory.")
    found = {}
    with Directory(top) as local:
        for path in files(top):
            digest = local.digest(path)
            if digest is None:
                raise LocalError(f"{Path(top) / path} can't be read.")
            found[path] = digest
    return found


def _files_below(top: Path, directory: str, rules: _Rules) -> Iterator[str]:
    """`files` for one directory, "" for `top` itself, else ending with a slash; paths are relative to `top`."""
    try:
        with os.scandir(top / directory) as iterator:
            entries = sorted(iterator, key=lambda entry: entry.name)
    except OSError as error:
        raise LocalError(f"{top / directory} can't be read: {error.strerror}") from None
    if any(entry.name == ".gitignore" and entry.is_file(follow_symlinks=False) for entry in entries):
        from pathspec import GitIgnoreSpec

        lines = (top / directory / ".gitignore").read_text(errors="replace").splitlines()
        rules = (*rules, (directory, GitIgnoreSpec.from_lines(lines)))
    for entry in entries:
        path = f"{directory}{entry.name}"
        is_directory = entry.is_dir(follow_symlinks=False)
        if is_left_out(entry.name) or _is_ignored(f"{path}/" if is_directory else path, rules):
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


class archive_of:  # noqa: N801  reads as a function
    """A temporary tar archive of some files below `top`, which is at `path`. A context manager. Raises LocalError."""

    def __init__(self, top: str | os.PathLike[str], paths: Iterable[str]) -> None:
        import tarfile
        import tempfile

        self._file = tempfile.NamedTemporaryFile(prefix="era-push-", suffix=".tar")  # noqa: SIM115  __exit__ closes it
        self.path = Path(self._file.name)
        try:
            with tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for path in paths:
                    try:
                        archive.add(Path(top) / path, path, recursive=False, filter=_without_owner)
                    except OSError as error:
                        raise LocalError(f"{Path(top) / path} can't be read: {error.strerror}") from None
                    # Or a second name of a file would be a hard link, which servers refuse.
                    archive.inodes.clear()  # type: ignore[attr-defined]  # the types leave it out
            self._file.flush()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def replacing(target: str | os.PathLike[str], advance: _Advance) -> Iterator[_Write]:
    """Write a local file through the function that this gives: all of it or nothing. Raises LocalError."""
    target = Path(target)
    if os.path.isdir(target):  # which a directory that may not be looked into isn't; opening it says why
        raise LocalError(f"{target} is a directory: name the file that is to be written.")
    temporary = target.with_name(f".era-{os.urandom(8).hex()}")
    try:
        try:
            with temporary.open("xb") as file:
                yield _writer(file, advance)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)  # once it is closed: Windows moves no open file
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise LocalError(f"{target} can't be written: {error.strerror}") from None


def _writer(file: IO[bytes], advance: _Advance) -> _Write:
    def write(piece: bytes) -> None:
        file.write(piece)
        if advance is not None:
            advance(len(piece))

    return write


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


class Directory:
    """A directory that a session's files are compared with and written to. A context manager."""

    def __init__(self, place: str | os.PathLike[str]) -> None:
        """Open it, and make it first if it doesn't exist. Raises LocalError."""
        path = Path(place)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._top = os.open(path, _OPEN_DIRECTORY & ~os.O_NOFOLLOW)
        except OSError as error:
            raise LocalError(f"{path} can't be used: {error.strerror}") from None
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
            import hashlib

            return hashlib.file_digest(file, "sha256").hexdigest()

    def different(self, etags: Mapping[str, str | None]) -> list[str]:
        """The paths whose files here don't have this content, or don't exist, or of whose content nothing is known."""
        return sorted(path for path, etag in etags.items() if etag is None or self.digest(path) != etag)

    @contextmanager
    def writing(self, path: str, advance: _Advance) -> Iterator[_Write]:
        """Write a file through the function that this gives: all of it or nothing. Directories on the way are made. A
        link of that name is replaced, not followed. Raises LocalError."""
        try:
            with self._parent(path, make=True) as (parent, name):
                temporary = f".era-{os.urandom(8).hex()}"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(temporary, flags, 0o666, dir_fd=parent)
                try:
                    with os.fdopen(fd, "wb") as file:
                        yield _writer(file, advance)
                    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(temporary, dir_fd=parent)
                    raise
        except OSError as error:
            raise LocalError(f"{self._path / path} can't be written: {error.strerror}") from None

    def remove(self, path: str) -> None:
        """Delete a file. Raises LocalError."""
        try:
            with self._parent(path, make=False) as (parent, name):
                os.unlink(name, dir_fd=parent)
        except OSError as error:
            raise LocalError(f"{self._path / path} can't be removed: {error.strerror}") from None

    @contextmanager
    def _parent(self, path: str, *, make: bool) -> Iterator[tuple[int, str]]:
        """A descriptor of the directory that a path's last name is in, and that name. `make` makes missing directories.

        Raises LocalError if the path could lead out of it, OSError if a part of it is a link or no directory.
        """
        *directories, name = path.split("/")
        for part in (*directories, name):
            if part in ("", ".", "..") or "\0" in part:
                raise LocalError(f"The server names a file that can't be: {path[:200]!r}.")
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
