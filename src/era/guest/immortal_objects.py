"""Objects that are never let go: what Python needn't count, it needn't write to.

Theory of operation
===================

Python counts the references to each object within the object, so whoever only looks at a string or runs a function
writes to its page; and a page that is shared since a fork is copied for that. But what has one certain count is
*immortal* (PEP 683), and isn't counted. That count is given here to what was loaded ahead and is used by every program,
once, before the forks: these pages then stay shared, between the supervisor and its programs, and among all sandboxes
that come from one template.

What is let go can be noticed, by what goes with it. So only those objects are made immortal with which nothing of a
program's could go: code, its constants and names, and other plain values, which hold nothing of a program's; and
classes with what belongs to them alone, since those hold themselves and would have to be found by the garbage
collector, from whom they are hidden anyway (`gc.freeze`). Functions and modules stay as they are: a program may put an
attribute on them, and that has to go when Python lets them go.

One more warm session takes 2.8 MB of memory with it and 3.6 without (`python -m bench --only memory`). Runs are no
quicker.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import types

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from collections.abc import Iterator

_IMMORTAL = 0xFFFFFFFF
"""What the lower half of a count is where Python doesn't count: from 3.12 on it looks at no more than its sign."""

_KNOWN = ((3, 12), (3, 13), (3, 14))

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type(...))
_OF_CLASSES = (
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)


def make_lasting() -> int:
    """Make what is loaded immortal, as far as nobody can notice. Returns how many objects that are: 0 where this
    Python's objects aren't known to be made like that."""
    if not _is_known():
        return 0
    found = {id(each): each for known in gc.get_objects() for each in _lasting(known)}
    for address in found:
        _forget_count(address)
    return len(found)


def _is_known() -> bool:
    """Whether this Python counts as we think it does."""
    if (
        sys.implementation.name != "cpython"
        or sys.version_info[:2] not in _KNOWN
        or "t" in sys.abiflags  # threads without a lock count in another way
        or sys.maxsize < 1 << 32
        or sys.byteorder != "little"
    ):
        return False
    sample = object()
    count = sys.getrefcount(sample)
    if _count(sample) not in (count, count - 1):  # the argument counts, or is borrowed
        return False
    _forget_count(id(sample))
    before = _count(sample)
    more = [sample] * 3
    during = _count(sample)
    del more
    return before == during == _count(sample)


def _count(each: object) -> int:
    return ctypes.c_uint32.from_address(id(each)).value


def _forget_count(address: int) -> None:
    ctypes.c_uint32.from_address(address).value = _IMMORTAL


def _lasting(known: object) -> Iterator[object]:
    """What can be made immortal of an object that the garbage collector knows, and of what it holds."""
    kind = type(known)
    if isinstance(known, type):
        yield from (known, known.__mro__, known.__bases__)
    elif kind in _OF_CLASSES:
        yield known
    elif kind is types.FunctionType:
        yield from _of_code(known.__code__)  # type: ignore[attr-defined]  # it is a function
    elif kind is tuple:
        yield from _of_tuple(known)  # type: ignore[arg-type]  # it is a tuple
    elif kind is dict:
        for name, value in known.items():  # type: ignore[attr-defined]  # it is a dict
            yield from (each for each in (name, value) if type(each) in _PLAIN)


def _of_code(code: types.CodeType) -> Iterator[object]:
    yield from (code, code.co_name, code.co_qualname, code.co_filename)
    for names in (code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars):
        yield from _of_tuple(names)
    for constant in code.co_consts:
        if type(constant) is types.CodeType:
            yield from _of_code(constant)
        elif type(constant) is tuple:
            yield from _of_tuple(constant)
        elif type(constant) in _PLAIN:
            yield constant
    yield code.co_consts


def _of_tuple(values: tuple[object, ...]) -> Iterator[object]:
    """A tuple with its values, if all of them are plain."""
    if all(type(each) in _PLAIN for each in values):
        yield values
        yield from values
