"""The control socket of a sandbox that dies at a bad moment, under either event loop: asyncio's and uvloop's differ in
what they do about a connection that is gone."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import uvloop

from era.core.program import Ended, Output, Program
from era.drivers.channel import Channel, _frame
from era.errors import SandboxFailed
from tests.drivers.test_watchdog import ENDED

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
SUPERVISOR_IS_READY = b"Y" + (2).to_bytes(4, "big") + b"{}"

SEEN_SECONDS = 0.2
"""After them a loop has seen that the other end is gone, and has closed its own."""


def program(may_begin: Callable[[], Awaitable[None]] | None = None) -> Program:
    return Program(code=b"", state=b"{}", env={}, timeout=5, ephemeral=True, files={}, may_begin=may_begin)


async def connected() -> tuple[Channel, socket.socket]:
    """A channel, and the supervisor's end of it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return await Channel.over(ours, {}), theirs


async def run(channel: Channel, of: Program) -> list[Output | Ended]:
    watching = cast(Any, object())
    return [event async for event in channel.run(of, 1000, watching)]


@pytest.fixture(params=LOOPS)
def runner(request: pytest.FixtureRequest) -> asyncio.Runner:
    return asyncio.Runner(loop_factory=LOOPS[request.param])


def test_a_sandbox_dies_while_a_run_waits_to_begin(runner: asyncio.Runner) -> None:
    """It has read nothing of what it was sent of the run, so its end is a reset rather than the end of a stream."""

    async def dies() -> None:
        channel, theirs = await connected()

        async def may_begin() -> None:
            theirs.close()
            await asyncio.sleep(SEEN_SECONDS)

        with pytest.raises(SandboxFailed):
            await run(channel, program(may_begin))
        await channel.kill_run()  # as whoever gave it up may do
        channel.close()

    with runner:
        runner.run(dies())


END = ENDED | {"exit_code": 3, "cause": "exit", "duration": 0.1, "state": "same"}


def test_a_run_that_has_ended_is_told_as_it_ended_though_the_sandbox_dies_then(runner: asyncio.Runner) -> None:
    """It has not read all that it was sent, so its end is a reset."""

    async def dies() -> None:
        channel, theirs = await connected()

        async def may_begin() -> None:
            ended = json.dumps(END).encode()
            for kind, payload in ((b"B", b""), (b"O", b"said"), (b"D", ended)):
                theirs.sendall(kind + len(payload).to_bytes(4, "big") + payload)

        watching = cast(Any, object())
        events: list[Output | Ended] = []
        async for event in channel.run(program(may_begin), 1000, watching):
            events.append(event)
            if len(events) == 1:
                theirs.close()
                await asyncio.sleep(SEEN_SECONDS)
        said, last = events
        assert said == Output("stdout", b"said")
        assert isinstance(last, Ended)
        assert (last.exit_code, last.cause) == (3, "exit")
        assert not channel.alive
        channel.close()

    with runner:
        runner.run(dies())


def test_a_sandbox_dies_between_runs(runner: asyncio.Runner) -> None:
    """What it had not read makes its end a reset, which a reader doesn't tell as the end of the stream."""

    async def dies() -> None:
        channel, theirs = await connected()
        theirs.sendall(SUPERVISOR_IS_READY)
        assert await channel.ready() == json.loads("{}")
        channel.join_run()
        theirs.close()
        await asyncio.sleep(SEEN_SECONDS)
        assert not channel.alive
        with pytest.raises(SandboxFailed):
            await run(channel, program())
        channel.close()

    with runner:
        runner.run(dies())


def test_a_run_that_can_not_be_recorded_says_nothing_about_its_sandbox(runner: asyncio.Runner) -> None:
    """As where the database can't be reached: that is an OSError, too."""

    async def fails() -> None:
        channel, theirs = await connected()

        async def may_begin() -> None:
            raise TimeoutError("the database doesn't answer")

        with pytest.raises(TimeoutError, match="the database"):
            await run(channel, program(may_begin))
        assert channel.alive
        channel.close()
        theirs.close()

    with runner:
        runner.run(fails())


def test_what_a_supervisor_says_has_a_bound(runner: asyncio.Runner) -> None:
    """It is parsed in the event loop, and may come from who has taken the supervisor's place. Content isn't parsed."""

    async def says() -> None:
        channel, theirs = await connected()
        theirs.sendall(b"Y" + (70_000).to_bytes(4, "big"))
        with pytest.raises(SandboxFailed, match="died"):
            await asyncio.wait_for(channel.ready(), 60)  # without waiting for the rest
        theirs.close()
        channel, theirs = await connected()
        theirs.sendall(b"".join((_frame(b"B", b""), _frame(b"S", b" " * 70_000), b"D" + (70_000).to_bytes(4, "big"))))
        [ended] = await asyncio.wait_for(run(channel, program()), 60)
        assert isinstance(ended, Ended)
        assert not ended.sandbox_alive
        theirs.close()
        channel, theirs = await connected()
        longest = json.dumps(END | {"entry": "\u1234" * 4096, "state": "sent"}).encode()
        theirs.sendall(b"".join((_frame(b"B", b""), _frame(b"S", b" " * 70_000), _frame(b"D", longest))))
        [ended] = await run(channel, program())
        assert isinstance(ended, Ended)
        assert (ended.sandbox_alive, len(ended.state or b"")) == (True, 70_000)
        channel.close()
        theirs.close()

    with runner:
        runner.run(says())
