"""The connections and datagrams of one run that has internet. connect_supervisor.py has the theory of operation."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import structlog

from era.core.allowlist import Address, Allowlist
from era.core.ports import SocketBroker
from era.network import seccomp_notify, splice
from era.network.accept_loop import accept, serve_protocol
from era.network.datagrams import DatagramRelay
from era.network.descriptors import RunDescriptors
from era.network.destinations import Destinations, Traffic
from era.network.dialing import CONNECT_SECONDS, connect, family
from era.network.dns import ADDRESS, PORT, Names, Turn
from era.network.interception import Interception
from era.network.loopback import LoopbackAddresses, Target, bind, set_drop_all
from era.network.policy import NOT_IN_ALLOWLIST, Policy
from era.network.seccomp_notify import Notification

log = structlog.get_logger()

MAX_CONNECTIONS = 256
"""Of one run at a time. One more gets ENOBUFS: a program that we kept waiting couldn't close another."""

MAX_ADDRESSES = 1024
"""That one run may reach."""

MAX_DATAGRAMS = 256
"""Destinations of datagrams that one run may have at a time; those that were used least lately are forgotten."""

_CONNECTION_DESCRIPTORS = 4
"""Of the service, that a connection takes: both its ends, and until it's made the program's own socket and a listener.
Where it passes much, pipes come besides (splice.py)."""

PATIENCE = 0.2
"""Seconds for which a non-blocking `connect` is held back until it's known whether somebody answers. After that the
program goes on, and its connection is made or refused at the kernel's next try once that's known: within a second, or
more if it has waited for more."""

_ARRIVE_SECONDS = 20.0
"""Within which a program arrives at a listener, once its destination has answered: at the kernel's next try. It makes
them ever more rarely, 1, 3, 7 and 15 seconds after the first, newer kernels after 7, 11 and 19; and a busy machine is
late besides. Meanwhile the connection counts as one of MAX_CONNECTIONS, whether its program is there still or not."""

_DRAIN_SECONDS = 0.5
"""For which the end of a run waits for what may be of processes beside it."""

_ANSWER_SECONDS = 0.1
"""The same for answers to datagrams."""

_BACKLOG = 512

_NAMESERVER = (ADDRESS, PORT)
_TCP_CLOSE = 7

type MakeServiceProtocol = Callable[[Callable[[int, int], None], Callable[[], None]], asyncio.Protocol]
"""Makes the protocol that serves one connection of a program to this service. The first argument is called with the
numbers of bytes that were received from the program and sent to it, the second when the connection has ended."""


type ConnectHandle = Callable[[int, Notification, Sequence[Target]], None]
"""See ConnectHandler."""


