"""Runs, their records and stored code: bodies and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, FailFast, Field

from era.common.few_errors import TextByName, Texts, at_most, few_wrong
from era.core.execution.run_messages import RunResult
from era.core.models import JsonObject, RunRecord, StateOutcome, Status, StoredCode, timestamp
from era.core.secrets import MAX_HOSTS, MAX_SECRETS, MAX_VALUE_BYTES
from era.core.sessions.sessions import MAX_CODE_BYTES
from era.languages import in_words
from era.wire.base import VERSIONS_DROPPED, Body, ErrorEvent, GapEvent, Isolation, Limits, dropped_answer, text
from era.wire.contexts import CellEvents

MAX_ARGS = 1000
CONTEXT = r"^[A-Za-z0-9_.-]{1,64}$"
"""Names of contexts."""

_OUT_OF_MEMORY = (
    "The run was out of memory; what it left is committed as after any other. "
    "A higher `memory_mb` in the session's `limits` gives it more."
)

MAX_CODE: Any = {"maxLength": MAX_CODE_BYTES}
"""In the description only: a longer text is 413, which a model's check can't say."""

DURATION_MS: Any = Field(description="The same in milliseconds, as a number.", examples=[3.127])

type EndStatus = Literal["ok", "failed", "timeout", "oom", "killed", "disk_full"]
"""How a run that was answered has ended."""

Env = Annotated[
    TextByName,
    Field(
        description="Variables of this run only: never stored, logged or returned.",
        examples=[{"A": "1"}],
        json_schema_extra={
            "propertyNames": {"pattern": r"^[^=\u0000]+$"},
            "additionalProperties": {"type": "string", "maxLength": 128 << 10, "pattern": r"^[^\u0000]*$"},
        },
    ),
]


class SecretBody(Body):
    value: str = Field(
        repr=False,
        min_length=1,
        max_length=MAX_VALUE_BYTES,
        description="The value that is sent to `hosts` in place of the placeholder.",
    )
    hosts: Annotated[list[Annotated[str, Field(max_length=300)]], FailFast()] = Field(
        min_length=1, max_length=MAX_HOSTS, description="Hosts (api.example.com) or all below one (*.example.com)."
    )
    plain_http: bool = Field(
        False, description="Send the value over plain HTTP, too, where anybody on the way reads it."
    )


def _has_known_fields(value: Any) -> bool:
    """Whether a secret has no field that SecretBody hasn't; pydantic says what is wrong with one that has."""
    return isinstance(value, dict) and value.keys() <= SecretBody.model_fields.keys()


Secrets = Annotated[
    dict[str, SecretBody],
    few_wrong(_has_known_fields),
    Field(
        max_length=MAX_SECRETS,
        description="Secrets by name. The program gets a placeholder for each, which is replaced by the value in "
        "requests to `hosts`. Never stored, logged or returned.",
        examples=[{"TOKEN": {"value": "…", "hosts": ["api.example.com"]}}],
    ),
    at_most(MAX_SECRETS),
]


class InvokedBody(Body):
    """A body that says how a program is called."""

    args: Texts = Field(
        default_factory=list,
        max_length=MAX_ARGS,
        description="Arguments of the code.",
        examples=[["--verbose", "input.csv"]],
    )
    stdin: str = Field("", description="Standard input.")
    cwd: str = Field("", description="Directory to start in, below the working directory.", examples=["src"])
    command: str | Annotated[list[str], Field(max_length=MAX_ARGS), FailFast()] | None = Field(
        None,
        description="What is run in place of code: a program and its arguments, or a line for `sh -c`.",
        examples=[["pytest", "-q"], "make && ./app"],
    )


class RunBody(InvokedBody):
    may_be_empty = True

    code: str | None = Field(
        None,
        description="Left out, without a `command`: the session's stored code.",
        examples=["print('hello')"],
        json_schema_extra=MAX_CODE,
    )
    env: Env = Field(default_factory=dict)
    secrets: Secrets = Field(default_factory=dict)
    timeout: float | None = Field(None, gt=0, description="Seconds; left out: the session's default_timeout.")
    atomic: bool = Field(False, description="Keep data and files only if the run ends with exit code 0.")
    background: bool = Field(False, description="Answer 202 once the run has begun.")
    context: str | None = Field(
        None,
        pattern=CONTEXT,
        description="The name of an interpreter that stays: the code runs in it as a cell of a notebook does.",
        examples=["main"],
    )
    record_code: bool = Field(
        True, description="`false`: the run's record doesn't keep the code or command, whatever the session says."
    )


class ExecuteBody(InvokedBody):
    language: str = Field(
        description=f"{in_words()}, or an alias. For a `command` it may be `shell`.", examples=["python"]
    )
    code: str | None = Field(
        None, description="Needed without a `command`.", examples=["print('hello')"], json_schema_extra=MAX_CODE
    )
    env: Env = Field(default_factory=dict)
    secrets: Secrets = Field(default_factory=dict)
    timeout: float | None = Field(None, gt=0)
    files: TextByName = Field(
        default_factory=dict, description="Text files for the working directory: content by path."
    )
    allowInternetAccess: bool = True
    limits: Limits = None
    isolation: Isolation = "auto"


