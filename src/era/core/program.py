"""What goes into a sandbox to be run and what comes out of it: plain frozen values."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

type Stream = Literal["stdout", "stderr"]
type EndCause = Literal["exit", "signal", "timeout", "oom", "killed", "disk_full"]
DEFAULT_TIMEOUT = 30.0
"""Seconds, for runs outside any session."""

STREAMS: tuple[Stream, ...] = ("stdout", "stderr")


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard bounds of one sandbox."""

    memory_bytes: int
    cpus: float
    """Processors' worth of time: 0.5 is half of one."""

    pids: int
    """Processes and threads at a time."""

    disk_bytes: int
    """Of the working directory; no file may be larger either."""

    files: int
    """Entries of the working directory: files, directories, links and whatever else there is."""

    output_bytes: int
    """Of stdout, and of stderr; the rest is cut off."""

    tmp_bytes: int
    """Of /tmp, and of /dev/shm."""

    write_bytes_per_second: int = 0
    """To disk, where a cgroup can bound that; 0 is without a bound."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """How a program is called. The default is that of code without arguments and with an empty standard input."""

    args: Sequence[str] = field(default=(), repr=False)
    """Arguments of the code, behind the name of its file."""

    stdin: bytes = field(default=b"", repr=False)
    cwd: str = ""
    """The directory that it starts in, below the working directory; empty for that itself."""

    command: Sequence[str] = field(default=(), repr=False)
    """What is started instead of an interpreter with code; found by the PATH inside."""


CODE_ALONE = Invocation()


@dataclass(frozen=True, slots=True)
class Program:
    """One program for a sandbox to run, or a cell for a context. `env` is seen by this one only and is never logged."""

    code: bytes = field(default=b"", repr=False)
    """What an interpreter runs, unless `invocation` has a command."""

    state: bytes = field(default=b"{}", repr=False)
    """The content of the state file."""

    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout: float = DEFAULT_TIMEOUT
    """Seconds until it is told to end."""

    ephemeral: bool = False
    """Wipe the working directory once the program has ended."""

    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Extra files to put into the working directory first, by relative path."""

    invocation: Invocation = CODE_ALONE
    certificates: Mapping[str, str] = field(default_factory=dict)
    """Variables that name the certificates to trust; those of `env` win over them. They are no secrets: processes that
    are started ahead of the next run have them too."""

    supervised: bool = False
    """The kernel notifies the service before it connects this program to anything (guest/connect_filter.py)."""

    may_begin: Callable[[], Awaitable[None]] | None = None
    """Waited for before it begins, while all is made ready for it. What this raises, running it does: then it hasn't
    begun."""

    keeps_scratch: bool = False
    """What it leaves in /tmp, /dev/shm and other memory is there for the next program. So it is beside processes,
    whatever this says."""


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of what the program wrote, as it wrote it."""

    stream: Stream
    data: bytes


type CellEventKind = Literal["display", "update_display", "clear_output", "result", "cell_error"]


@dataclass(frozen=True, slots=True)
class CellEvent:
    """Something that a cell shows beside its output, or the error that it ends with."""

    content: bytes
    """A JSON object: `type`, which is a CellEventKind, and the fields of an event of that type (wire/contexts.py)."""


type WriteCell = Callable[[Output | CellEvent], Awaitable[None]]
"""Takes what a cell writes and shows, in order."""

type StopCell = Callable[[], Awaitable[None]]
"""Interrupts a cell, and ends its interpreter if it goes on."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended."""

    exit_code: int
    """As a shell gives it: 128 + N for signal N, 124 for a timeout."""

    cause: EndCause
    duration: float
    """Seconds from its start to its end."""

    state: bytes | None
    """The state file's content, None where there is none to read."""

    state_problem: str | None
    """Why the state file could not be read; None also where it is merely missing."""

    stdout_truncated: bool
    stderr_truncated: bool
    reaped: int
    """Processes that outlived the program and were killed."""

    peak_memory_bytes: int | None
    cpu_us: int | None
    """Microseconds of processor time, in user and system mode."""

    sandbox_alive: bool
    entry: str | None = None
    """The name in the working directory of the program's own file, which the supervisor created before the run and
    removed, unchanged, after it."""

    disk_problem: str | None = None
    """What was full, where nothing can be kept for that."""
