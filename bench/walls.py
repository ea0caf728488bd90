"""What the filter of system calls and Landlock cost a run: a driver as it is beside one without them.

Both work in this process, and what is measured is a program's way through its sandbox: in, run, ended, all of it
killed. There is no commit and no HTTP, whose time would hide the difference. The service has no switch to weaken
itself, so the weak driver gets no filters and a supervisor with other text.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

from bench.arena import Arena
from bench.cases import Probe
from bench.drivers import Bench
from era.core.models import Language
from era.core.program import Limits
from era.drivers.bubblewrap import BubblewrapDriver

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
        bench = Bench(arena, _WeakDriver if weak else BubblewrapDriver, _LIMITS)
        box = bench.make(language)
        expected = ("none", None) if weak else ("filter", box.enforced["landlock"])
        if (box.enforced["seccomp"], box.enforced["landlock"]) != expected:
            raise RuntimeError(f"That is not what was to be measured: {box.enforced}")
        return Probe(lambda _: bench.run(box, code))

    return start
