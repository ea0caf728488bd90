"""The gVisor driver: sandboxes whose programs call a kernel of their own, in user space, instead of the host's.

Theory of operation
===================

*A sandbox in a sandbox.* bubblewrap makes the outer one just as it does for programs: the same read-only files, own
namespaces, no network, an unprivileged uid of its own, the control group, and a PID 1 with which everything ends.
gVisor's `runsc` runs in it instead of a program, and has no more of the host than a program would have. So whoever
breaks out of gVisor is still in a bubblewrap sandbox, though without most of its filter of system calls: runsc has to
mount and to make namespaces. What a sandbox holds, its start, its end and the leftovers of a killed service are those
of the bubblewrap driver, since they are the same code.

*Processes.* That PID 1 is a program of ours (guest/gvisor.py), which starts `runsc` and ends with it. `runsc` is root
of its sandbox's user namespace, and has there the capabilities it needs to build its own walls; outside that is the
sandbox's unprivileged uid. It starts a *gofer*, which opens files, and a *sentry*, the kernel for the program, which
can open none: the sentry has an empty root, no network but the outer sandbox's loopback, and a filter that lets few
system calls through. The sentry answers all calls of the program; none reaches the host's kernel.

*Network.* With `--network=host` the sentry has a socket of the host's kernel for each TCP or UDP socket of a program,
in the outer sandbox's network, which has loopback only. What a program does with its socket the sentry repeats with its
own. So guest listeners, socket broker and supervision of connects are the same code as without gVisor, but for who
hands sockets out and whom the kernel asks about (guest/gvisor.py). The price: the sentry's filter lets calls on sockets
pass, and a program reaches the host's TCP and UDP through the sentry. gVisor's own network stack would keep those away,
too; but no connection leads into or out of it, so a program would need a process of ours that relays all its traffic.
Sockets of other kinds are gVisor's own, or can't be had.

*Inside,* the program is user 0 without any capability, because an ordinary user can map one uid only, and `runsc`
wants that to be root.

*Files.* The root is what bubblewrap shows, read-only. The working directory is a mount of its own that is `shared`:
gVisor checks each time whether a file has changed on the host, so programs see what the host writes between two runs.
/tmp, /dev/shm and /dev are in the sentry's memory. That is one file in the host's memory, bounded by the control group,
and without one by RLIMIT_FSIZE. A run that takes too much is ended before the group is full (memory.GroupWatch): the
kernel would end the sentry, and with it everything.

*Two descriptors* are handed on: 3, the control socket of the supervisor of runs, and 4, by which the container's first
process gets that of the supervisor of processes (guest/container_split.py). Nothing else of the host is open inside.

*What gVisor lacks.* A read-only /dev would have read-only devices. So /dev is writable, and a run that changes it costs
the sandbox. PID 1 can be killed or stopped from inside: that ends this sandbox (guest/container_split.py), and the host
makes another. There are no pidfds, no table of System V objects and no MADV_POPULATE_WRITE; the supervisor gets by
without them. System calls whose effects later runs would inherit are refused to programs (seccomp.INSIDE_GVISOR).

*Runs and processes* share a container that is split in two. This module has the host's end of that split.
guest/container_split.py is the other end, and has the theory of operation and the wire format.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from era.core.models import JsonObject, Language
from era.core.process import HeldFiles
from era.core.program import Limits
from era.drivers import guest, isolation_report, prefix, processes, seccomp
from era.drivers.alternation import Alternation
from era.drivers.bubblewrap import BubblewrapDriver, BubblewrapSandbox
from era.drivers.cgroups import Group
from era.drivers.channel import Channel
from era.drivers.memory import SUPERVISOR_BYTES, GroupWatch, MemoryWatch, of_gvisor
from era.drivers.options import Plan, own_directories, read_only, resolver_files
from era.drivers.process_supervisor import LazyProcessSupervisor, Life
from era.drivers.staging import Paths
from era.errors import NoIsolation, SandboxFailed

_RUNSC = "/usr/bin/runsc"
"""Where distributions install it; sandboxes have the host's /usr."""
_INSTALL = "On Debian and Ubuntu: apt-get install runsc. Elsewhere put gVisor's runsc there (https://gvisor.dev)."
_CONTROL, _DIVISION = 3, 4
"""Descriptors of what the container is given: the control socket of the supervisor of runs, and
guest/container_split.py's."""

