"""Templates: processes that have a Python with everything loaded, of which the supervisors of sandboxes are forked.

guest/template.py is what such a process runs, and says how a fork gets into its sandbox.

What is shared
==============

Forks of one interpreter have in common what is decided when it starts: the seed of its hashes, and where things lie in
its memory. Who runs code in one sandbox knows that of the others. So a template makes only so many supervisors, then
there is another one; and the setting that says how many can be 0. Nothing that a template has is secret besides.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import structlog

from era.core.models import JsonObject
from era.core.program import Limits
from era.drivers import guest, prefix
from era.drivers.forking import Forked, Forker, TemplateFailed
from era.drivers.launch import DESCRIPTORS, Launched, Survivor, launch
from era.drivers.options import READ_ONLY_PROC, Plan, template_arguments, template_files
from era.drivers.staging import Paths, remove_tree
from era.errors import SandboxFailed

log = structlog.get_logger()

_START_SECONDS = 20.0
_MOST_FAILURES = 3
"""So many in a row, and there are no more templates."""

_HOLDER = "/usr/bin/cat"
"""What is in a sandbox's namespaces until its supervisor is: it says back what it reads, then waits for more."""


class Template(Forker):
    """One such process."""

    def __init__(self, paths: Paths, limits: Limits, filters: tuple[bytes, ...], survivor: Survivor) -> None:
        """Start it. Raises OSError, SandboxFailed."""
        name = f"template-{secrets.token_hex(8)}"
        self._directory = paths.sandboxes / name
        self.pid = 0

        def start(config: JsonObject, given: list[int], log_fd: int) -> subprocess.Popen[bytes]:
            plan = Plan(
                template_files(),
                lambda data: template_arguments(paths, name, limits, config, data),
                [guest.INTERPRETER, "main.py"],
            )
            launched = launch(paths.bwrap, plan, survivor, pass_fds=given, stderr=log_fd)
            self.pid = launched.child
            return launched.process

        try:
            (self._directory / "workspace").mkdir(parents=True)
            prefix.Layer(self._directory / "packages", None)
            super().__init__(start, filters)
        except BaseException:
            remove_tree(self._directory)
            raise

    def has_ended(self, timeout: float = 0) -> bool:
        ended = super().has_ended(timeout)
        if ended:
            remove_tree(self._directory)
        return ended


class Templates:
    """The templates of a driver: the one that forks now, the next one, and those whose sandboxes live on. All methods
    are called on the thread that starts sandboxes."""

    def __init__(self, start: Callable[[], Template], forks: int) -> None:
        """`start` starts one, which makes `forks` supervisors."""
        self._start = start
        self._forks = forks
        self._current: Template | None = None
        self._next: Template | None = None
        self._retired: list[Template] = []
        self._failures = 0

    def prepare(self) -> None:
        """Have a template ready, or none if that can't be."""
        try:
            self._next = self._start()
            if not self._next.is_ready(_START_SECONDS):
                raise TemplateFailed("It takes too long.")
        except (OSError, SandboxFailed, TemplateFailed) as problem:
            self.give_up(str(problem))
        else:
            self._current, self._next = self._next, None

    @property
    def usable(self) -> bool:
        return self._failures < _MOST_FAILURES

    def give_up(self, why: str) -> None:
        """Have no templates any more. Sandboxes that have been forked live on."""
        self._failures = _MOST_FAILURES
        log.warning("no_templates", why=why, effect="each new sandbox starts a Python of its own, which takes longer")
        self._retire(self._current, self._next)
        self._current = self._next = None

    def take(self) -> Template | None:
        """A template for one more supervisor, to be released when that is there; None where there is no template at the
        moment."""
        self._advance()
        if self._current is not None:
            self._current.take()
        return self._current

    def drop(self, template: Template, problem: Exception) -> None:
        """A template has failed to fork."""
        if template is self._current:
            self._retire(template)
            self._current = None
            self.failed(problem)

    def succeeded(self) -> None:
        """A supervisor that was forked has begun its work."""
        if self.usable:
            self._failures = 0

    def failed(self, problem: Exception) -> None:
        """A template has failed, or a supervisor that was forked from it."""
        self._failures += 1
        if self._failures >= _MOST_FAILURES:
            self.give_up(str(problem))
        else:
            log.warning("template_failed", why=str(problem))

    def stop(self) -> None:
        """End all of them. No sandbox may be left."""
        self._failures = _MOST_FAILURES
        self._retire(self._current, self._next)
        self._current = self._next = None
        for template in self._retired:
            template.stop()
        self._retired.clear()

    def _advance(self) -> None:
        """Go on to the next template once it is ready, and start one where the present one has made enough."""
        self._retired = [template for template in self._retired if not template.has_ended()]
        try:
            if self._next is not None and self._next.is_ready():
                self._retire(self._current)
                self._current, self._next = self._next, None
            if self._next is None and self.usable and (self._current is None or self._current.forks >= self._forks):
                self._next = self._start()
        except (OSError, SandboxFailed, TemplateFailed) as problem:
            self._retire(self._next)
            self._next = None
            self.failed(problem)

    def _retire(self, *templates: Template | None) -> None:
        for template in templates:
            if template is not None:
                template.retire()
                self._retired.append(template)


@dataclass(frozen=True, slots=True)
class Held:
    """A sandbox's namespaces, made by bubblewrap, which is about to mount what it will see."""

    template: Template
    """Of which the supervisor is to be forked."""

    holder: Launched
    sock: socket.socket
    """Leads to the holder."""

    def release(self) -> None:
        """Release the template, and end the holder. The namespaces stay if a supervisor is in there."""
        self.template.release()
        self.sock.close()
        self.holder.process.end()


def hold(template: Template, plan: Plan, start: Callable[..., Launched]) -> Held:
    """Make the namespaces of a plan. `start` starts one as the sandbox's user; see launch.py for its arguments. Raises
    OSError, SandboxFailed."""
    with ExitStack() as undoing:
        undoing.callback(template.release)
        ours, theirs = socket.socketpair()
        undoing.callback(ours.close)
        with theirs:
            holder = start(Plan(plan.files, plan.options, [_HOLDER]), stdin=theirs.fileno(), stdout=theirs.fileno())
        undoing.pop_all()
    return Held(template, holder, ours)


def move_in(
    held: Held, config: JsonObject, *, uid: int | None, control: int, log: int, entrances: Callable[[], list[int]]
) -> Forked:
    """Have a supervisor with this configuration forked into namespaces, with `control` as its socket and `log` as its
    stderr. `entrances` opens the files by which it enters its control groups. The holder is gone then. Blocks; any
    thread may call it. Raises TemplateFailed."""
    opened: list[int] = []
    try:
        opened.append(pidfd := os.pidfd_open(held.holder.child))
        opened += (groups := entrances())
        held.sock.settimeout(_START_SECONDS)
        held.sock.send(b"Y")
        if held.sock.recv(1) != b"Y":  # it runs, so bubblewrap has made everything
            raise TemplateFailed("bubblewrap did not make the sandbox.")
        request: JsonObject = {
            "config": config,
            "uid": uid,
            "holder": held.holder.child,
            "read_only_proc": list(READ_ONLY_PROC),
            "workspace": guest.WORKSPACE,
            "descriptors": DESCRIPTORS,
        }
        return held.template.fork(request, [control, log, pidfd, *groups])
    except OSError as problem:
        raise TemplateFailed(str(problem)) from problem
    finally:
        held.release()
        for descriptor in opened:
            os.close(descriptor)
