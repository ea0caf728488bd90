"""Directories of installed packages: looked at, made fit to be shared, made durable.

What tools unpacked comes from strangers. Nothing of it is followed, and nothing is kept but directories, plain files
and links that stay within; who may do what with them is decided here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path

from era.core.setups import SetupFailed

_CHUNK = 1 << 20


def digest_of(directory: Path, *, most_files: int, contents: bool = True) -> str:
    """A digest of everything in a directory, by name, kind and, unless told otherwise, content. Raises SetupFailed for
    what no package should have in it."""
    found: list[tuple[bytes, str]] = []
    for where, directories, files in os.walk(directory):
        for name in [*directories, *files]:
            path = os.path.join(where, name)
            relative = os.path.relpath(path, directory)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink(path)
                _check_link(relative, target)
                found.append((os.fsencode(relative), f"link {target!a}"))
            elif stat.S_ISREG(status.st_mode):
                if status.st_nlink != 1:
                    raise SetupFailed(f"A package's file has a second name (a hard link): {relative[:200]!r}.")
                content = _content(path) if contents else ""
                found.append((os.fsencode(relative), f"{status.st_mode & 0o100:o} {content}"))
            elif not stat.S_ISDIR(status.st_mode):
                raise SetupFailed(f"A package has something that is no file: {relative[:200]!r}.")
        if len(found) > most_files:
            raise SetupFailed(f"The packages have more than {most_files} files. The server's ERA_FILES sets the bound.")
    hasher = hashlib.sha256()
    for raw, told in sorted(found):
        hasher.update(b"%d " % len(raw) + raw + b" " + told.encode() + b"\n")
    return hasher.hexdigest()


def own(directory: Path, owner: int | None) -> None:
    """Give all of it to a user (None: it stays ours) who may write; everybody may read; no other bits are left."""
    for where, directories, files in os.walk(directory, topdown=False):
        for name in files + directories:
            _own(os.path.join(where, name), owner)
    _own(os.fspath(directory), owner)


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
    for where, _, _ in os.walk(directory):
        try:
            os.chmod(where, 0o700)
        except OSError:
            break
    shutil.rmtree(directory, ignore_errors=True)


def _check_link(path: str, target: str) -> None:
    """Raises SetupFailed for a link that leads out of the directory that `path` is relative to."""
    leads_to = os.path.normpath(os.path.join(os.path.dirname(path), target))
    if os.path.isabs(target) or leads_to == ".." or leads_to.startswith("../"):
        raise SetupFailed(f"A package has a link that leads out of it: {path[:200]!r}.")


def _content(path: str) -> str:
    hasher = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            hasher.update(piece)
    return hasher.hexdigest()
