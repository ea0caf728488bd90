"""Records of processes, and the port to the rows that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from era.core.models import Claim, OwnedId, ServiceCommand

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


class ProcessStore(Protocol):
    """The rows of processes, and of the names of contexts that have had cells. Calls raise Unavailable where the
    database fails; `OwnedId` is as in MetadataStore."""

    async def begin(self, record: ProcessRecord, claim: Claim | None = None) -> None:
        """Record a process as `running`, and claim and answer its key. A killed service finds the record again; a power
        cut may take it, if it has no key. Raises Conflict where the key is claimed already, NotFound where the session
        is gone, and Unavailable that `may_have_committed` where the database stays away in the middle of it."""
        ...

    async def end(self, record: ProcessRecord, freed: Claim | None = None) -> None:
        """Record how it ended, and drop the oldest of its session's that are too many. Counts as a call to the
        session. One that never started frees its key. Does nothing where it isn't on record as `running`, so it may be
        called again where nobody knows whether that was stored."""
        ...

    async def list(self, session_id: OwnedId) -> Sequence[ProcessRecord]:
        """All of a session that are on record, newest first, without their output. Raises NotFound or Expired."""
        ...

    async def find(self, session_id: OwnedId, name: str) -> ProcessRecord:
        """The process with this id, or else the newest with this tag, with its output. Raises NoProcess, NotFound,
        Expired."""
        ...

    async def mark_lost(self) -> int:
        """Record every process that is still `running` as `lost`, since the service that had it is gone; how many."""
        ...

    async def note_context(self, session_key: int, name: str) -> bool:
        """Remember a context's name. Returns whether it was known already."""
        ...

    async def forget_context(self, session_key: int, name: str) -> bool:
        """Forget a context's name. Returns whether it was known."""
        ...
