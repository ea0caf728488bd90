"""What the core needs of sandboxes and their network, as Protocols that adapters satisfy.

| port                                | adapter            | who calls it                             |
| Drivers, Driver                     | drivers/           | core/pool/                               |
| Sandbox                             | drivers/           | core/pool/, core/execution/, core/trees/ |
| its capability processes, freezing  | drivers/           | core/live/, core/trees/                  |
| its capability network              | drivers/           | network/, which is an adapter itself     |
| its capability packages, open files | drivers/           | core/trees/                              |
| Network, RunEgress, ProcessEgress   | network/egress.py  | core/execution/, core/setup/, core/live/ |
| StorageAccesses, StorageAccess      | network/storage.py | core/execution/, core/live/              |
| Indexes, IndexAccess                | network/indexes.py | core/setup/commands.py                   |

The core calls and the adapter answers, by what it returns or yields. The one callback is SocketBroker.on_notify_fd,
between two adapters.

Ports for rows and content stand beside the code that uses them: MetadataStore (metadata.py), BlobStore
(trees/blob_store.py), ApiKeyStore (owners/api_keys.py), ItemStore and Databases (storage/), InboxStore
(public/inbox.py), Installer (setup/package_sets.py).
"""

from __future__ import annotations

import socket
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from era.core.models import JsonObject, Language, WantedIsolation
from era.core.process import HeldFiles, ProcessEnded, ProcessOutput, ProcessSpec, TerminalSize
from era.core.program import Ended, Limits, Output, Program
from era.core.secrets import Secret
from era.errors import NoIsolation

type GuestListener = socket.socket
"""A TCP socket bound to a loopback address of a sandbox's own. Whoever listens on it takes connections of programs in
there, and of nobody else. Once shut down it can be listened on again."""


SLICE = 0.2
"""Seconds of processor time that a run may use before it stands back: then all others come first."""


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


class GuestProcess(Protocol):
    """A process in a sandbox, under way or ended."""

    pid: int
    """As processes in there see it."""

    def events(self) -> AsyncIterator[ProcessOutput | ProcessEnded]:
        """Its output, and `ProcessEnded` last. For one reader. A process whose output isn't read stops at a full pipe;
        no other process does."""
        ...

    async def write(self, data: bytes) -> None:
        """Write to its standard input or PTY. Returns once the supervisor has taken all of it, which may wait for the
        process to read. Raises BrokenPipeError where the process takes no input, or no more."""
        ...

    async def close_stdin(self) -> None:
        """End its standard input; for a PTY this writes the terminal's end-of-file character."""
        ...

    async def send(self, data: bytes) -> None:
        """Write to its channel. Raises BrokenPipeError."""
        ...

    async def signal(self, number: int, *, group: bool = True) -> None:
        """Send a signal to its process group, or to itself only. Does nothing once it has ended."""
        ...

    async def kill(self) -> None:
        """Kill it and what descends from it, as far as that can be told."""
        ...

    async def resize(self, size: TerminalSize) -> None:
        """Give its PTY another size, of which the kernel tells it by SIGWINCH."""
        ...


class ProcessSupervisor(Protocol):
    """The processes of one sandbox."""

    enforced: JsonObject
    """What keeps processes and runs apart, for records: `separated_by`: `pid_namespace`, or what there is instead, and
    `reason` where that is less."""

    @property
    def broker(self) -> SocketBroker | None:
        """See Sandbox.broker; this one supervises the connects of `supervised` processes."""
        ...

    @property
    def alive(self) -> bool: ...

    async def start(self, spec: ProcessSpec, may_begin: Callable[[], Awaitable[None]] | None = None) -> GuestProcess:
        """Start a process. Returns once it runs, or has failed to. `may_begin` is waited for before it executes
        anything, while it is made ready; where that raises, it is killed, and this raises the same. Raises
        SandboxFailed."""
        ...

    async def is_empty(self) -> bool:
        """Whether no process is left, helpers of our own (`ProcessSpec.module`) aside. False where that isn't known."""
        ...

    async def wait(self) -> None:
        """Wait for the end of the supervisor, and so of all processes."""
        ...

    async def close(self) -> None:
        """Kill every process. Returns once none is left; runs of the sandbox aren't touched."""
        ...


