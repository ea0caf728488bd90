"""The parts of a language's description: Definition, the same everywhere, and Runtime, which a machine may lack."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from era.languages.preparation import Preparation

GUEST = "/era"
"""The path inside a sandbox of the files of era/guest."""

CACHE = "/var/cache/era"
"""A directory on tmpfs that lives as long as a sandbox does, for languages that ask for one."""


class Missing(Exception):
    """This machine can't run a language: `reason` says why, `hint` what to do about it."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Kernel:
    """An interpreter that stays and executes one cell after the other (core/live/context.py)."""

    command: tuple[str, ...]
    """Its argv."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are otherwise in contexts than in other programs."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """A language's interpreter or compiler on this machine. Paths are those inside sandboxes, except in the values of
    `mounts`."""

    version: str
    cold: tuple[str, ...]
    """argv that runs a program. The program's file is appended."""

    starter: str | None = None
    """A module of era/guest. Its `start(argv, environment)` is called with `cold` and what is appended to that, in the
    process that becomes the program, instead of executing it."""

    warm: tuple[str, ...] | None = None
    """argv of a spare: a process that gets ready, then waits at descriptor 3 for its environment; the program's file is
    appended (see guest/node_wait.cjs). None if no spare is kept."""

    may_start_beside_programs: bool = False
    """Whether a spare takes long to start, and reads no file that programs can change until it has its environment: it
    may start while a program runs, where that can't reach it (drivers/alternation.py)."""

    forks: bool = False
    """Whether the supervisor itself is such an interpreter, and starts a program by forking."""

    mounts: Mapping[str, Path] = field(default_factory=dict)
    """Files and directories of the host that it needs besides /usr, by their paths inside. Every sandbox has those of
    all languages."""

    programs: str | None = None
    """The directory of its programs, for PATH; None if that is below /usr."""

    kernel: Kernel | None = None
    """What contexts are; None if the language has none."""


@dataclass(frozen=True, slots=True)
class Definition:
    """A language. Its module has it as LANGUAGE."""

    name: str
    title: str
    """Its name for people."""

    entry: str
    """The name of the file that a program is written to, unless the session has a file of that name."""

    find: Callable[[], Runtime]
    """Find its runtime on this machine. Raises Missing."""

    preparation: Callable[[], Preparation] | None = None
    """What has to be made once on each machine before its programs start quickly. Raises Missing."""

    hello: str = ""
    """A program that prints `up`, for the self-test of sandboxes; empty where that would take too long."""

    aliases: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    """Endings of files that are taken for this language unless a caller names another. If two languages have the same
    ending, the first counts."""

    packages: str | None = None
    """The field of `setup` that lists its packages; None if none can be installed."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of each of its programs. Those of a run win over them."""

    at_start: tuple[str, ...] = ()
    """Prefixes of variables that its interpreter reads only when its process starts. Such a run starts cold."""

    online: tuple[str, ...] = ()
    offline: tuple[str, ...] = ()
    """Options that are put before the program's file, in runs with and without internet."""

    reserves: int = 0
    """Bytes of private data that its runtime maps before a program runs."""

    caches: bool = False
    """Whether its sandboxes have CACHE, for files that can be made again."""


def wheel(module: str, distribution: str) -> tuple[Path, str]:
    """The directory of an importable package, and the version of the distribution that it came with. Raises Missing."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise Missing(f"The package {distribution} is not installed.", f"On the server: pip install {distribution}")
    return Path(spec.submodule_search_locations[0]).resolve(), importlib.metadata.version(distribution)
