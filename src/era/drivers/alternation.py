"""Two supervisors of one sandbox's runs that take turns, where runs come back to back and an interpreter starts slowly.

Theory of operation
===================

A spare is made once everything of the run before is dead, since a program could read or change what waits beside it. So
of runs that come back to back each waits for the whole start of an interpreter, which of Node takes longer than a run.

In a burst a sandbox therefore gets a second supervisor of runs, in a PID namespace of its own, as processes beside runs
have one (guest/namespace_entry.py, which also says what hostile code could do about it while it enters). The two take
turns: while a program of the one runs, the other starts its spare.

*What keeps a program from that spare.* It can name no process of the other PID namespace, and no /proc that it can see
has them: so it can't signal, trace or read it, or take its descriptors. `kill(-1)` ends at the namespace. The spare
listens to nothing, and what it starts from is read-only: that a language's does is for its `Runtime` to say. What both
have in common, as all that ever runs in this sandbox, is files, network and bounds. So a program can keep the spare
from starting, as by taking all processes that there may be: then the next run starts its own.

*Bounds.* What waits takes memory and processes, which the control group has more of for that (`ROOM_BYTES`,
`ROOM_TASKS`). A program that takes all of it is killed before any supervisor; a spare that is killed is made anew.

*Turns.* A run begins once what the one before has left in scratch directories is removed (Channel.cleaned). When no run
has come for LINGER seconds, the second supervisor is ended. One that dies while the first has the next run is done
without: nothing of a session's is in there, since the kernel has ended its namespace.

*What it gives.* Runs of Node that come back to back take 0.59 of what they take without it, those of TypeScript 0.57
(`python -m bench --only "node burst" "typescript burst" --against` that build).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from era.core.concurrency.stall_timeout import START_SECONDS
from era.core.models import JsonObject
from era.core.program import Ended, Output, Program
from era.drivers.cgroups import Group
from era.drivers.channel import Channel, receive_guest_listeners
from era.drivers.forking import Forked, TemplateFailed
from era.drivers.socket_broker import SocketBroker
from era.drivers.watching import Watching
from era.errors import SandboxFailed

BURST = 0.1
"""A run that comes within so many seconds of the last one's end makes it a burst."""

LINGER = 30.0

ROOM_BYTES, ROOM_TASKS = 64 << 20, 24
"""What the second supervisor and a spare of Node's or TypeScript's take, generously."""


def second_of(config: JsonObject) -> JsonObject:
    """The configuration of the second supervisor, given that of the first, which has the guest listeners."""
    return {**config, "guest_listeners": [], "has_broker": True}


@dataclass(frozen=True, slots=True)
class _Supervisor:
    channel: Channel
    broker: SocketBroker
    life: Forked | None = None
    """None for the first, which is the sandbox's PID 1."""

    def close(self) -> None:
        self.channel.close()
        self.broker.close()
        if self.life is not None:
            self.life.kill()


