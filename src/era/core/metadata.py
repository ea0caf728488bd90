"""The port to the metadata store, which holds all rows of sessions and runs, and the values that its calls take.

The adapter is `SqlStore` in store/metadata.py. Blobs, inboxes, storage items and API keys have ports of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from era.core.models import (
    Answered,
    Cause,
    Claim,
    Claimed,
    JsonObject,
    KeptOutputs,
    KeptRun,
    KeptVersion,
    Language,
    NewCopy,
    NewSession,
    OwnedId,
    RecordedProgram,
    Removal,
    RunRecord,
    ServiceCommand,
    Session,
    Snapshot,
    Status,
    StoredCode,
    Trim,
    Use,
    Version,
    VersionContent,
    WantedIsolation,
    no_program,
)
from era.core.process import ProcessRecord


@dataclass(frozen=True, slots=True)
class SessionFilter:
    """Which sessions of an owner to list, newest first."""

    owner: str
    language: Language | None = None
    metadata: Mapping[str, str] | None = None
    """Pairs that all must match: a string itself, any other value as compact JSON."""

    limit: int | None = None
    before_key: int | None = None
    """List only sessions older than the one with this key."""

    removed: Removal | None = None
    """List, instead of present sessions, those that were removed in this way and can still be restored."""

    ids: Sequence[str] | None = None
    """Only the present sessions with one of these ids."""

    without_ids: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs of an owner's sessions to list, newest first."""

    owner: str
    limit: int
    status: Status | None = None
    session_id: str | None = None
    since: int | None = None
    """Only those that began at this time or later; microseconds since 1970."""

    before_key: int | None = None
    """Only those before the one with this key."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of the past is kept. All numbers but the grace period are per session."""

    versions: int = 100
    """The newest versions that are no checkpoints; those with a name besides."""

    checkpoints: int = 10
    """The newest checkpoints; those with a name besides."""

    outputs: int = 100
    """The newest runs whose outputs are kept; 0 keeps none."""

    output_bytes: int = 2 << 30
    """Of stdout and stderr of these runs together, give or take a few MiB. The oldest go first, the newest never does.
    They are counted when a run has left a long output, so what was imported stays until then."""

    answer_bytes: int = 1 << 30
    """What the answers to idempotency keys of one route take together, give or take a few MiB. The oldest go first, the
    newest never does. Those of new sessions are counted for each owner."""

    grace_seconds: float = 86_400.0
    """For how long a removed session can be restored."""

    runs: int = 10_000
    """The newest records of runs."""


class Keep(Enum):
    """The type of `KEEP`, which leaves a field alone where None is a value."""

    KEEP = 0


KEEP = Keep.KEEP


@dataclass(frozen=True, slots=True)
class SessionChange:
    """The fields of a session to replace; None leaves a field alone, or `KEEP` where None is a value."""

    default_timeout: float | None = None
    """Seconds."""

    allow_internet: bool | None = None
    allow_public: bool | None = None
    metadata: JsonObject | None = None
    data: str | None = None
    """JSON text; other data than the present makes the next version."""

    ttl: int | None | Keep = KEEP
    """Seconds; None never expires."""

    limits: Mapping[str, float | None] | None = None
    """Only those to change; None as a value returns to the server's default."""

    isolation: WantedIsolation | None = None
    egress: JsonObject | None = None
    service: ServiceCommand | None | Keep = KEEP
    storage: bool | None = None
    record_code: bool | None = None
    setup: str | None | Keep = KEEP
    """JSON text; a change makes the setup pending."""


@dataclass(frozen=True, slots=True)
class SetupJob:
    """A session's setup that has not ended."""

    session_key: int
    session_id: OwnedId
    setup: str = field(repr=False)
    """What is to be installed, as JSON text; see requirements.py."""

    lock: str | None = field(default=None, repr=False)
    """The exact packages to install, as JSON text, where the setup came with a capsule; see
    core/setup/package_sets.py."""