class Sandbox(Protocol):
    """The isolated place of one session: a working directory, and programs that run in it one at a time.

    A driver's class derives from this one and has all that is abstract. The rest are capabilities: a driver that lacks
    one leaves what stands here, and sessions do without.
    """

    id: str
    limits: Limits
    """The limits it was made with."""

    enforced: JsonObject
    """What isolation and limits are really in force, as read back where that can be."""

    workspace: Path
    """The working directory as the host sees it. Only to be touched while no program runs."""

    uid: int | None = None
    """Owner of the files in `workspace`, None where that is the service's own user."""

    @property
    @abstractmethod
    def alive(self) -> bool: ...

    @abstractmethod
    def run(self, program: Program) -> AsyncIterator[Output | Ended]:
        """Run one program; the last event is `Ended`. When that has come, no process of the run is alive. Where the
        program might not begin (`may_begin`), the sandbox is of no use any more.

        Raises SandboxFailed if the sandbox was found dead before the program began: it did not run.
        """
        ...

    @abstractmethod
    async def kill_run(self) -> None:
        """End the program under way, if there is one."""
        ...

    @abstractmethod
    async def stop_run(self) -> None:
        """Tell the program under way to end, and end it two seconds later. May be called again, and too early: it does
        nothing where no program is under way."""
        ...

    @abstractmethod
    def cpu_seconds(self) -> float:
        """Processor time that its processes have used so far, in all runs together."""
        ...

    @abstractmethod
    def wants_processor(self) -> bool:
        """Whether any thread of its processes has a processor at this moment, or waits for one."""
        ...

    @abstractmethod
    def memory_bytes(self) -> int:
        """Memory that its processes have now and that files can't take the place of."""
        ...

    @abstractmethod
    async def put_away(self) -> None:
        """Kill everything inside. When this returns only the host can touch the working directory, which stays until
        `close`."""
        ...

    @abstractmethod
    async def close(self) -> None:
        """Kill everything inside and remove every trace on the host. Safe to call twice."""
        ...

    # -- capability: network. Without it programs reach nothing, and nobody reaches them. ---------------------------

    guest_listeners: Mapping[str, GuestListener] = MappingProxyType({})
    """By name: `storage`. Nobody listens on them yet."""

    broker: SocketBroker | None = None

    async def connect(self, port: int) -> socket.socket | None:
        """A connection, non-blocking, to what listens on this port of the sandbox's loopback; None where nothing does,
        or no program is under way, or the port is one of our own."""
        return None

    # -- capability: packages. Without it what programs install goes with their sandbox. ----------------------------

    def may_have_packages(self) -> bool:
        """Whether programs may have installed something: then the directory `packages` beside `workspace` has it."""
        return False

    # -- capability: processes beside runs. Without it no session becomes live. -------------------------------------

    async def process_supervisor(self) -> ProcessSupervisor:
        """What starts processes beside runs (core/process.py); made when it is first asked for, and anew where it
        has ended. Raises SandboxFailed, NoIsolation."""
        raise NoIsolation("These sandboxes have no processes beside runs.")

    # -- capability: freezing. Without it checkpoints of live sessions aren't consistent. ---------------------------

    def frozen(self) -> AbstractAsyncContextManager[bool | None]:
        """Within the block nothing inside runs, neither a run nor a process, where the context's value is true. Else
        everything goes on: it is false where what is inside did not come to a stand soon enough, and None where this
        machine has no way to that (a cgroup's freezer). Raises OSError where it can't be done only for now."""
        return nullcontext(None)

    # -- capability: seeing open files. Without it what is open but has no name isn't bounded, and trees are read whole.

    opens_on_host: bool = False
    """Whether a program's open of a file is always one in the host's kernel, where inotify reports it."""

    def unnamed_bytes(self, device: int) -> int:
        """Bytes on this device of files that programs have open or mapped but that have no name any more. It may be
        slow: call it on a thread. Raises OSError where that can't be told only for now, as the two below do."""
        return 0

    def hides_files(self, device: int) -> bool:
        """Whether programs have files on this device that `unnamed_bytes` can't find, or not their size: by descriptors
        in queues of sockets, maybe by those in calls that wait, or by maps. It may be slow, too."""
        return False

    def held_files(self, device: int) -> HeldFiles | None:
        """The files on this device that processes inside have open or mapped; None where that can't be told. Blocks,
        and is exact while nothing runs."""
        return None


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

    async def create(
        self, language: Language, limits: Limits, package_set: str | None = None, heir_to: Sandbox | None = None
    ) -> Sandbox:
        """A sandbox with an empty working directory, ready for its first program. It has the packages of the set with
        this digest. Where it is heir to one of this driver's that was put away, it takes over that one's uid, so that
        files can be moved from there as they are. Raises SandboxFailed, and Unavailable where the language is still
        being prepared."""
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


