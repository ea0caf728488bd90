"""The service's end of a kernel's channel: frames, and what they say about a cell.

guest/python_kernel.py has the wire format. Whatever comes from a kernel may have been written by a cell: nothing here
takes more memory than a bound for it, and what isn't as it should be raises KernelBroken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from era.core import jsontext
from era.core.cells import CellEvent, CellEventKind
from era.core.models import JsonObject

RESULTS_BYTES = 4 << 20
"""Of the results of a cell, at most."""

INTERRUPT_FRAME = b"I\0\0\0\0"
_MOST_IN_FRAME = RESULTS_BYTES + (1 << 20)
_MOST_RESULTS = 10_000
_SHOWN = 64 << 10
"""Characters of each part of an error."""

_TOO_DEEP = "wrote what is nested too deeply to the service"
_KINDS = frozenset(b"YBPCD")
_MARKED = (1, 2)
"""Descriptors of output, which have marks."""

_CLEAR_BYTES = 64
"""What a `clear_output` counts of the bytes that a cell may show."""


class KernelBroken(Exception):
    """What came over the channel is not from a kernel as it was started. The message completes "its interpreter"."""


class HardToRead(KernelBroken):
    """It wrote integers that take too long to read, or what is nested too deeply. Honest programs do that, too."""


class Frames:
    """Parses a stream of frames."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield the kind and payload of each frame that is complete by now. Raises KernelBroken."""
        self._received += data
        while len(self._received) >= 5:
            kind, size = self._received[0], int.from_bytes(self._received[1:5], "big")
            if kind not in _KINDS or size > _MOST_IN_FRAME:
                raise KernelBroken("wrote what is no message to the service")
            if len(self._received) < 5 + size:
                return
            payload = bytes(self._received[5 : 5 + size])
            del self._received[: 5 + size]
            yield bytes([kind]), payload


def cell_frame(cell: JsonObject) -> bytes:
    """An X frame."""
    payload = json.dumps(cell).encode()
    return b"X" + len(payload).to_bytes(4, "big") + payload


def parse(payload: bytes) -> JsonObject:
    """A payload that has to be a JSON object. Text is cleaned of what can't be encoded, and numbers of what JSON
    doesn't have. Raises KernelBroken."""
    if jsontext.has_too_many_parts(payload):
        raise KernelBroken("wrote too many values to the service")
    try:
        value = json.loads(payload, parse_constant=lambda _: None, parse_int=jsontext.integers())
    except jsontext.JsonProblem:
        raise HardToRead("wrote integers to the service that are too long") from None
    except RecursionError:
        raise HardToRead(_TOO_DEEP) from None
    except ValueError:
        raise KernelBroken("wrote what is not JSON to the service") from None
    if not isinstance(value, dict):
        raise KernelBroken("wrote what is no message to the service")
    if not jsontext.within_depth(value):
        raise HardToRead(_TOO_DEEP)
    cleaned: JsonObject = _clean(value)
    return cleaned


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value


