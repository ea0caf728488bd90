"""How much of what a sandbox says is handled before the event loop goes on to others, however much there is at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest

from era.core.concurrency import meter
from era.core.files import watching
from era.core.live import file_helper
from era.core.live.context import Context
from era.core.live.file_helper import FileHelper
from era.core.live.processes import LiveProcess
from era.core.process import ProcessEnded, ProcessOutput, ProcessRecord, ProcessSpec
from era.drivers.channel import _frame as channel_frame
from era.drivers.process_supervisor import GuestProcess, ProcessSupervisor
from tests.drivers.test_channel import END, connected, program
from tests.drivers.test_silent_supervisor import ENDED, Silent, frame, supervised_by
from tests.unit.core import until
from tests.unit.test_file_helper_answers import Live
from tests.unit.test_file_helper_answers import frame as answer_frame


async def most_in_a_turn(count: Callable[[], int], work: Awaitable[object]) -> int:
    """The most that `count` grows by between two turns of another callback of the event loop, until work has ended."""
    loop = asyncio.get_running_loop()
    seen, largest = count(), 0
    next_turn: asyncio.Handle

    def look() -> None:
        nonlocal seen, largest, next_turn
        now = count()
        largest, seen = max(largest, now - seen), now
        next_turn = loop.call_soon(look)

    look()
    async with asyncio.timeout(120):
        await work
    next_turn.cancel()
    return max(largest, count() - seen)


async def of_a_channel(total: int) -> int:
    channel, theirs = await connected()
    output = [channel_frame(b"O", b"x")] * total
    theirs.sendall(b"".join([channel_frame(b"B", b""), *output, channel_frame(b"D", json.dumps(END).encode())]))
    taken = 0

    async def follow() -> None:
        nonlocal taken
        nothing = cast(Any, object())
        async for _ in channel.run(program(), total, nothing):
            taken += 1

    most = await most_in_a_turn(lambda: taken, follow())
    assert taken == total + 1
    channel.close()
    theirs.close()
    return most


async def started(life: Silent) -> tuple[ProcessSupervisor, GuestProcess]:
    """A process with a channel, that has said that its interpreter is ready."""
    supervisor = await supervised_by(life)
    starting = asyncio.create_task(supervisor.start(ProcessSpec((), {}, channel=True)))
    await asyncio.sleep(0)  # it has its number
    life.start()
    return supervisor, await starting


async def of_a_process_supervisor(total: int) -> int:
    life = Silent()
    supervisor, process = await started(life)
    before = len(process._events)
    life._theirs.sendall(frame(b"O", 1, b"x") * total)  # at once: the event loop stands meanwhile
    taken = until(lambda: len(process._events) == before + total)
    most = await most_in_a_turn(lambda: len(process._events), taken)
    await supervisor.close()
    return most


async def waiting(life: Silent, *frames: bytes) -> tuple[ProcessSupervisor, GuestProcess]:
    """A process whose supervisor has sent these frames. Nobody has taken any of what it says yet."""
    supervisor, process = await started(life)
    await asyncio.to_thread(life._theirs.sendall, b"".join(frames))
    await until(lambda: len(process._events) == 1 + len(frames))
    return supervisor, process


async def of_a_live_process(total: int) -> int:
    life = Silent()
    ended = frame(b"D", 1, json.dumps(ENDED).encode())
    supervisor, process = await waiting(life, *[frame(b"O", 1, b"x")] * total, ended)
    live = LiveProcess(ProcessRecord("proc_1", 1, "", 0))
    before = live.log.total
    most = await most_in_a_turn(lambda: live.log.total, live.follow(process, lambda: None))
    assert live.log.total - before >= total
    await supervisor.close()
    return most


class CountingContext(Context):
    """Counts frames of the kernel's."""

    frames = 0

    async def _on_frame(self, kind: bytes, payload: bytes) -> None:
        self.frames += 1
        await super()._on_frame(kind, payload)


