"""Two supervisors that take turns in a burst: a program can't reach the spare of the other, which stays in use."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from era.drivers import alternation
from era.drivers.alternation import ROOM_BYTES, Alternation
from era.drivers.cgroups import Group
from era.drivers.forking import Forked
from tests.conftest import descendants, eventually
from tests.drivers.sandboxes import LIMITS, WITHOUT_LANDLOCK, Sandboxes, Weakness

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no templates")

REACHES = """
const fs = require('node:fs');
const seen = fs.readdirSync('/proc').filter(name => Number(name) > 1 && Number(name) !== process.pid);
const read = seen.filter(pid => { try { return fs.readFileSync(`/proc/${pid}/environ`, 'latin1').includes('ERA_SPARE') }
                                  catch { return false } });
for (const pid of seen) try { process.kill(Number(pid), 'SIGKILL') } catch {}
try { process.kill(-1, 0); process.kill(-1, 'SIGKILL') } catch {}
console.log(JSON.stringify([seen.length, read.length]));
"""
"""Looks for other processes, reads what they were started with, and kills what it can."""

BESIDE = {
    'control.send(b"B", b"")  # from here': (
        'beside = self.make_spare(self.entry)\\n        time.sleep(0.3)\\n        control.send(b"B", b"")  # from here'
    ).replace("\\n", "\n"),
    **WITHOUT_LANDLOCK,
}
"""A `Weakness.supervisor`: the spare of the next run is made in the same namespace before a program begins."""

SLOW = {
    "                self.control.note_joined()": (
        '                [time.sleep(0.01) for _ in range(1000) if os.path.exists("slow")]\n'
        "                self.control.note_joined()"
    )
}
"""A `Weakness.supervisor`: it removes what a run has left only once a file of the session's is gone, or after ten
seconds."""


@pytest.fixture(scope="module")
def sandboxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path_factory.mktemp("alternating"), Weakness(), self_tested=["node"])
    yield made
    made.stop()


def alternating(sandboxes: Sandboxes) -> tuple[Any, Any]:
    """A sandbox of Node's whose supervisors take turns, and what does so. The first has the next run."""
    sandbox = sandboxes.make("node")
    turns: Any = sandbox._channel
    assert isinstance(turns, Alternation)
    turns._ended_at = time.monotonic() + 60  # or a busy machine might be too slow for a burst
    assert sandboxes.run(sandbox, "console.log(1)").stdout == "1\n"
    sandboxes.do(sandbox, second_made)
    while turns._current is not turns._first:
        assert sandboxes.run(sandbox, "console.log(1)").stdout == "1\n"
    return sandbox, turns


async def second_made(sandbox: Any) -> None:
    await sandbox._channel._making
    assert sandbox._channel._second is not None, sandbox.log()


def spare(turns: Any) -> list[int]:
    """Processes of the second supervisor, but for itself."""
    return sorted(descendants(turns._second.life.pid))


def test_a_program_can_not_reach_the_spare_of_the_other_supervisor(sandboxes: Sandboxes) -> None:
    sandbox, turns = alternating(sandboxes)
    eventually(lambda: any("node" in Path(f"/proc/{pid}/cmdline").read_text() for pid in spare(turns)))
    before = spare(turns)
    assert sandbox.enforced["cgroup"]["memory_bytes"] == LIMITS.memory_bytes + ROOM_BYTES
    assert sandbox.enforced["cgroup"] == sandbox._group.limits()
    assert sandboxes.run(sandbox, REACHES).stdout == "[0,0]\n"
    assert spare(turns) == before, "it was reached"
    assert turns._current is turns._second
    assert sandboxes.run(sandbox, REACHES).stdout == "[0,0]\n"
    assert sandbox.alive
    sandboxes.close(sandbox)


def test_a_spare_in_the_same_namespace_is_reached(tmp_path: Path) -> None:
    made = Sandboxes(tmp_path / "weak", Weakness(supervisor=BESIDE), self_tested=["node"])
    try:
        seen, read = map(int, made.run(made.make("node"), REACHES).stdout.strip("[]\n").split(","))
        assert seen > 0
        assert read > 0
    finally:
        made.stop()


def test_what_a_run_leaves_is_gone_before_the_next(sandboxes: Sandboxes) -> None:
    sandbox, turns = alternating(sandboxes)
    for _ in range(4):
        leaves = (
            "const fs = require('fs'); console.log(fs.readdirSync('/tmp').length); fs.writeFileSync('/tmp/left', '')"
        )
        assert sandboxes.run(sandbox, leaves).stdout == "0\n"
        kept = "const fs = require('fs'); fs.appendFileSync('kept', 'x'); console.log(fs.readFileSync('kept').length)"
        sandboxes.run(sandbox, kept)
    assert sandboxes.run(sandbox, kept).stdout == "5\n"
    assert turns._second is not None
    sandboxes.close(sandbox)


def test_it_ends_when_no_run_comes(sandboxes: Sandboxes) -> None:
    sandbox, turns = alternating(sandboxes)
    life = turns._second.life.pid
    sandboxes.do(sandbox, rest)
    assert turns._second is None
    eventually(lambda: not Path(f"/proc/{life}").exists())
    assert sandboxes.run(sandbox, "console.log(2)").stdout == "2\n"
    sandboxes.close(sandbox)


