"""JSON as ERA reads it, the same from a state file and from a request, and the same on every database.

RFC 8259 with the choices it leaves open made here: UTF-8 without a byte order mark; of duplicate keys the last one
counts, as in Python and JavaScript; NaN, Infinity, numbers beyond a double's range, integers of more than 4,000 digits
and lone surrogates are refused, because one reader or another could not give them back.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

from era.core.models import JsonObject

MAX_DEPTH = 64
MAX_DATA_BYTES = 1 << 20
IN_THREAD = 64 << 10
"""Bytes from which on a text is parsed, and written, in a thread: with many small values that takes long, and others go
on meanwhile."""

MAX_STATE_BYTES = 4 << 20
"""Of a state file."""

_MAX_DIGITS = 4000
_LONG = 300
_MAX_LONG_DIGITS = 64 * _MAX_DIGITS
"""Digits of all integers that have more than _LONG. To read and to write one takes the square of its digits."""

_MAX_PARTS = 700_000
"""Strings, commas, colons and opening brackets. Each may become a value, which takes thirty times its bytes; all that
fits `data` has fewer."""

_AT_ONCE_PARTS = 30_000
_AT_ONCE_BYTES = 1 << 20
"""Of a text that is parsed on the event loop: that takes some 10 ms at most."""

_THREADS = ThreadPoolExecutor(2, thread_name_prefix="era-json")

_STEP_BYTES = 1 << 20
_STEP_PARTS = 10_000
"""Looked at in one step, after which Python may switch threads."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_PART = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,:\[{]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAYBE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonProblem(ValueError):
    """Text that is not JSON as ERA reads it. The message completes a sentence that begins with "it"."""


class JsonTooLarge(JsonProblem):
    """JSON beyond a bound of size or depth."""


