"""What the core needs from the outside, as Protocols. Adapters live in store/, drivers/, hosts/ and network/.

Who calls whom: `runs` and `sessions` call a `MetadataStore` (metadata.py), a `SnapshotStore` and a `SandboxPool`,
`runs` a `Network`; a `SandboxPool` calls a `Driver` for each `Sandbox` it needs. Nothing calls back except through what
these calls return."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from era.core.files.diffs import FileChanges
from era.core.models import JsonObject, Language, Session, Snapshot, WantedIsolation
from era.core.secrets import Secret


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard bounds of one sandbox."""

    memory_bytes: int
    cpus: float
    pids: int
    disk_bytes: int
    """Of the working directory; no file may be larger either."""

    files: int
    """Entries of the working directory: files, directories, links and whatever else there is."""

    output_bytes: int
    """Of stdout, and of stderr."""

    tmp_bytes: int
    """Of /tmp, and of /dev/shm."""

    write_bytes_per_second: int = 0
    """To disk, where a cgroup can bound that; 0 is without a bound."""


@dataclass(frozen=True, slots=True)
class Program:
    """One run as the sandbox sees it. `env` is seen by this run only and is never logged."""

    code: bytes = field(repr=False)
    state: bytes = field(repr=False)
    env: Mapping[str, str] = field(repr=False)
    timeout: float
    ephemeral: bool
    """Wipe the working directory once the run has ended."""

    files: Mapping[str, bytes] = field(repr=False)
    """Extra files to put into the working directory first, by relative path."""

    command: Sequence[str] = ()
    """What is started instead of an interpreter with `code`; found by the PATH inside."""

    certificates: Mapping[str, str] = field(default_factory=dict)
    """Variables that name the certificates to trust; those of `env` win over them. They are no secrets: processes that
    are started ahead of the next run have them too."""

    supervised: bool = False
    """The kernel notifies the service before it connects this program to anything (guest/connect_filter.py)."""


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of what the program wrote, as it wrote it."""

    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended. `state` is the state file's content, None where there is none to read."""

    exit_code: int
    cause: Literal["exit", "signal", "timeout", "oom", "killed", "disk_full"]
    duration: float
    state: bytes | None
    state_problem: str | None
    """Why the state file could not be read; None also where it is merely missing."""

    stdout_truncated: bool
    stderr_truncated: bool
    reaped: int
    """Processes that outlived the program and were killed."""

    peak_memory_bytes: int | None
    cpu_us: int | None
    sandbox_alive: bool
    disk_problem: str | None = None
    """Why nothing can be kept: what was full."""


type GuestListener = socket.socket
"""A TCP socket bound to a loopback address of a sandbox's own. Whoever listens on it takes connections of programs in
there, and of nobody else. Once shut down it can be listened on again."""


class SocketBroker(Protocol):
    """Hands out sockets of a sandbox's own network (guest/socket_broker.py)."""

    can_supervise: bool
    """Whether the kernel has seccomp user notification (guest/connect_filter.py)."""

    pid: int
    """The process at its other end, which answers while a program runs."""

    async def new_socket(self, family: int, kind: int) -> socket.socket:
        """A socket that is neither bound nor connected. Raises OSError."""
        ...

    def give_back(self, sock: socket.socket) -> None:
        """Return a socket of `new_socket` that wasn't used."""
        ...

    def on_notify_fd(self, callback: Callable[[int], None]) -> None:
        """From now on call `callback` with each seccomp notification descriptor of `supervised` programs. It owns them;
        each takes the place of the one before. -1 says that the sandbox is gone."""
        ...


class Sandbox(Protocol):
    """The live, isolated place of one session."""

    id: str
    enforced: JsonObject
    """What isolation and limits are really in force, as read back where that can be."""

    workspace: Path
    """The working directory as the host sees it. Only to be touched while no program runs."""

    limits: Limits
    """The limits it was made with."""

    guest_listeners: Mapping[str, GuestListener]
    """By name: `storage`; none where it can't have any. Nobody listens on them yet."""

    @property
    def broker(self) -> SocketBroker | None:
        """None where it can't have any."""
        ...

    uid: int | None
    """Owner of the files in `workspace`, None where that is the service's own user."""

    @property
    def alive(self) -> bool: ...

    def run(self, program: Program) -> AsyncIterator[Output | Ended]:
        """Run one program; the last event is `Ended`. When that has come, no process of the run is alive.

        Raises SandboxFailed if the sandbox was found dead before the program began: it did not run.
        """
        ...

    async def kill_run(self) -> None:
        """End the program under way, if there is one."""
        ...

    async def stop_run(self) -> None:
        """Tell the program under way to end, and end it two seconds later. May be called again, and too early: it does
        nothing where no program is under way."""
        ...

    async def connect(self, port: int) -> socket.socket | None:
        """A connection, non-blocking, to what listens on this port of the sandbox's loopback; None where nothing does,
        or no program is under way, or the port is one of our own."""
        ...

    def unnamed_bytes(self, device: int) -> int:
        """Bytes on this device of files that programs hold open but that have no name any more. Takes its time."""
        ...

    async def close(self) -> None:
        """Kill everything inside and remove every trace on the host. Safe to call twice."""
        ...


