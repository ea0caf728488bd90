"""The report of `era doctor`: for each kind of sandbox each wall, whether it is there, and how to get it if not."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from era import languages
from era.core.models import Isolation, JsonObject
from era.errors import NoIsolation

_PACKAGES = {"seccomp": "install libseccomp (Debian, Ubuntu: apt-get install libseccomp2)"}
_CGROUP = "start ERA as root, on a machine with writable cgroups (memory, pids, cpu)"


@dataclass(frozen=True, slots=True)
class Wall:
    """A limit on what programs can do or use."""

    there: bool
    name: str
    remedy: str = ""
    """How to get it where it isn't there."""


def walls(isolation: JsonObject) -> Iterator[Wall]:
    """The walls of a driver that works, given its `isolation()`."""
    tested = [name for name in languages.runtimes() if languages.DEFINITIONS[name].hello]
    yield Wall(True, f"programs start and run in {', '.join(tested)}")
    namespaces = isolation["namespaces"]
    yield Wall(len(namespaces) == 7, f"namespaces of its own: {', '.join(namespaces)}", "a newer kernel")
    privileged = isolation["capabilities"] != "none" or not isolation["no_new_privs"]
    yield Wall(not privileged, "no capabilities, and no way to gain any")
    yield Wall(isolation["own_uid"], "a host uid of its own for each sandbox", "start ERA as root")
    yield Wall(isolation["seccomp"] == "filter", "system calls filtered", _PACKAGES["seccomp"])
    if isolation["driver"] == "gvisor":
        yield Wall(True, "a kernel of its own in user space: programs reach the host's only by its TCP and UDP")
    else:
        landlock = isolation["landlock"]
        yield Wall(
            bool(landlock),
            f"Landlock, ABI {landlock}" if landlock else "Landlock",
            "a kernel of 5.19 or newer with Landlock in its `lsm=` list",
        )
    cgroup = isolation["cgroup"]
    yield Wall(cgroup is not None, "memory of the whole sandbox bounded", f"{_CGROUP}; until then of each process")
    yield Wall(
        cgroup is not None and "cpus" in cgroup, "processors bounded", f"{_CGROUP}; until then a run may use them all"
    )
    yield Wall(True, "processes, files, disk and output bounded")
    yield Wall(isolation["network"] == "none", "no network but loopback")
    reason = isolation["network_reason"]
    yield Wall(reason is None, "internet over TCP and UDP where a session may, by any client", reason or "")


def report(results: Mapping[Isolation, JsonObject | NoIsolation], default: Isolation | None) -> Iterator[str]:
    """The lines of the report. `results` has the `isolation()` of each driver that works. `default` is what `auto`
    means, None where nothing works."""
    yield f"Linux {platform.release()}, Python {sys.version.split()[0]}"
    for name in languages.LANGUAGES:
        try:
            yield f"ok       {name} {languages.runtime(name).version}"
            if (preparation := languages.preparations().get(name)) and preparation.ready_place() is None:
                yield f"         {preparation.title} is compiled when the service first starts, which takes a minute"
            if lack := languages.contexts_missing(name):
                yield f"missing  contexts in {name}: {lack.reason}"
                yield f"         to get it: {lack.hint}"
        except languages.Missing as missing:
            yield f"missing  {name}: {missing.reason}"
            yield f"         to get it: {missing.hint}"
    for name, isolation in results.items():
        yield ""
        if isinstance(isolation, NoIsolation):
            yield f"{name}: can't be had"
            yield f"missing  {isolation.message}"
            yield f"         {isolation.hint}"
            continue
        yield f"{name}: works" + (", and is what sessions get that don't say" if name == default else "")
        for wall in walls(isolation):
            yield f"{'ok     ' if wall.there else 'missing'}  {wall.name}"
            if not wall.there:
                yield f"         to get it: {wall.remedy}"