def loads(text: bytes) -> Any:
    """Parse JSON text. Raises JsonProblem, or JsonTooLarge where it is nested too deeply for a parser, or has so many
    values, or digits of long integers, that to parse it would hold up others."""
    if not text.strip():
        raise JsonProblem("is empty")
    if text.startswith(b"\xef\xbb\xbf"):
        raise JsonProblem("starts with a byte order mark; write it as UTF-8 without one")
    if has_too_many_parts(text):
        raise JsonTooLarge("has too many values")
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonProblem(f"is not UTF-8 (byte {error.start})") from None
    try:
        decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_float, parse_int=integers())
        value = decoder.decode(decoded)
    except json.JSONDecodeError as error:
        raise JsonProblem(f"is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise JsonTooLarge(f"is nested deeper than {MAX_DEPTH} levels") from None
    if _MAYBE_SURROGATE.search(decoded) and _has_surrogate(value):
        raise JsonProblem("has a lone surrogate (half of a character) in a string")
    return value


async def aside[T, R](job: Callable[[T], R], value: T) -> R:
    """A job on long JSON, beside the event loop: on threads that nothing else waits for, as what watches the memory of
    runs would, since callers decide how many such jobs there are."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, job, value)


async def aside_where_long[T, R](job: Callable[[T], R], value: T) -> R:
    """A job on a JSON value: beside the event loop where the value is long."""
    return await aside(job, value) if is_longer(value, IN_THREAD) else job(value)


def is_longer(value: Any, size: int) -> bool:
    """Whether a JSON value surely has more than so many bytes as compact text, by the least that each of its values
    takes. It looks at no more than that many."""
    pending, left = [value], size
    while pending and left >= 0:
        item = pending.pop()
        if isinstance(item, str):
            left -= len(item)
        elif isinstance(item, dict | list):
            left -= 2 * len(item)
            if left >= 0:
                pending += item
                pending += item.values() if isinstance(item, dict) else ()
    return left < 0


async def loads_aside(text: bytes) -> Any:
    """The same beside the event loop where it takes long, on a thread. There, Python may switch threads at each number,
    since what reads one is written in Python."""
    return await aside(loads, text) if takes_long(text) else loads(text)


def takes_long(text: bytes) -> bool:
    """Whether to parse a text on the event loop would hold up others."""
    return len(text) > _AT_ONCE_BYTES or (len(text) > _AT_ONCE_PARTS and marks(text) > _AT_ONCE_PARTS)


def encoded(encoder: json.JSONEncoder, value: Any) -> str:
    """`value` as JSON text. Python doesn't switch threads while C code encodes, so on a thread it is done by Python
    code, where the event loop goes on meanwhile."""
    return "".join(encoder.iterencode(value)) if _is_aside() else encoder.encode(value)


def _is_aside() -> bool:
    return threading.current_thread() is not threading.main_thread()


def compact(value: Any) -> str:
    """`value` as compact JSON text, as it is stored and measured. Raises JsonProblem for what JSON can't hold, or what
    is nested too deeply: on a thread that is deeper than MAX_DEPTH."""
    if _is_aside() and not within_depth(value):
        raise JsonTooLarge(f"is nested deeper than {MAX_DEPTH} levels")
    try:
        return encoded(_ENCODER, value)
    except RecursionError:
        raise JsonTooLarge(f"is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise JsonProblem(str(error)) from None


async def stored(text: str) -> JsonObject:
    """An object that `compact` has written, parsed: in a thread where it is long."""
    value: JsonObject
    if len(text) <= IN_THREAD:
        value = json.loads(text)
    else:
        value = await aside(partial(json.loads, parse_int=_integer), text)
    return value


def number(value: float) -> float:
    """A number as it was probably sent: whole where it is whole, so `30` and not `30.0`."""
    return int(value) if value == int(value) else value


def data_text(value: Any) -> str:
    """A session's `data` as compact JSON text; see `compact`. Raises JsonProblem if it is no object, JsonTooLarge
    beyond 1 MiB or 64 levels."""
    if not isinstance(value, dict):
        raise JsonProblem(f"is {_kind(value)}, not an object")
    if is_longer(value, MAX_DATA_BYTES):  # before it is gone through, which may take long
        raise JsonTooLarge(f"is over {MAX_DATA_BYTES} bytes as compact JSON, {MAX_DATA_BYTES} are allowed")
    if not within_depth(value):
        raise JsonTooLarge(f"is nested deeper than {MAX_DEPTH} levels")
    text = compact(value)
    size = len(text.encode())
    if size > MAX_DATA_BYTES:
        raise JsonTooLarge(f"is {size} bytes as compact JSON, {MAX_DATA_BYTES} are allowed")
    return text


def state_file(stored: str) -> bytes:
    """The content of `.session_data.json` for a session's `data` as it is stored: with indentation, unless it is long,
    or could be longer than a state file may be with that. To indent takes long, and before each value of a list at 60
    levels are 120 spaces."""
    if len(stored) > IN_THREAD:
        return stored.encode()
    data = json.loads(stored)
    text = json.dumps(data, ensure_ascii=False).encode()
    lines = text.count(b",") + 2 * (text.count(b"[") + text.count(b"{"))
    if len(text) + lines * (2 * _depth(data) + 1) > MAX_STATE_BYTES:
        return text
    return json.dumps(data, ensure_ascii=False, indent=2).encode()


async def read_state(content: bytes) -> str:
    """A session's new `data` as compact JSON text, from a state file. Raises JsonProblem."""
    if len(content) <= IN_THREAD:
        return data_text(loads(content))
    return await aside(lambda text: data_text(loads(text)), content)


def marks(text: bytes) -> int:
    """How many strings, commas, colons and opening brackets a JSON text has at most, counted quickly."""
    pieces = (text[at : at + _STEP_BYTES] for at in range(0, len(text), _STEP_BYTES))
    return len(text) - sum(len(piece.translate(None, b',:[{"')) for piece in pieces)


def has_too_many_parts(text: bytes) -> bool:
    """Whether a text has more values than are parsed: _MAX_PARTS. What is in strings doesn't count."""
    if len(text) <= _MAX_PARTS or marks(text) <= _MAX_PARTS:
        return False
    found = _PART.finditer(text)
    for _ in range(0, _MAX_PARTS, _STEP_PARTS):
        if next(islice(found, _STEP_PARTS - 1, None), None) is None:
            return False
    return next(found, None) is not None


def _refuse_constant(name: str) -> Any:
    raise JsonProblem(f"has {name}, which is not JSON")


def _integer(text: str) -> int:
    """`int`, in Python: in a thread, others get their turn at each number."""
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonProblem(f"has a number out of range ({text[:20]})")
    return value


def integers() -> Callable[[str], int]:
    """What reads the integers of one text. It raises JsonProblem, or JsonTooLarge where they are too many long ones."""
    long_digits = 0

    def read(text: str) -> int:
        nonlocal long_digits
        if len(text) > _MAX_DIGITS:
            raise JsonProblem(f"has an integer of {len(text)} digits, {_MAX_DIGITS} are allowed")
        if len(text) > _LONG:
            long_digits += len(text)
            if long_digits > _MAX_LONG_DIGITS:
                raise JsonTooLarge(f"has more than {_MAX_LONG_DIGITS} digits in integers of more than {_LONG}")
        return int(text)

    return read


def _has_surrogate(value: Any) -> bool:
    """Whether a string in a JSON value, or a key, has a lone surrogate. Without recursion: values can be deeply
    nested."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if _SURROGATE.search(item):
                return True
        elif isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return False


def within_depth(value: Any) -> bool:
    """Whether a JSON value is nested at most MAX_DEPTH deep."""
    return _depth(value) <= MAX_DEPTH


def _depth(value: Any) -> int:
    """How deep a JSON value is nested, or one more than MAX_DEPTH where it is deeper. Without recursion."""
    level = [value]
    for depth in range(1, MAX_DEPTH + 1):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return depth
    return MAX_DEPTH + 1


def _kind(value: Any) -> str:
    """The type of a JSON value that is no object, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    return "a string" if isinstance(value, str) else "a list"
