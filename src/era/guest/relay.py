"""The relay: connections between programs in here and the host, for sandboxes that can't hand a socket out (gVisor).

Theory of operation
===================

gVisor's sockets are its own, and none of them can be given to the host. But the host can give one of its own in here.
So a door's port is listened on in here, by PID 1. For each connection that a program makes, the host is told that one
waits; when it wants to have it, it makes a pair of sockets and hands one of them in, and from then on bytes are passed
between the two. A connection from the host to a port in here goes the other way round.

*Who may.* All of this is in PID 1: `kill(-1)` doesn't reach it, its memory and its descriptors are closed to programs,
and whoever kills it ends the sandbox.

*One connection's matter.* Each direction has one buffer, and its source is read only when that is empty. So what isn't
read at one end isn't read at the other either, and a connection that stands still takes 64 KiB and nobody's time. All
together have a number; beyond that more wait at the door.

*Only during runs.* Between them nobody is there who could connect or be connected to, so nothing is looked at then.

*Nothing stays.* When a run ends, so do its connections. Buffers are zeroed then, since later spares inherit the
supervisor's memory.

Messages, both ways over one stream socket: a kind (1 byte), a serial (1 byte), a port (2 bytes, big endian).
  host to guest:  L  listen on the door at this port
                  S  stop that; whoever waits there is turned away
                  D  with a descriptor: the host's end for the connection that waits longest at this door
                  C  with a descriptor: the host's end of a connection to this port, which may be any
  guest to host:  A  a connection waits at this door, with the serial of the L that opened it
                  K, F  the C with this serial has, has not come about
"""

from __future__ import annotations

import _socket  # not socket, which takes as long to import as all the rest
import select
import sys
import time

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from collections.abc import Iterable

MESSAGE = 4
CHUNK = 1 << 16
ZEROS = bytes(CHUNK)
TURN = 4  # chunks that one direction may pass on before others have their turn
PATIENCE = 0.2  # seconds that a run's end may wait for what its programs had written to be taken
MAX_CONNECTIONS = 128  # that are open, wait or are being made
BACKLOG = 128
GONE = select.EPOLLHUP | select.EPOLLERR


class Flow:
    """One direction of a connection. Over when its source has ended and all of it has been written."""

    def __init__(self, source: _socket.socket, sink: _socket.socket) -> None:
        self.source, self.sink = source, sink
        self.buffer = bytearray(CHUNK)
        self.begin = self.end = 0
        self.over = False

    def step(self) -> None:
        """Pass on what there is, as far as it goes at once. Raises OSError where one of the two ends is gone."""
        view = memoryview(self.buffer)
        for _ in range(TURN):
            try:
                if self.begin == self.end:
                    self.begin, self.end = 0, self.source.recv_into(view)
                    if not self.end:
                        self.over = True
                        self.sink.shutdown(_socket.SHUT_WR)
                        return
                self.begin += self.sink.send(view[self.begin : self.end])
            except BlockingIOError:
                return


class Connection:
    """A program's socket, joined with the host's."""

    def __init__(self, inner: _socket.socket, outer: _socket.socket) -> None:
        self.inner, self.outer = inner, outer
        self.flows = (Flow(inner, outer), Flow(outer, inner))
        self.watched: dict[int, int] = {}

    def step(self, fd: int, seen: int) -> bool:
        """Do what can be done after `seen` was seen of `fd`. False when the connection is over."""
        try:
            for flow in self.flows:
                if not flow.over:
                    flow.step()
                elif seen & GONE and fd == flow.source.fileno():
                    return False  # it had ended, and now takes nothing any more either
        except OSError:
            return False
        return not all(flow.over for flow in self.flows)

    def wanted(self) -> dict[int, int]:
        """What to wait for, by descriptor. One of which nothing is wanted is left out, since a hangup is always told,
        unless it has ended: then that is news."""
        found: dict[int, int] = {}
        for flow in self.flows:
            source, sink = flow.source.fileno(), flow.sink.fileno()
            if flow.over:
                found[source] = found.get(source, 0)
            elif flow.begin == flow.end:
                found[source] = found.get(source, 0) | select.EPOLLIN
            else:
                found[sink] = found.get(sink, 0) | select.EPOLLOUT
        return found

    def close(self) -> None:
        for flow in self.flows:
            flow.buffer[:] = ZEROS
        self.inner.close()
        self.outer.close()


