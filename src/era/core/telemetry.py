"""What happens in the service that its operators are told of, as plain values, and the port that takes them.

Theory of operation. The core notes each thing once, when it has ended, with all that is to be known of it. What becomes
of a note is for the adapters of `Note` (telemetry/): a line in the log, some metrics, a span. So the core counts
nothing, and a line, a metric and a span of the same run can't differ.

No note has code, data, output, variables, secrets, names of files or addresses. Ids, names of owners, languages, times
and the messages of our own errors are all that is in them.

A note belongs to the request that brought it about, if one did: `origin` knows that request. It is a context variable,
so a run that goes on as a task of its own still has it.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from era.core.models import JsonObject
from era.core.program import Ended
from era.errors import CommitFailed, EraError

UNKNOWN = "unknown"
"""The language of a run that was refused before its session was read."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class Trace:
    """A span's place in a trace, by the W3C recommendation Trace Context."""

    trace_id: str
    """32 hexadecimal digits."""

    span_id: str
    """16 hexadecimal digits."""

    parent_id: str | None = None
    """The span that this one is below."""

    sampled: bool = True

    @classmethod
    def begun(cls, traceparent: str | None) -> Trace:
        """The first span of ours, below that of a caller who sent this header, or of a new trace where that is none."""
        match = _TRACEPARENT.fullmatch(traceparent.strip()) if traceparent else None
        if match is not None:
            version, trace_id, parent_id, flags, more = match.groups()
            is_valid = version != "ff" and int(trace_id, 16) and int(parent_id, 16) and (version != "00" or not more)
            if is_valid:
                return cls(trace_id, new_span_id(), parent_id, bool(int(flags, 16) & 1))
        return cls(secrets.token_hex(16), new_span_id())

    def below(self) -> Trace:
        """A new span below this one."""
        return Trace(self.trace_id, new_span_id(), self.span_id, self.sampled)

    @property
    def traceparent(self) -> str:
        """The header, or variable, that says that what somebody else does is below this span."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def new_span_id() -> str:
    return secrets.token_hex(8)


def new_request_id() -> str:
    return "req_" + secrets.token_hex(8)


@dataclass(slots=True)
class Origin:
    """The request, or the delivery, that something is done for."""

    request_id: str = ""
    """Empty for what no request waits for, such as the run of a delivery."""

    trace: Trace | None = None
    """None where nobody asked for traces."""


origin: ContextVar[Origin | None] = ContextVar("era_origin", default=None)


class Stages:
    """A stopwatch: how many seconds each stage of something took, in the order in which they began."""

    __slots__ = ("_at", "began_at", "seconds")

    def __init__(self) -> None:
        self.began_at = time.time()
        """Seconds since 1970."""

        self._at = time.monotonic()
        self.seconds: dict[str, float] = {}

    def end(self, stage: str) -> None:
        """All that went on since the end of the stage before was this one. The same may come again."""
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._at
        self._at = now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(slots=True)
class RequestEnded:
    """A request was answered, or its caller has hung up."""

    request_id: str
    method: str
    route: str
    """The route's pattern, not the path: what is in a path may be anybody's secret."""

    status: int
    """499 for a caller who hung up before there was an answer."""

    began_at: float
    """Seconds since 1970."""

    seconds: float
    owner: str | None = None
    key_id: str | None = None
    session_id: str | None = None
    code: str | None = None
    """The code of the error that was the answer, if one was."""

    message: str | None = None
    """The error's message, where it is the server's own failure."""

    failure: BaseException | None = None
    """What nobody expected."""

    trace: Trace | None = None


@dataclass(slots=True)
class RunEnded:
    """A run has ended: committed, failed, or refused before it began. It is filled in as the run goes on."""

    run_id: str
    owner: str
    session_id: str | None
    """None for a run outside of any session."""

    kind: str
    """`run`, `background`, `cell`, `service`, `public` or `execute`."""

    language: str = UNKNOWN
    sandbox_id: str | None = None
    outcome: str = "error"
    """The run's status where it has a result; else `not_committed`, `refused` or `error`."""

    committed: bool | None = None
    exit_code: int | None = None
    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    connections: int = 0
    """Connections to the outside that were made."""

    refused_connections: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    code: str | None = None
    """That of the error, if it has no result."""

    stages: Stages = field(default_factory=Stages)
    """`turn`, `slot`, `record`, `sandbox`, `program`, `files`, `outputs` and `transaction`, as far as it got."""

    trace: Trace | None = None

    def ended(self, status: str, ended: Ended, committed: bool | None, egress: JsonObject) -> None:
        """It has a result: its status, how its program ended, whether anything was kept, and where it connected (the
        `egress` of its record)."""
        self.outcome, self.committed, self.exit_code = status, committed, ended.exit_code
        self.peak_memory_bytes = ended.peak_memory_bytes
        self.cpu_seconds = None if ended.cpu_us is None else ended.cpu_us / 1e6
        self.connections, self.refused_connections = egress.get("made", 0), egress.get("refused", 0)
        self.sent_bytes, self.received_bytes = egress.get("sent", 0), egress.get("received", 0)

    def failed(self, error: BaseException) -> None:
        """It has no result, because of this."""
        if isinstance(error, EraError):
            self.code = error.code
            has_begun = isinstance(error, CommitFailed) or "program" in self.stages.seconds
            self.outcome = "not_committed" if has_begun else "refused"
        else:
            self.code = type(error).__name__


