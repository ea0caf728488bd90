"""System V objects and devices, which a run could leave behind. They are neither processes nor files of its own."""

from __future__ import annotations

import ctypes
import errno
import os

_RMID = 0
_PRIVATE = 0
_MAKE = {"shm": (_PRIVATE, 1, 0o600), "sem": (_PRIVATE, 1, 0o600), "msg": (_PRIVATE, 0o600)}
"""By kind (shared memory, semaphores, message queues): arguments that make a small one."""

_libc = ctypes.CDLL(None, use_errno=True)


class SystemV:
    """The System V objects of this sandbox."""

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