class CodeBody(Body):
    code: str = Field(examples=["print('stored')"], json_schema_extra=MAX_CODE)
    description: str | None = None


class StateAnswer(BaseModel):
    version: int
    committed: bool
    reason: str | None
    versions_dropped: int = VERSIONS_DROPPED


class RecordedState(BaseModel):
    version: int | None
    committed: bool
    reason: str | None
    versions_dropped: int = VERSIONS_DROPPED


class ArtifactAnswer(BaseModel):
    type: str
    path: str
    size: int


class ResultAnswer(BaseModel):
    data: dict[str, Any] = Field(description="The value by MIME type; what is not text as Base64.")
    metadata: dict[str, Any]
    main: bool = Field(description="Whether it is the value of the last expression.")


class CellErrorAnswer(BaseModel):
    name: str
    value: str
    traceback: str


class MemoryAnswer(BaseModel):
    kept: bool = Field(description="Whether variables of earlier cells were there and still are.")
    reason: str | None = Field(description="Why not.")


class CellAnswer(BaseModel):
    """What only runs in a context answer; left out for others."""

    context: str = Field("", description="The context's name.")
    results: list[ResultAnswer] = Field(default_factory=list, description="What the cell showed, in order.")
    results_truncated: bool = False
    error: CellErrorAnswer | None = Field(None, description="The error that the cell ended with.")
    execution_count: int = 0
    memory: MemoryAnswer | None = None


class SetupNotice(BaseModel):
    """What runs after a failed setup answer; left out for others."""

    setup_status: Literal["failed"] | None = Field(None, description="`failed` where the session's setup had failed.")
    setup_error: str | None = Field(None, description="Why it had.")


class RunOutcome(CellAnswer, SetupNotice):
    exit_code: int = Field(description="As a shell gives it: 128 + N for signal N, 124 for a timeout.", examples=[0])
    duration: str = Field(examples=["0.003s"])
    duration_ms: float = DURATION_MS
    session_id: str
    data: dict[str, Any] = Field(default_factory=dict, description="The session's data; left out with `data=false`.")
    run_id: str
    status: EndStatus
    stdout_truncated: bool
    stderr_truncated: bool
    state: StateAnswer
    artifacts: list[ArtifactAnswer]
    artifacts_more: int


class RunAnswer(RunOutcome):
    stdout: str = Field(examples=["42\n"])
    stderr: str = Field(examples=[""])


class OutputEvent(BaseModel):
    """A piece of what a run wrote. It is whole text: no character is cut in two."""

    type: Literal["stdout", "stderr"]
    content: str


class DoneEvent(RunOutcome):
    """The last event of a run."""

    type: Literal["done"]


RunEvent = Annotated[OutputEvent | CellEvents | DoneEvent | GapEvent | ErrorEvent, Field(discriminator="type")]


class BackgroundAnswer(BaseModel):
    run_id: str
    status: Literal["running"]


class DestinationAnswer(BaseModel):
    host: str
    port: int
    address: str | None
    allowed: bool
    reason: str | None
    connections: int
    sent: int
    received: int
    secrets: list[str] = Field(default_factory=list, description="Names of the secrets whose values were sent there.")


class RecordedEgress(BaseModel):
    destinations: list[DestinationAnswer] = Field(default_factory=list)
    more: int = 0


class RunRecordAnswer(CellAnswer, SetupNotice):
    run_id: str
    session_id: str
    status: Status
    code: str | None = Field(
        description="The code that ran, up to 64 KiB, in lists up to 200 characters; null for a command, and where "
        "`record_code` was false."
    )
    command: str | list[str] | None = Field(description="The command that ran in place of code.")
    args: list[str] = Field(description="Arguments of the code.")
    code_truncated: bool = Field(description="Whether `code`, `command` or `args` were longer.")
    started_at: str
    ended_at: str | None
    duration: str | None
    duration_ms: float | None
    exit_code: int | None
    stdout_bytes: int
    stderr_bytes: int
    stdout_truncated: bool
    stderr_truncated: bool
    state: RecordedState
    peak_memory_bytes: int | None
    cpu_seconds: float | None
    reaped: int | None
    enforced: dict[str, Any]
    egress: RecordedEgress
    artifacts: list[ArtifactAnswer]
    artifacts_more: int


class RunRecordsAnswer(BaseModel):
    runs: list[RunRecordAnswer]
    count: int
    next_cursor: str | None


class ExecuteOutcome(BaseModel):
    """How a run without a session ended."""

    exit_code: int
    duration: str
    duration_ms: float = DURATION_MS
    language: str
    vm_id: str = Field(description="Names the sandbox that it ran in.")
    run_id: str
    status: EndStatus
    stdout_truncated: bool
    stderr_truncated: bool


