"""Control groups (cgroups(7)), version 1 and 2 behind one interface: bounds for a sandbox's memory, processes, cpu and
disk writes.

All sandboxes of a service live in one group named after its data directory, so that a service that comes back after
`kill -9` finds what its predecessor left, kills it and removes it. That group is made below the parent that the
settings name, and nowhere else. Without one it is made at the root of the hierarchies. Where the service can't write
there (an ordinary user), it is made below the group that the service is in itself, if that was delegated to it as
systemd does. Where neither can be (most containers), `find` returns None and the driver reports that no cgroup is in
force.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from era.core.concurrency.outages import FOR_NOW
from era.core.jsontext import number
from era.core.models import JsonObject
from era.core.program import Limits
from era.drivers import processes
from era.errors import NoIsolation

_CPU_PERIOD_US = 100_000
_REMOVAL_SECONDS = 5.0
_MOST_ROUNDS = 50  # of moving processes of a group, while these start others
_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "io")
_PIECE = 1 << 16
_SOCKETS, _SOCKETS_SHARE = "memory.kmem.tcp.limit_in_bytes", 8
"""In version 1 data in TCP and UDP sockets counts only where this has been written, and by itself, not as memory."""

_VERSION_1_NAMES = {"io": "blkio"}
SELF = "self"
"""As a parent, the group that the service is in itself."""

_SERVICE = "service"
"""The group for the service itself, below one that was delegated to it."""

_PARENT_HINT = (
    "Make this group in each hierarchy, for ERA alone and with the controllers memory and pids, or leave "
    "ERA_CGROUP_PARENT out."
)
_PROCS = "cgroup.procs"
_FREEZE, _FREEZER_STATE = "cgroup.freeze", "freezer.state"
"""The files by which a group is frozen, in version 2 and 1. In the latter a frozen process can't be killed."""


