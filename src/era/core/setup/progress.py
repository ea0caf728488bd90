"""What a setup says while it is under way: its last lines, for whoever listens, however late.

Theory of operation. One that tells appends; each that listens has a place of its own among the lines and waits for
more. So nobody who listens is known here, and nothing is left of one who goes. Old lines are dropped beyond a bound;
who reads too slowly misses them.
"""

from __future__ import annotations

import asyncio
import codecs
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

MAX_LINES = 2_000
MAX_CHARACTERS = 256 << 10
"""Of all lines that are kept."""

_LONGEST = 2_000
"""Characters of one line; more of it become another."""

type Say = Callable[[str, bytes], None]
"""Takes a piece of what a tool wrote, given its stream: stdout or stderr."""


LAST_WORDS = 4 << 10
"""Characters of each stream that are kept for a setup's result."""


@dataclass(slots=True)
class LastWords:
    """The end of what was written, by stream."""

    stdout: str = ""
    stderr: str = ""

    def say(self, stream: str, piece: bytes) -> None:
        """A Say."""
        kept = getattr(self, stream) + piece.decode(errors="replace")
        setattr(self, stream, kept[-LAST_WORDS:])


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a tool's or command's, without its end."""

    stream: str
    text: str


@dataclass(frozen=True, slots=True)
class Began:
    """It is `running` from here on."""

    text: str = ""


class Progress:
    """The lines of one setup, until it is `over`."""

    def __init__(self) -> None:
        self.over = False
        self._lines: deque[Line | Began] = deque()
        self._began = False
        self._characters = 0
        self._dropped = 0
        self._more = asyncio.Event()
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")}
        self._open = dict.fromkeys(self._decoders, "")

    def began(self) -> None:
        if not self._began:
            self._began = True
            self._lines.append(Began())
            self._tell()

    def say(self, stream: str, piece: bytes) -> None:
        """A Say."""
        *lines, rest = (self._open[stream] + self._decoders[stream].decode(piece)).split("\n")
        while len(rest) > _LONGEST:
            lines.append(rest[:_LONGEST])
            rest = rest[_LONGEST:]
        self._open[stream] = rest
        for line in lines:
            self._add(stream, line.rstrip("\r"))
        if lines:
            self._tell()

    def flush(self) -> None:
        """What has no end of line is one, too: whoever wrote it has ended."""
        for stream, rest in self._open.items():
            if rest := rest + self._decoders[stream].decode(b"", final=True):
                self._add(stream, rest)
            self._open[stream] = ""
        self._tell()

    def end(self) -> None:
        self.flush()
        self.over = True
        self._tell()

    async def follow(self) -> AsyncIterator[Line | Began]:
        """All lines that are kept, and then those that come, until it is over."""
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
        for begin in range(0, max(1, len(text)), _LONGEST):
            part = text[begin : begin + _LONGEST]
            self._lines.append(Line(stream, part))
            self._characters += len(part)
        while len(self._lines) > MAX_LINES or self._characters > MAX_CHARACTERS:
            self._characters -= len(self._lines.popleft().text)
            self._dropped += 1

    def _tell(self) -> None:
        self._more.set()
        self._more = asyncio.Event()
