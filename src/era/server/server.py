"""The HTTP server of the service's API: who may be served, how it starts, how it ends."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from era.api.hosts.other_hosts import CONNECT_SECONDS
from era.api.http import build
from era.api.protocol.protocol import Callers, Protocol
from era.api.routing.context import Context
from era.cluster.host_tls import HostTls
from era.server.preflight import is_loopback, listen
from era.settings import Settings

LAST_ANSWERS_SECONDS = 15
"""For callers to be told how runs ended that were still under way when the time to drain was over: these are killed,
and what they have done is committed first, which takes a slow disk some seconds."""

_FRAME_SECONDS = 1.0
"""How long a program of a background run that is to be ended may take to end a frame."""

_DESCRIPTORS = 1 << 16
_SWITCH_SECONDS = 0.0005
"""Seconds that the event loop waits for a thread that executes Python, such as one that parses a long body. It does so
each time that it wakes up, so with Python's default of 5 ms a run waited for 200 ms in all."""

_HANDSHAKE_SECONDS = CONNECT_SECONDS
"""Which is for how long another host waits for its end."""


class Signals:
    """The first SIGINT or SIGTERM, from the moment that this is made to the end of the process; later ones are ignored.

    Not by the event loop's own means, which give SIGINT back to Python when the loop is closed: another Ctrl-C would
    then show a traceback while the process ends.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._react: Callable[[], object] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def then(self, react: Callable[[], object]) -> None:
        """Call this in the running loop when one comes, at once if one has come, in the place of what was to be
        called."""
        self._react, self._loop = react, asyncio.get_running_loop()
        if self.received is not None:
            react()

    def ignore(self) -> None:
        """Ignore all that come from now on. Python itself would have them end the process while it cleans up."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, _frame: object) -> None:
        if self.received is None:
            self.received = number
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(lambda: self._react())


async def serve(
    settings: Settings,
    context: Context,
    say: Callable[[str], None],
    signals: Signals,
    listening: Sequence[socket.socket] = (),
) -> None:
    """Serve the API until a signal comes. `say` gets the lines for the person who started it. `listening` are sockets
    that listen where the settings say; without any they are made. Raises NotReady where they can't be, and where the
    other hosts of the cluster and this one don't trust each other, or one of them is at its address."""
    tls = context.hosts_tls
    if context.other_hosts is not None:
        await context.other_hosts.check_trusted()
    app = build(settings, context)
    _CountedProtocol.callers = Callers(descriptor_limit() // 4)
    _CountedProtocol.is_site = staticmethod(lambda host: context.sites.name(host) is not None)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http=_CountedProtocol,
        ws="none",
        timeout_graceful_shutdown=int(settings.drain_seconds) + LAST_ANSWERS_SECONDS,
    )

    async def ready(port: int, hosts_port: int | None) -> None:
        # Modules, routes and models stay: to look through them for garbage holds up all calls for a tenth of a second.
        gc.freeze()
        sys.setswitchinterval(_SWITCH_SECONDS)
        await context.serves_at(port, hosts_port, app)
        _announce(settings, context, port, say)

    hosts = None if tls is None else (tls, listen(settings.host, settings.cluster_port, "ERA_CLUSTER_PORT"))
    server = _Server(config, settings.drain_seconds, settings.unready_seconds, context, ready, hosts)
    signals.then(server.stop)
    try:
        await server.serve(list(listening) or listen(settings.host, settings.port))
    finally:
        gc.unfreeze()  # so that what is left is finalized as ever when the process ends


class _CountedProtocol(Protocol):
    """That of the connections that callers open."""


