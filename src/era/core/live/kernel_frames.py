"""Frames from a kernel: how they are read, what they say about a cell, and the order of its output and events.

guest/python_kernel.py has the wire format. Whatever comes from a kernel may have been written by a cell: nothing here
takes more memory than a bound for it, and what isn't as it should be raises KernelBroken.

*Order.* A kernel's output comes through two pipes and what it shows through its channel, so one can overtake the other.
Before it shows something, a kernel writes a mark into both pipes and then sends the event over the channel. Output
before the marks is given out first, then the event, then what is behind the marks. The end of a cell has marks of its
own. Output of processes that a cell has started, and stdout relative to stderr, have no order. A cell can write marks
without events and send events without marks: what is held back for the other part is bounded by HELD_BYTES and
HELD_EVENTS, beyond which all is given out as it comes until the cell ends.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from era.core import jsontext
from era.core.models import JsonObject
from era.core.program import CellEvent, CellEventKind, Output, Stream

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


HELD_BYTES = 1 << 20
HELD_EVENTS = 10_000


class MarkedStream:
    """One stream of a cell's output, divided by marks, up to the mark at its end."""

    def __init__(self, event_mark: bytes, end_mark: bytes) -> None:
        self._marks = (event_mark, end_mark)
        self._pattern = re.compile(b"|".join(map(re.escape, self._marks)))
        self._held = b""
        self.ended = False
        """The mark at the end has come."""

    def feed(self, data: bytes) -> tuple[list[bytes | None], bytes]:
        """Divide more of the stream.

        Returns:
            The cell's output, with None for each mark before an event, and what comes behind the mark at the end. The
            beginning of a mark at the end of `data` is held back.
        """
        if self.ended:
            return [], data
        data = self._held + data
        parts: list[bytes | None] = []
        at = 0
        for found in self._pattern.finditer(data):
            parts.append(data[at : found.start()])
            at = found.end()
            if found[0] == self._marks[1]:
                self.ended, self._held = True, b""
                return parts, data[at:]
            parts.append(None)
        held = max(_beginning_at_end(data[at:], mark) for mark in self._marks)
        self._held = data[len(data) - held :]
        parts.append(data[at : len(data) - held])
        return parts, b""

    def rest(self) -> bytes:
        """Take what was held back, where no mark comes any more."""
        held, self._held = self._held, b""
        return held


def _beginning_at_end(data: bytes, mark: bytes) -> int:
    """Count the bytes at the end of `data` that may be the beginning of the mark."""
    at = data.find(mark[:1], max(0, len(data) - len(mark) + 1))
    while at >= 0:
        if mark.startswith(data[at:]):
            return len(data) - at
        at = data.find(mark[:1], at + 1)
    return 0


class CellOrder:
    """Puts the output and the events of one cell in order."""

    def __init__(self, names: Mapping[int, Stream], event_mark: bytes, end_mark: bytes) -> None:
        """`names` has the streams by the descriptor that the kernel has them at."""
        self._names = names
        self._streams = {fd: MarkedStream(event_mark, end_mark) for fd in names}
        self._written = {fd: deque[bytes | None]() for fd in names}
        """Of each stream, what wasn't given out yet; None is a mark."""

        self._events = deque[tuple[CellEvent | None, Collection[int]]]()
        self._mark_bytes = len(event_mark)
        self._held_bytes = 0
        """Of what is in `_written`, with its marks."""

        self._is_ordered = True

    def has_ended(self, fd: int) -> bool:
        """Whether the mark at the end of the stream has come."""
        return self._streams[fd].ended

    def write(self, fd: int, data: bytes) -> bytes:
        """Add what came from a stream. Returns what is behind the mark at its end."""
        parts, after = self._streams[fd].feed(data)
        written = [part for part in parts if part != b""]
        self._written[fd] += written
        self._held_bytes += sum(self._mark_bytes if part is None else len(part) for part in written)
        return after

    def show(self, event: CellEvent | None, marked: Collection[int]) -> None:
        """Add an event, or one that was left out. `marked` are the descriptors that have a mark before it."""
        self._events.append((event, marked))

    def take(self) -> Iterator[Output | CellEvent]:
        """Yield what is in its place by now."""
        while True:
            for fd, written in self._written.items():
                while written and (data := written[0]) is not None:
                    written.popleft()
                    self._held_bytes -= len(data)
                    yield Output(self._names[fd], data)
            if not self._events:
                break
            event, marked = self._events[0]
            if self._is_ordered and not all(self._written[fd] for fd in marked):
                break
            self._events.popleft()
            for fd in marked:
                if self._written[fd]:
                    self._written[fd].popleft()
                    self._held_bytes -= self._mark_bytes
            if event is not None:
                yield event
        if self._held_bytes > HELD_BYTES or len(self._events) > HELD_EVENTS:
            self._is_ordered = False
        if not self._is_ordered:
            yield from self._take_all()

    def rest(self) -> Iterator[Output | CellEvent]:
        """Yield all that is left, where nothing comes any more."""
        self._is_ordered = False
        for fd, stream in self._streams.items():
            if left := stream.rest():
                self._written[fd].append(left)
        yield from self.take()

    def _take_all(self) -> Iterator[Output | CellEvent]:
        """Yield what is held, whatever is missing."""
        while self._events:
            event, _ = self._events.popleft()
            if event is not None:
                yield event
        for fd, written in self._written.items():
            data = b"".join(part for part in written if part)
            written.clear()
            if data:
                yield Output(self._names[fd], data)
        self._held_bytes = 0
