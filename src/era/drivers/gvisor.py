"""The gVisor driver: sandboxes whose programs talk to a kernel of their own, in user space, and not to the host's.

Theory of operation
===================

*A sandbox in a sandbox.* bubblewrap makes the outer one just as it does for programs: the same read-only files, own
namespaces, no network, an unprivileged uid of its own, the control group, and one PID 1 whose end is the end of all.
In there runs gVisor's `runsc` instead of a program, without any more of the host than a program would have. So whoever
breaks out of gVisor is in a bubblewrap sandbox still, though without its filter of system calls: runsc has to mount and
to make namespaces. What a sandbox holds, its start, its end and the leftovers of a killed service are those of the
bubblewrap driver, since they are the same code.

*Who is who.* That PID 1 is a program of ours (guest/gvisor.py), which starts `runsc` and ends with it. `runsc` is root
of its sandbox's user namespace, and has there the capabilities it needs to build its own walls; outside that is the
sandbox's unprivileged uid. It starts a *gofer*, which opens files, and a *sentry*, the kernel for the program, which
can open none: the sentry has an empty root, no network but the outer sandbox's loopback, and a filter that lets few
system calls through. A call of the program's ends in the sentry; none reaches the host's kernel.

*Network.* With `--network=host` a program's TCP or UDP socket stands for one that the sentry has of the host's kernel,
in the outer sandbox's network, where there is loopback only. What a program does with its socket the sentry does with
that one, in calls of its own. So guest listeners, socket broker and supervised connections are those of a sandbox
without gVisor, and the same code, but for who hands sockets out and whose calls the kernel notifies of
(guest/gvisor.py). The price is that the sentry's filter lets calls on sockets pass, and that the host's TCP and UDP are
within a program's reach, by way of the sentry. gVisor's own network would keep those away too; but nothing is let into
or out of that, and so a program would have no way out but by one of us who reads all it says. Sockets of other kinds
are gVisor's own, or there are none.

*Inside,* the program is user 0 without any capability, because an ordinary user can map one uid only, and `runsc`
wants that to be root.

*Files.* The root is what bubblewrap shows, read-only. The working directory is a mount of its own that is `shared`:
gVisor looks again whether a file is what it was, so what the host writes between two runs is seen. /tmp, /dev/shm and
/dev are in the sentry's memory. That is one file in the host's memory, bounded by the control group, and without one
by how large a file may be.

*The control socket* is handed on as descriptor 3. Nothing else of the host is open inside.

*What gVisor has not.* A read-only /dev whose devices can be written to: it is writable, and a run that changes it costs
the sandbox. PID 1 can be killed from inside: that ends this sandbox, and the host makes another. There are no
pidfds, no table of System V objects, and no way to populate memory; the supervisor does it another way.
"""

from __future__ import annotations

import json
import os
import resource
from dataclasses import replace
from pathlib import Path

from era.core.models import JsonObject, Language
from era.core.ports import Limits
from era.drivers import guest, processes
from era.drivers.bubblewrap import BubblewrapDriver, BubblewrapSandbox, Plan, read_only, resolver_files
from era.drivers.staging import Paths
from era.errors import NoIsolation, SandboxFailed

_RUNSC = "/usr/bin/runsc"
"""Where distributions install it; sandboxes have the host's /usr."""
_INSTALL = "On Debian and Ubuntu: apt-get install runsc. Elsewhere put gVisor's runsc there (https://gvisor.dev)."
_CONTROL = 3
_BUNDLE = "/tmp/bundle"  # noqa: S108  in the outer sandbox, where the inner one's own /tmp covers it
_STATE = "/tmp/state"  # noqa: S108  a path inside the sandbox
_NO_RLIMITS = ("RLIMIT_DATA", "RLIMIT_MSGQUEUE", "RLIMIT_SIGPENDING")
"""gVisor ignores the first and refuses to set the others. What they bound is the sentry's memory, as all else."""
_GIB = 1 << 30
_OF_EACH_PROCESS = 24 << 20
"""Bytes by which a process makes the second file longer, measured: 17 MiB. Nearly all of it is a hole."""
_OWN_MEMORY = 96 << 20
"""Bytes that sentry, gofer and runsc take themselves, beside the program's."""
_OWN_PIDS = 1024
"""Threads of the host's that gVisor may need for itself and for the threads of programs."""


def flags() -> list[str]:
    """runsc's options."""
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


def specification(limits: Limits, config: str, environment: str | None = None) -> JsonObject:
    """The container as an OCI runtime specification. `config` is the supervisor's."""
    variables = {
        "PATH": guest.PATH,
        "LANG": "C.UTF-8",
        "PYTHONPATH": guest.GUEST,
        "PYTHONDONTWRITEBYTECODE": "1",
        "ERA_GUEST": config,
        **({} if environment is None else {"PYTHONUSERBASE": guest.ENVIRONMENT}),
    }
    scratch = ["nosuid", "nodev", "mode=1777", f"size={limits.tmp_bytes}"]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "/", "readonly": True},
        "hostname": "era",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [guest.PYTHON, "main.py"],
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": guest.WORKSPACE,
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            # Not read-only: gVisor would then let nobody write to a device either. The supervisor looks after it.
            {"destination": "/dev", "type": "dev", "source": "dev"},
            *(
                {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": scratch}
                for path in guest.scratch(config)
            ),
            {
                "destination": guest.WORKSPACE,
                "type": "bind",
                "source": guest.WORKSPACE,
                "options": ["rbind", "rw", "nosuid", "nodev"],
            },
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]},
    }


