"""Sandboxes for tests: sound ones, and ones with a wall taken out."""

from __future__ import annotations

import asyncio
import pkgutil
import secrets
import shutil
import signal
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

from era.core.models import JsonObject, Language
from era.core.program import CODE_ALONE, Ended, Invocation, Limits, Output, Program
from era.drivers import bubblewrap, gvisor, seccomp
from era.drivers.bubblewrap import BubblewrapDriver, BubblewrapSandbox
from era.drivers.gvisor import GvisorDriver
from tests.conftest import descendants
from tests.drivers import guest_listeners
from tests.drivers.fake import FakeDriver, FakeSandbox

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
type AnySandbox = BubblewrapSandbox | FakeSandbox

DRIVERS = {"bubblewrap": BubblewrapDriver, "gvisor": GvisorDriver, "fake": FakeDriver}


@dataclass(frozen=True)
class Weakness:
    """A wall that is taken out, by changing what makes a sandbox."""

    options: Callable[[Options], Options] = list
    """Changes bubblewrap's options."""

    supervisor: Mapping[str, str] | None = None
    """Text of the guest's files, and what replaces it."""

    as_root: bool = False
    """Without a uid of its own."""

    unfiltered: bool = False
    """Without a filter of system calls."""

    template_forks: int = 64
    """0: supervisors are started, not forked from a template, so bubblewrap's options say all."""

    limits: Limits = LIMITS
    specification: Callable[[JsonObject], JsonObject] = dict
    """Changes the container that runsc makes."""

    flags: Callable[[Options], Options] = list
    """Changes runsc's options."""


@dataclass(frozen=True)
class Result:
    """What a program wrote, and how it ended."""

    stdout: str
    stderr: str
    ended: Ended
    pieces: int = 0
    """In how many it came."""

    connections: list[str] = field(default_factory=list)
    """What became of connections to the guest listener (guest_listeners.py), or what came over those to a port
    inside."""


