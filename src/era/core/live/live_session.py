"""One live session: its sandbox, what its processes have, and who uses it. live_sessions.py has the theory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import replace

import structlog

from era.core.concurrency.late_ends import LateEnds
from era.core.execution.execution import Grants
from era.core.live.file_helper import HELPER, FileHelper
from era.core.live.processes import MOST, Processes, ProcessRequest
from era.core.metadata import MetadataStore
from era.core.models import Session, command_of
from era.core.ports import (
    GuestProcess,
    Network,
    ProcessEgress,
    ProcessSupervisor,
    Sandbox,
    StorageAccesses,
)
from era.core.process import ProcessSpec
from era.core.secrets import Secret
from era.core.trees.allowance import Allowance
from era.errors import EraError, SandboxFailed

log = structlog.get_logger()

LAST_RECORDS_SECONDS = 5.0
"""For which the ends of processes may take to be recorded before a session is put away without that."""

_DISK_TICK = 0.2


async def _nothing(*_: str) -> None:
    pass


class LiveSession:
    """A session from its first process until it is put away or lost."""

    why_lost: str | None = None
    """Why its sandbox is gone, if it is."""

    why_full: str | None = None
    """A sentence that says which disk limit it exceeds, if it does. Its files can't be committed then, so it is put
    away."""

    is_open = True
    """Whether anything may be begun in it."""

    starts = 0
    """How often something was started in it that can change its files."""

    is_changed = False
    """Whether anything may have happened since the last look at it."""

    retry_seconds = 0.0
    """After how many seconds a checkpoint is tried again, which failed for a reason that may pass; 0: none did."""

    _users = 0
    _storage_url: str | None = None
    _has_storage = False
    """Whether the storage is served to its processes."""

    _supervisor: ProcessSupervisor | None = None
    _egress: ProcessEgress | None = None
    _files: FileHelper | None = None

    def __init__(
        self,
        session: Session,
        sandbox: Sandbox,
        store: MetadataStore,
        late_ends: LateEnds,
        network: Network,
        storage: StorageAccesses,
    ) -> None:
        self.session = session
        """Its row as it was when it became live: what its processes may, they may until it is put away. Only where they
        may connect, and whether they have the storage, is as of now, see `follow`."""

        self.session_key = session.key
        self.session_id = session.owned_id
        self.sandbox = sandbox
        self.processes = Processes(
            session.key,
            store,
            max(1, min(MOST, sandbox.limits.pids // 2)),
            self._start_process,
            ended=self._process_ended,
            why_gone=lambda: self.why_lost,
            late_ends=late_ends,
        )
        self.at_end: list[Callable[[str], Awaitable[None]]] = []
        """Called with the reason when it is put away or lost, before all that is left in the sandbox is killed."""

        self.has_contexts: Callable[[], bool] = lambda: False
        """Whether an interpreter of a context runs, or is being started."""

        self.end_contexts: Callable[[str], Awaitable[None]] = _nothing
        """Ends all interpreters of contexts, for a reason that is a sentence."""

        self.closed = asyncio.Event()
        """It isn't live any more."""

        self.release: Callable[[], Awaitable[None]] = _nothing
        """Called once it isn't live any more: its sandbox counts for no quota then."""

        self.wants_checkpoint = asyncio.Event()
        self.used_at = time.monotonic()
        self._network = network
        self._storages = storage
        self._storage_stack, self._egress_stack = AsyncExitStack(), AsyncExitStack()
        self._secrets: list[Secret] = []
        """Those that are in use."""

        self._supervising, self._starting_files = asyncio.Lock(), asyncio.Lock()
        self._allowance = Allowance(sandbox, session.snapshot, self._disk_full, _DISK_TICK)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """It isn't put away for idleness within the block: a call is under way, or somebody is attached."""
        self._users += 1
        self.is_changed = True
        try:
            yield
        finally:
            self._users -= 1
            self.used_at = time.monotonic()

    @property
    def is_idle(self) -> bool:
        return not self._users and self.processes.are_settled

    @property
    def is_running(self) -> bool:
        """Whether a process or an interpreter of a context runs, or the first of them is being started."""
        is_starting = self._users > 0 and not self.processes.all
        return bool(self.processes.running) or self.has_contexts() or is_starting

    async def is_still(self) -> bool:
        """Whether no process is left in it, neither one that was asked for nor what descends from one."""
        return not self.processes.running and self._supervisor is not None and await self._supervisor.is_empty()

    async def supervisor(self) -> ProcessSupervisor:
        """What starts processes in the sandbox, with their network and storage, which are there from the first call on.
        Raises SandboxFailed, NoIsolation."""
        return (await self._supervised())[0]

    async def _supervised(self) -> tuple[ProcessSupervisor, ProcessEgress]:
        async with self._supervising:
            self._check_open()
            await self._follow_storage()
            if self._supervisor is None or self._egress is None or not self._supervisor.alive:
                self._egress = None
                await self._egress_stack.aclose()
                self._supervisor = await self.sandbox.process_supervisor()
                self._egress = await self._new_egress(self._supervisor)
            return self._supervisor, self._egress

    async def _new_egress(self, supervisor: ProcessSupervisor) -> ProcessEgress:
        """The network that the session's settings give its processes."""
        session = self.session
        made = self._network.process_egress(
            self.sandbox,
            supervisor.broker,
            owner=session.owner,
            internet=session.allow_internet,
            egress=session.egress,
        )
        if self._secrets:
            made.add(self._secrets)
        return await self._egress_stack.enter_async_context(made)

    async def _follow_storage(self) -> None:
        """Have the storage served to its processes if the session's settings say so, and not otherwise."""
        if self.session.storage == self._has_storage:
            return
        self._has_storage = False
        await self._storage_stack.aclose()
        if self.session.storage and self.is_open:
            access = self._storages.access(self.sandbox, self.session.owner)
            await self._storage_stack.enter_async_context(access)
            self._storage_url, self._has_storage = access.url, True

    async def follow(self, row: Callable[[], Awaitable[Session]]) -> None:
        """Let its processes connect to where the session's settings say by now, and use the storage if these say so:
        runs share their network and the storage's port, and would get there by them. Connections end that processes
        have to what has changed. `row` reads the session."""
        async with self._supervising:
            now, old = await row(), self.session
            if now.key != self.session_key:
                return
            self.session = replace(old, allow_internet=now.allow_internet, egress=now.egress, storage=now.storage)
            # Where anything of this fails, `_supervised` makes it anew.
            if (now.allow_internet, now.egress) != (old.allow_internet, old.egress):
                self._egress = None
                await self._egress_stack.aclose()
            await self._follow_storage()
            if self.is_open and self._egress is None and self._supervisor is not None and self._supervisor.alive:
                self._egress = await self._new_egress(self._supervisor)

    def _check_open(self) -> None:
        """Raises SandboxFailed where nothing may be begun in it any more."""
        if not self.is_open:
            raise SandboxFailed(self.why_lost or "The session is being put away.")

    async def start(
        self,
        spec: ProcessSpec,
        base_url: str,
        env: Mapping[str, str] | None = None,
        secrets: Sequence[Secret] = (),
        may_begin: Callable[[], Awaitable[None]] | None = None,
    ) -> GuestProcess:
        """Start what `spec` says, with the variables, the network and the storage of the session's programs. Who starts
        something with secrets calls `forget` when it has ended. `may_begin` is as for ProcessSupervisor.start. Raises
        SandboxFailed, NoIsolation."""
        supervisor, egress = await self._supervised()
        self.starts += 1
        self._use(egress, secrets)
        session = self.session
        made = Grants.of(session, base_url, secrets).environment({**spec.env, **(env or {})}, self._storage_url)
        try:
            return await supervisor.start(
                replace(spec, env={**egress.certificates, **made}, supervised=egress.supervised), may_begin
            )
        except BaseException:
            self.forget(secrets)
            raise

    async def remember(self, secrets: Sequence[Secret]) -> None:
        """Let processes that run already use these secrets, until `forget`. Raises SandboxFailed, NoIsolation."""
        if secrets:
            _, egress = await self._supervised()
            self._use(egress, secrets)

    def _use(self, egress: ProcessEgress, secrets: Sequence[Secret]) -> None:
        if secrets:
            self._secrets += secrets
            egress.add(secrets)

    def forget(self, secrets: Sequence[Secret]) -> None:
        """Whoever was given these secrets has ended."""
        self._secrets = [secret for secret in self._secrets if secret not in secrets]
        if secrets and self._egress is not None:
            self._egress.remove(secrets)

    @property
    def enforced(self) -> Mapping[str, object]:
        """What isolation, limits and network its processes have, for records."""
        supervisor = {} if self._supervisor is None else self._supervisor.enforced
        return {**self.sandbox.enforced, **supervisor, **({} if self._egress is None else self._egress.enforced)}

    async def _start_process(self, request: ProcessRequest, recorded: Callable[[], Awaitable[None]]) -> GuestProcess:
        env = {**({} if request.pty is None else {"TERM": "xterm-256color"}), **request.env}
        spec = ProcessSpec(command_of(request.command), {}, request.cwd, request.stdin, request.pty)

        async def may_begin() -> None:
            await recorded()
            self._check_open()

        guest = await self.start(spec, request.base_url, env, request.secrets, may_begin)
        self.watch_disk()
        return guest

    def _process_ended(self, request: ProcessRequest) -> None:
        self.forget(request.secrets)
        self.used_at = time.monotonic()
        self.is_changed = True
        self.wants_checkpoint.set()
        if not self.processes.running and not self.has_contexts():
            self._allowance.stop()

    def watch_disk(self) -> None:
        """See to its disk limits from now on, while processes or contexts run in it."""
        self._allowance.start()

    @property
    def disk_problem(self) -> str | None:
        """Which disk limit it exceeds, if any."""
        return self._allowance.problem

    async def check_disk(self, *, surely: bool = False) -> None:
        """See to its disk limits, in any case or where no process runs, beside which that is done: short ones end
        before."""
        if self.why_full is None and (surely or not self.processes.running):
            await self._allowance.check(surely=surely)

    async def _disk_full(self) -> None:
        """End all processes and contexts, since together they exceed the session's disk limits."""
        self._allowance.stop()  # until something runs again
        self.why_full = f"The session was out of disk space: {self.disk_problem}."
        await asyncio.gather(self.processes.end_all(self.why_full), self.end_contexts(self.why_full))

    async def files(self) -> FileHelper:
        """Return the helper that reads and changes its files from inside. Start it where none runs. Raises
        SandboxFailed, NoIsolation."""
        async with self._starting_files:
            if self._files is None or not self._files.alive:
                process = await (await self.supervisor()).start(HELPER)
                self._files = FileHelper(process, self.sandbox.cpu_seconds)
                if not self.is_open:  # it has ended meanwhile, and its supervisor may have been closed before
                    await self._files.end()
                    self._check_open()
            return self._files

    async def end(self, why: str) -> None:
        """End everything in the sandbox but what runs need. May be called again. What can't be recorded of it soon is
        recorded later."""
        self.is_open = False
        if self.why_lost is None:
            await self.processes.end_all(why)
        self._allowance.stop()
        hooks, self.at_end = self.at_end, []
        for hook in hooks:
            try:
                await hook(why)
            except Exception:
                log.exception("live_session_not_ended", session=self.session_key)
        if self._supervisor is not None:
            with suppress(EraError, OSError):
                await self._supervisor.close()
        await self.processes.settled(LAST_RECORDS_SECONDS)
        await self._egress_stack.aclose()
        await self._storage_stack.aclose()