_BUNDLE = "/tmp/bundle"  # noqa: S108  in the outer sandbox, where the inner one's own /tmp covers it
_STATE = "/tmp/state"  # noqa: S108  a path inside the sandbox
_CAPABILITIES, _SETS = ["CAP_SETPCAP", "CAP_SYS_ADMIN"], ("bounding", "effective", "permitted")
"""What the container's first process has in the sentry, and all others have given up (guest/container_split.py)."""

_NO_RLIMITS = ("RLIMIT_DATA", "RLIMIT_MSGQUEUE", "RLIMIT_SIGPENDING")
"""gVisor ignores the first and refuses to set the others. What they would bound is in the sentry's memory anyway."""
_GIB = 1 << 30
_PROCESS_BYTES = 24 << 20
"""By how much each process lengthens the file that stands for processes. Measured: 17 MiB, nearly all of it a hole."""
_OWN_MEMORY = 96 << 20
"""Bytes of memory that sentry, gofer and runsc need for themselves."""
_RESERVE = 768 << 20
"""Bytes by which the control group's bound is larger, so that a run is ended (memory.GroupWatch) before the kernel ends
gVisor, or refuses it memory: what a program can take in the meantime. On two cores with eleven others that want them,
that was 10 to 160 MiB in 48 runs, and once 275: the service had its turn only after 0.2 seconds. With 25 others it was
below 160 MiB in 44 runs, and over 384 in one."""
_UNCERTAIN = 128 << 20
"""Bytes by which a program may be over its limit where no control group counts: what is measured is more than what it
takes; and where one does, but processes are beside runs: what runs have left isn't told from what these take."""
_OWN_PIDS = 1024
"""Threads of the host that gVisor may need, for itself and for the threads of programs."""


def flags() -> list[str]:
    """runsc's options that hold for all its commands."""
    return [
        "--rootless",
        "--platform=systrap",
        "--network=host",
        "--directfs=false",
        "--host-uds=none",
        "--host-fifo=none",
        "--overlay2=none",
        "--file-access=exclusive",
        "--file-access-mounts=shared",
        "--ignore-cgroups",
        f"--root={_STATE}",
    ]


def specification(limits: Limits, config: JsonObject) -> JsonObject:
    """The container as an OCI runtime specification. `config` is the supervisor's configuration."""
    variables = {
        "PATH": guest.PATH,
        "LANG": "C.UTF-8",
        "PYTHONPATH": guest.GUEST,
        "PYTHONDONTWRITEBYTECODE": "1",
        "ERA_GUEST": json.dumps(config),
    }
    scratch = ["nosuid", "nodev", "mode=1777", f"size={limits.tmp_bytes}"]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "/", "readonly": True},
        "hostname": "era",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [guest.INTERPRETER, "main.py"],
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": guest.WORKSPACE,
            "capabilities": dict.fromkeys(_SETS, _CAPABILITIES),
            "noNewPrivileges": True,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            # Not read-only, or nobody could write to a device either. The supervisor checks /dev after each run.
            {"destination": "/dev", "type": "dev", "source": "dev"},
            *(
                {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": scratch}
                for path in guest.scratch(config)
            ),
            *(
                {"destination": path, "type": "bind", "source": path, "options": ["rbind", "rw", "nosuid", "nodev"]}
                for path in (guest.WORKSPACE, prefix.LAYER)
            ),
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]},
    }


def arguments(paths: Paths, sandbox_id: str, data: dict[str, int], package_set: str | None = None) -> list[str]:
    """bubblewrap's options for the outer sandbox, in which runsc runs."""
    options = ["--unshare-all", "--unshare-user", "--uid", "0", "--gid", "0", "--cap-add", "ALL"]
    options += ["--die-with-parent", "--as-pid-1", "--new-session", "--hostname", "era", "--clearenv"]
    options += ["--proc", "/proc", "--dev", "/dev", "--size", str(1 << 20), "--tmpfs", "/tmp", "--dir", _STATE]  # noqa: S108
    options += read_only(paths, data, package_set)
    options += own_directories(paths, sandbox_id)
    return [*options, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]


def etc_files() -> dict[str, bytes]:
    """Files under /etc that are made, not taken from the host."""
    return {
        "/etc/passwd": b"root:x:0:0:era:/tmp:/bin/sh\n",
        "/etc/group": b"root:x:0:\n",
        **resolver_files(),
    }


def _nothing(_: int) -> int:
    """The size of a process that counts for nothing."""
    return 0


