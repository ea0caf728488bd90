"""What callers send to `Runs`, and the events and results that they get: plain frozen values."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from era.core.execution.active_runs import ActiveRun
from era.core.execution.spooled_output import SpooledOutput
from era.core.execution.transcript import Piece, Transcript, plain_count
from era.core.models import (
    Claim,
    JsonObject,
    Language,
    RecordedProgram,
    RunRecord,
    ServiceCommand,
    Session,
    StateOutcome,
    Status,
    WantedIsolation,
    command_of,
)
from era.core.program import CODE_ALONE, Invocation, Limits
from era.core.secrets import Secret

_SETUP_ERROR = 500
"""Characters of a setup's error in the answer of a run. The session's `setup_result` has all of it."""


MAX_RECORDED_BYTES = 64 << 10
"""Bytes of UTF-8 that a run's record keeps of the code or command that ran, with its arguments."""


@dataclass(frozen=True, slots=True)
class RunRequest:
    """A run in a session."""

    base_url: str
    """This server's, for the program's ERA_BASE_URL."""

    code: str | None = field(default=None, repr=False)
    """None runs the session's stored code, unless `invocation` has a command."""

    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout: float | None = None
    """Seconds; None is the session's default."""

    atomic: bool = False
    """Keep what the run leaves only if it ends with exit code 0."""

    claim: Claim | None = None
    background: bool = False
    """Whether nobody waits for its end."""

    service: ServiceCommand | None = None
    """What is started instead of code. Such a run ends when somebody else wants the session's turn."""

    public: bool = False
    """Whether it comes through the session's public URL, and so from anybody."""

    session_key: int | None = None
    """The session that is meant, where the id could be another one's by now."""

    check: Callable[[], Awaitable[None]] | None = None
    """Awaited once the run has its turn; raises where the run isn't wanted any more."""

    secrets: Sequence[Secret] = ()
    invocation: Invocation = CODE_ALONE
    context: str | None = None
    """The interpreter that the code runs in and that stays; None is one of its own."""

    record_code: bool = True
    """Whether the run's record keeps what ran, unless the session says that none does."""

    @property
    def uses_stored_code(self) -> bool:
        return self.code is None and self.service is None and not self.invocation.command


@dataclass(frozen=True, slots=True)
class ExecuteRequest:
    """A run outside any session."""

    owner: str
    """Whose storage the program may use."""

    base_url: str
    language: Language
    code: str = field(repr=False)
    env: Mapping[str, str] = field(repr=False)
    timeout: float | None
    """Seconds; None is DEFAULT_TIMEOUT."""

    files: Mapping[str, bytes] = field(repr=False)
    """What the working directory holds at first, by relative path."""

    isolation: WantedIsolation = "auto"
    limits: Limits | None = None
    """None is the server's defaults."""

    allow_internet: bool = True
    secrets: Sequence[Secret] = ()
    invocation: Invocation = CODE_ALONE
    key_id: str = ""
    """The API key that it came with."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended, without its output."""

    run_id: str
    session_id: str
    status: Status
    exit_code: int
    duration: float
    """Seconds."""

    data: JsonObject | None
    """The session's data as clients see it; None where it isn't kept any more."""

    stdout_truncated: bool
    stderr_truncated: bool
    state: StateOutcome
    artifacts: JsonObject = field(default_factory=dict)
    """As on the record."""

    pieces: int = 0
    """How many pieces it wrote."""

    cell: JsonObject | None = None
    """What only a run in a context answers: `results`, `error`, `execution_count`, `memory` and so on."""

    setup_error: str | None = None
    """As on the record."""

    replayed: bool = False
    """This is the answer of an earlier run with the same idempotency key."""


def result_of(
    session: Session,
    record: RunRecord,
    data: JsonObject | None,
    *,
    cell: JsonObject | None = None,
    replayed: bool = False,
) -> RunResult:
    """The result that a finished run's record tells, with the data that its client is shown."""
    return RunResult(
        run_id=record.id,
        session_id=session.id,
        status=record.status,
        exit_code=record.exit_code or 0,
        duration=(record.duration_us or 0) / 1e6,
        data=data,
        stdout_truncated=record.stdout_truncated,
        stderr_truncated=record.stderr_truncated,
        state=StateOutcome(record.version or 0, record.committed, record.reason, record.versions_dropped),
        artifacts=record.artifacts,
        pieces=pieces_of(record),
        cell=cell,
        setup_error=record.setup_error,
        replayed=replayed,
    )


def pieces_of(record: RunRecord) -> int:
    """How many pieces a finished run wrote."""
    return plain_count(record.stdout_bytes, record.stderr_bytes) if record.pieces is None else record.pieces


def recorded_program(request: RunRequest, session: Session) -> RecordedProgram:
    """Extract what a run's record keeps of the code or command that runs.

    Args:
        request: The run. Neither its `env` nor its `secrets` are looked at.
        session: The session as it is when the run begins: its stored code may be what runs.

    Returns:
        At most MAX_RECORDED_BYTES of UTF-8 in all; nothing where request or session have `record_code` false.
    """
    if not (request.record_code and session.record_code):
        return RecordedProgram()
    if words := command_of(request.service) or request.invocation.command:
        kept, is_cut = _fitting(words)
        is_line = tuple(words[:-1]) == ("/bin/sh", "-c")  # as `command_of` has a line for the shell
        invocation: JsonObject = {"command": kept[-1] if is_line else kept}
        return RecordedProgram(None, {**invocation, "truncated": True} if is_cut else invocation)
    code = request.code if request.code is not None else session.stored.code if session.stored else ""
    (code, *args), is_cut = _fitting((code, *request.invocation.args))
    invocation = {"args": args} if args else {}
    return RecordedProgram(code, {**invocation, "truncated": True} if is_cut else invocation)


def _fitting(texts: Sequence[str]) -> tuple[list[str], bool]:
    """Keep the first texts that fit into MAX_RECORDED_BYTES, the last of them cut; whether anything was cut."""
    kept: list[str] = []
    room = MAX_RECORDED_BYTES
    for text in texts:
        encoded = text[:room].encode()[:room]
        kept.append(encoded.decode(errors="ignore"))
        if kept[-1] != text:
            return kept, True
        room -= len(encoded)
    return kept, False


def setup_error(session: Session) -> str | None:
    """Why a session's setup has failed, in a sentence; None where it hasn't."""
    if session.setup_status != "failed":
        return None
    result: JsonObject = json.loads(session.setup_result or "{}")
    error = str(result.get("error") or "The session's setup failed.")
    return error if len(error) <= _SETUP_ERROR else f"{error[:_SETUP_ERROR]}…"


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run has its turn and is on record."""

    run_id: str
    transcript: Transcript = field(repr=False)
    """What it writes, as far as it has come."""

    run: ActiveRun | None = field(default=None, repr=False)
    """None where it is the replay of an earlier one, or has no session."""

    replayed: bool = False
    """It is an earlier run with the same idempotency key."""


type Emit = Callable[[RunStarted], None]
"""Told when a run starts. It must neither wait nor raise."""

type RunEvent = RunStarted | Piece | RunResult


@dataclass(frozen=True, slots=True)
class Collected:
    """A run's result with all of its output. Close it, or have it collected."""

    result: RunResult
    stdout: SpooledOutput
    stderr: SpooledOutput

    def close(self) -> None:
        self.stdout.close()
        self.stderr.close()
