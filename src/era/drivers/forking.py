"""Processes of ours that fork supervisors into sandboxes, as guest/template.py says: the service's end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from era.core.models import JsonObject
from era.drivers import processes

_FORK_SECONDS = 20.0


class TemplateFailed(Exception):
    """A supervisor can't be forked."""


@dataclass(frozen=True, slots=True)
class Forked:
    """A supervisor, PID 1 of a namespace."""

    pid: int
    pidfd: int

    def kill(self) -> None:
        """Kill it, and everything in its namespace."""
        with suppress(OSError):  # it has ended
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def ended(self) -> None:
        """Wait until nothing of it is left. May be called once."""
        await asyncio.to_thread(processes.wait_for, self.pidfd)
        os.close(self.pidfd)


class Forker:
    """Such a process. All methods but `fork` and `release` are called on the thread that starts sandboxes."""

    def __init__(
        self, start: Callable[[JsonObject, list[int], int], subprocess.Popen[bytes]], filters: tuple[bytes, ...]
    ) -> None:
        """Start it: `start` gets its configuration, descriptors that it has to have, and one for its stderr. Raises
        OSError, SandboxFailed."""
        self.forks = 0
        """So many supervisors it has been taken for."""

        self._lock = threading.Lock()
        self._awaited = 0
        """So many of those it hasn't made yet."""

        self._is_retired = False
        with ExitStack() as undoing:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undoing.callback(self._socket.close)
            with theirs:
                self._log = os.memfd_create("era-template-log")
                undoing.callback(os.close, self._log)
                with _filled(filters) as given:
                    config: JsonObject = {"template": theirs.fileno(), "filters": given, "cache": None}
                    self._process = start(config, [theirs.fileno(), *given], self._log)
            undoing.pop_all()

    def is_ready(self, timeout: float = 0) -> bool:
        """Whether it can fork. Raises TemplateFailed where it has ended instead."""
        self._socket.settimeout(timeout)
        try:
            message = self._socket.recv(16)
        except (BlockingIOError, TimeoutError):
            return False
        except OSError as problem:
            raise TemplateFailed(str(problem)) from problem
        if message != b"Y":
            raise TemplateFailed(os.pread(self._log, 4096, 0).decode(errors="replace").strip() or "It has ended.")
        return True

    def take(self) -> None:
        """Announce a call of `release`, and of `fork` before that."""
        self.forks += 1
        with self._lock:
            self._awaited += 1

    def release(self) -> None:
        with self._lock:
            self._awaited -= 1
            if self._is_retired and not self._awaited:
                self._socket.close()

    def fork(self, request: JsonObject, descriptors: list[int]) -> Forked:
        """Make a supervisor in the namespaces that `request` and `descriptors` describe; see guest/template.py. Raises
        TemplateFailed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            try:
                self._socket.settimeout(_FORK_SECONDS)
                socket.send_fds(self._socket, [b"F"], [theirs.fileno()])
                theirs.close()
                ours.settimeout(_FORK_SECONDS)
                socket.send_fds(ours, [json.dumps(request).encode()], descriptors)
                answer, received, _, _ = socket.recv_fds(ours, 4096, 1, socket.MSG_CMSG_CLOEXEC)
            except OSError as problem:
                raise TemplateFailed(str(problem)) from problem
        if answer[:1] == b"Y" and not received:  # no descriptor was free
            with suppress(OSError):
                # It would share its sandbox with the one made instead. It has just begun, so the number is its own.
                os.kill(int(answer[1:]), signal.SIGKILL)
            raise TemplateFailed("There is no descriptor for its pidfd.")
        if answer[:1] != b"Y":
            for descriptor in received:
                os.close(descriptor)
            raise TemplateFailed(answer[1:].decode(errors="replace") or "It has ended.")
        return Forked(int(answer[1:]), received[0])

    def retire(self) -> None:
        """Let it end with the last of its sandboxes."""
        with self._lock:
            self._is_retired = True
            if not self._awaited:
                self._socket.close()

    def has_ended(self, timeout: float = 0) -> bool:
        """Whether it has ended; then nothing of it is left. It ends only once it is retired."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        os.close(self._log)
        return True

    def stop(self) -> None:
        """End it. Nothing that it has forked may be left."""
        self.retire()
        if not self.has_ended(1):
            self.kill()
            self.has_ended(_FORK_SECONDS)

    def kill(self) -> None:
        """End it, and all that it has forked."""
        self._process.kill()


@contextmanager
def _filled(contents: tuple[bytes, ...]) -> Iterator[list[int]]:
    """Descriptors from which these can be read, each of which must fit into a pipe."""
    with ExitStack() as stack:
        given = []
        for content in contents:
            read, write = os.pipe()
            stack.callback(os.close, read)
            os.write(write, content)
            os.close(write)
            given.append(read)
        yield given
