"""The host's end of the control socket: runs one program at a time, and yields its events.

guest/supervisor.py is the other end, and has the wire format.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, get_args

from era.core.concurrency.meter import turn
from era.core.concurrency.streams import over_socket, write
from era.core.jsontext import MAX_STATE_BYTES
from era.core.program import EndCause, Ended, Output, Program, Stream
from era.drivers.guest import GUEST_LISTENERS, restarts_interpreter, with_library
from era.drivers.socket_broker import SocketBroker
from era.drivers.watchdog import Watchdog
from era.drivers.watching import Watching
from era.errors import SandboxFailed

STATE_LIMIT = MAX_STATE_BYTES
"""Bytes of the state file that are read at all. The core bounds what is kept: 1 MiB in compact form."""

_MOST_IN_FRAME = STATE_LIMIT + 1
"""Bytes."""

_MOST_TOLD = 64 << 10
"""The same for frames that say something, which are parsed in the event loop: all but output and the state file. The
longest has the path of a file, of 4 KiB, each byte of which may take 6 in JSON."""

_STREAMS: dict[bytes, Stream] = {b"O": "stdout", b"E": "stderr"}

_CAUSES: Mapping[str, EndCause] = {cause: cause for cause in get_args(EndCause.__value__)}
_MOST_SMALL, _MOST_LARGE, _MOST_SECONDS = (1 << 31) - 1, (1 << 63) - 1, 1e9
"""What numbers of a D frame may be, so that they can be kept."""


class Channel:
    """Frames to and from one supervisor."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, variables: Mapping[str, str]
    ) -> None:
        self._variables = variables
        self._reader = reader
        self._writer = writer
        self._held_back: list[bytes] | None = None
        """Frames that wait for the rest of a run to be sent."""

        self._watchdog: Watchdog | None = None
        """That of the run under way."""

        self._is_to_end = False
        """Whether the run under way was told to end, perhaps before it has a watchdog."""

        self._is_clean = True
        """Whether nothing of the last run is left inside, as far as its supervisor was to tell."""

    @property
    def alive(self) -> bool:
        return not self._writer.is_closing() and not self._reader.at_eof()

    @classmethod
    async def over(cls, sock: socket.socket, variables: Mapping[str, str]) -> Channel:
        """Take over a control socket. Every program has `variables` in its environment, unless its run has others."""
        reader, writer = await over_socket(sock, 1 << 18)
        return cls(reader, writer, variables)

    async def ready(self) -> dict[str, Any]:
        """Wait until the supervisor can take a program. Returns the isolation that it reports (guest/startup.py).
        Raises SandboxFailed."""
        kind, payload = await self._receive()
        if kind != b"Y":
            raise SandboxFailed("The sandbox did not start.")
        isolation: dict[str, Any] = json.loads(payload)
        return isolation

    async def run(
        self, program: Program, output_limit: int, watching: Watching, *, tells_when_clean: bool = False
    ) -> AsyncIterator[Output | Ended]:
        """Run one program. Yields its output, and `Ended` last, whose `sandbox_alive` is false if the sandbox died
        while it ran. `output_limit` is in bytes, of stdout and of stderr. `watching` is that of the sandbox.
        `tells_when_clean` is for `cleaned`.

        Raises SandboxFailed if the sandbox died before the program began.
        """
        self._is_to_end = False
        await self._send_run(program, output_limit, tells_when_clean=tells_when_clean)
        self._is_clean = not tells_when_clean
        state: bytes | None = None
        begun: float | None = None
        room = {"stdout": output_limit, "stderr": output_limit}
        watchdog = self._watchdog = Watchdog(program.timeout, watching, self._writer.transport.abort)
        if self._is_to_end:
            watchdog.bring_forward()
        try:
            while True:
                kind, payload = await self._receive()
                await turn()
                if kind == b"B":
                    if begun is None:
                        watchdog.begin()
                    begun = time.monotonic()
                elif kind in _STREAMS:
                    stream = _STREAMS[kind]
                    if not _has_room(room[stream], len(payload)):
                        raise SandboxFailed("The sandbox does not keep to its limits.")
                    room[stream] -= len(payload)
                    yield Output(stream, payload)
                elif kind == b"S":
                    state = payload
                elif kind == b"D":
                    yield _parse_ended(payload, program.state, state)
                    return
        except SandboxFailed:
            if begun is None:
                raise
            yield _died(time.monotonic() - begun)
        finally:
            watchdog.cancel()
            self._watchdog = None

    async def cleaned(self) -> None:
        """Wait until what the last run has left is removed, where its supervisor was to tell. Raises SandboxFailed."""
        while not self._is_clean:
            self._is_clean = (await self._receive())[0] == b"F"

    async def kill_run(self) -> None:
        self._end_run(b"K")

    async def stop_run(self) -> None:
        self._end_run(b"T")

    def join_run(self) -> None:
        """Say that processes are about to be started beside the run under way, if there is one."""
        self._send_kind(b"J")

    def close(self) -> None:
        self._writer.close()

    def _end_run(self, kind: bytes) -> None:
        self._send_kind(kind)
        self._is_to_end = True
        if self._watchdog is not None:
            self._watchdog.bring_forward()

    def _send_kind(self, kind: bytes) -> None:
        if self._held_back is not None:
            self._held_back.append(_frame(kind, b""))
            return
        with contextlib.suppress(OSError):  # the sandbox is gone, and with it the run
            write(self._writer, _frame(kind, b""))

    async def _send_run(self, program: Program, output_limit: int, *, tells_when_clean: bool) -> None:
        """Send an R frame, and behind it, unframed, the content whose lengths it says: environment and standard input
        once the program may begin. Raises SandboxFailed, and then the program has not begun."""
        environment = json.dumps(with_library({**self._variables, **program.certificates, **program.env})).encode()
        invocation = program.invocation
        header = {
            "files": [[path, len(content)] for path, content in program.files.items()],
            "state": len(program.state),
            "code": len(program.code),
            "environment": len(environment),
            "cold": any(map(restarts_interpreter, program.env)),
            "timeout": program.timeout,
            "output": output_limit,
            "state_limit": STATE_LIMIT,
            "ephemeral": program.ephemeral,
            "keeps_scratch": program.keeps_scratch,
            "tells_when_clean": tells_when_clean,
            "certificates": dict(program.certificates),
            "supervised": program.supervised,
            "args": list(invocation.args),
            "stdin": len(invocation.stdin),
            "cwd": invocation.cwd,
            "command": list(invocation.command),
        }
        parts = [_frame(b"R", json.dumps(header).encode()), *program.files.values(), program.state, program.code]
        self._held_back = []
        try:
            if program.may_begin is not None:
                self._send_part(b"".join(parts))
                parts.clear()
                await program.may_begin()  # what it raises, OSErrors too, says nothing about the sandbox
            self._send_part(b"".join([*parts, environment, invocation.stdin, *self._held_back]))
        finally:
            self._held_back = None

    def _send_part(self, part: bytes) -> None:
        """Send a part of a run. Raises SandboxFailed."""
        try:
            write(self._writer, part)
        except OSError as error:
            self.close()
            raise SandboxFailed("The sandbox died.") from error

    async def _receive(self) -> tuple[bytes, bytes]:
        """Receive a frame: its kind and payload. Raises SandboxFailed at the end of the stream."""
        try:
            head = await self._reader.readexactly(5)
            size = int.from_bytes(head[1:], "big")
            is_content = head[:1] in _STREAMS or head[:1] == b"S"
            if size > (_MOST_IN_FRAME if is_content else _MOST_TOLD):
                raise OSError(errno.EMSGSIZE, "a frame is too long")
            return head[:1], await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError) as error:
            self.close()
            raise SandboxFailed("The sandbox died.") from error


