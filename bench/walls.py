"""What the seccomp filters and Landlock cost a run: the bubblewrap driver beside one without them.

Both drivers work in this process. What is measured is a run in a warm sandbox: the program is handed in, runs, and all
of its processes are killed. A commit and HTTP would only hide the difference. The service has no switch to weaken
itself, so the weak driver has no filters and a supervisor whose source was changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

from bench.arena import Arena
from bench.cases import Probe
from bench.drivers import SyncDriver
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
_WITHOUT = {'landlock.restrict(config["landlock"])': "None", "self.own_domain.enter()": "pass"}

IMPORTS = (
    "import argparse, asyncio, concurrent.futures, decimal, http.client, logging, sqlite3, unittest, urllib.request"
)
"""A program with many system calls: it looks for and opens some hundred files."""


class _WeakDriver(BubblewrapDriver):
    """Makes sandboxes without seccomp filters and Landlock."""

    def make_filters(self) -> tuple[bytes, ...]:
        source = self.paths.guest
        guest = self.directory.parent / "guest"
        shutil.copytree(source, guest, ignore=shutil.ignore_patterns("__pycache__"))
        for old, new in _WITHOUT.items():
            files = [file for file in guest.glob("*.py") if old in file.read_text()]
            if not files:
                raise RuntimeError(f"The guest has no {old!r} any more.")
            for file in files:
                file.write_text(file.read_text().replace(old, new))
        self.paths = replace(self.paths, guest=guest)
        return ()


def warm_run(language: Language, code: str, *, weak: bool) -> Callable[[Arena], Probe]:
    """A run in a warm sandbox, with or without filters and Landlock."""

    def start(arena: Arena) -> Probe:
        driver = SyncDriver(arena, _WeakDriver if weak else BubblewrapDriver, _LIMITS)
        sandbox = driver.create(language)
        expected = ("none", None) if weak else ("filter", sandbox.enforced["landlock"])
        if (sandbox.enforced["seccomp"], sandbox.enforced["landlock"]) != expected:
            raise RuntimeError(f"The sandbox has other isolation than is to be measured: {sandbox.enforced}")
        return Probe(lambda _: driver.run(sandbox, code))

    return start