async def rest(sandbox: Any) -> None:
    await sandbox._channel._cleaning
    sandbox._channel._end_idle()
    await sandbox._channel.ended()


def test_it_ends_where_the_run_that_wanted_it_was_the_last(
    sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after two runs: it is there only once the second of them has ended."""
    monkeypatch.setattr(alternation, "LINGER", 0.05)
    sandbox = sandboxes.make("node")
    turns: Any = sandbox._channel
    turns._making = sandboxes.do(sandbox, made_between_runs)
    assert eventually(lambda: sandboxes.do(sandbox, lingers))
    assert sandboxes.run(sandbox, "console.log(1)").stdout == "1\n"
    sandboxes.close(sandbox)


async def made_between_runs(sandbox: Any) -> asyncio.Task[None]:
    making = asyncio.create_task(sandbox._channel._make())
    await making
    assert sandbox._channel._second is not None, sandbox.log()
    return making


async def lingers(sandbox: Any) -> bool:
    """Wait a moment. Returns whether there is no second any more."""
    await asyncio.sleep(0.1)
    return sandbox._channel._second is None


def test_it_does_not_end_under_a_run(sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox, turns = alternating(sandboxes)
    monkeypatch.setattr(alternation, "LINGER", 0.05)
    sandboxes.do(sandbox, made_to_linger)
    says = "console.log(1); setTimeout(() => console.log(2), 500)"
    assert sandboxes.run(sandbox, says).stdout == "1\n2\n"
    assert turns._second is not None
    sandboxes.close(sandbox)


async def made_to_linger(sandbox: Any) -> None:
    """It is as if it had been made during the run that comes next, which is no reason to end it."""
    turns = sandbox._channel
    run = turns.run

    async def runs(*given: Any) -> Any:
        async for event in run(*given):
            turns._linger()
            yield event

    turns.run = runs


def test_one_that_dies_idle_costs_nothing(sandboxes: Sandboxes) -> None:
    sandbox, turns = alternating(sandboxes)
    second = turns._second
    sandboxes.do(sandbox, dies_idle)
    assert sandbox.alive
    assert sandboxes.run(sandbox, "console.log(1)").stdout == "1\n"
    assert turns._second is not second
    sandboxes.close(sandbox)


async def dies_idle(sandbox: Any) -> None:
    turns = sandbox._channel
    if turns._cleaning is not None:
        await turns._cleaning
    turns._second.life.kill()
    while turns._second.channel.alive:  # noqa: ASYNC110  nothing tells of it
        await asyncio.sleep(0.01)


def test_one_that_dies_before_it_has_cleaned_up_costs_the_sandbox(tmp_path: Path) -> None:
    slow = Sandboxes(tmp_path, Weakness(supervisor=SLOW), self_tested=["node"])
    try:
        sandbox, turns = alternating(slow)
        while turns._current is not turns._second:
            slow.run(sandbox, "")
        slow.run(sandbox, "const fs = require('fs'); fs.writeFileSync('slow', ''); fs.writeFileSync('/tmp/left', '')")
        slow.do(sandbox, dies_unclean)
        assert not sandbox.alive
    finally:
        slow.stop()


async def dies_unclean(sandbox: Any) -> None:
    sandbox._channel._second.life.kill()
    await asyncio.wait([sandbox._channel._cleaning])


def test_nothing_of_it_is_left_with_the_sandbox(sandboxes: Sandboxes) -> None:
    sandbox, turns = alternating(sandboxes)
    life = turns._second.life.pid
    sandboxes.close(sandbox)
    assert not Path(f"/proc/{life}").exists()


def test_it_does_not_end_before_it_has_removed_what_a_run_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Sandboxes(tmp_path, Weakness(supervisor=SLOW), self_tested=["node"])
    try:
        sandbox, turns = alternating(slow)
        while turns._current is not turns._second:
            slow.run(sandbox, "")
        monkeypatch.setattr(alternation, "LINGER", 0.05)
        slow.run(sandbox, "const fs = require('fs'); fs.writeFileSync('slow', ''); fs.writeFileSync('/tmp/left', '')")
        slow.do(sandbox, while_it_lingers)
        (sandbox.workspace / "slow").unlink()
        looks = slow.run(sandbox, "console.log(require('fs').readdirSync('/tmp').length)")
        assert looks.stdout == "0\n"
    finally:
        slow.stop()


async def while_it_lingers(sandbox: Any) -> None:
    await asyncio.sleep(0.2)


async def test_one_that_does_not_start_leaves_the_event_loop_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternation, "START_SECONDS", 0.1)
    broker, theirs = socket.socketpair()
    process = subprocess.Popen(["sleep", "60"])
    opened: list[Any] = [broker, theirs]

    async def enter(control: int) -> Forked:
        """Start what sends its broker and then nothing."""
        opened.append(socket.socket(fileno=os.dup(control)))
        socket.send_fds(opened[-1], [b"N\0\0\0\0"], [theirs.fileno()])
        return Forked(process.pid, os.pidfd_open(process.pid))

    first: Any = None
    turns = Alternation(first, first, Group(2, {}), {}, enter, {}, lambda broker: None)
    await turns._make()
    assert turns._second is None
    assert process.wait(10) < 0
    for _ in range(10):  # some get the descriptors that it had
        ours, other = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        other.send(b"x")
        assert await asyncio.wait_for(reader.read(1), 10) == b"x"
        opened += [other, writer]
    for each in opened:
        each.close()
