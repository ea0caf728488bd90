"""core.live.context, with a kernel that says and does what a test wants: how cells end where output is taken slowly,
where the machine is busy, and where the interpreter's supervisor ends or it can't be followed any more."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Literal

import pytest
from structlog.testing import capture_logs

from era.core.live import context as module
from era.core.live.context import CellOutcome, Context, NotBegun
from era.core.process import ProcessEnded, ProcessOutput, ProcessStream, TerminalSize
from era.core.program import CellEvent, Output, Program
from tests.core.interpreters import until_ended
from tests.unit.core import until

KILLED = 128 + signal.SIGKILL


class Kernel:
    """A ports.GuestProcess with a kernel in it, for which the test speaks."""

    pid = 1

    def __init__(self) -> None:
        self.events_: asyncio.Queue[ProcessOutput | ProcessEnded] = asyncio.Queue()
        self.mark = b""
        """Of the cell that it was sent; empty before."""

        self.signals: list[int] = []
        self.takes = asyncio.Event()
        """Whether there is room for what is sent."""

        self.takes.set()

    def write(self, data: bytes, stream: ProcessStream = "stdout") -> None:
        self.events_.put_nowait(ProcessOutput(stream, data))

    def say(self, kind: bytes, **values: object) -> None:
        payload = json.dumps(values).encode() if values else b""
        self.write(kind + len(payload).to_bytes(4, "big") + payload, "channel")

    def end(self, ended: ProcessEnded) -> None:
        self.events_.put_nowait(ended)

    def events(self) -> AsyncIterator[ProcessOutput | ProcessEnded]:
        return until_ended(self.events_)

    async def send(self, data: bytes) -> None:
        await self.takes.wait()
        if data[:1] == b"X":
            self.mark = json.loads(data[5:])["mark"].encode()

    async def signal(self, number: int, *, group: bool = True) -> None:
        self.signals.append(number)

    async def kill(self) -> None:
        self.signals.append(signal.SIGKILL)
        self.end(ProcessEnded(KILLED, signal.SIGKILL, "signal"))

    async def close_stdin(self) -> None: ...

    async def resize(self, size: TerminalSize) -> None: ...


class Case:
    """A cell under way in a context of such a kernel."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.share, self.wants = 0.0, False
        """How much of a processor the sandbox gets, and whether it wants one."""

        self.context = Context(
            "c",
            "python",
            self.kernel,  # type: ignore[arg-type]  # all that is used
            lambda: self.share * time.monotonic(),
            lambda: self.wants,
        )
        self.written = b""
        self.seconds_a_piece = 0.0

    async def _write(self, output: Output | CellEvent) -> None:
        assert isinstance(output, Output)
        await asyncio.sleep(self.seconds_a_piece)
        self.written += output.data

    async def begun(self, timeout: float = 60.0) -> asyncio.Task[CellOutcome]:
        """A cell that its kernel has."""
        running = asyncio.create_task(self.context.execute(Program(timeout=timeout), 1 << 20, self._write))
        await until(lambda: self.kernel.mark)
        self.kernel.say(b"B")
        return running


@pytest.fixture
async def case() -> AsyncIterator[Case]:
    made = Case()
    made.kernel.say(b"Y", kernel="a test's")
    await made.context.ready()
    yield made
    await made.context.close("The test is over.")


def _end(kernel: Kernel) -> None:
    kernel.say(b"D", exit_code=0, marked=[1])


# -- marks ------------------------------------------------------------------------------------------------------------


