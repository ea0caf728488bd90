"""What `era doctor` says: each wall of each kind of sandbox, whether it is there, why not, and how to get it."""

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
    """`remedy` is how to get it, empty where it is there."""

    there: bool
    name: str
    remedy: str = ""


def walls(seen: JsonObject) -> Iterator[Wall]:
    """The walls of a kind of sandbox that works, from what its self-test read back."""
    tried = [name for name in languages.runtimes() if languages.DEFINITIONS[name].hello]
    yield Wall(True, f"programs start and run in {', '.join(tried)}")
    namespaces = seen["namespaces"]
    yield Wall(len(namespaces) == 7, f"namespaces of its own: {', '.join(namespaces)}", "a newer kernel")
    yield Wall(seen["capabilities"] == "none" and seen["no_new_privs"], "no capabilities, and no way to gain any")
    yield Wall(seen["own_uid"], "a host uid of its own for each sandbox", "start ERA as root")
    yield Wall(seen["seccomp"] == "filter", "system calls filtered", _PACKAGES["seccomp"])
    if seen["driver"] == "gvisor":
        yield Wall(True, "a kernel of its own in user space: programs reach the host's only by its TCP and UDP")
    else:
        landlock = seen["landlock"]
        yield Wall(
            bool(landlock),
            f"Landlock, ABI {landlock}" if landlock else "Landlock",
            "a kernel of 5.19 or newer with Landlock in its `lsm=` list",
        )
    cgroup = seen["cgroup"]
    yield Wall(cgroup is not None, "memory of the whole sandbox bounded", f"{_CGROUP}; until then of each process")
    yield Wall(
        cgroup is not None and "cpus" in cgroup, "processors bounded", f"{_CGROUP}; until then a run may use them all"
    )
    yield Wall(True, "processes, files, disk and output bounded")
    yield Wall(seen["network"] == "none", "no network but loopback")
    reason = seen["network_reason"]
    yield Wall(reason is None, "internet over TCP and UDP where a session may, by any client", reason or "")


def report(found: Mapping[Isolation, JsonObject | NoIsolation], default: Isolation | None) -> Iterator[str]:
    """The lines of the report. `default` is what `auto` would be, None where nothing works."""
    yield f"Linux {platform.release()}, Python {sys.version.split()[0]}"
    for name in languages.LANGUAGES:
        try:
            yield f"ok       {name} {languages.runtime(name).version}"
        except languages.Missing as missing:
            yield f"missing  {name}: {missing.reason}"
            yield f"         to get it: {missing.hint}"
    for name, seen in found.items():
        yield ""
        if isinstance(seen, NoIsolation):
            yield f"{name}: can't be had"
            yield f"missing  {seen.message}"
            yield f"         {seen.hint}"
            continue
        yield f"{name}: works" + (", and is what sessions get that don't say" if name == default else "")
        for wall in walls(seen):
            yield f"{'ok     ' if wall.there else 'missing'}  {wall.name}"
            if not wall.there:
                yield f"         to get it: {wall.remedy}"
