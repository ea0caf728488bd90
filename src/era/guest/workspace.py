"""What programs share in a sandbox, and may leave there: files, installed packages, System V objects and devices. It is
written for a run, read after it, and cleared up. Programs are hostile: any path may have become anything."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

STATE_FILE = ".session_data.json"
CHUNK = 1 << 16
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_TRIES = 100
"""Attempts to put a file in its place while a process beside the run keeps putting something else there."""

_KINDS = {
    0o010000: "a named pipe",
    0o020000: "a device",
    0o040000: "a directory",
    0o060000: "a device",
    0o100000: "a file",
    0o120000: "a symbolic link",
    0o140000: "a socket",
}
_KIND, _REGULAR = 0o170000, 0o100000  # of a file's mode

_RMID = 0
_PRIVATE = 0
_MAKE = {"shm": (_PRIVATE, 1, 0o600), "sem": (_PRIVATE, 1, 0o600), "msg": (_PRIVATE, 0o600)}
"""By kind of System V objects (shared memory, semaphores, message queues): arguments that make a small one."""

_libc = ctypes.CDLL(None, use_errno=True)


def write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def read_exactly(fd: int, size: int) -> bytes | None:
    """The next `size` bytes; None at the end."""
    content = b""
    while len(content) < size:
        piece = os.read(fd, size - len(content))
        if not piece:
            return None
        content += piece
    return content


def remove(path: str) -> None:
    """Remove whatever is at `path`, if anything is."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):
        empty_directory(path, 0o700)
        os.rmdir(path)


_MEDDLING = {
    getattr(errno, name) for name in ["EACCES", "EPERM", "ENOENT", "EEXIST", "ENOTDIR", "EISDIR", "ENOTEMPTY", "ELOOP"]
}
"""Errors of file calls that processes beside the run can cause, by making, renaming, removing or closing what is at the
path. A lack of room isn't such an error."""


def in_its_place(path: str, name: Callable[[], None]) -> None:
    """Remove whatever is at `path`, and call `name`, which gives a file this path. Try again where a process has put
    something there meanwhile: `name` then fails with EEXIST or EISDIR.

    Raises:
        FileExistsError: After _TRIES; `strerror` says what a process keeps putting there.
        OSError: Any other of `name`.
    """
    for _ in range(_TRIES):
        try:
            remove(path)
        except OSError:
            continue  # it has become something else meanwhile
        try:
            name()
            return
        except (FileExistsError, IsADirectoryError):
            pass
    kind = "something else"
    try:
        kind = _KINDS[os.lstat(path).st_mode & _KIND]
    except OSError:
        pass  # it is gone at this moment
    raise FileExistsError(errno.EEXIST, f"a process keeps putting {kind} there", path)


def write_file(path: str, content: bytes) -> tuple[int, int, int]:
    """Put a new regular file in the place of whatever is at `path`. It is made under a random name, and then
    renamed: gVisor's kernel panics where two processes make a file of one name at the same moment.

    Returns:
        Its identity.

    Raises:
        FileExistsError: A process keeps putting something else at `path`.
        OSError: There is no room, or no such directory.
    """
    made = os.path.join(os.path.dirname(path), f".{os.urandom(8).hex()}")
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, content)
        try:
            os.rename(made, path)  # in the place of anything but a directory
        except OSError:
            in_its_place(path, lambda: os.rename(made, path))
        return identity(os.fstat(fd))
    except BaseException:
        try:
            os.unlink(made)
        except OSError:
            pass  # a process has found it
        raise
    finally:
        os.close(fd)


def try_to_write(
    path: str, content: bytes, write: Callable[[str, bytes], tuple[int, int, int]] = write_file
) -> tuple[tuple[int, int, int] | None, OSError | None]:
    """Write a file of a run by `write`, with the directories that it is in. Returns its identity, or the error by which
    processes beside the run prevent that. Raises any other OSError, such as that there is no room."""
    try:
        if directory := os.path.dirname(path):
            os.makedirs(directory, exist_ok=True)
        return write(path, content), None
    except OSError as problem:
        if problem.errno not in _MEDDLING:
            raise
        return None, problem


