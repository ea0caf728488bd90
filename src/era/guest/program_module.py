"""The module that a Python program is: tells when its code starts and when it has returned normally, and keeps the
value of its last line as a file, if that is a table or a figure, which a notebook would show.

Theory of operation
===================

The interpreter itself opens, compiles and runs `main.py`, and asks us nothing. But it has events, those of
sys.monitoring: PY_START once, to get hold of the code before its first instruction, then PY_RETURN of this one code
object. Other code is as fast as without. The tool's number is given back at once, since callbacks stay without it;
where they wouldn't (3.14 and later), it is kept.

Only the process that was started as the program is told of: not one that it forked.

*The last value.* A module's code computes the value of an expression that it ends with, drops it (POP_TOP) and returns
None (RETURN_CONST). We make it return that value instead: one byte, RETURN_VALUE in the place of POP_TOP, in the code
object that is about to run. The interpreter drops what a module returns, so nothing is different but that an event has
the value. So no source is rewritten, nothing is evaluated twice, all positions stay right, and no name of ours can be
seen. Where an interpreter's code isn't laid out as we believe, what is in memory isn't what `co_code` says, and then we
leave it alone.
"""

from __future__ import annotations

import ctypes
import os
import sys

import early_exit

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from types import CodeType

_TOOL = 4  # one of the numbers that Python's documents give to nobody
_BEFORE_3_14 = sys.version_info < (3, 14)

PACKAGES = ("pandas", "polars", "matplotlib")
"""The packages whose values lib/era_results.py keeps."""

_INSTRUCTION = 2  # bytes: the operation and its argument; what else stands in code comes in such pairs, too


class ProgramModule:
    """Made before the process is forked that becomes the program."""

    def __init__(self) -> None:
        self._last_value = last_value()
        self._ending = early_exit.prepared()

    def look_for_packages(self) -> None:
        """Look anew whether there are packages whose values are kept."""
        self._last_value = last_value()

    def watch(self, path: str) -> None:
        """Follow the module that this process runs next: the program at `path`, which is absolute."""
        value, end = self._last_value, self._ending
        if value is None and end is None:
            return
        monitoring, events = sys.monitoring, sys.monitoring.events
        pid = os.getpid()

        def on_start(code: CodeType, _: int) -> None:
            if code.co_filename != path or code.co_name != "<module>":
                return
            monitoring.set_events(_TOOL, 0)
            monitoring.register_callback(_TOOL, events.PY_START, None)
            if (value is not None and value.change(code)) or end is not None:
                monitoring.register_callback(_TOOL, events.PY_RETURN, on_return)
                monitoring.set_local_events(_TOOL, code, events.PY_RETURN)
            if _BEFORE_3_14:
                monitoring.free_tool_id(_TOOL)

        def on_return(code: CodeType, offset: int, returned: object) -> None:
            if os.getpid() != pid:
                return
            if value is not None:
                keep_value(returned)
            if end is not None:
                end.module_returned()

        monitoring.use_tool_id(_TOOL, "era")
        monitoring.register_callback(_TOOL, events.PY_START, on_start)
        monitoring.set_events(_TOOL, events.PY_START)
        if end is not None:
            end.expect()


class LastValue:
    """Catches the value in one process. Made before that is forked."""

    def __init__(self) -> None:
        loaded = set(sys.modules)
        from opcode import opmap

        for name in set(sys.modules) - loaded:
            del sys.modules[name]
        self._pop, self._return, self._extended = opmap["POP_TOP"], opmap["RETURN_VALUE"], opmap["EXTENDED_ARG"]
        self._rest = (opmap["RETURN_CONST"],) if _BEFORE_3_14 else (opmap["LOAD_CONST"], opmap["RETURN_VALUE"])

    def change(self, code: CodeType) -> bool:
        """Change a module's code so that it returns the values which it would drop just before it returns None. Returns
        whether there were any."""
        content = code.co_code
        operations = content[::_INSTRUCTION]
        changed = False
        for place, operation in enumerate(operations):
            if operation != self._pop:
                continue
            follows = place + 1
            while operations[follows] == self._extended:
                follows += 1
            if tuple(operations[follows : follows + len(self._rest)]) != self._rest:
                continue
            address = id(code) + type(code).__basicsize__ + place * _INSTRUCTION
            size = 2 * _INSTRUCTION
            if ctypes.string_at(address, size) == content[place * _INSTRUCTION :][:size]:
                ctypes.memmove(address, bytes([self._return]), 1)
                changed = True
        return changed


def keep_value(value: object) -> None:
    """Keep a value as a file, if it is of a kind that people look at. Failures are printed: the program has
    succeeded."""
    if value is None or not any(name in sys.modules for name in PACKAGES):
        return
    try:
        import era_results

        era_results.keep(value)
    except Exception as problem:
        message = f"era: the value that the program ends with was not saved: {type(problem).__name__}: {problem}"
        print(" ".join(message[:500].split()), file=sys.stderr)


def last_value() -> LastValue | None:
    """Return what catches the value. Called once, before any program of this sandbox. None where there are no such
    packages, or this Python's code is another one."""
    there = any(os.path.isdir(f"{place}/{name}") for place in sys.path for name in PACKAGES)
    try:
        return LastValue() if there else None
    except (ImportError, KeyError):
        return None