class _HostsProtocol(_CountedProtocol):
    """That of connections at the port for the other hosts of a cluster (host_tls.py)."""

    served_port = 0
    """That for everybody else, which is this server's as far as a request is concerned."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["from_host"] = True
        if self.scope["server"] is not None:
            self.scope["server"] = (self.scope["server"][0], self.served_port)


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to us, since it would end the process before our services are stopped, and that ends
    the runs still under way in time for their callers to be told."""

    def __init__(
        self,
        config: uvicorn.Config,
        drain_seconds: float,
        unready_seconds: float,
        context: Context,
        ready: Callable[[int, int | None], Awaitable[None]],
        hosts: tuple[HostTls, Sequence[socket.socket]] | None,
    ) -> None:
        """`ready` gets the port, once the server listens, and that for other hosts of the cluster, if there is one.
        `hosts` are the sockets for those, and what they are to show."""
        super().__init__(config)
        self._hosts = hosts
        self._drain_seconds = drain_seconds
        self._unready_seconds = unready_seconds
        self._context = context
        self._ready = ready

    def stop(self) -> None:
        """Answer that the service isn't ready, for as long as load balancers need to notice; then stop."""
        self._context.readiness.stop()
        asyncio.get_running_loop().call_later(self._unready_seconds, self._exit)

    def _exit(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._context.other_hosts is not None:
            self._context.other_hosts.connections.close_idle()
        ending = asyncio.create_task(self._end_runs())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_runs(self) -> None:
        """End background runs at once, and all others after the time to drain."""
        background = asyncio.create_task(self._end_background())
        await asyncio.sleep(self._drain_seconds)
        await background
        await self._context.end_runs()

    async def _end_background(self) -> None:
        """End background runs, of which some may be servers in the middle of a WebSocket's frame: those end it first,
        since nothing can be said to a caller within one."""
        connections = [each for each in self.server_state.connections if isinstance(each, Protocol)]
        leaving = [asyncio.create_task(each.left.wait()) for each in connections if each.left is not None]
        if leaving:
            _, late = await asyncio.wait(leaving, timeout=_FRAME_SECONDS)
            for each in late:
                each.cancel()
        await self._context.end_background(self._drain_seconds)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            try:
                await self._ready(port, await self._serve_hosts(port))
            except Exception:
                await self.shutdown(sockets)  # as it has begun to serve
                raise

    async def _serve_hosts(self, served_port: int) -> int | None:
        """Listen for other hosts, too; the port for that."""
        if self._hosts is None:
            return None
        tls, sockets = self._hosts
        _HostsProtocol.served_port = served_port
        state = {"server_state": self.server_state, "app_state": self.lifespan.state}
        for each in sockets:
            self.servers.append(
                await asyncio.get_running_loop().create_server(
                    lambda: _HostsProtocol(config=self.config, **state),
                    sock=each,
                    ssl=tls.server,
                    ssl_handshake_timeout=_HANDSHAKE_SECONDS,
                )
            )
        port: int = sockets[0].getsockname()[1]
        return port


def _announce(settings: Settings, context: Context, port: int, say: Callable[[str], None]) -> None:
    """Say where the service listens, where its data is, and who may use it."""
    isolation = context.isolation()
    say(f"ERA serves   {own_url(settings.host, port)}   (/docs tells how to call it)")
    say(f"data         {settings.data_dir.resolve()}")
    say(f"isolation    {isolation['summary']}")
    if settings.api_key is not None:
        say("access       with the API key")
    elif context.api_keys.required:
        say("access       with a stored key; start with ERA_API_KEY set to make or revoke any")
    elif is_loopback(settings.host):
        say("access       no API key: this machine only, and no web page in its browsers")
    else:
        say("access       ANYBODY who reaches this address can run code: there is no API key")


def own_url(host: str, port: int, scheme: str = "http") -> str:
    """The URL of a server that listens at this address."""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def hosts_url(settings: Settings, port: int, hosts_port: int | None) -> str:
    """The URL at which other hosts of the cluster call a server that has this port, and perhaps that one for them."""
    own = own_url(settings.host, port) if hosts_port is None else own_url(settings.host, hosts_port, "https")
    return settings.host_url or own


def fixed_hosts_url(settings: Settings) -> str | None:
    """The URL at which other hosts of the cluster will call this server, where that is known before it listens."""
    hosts_port = None if settings.cluster_certificate is None else settings.cluster_port
    is_known = settings.host_url is not None or (settings.port if hosts_port is None else hosts_port) != 0
    return hosts_url(settings, settings.port, hosts_port) if is_known else None


def raise_descriptor_limit() -> None:
    """Let this process hold as many descriptors as it may, up to what many runs with many connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def descriptor_limit() -> int:
    """How many descriptors this process may hold."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, _DESCRIPTORS)