async def receive_guest_listeners(
    control: socket.socket, names: Iterable[str] = GUEST_LISTENERS
) -> tuple[dict[str, socket.socket], SocketBroker]:
    """Receive the guest listeners of these names, and the socket broker: the supervisor sends them first. Raises
    SandboxFailed."""
    expected = list(names)
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(control, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(control)
    message, descriptors, _, _ = socket.recv_fds(control, 5, len(expected) + 1, socket.MSG_CMSG_CLOEXEC)
    sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    if message[:1] not in (b"N", b"G") or len(sockets) != len(expected) + 1:
        for sock in sockets:
            sock.close()
        raise SandboxFailed("The sandbox did not start.")
    *guest_listeners, broker = sockets
    return dict(zip(expected, guest_listeners, strict=True)), SocketBroker(broker, can_supervise=message[:1] == b"G")


def _has_room(room: int, size: int) -> bool:
    """Whether so many bytes of output are within a run's bound. The supervisor sees to that, if it is what it was."""
    return size <= room


def _frame(kind: bytes, payload: bytes) -> bytes:
    return kind + len(payload).to_bytes(4, "big") + payload


def _parse_ended(payload: bytes, before: bytes, sent: bytes | None) -> Ended:
    """Parse the payload of a D frame. `before` is the state before the run, `sent` that of an S frame. Raises
    SandboxFailed."""
    try:
        report = json.loads(payload)
        return Ended(
            exit_code=int(_number(report["exit_code"], _MOST_SMALL)),
            cause=_CAUSES[report["cause"]],
            duration=float(_number(report["duration"], _MOST_SECONDS)),
            state={"missing": None, "same": before, "sent": sent}[report["state"]],
            state_problem=_text(report["state_problem"]),
            entry=_text(report["entry"]),
            disk_problem=_text(report["disk_problem"]),
            stdout_truncated=bool(report["stdout_truncated"]),
            stderr_truncated=bool(report["stderr_truncated"]),
            reaped=int(_number(report["reaped"], _MOST_SMALL)),
            peak_memory_bytes=_count_or_none(report["peak_memory_bytes"]),
            cpu_us=_count_or_none(report["cpu_us"]),
            sandbox_alive=True,
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SandboxFailed("The supervisor is not what it was.") from error


def _number(value: float, most: float) -> float:
    """A number of a D frame. Raises ValueError, TypeError."""
    if not 0 <= value <= most:  # also where it is NaN
        raise ValueError
    return value


def _count_or_none(value: float | None) -> int | None:
    return None if value is None else int(_number(value, _MOST_LARGE))


def _text(value: str | None) -> str | None:
    """A text of a D frame that can be kept. Raises ValueError, TypeError."""
    if value is not None and b"\0" in str.encode(value):
        raise ValueError
    return value


def _died(duration: float) -> Ended:
    """The end of a run whose sandbox died under it, after so many seconds."""
    return Ended(
        exit_code=137,
        cause="killed",
        duration=duration,
        state=None,
        state_problem="The sandbox died.",
        stdout_truncated=False,
        stderr_truncated=False,
        reaped=0,
        peak_memory_bytes=None,
        cpu_us=None,
        sandbox_alive=False,
    )
