"""What the filter of system calls and Landlock cost a run: a driver as it is beside one without them.

Both work in this process, and what is measured is a program's way through its sandbox: in, run, ended, all of it
killed. There is no commit and no HTTP, whose time would hide the difference. The service has no switch to weaken
itself, so the weak driver gets no filters and a supervisor with other text.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace

from bench.arena import Arena
from bench.cases import Probe
from era.core.models import Language
from era.core.ports import Ended, Limits, Output, Program
from era.drivers.bubblewrap import BubblewrapDriver, BubblewrapSandbox

_LIMITS = Limits(
    memory_bytes=512 << 20,
    cpus=2.0,
    pids=128,
    disk_bytes=1 << 30,
    files=100_000,
    output_bytes=1 << 20,
    tmp_bytes=64 << 20,
)
_WITHOUT = {'landlock.restrict(config["landlock"])': "None", "landlock.enter_own_domain()": "pass"}

IMPORTS = (
    "import argparse, asyncio, concurrent.futures, decimal, http.client, logging, sqlite3, unittest, urllib.request"
)
"""A program of many system calls: it looks for and opens some hundred files."""


class _WeakDriver(BubblewrapDriver):
    """Sandboxes without the walls in question."""

    def make_filters(self) -> tuple[bytes, ...]:
        source = self.paths.guest
        guest = self.live.parent / "guest"
        shutil.copytree(source, guest, ignore=shutil.ignore_patterns("__pycache__"))
        supervisor = guest / "supervisor.py"
        text = supervisor.read_text()
        for old, new in _WITHOUT.items():
            if old not in text:
                raise RuntimeError(f"The supervisor has no {old!r} any more.")
            text = text.replace(old, new)
        supervisor.write_text(text)
        self.paths = replace(self.paths, guest=guest)
        return ()


def sandbox(language: Language, code: str, *, weak: bool) -> Callable[[Arena], Probe]:
    """A program in a live sandbox of a driver of our own."""

    def start(arena: Arena) -> Probe:
        runner = asyncio.Runner()
        name = f"era-bench-{secrets.token_hex(4)}"
        directory = arena.scratch / name
        directory.mkdir()
        driver = (_WeakDriver if weak else BubblewrapDriver)(directory, _LIMITS, cgroup_name=name)
        arena.closers.callback(runner.close)
        arena.closers.callback(lambda: runner.run(driver.stop()))
        runner.run(driver.clear())
        runner.run(driver.start())
        box = runner.run(driver.create(language, _LIMITS))
        expected = ("none", None) if weak else ("filter", box.enforced["landlock"])
        if (box.enforced["seccomp"], box.enforced["landlock"]) != expected:
            raise RuntimeError(f"That is not what was to be measured: {box.enforced}")
        program = Program(code.encode(), b"{}", {}, 20.0, ephemeral=False, files={})
        return Probe(lambda _: runner.run(_ended(box, program)), after=_check)

    return start


async def _ended(box: BubblewrapSandbox, program: Program) -> tuple[bytes, Ended]:
    said = b""
    async for event in box.run(program):
        if isinstance(event, Output):
            said += event.data
        else:
            ended = event
    return said, ended


def _check(answer: tuple[bytes, Ended]) -> None:
    said, ended = answer
    if ended.exit_code != 0:
        raise RuntimeError(f"A program in a sandbox went wrong: {ended}, {said!r}")