class Door:
    """A port of ours, on which we listen when the host says so."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.socket = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        # Or what is left of connections to an earlier run's proxy would be in the way of the next one's.
        self.socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.is_open = False
        self.serial = 0
        self.waiting: list[_socket.socket] = []


class Relay:
    """Doors at `ports` and all connections. `fd` can be read when there is something to do."""

    def __init__(self, channel: int, ports: Iterable[int]) -> None:
        self.channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, channel)
        self.channel.setblocking(False)
        self.doors = {port: Door(port) for port in ports}
        self.listeners = {door.socket.fileno(): door for door in self.doors.values()}
        self.connections: dict[int, Connection] = {}  # by both of their descriptors
        self.asked: dict[int, tuple[_socket.socket, _socket.socket, int]] = {}  # being made; inner, outer, serial
        self.listening: set[int] = set()
        self.epoll = select.epoll()
        self.fd = self.epoll.fileno()
        self.epoll.register(self.channel.fileno(), select.EPOLLIN)

    # -- what the supervisor calls ----------------------------------------------------------------------------------

    def receive(self) -> None:
        """Do what the host has said so far. What it sent before something else, which has come, is among that."""
        while True:
            try:
                # Not more at once: no two messages may come with their descriptors mixed.
                message, ancillary, _, _ = self.channel.recvmsg(MESSAGE, _socket.CMSG_SPACE(4))
            except BlockingIOError:
                return
            if len(message) < MESSAGE:
                raise EOFError("the host is gone")
            handed = [int.from_bytes(data[:4], sys.byteorder) for _, _, data in ancillary]
            outer = None
            if handed:
                outer = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, handed[0])
                outer.setblocking(False)
            self.told(message[:1], message[1], int.from_bytes(message[2:], "big"), outer)
            self.look_at_doors()

    def work(self) -> None:
        """Pass on what can be passed on without waiting."""
        for fd, seen in self.epoll.poll(0):
            if fd in self.listeners:
                self.accept(self.listeners[fd])
            elif fd in self.asked:
                self.made(fd)
            elif (connection := self.connections.get(fd)) is not None:
                self.step(connection, fd, seen)
            elif fd == self.channel.fileno():
                self.receive()
        self.look_at_doors()

    def end_run(self) -> None:
        """Close every connection, once programs are dead. What these had written is passed on still, if it is taken."""
        patience = time.monotonic() + PATIENCE
        while True:
            for connection in set(self.connections.values()):
                self.step(connection, -1, 0)
                if connection.flows[0].over and connection.watched:
                    self.end(connection)
            if not self.connections or (left := patience - time.monotonic()) <= 0:
                break
            self.epoll.poll(left)
        for connection in set(self.connections.values()):
            self.end(connection)
        for fd in list(self.asked):
            self.give_up(fd)
        for door in self.doors.values():
            self.turn_away(door)

    def forget(self) -> None:
        """In a forked child: drop what is here without touching descriptors, whose numbers will be others'."""
        self.epoll.close()
        pairs = [(one.inner, one.outer) for one in self.connections.values()]
        pairs += [(inner, outer) for inner, outer, _ in self.asked.values()]
        doors = [sock for door in self.doors.values() for sock in (door.socket, *door.waiting)]
        for sock in (self.channel, *doors, *(sock for pair in pairs for sock in pair)):
            sock.detach()

    # -- the host's wishes --------------------------------------------------------------------------------------------

    def say(self, kind: bytes, serial: int, port: int) -> None:
        self.channel.send(kind + bytes((serial,)) + port.to_bytes(2, "big"))

    def told(self, kind: bytes, serial: int, port: int, outer: _socket.socket | None) -> None:
        if kind == b"L":
            door = self.doors[port]
            door.serial, door.is_open = serial, True
            door.socket.listen(BACKLOG)
        elif kind == b"S":
            door = self.doors[port]
            self.turn_away(door)
            door.is_open = False
            try:
                door.socket.shutdown(_socket.SHUT_RDWR)  # the port stays ours
            except OSError:
                pass
        elif kind == b"D" and outer is not None:
            waiting = self.doors[port].waiting
            if waiting:
                self.join(waiting.pop(0), outer)
            else:
                outer.close()  # who waited was turned away meanwhile
        elif kind == b"C" and outer is not None:
            self.connect(serial, port, outer)
        else:
            raise ValueError(f"the host said {kind!r}")

    def connect(self, serial: int, port: int, outer: _socket.socket) -> None:
        inner = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        inner.setblocking(False)
        fd = inner.fileno()
        self.asked[fd] = inner, outer, serial
        try:
            if self.count() > MAX_CONNECTIONS:
                raise ConnectionRefusedError
            inner.connect(("127.0.0.1", port))
        except BlockingIOError:
            self.epoll.register(fd, select.EPOLLOUT)
        except OSError:
            self.give_up(fd)
        else:
            self.epoll.register(fd, select.EPOLLOUT)

    def made(self, fd: int) -> None:
        """A connection that the host asked for has come about, or has failed."""
        if self.asked[fd][0].getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR):
            self.give_up(fd)
            return
        inner, outer, serial = self.asked.pop(fd)
        self.epoll.unregister(fd)
        self.say(b"K", serial, 0)
        self.join(inner, outer)

    def give_up(self, fd: int) -> None:
        inner, outer, serial = self.asked.pop(fd)
        inner.close()  # which takes it out of the epoll, too
        outer.close()
        self.say(b"F", serial, 0)

    # -- programs' wishes ---------------------------------------------------------------------------------------------

    def count(self) -> int:
        waiting = sum(len(door.waiting) for door in self.doors.values())
        return len(self.connections) // 2 + len(self.asked) + waiting

    def look_at_doors(self) -> None:
        """Wait at the open doors for connections if there is room for one."""
        room = self.count() < MAX_CONNECTIONS
        for fd, door in self.listeners.items():
            if (room and door.is_open) != (fd in self.listening):
                if fd in self.listening:
                    self.listening.remove(fd)
                    self.epoll.unregister(fd)
                else:
                    self.listening.add(fd)
                    self.epoll.register(fd, select.EPOLLIN)

    def accept(self, door: Door) -> None:
        try:
            fd, _ = door.socket._accept()  # type: ignore[attr-defined]  # it is what socket.accept() is made of
        except OSError:
            return  # whoever wanted in has gone
        inner = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0, fd)
        inner.setblocking(False)
        door.waiting.append(inner)
        self.say(b"A", door.serial, door.port)

    def turn_away(self, door: Door) -> None:
        for inner in door.waiting:
            inner.close()
        door.waiting.clear()

    # -- passing on ---------------------------------------------------------------------------------------------------

    def join(self, inner: _socket.socket, outer: _socket.socket) -> None:
        inner.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        connection = Connection(inner, outer)
        self.connections[inner.fileno()] = self.connections[outer.fileno()] = connection
        self.watch(connection)

    def step(self, connection: Connection, fd: int, seen: int) -> None:
        if connection.step(fd, seen):
            self.watch(connection)
        else:
            self.end(connection)

    def watch(self, connection: Connection) -> None:
        wanted = connection.wanted()
        for fd in connection.watched.keys() - wanted.keys():
            self.epoll.unregister(fd)
        for fd, events in wanted.items():
            if fd not in connection.watched:
                self.epoll.register(fd, events)
            elif events != connection.watched[fd]:
                self.epoll.modify(fd, events)
        connection.watched = wanted

    def end(self, connection: Connection) -> None:
        for fd in connection.watched:
            self.epoll.unregister(fd)
        connection.watched = {}
        del self.connections[connection.inner.fileno()], self.connections[connection.outer.fileno()]
        connection.close()
