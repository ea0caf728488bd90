"""A run whose supervisor says late how it ended: it's waited for as long as it doesn't get the processors it wants."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import time
from collections.abc import Awaitable, Callable
from itertools import product
from typing import cast

import pytest

from era.core.program import Ended, Program
from era.drivers import watchdog
from era.drivers.cgroups import Group
from era.drivers.channel import Channel
from era.drivers.memory import Watches
from era.drivers.watching import TimeSlice, Watching
from tests.unit.core import until

ENDED = {
    "exit_code": 124,
    "cause": "timeout",
    "duration": 0.2,
    "state": "missing",
    "state_problem": None,
    "entry": None,
    "disk_problem": None,
    "stdout_truncated": False,
    "stderr_truncated": False,
    "reaped": 0,
    "peak_memory_bytes": None,
    "cpu_us": None,
}


class Priority:
    """A control group, as far as it matters here."""

    idle = False
    fails = False
    failures = 0

    def set_idle_priority(self, *, idle: bool) -> None:
        if self.fails:
            self.failures += 1
            raise OSError(errno.EMFILE, "Too many open files")
        self.idle = idle


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "END_SECONDS", 0.5)
    monkeypatch.setattr(watchdog, "MOST_SECONDS", 3.0)
    monkeypatch.setattr(watchdog, "_LOOK", 0.1)


def watched(*, share: float = 0.0, wants: bool = True) -> Watching:
    """A sandbox that gets this share of a processor, and that wants one or doesn't."""
    return Watching(Watches, lambda: share * time.monotonic(), lambda: wants)


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    return kind + len(payload).to_bytes(4, "big") + payload


async def run(watching: Watching, *, begins: float = 0.0, answers: float, timeout: float = 0.2) -> tuple[Ended, float]:
    """The end of a run whose supervisor begins it and answers after so many seconds, and how long that took."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    channel, loop = await Channel.over(ours, {}), asyncio.get_running_loop()

    def say(what: bytes) -> None:
        try:
            theirs.send(what)
        except OSError:  # the run was given up
            return

    timers = [
        loop.call_later(begins, say, frame(b"B")),
        loop.call_later(answers, say, frame(b"D", json.dumps(ENDED).encode())),
    ]
    program = Program(b"pass", b"", {}, timeout, ephemeral=False, files={})
    began = time.monotonic()
    with theirs:
        events = [event async for event in channel.run(program, 1000, watching)]
        took = time.monotonic() - began
        for timer in timers:
            timer.cancel()
        channel.close()
    return cast(Ended, events[-1]), took


@pytest.mark.parametrize(
    ("watching", "is_waited_for"),
    [(watched(), True), (watched(share=0.1), True), (watched(share=0.9), False), (watched(wants=False), False)],
    ids=["gets none", "gets little", "gets much", "wants none"],
)
async def test_who_gets_no_processor_is_not_dead(watching: Watching, is_waited_for: bool) -> None:
    ended, _ = await run(watching, answers=1.8)
    assert (ended.sandbox_alive, ended.cause) == ((True, "timeout") if is_waited_for else (False, "killed"))


async def test_nobody_is_waited_for_for_ever() -> None:
    ended, took = await run(watched(), answers=60)
    assert not ended.sandbox_alive
    assert 3 < took < 30


async def test_a_program_that_begins_late_has_its_whole_time() -> None:
    """Though it wants no processor at the time at which it would have ended else."""
    ended, _ = await run(watched(wants=False), begins=0.9, answers=1.9, timeout=1.0)
    assert ended.sandbox_alive


async def test_at_the_deadline_nothing_stands_back() -> None:
    """Also where that can't be had at once."""
    group, watching = Priority(), watched()
    watching.slice = TimeSlice(cast(Group, group), lambda: time.monotonic() * 10)
    watching.begin_run()
    running = asyncio.create_task(run(watching, answers=60, timeout=1.0))
    await until(lambda: group.idle)
    group.fails = True
    await until(lambda: group.failures > 0)
    assert group.idle
    group.fails = False
    await until(lambda: not group.idle)
    assert not running.done(), "it came forward before the run's end"
    await running
    watching.end_run()


@pytest.mark.parametrize("end", [Channel.kill_run, Channel.stop_run])
@pytest.mark.parametrize("begins_first", [True, False])
async def test_who_does_not_end_a_run_when_told_to_is_given_up(
    end: Callable[[Channel], Awaitable[None]], begins_first: bool
) -> None:
    """Long before its deadline."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    channel = await Channel.over(ours, {})
    program = Program(b"pass", b"", {}, 1000, ephemeral=False, files={})
    with theirs:
        events = channel.run(program, 1000, watched(wants=False))
        if begins_first:
            theirs.send(frame(b"B") + frame(b"O", b"up"))
            await anext(events)
            await end(channel)
        else:
            ending = asyncio.ensure_future(anext(events))
            await until(lambda: channel._watchdog is not None)
            await end(channel)
            theirs.send(frame(b"B"))
        async with asyncio.timeout(60):
            ended = cast(Ended, await (anext(events) if begins_first else ending))
        assert (ended.sandbox_alive, ended.cause) == (False, "killed")
        await end(channel)
        channel.close()


async def test_a_run_that_is_to_end_before_it_may_begin_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    channel, may_begin = await Channel.over(ours, {}), asyncio.Event()

    async def wait() -> None:
        await may_begin.wait()

    program = Program(b"pass", b"", {}, 1000, ephemeral=False, files={}, may_begin=wait)
    with theirs:
        ending = asyncio.ensure_future(anext(channel.run(program, 1000, watched(wants=False))))
        await until(lambda: channel._held_back is not None)
        await channel.kill_run()
        may_begin.set()
        theirs.send(frame(b"B"))
        async with asyncio.timeout(60):
            ended = cast(Ended, await ending)
        assert (ended.sandbox_alive, ended.cause) == (False, "killed")
        channel.close()


async def test_a_run_that_began_after_its_deadline_can_be_ended() -> None:
    given_up = asyncio.Event()
    watching = watchdog.Watchdog(0.0, watched(), given_up.set)
    await until(lambda: watching._give_up_at > 0)
    watching._timeout = 1000.0
    watching.begin()
    watching.bring_forward()
    await asyncio.wait_for(given_up.wait(), 60)
    watching.cancel()


NUMBERS: list[object] = ["1", [], -1, 1 << 63, float("inf"), float("nan")]
TEXTS: list[object] = [1, [], "\0", "\ud800"]
NONSENSE: list[tuple[str, object]] = [
    *product(("exit_code", "reaped", "cpu_us", "peak_memory_bytes", "duration"), NUMBERS),
    *product(("state_problem", "entry", "disk_problem"), TEXTS),
    *product(("cause", "state"), ["else", [], None]),
]


@pytest.mark.parametrize(
    "said",
    [
        b"[1]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"{}",
        *(json.dumps(ENDED | {name: value}).encode() for name, value in NONSENSE),
    ],
)
async def test_an_end_that_makes_no_sense_is_that_of_the_sandbox(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    channel = await Channel.over(ours, {})
    with theirs:
        theirs.sendall(frame(b"B") + frame(b"D", said))
        program = Program(b"pass", b"", {}, 1000, ephemeral=False, files={})
        [ended] = [cast(Ended, event) async for event in channel.run(program, 1000, watched())]
        assert (ended.sandbox_alive, ended.cause) == (False, "killed")
        channel.close()
