"""The short way out of a Python program: its process ends as soon as nothing is left whose finalizing can be noticed.

Theory of operation
===================

`Py_FinalizeEx` joins threads, calls exit handlers, stops daemon threads, flushes stdout and stderr, and then takes
every module and object apart, also the hundreds that were loaded ahead. In a forked process that last part writes to a
thousand pages that were shared until then, and costs more than most programs. But it can be noticed only where the
program has left something that does something when it goes: an object with `__del__`, a weak reference with a callback,
a file that is open, a generator in the middle of its `try`, a library that has something of its own to put away.

So Python finalizes by itself up to there. The first thing after flushing is a garbage collection, which calls
`gc.callbacks`; a callback of ours looks through all objects that were made since the fork, garbage or not, and ends
the process where none of them can make itself noticed. Else it does nothing, and Python goes on as ever: so there is
no order of ours that could differ from Python's. The question is always whether it is certain that nothing can be
noticed; what isn't known counts as noticeable.

The callback is there only where the program's module has returned normally (program_module.py): what ends by an
exception, `sys.exit` or a signal is finalized. So is what has other eyes on the interpreter: hooks of tracing,
profiling, auditing, monitoring or of the collection itself.

With it a warm run, alone, takes 0.67 of what it takes without (quartiles 0.64 to 0.70; `python -m bench --only quiet
--against` that build), and 80 runs of eight clients 0.80.
"""

from __future__ import annotations

import sys

# What is called at the end has names of our own: a program may have put something else into its place.
from _thread import get_ident
from _weakref import CallableProxyType, ProxyType, ReferenceType
from builtins import any, getattr, id, len, map, set, type, vars, zip  # noqa: UP029  a program may replace them
from gc import callbacks, garbage, get_debug, get_objects
from io import BufferedRandom, BufferedReader, BufferedWriter, BytesIO, FileIO, StringIO, TextIOWrapper
from itertools import compress
from os import _exit, get_blocking, getpid
from resource import RUSAGE_SELF, getrusage
from sys import _getframe, audit, getprofile, gettrace, is_finalizing, monitoring

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LARGE_KIB = 48 << 10
"""Memory from which on a process is finalized without a look, which would take memory itself."""

QUIET_LIBRARIES = {
    *("_abc", "_ast", "_asyncio", "_bisect", "_blake2", "_bz2", "_codecs", "_codecs_cn", "_codecs_hk"),
    *("_codecs_iso2022", "_codecs_jp", "_codecs_kr", "_codecs_tw", "_collections", "_contextvars", "_csv"),
    *("_datetime", "_decimal", "_elementtree", "_functools", "_hashlib", "_heapq", "_imp", "_json", "_locale"),
    *("_lsprof", "_lzma", "_md5", "_multibytecodec", "_opcode", "_operator", "_pickle", "_posixsubprocess"),
    *("_queue", "_random", "_sha1", "_sha2", "_sha3", "_signal", "_socket", "_sre", "_ssl", "_stat"),
    *("_statistics", "_string", "_struct", "_suggestions", "_symtable", "_sysconfig", "_thread", "_tokenize"),
    *("_tracemalloc", "_typing", "_uuid", "_zoneinfo", "array", "atexit", "binascii", "cmath", "errno", "faulthandler"),
    *("fcntl", "gc", "grp", "itertools", "marshal", "math", "mmap", "posix", "pwd", "pyexpat", "resource"),
    *("select", "syslog", "termios", "time", "unicodedata", "zlib"),
    *(("_sqlite3",) if sys.version_info >= (3, 13) else ()),
}
"""Modules in C that a program may load: of their objects only those with `__del__` do anything when they go."""

QUIET_CALLBACKS = frozenset(
    (
        ("weakref", "WeakValueDictionary.__init__.<locals>.remove"),
        ("weakref", "WeakKeyDictionary.__init__.<locals>.remove"),
        ("_weakrefset", "WeakSet.__init__.<locals>._remove"),
        ("logging", "_removeHandlerRef"),
    )
)
"""Callbacks of weak references that only tidy up a collection: their module and name."""

