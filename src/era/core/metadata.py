"""What the core needs of the store of rows, as a Protocol, and what its calls take. The adapter lives in store/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from era.core.models import (
    Answered,
    Cause,
    Claim,
    Claimed,
    Gone,
    JsonObject,
    KeptOutputs,
    KeptRun,
    Language,
    NewCopy,
    NewSession,
    OwnedId,
    RunRecord,
    ServiceCommand,
    Session,
    Snapshot,
    StoredCode,
    Version,
    VersionContent,
    WantedIsolation,
)


@dataclass(frozen=True, slots=True)
class SessionFilter:
    """What to list of an owner's: newest first, `limit` rows after the row `before_key`. `gone` lists, instead of the
    sessions there are, those that are gone in this way and can still be restored."""

    owner: str
    language: Language | None = None
    metadata: Mapping[str, str] | None = None
    limit: int | None = None
    before_key: int | None = None
    gone: Gone | None = None


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of the past is kept: versions, outputs and records of runs for each session, and sessions that are
    gone."""

    versions: int = 100
    outputs: int = 100
    grace_seconds: float = 86_400.0
    runs: int = 10_000


class Keep(Enum):
    """Where None is a value: leave the field alone."""

    KEEP = 0


KEEP = Keep.KEEP


@dataclass(frozen=True, slots=True)
class SessionChange:
    """Fields to replace; None leaves a field alone."""

    default_timeout: float | None = None
    allow_internet: bool | None = None
    allow_public: bool | None = None
    metadata: JsonObject | None = None
    data: str | None = None
    """JSON text; a change of data makes the next version."""

    ttl: int | None | Keep = KEEP
    limits: Mapping[str, float | None] | None = None
    """Only those to change; None as a value takes a limit back."""

    isolation: WantedIsolation | None = None
    egress: JsonObject | None = None
    service: ServiceCommand | None | Keep = KEEP
    storage: bool | None = None
    setup: str | None | Keep = KEEP
    """JSON text; a change makes the setup pending."""


@dataclass(frozen=True, slots=True)
class SetupJob:
    """A session's setup that has not ended."""

    session_key: int
    session_id: OwnedId
    setup: str = field(repr=False)
    lock: str | None = field(default=None, repr=False)
    """The very packages that it is to install; see locks.py."""