class MetadataStore(Protocol):
    """The rows of sessions, versions, runs, processes, setups and idempotency keys.

    Every call is one transaction, unless it says otherwise, and durable when it returns. Every call raises Unavailable
    where the database fails or is closed; then nothing of it happened.

    A session is *present* until it expires or is deleted. Then it is *removed*: its id is free, and it can be restored
    within the grace period. A *purged* session has no rows. Calls that take a session's `OwnedId` are calls to that
    session, and put off its expiry. They raise NotFound where its owner has no present session of this id, and Expired
    where that session was removed because its ttl had gone by; none of them tells whether another owner has one. A
    session's `key` is never used again, unlike its id.

    Those that make sessions, or that make a version, raise QuotaReached where an owner or a key would then have more
    sessions or more in files than it may, and more than before.

    Times are UTC microseconds since 1970.
    """

    @property
    def retention(self) -> Retention:
        """How much of the past is kept."""
        ...

    async def create_session(self, new: NewSession, claim: Claim | None = None) -> Session:
        """Create a session, with version 1. `claim` is claimed and answered with it.

        Raises Conflict where the id is taken, whoever owns that session, or where the key is claimed already.
        """
        ...

    async def duplicate(self, copy: NewCopy, claim: Claim | None = None) -> Session:
        """Create a session from a version of another one, with its settings, metadata and stored code. `claim`, within
        the source session, is claimed and answered with it.

        Raises NotFound or Expired for the source, NotFound where the version isn't kept, Conflict as `create_session`.
        """
        ...

    async def session(self, session_id: OwnedId) -> Session:
        """The session as it is. Raises NotFound or Expired."""
        ...

    async def public_session(self, session_id: str) -> Session:
        """The session of this id, whoever owns it: for its public URL and links, and for nothing else. Counts as a
        call.

        Raises NotFound or Expired.
        """
        ...

    async def session_of_site(self, key: int) -> Session:
        """The session with this key, whoever owns it: for its site, and for nothing else. Counts as a call.

        Raises NotFound or Expired.
        """
        ...

    async def sessions(self, which: SessionFilter) -> Sequence[Session]:
        """The sessions that match, newest first. Counts as no call to them."""
        ...

    async def session_page(self, which: SessionFilter, most: int) -> tuple[Sequence[Session], bool]:
        """The same, with a limit, but none behind those whose rows together have `most` characters or more; and
        whether more sessions match than these. Each may have some MiB, so a thousand could fill the memory."""
        ...

    async def newest_ids(self, owner: str, limit: int) -> Sequence[str]:
        """The ids of an owner's present sessions, the newest `limit`, newest first. Counts as no call to them."""
        ...

    async def present_sessions(self, keys: Sequence[int]) -> Sequence[int]:
        """The keys of those of these sessions that are present, in no order."""
        ...

    async def snapshots_of(self, keys: Sequence[int]) -> Mapping[int, Snapshot]:
        """The files of the current versions of those of these sessions that are present, by key. Counts as no call."""
        ...

    async def change_session(self, session_id: OwnedId, change: SessionChange) -> Session:
        """Replace settings of a session; the session after that. Raises NotFound or Expired."""
        ...

    async def store_code(self, session_id: OwnedId, code: StoredCode) -> None:
        """Replace a session's stored code. Raises NotFound or Expired."""
        ...

    async def delete_session(self, session_id: OwnedId, *, key: int | None = None) -> Session:
        """Remove a session; what it was before. Raises NotFound or Expired; with `key`, NotFound also where another
        session has the id by now."""
        ...

    async def restore_session(self, session_id: OwnedId) -> Session:
        """Make present again the session of this owner that was the last to be removed from this id.

        Raises Conflict where the id is in use, NotFound or Expired where there is nothing to restore.
        """
        ...

    async def purge_session(
        self, session_id: OwnedId, *, key: int | None = None, only_removed: bool = False
    ) -> Sequence[int]:
        """Purge every session that the owner has or had under this id, present or removed; their keys. With `key`, only
        the one that has it, with `only_removed` none that is present.

        Raises NotFound where there is none.
        """
        ...

    async def expire(self, at: int) -> Sequence[int]:
        """Mark as expired the present sessions whose ttl has gone by at `at`, a thousand at most; their keys. A run or
        process in progress keeps its session. Two transactions: one to look, one to mark."""
        ...

    async def purge(self, at: int) -> int:
        """Purge sessions that can no longer be restored at `at`, a thousand at most; how many. Many small transactions,
        so that others can write in between."""
        ...

    async def purge_beyond(self, bounds: Callable[[str], tuple[int, int]]) -> int:
        """Purge sessions that could be restored, the oldest first, of owners who have more or larger ones of them than
        `bounds` says of an owner: how many, and how many bytes of files; 0: any. One of each owner stays. At most a
        thousand go; returns how many did."""
        ...

    async def commit(
        self,
        session_id: OwnedId,
        cause: Cause,
        *,
        data: str | None,
        snapshot: Snapshot | None,
        key: int | None = None,
        trim: Trim | None = None,
    ) -> Session:
        """Make the next version outside of a run; None for `data` (JSON text) or `snapshot` keeps the present one.
        Where that changes neither, no version is made. `trim` is what goes of the session's history with it.

        Raises NotFound or Expired; with `key`, NotFound also where another session has the id by now.
        """
        ...

    async def rollback(self, session_id: OwnedId, n: int) -> Session:
        """Make the next version, with the content of version `n`.

        Raises NotFound or Expired, NotFound also where that version isn't kept.
        """
        ...

    async def versions(self, session_id: OwnedId, *, limit: int, before: int | None) -> Sequence[Version]:
        """Up to `limit` versions older than version `before`, newest first. Raises NotFound or Expired."""
        ...

    async def version(self, session_id: OwnedId, n: int) -> VersionContent:
        """Version `n` with its data. Raises NotFound or Expired, NotFound also where that version isn't kept."""
        ...

    async def kept_versions(self, session_key: int) -> Sequence[KeptVersion]:
        """What each version of a session holds, newest first. Counts as no call."""
        ...

    async def name_version(self, session_id: OwnedId, n: int, name: str, *, named: Collection[int]) -> Version | None:
        """Name version `n`, which is kept from now on, or give it another name. `named` are the numbers of the
        session's versions that have a name; where that isn't so any more, nothing happens, and the answer is None.

        Raises NotFound or Expired, NotFound also where that version isn't kept, Conflict where another version has the
        name.
        """
        ...

    async def clear_name(self, session_id: OwnedId, n: int) -> None:
        """Take version `n` its name; the version goes with it where it was kept for that only.

        Raises NotFound or Expired, NotFound also where that version isn't kept or has no name.
        """
        ...

    async def begin_run(
        self,
        session_id: OwnedId,
        run_id: str,
        claim: Claim | None = None,
        *,
        program: Callable[[Session], RecordedProgram] = no_program,
        durably: bool = True,
        known: Callable[[Session], object] | None = None,
    ) -> Session:
        """Record a run as `running`, with its claim, and read its session. Where not `durably`, a killed service finds
        the record again; a power cut may take it, but not once anything else was committed.

        `program` makes the record's code or command from the session as it is then. `known` may get the session before
        the record is kept: what needs no record can begin meanwhile.

        Raises NotFound or Expired, SetupUnderWay where the session's setup hasn't ended, Conflict where the run's id
        was used before or the key is claimed already. Then nothing is recorded.
        """
        ...

    async def end_run(
        self,
        record: RunRecord,
        *,
        data: str | None,
        snapshot: Snapshot | None,
        outputs: KeptOutputs | None = None,
        answered: Answered | None = None,
        trim: Trim | None = None,
        who: OwnedId | None = None,
        use: Use | None = None,
    ) -> RunRecord:
        """Commit a run: its record, its outputs, the answer to its idempotency key, what it has used and, where
        `record.committed`, the next version; None for `data` (JSON text) or `snapshot` says that the run left the
        present one. Where it left both, there is no next version. `who` is whose quotas bound what it leaves, and whose
        webhooks are told. `trim` is what goes of the session's history with it. The record that is returned has
        `version`, `versions_dropped` and `key` set.

        Raises CommitFailed where this can't be stored, QuotaReached where its files are too many for a quota, and then
        nothing of it is stored; SessionDeleted where the session was removed: then its record is stored, as not
        committed, and nothing else.
        """
        ...

    async def runs(self, session_key: int, limit: int, before: int | None = None) -> Sequence[RunRecord]:
        """Up to `limit` runs older than the one with the key `before`, newest first. Counts as no call."""
        ...

    async def runs_of_owner(self, which: RunFilter) -> Sequence[tuple[str, RunRecord]]:
        """The runs that match, newest first, each with the id of its session. Sessions that were removed have none.
        Counts as no call."""
        ...

    async def run(self, session_id: OwnedId, run_id: str) -> tuple[RunRecord, KeptOutputs | None]:
        """A run with its outputs, None where they aren't kept. Raises NotFound or Expired, NotFound also where the
        session has had no such run."""
        ...

    async def run_of_any(self, run_id: str) -> RunRecord | None:
        """A run of any session, also of one that is deleted."""
        ...

    async def mark_lost(self) -> int:
        """Record every run that is still `running` as `lost`, since the process that ran it is gone; how many."""
        ...

    async def prune_runs(self) -> int:
        """Drop each session's oldest records of runs, with their outputs, beyond as many as are kept; how many. Runs in
        progress stay, and those whose idempotency key is kept. Many small transactions."""
        ...

    async def find_claim(self, session_id: OwnedId, claim: Claim) -> Claimed | None:
        """The first request of the last day that claimed the same key on the same route, and its answer. For the route
        `create`, whose keys are its owner's, `session_id.id` is empty. Raises NotFound or Expired otherwise."""
        ...

    async def prune_idempotency_keys(self) -> int:
        """Drop the idempotency keys that are older than a day; how many."""
        ...

    async def begin_process(self, record: ProcessRecord, claim: Claim | None = None) -> None:
        """Record a process as `running`, and claim and answer its key. A killed service finds the record again; a power
        cut may take it, if it has no key. Raises Conflict where the key is claimed already, NotFound where the session
        is gone, and Unavailable that `may_have_committed` where the database stays away in the middle of it."""
        ...

    async def end_process(self, record: ProcessRecord, freed: Claim | None = None) -> None:
        """Record how a process ended, and drop the oldest of its session's that are too many. Counts as a call to the
        session. One that never started frees its key. Does nothing where it isn't on record as `running`, so it may be
        called again where nobody knows whether that was stored."""
        ...

    async def processes(self, session_id: OwnedId) -> Sequence[ProcessRecord]:
        """All processes of a session on record, newest first, without their output. Raises NotFound or Expired."""
        ...

    async def process(self, session_id: OwnedId, name: str) -> ProcessRecord:
        """The process with this id, or else the newest with this tag, with its output. Raises NoProcess, NotFound,
        Expired."""
        ...

    async def mark_processes_lost(self) -> int:
        """Record every process that is still `running` as `lost`, since the service that had it is gone; how many."""
        ...

    async def note_context(self, session_key: int, name: str) -> bool:
        """Remember a context's name. Returns whether it was known already."""
        ...

    async def forget_context(self, session_key: int, name: str) -> bool:
        """Forget a context's name. Returns whether it was known."""
        ...

    async def unfinished_setups(self) -> Sequence[SetupJob]:
        """The setups of present sessions that have not ended, a thousand at most, in turn by owners, and of each the
        oldest session's first."""
        ...

    async def begin_setup(self, job: SetupJob) -> bool:
        """Mark a setup as `running`; false, with nothing done, where it has ended, or the session asks for another one
        by now."""
        ...

    async def end_setup(
        self,
        job: SetupJob,
        *,
        status: str,
        result: str,
        package_set: str | None,
        left: tuple[int, Snapshot] | None = None,
        trim: Trim | None = None,
    ) -> bool:
        """Record how a setup ended; false, with nothing recorded, where the session asks for another setup by now.

        `status` is `completed` or `failed`, `result` is JSON text, `package_set` the digest of the package set that the
        session has where it is completed. `left`
        is the number of the version that the setup's commands began with, and the files that they left. These become
        the next version, and `trim` goes; where another version is in force by now, the answer is false and nothing is
        recorded. Nor is anything where they are too many for a quota, and QuotaReached is raised.
        """
        ...

    async def restart_setup(self, session_id: OwnedId) -> Session:
        """Make a session's setup pending again; its package set stays until that is completed. Raises NotFound or
        Expired, NotFound also where it has no setup."""
        ...

    async def package_sets(self) -> Sequence[str]:
        """The digest of every package set that a session has, removed sessions included."""
        ...

    async def package_set_lost(self, digest: str) -> int:
        """Make pending again every setup that led to this package set, whose files are lost; how many."""
        ...

    async def snapshot_roots(self) -> Sequence[str]:
        """The root of every snapshot that a version names, removed sessions included."""
        ...

    async def output_digests(self) -> Sequence[str]:
        """The digest of every blob that holds an output, an answer to an idempotency key, or a value of storage."""
        ...

    async def dump[T](
        self,
        session_id: OwnedId,
        *,
        history: bool,
        take: Callable[[Session, Iterator[VersionContent], Iterator[KeptRun]], T],
    ) -> T:
        """Read a whole session for a capsule. The result is that of `take(session, versions, runs)`, which is called on
        a thread, within the transaction: what it iterates over, oldest first, is all of one moment. Runs in progress
        are left out. Without `history` there is only the current version, and no run.

        Raises NotFound or Expired, and what `take` raises.
        """
        ...

    async def load(
        self,
        session: Session,
        versions: Iterator[VersionContent],
        runs: Iterator[KeptRun],
        key_id: str = "",
    ) -> Session:
        """Create a session as it was elsewhere, with its versions and runs, oldest first and no more than `retention`
        keeps, by a call with the API key `key_id`. The iterators run on a thread.

        It takes many small transactions, between which others can write, but the session is present as a whole or not
        at all. Its runs don't count as ones of this server, and those whose ids are in use here get new ones.

        Raises Conflict where the session's id is taken, BadRequest where two of its runs have one id, and what the
        iterators raise.
        """
        ...

    async def fence_dead_hosts(self) -> bool:
        """See to it that hosts of the cluster which were declared dead can commit nothing any more, however long they
        are paused. False where that can't be said of all, or a host's lease is over and nobody has declared it dead."""
        ...

    async def sizes(self) -> Mapping[str, tuple[int, int]]:
        """How many present sessions each owner has, and the bytes of their files."""
        ...

    async def ping(self) -> None:
        """Read something. Raises Unavailable."""
        ...

    async def check_writable(self) -> None:
        """Begin and end a transaction that may write. Raises Unavailable."""
        ...

    async def counts(self) -> dict[str, Any]:
        """`{"sessions": n, "runs": {status: n}}`: present sessions, and the runs that were on this server."""
        ...
