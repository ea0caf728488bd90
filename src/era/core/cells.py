"""Cells: what a run asks of an interpreter that stays (a context), and what comes of it. core/live/contexts.py has them
executed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from era.core.models import JsonObject, OwnedId, Session
from era.core.program import Output, Program
from era.core.secrets import Secret

type CellEventKind = Literal["display", "update_display", "clear_output", "result", "cell_error"]


@dataclass(frozen=True, slots=True)
class CellEvent:
    """Something that a cell shows beside its output, or the error that it ends with."""

    content: bytes
    """A JSON object: `type`, which is a CellEventKind, and the fields of an event of that type (wire/contexts.py)."""


type WriteCell = Callable[[Output | CellEvent], Awaitable[None]]
"""Takes what a cell writes and shows, in order."""


@dataclass(frozen=True, slots=True)
class CellOutcome:
    """How a cell ended."""

    cause: Literal["exit", "signal", "timeout", "oom", "killed"]
    exit_code: int
    duration: float
    """Seconds."""

    results: list[JsonObject]
    """In order: `data` by MIME type, `metadata`, and whether it is the value of the last expression (`main`)."""

    results_truncated: bool
    error: JsonObject | None
    """`name`, `value`, `traceback`."""

    execution_count: int
    stdout_truncated: bool
    stderr_truncated: bool
    lost: str | None
    """Why the interpreter has ended, if it has: a sentence."""

    sandbox_alive: bool


@dataclass(frozen=True, slots=True)
class CellRun:
    """What a run asks of a context."""

    context: str
    """Its name. It is made if there is none."""

    base_url: str
    program: Program
    """Code, state, variables for this cell only, standard input. Without a `cwd` it is where the interpreter is."""

    output_bytes: int
    """Of stdout, of stderr, and of results; the rest is cut off."""

    secrets: Sequence[Secret]


@dataclass(frozen=True, slots=True)
class CellRunEnded:
    """What came of it."""

    outcome: CellOutcome
    lost: str | None
    """Why what earlier cells had made wasn't there, or isn't there any more."""

    state: bytes | None
    """The state file's content, None where there is none to read."""

    state_problem: str | None
    disk_problem: str | None
    """What was full, where the cell was ended for that."""

    enforced: JsonObject


type StopCell = Callable[[], Awaitable[None]]
"""Interrupts the cell, and ends its interpreter if it goes on."""


class Contexts(Protocol):
    """What runs need of contexts."""

    def check_language(self, session: Session) -> None:
        """Raises BadRequest where the session's language has none."""
        ...

    def is_being_put_away(self, session_key: int) -> bool:
        """Whether no cell can begin until the session has been put away, for which somebody else needs its turn."""
        ...

    async def put_away(self, session_key: int) -> None:
        """Wait until it has been, or for a while."""
        ...

    async def put_away_if_ended(self, session_id: OwnedId) -> None:
        """Suspend a live session in which nothing runs any more. Waits for the session's turn. Raises EraError where
        what its processes left can't be committed."""
        ...

    async def run(
        self,
        session: Session,
        request: CellRun,
        write: WriteCell,
        begun: Callable[[StopCell], None],
    ) -> CellRunEnded:
        """Execute a cell, for the holder of the session's turn, which has the session's sandbox already. `write` gets
        its output and events as they come, `begun` is called before it begins. Raises as LiveSessions.opened does,
        TooManyContexts, Unavailable where there is no interpreter, CommitFailed."""
        ...
