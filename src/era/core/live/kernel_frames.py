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

    def add(self, payload: bytes) -> None:
        """Take the payload of a P frame. Raises KernelBroken."""
        self._size += len(payload)
        too_many = len(self.results) >= _MOST_RESULTS or jsontext.has_too_many_parts(payload)
        if self._size > self.limit or too_many:
            self.truncated = True
            return
        try:
            given = parse(payload)
        except HardToRead:
            self.truncated = True
            return
        data, metadata, display_id = given.get("data"), given.get("metadata"), given.get("display_id")
        if not isinstance(data, dict) or not isinstance(metadata, dict):
            raise KernelBroken("wrote a result that is none")
        result = {"data": data, "metadata": metadata, "main": given.get("main") is True}
        if given.get("update") is True:
            self._update(display_id if isinstance(display_id, str) else "", result, len(payload))
            return
        if isinstance(display_id, str):
            self._places.setdefault(display_id, []).append(len(self.results))
        self.results.append(result)

    def _update(self, display_id: str, result: JsonObject, size: int) -> None:
        """Change all results that have this display id. The answer has it once for each, so it counts as often."""
        places = self._places.get(display_id, [])
        self._size += size * max(0, len(places) - 1)
        if self._size > self.limit:
            self.truncated = True
            return
        for place in places:
            self.results[place] = {**result, "main": self.results[place]["main"]}

    def clear(self) -> None:
        """Forget all so far. What they took still counts, or clearing would never end."""
        self.results.clear()
        self._places.clear()


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

    @classmethod
    def parsed(cls, payload: bytes) -> CellEnd:
        """From the payload of a D frame. Raises KernelBroken."""
        given = parse(payload)
        error, marked = given.get("error"), given.get("marked")
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
            [fd for fd in marked if fd in (1, 2)] if isinstance(marked, list) else [],
            given.get("interrupted") is True,
            given.get("results_truncated") is True,
            given.get("ends") is True,
            _whole(given.get("memory_bytes")),
        )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else None


class MarkedStream:
    """One stream of a cell's output, up to the mark behind it."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._held = b""
        self.ended = False
        """The mark has come."""

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """What of `data` is the cell's output, and what comes after its mark. Of what may be the beginning of the mark
        nothing is given out yet."""
        if self.ended:
            return b"", data
        data = self._held + data
        before, mark, after = data.partition(self._mark)
        if mark:
            self.ended, self._held = True, b""
            return before, after
        held = self._beginning_at_end(data)
        self._held = data[len(data) - held :]
        return data[: len(data) - held], b""

    def rest(self) -> bytes:
        """What was held back, where no mark comes any more."""
        held, self._held = self._held, b""
        return held

    def _beginning_at_end(self, data: bytes) -> int:
        """How many bytes at the end of `data` may be the beginning of the mark."""
        at = data.rfind(self._mark[:1], max(0, len(data) - len(self._mark) + 1))
        while at >= 0:
            if self._mark.startswith(data[at:]):
                return len(data) - at
            at = data.rfind(self._mark[:1], max(0, len(data) - len(self._mark) + 1), at)
        return 0
