"""The hop: a call that has reached a host which isn't the session's home, passed on to the home.

Theory of operation. Any host of a cluster takes any call. The guard checks it there, as on a single server; then
HomeForwarding finds out where the session is at home and, if that is another host, writes the request to it and its
answer back, both streamed (exchange.py): plain calls, event streams, uploads and WebSockets alike. The home does
everything else, so there is no second way to do anything.

Hosts trust each other by a secret that all have, and that nobody is told (hop.py). Programs in sandboxes reach no host.
Whoever can read the connections between hosts can read what is passed on, unless that is over TLS (host_tls.py).

A call is passed on once. A host that gets one and isn't the home refuses it, rather than pass it on; but for a session
that has just moved from there (core/cluster/moves.py), after which it is sent once more.

Until a request is written, nothing has happened, and the call waits until its session's host answers or is known to be
dead, when this host takes the session. After that nobody knows whether the host has done it: so a call is told when its
host dies, and made again only if it asked for something to be read.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import h11
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era.api.hosts.hop import HEADER, Hop, target_of
from era.api.hosts.other_hosts import CONNECT_SECONDS, Answering, Connection, HungUp, NotTrusted, OtherHosts
from era.api.protocol.answers import Answer
from era.api.protocol.dead_peers import cut_off
from era.api.protocol.exchange import Exchange, reason
from era.api.protocol.protocol import Protocol
from era.core.cluster.homes import Homes, Host
from era.core.cluster.moves import Moves
from era.core.models import OwnedId
from era.core.owners.api_keys import Caller
from era.errors import BadRequest, EraError, HomeLost, HomeUnreachable, SessionMoved, TooSlow, Unauthorized
from era.wire.sessions import SESSION_ID

log = structlog.get_logger()

_STOP_SECONDS = 40.0
"""What a host takes to end, once the time for its runs is over: it answers the last callers, and records the ends of
processes, which may take most of that on a slow disk (live_sessions.py)."""

_LOOK_SECONDS = 0.25
_SILENT_SECONDS = 360.0
"""For which a WebSocket may be silent. Its home would have ended or pinged it: so its caller reads nothing."""

_SESSION = re.compile(rf"/api/sessions/({SESSION_ID[1:-1]})(/.*)?", re.DOTALL)
_PUBLIC = re.compile(rf"/proxy/({SESSION_ID[1:-1]})(/.*)?", re.DOTALL)
_ROOM = re.compile(r"/api/sessions/[^/]+/(run|stream|processes|terminal)")
"""Calls for which a session needs a sandbox."""

_RUN = ("run", "stream")
"""Those of them that wait for the session's turn."""

_FOLLOWS = re.compile(r"/api/sessions/[^/]+/(.*/)?(events|watch|attach|terminal)", re.DOTALL)
"""Calls whose answers go on for as long as something lives here."""

_WATCH = re.compile(r"/api/sessions/[^/]+/watch")
_LINK = re.compile(r"/links/([^/]+)")
_ANSWERED = re.compile(r"/(api|mcp|proxy|links)(/|$)")
"""Paths at which a host without a lease answers nothing."""

_OWN = frozenset({"connection", "keep-alive", "te", "trailer", "upgrade", "proxy-connection", "expect"})
_NOT_ASKED_ON = _OWN | {"content-length", "transfer-encoding", HEADER.decode()}
"""Headers of a request that are between two ends of one connection, or that are made anew."""

_NOT_ANSWERED_ON = _NOT_ASKED_ON | {"date", "x-request-id"}
"""Those of an answer: this host says these itself. In a request they are the caller's, and the session sees them."""


