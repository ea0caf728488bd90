"""What one run has open through its gate: addresses, listeners, connections, datagrams. See connect_supervisor.py."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from ipaddress import IPv4Address
from typing import Any

import structlog

from era.core.allowlist import Address, Allowlist
from era.core.ports import SocketBroker
from era.network import own, seccomp_notify, splice
from era.network.datagrams import Datagrams
from era.network.destinations import Destinations
from era.network.dialing import CONNECT_SECONDS, NO_RULE, connected
from era.network.dns import ADDRESS, PORT, Names
from era.network.http1 import Traffic
from era.network.interception import Interception
from era.network.policy import Policy
from era.network.seccomp_notify import Question, Target

log = structlog.get_logger()

MAX_CONNECTIONS = 256
"""Of one run at a time. One more gets ENOBUFS: a program that we kept waiting couldn't close another."""

MAX_ADDRESSES = 1024
"""That one run may reach."""

MAX_DATAGRAMS = 256
"""Destinations of datagrams that one run may have at a time; those that were used least lately are forgotten."""

PATIENCE = 0.2
"""Seconds that a program which doesn't want to wait is kept until it's known whether somebody answers. After that it
goes on, and its connection is made or refused at the kernel's next try once that's known: within a second, or more if
it has waited for more."""

_ARRIVE_SECONDS = 5.0
_BACKLOG = 512
_TRIES = 100
_FEW = 8
"""Addresses that are removed at once; the kernel takes its time for more."""

_NAMESERVER = (ADDRESS, PORT)
_TCP_CLOSE = 7


