"""What a sandbox of bubblewrap's has beside runs: its process supervisor, made when it is first wanted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping

from era.core.stall_timeout import stall_timeout
from era.drivers.forking import TemplateFailed
from era.drivers.out_of_memory import OutOfMemory
from era.drivers.process_supervisor import Life, ProcessSupervisor
from era.drivers.socket_broker import SocketBroker
from era.drivers.watching import Watching
from era.errors import SandboxFailed


class LazyProcessSupervisor:
    """The process supervisor of one sandbox."""

    def __init__(
        self,
        enter: Callable[[int], Awaitable[Life]],
        variables: Mapping[str, str],
        out_of_memory: OutOfMemory,
        watching: Watching,
        log: Callable[[], str],
        before: Callable[[], None],
        progress: Callable[[], float],
        *,
        sandbox_broker: SocketBroker | None = None,
    ) -> None:
        """`enter` has the supervisor started in the sandbox, given the descriptor of its control socket; it may raise
        OSError, SandboxFailed, TemplateFailed. `variables` are those of every process. `watching` is told when there
        are processes and when somebody waits for one; `before` is called when a supervisor is about to be made. `log`
        is what it has said to its stderr, and `progress` says how far the sandbox got; see Freezer.
        `sandbox_broker` is that of the sandbox, where the supervisor brings none of its own."""
        self._enter, self._variables, self._out_of_memory, self._log = enter, variables, out_of_memory, log
        self._watching, self._before, self._sandbox_broker = watching, before, sandbox_broker
        self._progress = progress
        self._supervisor: ProcessSupervisor | None = None
        self._turn = asyncio.Lock()
        self._making: asyncio.Task[ProcessSupervisor] | None = None
        self._is_closed = False

    @property
    def supervisor(self) -> ProcessSupervisor | None:
        """None where there is none alive."""
        return self._supervisor if self._supervisor is not None and self._supervisor.alive else None

    @property
    def is_used(self) -> bool:
        """Whether there is one alive, or about to be."""
        return self.supervisor is not None or (self._making is not None and not self._making.done())

    async def get(self) -> ProcessSupervisor:
        """The supervisor, made anew where there is none alive. Raises SandboxFailed."""
        async with self._turn:
            await self._wait_for_making()
            if self.supervisor is not None:
                return self.supervisor
            if self._supervisor is not None:
                await self._supervisor.close()
                self._supervisor = None
            if self._is_closed:
                raise SandboxFailed("The sandbox is gone.")
            self._before()
            # What has been started must be known here, also where whoever waits is cancelled.
            self._making = asyncio.create_task(self._make())
            return await asyncio.shield(self._making)

    async def close(self) -> None:
        """End all processes, for good."""
        self._is_closed = True
        await self._wait_for_making()
        if self._supervisor is not None:
            await self._supervisor.close()

    async def _wait_for_making(self) -> None:
        """Wait until none is being made, as for somebody who was cancelled."""
        if self._making is not None:
            await asyncio.wait([self._making])
            self._making.exception()  # told to whoever wanted it, if that waits for it still

    async def _make(self) -> ProcessSupervisor:
        ours: socket.socket | None = None
        life: Life | None = None
        try:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            with theirs:
                life = await self._enter(theirs.fileno())
            self._out_of_memory.begin_processes()
            async with stall_timeout(self._progress):
                made = await ProcessSupervisor.over(
                    ours,
                    life,
                    self._variables,
                    self._out_of_memory,
                    self._progress,
                    self._watching.begin_anew,
                    sandbox_broker=self._sandbox_broker,
                )
            made.on_end = lambda: self._watching.set_processes(False)
            self._watching.set_processes(True)
            self._supervisor = made
            return made
        except BaseException as error:
            if ours is not None:
                ours.close()
            if life is not None:
                life.kill()
                await life.ended()
            if not isinstance(error, OSError | TimeoutError | SandboxFailed | TemplateFailed):
                raise
            raise SandboxFailed(f"The process supervisor did not start: {self._log() or error}") from error