def cgroup_name(data_dir: Path) -> str:
    """The name of the control group of the service on this data directory: always the same, and no other service's."""
    return "era-" + hashlib.sha256(bytes(data_dir.resolve())).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Group:
    """The control group of one sandbox."""

    version: int
    directories: dict[str, Path]
    """By controller: in version 2 all the same directory, in version 1 one in each controller's hierarchy."""

    freezer: Path | None = None
    """A directory of its own by which it can be frozen, to be made when that is first wanted: to enter one more would
    cost each new sandbox something."""

    def add(self, pid: int) -> None:
        """Move a process into the group. It may have no children yet: those it forks later are in the group, too."""
        for directory in set(self.directories.values()):
            _write(directory, "cgroup.procs", str(pid))

    def entrances(self) -> list[int]:
        """Descriptors by which a process enters the group that writes `0` to each. The caller closes them. Raises
        OSError."""
        with contextlib.ExitStack() as undoing:
            opened = []
            for directory in set(self.directories.values()):
                opened.append(entrance := os.open(f"{directory}/{_PROCS}", os.O_WRONLY))
                undoing.callback(os.close, entrance)
            undoing.pop_all()
        return opened

    def limits(self) -> JsonObject:
        """The limits in force, read back from the kernel."""
        in_force: JsonObject = {"version": self.version}
        if directory := self.directories.get("memory"):
            name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
            in_force["memory_bytes"] = int(_read(directory, name))
            if self.version == 1:
                with contextlib.suppress(FileNotFoundError):
                    in_force["socket_bytes"] = int(_read(directory, _SOCKETS))
        if directory := self.directories.get("pids"):
            in_force["pids"] = int(_read(directory, "pids.max"))
        if directory := self.directories.get("cpu"):
            if self.version == 2:
                quota, period = _read(directory, "cpu.max").split()
            else:
                quota, period = (_read(directory, f"cpu.cfs_{which}_us") for which in ("quota", "period"))
            in_force["cpus"] = number(int(quota) / int(period))
        if directory := self.directories.get("io"):
            written = _read(directory, "io.max" if self.version == 2 else "blkio.throttle.write_bps_device")
            if bound := re.search(r"(?:wbps=| )(\d+)\b", written):
                # Version 1 bounds only what a process waits for itself, not what the kernel writes later.
                in_force[f"{'disk' if self.version == 2 else 'synced'}_write_bytes_per_second"] = int(bound[1])
        return in_force

    def widen(self, more_bytes: int, more_tasks: int) -> None:
        """Let it have so much more memory, and so many more processes and threads. Raises OSError."""
        if directory := self.directories.get("memory"):
            names = ("memory.max",) if self.version == 2 else ("memory.memsw.limit_in_bytes", "memory.limit_in_bytes")
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # without swap accounting
                    _write(directory, name, str(int(_read(directory, name)) + more_bytes))
        if directory := self.directories.get("pids"):
            _write(directory, "pids.max", str(int(_read(directory, "pids.max")) + more_tasks))

    def set_idle_priority(self, *, idle: bool) -> None:
        """With idle priority the group's processes run only when no other group's want to (cgroups(7), `cpu.idle`). Has
        no effect before Linux 5.15. Raises OSError where that fails only for now."""
        if directory := self.directories.get("cpu"):
            try:
                _write(directory, "cpu.idle", "1" if idle else "0")
            except OSError as error:
                if error.errno in FOR_NOW:
                    raise

    def cpu_seconds(self) -> float | None:
        """Processor time that processes of the group have used, those that have ended too. None where the kernel
        doesn't count it. Raises OSError where it can't be read only for now."""
        try:
            if self.version == 2:
                usage = _read(next(iter(self.directories.values())), "cpu.stat")
                return int(usage.split(maxsplit=2)[1]) / 1e6  # "usage_usec N" comes first
            if directory := self.directories.get("cpuacct"):
                return int(_read(directory, "cpuacct.usage")) / 1e9
        except OSError as error:
            if error.errno in FOR_NOW:
                raise  # else the group is being removed
        return None

    def processes(self) -> list[int]:
        """The pids of the group's processes; none once it is removed."""
        directory = next(iter(self.directories.values()))
        try:
            return [int(line) for line in _read(directory, "cgroup.procs").split()]
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return []
            raise

    def out_of_memory_kills(self) -> int:
        """How many processes of the group the kernel has killed for want of memory, since it was made."""
        if directory := self.directories.get("memory"):
            name = "memory.events" if self.version == 2 else "memory.oom_control"
            for line in _read(directory, name).splitlines():
                key, _, count = line.partition(" ")
                if key == "oom_kill":
                    return int(count)
        return 0

    @property
    def can_freeze(self) -> bool:
        return "freezer" in self.directories

    def prepare_freezer(self) -> bool:
        """Have it so that the group can be frozen. Returns whether it can. Blocks for some milliseconds. Raises
        OSError."""
        if not self.can_freeze and self.freezer is not None:
            self.freezer.mkdir(exist_ok=True)
            if self._enter_freezer(self.freezer):
                self.directories["freezer"] = self.freezer
            if not next(iter(self.directories.values())).exists():  # the sandbox was closed meanwhile
                _remove(self.freezer)
        return self.can_freeze

    def _enter_freezer(self, freezer: Path) -> bool:
        """Have all processes of the group in its directory for freezing, too. Returns whether they are. Raises
        OSError."""
        for _ in range(_MOST_ROUNDS):
            missing = set(self.processes()) - set(map(int, _read(freezer, _PROCS).split()))
            if not missing:  # and what these start from now on is there, too
                return True
            root = next(above for above in freezer.parents if above.is_mount())
            controller = "" if (freezer / _FREEZE).exists() else "freezer"
            for pid in missing:
                with processes.UnseenIsFine():  # it has ended
                    before = _own_group(root, controller, pid) or root
                    _write(freezer, _PROCS, str(pid))
                    if pid not in self.processes():  # it ended before, and its number is another one's
                        _write(before, _PROCS, str(pid))
        return False

    def set_frozen(self, *, frozen: bool) -> None:
        """Have the group's processes stand still, or go on. The first takes a moment: see `is_frozen`. Raises
        OSError."""
        directory = self.directories["freezer"]
        if (directory / _FREEZE).exists():
            _write(directory, _FREEZE, "1" if frozen else "0")
        else:
            _write(directory, _FREEZER_STATE, "FROZEN" if frozen else "THAWED")
        if frozen and directory == self.freezer:
            self._enter_freezer(directory)  # what came by `entrances` from before there was this one

    def is_frozen(self) -> bool:
        """Whether all of them stand still. Raises OSError."""
        directory = self.directories["freezer"]
        if (directory / _FREEZE).exists():
            return "frozen 1" in _read(directory, "cgroup.events")
        return _read(directory, _FREEZER_STATE).strip() == "FROZEN"

    def memory_bytes(self) -> int:
        """Memory of the group's processes that can't be dropped: their own, and files in memory. Raises OSError."""
        lines = _read(self.directories["memory"], "memory.stat").splitlines()
        sizes = {key: int(size) for key, _, size in (line.partition(" ") for line in lines)}
        return sizes["anon" if self.version == 2 else "rss"] + sizes["shmem"]

    def remove(self) -> None:
        """Remove the group, whose processes have been killed. Waits until the kernel has let go of them. Raises OSError
        after five seconds, and has removed all that can be then."""
        deadline = time.monotonic() + _REMOVAL_SECONDS
        problems = []
        for directory in {*self.directories.values(), *([self.freezer] if self.freezer else [])}:
            try:
                _remove(directory, deadline)
            except OSError as problem:
                problems.append(problem)
        if problems:
            raise problems[0]