async def of_a_context(*frames: bytes, count: Callable[[CountingContext], int], total: int) -> int:
    life = Silent()
    supervisor, process = await waiting(life, *frames)
    context = CountingContext("c", "python", process, lambda: 0.0, lambda: False)
    most = await most_in_a_turn(lambda: count(context), until(lambda: count(context) >= total))
    assert context.alive
    await supervisor.close()
    await context._following
    return most


async def of_a_context_s_output(total: int) -> int:
    output = [frame(b"O", 1, b"x")] * total
    return await of_a_context(*output, count=lambda context: context._taken_bytes, total=total)


async def of_a_context_s_frames(total: int) -> int:
    """They come in one piece."""
    piece = frame(b"C", 1, b"P\0\0\0\0" * total)
    return await of_a_context(piece, count=lambda context: context.frames, total=total)


async def of_a_file_helper(total: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Its answers come in one piece, and nobody waits for them."""
    life, taken = Silent(), 0
    real = file_helper._taken

    def counted(buffer: bytearray) -> Any:
        nonlocal taken
        answer = real(buffer)
        taken += answer is not None
        return answer

    monkeypatch.setattr(file_helper, "_taken", counted)
    supervisor, process = await waiting(life, frame(b"C", 1, bytes(answer_frame(b'{"id":0}')) * total))
    process._events.popleft()  # which a kernel says, and no helper
    live: Any = Live()
    helper = FileHelper(process, live)
    most = await most_in_a_turn(lambda: taken, until(lambda: taken == total))
    assert helper.alive
    await supervisor.close()
    await asyncio.wait([helper._following])
    return most


async def of_a_watch(total: int) -> int:
    """Its events come in one piece."""
    life = Silent()
    supervisor, process = await waiting(life, frame(b"C", 1, b'{"type":"overflow"}\n' * total))
    process._events.popleft()
    live: Any = Live(process)
    watch = watching._LiveWatch(live, (), recursive=False, ended=lambda: None)
    first = watch._log.last
    most = await most_in_a_turn(lambda: watch._log.last, until(lambda: watch._log.last == first + total))
    watch.end()
    await asyncio.wait([watch._following])
    await supervisor.close()
    return most


class LargeAnswer:
    """A helper's process whose one answer is there at once, in pieces."""

    def __init__(self, pieces: int) -> None:
        self.left, self.pieces = pieces, pieces

    async def events(self) -> AsyncIterator[ProcessOutput | ProcessEnded]:
        size = 1 << 17
        yield ProcessOutput("channel", bytes(answer_frame(b'{"id":0}', bytes(self.pieces * size)))[:16])
        while self.left:
            self.left -= 1
            yield ProcessOutput("channel", bytes(size))
        yield ProcessEnded(0, None, "exit")


async def of_a_large_answer(total: int) -> int:
    process: Any = LargeAnswer(total)
    live: Any = Live()
    helper = FileHelper(process, live)
    most = await most_in_a_turn(lambda: total - process.left, asyncio.wait([helper._following]))
    assert not process.left
    return most


CASES: dict[str, tuple[Callable[..., Awaitable[int]], int]] = {
    "channel": (of_a_channel, 3000),
    "process supervisor": (of_a_process_supervisor, 2500),
    "live process": (of_a_live_process, 5000),
    "context's output": (of_a_context_s_output, 5000),
    "context's frames": (of_a_context_s_frames, 20_000),
    "file helper": (of_a_file_helper, 8000),
    "large answer": (of_a_large_answer, 50),
    "watch": (of_a_watch, 6000),
}
"""By who says it, what counts how much of it is handled in a turn, and how much is there at once."""

SHORT = 5e-5
"""Seconds of a slice in which no more than a few frames are handled, however fast this machine is."""


@pytest.mark.parametrize("is_sound", [True, False], ids=["sound", "weak"])
@pytest.mark.parametrize("name", CASES)
async def test_tiny_frames_are_handled_in_slices(name: str, is_sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weakened, where nobody pays, all that are there at once are."""
    most_of, total = CASES[name]
    meter.install()
    monkeypatch.setattr(meter, "SLICE", SHORT if is_sound else float("inf"))
    most = await (most_of(total, monkeypatch) if name == "file helper" else most_of(total))
    assert most <= total // 10 if is_sound else most > total // 2, most
