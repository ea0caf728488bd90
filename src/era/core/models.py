"""The domain's values: sessions, runs, versions, snapshots. All are frozen; times are UTC microseconds since 1970."""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

type Json = None | bool | int | float | str | list[Json] | dict[str, Json]
type JsonObject = dict[str, Any]
type Language = str
"""The name of one of era.languages."""

type Status = Literal["running", "ok", "failed", "timeout", "oom", "killed", "disk_full", "lost"]
type Isolation = Literal["gvisor", "bubblewrap"]
type WantedIsolation = Literal["auto", "gvisor", "bubblewrap"]
type SetupStatus = Literal["pending", "running", "completed", "failed"]
type Cause = Literal[
    "create", "run", "data", "files", "rollback", "duplicate", "setup", "checkpoint", "loose_checkpoint"
]
type Route = Literal["create", "duplicate", "run", "process"]
type ServiceCommand = str | list[str]
type Removal = Literal["expired", "deleted"]

CHECKPOINTS: tuple[Cause, ...] = ("checkpoint", "loose_checkpoint")
"""Causes of versions that a live session makes of itself (core/live/checkpoints.py). The files of a loose one may not
all be of the same moment."""

STATE_FILE = ".session_data.json"
DEFAULT_OWNER = "default"
"""The owner of what the operator makes, and of what was made before there were owners."""

_ID_ALPHABET = string.ascii_lowercase + string.digits


MICROS = 1_000_000
"""Microseconds in a second."""


def now() -> int:
    """UTC microseconds since 1970; in a cluster by the clock that all its hosts go by."""
    return time.time_ns() // 1000 + _clock.ahead


class _Clock:
    """How far the cluster's clock is ahead of this machine's."""

    ahead = 0


_clock = _Clock()
_APART = 1_000_000
"""Clocks that differ by less count as equal: how long a message takes is unknown, and time shouldn't jump with it."""


def set_clock(at: int) -> int:
    """Have `now` go by a clock that shows this time just now; by how many microseconds that changes it."""
    apart = at - now()
    if abs(apart) < _APART:
        return 0
    _clock.ahead += apart
    return apart


def seconds_ahead() -> float:
    """By how much the clock of `now` is ahead of this machine's."""
    return _clock.ahead / 1_000_000


def timestamp(micros: int | None) -> str:
    """RFC 3339 in UTC with milliseconds; `""` for None, as the API shows a run that has not been."""
    if micros is None:
        return ""
    moment = datetime.fromtimestamp(micros / 1_000_000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_id(prefix: str) -> str:
    """A new id `{prefix}_{ms}_{9 random}`, in the form that clients know from session ids; `ms` is milliseconds since
    1970."""
    tail = "".join(secrets.choice(_ID_ALPHABET) for _ in range(9))
    return f"{prefix}_{time.time_ns() // 1_000_000}_{tail}"


def can_be_service(value: object) -> bool:
    """Whether this untrusted value may be a session's `service`."""
    words = value if isinstance(value, list) else [value]
    return 0 < len(words) <= 64 and all(
        isinstance(word, str) and 0 < len(word) <= 4096 and "\0" not in word for word in words
    )


def command_of(service: ServiceCommand | None) -> list[str]:
    """A service command as an argument vector, empty where there is none."""
    return ["/bin/sh", "-c", service] if isinstance(service, str) else service or []


@dataclass(frozen=True, slots=True)
class OwnedId:
    """A session's id with its owner: it finds that owner's session, and nobody else's. As text it is the bare id."""

    owner: str
    id: str
    key_id: str = field(default="", compare=False)
    """The API key of the call in which it was named, for whose quotas the call counts; empty where there is none."""

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True, slots=True)
class StoredCode:
    """Code kept with a session, run when a run brings none."""

    code: str
    description: str | None
    updated_at: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A content-addressed tree of files. `root` is the hash of its tree object, None for no files at all."""

    root: str | None = None
    file_count: int = 0
    total_bytes: int = 0
    stored_bytes: int = field(default=0, compare=False)
    """At most so many bytes of content were new to the session when it was made; 0 where it was made before."""


EMPTY = Snapshot()


@dataclass(frozen=True, slots=True)
class Session:
    """One session as its row stands. `key` is never reused, `id` may be after a delete.

    `data` is JSON text: most uses hand it on unread.
    """

    key: int
    id: str
    owner: str
    language: Language
    persistent: bool
    data: str
    metadata: JsonObject
    allow_internet: bool
    allow_public: bool
    default_timeout: float
    stored: StoredCode | None
    version: int
    snapshot: Snapshot
    created_at: int
    updated_at: int
    last_run_at: int | None
    ttl: int | None = None
    """Seconds without a call after which it expires; None is never."""

    expires_at: int | None = None
    deleted_at: int | None = None
    """When it expired or was deleted: its id is free, but it can be restored for a while."""

    expired: bool = False
    limits: JsonObject = field(default_factory=dict)
    """Those that were asked for, in the units of the API; see limits.py."""

    isolation: WantedIsolation = "auto"
    egress: JsonObject = field(default_factory=dict)
    """Where its programs may connect to; see allowlist.py."""

    service: ServiceCommand | None = None
    """What serves its public URLs: a line for the shell, or a program and its arguments."""

    setup: str | None = None
    """The packages, variables and commands that it asks for, as JSON text; see setup/requirements.py."""

    setup_status: SetupStatus | None = None
    setup_result: str | None = None
    """How the setup went, as JSON text, once it has ended."""

    package_set: str | None = None
    """The digest of its installed packages; see setup/package_sets.py."""

    setup_lock: str | None = None
    """The exact packages that the setup is to install, as JSON text, if it came with a capsule; see
    setup/package_sets.py."""

    storage: bool = True
    """Whether its programs get to their owner's storage."""

    record_code: bool = True
    """Whether records of its runs keep the code or command that ran."""

    history_bytes: int | None = None
    """At most so many bytes are held by its kept versions; None where that isn't known. See versions.py."""

    @property
    def owned_id(self) -> OwnedId:
        return OwnedId(self.owner, self.id)

    @property
    def removal(self) -> Removal | None:
        """How it was removed; None while it is present."""
        if self.deleted_at is None:
            return None
        return "expired" if self.expired else "deleted"


