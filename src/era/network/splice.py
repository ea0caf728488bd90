"""Joining two TCP connections: the bytes of each go to the other.

Theory of operation. Both sockets are watched by the event loop itself, without streams in between. What is read is
written at once; what finds no room waits, and nothing more is read on that side until it has gone. A direction that has
passed much gets a pipe, through which splice(2) moves pages without copying them into this process.

uvloop watches a connection that has failed no longer: it reports that once, and what was received before is read first.
So after each piece it is asked whether the connection has failed, and if so the rest is read without being told.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from era.network.descriptors import RunDescriptors
from era.network.destinations import Traffic

IDLE_SECONDS = 300.0
"""After which a connection on which nothing moves is closed."""

_BUFFER = memoryview(bytearray(1 << 18))
"""Shared by all connections: nothing stays in it when the event loop goes on."""

_PIPE_AFTER = 1 << 20
"""Bytes that a direction has passed when it gets a pipe. The service then uses 0.31 s of processor time a GiB, without
pipes 0.54 s (medians of six in turns)."""

_PIPE_BYTES = 1 << 20
_LINGER_ZERO = struct.pack("ii", 1, 0)


async def join(
    client: socket.socket,
    server: socket.socket,
    traffic: Traffic,
    descriptors: RunDescriptors | None = None,
    first: bytes = b"",
) -> None:
    """Pass on bytes until both ends have sent all, one breaks off, or nothing has moved for IDLE_SECONDS. `traffic`
    counts them as the client's. Pipes are taken from `descriptors`, if there are any left; without that there are no
    pipes. `first` was read from the client already. The caller closes both sockets."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()
    moved = loop.time()

    def sent(count: int) -> None:
        nonlocal moved
        traffic.sent += count
        moved = loop.time()

    def received(count: int) -> None:
        nonlocal moved
        traffic.received += count
        moved = loop.time()

    def ended(*, broken: bool) -> None:
        if (broken or all(direction.over for direction in both)) and not over.done():
            if broken:
                reset(client)
                reset(server)
            over.set_result(None)

    both = (
        _Direction(client, server, sent, ended, descriptors),
        _Direction(server, client, received, ended, descriptors),
    )
    try:
        sent(len(first))
        both[0].begin(first)
        both[1].begin()
        while not over.done():
            left = moved + IDLE_SECONDS - loop.time()
            if left <= 0:
                break
            await asyncio.wait({over}, timeout=left)
    finally:
        for direction in both:
            direction.close()


def reset(sock: socket.socket | None) -> None:
    """Send a reset instead of an orderly end when the socket is closed. None is that of a connection which is already:
    transports have no other then."""
    if sock is not None:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)


class _Direction:
    """Passes on bytes from `source` to `sink`."""

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        count: Callable[[int], None],
        ended: Callable[..., None],
        descriptors: RunDescriptors | None,
    ) -> None:
        """`count` is called with numbers of bytes, `ended` at the end with `broken`: the source has failed."""
        self.over = False
        self._source, self._sink, self._count, self._ended = source, sink, count, ended
        self._descriptors = descriptors
        self._loop = asyncio.get_running_loop()
        self._waiting: bytes | memoryview = b""
        self._passed = 0
        self._pipe: tuple[int, int] | None = None
        self._in_pipe = 0
        self._reading = self._writing = False
        self._failed = select.poll()
        self._failed.register(source, 0)  # which is told of failures all the same

    def begin(self, waiting: bytes = b"") -> None:
        self._waiting = waiting
        self._writable()

    def close(self) -> None:
        self._watch()
        if self._pipe is not None:
            os.close(self._pipe[0])
            os.close(self._pipe[1])
            self._pipe = None
            if self._descriptors is not None:
                self._descriptors.give_back(2)

    def _watch(self, *, reading: bool = False, writing: bool = False) -> None:
        """Set which readiness events the event loop reports, so that at most one side is waited for."""
        if reading != self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(self._source, self._readable)
            else:
                self._loop.remove_reader(self._source)
        if writing != self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._sink, self._writable)
            else:
                self._loop.remove_writer(self._sink)

    def _readable(self) -> None:
        """Read a piece and write it on. After _PIPE_AFTER bytes pieces go through a pipe, uncopied."""
        if self._pipe is None and self._passed > _PIPE_AFTER:
            self._open_pipe()
        try:
            count = self._read()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._end(broken=True)
            return
        if not count:
            with suppress(OSError):
                self._sink.shutdown(socket.SHUT_WR)
            self._end()
            return
        self._passed += count
        self._count(count)
        self._writable()
        if self._reading and self._failed.poll(0):
            self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if self._reading:
            self._readable()

    def _read(self) -> int:
        """Read a piece into the pipe, if there is one; how many bytes it has, 0 at the end. Raises OSError."""
        if self._pipe is not None:
            with suppress(BlockingIOError):
                self._in_pipe = os.splice(self._source.fileno(), self._pipe[1], _PIPE_BYTES)
            if self._in_pipe:
                return self._in_pipe
            # Or there is an urgent byte, in front of which splice stops as if nothing were there.
        count = self._source.recv_into(_BUFFER)
        self._waiting = _BUFFER[:count]
        return count

    def _open_pipe(self) -> None:
        """Have a pipe from here on, if there are descriptors left for one: else it goes on as before."""
        if self._descriptors is None or not self._descriptors.take_free(2):
            return
        try:
            self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self._descriptors.give_back(2)
            return
        with suppress(OSError):  # this user's pipes have no more room
            fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def _writable(self) -> None:
        """Write what was read; when all of it is written, go on to read."""
        try:
            if self._pipe is not None and self._in_pipe:
                while self._in_pipe:
                    self._in_pipe -= os.splice(self._pipe[0], self._sink.fileno(), self._in_pipe)
            else:
                while self._waiting:
                    self._waiting = self._waiting[self._sink.send(self._waiting) :]
        except (BlockingIOError, InterruptedError):
            self._waiting = bytes(self._waiting)
            self._watch(writing=True)
        except OSError:
            self._end()  # it takes no more; what it has sent is still to be passed on
        else:
            self._watch(reading=True)

    def _end(self, *, broken: bool = False) -> None:
        self.over = True
        self._waiting = b""
        self.close()
        self._ended(broken=broken)