class _Connection:
    """One that is being made. `dialed` becomes its error, 0 for none, and `client` the program's end."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.dialed: asyncio.Future[int] = loop.create_future()
        self.client: asyncio.Future[socket.socket] = loop.create_future()


class _DestinationListener:
    """A socket in the sandbox that stands for a destination, and the connections that are to arrive there."""

    def __init__(self, sock: socket.socket, target: Target) -> None:
        self.sock, self.target = sock, target
        self.waiting: deque[_Connection] = deque()
        self.held = False


class RunConnections:
    """All that is open for one run, until `close`."""

    def __init__(
        self,
        broker: SocketBroker,
        policy: Policy,
        allow: Allowlist,
        destinations: Destinations,
        own: Callable[[Target], own.Place | None],
        interception: Interception | None = None,
    ) -> None:
        """`own` tells where this service is if that is what an address leads to. `interception` is that of a run with
        secrets."""
        self._own = own
        self._interception = interception
        self._broker, self._policy, self._allow, self._destinations = broker, policy, allow, destinations
        self._loop = asyncio.get_running_loop()
        self._names = Names(allow, lambda name: self._refuse(name, PORT, None))
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections = 0
        self._addresses: dict[Address, int] = {}
        self._probes: dict[int, socket.socket] = {}
        self._adding = asyncio.Lock()
        self._listeners: dict[Target, _DestinationListener] = {}
        self._others: set[_DestinationListener] = set()
        self._datagrams: dict[Target, Callable[[], None]] = {}

    def take(self, listener: int, asked: Question, wanted: Sequence[Target]) -> None:
        """Answer this question, in time."""
        if not asked.connects and all(one in self._datagrams for one in wanted):
            seccomp_notify.go_on(listener, asked)
        else:
            self._begin(self._answer(listener, asked, wanted))

    async def close(self) -> None:
        """End everything. What used it is dead."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for listener in [*self._listeners.values(), *self._others]:
            self._close(listener)
        for close in self._datagrams.values():
            close()
        if len(self._addresses) > _FEW:
            await asyncio.to_thread(self._remove_addresses)
        else:
            self._remove_addresses()
        for probe in self._probes.values():
            probe.close()

    def _remove_addresses(self) -> None:
        for address, serial in self._addresses.items():
            with suppress(OSError):  # gone with the sandbox
                seccomp_notify.remove_address(self._probes[address.version], address, serial)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, listener: int, asked: Question, wanted: Sequence[Target]) -> None:
        try:
            error = await self._open(asked, wanted)
        except OSError as problem:
            error = problem.errno or errno.EIO
        except Exception:
            log.exception("gate_failed")
            error = errno.EIO
        if error is None:
            seccomp_notify.go_on(listener, asked)
        else:
            seccomp_notify.answer(listener, asked, error)

    async def _open(self, asked: Question, wanted: Sequence[Target]) -> int | None:
        """Make ready for the kernel to go on. Or what to answer in its stead. Raises OSError as the answer."""
        try:
            sock = seccomp_notify.borrowed(asked.thread, asked.descriptor)
        except OSError as problem:
            if problem.errno in (errno.EPERM, errno.EACCES):
                raise
            return None  # it's no socket, and the kernel will say so
        with sock:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            if sock.type == socket.SOCK_STREAM and asked.connects:
                return None if _has_begun(sock) else await self._stream(sock, wanted[0])
            if sock.type == socket.SOCK_DGRAM and sock.proto == socket.IPPROTO_UDP:
                for one in wanted:
                    other = await self._datagram(one)
                    if other is not None and asked.call == "connect":
                        sock.connect(_written(other, sock))
                        return 0
                    if other is not None:
                        raise OSError(errno.EADDRINUSE, "the program has this port itself")
            return None

    def _judge(self, target: Target) -> str:
        """The name under which it's known. Raises OSError where it may not be reached."""
        address, port = target
        host = self._names.of(address)
        rule = self._policy.refuses(address)
        if rule is None and not (
            self._allow.everything or self._names.allows(address) or self._allow.has_address(address)
        ):
            rule = NO_RULE
        if rule is not None:
            self._refuse(host, port, address, rule.name)
            raise OSError(errno.EACCES, rule.why)
        return host

    def _refuse(self, host: str, port: int, address: Address | None, rule: str = NO_RULE.name) -> None:
        self._destinations.note(host, port, address, rule)

    # -- connections --------------------------------------------------------------------------------------------

    async def _stream(self, sock: socket.socket, target: Target) -> int | None:
        connection = _Connection()
        service = self._own(target)
        if target == _NAMESERVER:
            connection.dialed.set_result(0)
            self._begin(self._counted(self._asking(connection)))
        elif service is not None:
            if not (self._allow.everything or self._allow.has_address(target[0])):
                self._refuse(str(target[0]), target[1], target[0])
                return errno.EACCES
            connection.dialed.set_result(0)
            self._begin(self._counted(self._calling(connection, service, target)))
        elif not target[1]:
            return None
        else:
            host = self._judge(target)
            if self._connections >= MAX_CONNECTIONS:
                raise OSError(errno.ENOBUFS, "too many connections")
            self._begin(self._counted(self._carry(connection, host, target)))
            waits = os.get_blocking(sock.fileno())
            patience = CONNECT_SECONDS + 1 if waits else PATIENCE
            await asyncio.wait({connection.dialed}, timeout=patience)
            if connection.dialed.done() and (error := connection.dialed.result()):
                return error
        try:
            listener = await self._listener(target)
        except BaseException:
            connection.client.cancel()
            raise
        listener.waiting.append(connection)
        if connection.dialed.done():
            self._known(listener, connection)
        else:
            connection.dialed.add_done_callback(lambda _: self._known(listener, connection))
            self._hold(listener)
        if listener in self._others and target[0].is_loopback:
            self._give_up(listener, connection)  # the program has that port itself: this is its own affair
        elif listener in self._others:
            return await self._connect(sock, listener)
        return None

    async def _counted(self, work: Coroutine[Any, Any, None]) -> None:
        self._connections += 1
        try:
            await work
        finally:
            self._connections -= 1

    async def _carry(self, connection: _Connection, host: str, target: Target) -> None:
        """Connect to a destination, and pass on what is said. Not before the program is there, who may never come."""
        address, port = target
        server = None
        try:
            try:
                server = await connected(address, port)
            except OSError as problem:
                late = isinstance(problem, TimeoutError)
                self._destinations.note(host, port, address, "timed_out" if late else "unreachable")
                connection.dialed.set_result(errno.ETIMEDOUT if late else problem.errno or errno.ECONNREFUSED)
                with suppress(asyncio.CancelledError):
                    if not connection.client.done() and not self._is_expected(connection):
                        return
                    splice.reset(await connection.client)
                return
            connection.dialed.set_result(0)
            if self._interception is not None:

                def note(name: str | None, reason: str | None) -> Traffic:
                    return self._destinations.note(name or host, port, address, reason)

                names = self._names.for_(address)
                await self._interception.carry(connection.client, server, address, names, note)
                return
            traffic = self._destinations.note(host, port, address, None)
            await splice.join(await connection.client, server, traffic)
        finally:
            if server is not None:
                server.close()
            _dismiss(connection)

    async def _asking(self, connection: _Connection) -> None:
        """Answer a program that asks for names over TCP."""
        try:
            with suppress(OSError, TimeoutError):
                await self._names.serve_stream(await connection.client)
        finally:
            _dismiss(connection)

    async def _calling(self, connection: _Connection, service: own.Place, target: Target) -> None:
        """Answer a program that calls this service."""
        try:
            client = await connection.client
            traffic = self._destinations.note(str(target[0]), target[1], target[0], None)
            await own.serve(client, service, traffic)
        finally:
            _dismiss(connection)

    def _is_expected(self, connection: _Connection) -> bool:
        return any(connection in one.waiting for one in (*self._listeners.values(), *self._others))

    async def _listener(self, target: Target) -> _DestinationListener:
        """What stands for this destination. Raises OSError."""
        if target in self._listeners:
            return self._listeners[target]
        await self._add_address(target[0])
        sock = await self._broker.new_socket(_family(target[0]), socket.SOCK_STREAM)
        if target in self._listeners:  # by now
            self._broker.give_back(sock)
            return self._listeners[target]
        listener = _DestinationListener(sock, target)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                _bind(sock, target)
            except OSError as problem:
                if problem.errno != errno.EADDRINUSE:
                    raise
                # The program has a server at this port itself. So it's connected to another one, by us.
                _bind(sock, (target[0], 0))
                self._others.add(listener)
            else:
                self._listeners[target] = listener
            sock.listen(_BACKLOG)
        except BaseException:
            self._close(listener)
            raise
        self._loop.add_reader(sock, self._accept, listener)
        return listener

    def _accept(self, listener: _DestinationListener) -> None:
        try:
            client, _ = listener.sock.accept()
        except OSError:
            return
        client.setblocking(False)
        while listener.waiting:
            connection = listener.waiting.popleft()
            if not connection.client.done():
                connection.client.set_result(client)
                break
        else:
            splice.reset(client)
            client.close()
        if not listener.waiting:
            self._close(listener)

    def _known(self, listener: _DestinationListener, connection: _Connection) -> None:
        """It's known whether somebody answers: let the program in, or have it refused."""
        if connection.dialed.result():
            self._give_up(listener, connection)
        else:
            self._loop.call_later(_ARRIVE_SECONDS, self._give_up, listener, connection)
        self._hold(listener)

    def _hold(self, listener: _DestinationListener) -> None:
        """Let programs wait at a listener as long as it's known of none of their connections that somebody answers.
        Which of them gets which is all the same."""
        hold = not any(one.dialed.done() for one in listener.waiting)
        if listener.sock.fileno() >= 0 and listener.held != hold:
            seccomp_notify.hold(listener.sock, yes=hold)
            listener.held = hold

    def _give_up(self, listener: _DestinationListener, connection: _Connection) -> None:
        """Nobody came: it was killed, or has changed its mind."""
        if connection in listener.waiting:
            listener.waiting.remove(connection)
            connection.client.cancel()
            if not listener.waiting:
                self._close(listener)

    def _close(self, listener: _DestinationListener) -> None:
        # At once, since the program may want to listen at that port itself.
        if listener.sock.fileno() >= 0:
            self._loop.remove_reader(listener.sock)
            listener.sock.close()
        self._others.discard(listener)
        if self._listeners.get(listener.target) is listener:
            del self._listeners[listener.target]

    async def _connect(self, sock: socket.socket, listener: _DestinationListener) -> int:
        """Connect a program's own socket to where a listener is, as if it had done so itself."""
        waits = os.get_blocking(sock.fileno())
        settings = fcntl.fcntl(sock, fcntl.F_GETFL)
        fcntl.fcntl(sock, fcntl.F_SETFL, settings | os.O_NONBLOCK)
        try:
            error = sock.connect_ex(_written(listener.sock.getsockname()[:2], sock))
        finally:
            fcntl.fcntl(sock, fcntl.F_SETFL, settings)
        if error == errno.EINPROGRESS and waits:
            there = asyncio.Event()
            self._loop.add_writer(sock, there.set)
            try:
                await asyncio.wait_for(there.wait(), _ARRIVE_SECONDS)
            finally:
                self._loop.remove_writer(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return error

    # -- datagrams ----------------------------------------------------------------------------------------------

    async def _datagram(self, target: Target) -> tuple[str, int] | None:
        """Stand ready for datagrams. Another place where they must go, if it can't be this one. Raises OSError."""
        if target[0].is_loopback:
            return None  # only connections lead to this service
        if target in self._datagrams:
            self._datagrams[target] = self._datagrams.pop(target)
            return None
        host = str(ADDRESS) if target == _NAMESERVER else self._judge(target)
        await self._add_address(target[0])
        if not target[1]:
            return None  # programs connect like that to see which of their addresses would be used
        sock = await self._broker.new_socket(_family(target[0]), socket.SOCK_DGRAM)
        if target in self._datagrams:
            self._broker.give_back(sock)
            return None
        other = None
        try:
            try:
                _bind(sock, target)
            except OSError as problem:
                if problem.errno != errno.EADDRINUSE:
                    raise
                _bind(sock, (target[0], 0))
                other = sock.getsockname()[:2]
        except BaseException:
            sock.close()
            raise
        if len(self._datagrams) >= MAX_DATAGRAMS:
            self._datagrams.pop(next(iter(self._datagrams)))()
        if target == _NAMESERVER:
            close = self._names.serve_datagrams(sock)
        else:
            close = Datagrams(sock, target, self._destinations.note(host, target[1], target[0], None)).close
        self._datagrams[target if other is None else (target[0], other[1])] = close
        return other

    # -- addresses ----------------------------------------------------------------------------------------------

    async def _add_address(self, address: Address) -> None:
        """Make it one of the sandbox's own. Raises OSError."""
        async with self._adding:
            if address in self._addresses or address.is_loopback:
                return
            if len(self._addresses) >= MAX_ADDRESSES:
                raise OSError(errno.ENOBUFS, "too many addresses")
            if address.version not in self._probes:
                self._probes[address.version] = await self._broker.new_socket(_family(address), socket.SOCK_DGRAM)
            serial = len(self._addresses) + 1
            seccomp_notify.add_address(self._probes[address.version], address, serial)
            self._addresses[address] = serial
            if address.version == 6:
                await self._usable(address)

    async def _usable(self, address: Address) -> None:
        """Wait until the kernel takes a new IPv6 address for its own."""
        probe = await self._broker.new_socket(socket.AF_INET6, socket.SOCK_DGRAM)
        with probe:
            for _ in range(_TRIES):
                try:
                    probe.bind((str(address), 0))
                except OSError:
                    await asyncio.sleep(0.001)
                else:
                    return


def _dismiss(connection: _Connection) -> None:
    """Close the program's end, whether it's there or comes later."""
    if not connection.dialed.done():
        connection.dialed.set_result(errno.ECONNABORTED)
    if connection.client.done() and not connection.client.cancelled():
        connection.client.result().close()
    else:
        connection.client.cancel()


def _has_begun(sock: socket.socket) -> bool:
    """Whether it's connected already, or about to be. A program may try again to see how that goes, and gVisor does so
    whenever it has waited for it."""
    with suppress(OSError):  # it's no TCP
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_CLOSE
    return False


def _bind(sock: socket.socket, target: Target) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((str(target[0]), target[1]))


def _written(place: tuple[str, int], sock: socket.socket) -> tuple[str, int]:
    """An address as a socket of this family takes it."""
    mapped = sock.family == socket.AF_INET6 and ":" not in place[0]
    return (f"::ffff:{place[0]}" if mapped else place[0]), place[1]


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6