class Driver(Protocol):
    """Makes sandboxes. One of a kind per process; `clear` and `start` before anything, `stop` when done."""

    name: str

    async def clear(self) -> None:
        """Kill and remove what an earlier process left, also one that was killed."""
        ...

    async def start(self) -> None:
        """Prove by a self-test that sandboxes work.

        Raises NoIsolation with what is missing and how to get it.
        """
        ...

    async def create(self, language: Language, limits: Limits, environment: str | None = None) -> Sandbox:
        """A sandbox with an empty working directory, ready for its first program, which has the packages of this
        environment. Raises SandboxFailed."""
        ...

    def isolation(self) -> JsonObject:
        """What the sandboxes of the self-test had in force, with a `summary` for people."""
        ...

    async def stop(self) -> None: ...


class Drivers(Protocol):
    """The drivers that this machine can have."""

    async def get(self, isolation: WantedIsolation) -> Driver:
        """The driver that gives this isolation, started. Raises NoIsolation."""
        ...


class SandboxPool(Protocol):
    """Owns live sandboxes: which session has which, the pool, who is evicted."""

    async def acquire(self, session: Session) -> Sandbox:
        """The session's sandbox, its working directory holding `session.snapshot`. The caller holds the session's
        turn. Raises SandboxFailed, and NoIsolation where the session's isolation can't be had."""
        ...

    async def acquire_temporary(
        self, language: Language, isolation: WantedIsolation = "auto", limits: Limits | None = None
    ) -> Sandbox:
        """A sandbox for a single run outside any session, with the server's default limits where none are given. The
        caller closes it with `discard`. Raises SandboxFailed, and NoIsolation where this isolation can't be had."""
        ...

    def committed(self, session_key: int, snapshot: Snapshot) -> None:
        """The live working directory is now `snapshot`; the sandbox may be kept warm."""
        ...

    async def discard(self, sandbox: Sandbox) -> None:
        """Close a sandbox whose content must not be used again."""
        ...

    def session_keys(self) -> Sequence[int]:
        """The sessions that have a sandbox and no run under way."""
        ...

    def offer(self, session_key: int, end: Callable[[], Awaitable[None]] | None) -> None:
        """The run that this session has under way may be ended, by `end`, where another session needs the room; None:
        it may not."""
        ...

    async def release(self, session_key: int) -> None:
        """Kill and remove whatever the session has live. Returns when it is gone."""
        ...


class RunEgress(Protocol):
    """The network of one run: there as long as its context is entered. When that is left, every connection of the run's
    is closed."""

    certificates: Mapping[str, str]
    """See Program; none where there is no network."""

    enforced: JsonObject
    """What network there is, for the run's record, and why there is less than was asked for."""

    supervised: bool
    """See Program."""

    async def __aenter__(self) -> RunEgress: ...

    async def __aexit__(self, *_: object) -> None: ...

    def report(self) -> JsonObject:
        """`destinations` that were tried, and how many `more`."""
        ...


class Network(Protocol):
    """Gives sandboxes their ways out."""

    def run_egress(
        self, sandbox: Sandbox, *, internet: bool, egress: JsonObject, secrets: Sequence[Secret] = ()
    ) -> RunEgress:
        """The way out for one run, which is none where `internet` is false. `egress` is the session's. Placeholders of
        `secrets` are swapped for their values in what goes to their hosts."""
        ...


class StorageAccess(Protocol):
    """A sandbox's way to the storage for one run: open as long as its context is entered."""

    url: str | None
    """Where programs find it, None where they can't."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


class StorageAccesses(Protocol):
    """Gives sandboxes their ways to the storage."""

    def access(self, sandbox: Sandbox, owner: str | None) -> StorageAccess:
        """The way to an owner's storage for one run, whatever internet access that has. Nobody's storage is no way."""
        ...


class IndexAccess(Protocol):
    """A sandbox's way to indexes of Python packages: open as long as its context is entered."""

    def filled_in(self, text: str) -> str:
        """This text with `{N}` replaced by the address where programs find the Nth index."""
        ...

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


class Indexes(Protocol):
    """Gives sandboxes their ways to indexes of packages."""

    def access(self, sandbox: Sandbox, indexes: Sequence[str]) -> IndexAccess:
        """The way to the indexes at these addresses, for one run, whatever internet access that has."""
        ...


class Environments(Protocol):
    """Installed packages, as sandboxes need them."""

    async def need(self, digest: str) -> None:
        """Have this environment here. Raises Unavailable where that can't be."""
        ...


class SnapshotStore(Protocol):
    """Turns a working directory into a Snapshot and back."""

    async def take(self, sandbox: Sandbox, previous: Snapshot) -> Snapshot:
        """Make what `sandbox.workspace` holds durable. Only what changed since the last call for this sandbox is read.

        Raises SnapshotRefused where the tree is beyond the limits.
        """
        ...

    async def restore(self, snapshot: Snapshot, sandbox: Sandbox) -> None:
        """Make the working directory of `sandbox` what `snapshot` says: from empty, or from the last one that was
        taken or restored there."""
        ...

    async def changes(self, old: Snapshot, new: Snapshot) -> FileChanges:
        """What changed between two snapshots, found without reading a file."""
        ...

    async def artifacts(self, old: Snapshot, new: Snapshot) -> JsonObject:
        """What is to be seen of the files that were written between two snapshots; see artifacts.listed. Nothing is
        read where they are the same. Raises CommitFailed where the disk fails."""
        ...

    def forget(self, sandbox_id: str) -> None:
        """Drop what was remembered of a sandbox that is gone."""
        ...


class SnapshotRefused(Exception):
    """The working directory can't be kept: the message says which bound it broke."""


class WorkspaceFull(SnapshotRefused):
    """There are more files in it, or more bytes, than the session may have."""