class _Connection:
    """A connection that is being made. `dialed` becomes the errno of connecting to the destination, 0 for success, and
    `client` the program's end."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.dialed: asyncio.Future[int] = loop.create_future()
        self.client: asyncio.Future[socket.socket] = loop.create_future()


class _DestinationListener:
    """A socket in the sandbox that stands for a destination, and the connections that are to arrive there."""

    def __init__(self, sock: socket.socket, target: Target) -> None:
        self.sock, self.target = sock, target
        self.waiting: deque[_Connection] = deque()
        self.drops_all = False


class RunConnections:
    """Everything that is open for one run, until `close`."""

    def __init__(
        self,
        broker: SocketBroker,
        loopback: LoopbackAddresses,
        policy: Policy,
        allow: Allowlist,
        destinations: Destinations,
        service_protocol: Callable[[Target], MakeServiceProtocol | None],
        descriptors: RunDescriptors,
        lookup_turn: Turn,
        undecided: ConnectHandle,
        interception: Interception | None = None,
    ) -> None:
        """`service_protocol` returns what serves a target that is this service itself, None for any other.
        `lookup_turn` is when the run's nameserver may ask. `undecided` gets the notifications that `close` finds
        unanswered. `interception` is that of a run with secrets."""
        self._undecided = undecided
        self._descriptors = descriptors
        self._service_protocol = service_protocol
        self.interception = interception
        self._loopback = loopback
        self._broker, self._policy, self._allow, self._destinations = broker, policy, allow, destinations
        self._loop = asyncio.get_running_loop()
        self._names = Names(
            allow, lambda name: self._refuse(name, PORT, None), descriptors, lookup_turn, loopback.names
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0
        """Of connections, those that are being made included."""

        self._addresses: set[Address] = set()
        """Those that the sandbox's loopback has for this run."""

        self._adding = asyncio.Lock()
        self._listeners: dict[Target, _DestinationListener] = {}
        self._displaced: set[_DestinationListener] = set()
        """Listeners at another port than their destination's, since the program listens there itself."""

        self._is_ending = False
        self._datagrams: dict[Target, Callable[[], None]] = {}
        """By target: the function that ends what serves it. Those that were used least lately come first."""

    def handle(self, notify_fd: int, notification: Notification, targets: Sequence[Target]) -> None:
        """See ConnectHandler."""
        if not notification.connects and all(target in self._datagrams for target in targets):
            seccomp_notify.continue_syscall(notify_fd, notification)
        else:
            self._begin(self._decide(notify_fd, notification, targets))

    async def close(self, *, shared: bool) -> None:
        """Close everything. No process of the run is alive any more. `shared`: what is open may be of processes beside
        it, since nobody can tell (gVisor). So what takes a moment only is let end."""
        self._is_ending = True
        if shared and self._datagrams:
            await asyncio.sleep(_ANSWER_SECONDS)
        until = self._loop.time() + _DRAIN_SECONDS
        while shared and (under_way := self._tasks | self._names.lookups) and (left := until - self._loop.time()) > 0:
            await asyncio.wait(under_way, timeout=left)
        listeners = {*self._listeners.values(), *self._displaced}
        awaited = {listener.target[0] for listener in listeners if listener.waiting} & self._addresses
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for listener in {*listeners, *self._listeners.values(), *self._displaced}:
            self._close(listener)
        for close in list(self._datagrams.values()):
            close()
        self._names.leave()
        kept = self._loopback.keep(awaited) if shared else set()
        await self._loopback.leave(self._addresses - kept)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that `close` cancels."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _decide(self, notify_fd: int, notification: Notification, targets: Sequence[Target]) -> None:
        """Answer a notification, or hand it on, whatever happens: else the program would wait for ever."""
        try:
            result = await self._prepare(notification, targets)
        except OSError as problem:
            result = problem.errno or errno.EIO
        except asyncio.CancelledError:
            self._undecided(notify_fd, notification, targets)
            raise
        except Exception:
            log.exception("connect_not_handled")
            result = errno.EIO
        if result is None:
            seccomp_notify.continue_syscall(notify_fd, notification)
        else:
            seccomp_notify.inject_result(notify_fd, notification, result)

    async def _prepare(self, notification: Notification, targets: Sequence[Target]) -> int | None:
        """Return None to continue the system call, otherwise the errno (or 0) to return from it. Raises OSError with
        the errno to return."""
        try:
            sock = seccomp_notify.duplicate_socket(notification.thread, notification.descriptor)
        except OSError as problem:
            if problem.errno in (errno.EPERM, errno.EACCES):
                raise
            return None  # it's no socket, and the kernel will say so
        with sock:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            if sock.type == socket.SOCK_STREAM and notification.connects:
                return None if _has_begun(sock) else await self._connect_stream(sock, targets[0])
            if sock.type == socket.SOCK_DGRAM and sock.proto == socket.IPPROTO_UDP:
                for target in targets:
                    displaced = await self._open_datagrams(target, connects=notification.syscall == "connect")
                    if displaced is not None and notification.syscall == "connect":
                        sock.connect(_as_sockaddr(displaced, sock))
                        return 0
                    if displaced is not None:
                        raise OSError(errno.EADDRINUSE, "the program has this port itself")
            return None

    def _judge(self, target: Target) -> str:
        """The name under which the target goes on record. Raises OSError where it may not be reached."""
        address, port = target
        host = self._names.of(address)
        rule = self._policy.refuses(address)
        if rule is None and not (
            self._allow.everything or self._names.allows(address) or self._allow.has_address(address)
        ):
            rule = NOT_IN_ALLOWLIST
        if rule is not None:
            self._refuse(host, port, address, rule.name)
            raise OSError(errno.EACCES, rule.why)
        return host

    def _refuse(self, host: str, port: int, address: Address | None, rule: str = NOT_IN_ALLOWLIST.name) -> None:
        self._destinations.note(host, port, address, rule)

    # -- connections --------------------------------------------------------------------------------------------

    async def _connect_stream(self, sock: socket.socket, target: Target) -> int | None:
        """Prepare a TCP connection of the program's `sock`. Returns and raises as `_prepare` does."""
        connection = _Connection()
        make_protocol = self._service_protocol(target)
        if target == _NAMESERVER:
            connection.dialed.set_result(0)
            self._begin_connection(self._serve_names(connection))
        elif make_protocol is not None:
            if not (self._allow.everything or self._allow.has_address(target[0])):
                self._refuse(str(target[0]), target[1], target[0])
                return errno.EACCES
            connection.dialed.set_result(0)
            self._begin_connection(self._serve_service(connection, make_protocol, target))
        elif not target[1]:
            return None
        else:
            host = self._judge(target)
            self._begin_connection(self._carry(connection, host, target))
            patience = CONNECT_SECONDS + 1 if os.get_blocking(sock.fileno()) else PATIENCE
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
            self._on_dialed(listener, connection)
        else:
            connection.dialed.add_done_callback(lambda _: self._on_dialed(listener, connection))
            self._update_filter(listener)
        if listener in self._displaced and target[0].is_loopback:
            self._give_up(listener, connection)  # the program has that port itself: this is its own affair
        elif listener in self._displaced:
            return await self._connect_to_listener(sock, listener)
        return None

    def _begin_connection(self, work: Coroutine[Any, Any, None]) -> None:
        """Start the task of a connection. Raises OSError (ENOBUFS) where the run has too many."""
        try:
            if self._count >= MAX_CONNECTIONS:
                raise OSError(errno.ENOBUFS, "too many connections")
            self._descriptors.take(_CONNECTION_DESCRIPTORS)
        except OSError:
            work.close()
            raise
        self._count += 1
        self._begin(work).add_done_callback(self._connection_ended)

    def _connection_ended(self, _: asyncio.Task[None]) -> None:
        self._count -= 1
        self._descriptors.give_back(_CONNECTION_DESCRIPTORS)

    async def _carry(self, connection: _Connection, host: str, target: Target) -> None:
        """Connect to a destination, wait for the program, which may never come, and pass on bytes both ways."""
        address, port = target
        server = None
        try:
            try:
                server = await connect(address, port)
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
            if self.interception is not None:

                def note(name: str | None, reason: str | None) -> Traffic:
                    return self._destinations.note(name or host, port, address, reason)

                names = self._names.for_(address)
                await self.interception.carry(connection.client, server, address, names, note)
                return
            traffic = self._destinations.note(host, port, address, None)
            await splice.join(await connection.client, server, traffic, self._descriptors)
        finally:
            if server is not None:
                server.close()
            _dismiss(connection)

    async def _serve_names(self, connection: _Connection) -> None:
        """Serve DNS over TCP."""
        try:
            with suppress(OSError, TimeoutError):
                await self._names.serve_stream(await connection.client)
        finally:
            _dismiss(connection)

    async def _serve_service(self, connection: _Connection, make_protocol: MakeServiceProtocol, target: Target) -> None:
        """Serve a program that calls this service, in this process."""
        try:
            client = await connection.client
            traffic = self._destinations.note(str(target[0]), target[1], target[0], None)

            def count(received: int, sent: int) -> None:
                traffic.sent += received  # as the program sees it
                traffic.received += sent

            await serve_protocol(client, lambda ended: make_protocol(count, ended))
        finally:
            _dismiss(connection)

    def _is_expected(self, connection: _Connection) -> bool:
        """Whether a program may still arrive for this connection."""
        return any(connection in listener.waiting for listener in (*self._listeners.values(), *self._displaced))

    async def _listener(self, target: Target) -> _DestinationListener:
        """The listener that stands for this destination. Raises OSError."""
        if target in self._listeners:
            return self._listeners[target]
        await self._add_address(target[0])
        sock = await self._broker.new_socket(family(target[0]), socket.SOCK_STREAM)
        if target in self._listeners:  # made meanwhile
            self._broker.give_back(sock)
            return self._listeners[target]
        listener = _DestinationListener(sock, target)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                bind(sock, target)
            except OSError as problem:
                if problem.errno != errno.EADDRINUSE:
                    raise
                # The program listens at this port itself. So we listen at another, and connect it to that.
                bind(sock, (target[0], 0))
                self._displaced.add(listener)
            else:
                self._listeners[target] = listener
            sock.listen(_BACKLOG)
        except BaseException:
            self._close(listener)
            raise
        self._watch(listener)
        return listener

    def _watch(self, listener: _DestinationListener) -> None:
        if listener.sock.fileno() >= 0:
            self._loop.add_reader(listener.sock, self._accept, listener)

    def _accept(self, listener: _DestinationListener) -> None:
        """Give an arriving program to the connection that has waited longest, and reset it where none waits."""
        client = accept(listener.sock, partial(self._watch, listener))
        if client is None:
            return
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

    def _on_dialed(self, listener: _DestinationListener, connection: _Connection) -> None:
        """On an errno give the connection up; on success give it up only if its program hasn't arrived in a while."""
        if connection.dialed.result():
            self._give_up(listener, connection)
        else:
            self._loop.call_later(_ARRIVE_SECONDS, self._give_up, listener, connection)
        self._update_filter(listener)

    def _update_filter(self, listener: _DestinationListener) -> None:
        """Drop what arrives at a listener as long as no destination of a waiting connection has answered. Which program
        gets which of these connections makes no difference: all lead to the same destination."""
        drop = not any(connection.dialed.done() for connection in listener.waiting)
        if listener.sock.fileno() >= 0 and listener.drops_all != drop:
            set_drop_all(listener.sock, enabled=drop)
            listener.drops_all = drop

    def _give_up(self, listener: _DestinationListener, connection: _Connection) -> None:
        """Expect a connection no longer: nobody answers at its destination, or its program is gone."""
        if connection in listener.waiting:
            listener.waiting.remove(connection)
            connection.client.cancel()
            if not listener.waiting:
                self._close(listener)

    def _close(self, listener: _DestinationListener) -> None:
        # Without waiting, since the program may want to listen at that port itself.
        if listener.sock.fileno() >= 0:
            self._loop.remove_reader(listener.sock)
            with suppress(OSError):  # it doesn't listen yet
                # The broker may not have closed its copy, which would go on to listen there.
                listener.sock.shutdown(socket.SHUT_RDWR)
            listener.sock.close()
        self._displaced.discard(listener)
        if self._listeners.get(listener.target) is listener:
            del self._listeners[listener.target]

    async def _connect_to_listener(self, sock: socket.socket, listener: _DestinationListener) -> int:
        """Connect a program's own socket to a displaced listener, as its `connect` would: the errno, 0 for success."""
        blocking = os.get_blocking(sock.fileno())
        flags = fcntl.fcntl(sock, fcntl.F_GETFL)
        fcntl.fcntl(sock, fcntl.F_SETFL, flags | os.O_NONBLOCK)
        try:
            error = sock.connect_ex(_as_sockaddr(listener.sock.getsockname()[:2], sock))
            if error == errno.EINPROGRESS and blocking:
                writable = asyncio.Event()
                self._loop.add_writer(sock, writable.set)
                try:
                    await asyncio.wait_for(writable.wait(), _ARRIVE_SECONDS)
                finally:
                    self._loop.remove_writer(sock)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return error
        finally:
            fcntl.fcntl(sock, fcntl.F_SETFL, flags)  # only now: uvloop has no sockets watched that block

    # -- datagrams ----------------------------------------------------------------------------------------------

    async def _open_datagrams(self, target: Target, *, connects: bool) -> tuple[str, int] | None:
        """Relay datagrams to a target, of a program that asks each time or, where it `connects`, never again. Returns
        None where it can send to the target itself, else where else it must send, since its port is bound. Raises
        OSError."""
        if target[0].is_loopback:
            return None  # only connections lead to this service
        if target in self._datagrams:
            self._datagrams[target] = self._datagrams.pop(target)
            return None
        host = str(ADDRESS) if target == _NAMESERVER else self._judge(target)
        await self._add_address(target[0])
        if not target[1]:
            return None  # programs connect like that to see which of their addresses would be used
        sock = await self._broker.new_socket(family(target[0]), socket.SOCK_DGRAM)
        if target in self._datagrams:
            self._broker.give_back(sock)
            return None
        if len(self._datagrams) >= MAX_DATAGRAMS:
            next(iter(self._datagrams.values()))()
        try:
            self._descriptors.take()
        except OSError:
            sock.close()
            raise
        try:
            is_bound = self._bind_datagrams(sock, target, connects=connects)
        except BaseException:
            sock.close()
            self._descriptors.give_back()
            raise
        if not is_bound:
            sock.close()
            self._descriptors.give_back()
            if target != _NAMESERVER:
                self._destinations.note(host, target[1], target[0], None)
            return None
        bound = sock.getsockname()[:2]
        self._serve_datagrams(sock, host, target, (target[0], bound[1]))
        return None if bound[1] == target[1] else bound

    def _bind_datagrams(self, sock: socket.socket, target: Target, *, connects: bool) -> bool:
        """Bind the socket to the target's address and port, or to another port where a program has that itself. Returns
        False where processes beside a run have it, or the run beside them, so that its answers come from there, too.
        Raises OSError."""
        try:
            bind(sock, target)
        except OSError as problem:
            if problem.errno != errno.EADDRINUSE:
                raise
            relayed = None if connects else self._loopback.relayed.get(target)
            if relayed is None:
                bind(sock, (target[0], 0))
            elif relayed():
                bind(sock, target)
            else:
                return False
        return True

    def _serve_datagrams(self, sock: socket.socket, host: str, target: Target, place: Target) -> None:
        """Relay what comes to the socket, which is bound to this place, to the target."""
        is_displaced = place != target
        if not is_displaced:
            self._loopback.relayed[target] = lambda: self._ends_relay(target)

        def ended() -> None:
            del self._datagrams[place]
            self._descriptors.give_back()
            if not is_displaced:
                del self._loopback.relayed[target]

        if target == _NAMESERVER:
            self._datagrams[place] = self._names.serve_datagrams(sock, ended)
        else:
            traffic = self._destinations.note(host, target[1], target[0], None)
            self._datagrams[place] = DatagramRelay(sock, target, traffic, self._descriptors, ended).close

    def _ends_relay(self, target: Target) -> bool:
        if self._is_ending:
            self._datagrams[target]()
        return self._is_ending

    # -- addresses ----------------------------------------------------------------------------------------------

    async def _add_address(self, address: Address) -> None:
        """Make an address one of the sandbox's own. Raises OSError."""
        async with self._adding:
            if address in self._addresses or address.is_loopback:
                return
            if len(self._addresses) >= MAX_ADDRESSES:
                raise OSError(errno.ENOBUFS, "too many addresses")
            await self._loopback.use(address, self._broker)
            self._addresses.add(address)


def _dismiss(connection: _Connection) -> None:
    """Close the program's end, whether it has arrived or arrives later."""
    if not connection.dialed.done():
        connection.dialed.set_result(errno.ECONNABORTED)
    if connection.client.done() and not connection.client.cancelled():
        connection.client.result().close()
    else:
        connection.client.cancel()


def _has_begun(sock: socket.socket) -> bool:
    """Whether a socket is connected or connecting. A program may call `connect` again to see how that goes, and gVisor
    does so whenever it has waited for it."""
    with suppress(OSError):  # not TCP
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_CLOSE
    return False


def _as_sockaddr(place: tuple[str, int], sock: socket.socket) -> tuple[str, int]:
    """An address and port as a socket of `sock`'s family takes them: IPv4-mapped for IPv6."""
    mapped = sock.family == socket.AF_INET6 and ":" not in place[0]
    return (f"::ffff:{place[0]}" if mapped else place[0]), place[1]