@dataclass(frozen=True, slots=True)
class NewSession:
    """The fields of a session to be created; the store adds key, version and times."""

    id: OwnedId
    language: Language
    persistent: bool
    data: str
    metadata: JsonObject
    allow_internet: bool
    allow_public: bool
    default_timeout: float
    ttl: int | None = None
    limits: JsonObject = field(default_factory=dict)
    isolation: WantedIsolation = "auto"
    egress: JsonObject = field(default_factory=dict)
    service: ServiceCommand | None = None
    setup: str | None = None
    storage: bool = True
    record_code: bool = True


@dataclass(frozen=True, slots=True)
class NewCopy:
    """A session to be created from another's version. It belongs to the same owner."""

    source_id: OwnedId
    id: str
    version: int | None = None
    """None is the current one."""

    data: str | None = None
    """JSON text that replaces the version's own; None keeps that."""


@dataclass(frozen=True, slots=True)
class Version:
    """One state of a session: its data and files after a commit. It never changes; old ones are dropped in time, unless
    they have a name."""

    n: int
    created_at: int
    cause: Cause
    run_id: str | None
    snapshot: Snapshot
    name: str | None = None


@dataclass(frozen=True, slots=True)
class KeptVersion:
    """What a kept version holds, as the bound of the history needs it."""

    n: int
    root: str | None
    named: bool
    is_checkpoint: bool = False


@dataclass(frozen=True, slots=True)
class Trim:
    """What a commit drops of its session's history, so that this stays within its bound."""

    drop: Sequence[int]
    """Numbers of versions without a name."""

    held: int
    """What `Session.history_bytes` is after the commit."""


@dataclass(frozen=True, slots=True)
class VersionContent:
    """A version with its data as JSON text."""

    version: Version
    data: str