class HomeForwarding:
    """ASGI middleware, for requests that have passed the guard: passes them on to their session's home."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        homes: Homes,
        session_of_site: Callable[[Any], int | None],
        session_of_link: Callable[[str], str | None],
        drain_seconds: float,
        other_hosts: OtherHosts,
        moves: Moves,
        answers: Mapping[str, Answering],
    ) -> None:
        """`session_of_site` reads a session's key from the name of its site, `session_of_link` a session's id from the
        token of a link. `drain_seconds` is how long a host that stops takes for its runs. `answers` are those to what
        other hosts ask, by path (other_hosts.py)."""
        self._app = app
        self._homes = homes
        self._hops = other_hosts.hops
        self._session_of_site = session_of_site
        self._session_of_link = session_of_link
        # A host that is lost is so after its lease, one that stops gives its sessions away once it has ended.
        self._patience = max(1.5 * homes.lease_seconds, drain_seconds + _STOP_SECONDS) + CONNECT_SECONDS
        self._connections = other_hosts.connections
        self._moves = moves
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer here, or have the home answer. Raises NoLease, SessionMoved, HomeUnreachable, HomeLost."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if "site" in scope["state"] or _ANSWERED.match(scope["path"]):
            self._homes.check_lease()
        # Under a site all paths are its session's, and whoever calls one may be anybody.
        of_host = "hop" in scope["state"] and "site" not in scope["state"]
        if of_host and (answering := self._answers.get(scope["path"])) is not None:
            await Answer(await answering(scope))(scope, receive, send)
            return
        session = self._session(scope)
        if session is None:
            await self._here(scope, receive, send, session)
            return
        is_gone = False

        async def unless_gone(message: Message) -> None:
            nonlocal is_gone
            is_gone |= message["type"] == "http.response.start" and "moved" in scope["state"]
            if not is_gone:
                await send(message)

        async with self._moves.calling(session):
            if _only_reads(scope):
                await self._answered(scope, receive, unless_gone, session)
                if not is_gone:  # else that was found out while it was answered here, and its home is asked
                    return
            await self._answered(scope, receive, send, session)

    async def _answered(self, scope: Scope, receive: Receive, send: Send, session: str | int) -> None:
        patience = asyncio.get_running_loop().time() + self._patience
        while (host := await self._elsewhere(scope, session)) is not None:
            hop: Hop | None = scope["state"].get("hop")
            if hop is not None and (hop.again or not self._moves.has_gone(session)):
                raise SessionMoved("This session is at home at another host by now.")
            why = ""
            try:
                if await self._pass_on(host, scope, receive, send):
                    return
            except NotTrusted as error:
                log.warning("home_not_trusted", host=host.id, url=host.url, error=str(error))
                raise HomeUnreachable(f"The host where this session is at home can't be called: {error}.") from None
            except OSError as error:
                log.info("home_unreachable", host=host.id, url=host.url, error=str(error))
                why = f": {error}" if isinstance(error, HungUp) else ""
            if asyncio.get_running_loop().time() > patience:
                raise HomeUnreachable(f"The host where this session is at home can't be reached{why}.")
            await self._homes.news(_LOOK_SECONDS)
            self._homes.check_lease()
        await self._here(scope, receive, send, session)

    async def _elsewhere(self, scope: Scope, session: str | int) -> Host | None:
        """The other host that is to answer: the session's home, or that which it becomes now."""
        if not isinstance(session, str) or not self._homes.is_here(session):
            host = await self._homes.elsewhere(session, take=_needs_home(scope))
            if host is not None:
                return host
        hop: Hop | None = scope["state"].get("hop")
        if hop is not None and hop.again:
            return None  # once more would be once too often
        caller: Caller | None = scope["state"].get("caller")
        if caller is None or not isinstance(session, str) or (wanted := _wanted(scope)) is None:
            return None
        who = OwnedId(caller.owner, session, caller.key_id)
        moved = await self._moves.move(who, live=wanted not in _RUN)
        if not moved and self._homes.is_here(session):
            return None
        return await self._homes.elsewhere(session, take=True)  # also where the answer to the move was lost

    async def _here(self, scope: Scope, receive: Receive, send: Send, session: str | int | None) -> None:
        if "ticket_of_home" in scope["state"] and "caller" not in scope["state"]:
            raise Unauthorized("This ticket went with the host that gave it.")
        path = scope["path"]
        if session is not None and ("site" in scope["state"] or _FOLLOWS.fullmatch(path) or _PUBLIC.fullmatch(path)):
            await self._leased(scope, receive, send)
            return
        await self._app(scope, receive, send)
        if scope["method"] == "DELETE" and isinstance(session, str) and path.count("/") == 3:
            self._homes.moved(session)  # another session may get its id, and another home

    async def _leased(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer here, and reset the caller's connection where the lease ends within the answer: what is followed here
        may by then be lost, and the session be at home elsewhere."""
        connection: Protocol = scope["extensions"]["era.connection"]
        with ExitStack() as ended:

            def begin() -> None:
                ended.enter_context(self._homes.while_leased(connection.transport.abort))

            async def noting(message: Message) -> None:
                if message["type"] == "http.response.start":
                    begin()
                await send(message)

            if connection.upgrading:
                begin()
            await self._app(scope, receive, noting)

    def _session(self, scope: Scope) -> str | int | None:
        """The id or key of the session that a request is about; None where it is about no one session."""
        if "site" in scope["state"]:
            return self._session_of_site(scope["state"]["site"])
        if (session_id := session_in(scope["path"])) is not None:
            return session_id
        match = _LINK.fullmatch(scope["path"])
        return match and self._session_of_link(match[1])

    async def _pass_on(self, host: Host, scope: Scope, receive: Receive, send: Send) -> bool:
        """Have another host answer; false where it died before, and nothing but reading was asked for. Raises OSError
        where it can't be reached, and nothing was done; HomeLost where it died before it answered."""
        connection = await self._connections.to(host)
        if (room := scope["state"].get("room")) is not None:
            room.is_passed_on = True
        exchange = _ToHost(scope, receive, send, connection, self._hops.header(scope, host.id), self._homes, host)
        try:
            await exchange.run()
        except (OSError, HomeLost) as problem:
            if room is not None:
                room.is_passed_on = False  # the session may be at home here by the next try
            if isinstance(problem, OSError) or exchange.began or not _only_reads(scope):
                raise
            return False
        finally:
            self._connections.give_back(host, connection)
        return True


class _ToHost(Exchange):
    """An exchange with the home of the session."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        connection: Connection,
        header: bytes,
        homes: Homes,
        host: Host,
    ) -> None:
        super().__init__(scope, receive, send, connection.reader, connection.writer, connection.http)
        if self._caller.upgrading:
            self.idle_seconds = _SILENT_SECONDS
        self._header = header
        self._homes = homes
        self._host = host

    def request(self) -> h11.Request:
        """The request as it came, without the key, with what this host says about it. Raises BadRequest."""
        scope = self._scope
        kept = _without(_NOT_ASKED_ON, scope["headers"])
        if "caller" in scope["state"]:
            # That there was a key matters to the home, too: no browser has sent it unasked.
            kept = [(name, b"Bearer passed-on" if name == b"authorization" else value) for name, value in kept]
        own = [(HEADER, self._header), *((name.encode(), value.encode()) for name, value in self.framing())]
        if self._caller.upgrading:
            own += [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
        try:
            return h11.Request(method=scope["method"].encode(), target=target_of(scope), headers=[*kept, *own])
        except h11.LocalProtocolError as error:
            raise BadRequest(f"The request can't be passed on: {reason(error)}.", hint="Send plain HTTP/1.1.") from None

    def answer_headers(self, response: h11.Response | h11.InformationalResponse) -> list[tuple[bytes, bytes]]:
        headers = _without(_NOT_ANSWERED_ON, response.headers)
        if response.status_code == TooSlow.status:  # the home has said so of its own connection to this host
            headers.append((b"connection", b"close"))
        return headers

    def failure(self, what: str | None) -> EraError:
        return HomeLost("The host where this session is at home was lost while it was answering.")

    def watches(self) -> list[asyncio.Task[None]]:
        """The death of that host ends the exchange, and so does a cut between it and this one: a host that is paused or
        cut off hangs up on nobody."""

        async def dies() -> None:
            await self._homes.died(self._host.id)
            raise self.failure(None)

        async def vanishes() -> None:
            await cut_off(self._writer)
            raise self.failure(None)

        return [asyncio.create_task(dies()), asyncio.create_task(vanishes())]


def session_in(path: str) -> str | None:
    """The id of the session that a path names; None where it names none."""
    match = _SESSION.fullmatch(path) or _PUBLIC.fullmatch(path)
    return match and match[1]


def _wanted(scope: Scope) -> str | None:
    """For what a request wants a sandbox of its session; None where it wants none."""
    match = _ROOM.fullmatch(scope["path"])
    return match[1] if match and scope["method"] == ("GET" if match[1] == "terminal" else "POST") else None


def _without(names: Container[str], headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.decode("latin-1").lower() not in names]


def _only_reads(scope: Scope) -> bool:
    """Whether a request may be made again, and has no body of which a part may be gone."""
    names = {name for name, _ in scope["headers"]}
    is_read = scope["method"] in ("GET", "HEAD") and _SESSION.fullmatch(scope["path"]) is not None
    return is_read and not names & {b"content-length", b"transfer-encoding", b"upgrade"}


def _needs_home(scope: Scope) -> bool:
    """Whether a host that answers this request must be the session's home. What is only read is in the shared rows,
    unless the session is live at its home. A watch has to see when it becomes live."""
    return not _only_reads(scope) or _WATCH.fullmatch(scope["path"]) is not None
