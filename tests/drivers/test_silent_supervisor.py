"""A process supervisor that stands still, as processes can have it do in gVisor: nobody waits for it for ever."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import uvloop

from era.core.concurrency.stall_timeout import stall_timeout
from era.core.live import context
from era.core.live.context import Context
from era.core.process import ProcessEnded, ProcessSpec
from era.core.program import Program
from era.drivers import process_supervisor
from era.drivers.process_supervisor import GuestProcess, ProcessSupervisor
from era.errors import SandboxFailed
from tests.core.interpreters import Written


def frame(kind: bytes, number: int, payload: bytes) -> bytes:
    return kind + number.to_bytes(4, "big") + len(payload).to_bytes(4, "big") + payload


class Silent:
    """It starts a kernel, which is ready, and then says nothing any more. See also process_supervisor.Life."""

    pid = 0

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.ours.setblocking(False)
        self._theirs.sendall(frame(b"Y", 0, b""))
        self.was_killed = False

    def start(self) -> None:
        kernel = b"Y" + (2).to_bytes(4, "big") + b"{}"
        self._theirs.sendall(frame(b"S", 1, (7).to_bytes(4, "big")) + frame(b"C", 1, kernel))

    def kill(self) -> None:
        self.was_killed = True
        self._theirs.close()

    def say(self, kind: bytes, payload: bytes) -> None:
        self._theirs.sendall(frame(kind, 1, payload))

    async def ended(self) -> None: ...


async def supervised_by(life: Silent) -> ProcessSupervisor:
    nothing = cast(Any, object())
    return await ProcessSupervisor.over(life.ours, life, {}, nothing, lambda: 0.0, lambda: None, sandbox_broker=nothing)


async def test_a_cell_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_supervisor, "stall_timeout", partial(stall_timeout, seconds=0.5))
    monkeypatch.setattr(context, "GRACE", 0.1)
    life = Silent()
    supervisor = await supervised_by(life)
    process = asyncio.create_task(supervisor.start(ProcessSpec((), {}, channel=True)))
    await asyncio.sleep(0)  # it has its number
    life.start()
    kernel = Context("c", "python", await process, lambda: 0.0, lambda: False)
    await kernel.ready()
    async with asyncio.timeout(30):
        outcome = await kernel.execute(Program(b"1", timeout=1.0), 1000, Written().write)
    assert (outcome.cause, outcome.sandbox_alive) == ("timeout", False)
    assert not supervisor.alive
    await supervisor.close()


async def test_a_process_that_can_not_be_recorded_leaves_the_others_alone() -> None:
    """As where the database doesn't answer: that says nothing about the supervisor."""

    async def may_begin() -> None:
        raise TimeoutError("the database doesn't answer")

    life = Silent()
    supervisor = await supervised_by(life)
    with pytest.raises(TimeoutError, match="the database"):
        await supervisor.start(ProcessSpec((), {}), may_begin)
    assert supervisor.alive
    assert not life.was_killed
    await supervisor.close()


async def with_a_process(life: Silent) -> tuple[ProcessSupervisor, GuestProcess]:
    supervisor = await supervised_by(life)
    starting = asyncio.create_task(supervisor.start(ProcessSpec((), {})))
    await asyncio.sleep(0)  # it has its number
    life.start()
    return supervisor, await starting


async def test_what_memory_is_taken_is_waited_for_while_there_is_room() -> None:
    life = Silent()
    supervisor = await supervised_by(life)
    looks: list[None] = []

    def then_it_answers() -> bool:
        looks.append(None)
        if len(looks) == 3:
            life.say(b"M", (1 << 20).to_bytes(8, "big"))
        return True

    assert await supervisor.memory_bytes(then_it_answers) == 1 << 20
    assert await supervisor.memory_bytes(lambda: False) is None, "which isn't none"
    await supervisor.close()


@pytest.mark.parametrize(
    "loops",
    [pytest.param(asyncio.new_event_loop, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")],
)
def test_an_event_loop_that_stands_still_hears_what_memory_is_taken(
    loops: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def ask() -> int | None:
        life = Silent()
        supervisor = await supervised_by(life)
        asking = asyncio.create_task(supervisor.memory_bytes(lambda: False))
        await asyncio.sleep(0)  # it has asked
        life.say(b"M", (1 << 20).to_bytes(8, "big"))
        time.sleep(0.5)
        answer = await asking
        await supervisor.close()
        return answer

    assert asyncio.run(ask(), loop_factory=loops) == 1 << 20


ENDED = {"exit_code": 3, "signal": None, "cpu_us": None, "peak_memory_bytes": None}


async def test_a_process_that_has_ended_is_told_as_it_ended_though_all_die_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The supervisor has not read all that it was sent, so its end is a reset."""
    life = Silent()
    supervisor, process = await with_a_process(life)

    async def late() -> None:
        monkeypatch.undo()
        life.kill()
        await asyncio.sleep(0.2)

    monkeypatch.setattr(process_supervisor, "turn", late)
    life.say(b"O", b"said")
    life.say(b"D", json.dumps(ENDED).encode())
    async with asyncio.timeout(30):
        *_, ended = [event async for event in process.events()]
    assert ended == ProcessEnded(3, None, "exit", None, None)
    await supervisor.close()


async def test_numbers_that_are_none_end_all_processes() -> None:
    """What it says is as hostile as the processes that it shares a sandbox with."""
    life = Silent()
    supervisor, process = await with_a_process(life)
    life.say(b"D", json.dumps(ENDED | {"cpu_us": float("inf")}).encode())
    async with asyncio.timeout(30):
        *_, ended = [event async for event in process.events()]
    assert isinstance(ended, ProcessEnded)
    assert ended.cause == "sandbox_died"
    assert supervisor._following is not None
    await supervisor._following  # which raises what was not foreseen
    await supervisor.close()


async def test_one_that_does_not_start_leaves_the_event_loop_as_it_was() -> None:
    life = Silent()
    life.kill()
    assert life.ours.recv(1 << 10), "what it said before"
    with pytest.raises(SandboxFailed):
        await supervised_by(life)
    await asyncio.sleep(0.01)
    assert life.ours.fileno() < 0, "it is still read from"
