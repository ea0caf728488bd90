"""Control groups of version 1 and 2 behind one small interface: memory, processes, cpu and disk writes of a sandbox.

All sandboxes of a service live in one group named after its data directory, so that a service that comes back after
`kill -9` finds what its predecessor left, kills it and removes it. Where the machine gives us no writable hierarchy
(an ordinary user, most containers) `find` answers None and the driver reports that no cgroup is in force.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from era.core.models import JsonObject
from era.core.program import Limits

_CPU_PERIOD_US = 100_000
_REMOVAL_SECONDS = 5.0
_CONTROLLERS = ("memory", "pids", "cpu", "io")
_NAMES_IN_1 = {"io": "blkio"}


@dataclass(frozen=True, slots=True)
class Group:
    """The control group of one sandbox: one directory, or with version 1 one a controller."""

    version: int
    directories: dict[str, Path]

    def add(self, pid: int) -> None:
        """Move a process that has no children yet; what it forks follows it."""
        for directory in set(self.directories.values()):
            (directory / "cgroup.procs").write_text(str(pid))

    def limits(self) -> JsonObject:
        """The limits in force, as the kernel gives them back."""
        found: JsonObject = {"version": self.version}
        if directory := self.directories.get("memory"):
            name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
            found["memory_bytes"] = int((directory / name).read_text())
        if directory := self.directories.get("pids"):
            found["pids"] = int((directory / "pids.max").read_text())
        if directory := self.directories.get("cpu"):
            if self.version == 2:
                quota, period = (directory / "cpu.max").read_text().split()
            else:
                quota, period = ((directory / f"cpu.cfs_{which}_us").read_text() for which in ("quota", "period"))
            found["cpus"] = int(quota) / int(period)
        if directory := self.directories.get("io"):
            written = (directory / ("io.max" if self.version == 2 else "blkio.throttle.write_bps_device")).read_text()
            if bound := re.search(r"(?:wbps=| )(\d+)\b", written):
                found["disk_write_bytes_per_second"] = int(bound[1])
        return found

    def stand_back(self, *, yes: bool) -> None:
        """Give way to every other group of ours at once, or be one like them again. Linux 5.15 or newer."""
        if directory := self.directories.get("cpu"):
            with contextlib.suppress(OSError):
                (directory / "cpu.idle").write_text("1" if yes else "0")

    def processes(self) -> list[int]:
        """The processes in it, by their pids."""
        directory = next(iter(self.directories.values()))
        return [int(line) for line in (directory / "cgroup.procs").read_text().split()]

    def out_of_memory_kills(self) -> int:
        """How many processes the kernel has killed here for want of memory."""
        if directory := self.directories.get("memory"):
            name = "memory.events" if self.version == 2 else "memory.oom_control"
            for line in (directory / name).read_text().splitlines():
                key, _, count = line.partition(" ")
                if key == "oom_kill":
                    return int(count)
        return 0

    def remove(self) -> None:
        """Remove an emptied group, waiting for the kernel to let go of its last processes."""
        for directory in set(self.directories.values()):
            _remove(directory)


class Cgroups:
    """Where this service's sandboxes get their groups."""

    def __init__(self, version: int, parents: dict[str, Path], disk: str | None) -> None:
        self.version = version
        self._parents = parents
        self._disk = disk

    @classmethod
    def find(cls, name: str, place: Path) -> Cgroups | None:
        """The hierarchies this process may make groups in, with our parent group made in each. What sandboxes write
        goes to the disk of `place`."""
        for version, roots in ((1, _version_1()), (2, _version_2())):
            if "memory" not in roots or "pids" not in roots:
                continue
            try:
                parents = {controller: root / name for controller, root in roots.items()}
                for root in set(roots.values()):
                    if version == 2:
                        _delegate(root, roots)
                    (root / name).mkdir(exist_ok=True)
                    if version == 2:
                        _delegate(root / name, roots)
            except OSError:
                continue
            return cls(version, parents, _disk_of(place))
        return None

    def create(self, name: str, limits: Limits) -> Group:
        """A group with its limits set. Raises OSError."""
        group = Group(self.version, {controller: parent / name for controller, parent in self._parents.items()})
        for directory in set(group.directories.values()):
            directory.mkdir()
        self._set(group, limits)
        return group

    def remove_leftovers(self) -> int:
        """Kill and remove every group under ours. The answer is how many there were."""
        found = {child for parent in self._parents.values() for child in parent.iterdir() if child.is_dir()}
        for directory in found:
            for line in (directory / "cgroup.procs").read_text().splitlines():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(line), signal.SIGKILL)
        for directory in found:
            _remove(directory)
        return len({directory.name for directory in found})

    def close(self) -> None:
        for parent in set(self._parents.values()):
            with contextlib.suppress(OSError):
                parent.rmdir()

    def _set(self, group: Group, limits: Limits) -> None:
        memory, pids, cpu, io = (group.directories.get(controller) for controller in _CONTROLLERS)
        quota = int(limits.cpus * _CPU_PERIOD_US)
        if memory and self.version == 2:
            (memory / "memory.max").write_text(str(limits.memory_bytes))
            with contextlib.suppress(OSError):  # no such file without swap accounting
                (memory / "memory.swap.max").write_text("0")
        elif memory:
            (memory / "memory.limit_in_bytes").write_text(str(limits.memory_bytes))
            with contextlib.suppress(OSError):
                (memory / "memory.memsw.limit_in_bytes").write_text(str(limits.memory_bytes))
        if pids:
            # The supervisor and its launcher count too.
            (pids / "pids.max").write_text(str(limits.pids + 8))
        if cpu and self.version == 2:
            (cpu / "cpu.max").write_text(f"{quota} {_CPU_PERIOD_US}")
        elif cpu:
            (cpu / "cpu.cfs_period_us").write_text(str(_CPU_PERIOD_US))
            (cpu / "cpu.cfs_quota_us").write_text(str(quota))
        if io and self._disk and limits.write_bytes_per_second:
            bound = limits.write_bytes_per_second
            with contextlib.suppress(OSError):  # not every disk can be bounded; what is in force is read back
                if self.version == 2:
                    (io / "io.max").write_text(f"{self._disk} wbps={bound}")
                else:
                    (io / "blkio.throttle.write_bps_device").write_text(f"{self._disk} {bound}")


def _mounts(kind: str) -> list[tuple[Path, set[str]]]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind_here, _, options = after.split(" ", 2)
        if kind_here == kind:
            found.append((Path(before.split(" ")[4]), set(options.split(","))))
    return found


def _version_1() -> dict[str, Path]:
    return {
        controller: directory
        for directory, options in _mounts("cgroup")
        for controller in _CONTROLLERS
        if _NAMES_IN_1.get(controller, controller) in options
    }


def _version_2() -> dict[str, Path]:
    for directory, _ in _mounts("cgroup2"):
        available = (directory / "cgroup.controllers").read_text().split()
        return {controller: directory for controller in _CONTROLLERS if controller in available}
    return {}


def _disk_of(place: Path) -> str | None:
    """The disk that the files of a directory lie on, as MAJOR:MINOR; None where that is no single one."""
    device = place.stat().st_dev
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if (disk / "partition").exists():
        disk = disk.resolve().parent
    try:
        return (disk / "dev").read_text().strip()
    except OSError:
        return None


def _delegate(directory: Path, controllers: dict[str, Path]) -> None:
    (directory / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in controllers))


def _remove(directory: Path) -> None:
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while True:
        try:
            directory.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)