class Alternation:
    """The supervisors of one sandbox's runs, in the place of the Channel to the only one."""

    def __init__(
        self,
        first: Channel,
        broker: SocketBroker,
        group: Group,
        enforced: JsonObject,
        enter: Callable[[int], Awaitable[Forked]],
        variables: Mapping[str, str],
        on_turn: Callable[[SocketBroker], None],
    ) -> None:
        """`first` leads to the supervisor that there is, which has `broker`. `group` is the sandbox's, and what this
        lets it have is entered in `enforced`. `enter` has another one started, given the descriptor of its control
        socket. Every program has `variables`. `on_turn` gets the broker of the supervisor that has the next run."""
        self._enter, self._variables, self._on_turn = enter, variables, on_turn
        self._current = self._first = _Supervisor(first, broker)
        self._second: _Supervisor | None = None
        self._making: asyncio.Task[None] | None = None
        self._may_make = True
        self._group: Group | None = group
        """Until it has room for the second."""

        self._enforced = enforced
        self._cleaning: asyncio.Task[None] | None = None
        """Has ended once what the last run has left is removed."""

        self._ending: set[asyncio.Task[None]] = set()
        self._lingering: asyncio.TimerHandle | None = None
        self._ended_at = float("-inf")
        self._is_running = False

    @property
    def alive(self) -> bool:
        return self._first.channel.alive and self._current.channel.alive and not self._is_left_unclean()

    def _is_left_unclean(self) -> bool:
        """Whether a supervisor has died before it had removed what its last run has left."""
        cleaning = self._cleaning
        return cleaning is not None and cleaning.done() and (cleaning.cancelled() or cleaning.exception() is not None)

    async def run(self, program: Program, output_limit: int, watching: Watching) -> AsyncIterator[Output | Ended]:
        """See Channel.run."""
        if self._lingering is not None:
            self._lingering.cancel()
        if self._cleaning is not None:
            await asyncio.shield(self._cleaning)
            self._cleaning = None
        self._end_dead_second()
        if self._making is None and self._may_make and time.monotonic() - self._ended_at < BURST:
            self._making = asyncio.create_task(self._make())
        channel = self._current.channel
        self._is_running = True
        try:
            async for event in channel.run(program, output_limit, watching, tells_when_clean=self._making is not None):
                if isinstance(event, Ended):
                    if self._making is not None:
                        self._cleaning = asyncio.create_task(channel.cleaned())
                        self._cleaning.add_done_callback(_note_failure)
                    self._take_turns()
                yield event
        finally:
            self._is_running = False

    async def kill_run(self) -> None:
        await self._current.channel.kill_run()

    async def stop_run(self) -> None:
        await self._current.channel.stop_run()

    def join_run(self) -> None:
        for supervisor in self._all():
            supervisor.channel.join_run()

    def close(self) -> None:
        """Close what leads to them, and kill the second."""
        self._may_make = False
        if self._lingering is not None:
            self._lingering.cancel()
        for supervisor in self._all():
            supervisor.close()

    async def ended(self) -> None:
        """Wait, after `close`, until nothing is left of any second supervisor."""
        if self._making is not None:
            await asyncio.wait([self._making])
        self._end_second()
        if self._ending:
            await asyncio.wait(self._ending)

    def _all(self) -> list[_Supervisor]:
        return [self._first] if self._second is None else [self._first, self._second]

    def _take_turns(self) -> None:
        self._ended_at = time.monotonic()
        self._end_dead_second()
        if self._second is not None:
            self._use(self._second if self._current is self._first else self._first)
            self._linger()

    def _linger(self) -> None:
        """End the second when nothing comes, for which the time begins now."""
        if self._lingering is not None:
            self._lingering.cancel()
        self._lingering = asyncio.get_running_loop().call_later(LINGER, self._end_idle)

    def _end_idle(self) -> None:
        """End the second, unless a run is under way, or it is still removing what its last run has left: nobody else
        would."""
        if self._is_running or (self._cleaning is not None and not self._cleaning.done()):
            self._linger()
        else:
            self._end_second()

    def _use(self, supervisor: _Supervisor) -> None:
        self._current = supervisor
        self._on_turn(supervisor.broker)

    def _end_dead_second(self) -> None:
        """Do without a second that has died, unless it is current: then `alive` says so."""
        if self._second is not None and not self._second.channel.alive and self._current is self._first:
            self._end_second()

    def _end_second(self) -> None:
        """End it. No run is under way."""
        second, self._second, self._making = self._second, None, None
        if second is None or second.life is None:
            return
        if self._current is second:
            self._use(self._first)
        second.close()
        self._ending.add(task := asyncio.create_task(second.life.ended()))
        task.add_done_callback(self._ending.discard)

    async def _make(self) -> None:
        """Have the second made. Where that can't be, as where a program has taken all that there is, there is none."""
        ours: socket.socket | None = None
        life: Forked | None = None
        broker: SocketBroker | None = None
        channel: Channel | None = None
        try:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            with theirs:
                if self._group is not None:
                    self._group.widen(ROOM_BYTES, ROOM_TASKS)
                    self._enforced["cgroup"] = self._group.limits()
                    self._group = None
                life = await self._enter(theirs.fileno())
            async with asyncio.timeout(START_SECONDS):
                _, broker = await receive_guest_listeners(ours, ())
                channel = await Channel.over(ours, self._variables)
                await channel.ready()
        except BaseException as error:
            self._may_make = False
            if channel is not None:  # or the event loop would go on with a descriptor that others get
                channel.close()
            elif ours is not None:
                ours.close()
            if broker is not None:
                broker.close()
            if life is not None:
                life.kill()
                with suppress(OSError):
                    await life.ended()
            # The last two are about what it says, if that is no JSON.
            if not isinstance(error, OSError | SandboxFailed | TemplateFailed | ValueError | RecursionError):
                raise
            return
        self._second = _Supervisor(channel, broker, life)
        if self._may_make:
            self._linger()  # the run that wanted it may have ended
        else:  # closed meanwhile
            self._end_second()


def _note_failure(cleaning: asyncio.Task[None]) -> None:
    """Keep asyncio from reporting that a supervisor died meanwhile: `alive` says so."""
    if not cleaning.cancelled():
        cleaning.exception()
