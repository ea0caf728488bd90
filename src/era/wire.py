"""What clients send and get: request bodies, answers, events. Names and shapes are the HTTP contract's.

Request models are strict and know no unknown fields. Answers are built as plain dicts by the functions below, which is
fast; the models beside them say the same to /docs, and a test holds the two against each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from era.core import requirements
from era.core.edits import Listed
from era.core.egress import MAX_ENTRIES
from era.core.expiry import MAX_TTL
from era.core.limits import LEAST
from era.core.models import JsonObject, RunRecord, Session, StoredCode, timestamp
from era.core.runs import Collected, RunResult
from era.core.secrets import MAX_HOSTS, MAX_SECRETS, MAX_VALUE_BYTES
from era.core.views import data_view
from era.languages import in_words

MAX_VERSION = (1 << 63) - 1
_FIRST, _LAST = -62_135_596_800_000_000, 253_402_300_799_000_000
"""What RFC 3339 can tell of, in microseconds. Programs may give their files any time there is."""

SESSION_ID = r"^[A-Za-z0-9_:-]{1,128}$"

Env = Annotated[
    dict[str, str],
    Field(description="Variables of this run only: never stored, logged or returned.", examples=[{"A": "1"}]),
]
Secrets = Annotated[
    "dict[str, SecretBody]",
    Field(
        max_length=MAX_SECRETS,
        description="Values that the program may use towards their hosts, and never sees: never stored or returned.",
        examples=[{"TOKEN": {"value": "…", "hosts": ["api.example.com"]}}],
    ),
]
Ttl = Annotated[int | None, Field(ge=1, le=MAX_TTL)]
_Words = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
Service = Annotated[
    _Words | Annotated[list[_Words], Field(min_length=1, max_length=64)] | None,
    Field(description="What serves the public URLs: a line for the shell, or a program and its arguments."),
]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SecretBody(Body):
    value: str = Field(
        repr=False,
        min_length=1,
        max_length=MAX_VALUE_BYTES,
        description="What is sent to `hosts` in place of the placeholder.",
    )
    hosts: list[Annotated[str, Field(max_length=300)]] = Field(
        min_length=1, max_length=MAX_HOSTS, description="Hosts (api.example.com) or all below one (*.example.com)."
    )


class LimitsBody(Body):
    """What is left out is as the server has it; so is what is null, also after a change."""

    memory_mb: int | None = Field(None, ge=LEAST["memory_mb"], description="Memory, in MiB.")
    cpus: float | None = Field(None, ge=LEAST["cpus"], description="Processors.")
    pids: int | None = Field(None, ge=LEAST["pids"], description="Processes and threads at a time.")
    disk_mb: int | None = Field(None, ge=LEAST["disk_mb"], description="Size of all files, in MiB.")
    files: int | None = Field(None, ge=LEAST["files"], description="Files, directories and links.")
    output_bytes: int | None = Field(
        None, ge=1024, description="Bytes of stdout, and of stderr, that a run may answer."
    )


class EgressBody(Body):
    allow: list[Annotated[str, Field(max_length=300)]] = Field(
        default_factory=list,
        max_length=MAX_ENTRIES,
        description="Hosts (api.example.com), all below one (*.example.com), addresses (203.0.113.0/24); none: all.",
    )


Egress = Annotated[EgressBody | None, Field(description="Where its programs may connect to.")]
Limits = Annotated[LimitsBody | None, Field(description="Limits of its own, up to the server's maxima.")]
Isolation = Annotated[
    Literal["auto", "gvisor", "bubblewrap"],
    Field(description="Which sandbox; `auto` is the server's choice. Refused at a run where it can't be had."),
]


class PipRequirements(Body):
    requirements: str = Field(description="As in a requirements.txt; separated by spaces or newlines.")


class NpmPackage(Body):
    packageJson: str = Field(description="The text of a package.json; its dependencies are what counts.")


class GoModules(Body):
    goMod: str = Field(description="The text of a go.mod; what it requires is what counts.")


class SetupBody(Body):
    """What is installed before a session runs anything."""

    pip: list[str] | PipRequirements | None = Field(None, examples=[["requests>=2.32"]])
    npm: list[str] | NpmPackage | None = Field(None, examples=[["axios@^1"]])
    go: list[str] | GoModules | None = Field(None, examples=[["rsc.io/quote@v1.5.2"]])
    commands: list[str] | None = Field(None, description="Run in the session's sandbox, after the packages.")
    envs: dict[str, str] | None = Field(None, description="Variables of every run; a run's own `env` wins.")


class CreateSession(Body):
    language: str = Field(description=f"{in_words()}, or an alias.", examples=["python"])
    session_id: str | None = Field(None, pattern=SESSION_ID, description="Made up where it is left out.")
    persistent: bool = Field(True, description="Whether files outlive a run. Data always does.")
    data: dict[str, Any] = Field(default_factory=dict, description="The state; `.session_data.json` in the sandbox.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Labels; never seen by programs.")
    setup: SetupBody | None = Field(None, description="Packages to install, commands to run, variables of every run.")
    allowInternetAccess: bool = Field(True, description="Whether programs get to the internet.")
    allowPublicAccess: bool = Field(True, description="Whether others may call the session's public URL.")
    default_timeout: float = Field(30.0, gt=0, description="Seconds that a run may take if it doesn't say.")
    ttl: Ttl = Field(None, description="Seconds without a call after which it expires; null is never.")
    limits: Limits = None
    isolation: Isolation = "auto"
    egress: Egress = None
    service: Service = None
    storage: bool = Field(True, description="Whether programs get to the storage.")


class ChangeSession(Body):
    default_timeout: float | None = Field(None, gt=0)
    allowInternetAccess: bool | None = None
    allowPublicAccess: bool | None = None
    metadata: dict[str, Any] | None = None
    data: dict[str, Any] | None = Field(None, description="Replaces the state, between runs.")
    ttl: Ttl = Field(None, description="Left out: as it is; null: never expires.")
    limits: Limits = None
    isolation: Isolation | None = None
    egress: Egress = None
    service: Service = None
    storage: bool | None = Field(None, description="Whether programs get to the storage, from the next run on.")
    setup: SetupBody | None = Field(None, description="Replaces the setup, between runs; null: no packages any more.")


class RunBody(Body):
    code: str | None = Field(None, description="Left out: the session's stored code.", examples=["print('hello')"])
    env: Env = Field(default_factory=dict)
    secrets: Secrets = Field(default_factory=dict)
    timeout: float | None = Field(None, gt=0, description="Seconds; left out: the session's default_timeout.")
    atomic: bool = Field(False, description="Keep data and files only if the run ends with exit code 0.")
    background: bool = Field(False, description="Answer 202 once the run has begun.")


class DuplicateBody(Body):
    id: str | None = Field(None, pattern=SESSION_ID, description="The new session's; made up where it is left out.")
    new_id: str | None = Field(None, pattern=SESSION_ID, description="Another name of `id`.")
    data: dict[str, Any] | None = Field(None, description="Replaces the state.")
    from_version: int | None = Field(None, ge=1, le=MAX_VERSION, description="Left out: the current one.")


class RollbackBody(Body):
    version: int = Field(ge=1, le=MAX_VERSION, description="The version whose content is to be taken up again.")


class ExecuteBody(Body):
    language: str = Field(examples=["python"])
    code: str = Field(examples=["print('hello')"])
    env: Env = Field(default_factory=dict)
    secrets: Secrets = Field(default_factory=dict)
    timeout: float | None = Field(None, gt=0)
    files: dict[str, str] = Field(default_factory=dict, description="Text files to put beside the program, by path.")
    allowInternetAccess: bool = True
    limits: Limits = None
    isolation: Isolation = "auto"


class CodeBody(Body):
    code: str = Field(examples=["print('stored')"])
    description: str | None = None


class ErrorAnswer(BaseModel):
    error: str
    code: str
    hint: str
    request_id: str
    details: Any = None


class LimitsAnswer(BaseModel):
    memory_mb: int
    cpus: float
    pids: int
    disk_mb: int
    files: int
    output_bytes: int


class EgressAnswer(BaseModel):
    allow: list[str]


class SetupResult(BaseModel):
    success: bool
    duration_ms: int
    pip_packages: list[str]
    npm_packages: list[str]
    go_modules: list[str]
    commands_run: list[str]
    error: str | None
    stderr: str
    stdout: str


class PackageAnswer(BaseModel):
    name: str
    version: str


class EnvironmentAnswer(BaseModel):
    session_id: str
    setup_status: str | None
    environment: str | None
    pip: list[PackageAnswer]
    npm: list[PackageAnswer]
    go: list[PackageAnswer]


class SessionAnswer(BaseModel):
    id: str
    session_id: str
    created_at: str
    last_run_at: str
    language: str
    persistent: bool
    file_count: int
    total_size_bytes: int
    metadata: dict[str, Any]
    data: dict[str, Any]
    setup: dict[str, Any] | None
    allowInternetAccess: bool
    allowPublicAccess: bool
    default_timeout: float
    version: int
    ttl: int | None
    expires_at: str | None
    limits: LimitsAnswer
    isolation: str
    egress: EgressAnswer
    service: str | list[str] | None
    storage: bool
    status: str
    files: list[dict[str, Any]] | None = None
    setup_status: str | None = Field(None, description="pending, running, completed or failed; only with a setup.")
    setup_result: SetupResult | None = Field(None, description="How it went, once it has ended; only with a setup.")


class SessionsAnswer(BaseModel):
    sessions: list[SessionAnswer]
    count: int
    next_cursor: str | None


class ChangedAnswer(BaseModel):
    success: bool
    id: str
    metadata: SessionAnswer
    updated_at: str


class DeletedAnswer(BaseModel):
    success: bool
    id: str
    deleted_at: str


class DeletedAllAnswer(BaseModel):
    success: bool
    deleted_count: int
    deleted_sessions: list[str]
    deleted_at: str


class StateAnswer(BaseModel):
    version: int
    committed: bool
    reason: str | None


class RecordedState(BaseModel):
    version: int | None
    committed: bool
    reason: str | None


class ArtifactAnswer(BaseModel):
    type: str
    path: str
    size: int


class RunAnswer(BaseModel):
    exit_code: int
    stdout: str
    stderr: str
    duration: str
    session_id: str
    data: dict[str, Any]
    run_id: str
    status: str
    stdout_truncated: bool
    stderr_truncated: bool
    state: StateAnswer
    artifacts: list[ArtifactAnswer]
    artifacts_more: int


class BackgroundAnswer(BaseModel):
    run_id: str
    status: str


class DestinationAnswer(BaseModel):
    host: str
    port: int
    address: str | None
    allowed: bool
    reason: str | None
    connections: int
    sent: int
    received: int
    secrets: list[str] = Field(default_factory=list, description="Names of the secrets that were swapped in.")


class RecordedEgress(BaseModel):
    destinations: list[DestinationAnswer] = Field(default_factory=list)
    more: int = 0


class RunRecordAnswer(BaseModel):
    run_id: str
    session_id: str
    status: str
    started_at: str
    ended_at: str
    duration: str | None
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


class ExecuteAnswer(BaseModel):
    exit_code: int
    stdout: str
    stderr: str
    duration: str
    language: str
    vm_id: str
    run_id: str
    status: str
    stdout_truncated: bool
    stderr_truncated: bool


class FileAnswer(BaseModel):
    path: str
    size: int


class ListedFile(BaseModel):
    path: str
    size: int
    modified_at: str
    uploaded: bool
    etag: str | None = Field(description="SHA-256 of the content, as in its `ETag`; null for a link.")


class FilesAnswer(BaseModel):
    files: list[ListedFile]
    count: int
    total_count: int
    total_size_bytes: int
    next_cursor: str | None


class FileDeletedAnswer(BaseModel):
    success: bool
    path: str


class ArchiveAnswer(BaseModel):
    success: bool
    count: int
    total_count: int
    total_size_bytes: int


class HostAnswer(BaseModel):
    url: str
    base_url: str
    session_id: str
    port: int


class CodeStoredAnswer(BaseModel):
    success: bool
    code_length: int
    updated_at: str


class CodeAnswer(BaseModel):
    code: str
    description: str | None
    updated_at: str
    code_length: int


def session_answer(session: Session, status: str, limits: JsonObject) -> dict[str, Any]:
    """The session object. `status` is `running` while a run is under way, else `idle`, unless it is gone; `limits` are
    those it gets."""
    return {
        "id": session.id,
        "session_id": session.id,
        "created_at": timestamp(session.created_at),
        "last_run_at": timestamp(session.last_run_at),
        "language": session.language,
        "persistent": session.persistent,
        "file_count": session.snapshot.file_count,
        "total_size_bytes": session.snapshot.total_bytes,
        "metadata": session.metadata,
        "data": data_view(json.loads(session.data), session.stored),
        "setup": requirements.shown(session.setup),
        "allowInternetAccess": session.allow_internet,
        "allowPublicAccess": session.allow_public,
        "default_timeout": session.default_timeout,
        "version": session.version,
        "ttl": session.ttl,
        "expires_at": None if session.expires_at is None else timestamp(session.expires_at),
        "limits": limits,
        "isolation": session.isolation,
        "egress": {"allow": session.egress.get("allow", [])},
        "service": session.service,
        "storage": session.storage,
        "status": session.gone or status,
        **({} if session.setup is None else _setup_answer(session)),
    }


def _setup_answer(session: Session) -> dict[str, Any]:
    result = session.setup_result
    return {"setup_status": session.setup_status, "setup_result": json.loads(result) if result else None}


def wanted_setup(setup: SetupBody | None) -> dict[str, Any] | None:
    """A setup as the client gave it."""
    return setup.model_dump(exclude_unset=True) if setup else None


def asked(limits: LimitsBody | None) -> dict[str, float | None]:
    """The limits that a body names."""
    return limits.model_dump(exclude_unset=True) if limits else {}


def result_answer(result: RunResult) -> dict[str, Any]:
    """A run's answer but for its output."""
    return {
        "exit_code": result.exit_code,
        "duration": f"{result.duration:.3f}s",
        "session_id": result.session_id,
        "data": result.data,
        "run_id": result.run_id,
        "status": result.status,
        "stdout_truncated": result.stdout_truncated,
        "stderr_truncated": result.stderr_truncated,
        "state": {
            "version": result.state.version,
            "committed": result.state.committed,
            "reason": result.state.reason,
        },
        **_artifacts(result.artifacts),
    }