class GvisorSandbox(BubblewrapSandbox):
    """A sandbox of bubblewrap's in which runsc makes another one; see ports.Sandbox."""

    opens_on_host = False
    """The sentry keeps descriptors of files, and gives a program that opens one again what it has."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._division: ContainerSplit | None = None
        self._their_division = -1
        """The descriptor of its other end, as long as the sandbox is started."""

    def _start_supervisor(self, language: Language, control: socket.socket) -> None:
        ours, theirs = socket.socketpair()
        self._division = ContainerSplit(ours)
        with theirs:
            self._their_division = theirs.fileno()
            super()._start_supervisor(language, control)

    async def _end(self) -> None:
        await super()._end()
        if self._division is not None:
            self._division.close()

    def more_descriptors(self) -> list[int]:
        return [self._their_division]

    def plan(self, language: Language, control: int) -> Plan:
        config = guest.supervisor_config(
            language,
            _CONTROL,
            self.rlimits(language),
            self.limits,
            guest_listeners=False,
            certificates=self._driver.certificates,
            supervised=True,
        )
        second = guest.process_supervisor_config(self.limits, cgroup=True, gvisor=True)
        second["rlimits"] = _settable(second["rlimits"])
        config |= {"division": _DIVISION, "second": second, "filter": seccomp.filter_inside_gvisor().hex()}
        files = etc_files() | {f"{_BUNDLE}/config.json": json.dumps(specification(self.limits, config)).encode()}
        # -S: without `site`, or the supervisor would start here (guest/sitecustomize.py).
        starter = [
            guest.PYTHON,
            "-S",
            "-E",
            f"{guest.GUEST}/gvisor.py",
            str(control),
            ",".join(map(str, guest.GUEST_LISTENERS.values())),
        ]
        runsc = [_RUNSC, *flags(), "run", "--bundle", _BUNDLE, "--pass-fd", f"{control}:{_CONTROL}"]
        runsc += ["--pass-fd", f"{self._their_division}:{_DIVISION}", "era"]
        return Plan(
            files,
            lambda data: arguments(self._driver.paths, self.id, data, self.package_set),
            [*starter, *runsc],
        )

    def make_beside(self, channel: Channel | Alternation, variables: Mapping[str, str]) -> LazyProcessSupervisor:
        division = self._division
        if division is None:
            raise SandboxFailed("The sandbox did not start.")

        async def enter(control: int) -> Life:
            return division.start(control)

        return LazyProcessSupervisor(
            enter,
            variables,
            self._out_of_memory,
            self._watching,
            self.log,
            channel.join_run,
            self._freezer.progress(self.cpu_seconds),
            sandbox_broker=self.broker,
        )

    def held_files(self, device: int) -> HeldFiles | None:
        """Those that are mapped. What is open says nothing here, since sentry and gofer keep descriptors of each file
        that a program has ever looked at (`opens_on_host`): so every look is at all files anyway, and to read those
        thousands of descriptors would take longer than that."""
        mapped = processes.mapped(self._processes())
        return None if mapped is None else HeldFiles(frozenset(), mapped)

    def rlimits(self, language: Language) -> dict[str, int]:
        return _settable(super().rlimits(language))

    def group_limits(self) -> Limits:
        memory = self.limits.memory_bytes + _OWN_MEMORY + _RESERVE
        return replace(self.limits, memory_bytes=memory, pids=_OWN_PIDS)

    def memory_watch(self, group: Group | None) -> MemoryWatch | None:
        most = self.limits.memory_bytes + _OWN_MEMORY
        if group is not None:
            most += 0 if self._gives_back_late() else _UNCERTAIN
            return GroupWatch(most, group.memory_bytes, self.relieve, gives_back_late=self._gives_back_late)
        return MemoryWatch(
            most + _UNCERTAIN + SUPERVISOR_BYTES,
            lambda: of_gvisor(self._processes()),
            self.relieve,
            first=0 if self._gives_back_late() else None,
            gives_back_late=self._gives_back_late,
        )

    def _gives_back_late(self) -> bool:
        """Whether what is taken may have been left by what has ended. What processes have isn't given back after a run,
        and could grow with each."""
        return self._supervisor_beside() is None

    async def relieve(self, size: Callable[[int], int] = _nothing) -> bool:
        """End the run under way, or all processes, whatever the size of each. From outside they can't be told apart: so
        it's the processes where their supervisor says that they take more than what is left for the run."""
        beside = self._supervisor_beside()
        if beside is None:
            return await super().relieve()
        if self._watching.runs:
            # What is unread in sockets (`size`) counts nowhere, so nobody knows how far the kernel is from its end.
            taken = await beside.memory_bytes(self._has_reserve if size is _nothing else lambda: False)
            if taken is None or 2 * taken <= self.limits.memory_bytes:
                return await super().relieve()
        beside.end_for_want_of_memory()
        return False

    def _has_reserve(self) -> bool:
        """Whether the kernel is far enough from ending gVisor to wait for what the processes' supervisor says."""
        return self._group is not None and self._group.memory_bytes() < self.group_limits().memory_bytes - _RESERVE // 2

    def apply_bounds(self, pid: int) -> None:
        super().apply_bounds(pid)
        if self._group is None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (self._memory_file(), self._memory_file()))

    def _memory_file(self) -> int:
        """The largest file in bytes that gVisor itself may make. All memory of a sandbox is one file, and another one
        stands for its processes; both grow by whole GiB. Files of the working directory have to fit, too."""
        most = max(self.limits.memory_bytes, self.limits.pids * _PROCESS_BYTES, self.limits.disk_bytes)
        return -(-most // _GIB) * _GIB

    def _enforced(self, language: Language, report: JsonObject) -> JsonObject:
        # Capabilities are those that the program has in gVisor. The rest is what the host's kernel holds its sentry to.
        enforced = super()._enforced(language, report | sentry_status(self._init_pid))
        return {**enforced, "platform": "systrap", "memory_file_bytes": None if self._group else self._memory_file()}


class GvisorDriver(BubblewrapDriver):
    """Makes gVisor sandboxes; see ports.Driver."""

    name = "gvisor"
    sandbox = GvisorSandbox
    can_fork = False

    def summary(self, enforced: JsonObject, *, own_uid: bool) -> str:
        first = "gVisor (systrap) in bubblewrap, no system call of the host's, no capabilities"
        return isolation_report.summary(first, enforced, own_uid=own_uid)

    def etc_files(self) -> dict[str, bytes]:
        return etc_files()

    def make_filters(self) -> tuple[bytes, ...]:
        """runsc needs calls that programs don't, and filters its own; only what gofers do for programs is filtered."""
        return seccomp.outer_filters()

    async def start(self) -> None:
        if not Path(_RUNSC).exists():
            raise NoIsolation(f"gVisor is not installed: there is no {_RUNSC}.", hint=_INSTALL)
        await super().start()


def _settable(bounds: dict[str, int]) -> dict[str, int]:
    """Those rlimits that gVisor has."""
    return {name: value for name, value in bounds.items() if name not in _NO_RLIMITS}


def _privileges(pid: int) -> dict[str, str]:
    """What the host's kernel reports of a process's privileges; `Seccomp_filters` from Linux 5.9 on."""
    lines = (line.partition(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: value for name, _, value in lines if name in ("NoNewPrivs", "Seccomp", "Seccomp_filters")}


def sentry_status(init_pid: int) -> JsonObject:
    """The namespaces and privileges that the host's kernel reports for the sentry below a sandbox's PID 1. Raises
    SandboxFailed."""
    for pid in processes.below(init_pid):
        process = Path("/proc") / str(pid)
        name = b""
        with processes.UnseenIsFine():  # it has ended
            name = (process / "cmdline").read_bytes()
        if name.startswith(b"runsc-sandbox\0"):
            status, first = (_privileges(one) for one in (pid, init_pid))
            if "Seccomp_filters" in status and status["Seccomp_filters"] == first["Seccomp_filters"]:
                status["Seccomp"] = "0"  # it only inherits ours, which refuses next to nothing
            try:
                spaces = {name: os.readlink(process / "ns" / name) for name in os.listdir(process / "ns")}
            except PermissionError:
                raise SandboxFailed("ERA may not look at gVisor's sentry: as root it needs CAP_SYS_PTRACE.") from None
            return {**status, "namespaces": spaces}
    raise SandboxFailed("gVisor's sentry was not found.")


class ContainerSplit:
    """Starts the process supervisor of one sandbox, of which there is one at a time."""

    def __init__(self, sock: socket.socket) -> None:
        """`sock` is owned by this object from here on."""
        sock.setblocking(False)
        self._sock = sock

    def start(self, control: int) -> DividedLife:
        """Start it, with `control` as its control socket. Raises OSError."""
        socket.send_fds(self._sock, [b"S"], [control])
        return DividedLife(self._sock)

    def close(self) -> None:
        self._sock.close()


class DividedLife:
    """See process_supervisor.Life."""

    pid = 0

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # the sandbox is gone
            self._sock.send(b"K")

    async def ended(self) -> None:
        with contextlib.suppress(OSError):
            while await asyncio.get_running_loop().sock_recv(self._sock, 1) not in (b"E", b""):
                pass