class ProcessEgress(Protocol):
    """The network of a live session's processes: there as long as its context is entered. See RunEgress."""

    certificates: Mapping[str, str]
    enforced: JsonObject
    supervised: bool

    async def __aenter__(self) -> ProcessEgress: ...

    async def __aexit__(self, *_: object) -> None: ...

    def add(self, secrets: Sequence[Secret]) -> None:
        """Swap the placeholders of a process's secrets for their values, from now on."""
        ...

    def remove(self, secrets: Sequence[Secret]) -> None:
        """Swap these no longer: the process has ended."""
        ...


class Network(Protocol):
    """Gives sandboxes their egress."""

    def run_egress(
        self, sandbox: Sandbox, *, owner: str, internet: bool, egress: JsonObject, secrets: Sequence[Secret] = ()
    ) -> RunEgress:
        """The egress for one run; nothing gets out where `internet` is false. `owner` is the session's, of whose share
        of the service's descriptors its connections take some. `egress` is the session's setting, which
        may narrow it to an allowlist. Placeholders of `secrets` are swapped for their values in what goes to their
        hosts."""
        ...

    def process_egress(
        self, sandbox: Sandbox, broker: SocketBroker | None, *, owner: str, internet: bool, egress: JsonObject
    ) -> ProcessEgress:
        """The egress for processes beside runs, whose connects `broker` reports; see `run_egress`. It has to be made
        anew when the session's settings change."""
        ...


class StorageAccess(Protocol):
    """A sandbox's access to the storage for one run: open as long as its context is entered."""

    url: str | None
    """Where programs find it, None where they can't."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


class StorageAccesses(Protocol):
    """Gives sandboxes access to the storage."""

    def access(self, sandbox: Sandbox, owner: str | None) -> StorageAccess:
        """Access to an owner's storage for one run, whatever internet access that has; none where `owner` is None."""
        ...


class IndexAccess(Protocol):
    """A sandbox's access to indexes of Python packages: open as long as its context is entered."""

    def filled_in(self, text: str) -> str:
        """This text with `{N}` replaced by the address where programs find the Nth index."""
        ...

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


class Indexes(Protocol):
    """Gives sandboxes access to indexes of packages."""

    def access(self, sandbox: Sandbox, indexes: Sequence[str]) -> IndexAccess:
        """Access to the indexes at these URLs for one run, whatever internet access that has."""
        ...


class Cluster(Protocol):
    """The division of background work among the hosts of a cluster, so that it is done once. Homes, or Alone."""

    @property
    def leads(self) -> bool: ...

    async def owned(self, session_keys: Sequence[int], most_new: int) -> Sequence[int]:
        """Return the keys of the sessions whose home is this host.

        Sessions without a home get this one, but at most `most_new` of them, so that the sessions of a dead host don't
        all go to the host that looks first.
        """
        ...


class Alone:
    """A Cluster of one host that isn't called so: it leads, and every session is at home here."""

    leads = True

    async def owned(self, session_keys: Sequence[int], most_new: int) -> Sequence[int]:
        return session_keys


ALONE = Alone()