@dataclass(frozen=True, slots=True)
class SandboxAcquired:
    """A session's run, setup or process got a sandbox."""

    how: str
    """`live`, `warm`, `kept` (a new one, with the directory that was kept), `ready` or `made`."""

    seconds: float
    """From the question to the filled working directory, the wait for room included."""


@dataclass(frozen=True, slots=True)
class SandboxStarted:
    """A sandbox was made, or could not be."""

    language: str
    use: str
    """`spare` for one that is kept ready, else `session` or `temporary`."""

    seconds: float
    sandbox_id: str | None = None
    isolation: str | None = None
    message: str | None = None
    """Why there is none."""


@dataclass(frozen=True, slots=True)
class SandboxClosed:
    """A sandbox was closed."""

    sandbox_id: str
    reason: str
    """`idle`, `evicted` (another session needs the room), `moved` (to another host), `replaced`, `failed`, `died`,
    `deleted` or `temporary`."""

    session_id: str | None = None
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class SetupEnded:
    """A session's setup has ended."""

    session_id: str
    owner: str
    outcome: str
    """`completed` or `failed`; `put_off` where it will be taken up again."""

    began_at: float
    """Seconds since 1970."""

    seconds: float
    packages: int = 0
    commands: int = 0
    message: str | None = None
    """Why it was put off."""


@dataclass(frozen=True, slots=True)
class DeliveryEnded:
    """An attempt to deliver what came to a session's inbox has ended."""

    delivery_id: str
    session_id: str
    owner: str
    run_id: str
    outcome: str
    """`done`, `failed` for good, or `pending` where it is tried again."""

    attempts: int
    answer: int | None
    lag_seconds: float
    """From its receipt to now."""

    began_at: float
    """When the attempt began, in seconds since 1970."""

    seconds: float
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class NoticeTried:
    """A notice was sent to a webhook of an owner's, or could not be."""

    notice_id: str
    webhook_id: str
    owner: str
    event: str
    outcome: str
    """`done`, `failed` where it is given up, or `pending` where it is tried again."""

    tries: int
    answer: int | None
    lag_seconds: float
    """From what it tells to now."""

    began_at: float
    """When the try began, in seconds since 1970."""

    seconds: float


@dataclass(frozen=True, slots=True)
class GarbageCollected:
    """Rows and content that nothing needs any more were removed, or could not be."""

    seconds: float
    blobs: int = 0
    message: str | None = None
    """Why they could not be."""

    put_off: bool = False
    """Nothing is wrong: a backup needs all content for now, or removing it is left to `era gc`."""


type Event = (
    RequestEnded
    | RunEnded
    | SandboxAcquired
    | SandboxStarted
    | SandboxClosed
    | SetupEnded
    | DeliveryEnded
    | NoticeTried
    | GarbageCollected
)
type Note = Callable[[Event], None]
"""Takes note of something. It returns at once and raises nothing."""


def ignore(_event: Event) -> None:
    """The `Note` of a service that tells nobody."""


type BeginTrace = Callable[[str | None], Trace | None]
"""Where something is in a trace whose caller sent this header `traceparent`; None where nobody asked for traces."""


def untraced(_traceparent: str | None) -> None:
    """The `BeginTrace` of a service without traces."""


@contextmanager
def noted(note: Note, run: RunEnded) -> Iterator[RunEnded]:
    """Note the end of a run when the block ends. It is filled in within the block."""
    request = origin.get()
    if request is not None and request.trace is not None:
        run.trace = request.trace.below()
    try:
        yield run
    except BaseException as error:
        run.failed(error)
        raise
    finally:
        run.stages.end("rest")
        note(run)