def run_answer(run: Collected) -> dict[str, Any]:
    return {"stdout": text(run.stdout), "stderr": text(run.stderr), **result_answer(run.result)}


def record_answer(record: RunRecord, session_id: str) -> dict[str, Any]:
    """The record of a run. What isn't known yet, or never will be, is null."""
    return {
        "run_id": record.id,
        "session_id": session_id,
        "status": record.status,
        "started_at": timestamp(record.started_at),
        "ended_at": timestamp(record.ended_at),
        "duration": None if record.duration_us is None else f"{record.duration_us / 1e6:.3f}s",
        "exit_code": record.exit_code,
        "stdout_bytes": record.stdout_bytes,
        "stderr_bytes": record.stderr_bytes,
        "stdout_truncated": record.stdout_truncated,
        "stderr_truncated": record.stderr_truncated,
        "state": {"version": record.version, "committed": record.committed, "reason": record.reason},
        "peak_memory_bytes": record.peak_memory_bytes,
        "cpu_seconds": None if record.cpu_us is None else record.cpu_us / 1e6,
        "reaped": record.reaped,
        "enforced": record.enforced,
        "egress": {
            "destinations": [{"secrets": [], **one} for one in record.egress.get("destinations", [])],
            "more": record.egress.get("more", 0),
        },
        **_artifacts(record.artifacts),
    }


def _artifacts(found: JsonObject) -> dict[str, Any]:
    return {"artifacts": found.get("files", []), "artifacts_more": found.get("more", 0)}


def execute_answer(run: Collected, language: str) -> dict[str, Any]:
    answer = run_answer(run)
    for name in ("data", "state", "session_id", "artifacts", "artifacts_more"):
        del answer[name]
    return {**answer, "language": language, "vm_id": run.result.session_id}


def files_answer(files: Iterable[Listed]) -> list[dict[str, Any]]:
    return [
        {
            "path": path_text(file.path),
            "size": file.size,
            "modified_at": timestamp(min(max(file.mtime_ns // 1000, _FIRST), _LAST)),
            "uploaded": file.uploaded,
            "etag": file.digest,
        }
        for file in files
    ]


def path_text(path: str) -> str:
    """A path as text: bytes that are not UTF-8 show as U+FFFD."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


def code_answer(stored: StoredCode) -> dict[str, Any]:
    return {
        "code": stored.code,
        "description": stored.description,
        "updated_at": timestamp(stored.updated_at),
        "code_length": len(stored.code),
    }


def text(output: bytes) -> str:
    """Output as text: what is not UTF-8 shows as U+FFFD."""
    return output.decode(errors="replace")