class Sandboxes:
    """A driver of the test's own, one of DRIVERS or a class by its MODULE:CLASS, and sandboxes from it."""

    all: ClassVar[set[Sandboxes]] = set()
    """Those that have not been stopped."""

    def __init__(
        self,
        directory: Path,
        weakness: Weakness,
        driver: str = "bubblewrap",
        *,
        self_tested: Sequence[Language] = ("python",),
        cgroup_name: str = "",
        driver_settings: Mapping[str, Any] | None = None,
    ) -> None:
        """`self_tested` are the languages of the driver's self-test; a service's drivers test all that there are.
        `driver_settings` are more arguments of the driver's."""
        self.all.add(self)
        self._runner = asyncio.Runner()
        self.cgroup_name = cgroup_name or f"era-test-{secrets.token_hex(4)}"
        more = driver_settings or {}
        make = DRIVERS[driver] if driver in DRIVERS else pkgutil.resolve_name(driver)
        self.driver: Any = make(directory, weakness.limits, cgroup_name=self.cgroup_name, **more)
        self.driver.template_forks = weakness.template_forks
        self._weakness = weakness
        if weakness.supervisor:
            guest = directory / "guest"
            shutil.copytree(self.driver.paths.guest, guest, ignore=shutil.ignore_patterns("__pycache__"))
            for old, new in weakness.supervisor.items():
                files = [file for file in guest.glob("*.py") if old in file.read_text()]
                assert len(files) == 1, f"there is no one file with {old!r} any more"
                files[0].write_text(files[0].read_text().replace(old, new))
            self.driver.paths = replace(self.driver.paths, guest=guest)
        try:
            self.driver.self_tested = [name for name in self_tested if name in self.driver.self_tested]
            with self._weakened():
                self._runner.run(self._start())
        except BaseException:
            self.stop()
            raise

    async def _start(self) -> None:
        await self.driver.clear()
        await self.driver.start()

    def make(self, language: Language = "python", package_set: str | None = None) -> BubblewrapSandbox:
        with self._weakened():
            making = self.driver.create(language, self._weakness.limits, package_set)
            made: BubblewrapSandbox = self._runner.run(making)
            return made

    def run(
        self,
        sandbox: AnySandbox,
        code: str,
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        state: bytes = b"{}",
        ephemeral: bool = False,
        files: Mapping[str, bytes] | None = None,
        meanwhile: str = "",
        guest_listener: bool = False,
        invocation: Invocation = CODE_ALONE,
    ) -> Result:
        """Run one program. As soon as it has written something, `meanwhile` happens: "kill" the run, "close" the
        sandbox, "murder" it as if the kernel had killed it, or connect "to" the port that it has written; what it
        answers is then in `connections`. With `guest_listener` a service listens on the guest listener
        (guest_listeners.py)."""

        async def follow() -> Result:
            parts = {"stdout": b"", "stderr": b""}
            connections: list[str] = []
            pieces = 0

            async def talk() -> None:
                connections.extend(await guest_listeners.talk(sandbox, int(parts["stdout"])))

            to_do: Any = {
                "kill": sandbox.kill_run,
                "close": sandbox.close,
                "murder": lambda: _murder(sandbox),
                "to": talk,
            }.get(meanwhile)
            async with AsyncExitStack() as stack:
                if guest_listener:
                    connections = await stack.enter_async_context(guest_listeners.listened_on(sandbox))
                async for event in sandbox.run(
                    Program(code.encode(), state, env or {}, timeout, ephemeral, files or {}, invocation)
                ):
                    if isinstance(event, Output):
                        parts[event.stream] += event.data
                        pieces += 1
                        if to_do is not None:
                            await to_do()
                            to_do = None
                    else:
                        ended = event
            stdout, stderr = (parts[name].decode(errors="replace") for name in ("stdout", "stderr"))
            return Result(stdout, stderr, ended, pieces, sorted(connections))

        return self._runner.run(follow())

    def do(self, sandbox: AnySandbox, step: Callable[..., Coroutine[Any, Any, Any]], *given: Any) -> Any:
        """Have `step` do something with a sandbox. It is a function of a module, and what it takes and returns can be
        pickled."""
        return self._runner.run(step(sandbox, *given))

    def close(self, sandbox: AnySandbox) -> None:
        self._runner.run(sandbox.close())

    def murder(self, sandbox: AnySandbox) -> None:
        """Kill a sandbox from outside, as the kernel might, and wait until that is noticed."""

        async def noticed() -> None:
            await _murder(sandbox)
            while sandbox.alive:  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.01)

        self._runner.run(noticed())

    def stop(self) -> None:
        self._runner.run(self.driver.stop())
        self._runner.close()
        self.all.discard(self)

    def processes(self) -> set[int]:
        """The processes of the sandboxes that it has now."""
        found: set[int] = set()
        for sandbox in self.driver._sandboxes:
            own = {sandbox._init_pid, sandbox._process.pid if sandbox._process else 0} - {0}
            found.update(own, *map(descendants, own))
        return found

    @contextmanager
    def _weakened(self) -> Iterator[None]:
        def patched(module: ModuleType, name: str, weaken: Callable[[Any], Any]) -> Any:
            sound = getattr(module, name)
            return patch.object(module, name, lambda *given: weaken(sound(*given)))

        with ExitStack() as stack:
            stack.enter_context(patched(bubblewrap, "arguments", self._weakness.options))
            stack.enter_context(patched(gvisor, "arguments", self._weakness.options))
            stack.enter_context(patched(gvisor, "specification", self._weakness.specification))
            stack.enter_context(patched(gvisor, "flags", self._weakness.flags))
            if self._weakness.unfiltered:
                stack.enter_context(patch.object(seccomp, "filters", lambda: ()))
                stack.enter_context(patch.object(seccomp, "outer_filters", lambda: ()))
            if self._weakness.as_root:
                self.driver.uids.take = lambda: None
            yield


WITHOUT_LANDLOCK = {'landlock.restrict(config["landlock"])': "None", "self.own_domain.enter()": "pass"}
"""A `Weakness.supervisor`."""


async def _murder(sandbox: AnySandbox) -> None:
    if sandbox._process is not None:
        sandbox._process.kill()
    else:
        signal.pidfd_send_signal(sandbox._init_pidfd, signal.SIGKILL)


def without(*names: str) -> Callable[[Options], Options]:
    """Removes options of these names, which take no value."""
    return lambda options: [option for option in options if option not in names]


def with_more(*more: str) -> Callable[[Options], Options]:
    """Adds options, before the root is made read-only."""

    def weaken(options: Options) -> Options:
        at = options.index("--remount-ro")
        return [*options[:at], *more, *options[at:]]

    return weaken
