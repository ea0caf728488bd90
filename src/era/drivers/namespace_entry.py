"""Where a sandbox's process supervisor comes from: a fork of the service's that enters the sandbox's namespaces.

guest/template.py and guest/namespace_entry.py say how that one does it, and what hostile code in there could do about
it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol

from era.core.models import JsonObject
from era.drivers import guest, processes
from era.drivers.forking import Forked, Forker, TemplateFailed
from era.drivers.launch import DESCRIPTORS, offer_to_oom_killer
from era.drivers.options import READ_ONLY_PROC
from era.drivers.staging import Paths
from era.drivers.templates import Templates

_START_SECONDS = 20.0
_NAMESPACES = ("mnt", "net", "ipc", "uts", "user")

_PLAIN = [guest.PYTHON, "-S", "-E", "-B"]
"""Without `site`: it would import the session's."""


class Enterer(Forker):
    """A process from which supervisors enter sandboxes where there are no templates. It has loaded nothing, so they
    execute an interpreter of the sandbox's once their walls are up."""

    def __init__(self, paths: Paths, filters: tuple[bytes, ...]) -> None:
        """Start it. Raises OSError."""

        self.is_started = False

        def start(config: JsonObject, given: list[int], log: int) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [*_PLAIN, f"{paths.guest}/template.py", json.dumps(config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={},
                pass_fds=given,
                start_new_session=True,
            )
            try:
                offer_to_oom_killer(process.pid)
            except BaseException:
                process.kill()
                process.wait()
                raise
            return process

        super().__init__(start, filters)

    def wait(self) -> None:
        """Wait until it can fork. Raises TemplateFailed."""
        if not self.is_started and not self.is_ready(_START_SECONDS):
            raise TemplateFailed("It takes too long.")
        self.is_started = True


class Startable(Protocol):
    """A driver, as far as it matters here."""

    paths: Paths
    filters: tuple[bytes, ...]
    templates: Templates | None
    spawner: ThreadPoolExecutor
    movers: ThreadPoolExecutor


class NamespaceEntry:
    """By which process supervisors get into the sandboxes of one driver."""

    def __init__(self, driver: Startable) -> None:
        self._driver = driver
        self._enterer: Enterer | None = None
        """Started when it is first needed."""

    async def enter(
        self,
        pid: int,
        pidfd: int,
        config: JsonObject,
        *,
        uid: int | None,
        control: int,
        log: int,
        entrances: Callable[[], list[int]],
        of_template: bool = False,
    ) -> Forked:
        """Have a supervisor with this configuration forked into the namespaces of process `pid`, which `pidfd` leads
        to, with `control` as its socket and `log` as its stderr: that of processes or, only `of_template`, one of runs.
        `entrances` opens the files by which it enters its control groups. Raises TemplateFailed, OSError,
        SandboxFailed."""
        loop, driver = asyncio.get_running_loop(), self._driver
        templates = driver.templates

        def enter(forker: Forker) -> Forked:
            try:
                groups = entrances()
                try:
                    return _enter(forker, pid, pidfd, config, uid=uid, control=control, log=log, groups=groups)
                finally:
                    for group in groups:
                        os.close(group)
            finally:
                forker.release()

        template = None if templates is None else await loop.run_in_executor(driver.spawner, templates.take)
        if template is not None:
            try:
                return await loop.run_in_executor(driver.movers, enter, template)
            except TemplateFailed:
                if of_template:
                    raise
                # Programs in there can be the reason: no template is given up for it.
        if of_template:
            raise TemplateFailed("There is none at the moment.")
        enterer = await loop.run_in_executor(driver.spawner, self._take_enterer)
        return await loop.run_in_executor(driver.movers, enter, enterer)

    def stop(self) -> None:
        """Runs on the thread that starts sandboxes. No sandbox may be left."""
        if self._enterer is not None:
            self._enterer.stop()

    def _take_enterer(self) -> Enterer:
        """The enterer, to be released afterwards. Runs on the thread that starts sandboxes. Raises OSError,
        TemplateFailed."""
        if self._enterer is not None and self._enterer.has_ended():
            self._enterer.retire()
            self._enterer = None
        if self._enterer is None:
            self._enterer = Enterer(self._driver.paths, self._driver.filters)
        self._enterer.wait()
        self._enterer.take()
        return self._enterer


def _enter(
    forker: Forker,
    pid: int,
    pidfd: int,
    config: JsonObject,
    *,
    uid: int | None,
    control: int,
    log: int,
    groups: list[int],
) -> Forked:
    """See NamespaceEntry.enter. Blocks. Raises TemplateFailed."""
    request: JsonObject = {
        "config": config,
        "uid": uid,
        "holder": None,
        "read_only_proc": list(READ_ONLY_PROC),
        "workspace": guest.WORKSPACE,
        "descriptors": DESCRIPTORS,
    }
    if isinstance(forker, Enterer):
        request["command"] = [guest.INTERPRETER, *_PLAIN[1:], f"{guest.GUEST}/process_supervisor.py"]
        request["environment"] = {"PATH": guest.PATH, "LANG": "C.UTF-8"}
    with ExitStack() as stack:
        namespaces = list[int]()
        try:
            for name in _NAMESPACES:
                namespaces.append(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY))
                stack.callback(os.close, namespaces[-1])
        except OSError as problem:
            raise TemplateFailed(f"its namespaces can't be entered: {problem.strerror}") from problem
        if processes.has_ended(pidfd):  # they may be those of another one, which has got its number
            raise TemplateFailed("its namespaces can't be entered: it has ended")
        return forker.fork(request, [control, log, *namespaces, *groups])
