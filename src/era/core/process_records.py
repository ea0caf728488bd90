"""Records of processes, and the port to the rows that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from era.core.models import ServiceCommand

type ProcessStatus = Literal["running", "ended", "lost"]

KEPT = 50
"""Ended processes of a session, the newest, that are on record."""

TAIL_BYTES = 64 << 10
"""Of the output of an ended process, that are on record with it."""

SHOWN_BYTES = 4 << 10
"""Of a command, that are on record."""


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """The durable record of one process. It never holds env or secrets. Times are UTC microseconds since 1970."""

    id: str
    session_key: int
    command: ServiceCommand
    """As it was asked for, shortened where it is long."""

    started_at: int
    status: ProcessStatus = "running"
    tag: str | None = None
    pid: int | None = None
    """As processes in the sandbox see it; None where it never started."""

    stdin: bool = False
    pty: bool = False
    ended_at: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    """The number of the signal that killed it."""

    reason: str | None = None
    """Why it was ended, if it didn't end by itself."""

    output_bytes: int = 0
    tail: bytes | None = field(default=None, repr=False, compare=False)
    """The end of its output, as OutputLog packs it; only where one process is asked for."""
