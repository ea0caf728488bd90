"""What the module of a language says of it: what is true everywhere, and how to find what this machine has."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from era.languages.preparation import Preparation

GUEST = "/era"
"""Where a sandbox has the files of era/guest."""

CACHE = "/var/cache/era"
"""A directory on tmpfs that lives as long as a sandbox does, for languages that ask for one."""


class Missing(Exception):
    """A language that this machine can't run: why, and what to do about it."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Runtime:
    """What runs a language on this machine. Paths are those inside sandboxes, but for the values of `mounts`."""

    version: str
    cold: tuple[str, ...]
    """argv that runs a program, whose file comes last."""

    warm: tuple[str, ...] | None = None
    """argv of a process that gets ready and then waits at descriptor 3 for its environment, the program's file last;
    see guest/node_wait.cjs. None: nothing is started ahead of a run."""

    forks: bool = False
    """It is the Python of the supervisor, which becomes the program by forking."""

    mounts: Mapping[str, Path] = field(default_factory=dict)
    """What sandboxes need of the machine besides /usr, by where they have it. All sandboxes have that of all."""

    programs: str | None = None
    """The directory of its programs, where that isn't below /usr."""


@dataclass(frozen=True, slots=True)
class Definition:
    """One language. Its module names it LANGUAGE."""

    name: str
    title: str
    """For people."""

    entry: str
    """The file that a program is, unless the session has such a file itself."""

    find: Callable[[], Runtime]
    """What runs it here. Raises Missing."""

    preparation: Callable[[], Preparation] | None = None
    """What has to be made once on each machine before its programs start quickly. Raises Missing."""

    hello: str = ""
    """A program that prints `up`, by which each start proves that sandboxes work; none where that takes too long."""

    aliases: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    """Of files that are taken for it where nothing else is said; the first language that has one gets it."""

    packages: str | None = None
    """The kind of packages that a setup can install for it: a field of `setup`."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of each program, beneath those of the run."""

    at_start: tuple[str, ...] = ()
    """How variables begin that only count if they are there when its process starts. Such a run starts cold."""

    online: tuple[str, ...] = ()
    offline: tuple[str, ...] = ()
    """Options before the program's file, in runs with and without internet."""

    reserves: int = 0
    """Bytes of private data that its runtime maps before any program runs."""

    caches: bool = False
    """Whether its sandboxes have CACHE. It holds what can be made again, and no data."""


def wheel(module: str, distribution: str) -> tuple[Path, str]:
    """The directory of a module that was installed from a wheel, and the wheel's version. Raises Missing."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise Missing(f"The package {distribution} is not installed.", f"On the server: pip install {distribution}")
    return Path(found.submodule_search_locations[0]).resolve(), importlib.metadata.version(distribution)
