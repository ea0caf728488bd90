"""Landlock: the kernel's own check of every path, beneath and independent of the mounts.

Theory of operation
===================

*Two domains.* PID 1 restricts itself before it starts anything: what may be read, what written. A program's process
then enters a domain of its own inside that one, which restricts no files, but keeps it away from PID 1: Landlock lets
no process trace or look into another one outside of its domain, nor, from ABI 6 on, signal it.

*All rights the kernel knows are handled*, so what isn't granted here is refused. The ABI tells which there are; bits
beyond it would be refused by the kernel itself. ABI 1 can't grant moves between directories, which would break
programs: then we do without.
"""

from __future__ import annotations

import ctypes
import os

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on all architectures
_VERSION = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK, _REFER, _TRUNCATE, _IOCTL_DEV = 1 << 6, 1 << 11, 1 << 13, 1 << 14, 1 << 15
_RIGHTS = {2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Rights on files that a ruleset can handle, by ABI; later ones have those of 5."""

_SCOPES = 0b11  # abstract Unix sockets, signals: from ABI 6 on

GRANTS = {
    "list": _READ_DIR,
    "read": _READ_FILE | _READ_DIR | _EXECUTE,
    "change": _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE,
    "device": _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV,
    "all": ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV),
}
"""What may be done below a directory: list its names; read and execute; change existing files; the same with devices;
everything but what makes or controls devices."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("directory", ctypes.c_int32))


def abi() -> int:
    """The version of Landlock's interface here, 0 where there is none, or one without moves between directories."""
    version = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    return version if version >= 2 else 0


def restrict(grants: dict[str, list[str]]) -> int | None:
    """Restrict this process, and those that it starts, to what `GRANTS` says below each directory. `grants` are
    directories by the keys of GRANTS; those that don't exist are left out. Returns the ABI, None where the kernel has
    no Landlock."""
    version = abi()
    if not version:
        return None
    handled = _RIGHTS[min(version, 5)]
    _enter(version, handled, [(path, GRANTS[what] & handled) for what, paths in grants.items() for path in paths])
    return version


class OwnDomain:
    """A domain that refuses no file, for processes that are to be out of others' reach: those outside of it can neither
    trace nor look into what enters it. Made once, entered by many processes, each of which then has one of its own."""

    def __init__(self, *, scoped: bool = True) -> None:
        """Without `scoped` those who enter can be signalled, and connected to by abstract Unix sockets, as far as our
        domain before allows it. Raises OSError."""
        version = abi()
        self._ruleset = -1
        """The kernel's descriptor of it, which stays open; -1 where there is no Landlock."""

        if version:
            # A domain must handle something, and would refuse this if it didn't grant it.
            self._ruleset = _ruleset(version if scoped else min(version, 5), _REFER, [("/", _REFER)])

    def enter(self) -> None:
        """Enter a domain like this one, for good. Raises OSError."""
        if self._ruleset >= 0:
            _checked(_libc.syscall(_RESTRICT_SELF, self._ruleset, 0))


def _enter(version: int, handled: int, rules: list[tuple[str, int]]) -> None:
    """Enter a new domain; for its arguments see `_ruleset`. Raises OSError."""
    ruleset = _ruleset(version, handled, rules)
    try:
        _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _ruleset(version: int, handled: int, rules: list[tuple[str, int]]) -> int:
    """A descriptor of rules that refuse the `handled` accesses, except as `rules` grant them below a path. Raises
    OSError."""
    attributes = _Ruleset(handled, 0, _SCOPES if version >= 6 else 0)
    ruleset = _checked(
        _libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)), 0)
    )
    try:
        for path, allowed in rules:
            try:
                directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                beneath = _PathBeneath(allowed, directory)
                _checked(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(beneath), 0))
            finally:
                os.close(directory)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def _checked(answer: int) -> int:
    """A system call's result. Raises OSError where that is an error."""
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return answer