async def test_output_that_is_taken_slowly_is_all_the_cell_s(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MARK_SECONDS", 0.3)
    running = await case.begun()
    case.seconds_a_piece = 0.4
    _end(case.kernel)
    for piece in (b"a", b"b", b"c" + case.kernel.mark):
        case.kernel.write(piece)
    outcome = await running
    assert (case.written, outcome.stdout_truncated) == (b"abc", False)


async def test_output_that_still_comes_is_waited_for(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MARK_SECONDS", 1.0)
    running = await case.begun()
    _end(case.kernel)
    for _ in range(4):
        await asyncio.sleep(0.4)
        case.kernel.write(b"a")
    case.kernel.write(case.kernel.mark)
    outcome = await running
    assert (case.written, outcome.stdout_truncated) == (b"aaaa", False)


async def test_a_mark_that_never_comes_is_said(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MARK_SECONDS", 0.2)
    running = await case.begun()
    _end(case.kernel)
    outcome = await running
    assert (outcome.exit_code, outcome.stdout_truncated, outcome.stderr_truncated) == (0, True, False)


async def test_what_writes_for_ever_isn_t_waited_for_as_long(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MARK_MOST_SECONDS", 0.5)
    running = await case.begun()
    _end(case.kernel)

    async def write() -> None:
        while True:
            case.kernel.write(b"a")
            await asyncio.sleep(0.05)

    writing = asyncio.create_task(write())
    try:
        async with asyncio.timeout(9):
            assert (await running).stdout_truncated
    finally:
        writing.cancel()


@pytest.mark.parametrize("stop", [False, True])
async def test_a_cell_that_is_over_isn_t_killed_for_its_output(
    case: Case, monkeypatch: pytest.MonkeyPatch, *, stop: bool
) -> None:
    """At its timeout, or when somebody wants it stopped."""
    monkeypatch.setattr(module, "GRACE", 0.1)
    running = await case.begun(60.0 if stop else 0.3)
    _end(case.kernel)
    await asyncio.sleep(0.1)
    if stop:
        await case.context.stop_cell()
    await asyncio.sleep(0.5)
    case.kernel.write(case.kernel.mark)
    outcome = await running
    assert (outcome.cause, outcome.lost, case.kernel.signals) == ("exit", None, [])


# -- interrupts on a busy machine -------------------------------------------------------------------------------------


async def _interrupted(case: Case) -> asyncio.Task[CellOutcome]:
    """A cell that has been sent SIGINT at its timeout."""
    running = await case.begun(0.1)
    await until(lambda: case.kernel.signals)
    return running


async def test_an_interrupted_cell_that_has_ended_isn_t_killed_for_its_output(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.2)
    running = await _interrupted(case)
    _end(case.kernel)
    await asyncio.sleep(1.0)
    case.kernel.write(case.kernel.mark)
    outcome = await running
    assert (outcome.cause, outcome.lost, case.kernel.signals) == ("timeout", None, [signal.SIGINT])


async def test_an_end_behind_output_that_is_taken_slowly_is_heard(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.2)
    running = await _interrupted(case)
    case.seconds_a_piece = 1.0
    case.kernel.write(b"a" + case.kernel.mark)
    _end(case.kernel)
    outcome = await running
    assert (case.written, outcome.lost, case.kernel.signals) == (b"a", None, [signal.SIGINT])


async def test_output_without_end_isn_t_waited_for_as_if_the_end_were_behind_it(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.2)
    monkeypatch.setattr(module, "_GRACE_MOST", 600.0)
    monkeypatch.setattr(module, "_BACKLOG_BYTES", 10)
    running = await _interrupted(case)
    case.seconds_a_piece = 0.05

    async def write() -> None:
        while signal.SIGKILL not in case.kernel.signals:
            case.kernel.write(b"a")
            await asyncio.sleep(0.02)

    writing = asyncio.create_task(write())
    outcome = await running
    await writing
    assert outcome.lost == "It was killed, since a cell went on after its timeout."


async def test_an_end_is_heard_after_the_event_loop_stood_still(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.5)
    running = await _interrupted(case)
    time.sleep(1.5)
    await asyncio.sleep(0.1)
    _end(case.kernel)
    case.kernel.write(case.kernel.mark)
    outcome = await running
    assert (outcome.lost, case.kernel.signals) == (None, [signal.SIGINT])


async def test_what_gets_no_processor_to_end_is_waited_for(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.2)
    case.wants = True
    running = await _interrupted(case)
    await asyncio.sleep(1.0)
    _end(case.kernel)
    case.kernel.write(case.kernel.mark)
    outcome = await running
    assert (outcome.lost, case.kernel.signals) == (None, [signal.SIGINT])


@pytest.mark.parametrize(
    ("share", "wants", "most"), [(0.0, True, 0.5), (0.9, True, 600.0), (0.0, False, 600.0)],
    ids=["gets none for long", "gets much", "wants none"],
)  # fmt: skip
async def test_what_goes_on_is_killed(
    case: Case, monkeypatch: pytest.MonkeyPatch, share: float, wants: bool, most: float
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.2)
    monkeypatch.setattr(module, "_GRACE_MOST", most)
    case.share, case.wants = share, wants
    outcome = await (await _interrupted(case))
    assert outcome.lost == "It was killed, since a cell went on after its timeout."


async def test_what_goes_on_is_killed_though_nobody_can_see_what_it_uses(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.2)

    def fails() -> bool:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "as the name of a process could")

    case.wants = True
    monkeypatch.setattr(case.context, "_wants_processor", fails)
    outcome = await (await _interrupted(case))
    assert outcome.lost == "It was killed, since a cell went on after its timeout."


# -- whether it had begun ---------------------------------------------------------------------------------------------


type Cause = Literal["oom", "signal", "sandbox_died"]


@pytest.mark.parametrize("cause", ["sandbox_died", "oom", "signal"])
async def test_a_cell_that_may_have_begun_is_not_said_not_to_have(case: Case, cause: Cause) -> None:
    """Its supervisor ends, with what the kernel has said."""
    running = asyncio.create_task(case.context.execute(Program(timeout=60.0), 1 << 20, case._write))
    await until(lambda: case.kernel.mark)
    case.kernel.end(ProcessEnded(KILLED, signal.SIGKILL, cause, with_supervisor=True))
    outcome = await running
    assert (outcome.exit_code, outcome.sandbox_alive) == (KILLED, cause != "sandbox_died")
    assert outcome.lost is not None


@pytest.mark.parametrize("says_so", [True, False])
async def test_a_cell_ends_whose_interpreter_can_not_be_followed_any_more(case: Case, *, says_so: bool) -> None:
    """For a bug of the service's. It may have begun, whether it has said so or not."""
    running = asyncio.create_task(case.context.execute(Program(timeout=60.0), 1 << 20, case._write))
    await until(lambda: case.kernel.mark)
    if says_so:
        case.kernel.say(b"B")
    event: Any = "nothing that a process can say"
    with capture_logs() as logged:
        case.kernel.events_.put_nowait(event)
        async with asyncio.timeout(9):
            outcome = await running
    assert (outcome.cause, outcome.exit_code, outcome.sandbox_alive) == ("killed", KILLED, True)
    assert outcome.lost == "It was killed, since the service failed to follow it."
    assert (case.context.alive, case.kernel.signals) == (False, [signal.SIGKILL])
    assert [line["event"] for line in logged] == ["context_failed"]


async def _interpreter_ends(kernel: Kernel) -> None:
    await until(lambda: kernel.mark)
    kernel.end(ProcessEnded(1, None, "exit"))


async def _supervisor_ends_before(kernel: Kernel) -> None:
    kernel.takes.clear()
    await asyncio.sleep(0.05)
    kernel.end(ProcessEnded(KILLED, signal.SIGKILL, "sandbox_died", with_supervisor=True))


@pytest.mark.parametrize("end", [_interpreter_ends, _supervisor_ends_before])
async def test_a_cell_that_surely_had_not_begun(case: Case, end: Callable[[Kernel], Coroutine[Any, Any, None]]) -> None:
    """The interpreter ended by itself, before it said that it had begun; or the cell wasn't sent."""
    ending = asyncio.create_task(end(case.kernel))
    await asyncio.sleep(0)
    with pytest.raises(NotBegun):
        await case.context.execute(Program(timeout=60.0), 1 << 20, case._write)
    await ending