class MetadataStore(Protocol):
    """Rows. Every call is one transaction, unless it says otherwise, and durable when it returns.

    Calls with a session's id raise NotFound where its owner has no such session, Expired where it has expired. They
    count as calls that put off its expiry. Ids are taken for all owners, but only `public_session` finds one without
    being told whose it is.
    """

    async def create_session(self, new: NewSession, claim: Claim | None = None) -> Session:
        """Raises Conflict if the id is taken. The claim is made and answered with it."""
        ...

    async def duplicate(self, copy: NewCopy, claim: Claim | None = None) -> Session:
        """Make a session of another's version, with its settings, labels and stored code. Raises Conflict if the id
        is taken, NotFound where the version isn't kept."""
        ...

    async def session(self, session_id: OwnedId) -> Session: ...

    async def public_session(self, session_id: str) -> Session:
        """Whoever's session it is: for its public URL, and for nothing else."""
        ...

    async def sessions(self, which: SessionFilter) -> Sequence[Session]: ...

    async def change_session(self, session_id: OwnedId, change: SessionChange) -> Session: ...

    async def commit(
        self, session_id: OwnedId, cause: Cause, *, data: str | None, snapshot: Snapshot | None, key: int | None = None
    ) -> Session:
        """Make the next version outside of a run; None leaves data or snapshot as they are. With `key`, raises NotFound
        where the id is another session's by now."""
        ...

    async def rollback(self, session_id: OwnedId, n: int) -> Session:
        """Make the next version, with the content of version `n`. Raises NotFound where that isn't kept."""
        ...

    async def versions(self, session_id: OwnedId, *, limit: int, before: int | None) -> Sequence[Version]:
        """Newest first, those before version `before`."""
        ...

    async def version(self, session_id: OwnedId, n: int) -> VersionContent:
        """Raises NotFound where it isn't kept."""
        ...

    async def store_code(self, session_id: OwnedId, code: StoredCode) -> None: ...

    async def delete_session(self, session_id: OwnedId) -> Session:
        """Mark it as deleted: its id is free, and it can be restored for a while. The answer is what it was."""
        ...

    async def restore_session(self, session_id: OwnedId) -> Session:
        """Bring back the session that last expired or was deleted under this id. Raises Conflict where the id is in
        use, NotFound where there is nothing to restore."""
        ...

    async def purge_session(self, session_id: OwnedId) -> Sequence[int]:
        """Drop every row of every session of this id, gone or not; their keys. Raises NotFound where there is none."""
        ...

    async def expire(self, at: int) -> Sequence[int]:
        """Mark the sessions that have expired by `at`; their keys."""
        ...

    async def purge(self, at: int) -> int:
        """Drop the rows of sessions that can't be restored any more at `at`; how many went."""
        ...

    async def begin_run(self, session_id: OwnedId, run_id: str, claim: Claim | None = None) -> Session:
        """Record a run as `running`, claim its key, and read its session. Raises SetupUnderWay, and records nothing,
        where its setup hasn't ended."""
        ...

    async def end_run(
        self,
        record: RunRecord,
        *,
        data: str | None,
        snapshot: Snapshot | None,
        outputs: KeptOutputs | None = None,
        answered: Answered | None = None,
    ) -> RunRecord:
        """Commit a run in one transaction: its record, its outputs, what its key is answered and, where
        `record.committed`, the next version with data (None: unchanged) and snapshot (None: unchanged). The answer
        has `version` and `key` set.

        Raises SessionDeleted where the session is gone.
        """
        ...

    async def runs(self, session_key: int, limit: int, before: int | None = None) -> Sequence[RunRecord]:
        """Newest first, those before the one with the key `before`."""
        ...

    async def run(self, session_id: OwnedId, run_id: str) -> tuple[RunRecord, KeptOutputs | None]:
        """A run with its outputs, None where they aren't kept. Raises NotFound also where there is no such run."""
        ...

    async def claimed(self, session_id: OwnedId, claim: Claim) -> Claimed | None:
        """What is known of the first request with this key in the last day. For creation the id is
        empty."""
        ...

    async def forget_keys(self) -> int:
        """Drop the keys that are older than a day; how many went."""
        ...

    async def prune_runs(self) -> int:
        """Drop the records of runs, with their outputs, that are more than are kept for their session; how many went.
        Runs under way stay, and those that a key still answers for."""
        ...

    async def mark_lost(self) -> int:
        """Record every run that is still `running` as `lost`: their process is gone. The answer is how many."""
        ...

    async def snapshot_roots(self) -> Sequence[str]:
        """Every snapshot root that a row still needs."""
        ...

    async def output_digests(self) -> Sequence[str]:
        """Every blob that a row needs as an output or as a value of storage."""
        ...

    async def there(self, keys: Sequence[int]) -> Sequence[int]:
        """Those of these sessions that are neither deleted nor expired."""
        ...

    async def setups_to_do(self) -> Sequence[SetupJob]:
        """Those that have not ended, of sessions that aren't gone."""
        ...

    async def begin_setup(self, job: SetupJob) -> None:
        """Mark it as `running`."""
        ...

    async def end_setup(
        self,
        job: SetupJob,
        *,
        status: str,
        result: str,
        package_set: str | None,
        left: tuple[int, Snapshot] | None = None,
    ) -> bool:
        """Record how a setup ended, `completed` or `failed`, unless the session asks for another one by now. `result`
        is JSON text, `package_set` a digest. `left` is what its commands have left, and the version they began with:
        it becomes the next version. Nothing is recorded, and the answer is false, where another is in force by now."""
        ...

    async def set_up_again(self, session_id: OwnedId) -> Session:
        """Make its setup pending again."""
        ...

    async def package_sets(self) -> Sequence[str]:
        """The digests of package sets that rows name, also rows of sessions that are gone."""
        ...

    async def package_set_lost(self, digest: str) -> int:
        """Make pending again the setups that came to this package set; how many there were."""
        ...

    async def ping(self) -> None:
        """Read something. Raises Unavailable."""
        ...

    async def dump[T](
        self,
        session_id: OwnedId,
        *,
        history: bool,
        take: Callable[[Session, Iterator[VersionContent], Iterator[KeptRun]], T],
    ) -> T:
        """What `take` makes of a session with its versions and its runs that have ended, oldest first, all as they were
        at one moment. Without history there is but the current version. `take` is called on a thread."""
        ...

    async def load(
        self,
        session: Session,
        versions: Callable[[], Iterator[VersionContent]],
        runs: Callable[[], Iterator[KeptRun]],
    ) -> Session:
        """Make a session as it was elsewhere, with its versions and runs, which are read on a thread. It takes many
        transactions, between which others go on, but the session is there all at once or not at all. Its runs don't
        count as ones of this server, and those whose ids are in use here get new ones. Raises Conflict if its id is
        taken."""
        ...

    async def counts(self) -> dict[str, Any]: ...
