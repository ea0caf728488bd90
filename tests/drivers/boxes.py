"""Sandboxes for tests, sound ones and ones with a wall taken out."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from era.core.models import Language
from era.core.ports import Ended, Limits, Output, Program
from era.drivers import bubblewrap
from era.drivers.bubblewrap import BubblewrapDriver, BubblewrapSandbox

LIMITS = Limits(
    memory_bytes=256 << 20,
    cpus=1.0,
    pids=64,
    disk_bytes=256 << 20,
    files=10_000,
    output_bytes=1 << 20,
    tmp_bytes=16 << 20,
)

type Options = list[str]


@dataclass(frozen=True)
class Weakness:
    """One wall less: other options for bubblewrap, other text in the supervisor, or no uid of its own."""

    options: Callable[[Options], Options] = list
    supervisor: Mapping[str, str] | None = None
    as_root: bool = False


@dataclass(frozen=True)
class Told:
    """What a program wrote, and how it ended."""

    stdout: str
    stderr: str
    ended: Ended


class Boxes:
    """A driver of the test's own, and sandboxes from it."""

    def __init__(self, directory: Path, weakness: Weakness) -> None:
        self._runner = asyncio.Runner()
        self.cgroup_name = f"era-test-{secrets.token_hex(4)}"
        self.driver = BubblewrapDriver(directory, LIMITS, cgroup_name=self.cgroup_name)
        self._weakness = weakness
        if weakness.supervisor:
            guest = directory / "guest"
            shutil.copytree(self.driver.paths.guest, guest, ignore=shutil.ignore_patterns("__pycache__"))
            file = guest / "supervisor.py"
            for old, new in weakness.supervisor.items():
                assert old in file.read_text(), f"the supervisor has no {old!r} any more"
                file.write_text(file.read_text().replace(old, new))
            self.driver.paths = replace(self.driver.paths, guest=guest)
        try:
            with self._weakened():
                self._runner.run(self._start())
        except BaseException:
            self.stop()
            raise

    async def _start(self) -> None:
        await self.driver.clear()
        await self.driver.start()

    def make(self, language: Language = "python") -> BubblewrapSandbox:
        with self._weakened():
            return self._runner.run(self.driver.create(language, LIMITS))

    def run(
        self,
        box: BubblewrapSandbox,
        code: str,
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 20,
        state: bytes = b"{}",
    ) -> Told:
        async def follow() -> Told:
            parts = {"stdout": b"", "stderr": b""}
            async for event in box.run(Program(code.encode(), state, env or {}, timeout, False, {})):
                if isinstance(event, Output):
                    parts[event.stream] += event.data
                else:
                    ended = event
            return Told(parts["stdout"].decode(errors="replace"), parts["stderr"].decode(errors="replace"), ended)

        return self._runner.run(follow())

    def close(self, box: BubblewrapSandbox) -> None:
        self._runner.run(box.close())

    def stop(self) -> None:
        self._runner.run(self.driver.stop())
        self._runner.close()

    @contextmanager
    def _weakened(self) -> Iterator[None]:
        sound = bubblewrap.arguments

        def arguments(*given: object) -> Options:
            return self._weakness.options(sound(*given))  # type: ignore[arg-type]  # handed on as they came

        with patch.object(bubblewrap, "arguments", arguments):
            if self._weakness.as_root:
                self.driver._free_uid = lambda: None  # type: ignore[method-assign]
            yield


def without(*names: str) -> Callable[[Options], Options]:
    """Options less those of these names, which take no value."""
    return lambda options: [option for option in options if option not in names]


def with_more(*more: str) -> Callable[[Options], Options]:
    """These options too, before the root is made read-only."""

    def weaken(options: Options) -> Options:
        at = options.index("--remount-ro")
        return [*options[:at], *more, *options[at:]]

    return weaken