QUIET_BUILTIN_CALLBACKS = frozenset(("_destroy", "_localdummy_destroyed", "clear_locals"))
"""The same in C, of `_abc` and, by two names, `_thread`; no others are called so."""

_IMMUTABLE, _COLLECTED = 1 << 8, 1 << 14  # bits of a type's __flags__
_Function, _BuiltinFunction, _Module = type(lambda: None), type(len), type(sys)
_BytesBuffer = type(BytesIO().getbuffer().obj)
_BUFFERS = (BufferedReader, BufferedWriter, BufferedRandom)

_tool = monitoring.get_tool

# Types and objects are read past anything that a program may have defined for them.
_mro: Callable[[object], tuple[type, ...]] = type.__dict__["__mro__"].__get__
_flags: Callable[[object], int] = type.__dict__["__flags__"].__get__
_class_names: Callable[[object], Any] = type.__dict__["__dict__"].__get__
_module_names: Callable[[object], dict[str, Any]] = vars(_Module)["__dict__"].__get__
_callback: Callable[[object], object] = ReferenceType.__dict__["__callback__"].__get__


class _Sentinel:
    """An object of ours among the program's: where it isn't found, others are hidden too, by `gc.freeze`."""


class Ending:
    """Ends one process early, if that can be. Made before the process is forked."""

    def __init__(self) -> None:
        types: list[type] = [object]
        for known in types:
            types.extend(type.__subclasses__(known))
        self._quiet = {id(known) for known in types if _flags(known) & _IMMUTABLE and _check_of(known) is None}
        """Ids of types that can't be changed, and whose objects just go."""
        # Only by weak references: Python flushes a stream when it goes.
        self._streams: list[tuple[Callable[[], Any], list[int]]] = [
            (ReferenceType(stream), [len(vars(part)) for part in _parts(stream)]) for stream in (sys.stdout, sys.stderr)
        ]

    def expect(self) -> None:
        """Called in the process that becomes the program, before that begins."""
        self._pid, self._thread = getpid(), get_ident()
        self._hook = self._collecting
        self._sentinel = _Sentinel()

    def module_returned(self) -> None:
        """Called by the callback of an event, when the program's module returns."""
        if getpid() != self._pid or get_ident() != self._thread or callbacks or _is_watched():
            return
        if _getframe(2).f_back is None:  # the module was run by Python, and not by itself
            callbacks.append(self._hook)

    def _collecting(self, phase: str, _: object) -> None:
        """Called whenever garbage is collected, which may be long before Python finalizes."""
        if not is_finalizing():
            return
        try:
            alone = len(callbacks) == 1
            callbacks[:] = [each for each in callbacks if each is not self._hook]
            if phase == "start" and alone and self._is_unnoticeable():
                _exit(0)
        except BaseException:  # such as no memory for looking, or a stream that can't be flushed
            pass

    def _is_unnoticeable(self) -> bool:
        """Whether it is certain that finalizing can't be noticed. If so, stdout and stderr are flushed."""
        if (
            getpid() != self._pid
            or _is_watched()
            or get_debug()
            or garbage
            or getrusage(RUSAGE_SELF).ru_maxrss > LARGE_KIB
        ):
            return False
        for name, (own, names) in zip(("stdout", "stderr"), self._streams, strict=True):
            stream: Any = getattr(sys, name)
            if stream is not own() or [len(vars(part)) for part in _parts(stream)] != names:
                return False
            if not get_blocking(stream.fileno()):
                return False
            stream.flush()  # Python has, but doesn't tell us whether it could
        return self._are_quiet(get_objects())

    def _are_quiet(self, objects: list[object]) -> bool:
        """Whether all of these can go without being noticed. They are all objects made since the fork that the garbage
        collector knows, which are all that can have a `__del__`, but for those of the classes that `_is_quiet_class`
        looks for."""
        strange = set(map(id, map(type, objects))) - self._quiet
        checks: dict[int, Callable[[Any], bool] | None] = {}
        complete = False
        for each in compress(objects, map(strange.__contains__, map(id, map(type, objects)))):
            kind = type(each)
            if kind is _Sentinel:
                complete = complete or each is self._sentinel
                continue
            if id(kind) not in checks:
                checks[id(kind)] = _check_of(kind)
            check = checks[id(kind)]
            if check is not None and not check(each):
                return False
        return complete


