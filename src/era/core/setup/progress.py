"""What a setup that is under way has come to: its status and the last lines of its output, as numbered events for any
number of readers, however late they come."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

from era.core.concurrency.event_log import EventLog, Gap

MAX_LINES = 2_000
MAX_CHARACTERS = 256 << 10
"""Bound for all lines that are kept, together."""

_LONGEST = 2_000
"""Characters of a line. A longer one is split."""

type Say = Callable[[str, bytes], None]
"""A function that takes a piece of a tool's output: its stream, "stdout" or "stderr", and the bytes."""

LAST_WORDS = 4 << 10
"""Characters of each stream that a setup's result has."""


@dataclass(slots=True)
class LastWords:
    """The last characters of each output stream."""

    stdout: str = ""
    stderr: str = ""

    def say(self, stream: str, piece: bytes) -> None:
        """A Say."""
        kept = getattr(self, stream) + piece.decode(errors="replace")
        setattr(self, stream, kept[-LAST_WORDS:])


@dataclass(frozen=True, slots=True)
class Line:
    """A line that a tool or command wrote, without the line end."""

    stream: str
    text: str


@dataclass(frozen=True, slots=True)
class Became:
    """Marks where the setup's status became this."""

    status: Literal["pending", "running"]


class Progress:
    """The events of one setup, the output by lines."""

    def __init__(self, last: int = 0) -> None:
        """`last` is the number of the last event of the session's setups before this one."""
        self._log: EventLog[Line | Became] = EventLog(max_size=MAX_CHARACTERS, max_events=MAX_LINES, last=last)
        self._log.append(Became("pending"), 0)
        self._began = False
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")}
        self._unfinished = dict.fromkeys(self._decoders, "")
        """By stream, the begin of a line whose end hasn't come yet."""

    @property
    def last(self) -> int:
        """The number of the newest event."""
        return self._log.last

    def began(self) -> None:
        """The setup is `running` from here on. Later calls change nothing."""
        if not self._began:
            self._began = True
            self._append(Became("running"), 0)

    def say(self, stream: str, piece: bytes) -> None:
        """A Say."""
        *lines, rest = (self._unfinished[stream] + self._decoders[stream].decode(piece)).split("\n")
        while len(rest) > _LONGEST:
            lines.append(rest[:_LONGEST])
            rest = rest[_LONGEST:]
        self._unfinished[stream] = rest
        for line in lines:
            self._add(stream, line.rstrip("\r"))

    def flush(self) -> None:
        """End unfinished lines: the tool that wrote them has ended."""
        for stream, rest in self._unfinished.items():
            if rest := rest + self._decoders[stream].decode(b"", final=True):
                self._add(stream, rest)
            self._unfinished[stream] = ""

    def end(self) -> None:
        """No more comes: readers stop after the last event. Later calls of anything change nothing."""
        if not self._log.ended:
            self.flush()
            self._log.end()

    def follow(self, after: int = 0) -> AsyncIterator[tuple[int, Line | Became] | Gap]:
        """The events behind the one with the number `after`: those that are still kept, then new ones as they come,
        until the setup is over."""
        return self._log.follow(after)

    def _add(self, stream: str, text: str) -> None:
        """Append a line, in parts if it is long."""
        for begin in range(0, max(1, len(text)), _LONGEST):
            part = text[begin : begin + _LONGEST]
            self._append(Line(stream, part), len(part))

    def _append(self, event: Line | Became, size: int) -> None:
        if not self._log.ended:  # a setup that is cut off may still hear what its tool had written
            self._log.append(event, size)