class ExecuteAnswer(ExecuteOutcome):
    stdout: str
    stderr: str


class ExecuteDoneEvent(ExecuteOutcome):
    """The last event of a run without a session."""

    type: Literal["done"]


ExecuteEvent = Annotated[OutputEvent | ExecuteDoneEvent | GapEvent | ErrorEvent, Field(discriminator="type")]


class CodeStoredAnswer(BaseModel):
    success: bool
    code_length: int
    updated_at: str


class CodeAnswer(BaseModel):
    code: str
    description: str | None
    updated_at: str
    code_length: int


def result_answer(result: RunResult) -> dict[str, Any]:
    """The answer of a run without its output, as the last event of a stream."""
    return {
        "exit_code": result.exit_code,
        "duration": f"{result.duration:.3f}s",
        "duration_ms": round(result.duration * 1e3, 3),
        "session_id": result.session_id,
        **({} if result.data is None else {"data": result.data}),
        "run_id": result.run_id,
        "status": result.status,
        "stdout_truncated": result.stdout_truncated,
        "stderr_truncated": result.stderr_truncated,
        "state": _state(result.state, result.status),
        **_artifacts(result.artifacts),
        **(result.cell or {}),
        **_setup(result.setup_error),
    }


def run_answer(result: RunResult, stdout: bytes, stderr: bytes) -> dict[str, Any]:
    """The answer of a run, with its output, which comes first."""
    return {"stdout": text(stdout), "stderr": text(stderr), **result_answer(result)}


def record_answer(record: RunRecord, session_id: str, cell: JsonObject | None = None) -> dict[str, Any]:
    """The record of a run. Fields that aren't known (yet) are null. `cell` are those of a run in a context."""
    return {
        "run_id": record.id,
        "session_id": session_id,
        "status": record.status,
        "code": record.code,
        "command": record.invocation.get("command"),
        "args": record.invocation.get("args", []),
        "code_truncated": record.invocation.get("truncated", False),
        "started_at": timestamp(record.started_at),
        "ended_at": None if record.ended_at is None else timestamp(record.ended_at),
        "duration": None if record.duration_us is None else f"{record.duration_us / 1e6:.3f}s",
        "duration_ms": None if record.duration_us is None else record.duration_us / 1e3,
        "exit_code": record.exit_code,
        "stdout_bytes": record.stdout_bytes,
        "stderr_bytes": record.stderr_bytes,
        "stdout_truncated": record.stdout_truncated,
        "stderr_truncated": record.stderr_truncated,
        "state": _state(record, record.status),
        "peak_memory_bytes": record.peak_memory_bytes,
        "cpu_seconds": None if record.cpu_us is None else record.cpu_us / 1e6,
        "reaped": record.reaped,
        "enforced": record.enforced,
        "egress": {
            # Records written before there were secrets have no such field.
            "destinations": [{"secrets": [], **destination} for destination in record.egress.get("destinations", [])],
            "more": record.egress.get("more", 0),
        },
        **_artifacts(record.artifacts),
        **(cell or {}),
        **_setup(record.setup_error),
    }


def _state(outcome: StateOutcome | RunRecord, status: Status) -> dict[str, Any]:
    """What a run did to its session's state, and why nothing was kept. A run that was out of memory could write no
    message of its own, so there is a reason in any case."""
    reason = _OUT_OF_MEMORY if status == "oom" and outcome.committed else outcome.reason
    state = {"version": outcome.version, "committed": outcome.committed, "reason": reason}
    return state | dropped_answer(outcome.versions_dropped)


def _artifacts(artifacts: JsonObject) -> dict[str, Any]:
    """The fields that show a run's artifacts, from their form in its record."""
    return {"artifacts": artifacts.get("files", []), "artifacts_more": artifacts.get("more", 0)}


def _setup(error: str | None) -> dict[str, Any]:
    """The fields that say that the session's setup had failed, if it had."""
    return {} if error is None else {"setup_status": "failed", "setup_error": error}


def execute_outcome(result: RunResult, language: str) -> dict[str, Any]:
    """The end of a run without a session: that of a run, without the fields of a session."""
    answer = result_answer(result)
    for name in ("data", "state", "session_id", "artifacts", "artifacts_more"):
        del answer[name]
    return {**answer, "language": language, "vm_id": result.session_id}


def execute_answer(result: RunResult, stdout: bytes, stderr: bytes, language: str) -> dict[str, Any]:
    """The answer of POST /api/execute, with the output, which comes first."""
    return {"stdout": text(stdout), "stderr": text(stderr), **execute_outcome(result, language)}


def code_answer(stored: StoredCode) -> dict[str, Any]:
    return {
        "code": stored.code,
        "description": stored.description,
        "updated_at": timestamp(stored.updated_at),
        "code_length": len(stored.code),
    }
