"""Directories to and from sessions, for `era push` and `era pull`: only what changed, and nothing outside of them.

What is the same both sides know by the SHA-256 of its content, which the list of a session's files has. A session's
paths come from hostile code, so a pull opens them one name at a time, relative to a directory's descriptor and never
through a link; a file that it writes is complete or isn't there.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pathspec import GitIgnoreSpec

from era.client.transfers import TransferFailed

_CHUNK = 256 << 10
_NEVER = {".git", ".session_data.json"}
"""Names that are no part of a project wherever they are: git's own, and the session's data."""

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Differences:
    """Paths relative to both sides. `changed` are those that one side has otherwise than the other, or alone."""

    changed: list[str]
    surplus: list[str]
    """What only the side has that is to become like the other."""


def files(top: Path) -> Iterator[str]:
    """The plain files of a project, by relative path: no links, and not what its .gitignore files leave out."""
    yield from _below(top, "", ())


def _below(top: Path, where: str, rules: tuple[tuple[str, GitIgnoreSpec], ...]) -> Iterator[str]:
    try:
        with os.scandir(top / where) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise TransferFailed(f"{top / where} can't be read: {error.strerror}") from None
    if any(entry.name == ".gitignore" and entry.is_file(follow_symlinks=False) for entry in found):
        lines = (top / where / ".gitignore").read_text(errors="replace").splitlines()
        rules = (*rules, (where, GitIgnoreSpec.from_lines(lines)))
    for entry in found:
        path = f"{where}{entry.name}"
        is_directory = entry.is_dir(follow_symlinks=False)
        if entry.name in _NEVER or _is_ignored(f"{path}/" if is_directory else path, rules):
            continue
        if is_directory:
            yield from _below(top, f"{path}/", rules)
        elif entry.is_file(follow_symlinks=False):
            yield path


def _is_ignored(path: str, rules: tuple[tuple[str, GitIgnoreSpec], ...]) -> bool:
    """The innermost .gitignore that says anything decides."""
    for where, spec in reversed(rules):
        said = spec.check_file(path.removeprefix(where)).include
        if said is not None:
            return bool(said)
    return False


def differences(here: Mapping[str, str | None], there: Mapping[str, str | None]) -> Differences:
    """What must go from `here` to `there`; both say the digest of each path."""
    changed = [path for path, digest in here.items() if there.get(path) != digest]
    return Differences(sorted(changed), sorted(there.keys() - here.keys()))


@contextmanager
def packed(top: Path, paths: Iterable[str]) -> Iterator[Path]:
    """A tar archive of these files, as long as the block lasts."""
    with tempfile.NamedTemporaryFile(prefix="era-push-", suffix=".tar") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for path in paths:
                try:
                    archive.add(top / path, path, recursive=False, filter=_plain)
                except OSError as error:
                    raise TransferFailed(f"{top / path} can't be read: {error.strerror}") from None
        file.flush()
        yield Path(file.name)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


class Directory:
    """A directory that a session's files come into. Close it."""

    def __init__(self, path: Path) -> None:
        """Makes it where it isn't there."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._top = os.open(path, _OPEN_DIRECTORY & ~os.O_NOFOLLOW)
        except OSError as error:
            raise TransferFailed(f"{path} can't be used: {error.strerror}") from None
        self._path = path

    def close(self) -> None:
        os.close(self._top)

    def digest(self, path: str) -> str | None:
        """That of a plain file, None where there is none."""
        try:
            with self._parent(path, make=False) as (parent, name):
                fd = os.open(name, _OPEN_FILE, dir_fd=parent)
        except OSError:
            return None
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            return hashlib.file_digest(file, "sha256").hexdigest()

    def write(self, path: str, pieces: Iterable[bytes], advance: Callable[[int], None]) -> None:
        """Put a file, all of it or nothing. A link that has its name is replaced, not followed."""
        try:
            with self._parent(path, make=True) as (parent, name):
                temporary = f".era-{os.urandom(8).hex()}"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(temporary, flags, 0o666, dir_fd=parent)
                try:
                    with os.fdopen(fd, "wb") as file:
                        _copy(pieces, file, advance)
                    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(temporary, dir_fd=parent)
                    raise
        except OSError as error:
            raise TransferFailed(f"{self._path / path} can't be written: {error.strerror}") from None

    def remove(self, path: str) -> None:
        try:
            with self._parent(path, make=False) as (parent, name):
                os.unlink(name, dir_fd=parent)
        except OSError as error:
            raise TransferFailed(f"{self._path / path} can't be removed: {error.strerror}") from None

    @contextmanager
    def _parent(self, path: str, *, make: bool) -> Iterator[tuple[int, str]]:
        *directories, name = path.split("/")
        for part in (*directories, name):
            if part in ("", ".", "..") or "\0" in part:
                raise TransferFailed(f"The server names a file that can't be: {path[:200]!r}.")
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


def _copy(pieces: Iterable[bytes], file: IO[bytes], advance: Callable[[int], None]) -> None:
    for piece in pieces:
        file.write(piece)
        advance(len(piece))
