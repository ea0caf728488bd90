# Made by scripts/sdk_answers.py of the models in src/era/wire: change those, then run `make types`.
"""The fields of answers and events."""

from __future__ import annotations

from typing import Any

from era.sdk.view import View


class State(View):
    """What a run did to the session's state."""

    version: int
    committed: bool
    reason: str | None
    versions_dropped: int | None


class Artifact(View):
    """A picture, document or table that a run wrote."""

    type: str
    path: str
    size: int


class RunFields(View):
    """The fields of a run in a session."""

    setup_status: str | None
    setup_error: str | None
    context: str | None
    results: list[dict[str, Any]] | None
    results_truncated: bool | None
    error: dict[str, str] | None
    execution_count: int | None
    memory: dict[str, Any] | None
    exit_code: int
    duration: str
    duration_ms: float
    session_id: str
    data: dict[str, Any]
    run_id: str
    status: str
    stdout_truncated: bool
    stderr_truncated: bool
    artifacts_more: int
    stdout: str
    stderr: str

    @property
    def state(self) -> State:
        return State(self.answer["state"])

    @property
    def artifacts(self) -> list[Artifact]:
        return Artifact.each(self.answer["artifacts"])


class ExecuteFields(View):
    """The fields of a run without a session."""

    exit_code: int
    duration: str
    duration_ms: float
    language: str
    vm_id: str
    run_id: str
    status: str
    stdout_truncated: bool
    stderr_truncated: bool
    stdout: str
    stderr: str


class RunRecord(View):
    """What is kept of a run. What isn't known (yet) is None.

    `code` or `command` is what ran: both are None where `record_code` was false. Lists have the first 200
    characters of `code`. `code_truncated` says whether anything of `code`, `command` or `args` is missing."""

    setup_status: str | None
    setup_error: str | None
    context: str | None
    results: list[dict[str, Any]] | None
    results_truncated: bool | None
    error: dict[str, str] | None
    execution_count: int | None
    memory: dict[str, Any] | None
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

    @property
    def state(self) -> State:
        return State(self.answer["state"])

    @property
    def artifacts(self) -> list[Artifact]:
        return Artifact.each(self.answer["artifacts"])


class SessionInfo(View):
    """A session as the server shows it."""

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
    limits: dict[str, Any]
    isolation: str
    egress: dict[str, list[str]]
    service: str | list[str] | None
    storage: bool
    record_code: bool
    status: str
    processes: int
    files: list[dict[str, Any]] | None
    setup_status: str | None
    setup_result: dict[str, Any] | None


class FileInfo(View):
    """A file of a session, or a link or directory. `type` is `file`, `link` or `dir`; `link` is a link's target."""

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
    output_bytes: int | None


class Checkpoint(View):
    """A version that holds the files as they were; the newest version where nothing had changed."""

    version: int
    consistent: bool


class Ticket(View):
    """A secret that takes the place of a key in the address of one WebSocket."""

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
    files: list[dict[str, Any]] | None


class Diff(View):
    """The changes of a version. `data` has `{path, op, old?, new?}`; `files` has `added`, `changed` and `removed`."""

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
    key: dict[str, Any] | None


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
    """A webhook. `secret`, which notices are signed with, is shown once, when it is made."""

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
    """A notice to a webhook: one that waits, was sent or was given up."""

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
    endings: list[str]
    packages: str | None
    contexts: bool
    reason: str | None
    hint: str | None


class Stdout(View):
    """Output of the program to standard output."""

    type: str
    content: str


class Stderr(View):
    """Output of the program to standard error."""

    type: str
    content: str


class Shown(View):
    """Something that a cell shows. `type` is `display`, `update_display` or `result`: the value of the last
    expression. `data` has the value by MIME type; what isn't text as Base64."""

    data: dict[str, Any]
    metadata: dict[str, Any]
    type: str
    display_id: str | None
    execution_count: int | None


class ClearOutput(View):
    """The cell takes back all that it has shown and written so far; with `wait` only when something new comes."""

    type: str
    wait: bool


class CellError(View):
    """The error that a cell ends with. Its `traceback` is on stderr, too."""

    type: str
    name: str
    value: str
    traceback: str


class SetupLine(View):
    """A line that a step of the setup wrote. `stream` is `stdout` or `stderr`."""

    type: str
    stream: str
    text: str


class SetupStatus(View):
    """The setup is `pending` or `running` now."""

    type: str
    setup_status: str


class SetupDone(View):
    """The setup has ended: `completed` or `failed`."""

    type: str
    setup_status: str
    setup_result: dict[str, Any]


class FileEvent(View):
    """What happened to a file: `type` is `watching`, `create`, `write`, `remove`, `rename`, `chmod`, `overflow` or
    `gap`."""

    type: str
    path: str | None
    to: str | None


class ProcessOutputFields(View):
    """The fields of a piece of a process's output."""

    type: str
    content: str
    encoding: str


class ProcessExit(View):
    """The end of a process."""

    type: str
    exit_code: int | None
    signal: str | None
    reason: str | None