def _is_watched() -> bool:
    """Whether a hook of the program's would see what we do."""
    try:
        audit(0)  # type: ignore[arg-type]  # the type is checked only where there are hooks, and before they are called
    except TypeError:
        return True
    return gettrace() is not None or getprofile() is not None or any(map(_tool, range(6)))


def _parts(file: Any) -> list[Any]:
    """A file of a type that `open` makes, and what it writes through."""
    parts = [file]
    if type(file) is TextIOWrapper:
        parts.append(file.buffer)
    if any(type(parts[-1]) is buffer for buffer in _BUFFERS):
        parts.append(parts[-1].raw)
    return parts


def _check_of(kind: type) -> Callable[[Any], bool] | None:
    """A function that says of objects of this type whether they can go unnoticed. None: all of them can."""
    bases = _mro(kind)
    if any("__del__" in _class_names(base) for base in bases):
        if kind is TextIOWrapper or kind is FileIO or any(kind is buffer for buffer in _BUFFERS):
            return _is_closed
        return _is_plain if kind is BytesIO or kind is StringIO else _never
    if kind is ProxyType or kind is CallableProxyType:
        return _never  # their callbacks can't be seen
    if kind is _BytesBuffer:
        return _never  # a BytesIO can't be closed while there is one, and says so
    for base, check in _CHECKS:
        if any(each is base for each in bases):
            return check
    return None


def _never(_: object) -> bool:
    return False


def _is_closed(file: Any) -> bool:
    """Whether a file of a type that `open` makes is closed: one that is open may have to be flushed, and is warned
    of."""
    written = _parts(file)[-1]
    return type(written) is FileIO and written.closed


def _is_plain(file: BytesIO | StringIO) -> bool:
    """Whether a file in memory is as it comes, without a method `close` of its own."""
    return not vars(file)


def _is_quiet_reference(reference: object) -> bool:
    callback = _callback(reference)
    if callback is None:
        return True
    if type(callback) is _Function:
        return (callback.__module__, callback.__qualname__) in QUIET_CALLBACKS
    return type(callback) is _BuiltinFunction and callback.__name__ in QUIET_BUILTIN_CALLBACKS


def _is_quiet_module(module: object) -> bool:
    names = _module_names(module)
    file, name = names.get("__file__"), names.get("__name__")
    if type(file) is str and file.endswith((".py", ".pyc")):
        return True
    return (file is None and name not in sys.builtin_module_names) or name in QUIET_LIBRARIES


def _is_quiet_class(kind: object) -> bool:
    """Whether the garbage collector knows the objects of a class, where they have a `__del__`."""
    return bool(_flags(kind) & _COLLECTED) or not any("__del__" in _class_names(base) for base in _mro(kind))


_CHECKS: tuple[tuple[type, Callable[[Any], bool]], ...] = (
    (ReferenceType, _is_quiet_reference),
    (_Module, _is_quiet_module),
    (type, _is_quiet_class),
)


def prepared() -> Ending | None:
    """Called once, before any program of this sandbox. None with an interpreter that finalizes in another order than
    those that this was written for."""
    return Ending() if sys.version_info < (3, 14) and type(sys.stdout) is TextIOWrapper else None
