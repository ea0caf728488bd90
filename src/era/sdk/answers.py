"""The objects that answers become: views of their JSON, with typed attributes.

A view has the names and values of the HTTP API (docs/api.md). `answer` is the JSON itself, with whatever a newer server
adds. Views are equal if their JSON is, and can't be changed. Their fields are generated (`make types`); what views of
runs do besides is here.
"""

from __future__ import annotations

from typing import Any, Self

from era.errors import EraError
from era.sdk.generated.views import (
    ApiKey,
    Artifact,
    AuditEntry,
    Checkpoint,
    ContextInfo,
    DayOfUsage,
    Delivery,
    Diff,
    ExecuteFields,
    FileInfo,
    InboxInfo,
    Language,
    Notice,
    Owner,
    ProcessInfo,
    RunFields,
    RunRecord,
    SessionInfo,
    State,
    StoredCode,
    Ticket,
    Version,
    Webhook,
)
from era.sdk.view import View

__all__ = [
    "ApiKey",
    "Artifact",
    "AuditEntry",
    "Checkpoint",
    "ContextInfo",
    "DayOfUsage",
    "Delivery",
    "Diff",
    "ExecuteResult",
    "FileInfo",
    "InboxInfo",
    "Language",
    "Notice",
    "Owner",
    "ProcessInfo",
    "RunFailed",
    "RunRecord",
    "RunResult",
    "SessionInfo",
    "State",
    "StoredCode",
    "Ticket",
    "Version",
    "View",
    "Webhook",
]


class _Outcome:
    """How a program ended. It is no error of the service, whatever it is."""

    status: str
    duration: str

    @property
    def ok(self) -> bool:
        """Whether the program ended with 0."""
        return self.status == "ok"

    @property
    def seconds(self) -> float:
        """How long it took."""
        return float(self.duration.removesuffix("s"))


class RunResult(RunFields, _Outcome):
    """A run in a session: how the program ended, and what it left.

    `status` is `ok`, `failed`, `timeout`, `oom`, `killed` or `disk_full`; `data` is the session's data afterwards.
    Fields from `context` to `memory` are those of a run in a context; see docs/contexts.md.
    """

    @property
    def value(self) -> dict[str, Any] | None:
        """What a cell's last expression showed, by MIME type; None where there is none."""
        return next((result["data"] for result in reversed(self.results or []) if result["main"]), None)

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


class ExecuteResult(ExecuteFields, _Outcome):
    """A run without a session."""
