"""The value of a Python program's last line, which a notebook would show: a table or a figure, kept as a file.

Theory of operation
===================

The interpreter itself opens, compiles and runs `main.py`, as ever. A module's code computes the value of an expression
that it ends with, drops it (POP_TOP) and returns None (RETURN_CONST). We make it return that value instead: one byte,
RETURN_VALUE in the place of POP_TOP, in the code object that is about to run. The interpreter drops what a module
returns, so nothing is different but that an event has the value. So no source is rewritten, nothing is evaluated
twice, all positions stay right, and no name of ours can be seen.

Where an interpreter's code isn't laid out as we believe, what is in memory isn't what `co_code` says, and then we
leave it alone. program_module.py calls us when the module starts and when it returns.
"""

from __future__ import annotations

import ctypes
import os
import sys

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from types import CodeType

PACKAGES = ("pandas", "polars", "matplotlib")
"""The packages whose values lib/era_results.py keeps."""

_BEFORE_3_14 = sys.version_info < (3, 14)
_INSTRUCTION = 2  # bytes: the operation and its argument; what else stands in code comes in such pairs, too


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


def keep(value: object) -> None:
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


def prepared() -> LastValue | None:
    """Called once, before any program of this sandbox. None where there are no such packages, or this Python's code is
    another one."""
    there = any(os.path.isdir(f"{place}/{name}") for place in sys.path for name in PACKAGES)
    try:
        return LastValue() if there else None
    except (ImportError, KeyError):
        return None
