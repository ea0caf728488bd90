"""Processes beside runs: what goes into a sandbox to be started, and what comes out of it. Plain frozen values.

Theory of operation
===================

A sandbox whose session is live has a second supervisor, the *process supervisor*. It shares with the first one, which
runs the session's runs, everything but processes: the mounts, the network, the limits, the uid. It is PID 1 of a PID
namespace of its own. So the kernel tells processes from what a run has started: the end of a run kills all in the run's
namespace at once, as ever, and nothing else; a process can't see, signal or look into a run, or a run into a process.
Where a driver can't have a second namespace, it says so in `enforced`.

Everything that goes on in there is a process of `ProcessSpec`: what users ask for by name, terminals, and things of our
own that talk over a `channel`: interpreters that stay (contexts), and helpers that read, change and watch files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from era.core.models import ServiceCommand

type ProcessStream = Literal["stdout", "stderr", "pty", "channel"]


@dataclass(frozen=True, slots=True)
class TerminalSize:
    """Of a PTY, each from 1 to 1,000."""

    cols: int
    rows: int


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to be started. It leads a session (setsid) and a process group of its own, in a Landlock domain of its
    own. `env` is seen by it only and is never logged."""

    command: Sequence[str] = field(repr=False)
    """Its argv; the program is found by the PATH inside. One that can't be started ends with 127 or 126, and says why
    on stderr (or the PTY), as under a shell."""

    env: Mapping[str, str] = field(repr=False)
    """Added to the language's own variables."""

    cwd: str = ""
    """Below the working directory; empty for that itself."""

    stdin: bool = False
    """Standard input is a pipe that `write` writes to; else it is empty. A PTY takes input whatever this says."""

    pty: TerminalSize | None = None
    """Standard streams are a terminal of this size, the process's controlling one."""

    channel: bool = False
    """Descriptor 3 is a stream socket: what the process writes there comes as output of the stream `channel`, and
    `send` writes to it."""

    supervised: bool = False
    """The kernel notifies the service before it connects this process to anything; see Program.supervised."""

    module: str | None = None
    """A module of era/guest whose `serve(fd)` is called in a fork of the supervisor, with the channel's descriptor, in
    place of a command."""


@dataclass(frozen=True, slots=True)
class ProcessOutput:
    """A piece of what a process wrote, as it wrote it."""

    stream: ProcessStream
    data: bytes


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """How a process ended."""

    exit_code: int
    """As a shell gives it: 128 + N for signal N."""

    signal: int | None
    """The number of the signal that killed it."""

    cause: Literal["exit", "signal", "oom", "sandbox_died"]
    cpu_us: int | None = None
    peak_memory_bytes: int | None = None
    with_supervisor: bool = False
    """Its supervisor has ended, and so it has: what it wrote last may not have come."""


@dataclass(frozen=True, slots=True)
class HeldFiles:
    """Files of one device that processes can change without opening them, by inode."""

    open: frozenset[int]
    """Those open in whatever way, and those that are executed: who sees the process can open them by /proc/PID/exe,
    under a name that may be gone, so that no watch tells of it."""

    mapped: frozenset[int]
    """Those mapped so that what is written there goes to the file, or could after mprotect(2)."""

    in_flight: bool = False
    """Whether descriptors lie in queues of sockets, so that there may be more open ones."""

    @property
    def all(self) -> frozenset[int]:
        return self.open | self.mapped


type ProcessStatus = Literal["running", "ended", "lost"]

KEPT = 50
"""Ended processes of a session, the newest, that are on record."""

TAIL_BYTES = 64 << 10
"""Of the output of an ended process, that are on record with it."""

SHOWN_BYTES = 4 << 10
"""Of a command, that are on record."""


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """The durable record of one process. It never holds env or secrets. Times are UTC microseconds since 1970."""

    id: str
    session_key: int
    command: ServiceCommand
    """As it was asked for, shortened where it is long."""

    started_at: int
    status: ProcessStatus = "running"
    tag: str | None = None
    pid: int | None = None
    """As processes in the sandbox see it; None where it never started."""

    stdin: bool = False
    pty: bool = False
    ended_at: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    """The number of the signal that killed it."""

    reason: str | None = None
    """Why it was ended, if it didn't end by itself."""

    output_bytes: int = 0
    tail: bytes | None = field(default=None, repr=False, compare=False)
    """The end of its output, as OutputLog packs it; only where one process is asked for."""