def arguments(paths: Paths, sandbox_id: str, data: dict[str, int], environment: str | None = None) -> list[str]:
    """bubblewrap's options for the outer sandbox, the one runsc runs in."""
    options = ["--unshare-all", "--unshare-user", "--uid", "0", "--gid", "0", "--cap-add", "ALL"]
    options += ["--die-with-parent", "--as-pid-1", "--new-session", "--hostname", "era", "--clearenv"]
    options += ["--proc", "/proc", "--dev", "/dev", "--size", str(1 << 20), "--tmpfs", "/tmp", "--dir", _STATE]  # noqa: S108
    options += read_only(paths, data, environment)
    options += ["--bind", str(paths.live / sandbox_id / "workspace"), guest.WORKSPACE]
    return [*options, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]


def etc_files() -> dict[str, bytes]:
    """Files under /etc that are made, not taken from the host."""
    return {
        "/etc/passwd": b"root:x:0:0:era:/tmp:/bin/sh\n",
        "/etc/group": b"root:x:0:\n",
        **resolver_files(),
    }


class GvisorSandbox(BubblewrapSandbox):
    """One live sandbox: bubblewrap's, with runsc in it."""

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
        files = etc_files() | {
            f"{_BUNDLE}/config.json": json.dumps(specification(self.limits, config, self.environment)).encode()
        }
        # Without site, or a supervisor would start here (guest/sitecustomize.py).
        ours = [
            guest.PYTHON,
            "-S",
            "-E",
            f"{guest.GUEST}/gvisor.py",
            str(control),
            ",".join(map(str, guest.GUEST_LISTENERS.values())),
        ]
        runsc = [_RUNSC, *flags(), "run", "--bundle", _BUNDLE, "--pass-fd", f"{control}:{_CONTROL}", "era"]
        return Plan(
            files,
            lambda data: arguments(self._driver.paths, self.id, data, self.environment),
            [*ours, *runsc],
        )

    def rlimits(self, language: Language) -> dict[str, int]:
        return {name: value for name, value in super().rlimits(language).items() if name not in _NO_RLIMITS}

    def group_limits(self) -> Limits:
        return replace(self.limits, memory_bytes=self.limits.memory_bytes + _OWN_MEMORY, pids=_OWN_PIDS)

    def bound(self, pid: int) -> None:
        super().bound(pid)
        if self._group is None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (self._memory_file(), self._memory_file()))

    def _memory_file(self) -> int:
        """How large a file may be, to gVisor itself: all memory of a sandbox is one file, and what stands for its
        processes another, both growing by whole GiB. Files of the working directory must still fit."""
        most = max(self.limits.memory_bytes, self.limits.pids * _OF_EACH_PROCESS, self.limits.disk_bytes)
        return -(-most // _GIB) * _GIB

    def _enforced(self, language: Language, seen: JsonObject) -> JsonObject:
        # Capabilities are those that the program has in gVisor. The rest is what the host's kernel holds its sentry to.
        told = super()._enforced(language, seen | sentry_seen(self._init_pid))
        return {**told, "platform": "systrap", "memory_file_bytes": None if self._group else self._memory_file()}


class GvisorDriver(BubblewrapDriver):
    """Makes gVisor sandboxes below `directory`, which must be ours alone, as must the control group."""

    name = "gvisor"
    sandbox = GvisorSandbox

    def isolation(self) -> JsonObject:
        """What the self-test's sandboxes had in force, and a sentence of it."""
        seen = self._seen
        walls = ["gVisor (systrap) in bubblewrap, no system call of the host's, no capabilities, no network"]
        walls.append("a uid of its own for each sandbox" if self._privileged else "user namespaces of this user")
        if seen["cgroup"]:
            walls.append(f"memory, processes and cpu bounded by cgroup v{seen['cgroup']['version']}")
        else:
            walls.append("no cgroup: memory is bounded in steps of 1 GiB, cpu is not (start ERA as root for more)")
        if seen["network_reason"]:
            walls.append(f"no internet access: {seen['network_reason']}")
        return {**seen, "uid": None, "own_uid": self._privileged, "summary": "; ".join(walls)}

    def make_filters(self) -> tuple[bytes, ...]:
        """None around the outer sandbox: runsc needs calls that programs don't, and puts a filter on itself."""
        return ()

    async def start(self) -> None:
        if not Path(_RUNSC).exists():
            raise NoIsolation(f"gVisor is not installed: there is no {_RUNSC}.", hint=_INSTALL)
        await super().start()


def sentry_seen(init_pid: int) -> JsonObject:
    """What the host's kernel says of the sentry below a sandbox's PID 1: its namespaces, and the lines that tell of
    privileges."""
    for pid in processes.below(init_pid):
        process = Path("/proc") / str(pid)
        if (process / "cmdline").read_bytes().startswith(b"runsc-sandbox\0"):
            lines = (line.partition(":\t") for line in (process / "status").read_text().splitlines())
            status = {name: value for name, _, value in lines if name in ("NoNewPrivs", "Seccomp")}
            try:
                spaces = {name: os.readlink(process / "ns" / name) for name in os.listdir(process / "ns")}
            except PermissionError:
                raise SandboxFailed("ERA may not look at gVisor's sentry: as root it needs CAP_SYS_PTRACE.") from None
            return {**status, "namespaces": spaces}
    raise SandboxFailed("gVisor's sentry was not found.")
