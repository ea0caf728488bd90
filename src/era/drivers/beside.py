"""What a sandbox of bubblewrap's has beside runs: its process supervisor, made when it is first wanted."""

from __future__ import annotations

import asyncio
import os
import socket

from era.core.models import Language
from era.core.program import Limits
from era.drivers import guest
from era.drivers.cgroups import Group
from era.drivers.entering import Entrance
from era.drivers.forking import Forked, TemplateFailed
from era.drivers.out_of_memory import OutOfMemory
from era.drivers.process_supervisor import ProcessSupervisor
from era.errors import SandboxFailed

_START_SECONDS = 20.0


class Beside:
    """The process supervisor of one sandbox."""

    def __init__(
        self,
        entrance: Entrance,
        uid: int | None,
        language: Language,
        group: Group | None,
        log: int,
        out_of_memory: OutOfMemory,
    ) -> None:
        """`log` is the descriptor that the supervisor has as its stderr."""
        self._entrance, self._uid, self._language, self._group, self._log = entrance, uid, language, group, log
        self._out_of_memory = out_of_memory
        self._supervisor: ProcessSupervisor | None = None
        self._turn = asyncio.Lock()
        self._making: asyncio.Task[ProcessSupervisor] | None = None
        self._is_closed = False

    @property
    def supervisor(self) -> ProcessSupervisor | None:
        """None where there is none alive."""
        return self._supervisor if self._supervisor is not None and self._supervisor.alive else None

    async def get(self, pid: int, limits: Limits) -> ProcessSupervisor:
        """The supervisor, made anew where there is none alive. `pid` is PID 1 of the sandbox. Raises SandboxFailed."""
        async with self._turn:
            if self.supervisor is not None:
                return self.supervisor
            if self._is_closed:
                raise SandboxFailed("The sandbox is gone.")
            if self._supervisor is not None:
                await self._supervisor.close()
            # What has been forked must be known here, also where whoever waits is cancelled.
            self._making = asyncio.create_task(self._make(pid, limits))
            self._supervisor = await asyncio.shield(self._making)
            return self._supervisor

    async def close(self) -> None:
        """End all processes, for good."""
        self._is_closed = True
        if self._making is not None:
            await asyncio.wait([self._making])
            if self._making.exception() is None:
                await self._making.result().close()

    async def _make(self, pid: int, limits: Limits) -> ProcessSupervisor:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        forked: Forked | None = None
        try:
            with theirs:
                forked = await self._entrance.enter(
                    pid,
                    guest.process_supervisor_config(limits, cgroup=self._group is not None),
                    uid=self._uid,
                    control=theirs.fileno(),
                    log=self._log,
                    entrances=list if self._group is None else self._group.entrances,
                )
            variables = guest.program_environment(self._language)
            async with asyncio.timeout(_START_SECONDS):
                return await ProcessSupervisor.over(ours, forked, variables, self._out_of_memory)
        except BaseException as error:
            ours.close()
            if forked is not None:
                os.close(forked.pidfd)
            if not isinstance(error, OSError | TimeoutError | SandboxFailed | TemplateFailed):
                raise
            said = os.pread(self._log, 4096, 0).decode(errors="replace").strip()
            raise SandboxFailed(f"The process supervisor did not start: {error} {said}") from error
