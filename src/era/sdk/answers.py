"""The objects that answers become: views of their JSON, with typed attributes.

A view has the names and values of the HTTP API (docs/api.md). `answer` is the JSON itself, with whatever a newer server
adds. Views are equal if their JSON is, and can't be changed.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from era.errors import EraError


class View:
    """A JSON object of an answer, its fields as attributes. One that the server left out is None."""

    __slots__ = ("answer",)
    answer: dict[str, Any]
    _secrets: ClassVar[tuple[str, ...]] = ()
    """Fields whose values aren't shown: what is printed while somebody tries things ends in logs and notebooks."""

    def __init__(self, answer: dict[str, Any]) -> None:
        object.__setattr__(self, "answer", answer)

    def __getattr__(self, name: str) -> Any:
        if name in self.answer:
            return self.answer[name]
        if name in type(self).__annotations__:
            return None
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("what the server answered can't be changed")

    def __reduce__(self) -> tuple[type[Self], tuple[dict[str, Any]]]:
        return type(self), (self.answer,)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.answer == other.answer

    def __hash__(self) -> int:
        return hash((type(self), repr(self.answer)))

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.answer})

    def __repr__(self) -> str:
        shown = (f"{name}={'…' if name in self._secrets else repr(value)}" for name, value in self.answer.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def each(cls, answers: list[dict[str, Any]]) -> list[Self]:
        return [cls(answer) for answer in answers]


class State(View):
    """What a run did to the session's state."""

    version: int
    committed: bool
    reason: str | None


class Artifact(View):
    """A picture, document or table that a run wrote."""

    type: str
    path: str
    size: int


class _Outcome(View):
    """How a program ended. It is no error of the service, whatever it is."""

    run_id: str
    status: str
    exit_code: int
    duration_ms: float
    stdout: str
    stderr: str
    stdout_truncated: bool
    stderr_truncated: bool

    @property
    def ok(self) -> bool:
        """Whether the program ended with 0."""
        return bool(self.answer["status"] == "ok")

    @property
    def seconds(self) -> float:
        """How long it took."""
        return float(self.answer["duration"].removesuffix("s"))


class RunResult(_Outcome):
    """A run in a session: how the program ended, and what it left.

    `status` is `ok`, `failed`, `timeout`, `oom`, `killed` or `disk_full`; `data` is the session's data afterwards.
    """

    run_id: str
    session_id: str
    status: str
    exit_code: int
    duration_ms: float
    stdout: str
    stderr: str
    stdout_truncated: bool
    stderr_truncated: bool
    data: dict[str, Any]
    setup_status: str | None
    setup_error: str | None
    artifacts_more: int

    # Of a run in a context only; see docs/contexts.md.
    context: str | None
    results: list[dict[str, Any]] | None
    results_truncated: bool | None
    error: dict[str, Any] | None
    execution_count: int | None
    memory: dict[str, Any] | None

    @property
    def value(self) -> dict[str, Any] | None:
        """What a cell's last expression showed, by MIME type; None where there is none."""
        return next((result["data"] for result in reversed(self.results or []) if result["main"]), None)

    @property
    def state(self) -> State:
        return State(self.answer["state"])

    @property
    def artifacts(self) -> list[Artifact]:
        return Artifact.each(self.answer["artifacts"])

    def check(self) -> Self:
        """This result, if the program ended with 0. Raises RunFailed otherwise."""
        if not self.ok:
            raise RunFailed(self)
        return self


class RunFailed(EraError):
    """A program ended with another exit code than 0. `result` is the run."""

    status = 200
    code = "run_failed"
    hint = ""

    def __init__(self, result: RunResult) -> None:
        tail = result.stderr.strip().rpartition("\n")[2]
        how = f"exit code {result.exit_code}" if result.status == "failed" else result.status
        super().__init__(f"The run ended with {how}{f': {tail}' if tail else '.'}")
        self.result = result


class ExecuteResult(_Outcome):
    """A run without a session."""

    run_id: str
    status: str
    exit_code: int
    duration_ms: float
    stdout: str
    stderr: str
    stdout_truncated: bool
    stderr_truncated: bool
    language: str
    vm_id: str


class RunRecord(View):
    """What is kept of a run. What isn't known (yet) is None.

    `code` or `command` is what ran: both are None where `record_code` was false. Lists have the first 200 characters of
    `code`. `code_truncated` says whether anything of `code`, `command` or `args` is missing.
    """

    run_id: str
    session_id: str
    status: str
    code: str | None
    command: str | list[str] | None
    args: list[str]
    code_truncated: bool
    started_at: str
    ended_at: str | None
    duration: str | None
    duration_ms: float | None
    exit_code: int | None
    stdout_bytes: int
    stderr_bytes: int
    stdout_truncated: bool
    stderr_truncated: bool
    peak_memory_bytes: int | None
    cpu_seconds: float | None
    reaped: int | None
    enforced: dict[str, Any]
    egress: dict[str, Any]
    artifacts_more: int
    setup_status: str | None
    setup_error: str | None

    @property
    def state(self) -> State:
        return State(self.answer["state"])

    @property
    def artifacts(self) -> list[Artifact]:
        return Artifact.each(self.answer["artifacts"])


class SessionInfo(View):
    """A session as the server shows it."""

    id: str
    created_at: str
    last_run_at: str
    language: str
    persistent: bool
    file_count: int
    total_size_bytes: int
    metadata: dict[str, Any]
    data: dict[str, Any]
    setup: dict[str, Any] | None
    setup_status: str | None
    setup_result: dict[str, Any] | None
    allowInternetAccess: bool
    allowPublicAccess: bool
    default_timeout: float
    version: int
    ttl: int | None
    expires_at: str | None
    limits: dict[str, Any]
    isolation: str
    egress: dict[str, Any]
    service: str | list[str] | None
    storage: bool
    record_code: bool
    status: str


class FileInfo(View):
    """A file of a session, or a link or directory. `type` is `file`, `link` or `dir`; `link` is where one points."""

    path: str
    type: str
    size: int
    mode: str | None
    modified_at: str | None
    uploaded: bool
    etag: str | None
    link: str | None


class ProcessInfo(View):
    """A process of a live session. `status` is `running`, `ended` or `lost`; `reason`: why it was ended."""

    process_id: str
    tag: str | None
    command: str | list[str]
    status: str
    pid: int | None
    stdin: bool
    pty: bool
    started_at: str
    ended_at: str | None
    exit_code: int | None
    signal: str | None
    reason: str | None


class Checkpoint(View):
    """The version that holds what the files of a session were; the one in force where nothing had changed."""

    version: int
    consistent: bool


class Ticket(View):
    """What takes the place of a key in the address of one WebSocket."""

    ticket: str
    expires_at: str


class ContextInfo(View):
    """An interpreter that stays. `status` is `busy` while a cell is under way, else `idle`."""

    name: str
    language: str
    kernel: str
    status: str
    execution_count: int
    memory_bytes: int | None
    started_at: str


class StoredCode(View):
    """The code that runs where none is sent."""

    code: str
    description: str | None
    updated_at: str
    code_length: int


class Version(View):
    """One version of a session. `data` is there where a single one was asked for."""

    version: int
    name: str | None
    created_at: str
    cause: str
    run_id: str | None
    file_count: int
    total_size_bytes: int
    data: dict[str, Any]


class Diff(View):
    """What a version changed. `data` has `{path, op, old?, new?}`; `files` has `added`, `changed` and `removed`."""

    version: int
    data: list[dict[str, Any]]
    files: dict[str, list[dict[str, Any]]]


class InboxInfo(View):
    """The settings of a session's inbox, and how many deliveries it holds by status."""

    session_id: str
    url: str
    verify: dict[str, str] | None
    retries: int
    deliveries: dict[str, int]
    created_at: str
    updated_at: str


class Delivery(View):
    """A delivery to an inbox. `query`, `headers`, `body` are there where a single one was asked for."""

    id: str
    sender_id: str | None
    received_at: str
    status: str
    attempts: int
    run_ids: list[str]
    next_attempt_at: str | None
    ended_at: str | None
    answer_status: int | None
    reason: str | None
    method: str
    path: str
    size: int
    query: str | None
    headers: list[list[str]] | None
    body: str | None
    body_encoding: str | None


class ApiKey(View):
    """A key of an owner's. `key` itself is there when it has just been made, and never again."""

    _secrets = ("key",)
    id: str
    owner: str
    description: str
    created_at: str
    scopes: list[str]
    expires_at: str | None
    quotas: dict[str, int]
    old_secret_until: str | None
    key: str | None


class Owner(View):
    """An owner's quotas, and how much is used of each."""

    owner: str
    quotas: dict[str, int]
    set: dict[str, int]
    used: dict[str, float]


class DayOfUsage(View):
    """What an owner has used on a day."""

    owner: str
    day: str
    runs: int
    cpu_seconds: float
    egress_bytes: int
    storage_bytes: int | None
    disk_bytes: int | None


class Webhook(View):
    """Where a server tells of what happens. `secret`, which notices are signed with, is shown once, when it is made."""

    _secrets = ("secret",)
    id: str
    url: str
    events: list[str]
    description: str
    created_at: str
    pending: int
    done: int
    failed: int
    dropped: int
    secret: str | None


class Notice(View):
    """What waits to be told to a webhook, was told or was given up."""

    id: str
    event: str
    status: str
    tries: int
    created_at: str
    next_attempt_at: str | None
    ended_at: str | None
    http_status: int | None
    reason: str | None


class AuditEntry(View):
    """Something that somebody did."""

    id: str
    at: str
    owner: str
    key: str | None
    action: str
    target: str | None
    request_id: str
    details: dict[str, Any]


class Language(View):
    """A language that the server knows."""

    name: str
    title: str
    aliases: list[str]
    version: str | None
    available: bool
    packages: str | None
    endings: list[str]
    contexts: bool
    reason: str | None
    hint: str | None
