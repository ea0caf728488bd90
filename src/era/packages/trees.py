"""Directories of installed packages: checked, and given the owner and modes to be shared.

What tools unpacked or built comes from strangers. No link in it is followed, and nothing is accepted but directories,
regular files and links that stay within it. Their owners and modes are settled here.

For the blob store each package set is archived: a tar whose SHA-256 is the set's digest. Equal content gives an equal
archive, whoever made it, when and where: entries are sorted and have no times and no owners, and of their modes only
whether they are executable. Bytecode isn't included; it is compiled again where the archive is unpacked.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
import stat
import tarfile
from collections.abc import Buffer
from contextlib import ExitStack
from pathlib import Path

from era.core.setup.package_sets import SetupFailed
from era.core.trees import trees
from era.packages.processes import too_large


def check(directory: Path, *, most_files: int, most_bytes: int, separate: bool = False) -> None:
    """Check what is in a directory. Raises SetupFailed for entries that no package may have, more than `most_files` of
    them, or more than `most_bytes`; OSError for what can't be read. Hard links are refused. With `separate`, as builds
    leave some, each name gets a copy instead."""
    count = size = 0
    shared = []
    for where, directories, files in os.walk(directory, onerror=_fail):
        for name in (*directories, *files):
            path = os.path.join(where, name)
            relative = os.path.relpath(path, directory)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                _check_link(directory, relative)
            elif stat.S_ISREG(status.st_mode):
                size += max(status.st_size, status.st_blocks * 512)  # the first is more where it has holes
                if status.st_nlink != 1 and not separate:
                    raise SetupFailed(f"A package's file has a second name (a hard link): {relative[:200]!r}.")
                if status.st_nlink != 1:
                    shared.append(path)
            elif not stat.S_ISDIR(status.st_mode):
                raise SetupFailed(f"A package has something that is no file: {relative[:200]!r}.")
        count += len(directories) + len(files)
        if count > most_files:
            raise SetupFailed(f"The packages have more than {most_files} files. The server's ERA_FILES sets the bound.")
        if size > most_bytes:
            raise too_large(most_bytes)
    for path in shared:
        shutil.copy(path, f"{path}.copy")
        os.rename(f"{path}.copy", path)


def move_out(workspace: Path, path: str, target: Path) -> None:
    """Move the directory `path` out of `workspace`, the working directory of a build, to `target`. No link on its path
    is followed. The caller must not look into `target` before the sandbox is gone: its programs could still change it.
    Raises SetupFailed where there is no such directory."""
    *parents, name = path.split("/")
    remove(target)
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(trees.opened_root(workspace))
            for parent in parents:
                fd = stack.enter_context(trees.opened_directory(fd, parent))
            os.rename(name, target, src_dir_fd=fd)
        except OSError as error:
            raise SetupFailed(f"What was built can't be found: {error.strerror}.") from error
    if not _is_directory(target):
        target.unlink()
        raise SetupFailed("What was built is no directory.")


def own(directory: Path, owner: int | None) -> None:
    """Make `owner` (None: the present one) the owner of a directory and all that is in it, with modes 755 and 644.
    Raises OSError."""
    # From the top down, since a directory without read permission can't be listed before it is changed.
    _own(os.fspath(directory), owner)
    for where, directories, files in os.walk(directory, onerror=_fail):
        for name in (*directories, *files):
            _own(os.path.join(where, name), owner)


def _own(path: str, owner: int | None) -> None:
    status = os.lstat(path)
    if owner is not None:
        os.lchown(path, owner, owner)
    if stat.S_ISDIR(status.st_mode):
        os.chmod(path, 0o755)  # noqa: S103 - everybody may read it, and nobody else write
    elif stat.S_ISREG(status.st_mode):
        os.chmod(path, 0o755 if status.st_mode & 0o111 else 0o644)


def remove(directory: Path) -> None:
    """Remove a directory, whatever its content and modes are."""
    if _is_directory(directory):
        directory.chmod(0o700)
    for where, directories, _ in os.walk(directory):
        for name in directories:
            path = Path(where, name)
            if _is_directory(path):
                path.chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)


def set_aside(directory: Path) -> list[Path]:
    """Rename all that a directory has, within it. The new paths. Raises OSError."""
    return [path.rename(path.with_name(f"gone-{secrets.token_hex(8)}")) for path in list(directory.iterdir())]


def drop_bytecode(directory: Path) -> None:
    """Remove every `__pycache__` in a directory that was checked. Raises OSError."""
    for where, directories, _ in os.walk(directory, onerror=_fail):
        if "__pycache__" in directories:
            directories.remove("__pycache__")
            drop(Path(where, "__pycache__"))


def drop(path: Path, *, is_ours: bool = True) -> None:
    """Remove a file, a link or a directory. Where it isn't ours, somebody may put links into it meanwhile: these aren't
    followed, and no modes are changed. Raises OSError."""
    if not _is_directory(path):
        path.unlink()
    elif is_ours:
        remove(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _is_directory(path: Path) -> bool:
    """Whether it is a directory itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _fail(error: OSError) -> None:
    raise error


def _check_link(directory: Path, name: str) -> None:
    """Raises SetupFailed for a link that leads out of the directory, also through other links."""
    top, path = os.path.realpath(directory), os.path.join(directory, name)
    if os.path.isabs(os.readlink(path)) or not f"{os.path.realpath(path)}/".startswith(f"{top}/"):
        raise SetupFailed(f"A package has a link that leads out of it: {name[:200]!r}.")


LOCK = "lock.json"
"""The first entry: the lock, which lists the packages (core/setup/package_sets.py)."""

_BUFFER = 64 << 10


class Damaged(Exception):
    """The blob of this digest isn't such an archive."""


def pack(directory: Path, file: Path) -> str:
    """Archive a directory, which has been through trees.check and trees.own, as `file`. Returns its SHA-256 in hex.
    Raises OSError."""
    with file.open("xb", buffering=0) as opened:
        hashed = _Hashed(opened)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_BUFFER) as archive:
            for name in (LOCK, *_names(directory)):
                path = directory / name
                entry = tarfile.TarInfo(name)
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode):
                    entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(path)
                    archive.addfile(entry)
                elif stat.S_ISDIR(status.st_mode):
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(entry)
                else:
                    entry.size, entry.mode = status.st_size, status.st_mode & 0o777
                    with path.open("rb") as content:
                        archive.addfile(entry, content)
    return hashed.digest()


def unpack(fd: int, digest: str, directory: Path) -> None:
    """Unpack the archive of this digest from `fd` into `directory`. Raises Damaged, before anything is written, if the
    content has another digest; OSError."""
    if trees.digest_of(fd) != digest:
        raise Damaged(digest)
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb", closefd=False) as file, tarfile.open(fileobj=file, mode="r|", bufsize=_BUFFER) as archive:
        archive.extractall(directory, filter="data")


def _names(directory: Path) -> list[str]:
    """The paths of everything below a directory but the lock, each directory before its content."""
    paths = (
        os.path.relpath(os.path.join(where, name), directory)
        for where, directories, files in os.walk(directory)
        for name in (*directories, *files)
    )
    return sorted(path for path in paths if path != LOCK)


class _Hashed(io.RawIOBase):
    """A file that is written once, from begin to end, and hashed meanwhile."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._hasher = hashlib.sha256()

    def write(self, content: Buffer, /) -> int:
        self._hasher.update(content)
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]
        return memoryview(content).nbytes

    def digest(self) -> str:
        return self._hasher.hexdigest()