def identity(stat: os.stat_result) -> tuple[int, int, int]:
    """Inode, size and time of the last write, by which a file that was written to is told from one that was not."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def remove_if_unchanged(path: str, written: tuple[int, int, int]) -> bool:
    """Remove the file with this identity; one that the program has changed is its own, and stays. Returns whether it
    was removed."""
    try:
        if identity(os.lstat(path)) == written:
            os.unlink(path)
            return True
    except OSError:
        pass
    return False


def read_state(limit: int) -> tuple[bytes | None, str | None]:
    """The state file's content, None where there is none or it can't be used; and in the latter case why, as the end of
    a sentence. `limit` is in bytes."""
    try:
        fd = os.open(STATE_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None, None
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            return None, "is a symbolic link"
        if problem.errno == errno.ENXIO:
            return None, "is a socket"
        return None, f"can't be opened: {problem.strerror}"
    try:
        stat = os.fstat(fd)
        if (kind := stat.st_mode & _KIND) != _REGULAR:
            return None, f"is {_KINDS[kind]}"
        if stat.st_nlink != 1:
            return None, "has a second name (a hard link)"
        size, content = stat.st_size, b""
        while size <= limit and (part := os.read(fd, CHUNK)):
            content += part
            size = len(content)  # a process beside the run may go on writing
        if size > limit:
            return None, f"is too large: {size} bytes, {limit} allowed"
        return content, None
    except OSError as problem:
        return None, f"can't be read: {problem.strerror}"
    finally:
        os.close(fd)


def empty_directory(path: str, mode: int) -> None:
    """Remove everything in the directory `path`, and give that `mode`. Nested directories are moved up to the top
    first, so that neither descriptors nor path lengths grow with depth."""
    os.chmod(path, mode)
    top = os.open(path, OPEN_DIRECTORY)
    try:
        pending: list[str | None] = [None]
        serial = 0
        while pending:
            name = pending.pop()
            if name is None:
                here = top
            else:
                os.chmod(name, 0o700, dir_fd=top)
                here = os.open(name, OPEN_DIRECTORY, dir_fd=top)
            try:
                with os.scandir(here) as entries:
                    found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
                for child, is_directory in found:
                    if not is_directory:
                        os.unlink(child, dir_fd=here)
                    elif name is None:
                        pending.append(child)
                    else:
                        serial += 1
                        moved = f".{serial}-{os.urandom(8).hex()}"
                        os.chmod(child, 0o700, dir_fd=here)
                        os.rename(child, moved, src_dir_fd=here, dst_dir_fd=top)
                        pending.append(moved)
            finally:
                if name is not None:
                    os.close(here)
                    os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def nearly_full(directory: str) -> bool:
    """Whether less than a quarter of a tmpfs is free."""
    room = os.statvfs(directory)
    return room.f_bavail < room.f_blocks // 4


def entries(directories: Iterable[str]) -> dict[str, int]:
    """How many entries there are on the file systems of these directories."""
    rooms = {directory: os.statvfs(directory) for directory in directories}
    return {directory: room.f_files - room.f_ffree for directory, room in rooms.items()}


def overfull(used: dict[str, int], most: int, before: dict[str, int]) -> str | None:
    """A sentence if a directory has more than `most` entries besides those that were there `before`, else None."""
    for directory, count in used.items():
        if count - before.get(directory, 0) > most:
            return f"{directory} holds more than {most} files"
    return None


def is_importable(entry: os.DirEntry[str]) -> bool:
    """Whether a directory entry may be a module or a package."""
    try:
        return entry.name.endswith((".py", ".so")) or entry.is_dir()
    except OSError:
        return False  # a link in a circle, or to where we may not look


class Layer:
    """The directory for what programs of the session install, as the supervisor and programs see it: the part of the
    prefix that they can write to (drivers/prefix.py)."""

    def __init__(self, directory: str, parts: Sequence[str], site: str) -> None:
        """`parts` are the directories that it always has, `site` is the path of the one that modules are in."""
        self._directory, self._parts, self._site = directory, parts, site

    def prepare(self) -> None:
        """Make what programs install into, where it isn't there: it has been emptied, or a program has removed it."""
        if os.path.isdir(self._site):
            return
        os.chmod(self._directory, 0o755)
        for name in self._parts:
            try:
                os.makedirs(f"{self._directory}/{name}", exist_ok=True)
            except OSError:
                pass  # a program has made something else of it, and finds that

    def empty(self) -> None:
        empty_directory(self._directory, 0o755)

    def look_anew(self) -> None:
        """Forget what Python remembers of the modules in there, which may be older than they or their directory are."""
        sys.path_importer_cache.pop(self._site, None)

    def act_upon_path_files(self) -> None:
        """Do in this process what Python does with `.pth` files when it starts: it started before they were there."""
        try:
            found = any(name.endswith(".pth") for name in os.listdir(self._site))
        except OSError:
            return
        if found:
            sys.modules["site"].addsitedir(self._site)


class SystemV:
    """The System V objects of this sandbox, which a run could leave behind."""

    def __init__(self) -> None:
        self._last = dict.fromkeys(_MAKE, -1)
        """The highest identifier that has been removed, by kind; for gVisor."""

    def remove(self) -> None:
        """Remove all of them. Raises OSError."""
        for kind in _MAKE:
            try:
                with open(f"/proc/sysvipc/{kind}", "rb") as table:
                    for line in table.read().splitlines()[1:]:
                        _remove(kind, int(line.split()[1]))
            except FileNotFoundError:
                self._remove_new(kind)

    def _remove_new(self, kind: str) -> None:
        """Remove all of a kind where the kernel has no table of them. That is gVisor, which numbers them one after the
        other: make a new one, and remove all up to that."""
        newest: int = getattr(_libc, f"{kind}get")(*_MAKE[kind])
        if newest < 0:
            raise OSError(ctypes.get_errno(), f"System V {kind} objects can't be counted")
        for identifier in range(self._last[kind] + 1, newest + 1):
            try:
                _remove(kind, identifier)
            except OSError as problem:
                if problem.errno not in (errno.EINVAL, errno.EIDRM) or identifier == newest:
                    raise
        self._last[kind] = newest


def _remove(kind: str, identifier: int) -> None:
    arguments = (identifier, 0, _RMID, None) if kind == "sem" else (identifier, _RMID, None)
    if getattr(_libc, f"{kind}ctl")(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"System V {kind} object {identifier} can't be removed")


def device_files() -> dict[str, tuple[int, int]]:
    """Mode and device number of each file in /dev, by its name; `.` is /dev itself."""
    with os.scandir("/dev") as entries:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    return {name: (stat.st_mode, stat.st_rdev) for name, stat in {".": os.stat("/dev"), **found}.items()}
