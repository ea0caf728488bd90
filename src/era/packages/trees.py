"""Directories of installed packages: looked at, made fit to be shared.

What tools unpacked or built comes from strangers. Nothing of it is followed, and nothing is kept but directories, plain
files and links that stay within; who may do what with them is decided here.
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import ExitStack
from pathlib import Path

from era.core.files import trees
from era.core.setup.package_sets import SetupFailed
from era.packages.processes import too_large


def check(directory: Path, *, most_files: int, most_bytes: int, separate: bool = False) -> None:
    """Raises SetupFailed for what no package should have in it, or too much of it; OSError for what can't be looked at.
    With `separate` a file that has several names here, as builds leave some, becomes one for each."""
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
        shutil.copy(path, f"{path}.one")
        os.rename(f"{path}.one", path)


def taken(place: Path, path: str, target: Path) -> None:
    """Move a directory out of the working directory of a build, whose sandbox must die before it's looked at. On the
    way there no link is followed. Raises SetupFailed where there is none."""
    *way, name = path.split("/")
    remove(target)
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(trees.opened_root(place))
            for one in way:
                fd = stack.enter_context(trees.opened_directory(fd, one))
            os.rename(name, target, src_dir_fd=fd)
        except OSError as error:
            raise SetupFailed(f"What was built can't be found: {error.strerror}.") from error
    if not _is_directory(target):
        target.unlink()
        raise SetupFailed("What was built is no directory.")


def own(directory: Path, owner: int | None) -> None:
    """Give all of it to a user (None: it stays ours) who may write; everybody may read; no other bits are left. Raises
    OSError."""
    # From the top down, since what is closed to us can't be looked into before it's open.
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
    """Remove it, whatever it holds."""
    if _is_directory(directory):
        directory.chmod(0o700)
    for where, directories, _ in os.walk(directory):
        for name in directories:
            path = Path(where, name)
            if _is_directory(path):
                path.chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)


def _is_directory(path: Path) -> bool:
    """Itself, and not what a link leads to."""
    return path.is_dir() and not path.is_symlink()


def _fail(error: OSError) -> None:
    raise error


def _check_link(directory: Path, name: str) -> None:
    """Raises SetupFailed for a link that leads out of the directory, also by way of others."""
    top, path = os.path.realpath(directory), os.path.join(directory, name)
    if os.path.isabs(os.readlink(path)) or not f"{os.path.realpath(path)}/".startswith(f"{top}/"):
        raise SetupFailed(f"A package has a link that leads out of it: {name[:200]!r}.")
