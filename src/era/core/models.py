"""What ERA speaks of: sessions, runs, snapshots. Plain frozen values; times are UTC microseconds since 1970."""

from __future__ import annotations

import secrets
import string
import time
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
type Cause = Literal["create", "run", "data", "files", "rollback", "duplicate", "setup"]
type Route = Literal["create", "duplicate", "run"]
type ServiceCommand = str | list[str]
type Removal = Literal["expired", "deleted"]

STATE_FILE = ".session_data.json"
DEFAULT_OWNER = "default"
"""Whose all is that the operator makes, and that was made before there were owners."""

_ID_ALPHABET = string.ascii_lowercase + string.digits


def now() -> int:
    """UTC microseconds since 1970."""
    return time.time_ns() // 1000


def timestamp(micros: int | None) -> str:
    """RFC 3339 in UTC with milliseconds; `""` for None, as the API shows a run that has not been."""
    if micros is None:
        return ""
    moment = datetime.fromtimestamp(micros / 1_000_000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def new_id(prefix: str) -> str:
    """`{prefix}_{ms}_{9 random}`, as clients know it from session ids."""
    tail = "".join(secrets.choice(_ID_ALPHABET) for _ in range(9))
    return f"{prefix}_{time.time_ns() // 1_000_000}_{tail}"


def can_be_service(value: object) -> bool:
    """Whether this is what a session may keep as `service`."""
    words = value if isinstance(value, list) else [value]
    return 0 < len(words) <= 64 and all(
        isinstance(one, str) and 0 < len(one) <= 4096 and "\0" not in one for one in words
    )


def command_of(service: ServiceCommand | None) -> list[str]:
    """The program and its arguments, none where there is no service."""
    return ["/bin/sh", "-c", service] if isinstance(service, str) else service or []


@dataclass(frozen=True, slots=True)
class OwnedId:
    """A session's id as one owner means it: it finds that owner's session, and nobody else's. As text it is the id."""

    owner: str
    id: str

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


EMPTY = Snapshot()


@dataclass(frozen=True, slots=True)
class Session:
    """One session as its row stands. `key` is never reused, `id` may be after a delete.

    `data` is JSON text, because most runs hand it on unread.
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
    """Those it asked for, in the units of the API; see limits.py."""

    isolation: WantedIsolation = "auto"
    egress: JsonObject = field(default_factory=dict)
    """Where its programs may connect to; see egress.py."""

    service: ServiceCommand | None = None
    """What serves its public URLs: a line for the shell, or a program and its arguments."""

    setup: str | None = None
    """What it asks to have installed, as JSON text; see requirements.py."""

    setup_status: SetupStatus | None = None
    setup_result: str | None = None
    """How the setup went, as JSON text, once it has ended."""

    package_set: str | None = None
    """The digest of its installed packages; see setup/package_sets.py."""

    setup_lock: str | None = None
    """The very packages that the setup is to install, as JSON text, where it came with a capsule; see locks.py."""

    storage: bool = True
    """Whether its programs get to their owner's storage."""

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
    """What a session is made of; the store adds key, version and times."""

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


@dataclass(frozen=True, slots=True)
class NewCopy:
    """A session made of another's version: None is its current one, `data` (JSON text) replaces that version's. It
    belongs to the same owner."""

    source_id: OwnedId
    id: str
    version: int | None = None
    data: str | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """One state that a session had. It never changes; old ones are dropped in time."""

    n: int
    created_at: int
    cause: Cause
    run_id: str | None
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class VersionContent:
    """A version with its data as JSON text."""

    version: Version
    data: str


@dataclass(frozen=True, slots=True)
class StateOutcome:
    """What became of the state: the version now in force, whether this run made it, and if not, why."""

    version: int
    committed: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The durable record of one run. Never holds code, env or output. `key` grows with each run."""

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
    version: int | None = None
    peak_memory_bytes: int | None = None
    cpu_us: int | None = None
    reaped: int | None = None
    enforced: JsonObject = field(default_factory=dict)
    egress: JsonObject = field(default_factory=dict)
    """Where it connected to or tried to: `destinations`, and how many `more`."""

    artifacts: JsonObject = field(default_factory=dict)
    """Pictures, documents and tables it left: `files`, and how many `more`; see artifacts.py."""

    key: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class KeptOutputs:
    """What a run wrote to each stream: the bytes themselves, or the digest of the blob that holds them."""

    stdout: bytes | None = field(repr=False)
    stderr: bytes | None = field(repr=False)
    stdout_digest: str | None = None
    stderr_digest: str | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A request with an idempotency key; idempotency.py tells of its marks. Keys are apart for each route and for each
    session or, where one is to be made, for each owner."""

    route: Route
    key: str
    request_hash: str
    env_mark: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Claimed:
    """What is known of a key's first request. `answer` is the session it made, packed, or the data its run answered;
    None where the run hasn't ended or its result wasn't kept."""

    request_hash: str
    env_mark: str = field(repr=False)
    run: RunRecord | None
    answer: str | None
    outputs: KeptOutputs


@dataclass(frozen=True, slots=True)
class Answered:
    """What a run with a key was answered, apart from its record: the data as shown, and its output. Without data it
    hasn't run, and the key is free again."""

    claim: Claim
    data: str | None = None
    outputs: KeptOutputs | None = None


type KeptRun = tuple[RunRecord, KeptOutputs | None]
"""A run with its outputs, None where they aren't kept."""