class Cgroups:
    """Makes the control groups of a service's sandboxes."""

    def __init__(self, version: int, parents: dict[str, Path], disk: str | None, freezer: Path | None = None) -> None:
        """`parents` are the service's own groups, by controller. `disk` is MAJOR:MINOR of the disk that sandboxes write
        to. `freezer` is the service's own group for freezing, where that isn't one of `parents`."""
        self.version = version
        self._freezer = freezer
        self._parents = parents
        self._disk = disk

    @classmethod
    def find(cls, name: str, place: Path, parent: str = "") -> Cgroups | None:
        """Make the service's own group `name` in the hierarchies where this process may. None where it may not, or
        where memory or processes can't be bounded. Sandboxes write to the disk that has the directory `place`. This
        process may be in another group afterwards: see `_vacate`.

        With a `parent`, SELF or a path from the root of each hierarchy, it is made below that group. Raises NoIsolation
        where it can't be in each hierarchy that bounds something: what bounds the parent wouldn't bound sandboxes."""
        why = "no hierarchy has such a group with the controllers memory and pids"
        for version, roots in _below(parent) if parent else _hierarchies():
            if "memory" not in roots or "pids" not in roots:
                continue
            try:
                parents = {controller: root / name for controller, root in roots.items()}
                for root in set(roots.values()):
                    if version == 2:
                        _vacate(root)
                        _delegate(root, roots)
                    (root / name).mkdir(exist_ok=True)
                    if version == 2:
                        _delegate(root / name, roots)
            except OSError as error:
                why = f"{root}: {error.strerror}"
                for directory in set(parents.values()):
                    with contextlib.suppress(OSError):  # it wasn't made, or holds what an earlier service left
                        directory.rmdir()
                continue
            freezer = _freezer(name, parent)
            if freezer is not None and freezer in parents.values():
                parents["freezer"], freezer = freezer, None
            return cls(version, parents, _disk_of(place), freezer)
        if parent:
            message = f"ERA_CGROUP_PARENT is {parent}, and sandboxes can't be bounded there: {why}."
            raise NoIsolation(message, hint=_PARENT_HINT)
        return None

    def create(self, name: str, limits: Limits) -> Group:
        """A group with its limits set. Raises OSError."""
        directories = {controller: parent / name for controller, parent in self._parents.items()}
        group = Group(self.version, directories, None if self._freezer is None else self._freezer / name)
        try:
            for directory in set(group.directories.values()):
                directory.mkdir()
            self._set(group, limits)
        except BaseException:
            group.remove()
            raise
        return group

    def remove_leftovers(self) -> int:
        """Kill and remove every group of an earlier service of this name. Returns how many there were."""
        groups: set[Path] = set()
        for parent in self._own():
            with contextlib.suppress(FileNotFoundError):  # what ended late may be removing it
                groups |= {child for child in parent.iterdir() if child.is_dir()}
        for directory in groups:
            with contextlib.suppress(FileNotFoundError):
                for line in (directory / "cgroup.procs").read_text().splitlines():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(line), signal.SIGKILL)
        for directory in groups:
            with contextlib.suppress(FileNotFoundError):
                if (directory / _FREEZER_STATE).exists():
                    (directory / _FREEZER_STATE).write_text("THAWED")
        for directory in groups:
            _remove(directory)
        return len({directory.name for directory in groups})

    def close(self) -> None:
        """Remove the service's own group."""
        for parent in self._own():
            with contextlib.suppress(OSError):
                parent.rmdir()

    def _own(self) -> set[Path]:
        """The service's own groups."""
        return {*self._parents.values(), *([self._freezer] if self._freezer else [])}

    def _set(self, group: Group, limits: Limits) -> None:
        """Write the limits to a new group's files. Raises OSError where one that matters can't be set."""
        memory, pids, cpu, io = (group.directories.get(controller) for controller in ("memory", "pids", "cpu", "io"))
        quota = int(limits.cpus * _CPU_PERIOD_US)
        if memory and self.version == 2:
            _write(memory, "memory.max", str(limits.memory_bytes))
            with contextlib.suppress(FileNotFoundError):  # without swap accounting
                _write(memory, "memory.swap.max", "0")
        elif memory:
            _write(memory, "memory.limit_in_bytes", str(limits.memory_bytes))
            try:
                _write(memory, "memory.memsw.limit_in_bytes", str(limits.memory_bytes))
            except FileNotFoundError:  # without swap accounting
                _write(memory, "memory.swappiness", "0")
            with contextlib.suppress(FileNotFoundError):  # a kernel without version 1's accounting of sockets
                _write(memory, _SOCKETS, str(limits.memory_bytes // _SOCKETS_SHARE))
        if pids:
            # The supervisor, bubblewrap and their threads count, too.
            _write(pids, "pids.max", str(limits.pids + 8))
        if cpu and self.version == 2:
            _write(cpu, "cpu.max", f"{quota} {_CPU_PERIOD_US}")
        elif cpu:
            _write(cpu, "cpu.cfs_period_us", str(_CPU_PERIOD_US))
            try:
                _write(cpu, "cpu.cfs_quota_us", str(quota))
            except OSError:  # version 1 allows no more than a group above has
                _write(cpu, "cpu.cfs_quota_us", str(int(min(quota, _cpus_above(cpu) * _CPU_PERIOD_US))))
        if io and self._disk and limits.write_bytes_per_second:
            bound = limits.write_bytes_per_second
            with contextlib.suppress(OSError):  # not every disk can be bounded; what is in force is read back
                if self.version == 2:
                    _write(io, "io.max", f"{self._disk} wbps={bound}")
                else:
                    _write(io, "blkio.throttle.write_bps_device", f"{self._disk} {bound}")


def _read(directory: Path, name: str) -> str:
    """The content of a group's file. Sandboxes are made and looked at many times a second: pathlib would take six times
    as long."""
    fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = b""
        while more := os.read(fd, _PIECE):
            content += more
        return content.decode()
    finally:
        os.close(fd)


def _write(directory: Path, name: str, value: str) -> None:
    """Write to a group's file."""
    fd = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _cpus_above(directory: Path) -> float:
    """The least processors that a group above this one of version 1 has by its quota; infinite without any."""
    least = math.inf
    for above in directory.parents:
        with contextlib.suppress(OSError):
            quota, period = (int(_read(above, f"cpu.cfs_{which}_us")) for which in ("quota", "period"))
            least = min(least, quota / period if quota > 0 else math.inf)
    return least


def _mounts(kind: str) -> list[tuple[Path, set[str]]]:
    """Mount points and options of the file systems of this type (proc_pid_mountinfo(5))."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind_here, _, options = after.split(" ", 2)
        if kind_here == kind:
            mounts.append((Path(before.split(" ")[4]), set(options.split(","))))
    return mounts


def _hierarchies() -> Iterator[tuple[int, dict[str, Path]]]:
    """Directories by controller below which the service's group may be made, and the version: the roots first, then the
    groups that this process is in."""
    yield 1, _version_1()
    yield 2, _version_2()
    yield 1, {controller: own for controller, root in _version_1().items() if (own := _own_group(root, controller))}
    for root in set(_version_2().values()):
        if own := _own_group(root, ""):
            yield 2, _available(own)


def _below(parent: str) -> Iterator[tuple[int, dict[str, Path]]]:
    """As `_hierarchies`, of the group that the setting names. A group that isn't there is one of them, too: it isn't
    made, since it would have no bounds."""
    yield 1, {controller: _named(root, controller, parent) for controller, root in _version_1().items()}
    for root in set(_version_2().values()):
        yield 2, _available(_named(root, "", parent))


def _named(root: Path, controller: str, parent: str) -> Path:
    """The group that the setting names, below the root of a controller's hierarchy; see `_own_group`."""
    if parent != SELF:
        return root / parent.lstrip("/")
    own = _own_group(root, controller) or root
    return own.parent if not controller and own.name == _SERVICE else own


def _version_1() -> dict[str, Path]:
    """The root of each controller's hierarchy that is mounted with version 1."""
    return {
        controller: directory
        for directory, options in _mounts("cgroup")
        for controller in _CONTROLLERS
        if _VERSION_1_NAMES.get(controller, controller) in options
    }


def _version_2() -> dict[str, Path]:
    """The root of the version 2 hierarchy, by the controllers that it has."""
    return next((_available(directory) for directory, _ in _mounts("cgroup2")), {})


def _available(directory: Path) -> dict[str, Path]:
    """A version 2 group, by the controllers that it has."""
    try:
        available = (directory / "cgroup.controllers").read_text().split()
    except OSError:
        return {}
    return {controller: directory for controller in _CONTROLLERS if controller in available}


def _own_group(root: Path, controller: str, pid: int | None = None) -> Path | None:
    """The group that this process (or that with `pid`) is in, below the root of a controller's hierarchy of version 1
    or, without a controller, of version 2. None where it is in the root."""
    wanted = _VERSION_1_NAMES.get(controller, controller)
    for line in Path(f"/proc/{pid or 'self'}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if wanted in controllers.split(",") and path != "/":
            return root / path.lstrip("/")
    return None


def _vacate(directory: Path) -> None:
    """Move this process, and those that it has started, from a version 2 group other than the root to one below it: a
    group with processes of its own can't have controllers for those below (cgroups(7), "no internal processes").
    Raises OSError, also where others are in that group: it isn't the service's alone."""
    if not (directory / "cgroup.type").exists():  # which the root has not
        return
    inside = {int(pid) for pid in (directory / "cgroup.procs").read_text().split()}
    if inside - {os.getpid(), *processes.below(os.getpid())}:
        raise PermissionError(errno.EPERM, "other processes are in this control group")
    for pid in inside:
        (directory / _SERVICE).mkdir(exist_ok=True)
        (directory / _SERVICE / "cgroup.procs").write_text(str(pid))


def _freezer(name: str, parent: str) -> Path | None:
    """The service's own group `name` by which groups below it can be frozen, made where it isn't there; None where
    there is none. Beside version 1, version 2 is mostly mounted, too: it can freeze without any controller. A hierarchy
    for freezing alone bounds nothing, so in one that hasn't the parent it is made without."""
    roots = [(directory, "") for directory, _ in _mounts("cgroup2")]
    roots += [(directory, "freezer") for directory, options in _mounts("cgroup") if "freezer" in options]
    named = [_named(root, controller, parent) for root, controller in roots] if parent else []
    own = [group for root, controller in roots if (group := _own_group(root, controller))]
    for root in (*named, *(root for root, _ in roots), *own):
        try:
            (root / name).mkdir(exist_ok=True)
            if any((root / name / file).exists() for file in (_FREEZE, _FREEZER_STATE)):
                return root / name
        except OSError:
            continue
    return None


def _disk_of(place: Path) -> str | None:
    """The whole disk that a directory's files lie on, as MAJOR:MINOR. None where that is no single disk."""
    device = place.stat().st_dev
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if (disk / "partition").exists():
        disk = disk.resolve().parent
    try:
        return (disk / "dev").read_text().strip()
    except OSError:
        return None


def _delegate(directory: Path, controllers: dict[str, Path]) -> None:
    """Let the groups below a version 2 group use these controllers."""
    (directory / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in controllers))


def _remove(directory: Path, deadline: float | None = None) -> None:
    """rmdir, again and again until the kernel allows it. Raises OSError after the deadline, by the monotonic clock;
    without one, after _REMOVAL_SECONDS."""
    if deadline is None:
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