@dataclass(frozen=True, slots=True)
class StateOutcome:
    """What a run did to its session's state."""

    version: int
    """The version now in force."""

    committed: bool
    """Whether what the run left is that version. It made no new one if it changed nothing."""

    reason: str | None = None
    """Why not, if not."""

    versions_dropped: int = 0
    """How many old versions had to go so that the session's history stays within its bound."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The durable record of one run. It never holds env, secrets or output."""

    id: str
    session_key: int
    status: Status
    started_at: int
    ended_at: int | None = None
    exit_code: int | None = None
    duration_us: int | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    committed: bool = False
    reason: str | None = None
    """Why nothing was committed."""

    version: int | None = None
    """The version in force after it."""

    peak_memory_bytes: int | None = None
    cpu_us: int | None = None
    reaped: int | None = None
    """Processes that outlived the program and were killed."""

    enforced: JsonObject = field(default_factory=dict)
    """The isolation and limits that were really in force."""

    egress: JsonObject = field(default_factory=dict)
    """Where it connected or tried to connect: `destinations`, and how many `more`."""

    artifacts: JsonObject = field(default_factory=dict)
    """Pictures, documents and tables it left: `files`, and how many `more`; see files/diffs.py."""

    versions_dropped: int = 0
    """How many old versions its commit dropped, so that the session's history stays within its bound."""

    pieces: int | None = None
    """How many pieces of output it wrote, None where nobody counted; see transcript.py."""

    setup_error: str | None = None
    """Why the session's setup had failed, if it had: the program ran without what that was to have installed."""

    code: str | None = field(default=None, repr=False)
    """The code that ran, or its beginning; None for a command, and where it isn't to be recorded."""

    invocation: JsonObject = field(default_factory=dict, repr=False)
    """The `command` that ran or the `args` of the code, if any; `truncated` where `code` or one of these was cut."""

    key: int = field(default=0, compare=False)
    """The row's, which grows with each run."""


@dataclass(frozen=True, slots=True)
class KeptOutputs:
    """The output of a run that is kept: for each stream the bytes themselves, or the digest of the blob with them."""

    stdout: bytes | None = field(repr=False)
    stderr: bytes | None = field(repr=False)
    stdout_digest: str | None = None
    stderr_digest: str | None = None
    piece_order: bytes | None = field(default=None, repr=False)
    """The list of the pieces, as transcript.py makes it; this and its digest are None of what was imported."""

    piece_order_digest: str | None = None
    cell: bytes | None = field(default=None, repr=False)
    """What a run in a context answered besides, as JSON; this and its digest are None for other runs."""

    cell_digest: str | None = None
    blob_bytes: int = 0
    """Size of its blobs together. Not known (0) of what was read from the store."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A request with an idempotency key. The same key is another one for each route, and for each session or, where a
    session is to be created, for each owner."""

    route: Route
    key: str
    request_hash: str
    """SHA-256 of the request's body without its hidden parts, in hexadecimal."""

    env_mark: str = field(repr=False)
    """`{process}:{HMAC of the hidden parts}`; see idempotency.py."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """The first request with an idempotency key, as stored. The first two fields are those of its Claim."""

    request_hash: str
    env_mark: str = field(repr=False)
    run: RunRecord | None
    """None where the request created a session."""

    answer: str | None
    """The created session (idempotency.session_to_json), or the data that the run was answered with as JSON text; None
    where the run hasn't ended or its result wasn't kept, empty where its answer isn't kept any more."""

    outputs: KeptOutputs


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer of a run with an idempotency key, apart from its record."""

    claim: Claim
    data: str | None = None
    """The data as clients see it, as JSON text; None where the program hasn't run, and the key is free again."""

    outputs: KeptOutputs | None = None


type KeptRun = tuple[RunRecord, KeptOutputs | None]
"""A run with its output, None where that isn't kept."""


@dataclass(frozen=True, slots=True)
class SettingInForce:
    """A setting that bounds something."""

    name: str
    """Of the variable, such as ERA_MAX_WARM."""

    value: float | None
    """What holds, in the unit that the description names; None where nothing was set, or nothing finite."""

    default: float | None
    description: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that this machine has or lacks: a runtime, or a wall around programs."""

    about: str
    """A language or a kind of sandbox."""

    there: bool
    text: str
    remedy: str = ""
    """How to get it where it isn't there."""


@dataclass(frozen=True, slots=True)
class RecordedProgram:
    """The fields of a run's record that show what ran; RunRecord describes them."""

    code: str | None = field(default=None, repr=False)
    invocation: JsonObject = field(default_factory=dict, repr=False)


def no_program(_: Session) -> RecordedProgram:
    """Record nothing of what ran."""
    return RecordedProgram()


@dataclass(frozen=True, slots=True)
class Use:
    """Usage of one API key on one day, which is counted in days since 1970 in UTC."""

    owner: str
    key_id: str
    day: int
    runs: int = 1
    cpu_us: int = 0
    """Microseconds of processor time."""

    egress_bytes: int = 0
    """Bytes that were sent to and received from the network."""