@dataclass(slots=True)
class CellResults:
    """The results of a cell, as they come."""

    limit: int = RESULTS_BYTES
    """Bytes."""

    results: list[JsonObject] = field(default_factory=list)
    truncated: bool = False
    _places: dict[str, list[int]] = field(default_factory=dict)
    """Where those are that have a display id, by which they can be changed."""

    _size: int = 0
    _clears: bool = False
    """All so far goes with the next one."""

    def add(self, payload: bytes) -> tuple[CellEvent | None, Sequence[int]]:
        """Take the payload of a P frame.

        Returns:
            The event that tells of it, None where it is more than a cell may show, and the descriptors behind whose
            output it comes.

        Raises:
            KernelBroken: It is no result.
        """
        self._size += len(payload)
        too_many = len(self.results) >= _MOST_RESULTS or jsontext.has_too_many_parts(payload)
        if self._size > self.limit or too_many:
            self.truncated = True
            return None, _MARKED
        try:
            given = parse(payload)
        except HardToRead:
            self.truncated = True
            return None, _MARKED
        data, metadata, display_id = given.get("data"), given.get("metadata"), given.get("display_id")
        if not isinstance(data, dict) or not isinstance(metadata, dict):
            raise KernelBroken("wrote a result that is none")
        marked = _descriptors(given)
        shown: JsonObject = {"data": data, "metadata": metadata}
        if given.get("update") is True:
            display_id = display_id if isinstance(display_id, str) else ""
            is_kept = self._update(display_id, shown, len(payload))
            return (_event("update_display", shown | {"display_id": display_id}) if is_kept else None), marked
        if self._clears:
            self._clear()
        is_main = given.get("main") is True
        if isinstance(display_id, str):
            self._places.setdefault(display_id, []).append(len(self.results))
        self.results.append({**shown, "main": is_main})
        if is_main:
            return _event("result", shown | {"execution_count": _whole(given.get("execution_count"))}), marked
        if isinstance(display_id, str):
            shown["display_id"] = display_id
        return _event("display", shown), marked

    def _update(self, display_id: str, result: JsonObject, size: int) -> bool:
        """Change all results that have this display id, if there is room: the answer has it once for each."""
        places = self._places.get(display_id, [])
        self._size += size * max(0, len(places) - 1)
        if self._size > self.limit:
            self.truncated = True
            return False
        for place in places:
            self.results[place] = {**result, "main": self.results[place]["main"]}
        return True

    def clear(self, payload: bytes) -> tuple[CellEvent | None, Sequence[int]]:
        """Take the payload of a C frame: forget all so far, or with `wait` once there is something new. What it took
        still counts, or clearing would never end. Returns and raises as `add` does."""
        given = parse(payload)
        self._size += _CLEAR_BYTES
        self._clears = given.get("wait") is True
        if not self._clears:
            self._clear()
        if self._size > self.limit:
            self.truncated = True
            return None, _descriptors(given)
        return _event("clear_output", {"wait": self._clears}), _descriptors(given)

    def _clear(self) -> None:
        self._clears = False
        self.results.clear()
        self._places.clear()


def _descriptors(given: JsonObject) -> Sequence[int]:
    """The descriptors of output that a frame says it has put marks into."""
    marked = given.get("marked")
    return [fd for fd in _MARKED if fd in marked] if isinstance(marked, list) else []


def _event(kind: CellEventKind, fields: JsonObject) -> CellEvent:
    return CellEvent(json.dumps({"type": kind, **fields}).encode())


@dataclass(frozen=True, slots=True)
class CellEnd:
    """How a cell ended, as its kernel says."""

    error: JsonObject | None
    exit_code: int
    execution_count: int | None
    marked: Sequence[int]
    """The descriptors behind whose output stands the mark."""

    interrupted: bool
    """It ended because it was interrupted."""

    truncated: bool
    ends: bool
    """The program has ended the interpreter."""

    memory_bytes: int | None

    @property
    def event(self) -> CellEvent | None:
        """The event of the error that the cell ended with."""
        return None if self.error is None else _event("cell_error", self.error)

    @classmethod
    def parsed(cls, payload: bytes) -> CellEnd:
        """From the payload of a D frame. Raises KernelBroken."""
        given = parse(payload)
        error = given.get("error")
        if error is not None:
            if not isinstance(error, dict):
                raise KernelBroken("wrote an error that is none")
            error = {name: str(error.get(name, ""))[:_SHOWN] for name in ("name", "value", "traceback")}
        exit_code = _whole(given.get("exit_code"))
        if exit_code is None or exit_code > 255:
            raise KernelBroken("wrote an exit code that is none")
        return cls(
            error,
            exit_code,
            _whole(given.get("execution_count")),
            _descriptors(given),
            given.get("interrupted") is True,
            given.get("results_truncated") is True,
            given.get("ends") is True,
            _whole(given.get("memory_bytes")),
        )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else None
