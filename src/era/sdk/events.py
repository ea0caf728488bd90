"""The events of streams, and the reading of them from server-sent events."""

from __future__ import annotations

from binascii import a2b_base64
from collections.abc import Iterator
from json import loads
from typing import Any

from era.sdk.errors import streamed_error
from era.sdk.generated.views import (
    CellError,
    ClearOutput,
    FileEvent,
    ProcessExit,
    ProcessOutputFields,
    SetupDone,
    SetupLine,
    SetupStatus,
    Shown,
    Stderr,
    Stdout,
)
from era.sdk.view import View

__all__ = [
    "CELL_EVENTS",
    "CellError",
    "ClearOutput",
    "Events",
    "FileEvent",
    "Gap",
    "ProcessEvent",
    "ProcessExit",
    "ProcessOutput",
    "RunEvent",
    "SetupDone",
    "SetupEvent",
    "SetupLine",
    "SetupStatus",
    "Shown",
    "Stderr",
    "Stdout",
]


class Gap(View):
    """Events that are no longer kept: those numbered `first` to `last`."""

    @property
    def first(self) -> int:
        return int(self.answer["from"])

    @property
    def last(self) -> int:
        return int(self.answer["to"])


class ProcessOutput(ProcessOutputFields):
    """What a process wrote. `type` is `stdout`, `stderr` or `pty`."""

    @property
    def data(self) -> bytes:
        """The bytes."""
        return a2b_base64(self.content) if self.encoding == "base64" else self.content.encode()

    @property
    def text(self) -> str:
        """The bytes as text; what isn't UTF-8 becomes U+FFFD."""
        return self.data.decode(errors="replace")


type ProcessEvent = ProcessOutput | ProcessExit | Gap
type RunEvent = Stdout | Stderr | Shown | ClearOutput | CellError | Gap

CELL_EVENTS: dict[str, type[Shown | ClearOutput | CellError]] = {
    "display": Shown,
    "update_display": Shown,
    "result": Shown,
    "clear_output": ClearOutput,
    "cell_error": CellError,
}
type SetupEvent = SetupLine | SetupStatus | SetupDone | Gap


class Events:
    """Server-sent events, of bytes as they come. `last_id` is the number of the newest event that has one, at first of
    the one behind which they begin."""

    def __init__(self, after: int = 0) -> None:
        self.last_id = after
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[dict[str, Any]]:
        """The data of the events that these bytes complete, one by one: `last_id` is that of the newest that was taken.
        Raises the error that an event of that type tells."""
        *blocks, self._rest = (self._rest + piece).split(b"\n\n")
        for block in blocks:
            if (event := self._event(block)) is not None:
                yield event

    def restart(self) -> int:
        """Begin with another stream of the same events; the number behind which it must go on."""
        self._rest = b""
        return self.last_id

    def _event(self, block: bytes) -> dict[str, Any] | None:
        data = None
        for line in block.split(b"\n"):
            if line.startswith(b"data:"):
                data = line[5:]
            elif line.startswith(b"id:") and line[3:].strip().isdigit():
                self.last_id = int(line[3:])
        if data is None:
            return None  # a heartbeat
        event: dict[str, Any] = loads(data)
        if event.get("type") == "error":
            raise streamed_error(event)
        return event
