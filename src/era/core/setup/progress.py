"""The output of a setup that is under way: its last lines, for any number of readers, however late they come.

Theory of operation. The writer appends lines. Each reader has a position of its own among the lines and waits for more,
so readers needn't register, and nothing is left of one that goes away. Beyond a bound the oldest lines are dropped; a
reader that is too slow misses them.
"""

from __future__ import annotations

import asyncio
import codecs
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

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
class Began:
    """Marks where the setup's status became `running`."""

    text: str = ""


class Progress:
    """The output of one setup, by lines."""

    def __init__(self) -> None:
        self.over = False
        """No more lines come."""

        self._lines: deque[Line | Began] = deque()
        self._began = False
        self._characters = 0
        self._dropped = 0
        """How many of the first lines aren't in `_lines` any more."""

        self._more = asyncio.Event()
        """Set when there are more lines or all is over, and then replaced."""

        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")}
        self._unfinished = dict.fromkeys(self._decoders, "")
        """By stream, the begin of a line whose end hasn't come yet."""

    def began(self) -> None:
        """The setup is `running` from here on. Later calls change nothing."""
        if not self._began:
            self._began = True
            self._lines.append(Began())
            self._wake_readers()

    def say(self, stream: str, piece: bytes) -> None:
        """A Say."""
        *lines, rest = (self._unfinished[stream] + self._decoders[stream].decode(piece)).split("\n")
        while len(rest) > _LONGEST:
            lines.append(rest[:_LONGEST])
            rest = rest[_LONGEST:]
        self._unfinished[stream] = rest
        for line in lines:
            self._add(stream, line.rstrip("\r"))
        if lines:
            self._wake_readers()

    def flush(self) -> None:
        """End unfinished lines: the tool that wrote them has ended."""
        for stream, rest in self._unfinished.items():
            if rest := rest + self._decoders[stream].decode(b"", final=True):
                self._add(stream, rest)
            self._unfinished[stream] = ""
        self._wake_readers()

    def end(self) -> None:
        """No more comes: readers stop after the last line."""
        self.flush()
        self.over = True
        self._wake_readers()

    async def follow(self) -> AsyncIterator[Line | Began]:
        """All lines that are still kept, then new ones as they come, until the setup is over."""
        at = 0
        while True:
            more = self._more
            while at < self._dropped + len(self._lines):
                at = max(at, self._dropped)
                line = self._lines[at - self._dropped]
                at += 1
                yield line
            if self.over:
                return
            if more is self._more:
                await more.wait()

    def _add(self, stream: str, text: str) -> None:
        """Append a line, in parts if it is long, and drop the oldest lines beyond the bounds."""
        for begin in range(0, max(1, len(text)), _LONGEST):
            part = text[begin : begin + _LONGEST]
            self._lines.append(Line(stream, part))
            self._characters += len(part)
        while len(self._lines) > MAX_LINES or self._characters > MAX_CHARACTERS:
            self._characters -= len(self._lines.popleft().text)
            self._dropped += 1

    def _wake_readers(self) -> None:
        self._more.set()
        self._more = asyncio.Event()
