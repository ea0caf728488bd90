"""The middleware before every route: authentication, checks of Host and Origin, bounds of bodies.

It is the only place that sets a request's caller (`state.caller`), whose owner routers pass to the core. A path that it
lets pass without authentication has no caller, so a route there that needed one would fail.

A server without a key, on loopback, is open to everybody on the machine, but must not be open to pages in their
browsers. Such a page can send a request here in three ways, each refused: from another site (seen by Origin and
Sec-Fetch-Site), under another name that resolves to loopback, known as DNS rebinding (seen by Host), or as a form or
plain text, which needs no CORS preflight (what a browser may have sent counts only as application/json, see context.py,
or as an archive, see archives.py). A page that a session serves under /proxy has this server's own name, but an opaque
origin (see core/public/headers.py).

Public URLs of sessions are for anybody, pages of other sites among them: there only the Host header is checked. So are
links to files (api/routes/links.py), whose token is all that a caller needs.

Under a name of a session's own (core/public/sites.py) everything belongs to the session: `state.site` says so, and no
route of this server's sees such a request.

What another host of a cluster passes on was checked there (api/hosts/hop.py). Its signature is checked here, and says
who the caller is.

A WebSocket comes as an HTTP request (see protocol.py), and is checked as one before it is accepted. Browsers open one
to any site without asking that first, and let the page read it. A page can't send a key with one, so it may bring a
ticket in the query instead.

A body of JSON is read as a whole, its caller may take any time for that, and its request may wait for long after that,
such as for its session's turn. One of more than SMALL_BYTES waits until there is room for all of it among MOST_BYTES,
and has that room until its request is let go. So those who wait for room hold next to nothing, and whoever has some
never waits for more. Those who wait are refused after a while, since runs may be what the others wait for. Owners share
the room (core/concurrency/shares.py).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era.api.hosts.hop import HEADER, Hops, is_from_host
from era.api.protocol.answers import MAX_BODY_BYTES, error_body, error_headers
from era.api.routing import scopes
from era.core.concurrency.meter import Account, account, current, known_account, turn
from era.core.concurrency.shares import Shares
from era.core.owners.api_keys import OPERATOR, ApiKeys, Tickets
from era.core.public.sites import SiteName
from era.core.telemetry import new_request_id, origin
from era.errors import (
    BadRequest,
    EraError,
    Forbidden,
    NotFound,
    TooLarge,
    TooSlow,
    Unauthorized,
    Unavailable,
)

_PIECE_BYTES = 64 << 10
"""The most that comes of a body at a time, or a bit more."""

_MOST_PARAMETERS = 1000
"""Of a query."""

_BODY_IDLE_SECONDS = 30.0
"""Seconds for which a body may pause."""

HOST_HEADER = b"x-era-host"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_KEYED = re.compile(r"/(api|mcp)(/|$)")
_SESSION = re.compile(r"/api/sessions/([^/]+)")
_UPLOADS = re.compile(r"/api/sessions/[^/]+/(files/.*|archive)|/links/[^/]+", re.DOTALL)
"""Paths whose PUT may have a body as large as the session's limits; api/routes/files.py checks it."""

_SLASH_COUNTS = re.compile(
    r"/proxy(/|$)|/api/sessions/[^/]+/((versions/[^/]+/)?files|stat)/|/api/storage/(kv|r2)/[^/]+/.", re.DOTALL
)
"""Paths of which a slash at the end is a part: what a session serves, names of files, keys."""

_COLLECTIONS = re.compile(r"/api/(sessions/|storage/(kv|r2)/[^/]+/)")
"""Paths below which one thing is named, with nothing behind the slash. A script that deletes `/api/sessions/$ID` with
an empty ID must not delete all of them, so the slash is needless only for reading and creating."""

_OPEN_NAMES = re.compile(r"/(health|ready)(/|$)")
_PUBLIC = re.compile(r"/(proxy|links)(/|$)")
_PROXY = re.compile(r"/proxy(/|$)")
_OWN_CODE = frozenset({b"script", b"style", b"worker", b"sharedworker", b"serviceworker", b"xslt"})
"""What a page of this server's own executes, or is dressed with, has one of these as its destination."""

_FROM_A_SESSION = re.compile(r"[a-z]+://[^/]*/proxy([/?]|$)")


class Guard:
    """ASGI middleware. It also gives each request an id, in `state.request_id` and the header X-Request-Id.

    In a cluster the header X-ERA-Host says which host has answered; a host that passes a call on leaves the home's."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys | None,
        tickets: Tickets | None = None,
        names: Iterable[str],
        idle_seconds: float = _BODY_IDLE_SECONDS,
        bounds: Mapping[tuple[str, str], int] | None = None,
        site: Callable[[str], SiteName | None] = lambda _: None,
        hops: Hops | None = None,
    ) -> None:
        """`keys` authenticate callers; None where the connection's state holds the caller already (guest_api.py).
        `tickets` do so for WebSockets.
        `names` are host names that this server answers to besides loopback's. A body may pause for `idle_seconds` at
        most. `bounds` are the sizes in bytes of bodies, by method and path, where they aren't MAX_BODY_BYTES. `site`
        reads the name of a session's site from a Host header. `hops` are those between hosts of a cluster."""
        self._hops = hops
        self._site = site
        self._app = app
        self._keys = keys
        self._tickets = tickets
        self._bounds = bounds or {}
        self._large_bodies = LargeBodies()
        self._idle_seconds = idle_seconds
        self._names = _LOOPBACK | {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        site = self._site(headers.get(b"host", b"").decode("latin-1"))
        if scope["path"].endswith("/") and site is None:
            _take_slash_off(scope)
        state = scope.setdefault("state", {})
        request_id = state.setdefault("request_id", "") or new_request_id()
        state["request_id"] = request_id
        if site is not None:
            scope["state"]["site"] = site
        began = False

        async def send_with_id(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if self._hops is not None and all(name != HOST_HEADER for name, _ in message["headers"]):
                    message["headers"].append((HOST_HEADER, self._hops.host_id.encode()))
            await send(message)

        try:
            _check_query(scope)
            if self._hops is not None:
                await self._check_hop(self._hops, scope, headers)
                request_id = scope["state"]["request_id"]
            self._check(scope, headers)
            current.set(_account(scope))
            await turn(begins=True)
            uploads = scope["method"] == "PUT" and _UPLOADS.fullmatch(scope["path"])
            public = site or _PROXY.match(scope["path"])  # streamed to the session's server, or bounded by proxy.py
            bound = None if uploads or public else self._bounds.get((scope["method"], scope["path"]), MAX_BODY_BYTES)
            with self._large_bodies.room(_owner(scope)) as room:
                state["room"] = room
                # A body with a bound of its own is written to a file as it comes.
                held = room if bound == MAX_BODY_BYTES else None
                await self._app(scope, _bounded(receive, headers, bound, self._idle_seconds, held), send_with_id)
        except EraError as error:
            if began:
                raise
            await _refuse(error, request_id, scope, send_with_id)

    async def _check_hop(self, hops: Hops, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Note what another host says that passes this request on, or what is to be left to another host. Raises
        Forbidden, SessionMoved, Unavailable."""
        if HEADER in headers:
            hop = hops.received(scope, headers[HEADER])
            scope["state"] |= {"hop": hop, "request_id": hop.request_id}
            if (current := origin.get()) is not None:
                current.request_id = hop.request_id  # what is logged of it has this id, too
            scope.update(client=hop.client, scheme=hop.scheme)
            if (connection := scope.get("extensions", {}).get("era.connection")) is not None:
                connection.of_host = True
                if hop.client is not None:
                    connection.pays_for(hop.client[0])  # else all callers of that host would have one share
            if hop.caller is not None:
                caller = hop.caller if self._keys is None else await self._keys.known(hop.caller)
                if caller is None:
                    raise Unauthorized("The API key of this call is good no more.")
                scope["state"]["caller"] = caller
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] != HEADER]  # programs may see the others
        elif is_from_host(scope):
            raise Forbidden("At this port only what a host passes on is answered.", code="bad_hop")
        elif _ticket(scope) is not None and await hops.takes_tickets(_session_of_socket(scope)):
            scope["state"]["ticket_of_home"] = True
        elif self._keys is not None and (token := _bearer(headers)) is not None:
            await self._keys.look_for(token)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Authenticate the caller, or with no key check where the request comes from. Raises EraError."""
        _check_repeated(scope)
        path = scope["path"]
        if "site" in scope["state"]:
            return
        # Pages of sessions aren't of the same origin, as they are sandboxed.
        is_own = headers.get(b"sec-fetch-site") == b"same-origin"
        if is_own and headers.get(b"sec-fetch-dest") in _OWN_CODE and (_PUBLIC.match(path) or _KEYED.match(path)):
            # The policy of this server's pages lets them load it, and so would whatever got into one of them.
            raise Forbidden("What sessions serve or store is no code of this server's own pages.")
        if path.endswith("\n") and not _SLASH_COUNTS.match(path):
            # The patterns of routes end in "$", which is also before a line's end; `fullmatch` here is exact.
            raise NotFound("There is nothing at this path.")
        if "ticket_of_home" in scope["state"]:
            return
        if (ticket := _ticket(scope)) is not None and "caller" not in scope["state"]:
            self._check_ticket(scope, ticket)
        if "hop" in scope["state"]:
            if _KEYED.match(path) and "caller" not in scope["state"]:
                raise Unauthorized("This call needs an API key of this server's.")
            _check_scope(scope)
            return
        if self._keys is not None and self._keys.required:
            if _KEYED.match(path) and "caller" not in scope["state"]:
                token = _bearer(headers)
                caller = None if token is None else self._keys.caller(token)
                if caller is None:
                    raise Unauthorized("This call needs an API key of this server's.")
                scope["state"]["caller"] = caller
            _check_scope(scope)
            return
        if _OPEN_NAMES.match(path):
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if name not in self._names:
            raise Forbidden(f"This server has no key, so it answers only under its own names, not '{name[:80]}'.")
        if _PUBLIC.match(path):
            return
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            raise Forbidden("This server has no key, so pages of other origins may not call it.")
        if not _KEYED.match(path):
            return
        if headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
            raise Forbidden("This server has no key, so pages of other sites may not call it.")
        if _FROM_A_SESSION.match(unquote(headers.get(b"referer", b"").decode("latin-1"))):
            raise Forbidden("This server has no key, so pages of sessions may not call it.")
        if self._keys is not None:
            scope["state"].setdefault("caller", OPERATOR)

    def _check_ticket(self, scope: Scope, ticket: str) -> None:
        """Take the ticket, whose owner becomes the caller. Raises Unauthorized where it isn't good."""
        caller = None if self._tickets is None else self._tickets.take(ticket, _session_of_socket(scope))
        if caller is None or not (self._keys is None or self._keys.admits(caller, "run")):
            raise Unauthorized(
                "This ticket is not good: it was used, is too old, is for another session, or its key is good no more.",
                hint="POST /api/sessions/{id}/tickets gives one, good once and for half a minute.",
            )
        scope["state"]["caller"] = caller


def _bearer(headers: dict[bytes, bytes]) -> bytes | None:
    """The bearer token of a request, None without one."""
    kind, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if kind.lower() == b"bearer" else None


def _session_of_socket(scope: Scope) -> str:
    """The id of the session in the path of a WebSocket."""
    return str(scope["path"].split("/")[3])


def _ticket(scope: Scope) -> str | None:
    """The ticket that a request for a WebSocket brings, None without one."""
    if not scope.get("query_string") or not scopes.SOCKETS.fullmatch(scope["path"]):
        return None
    tickets = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).get("ticket")
    return None if tickets is None else tickets[0]


def _check_scope(scope: Scope) -> None:
    """Raises Forbidden where the caller's key isn't good for this call."""
    if _KEYED.match(scope["path"]):
        scopes.check(scope["state"]["caller"], scope["method"], scope["path"])


def _check_repeated(scope: Scope) -> None:
    """Raise BadRequest where the host or the caller is ambiguous: for two Host or two Authorization headers, and for
    HTTP/1.1 without Host (RFC 9112, 3.2)."""
    names = [name for name, _ in scope["headers"]]
    for name, shown in ((b"host", "Host"), (b"authorization", "Authorization")):
        if names.count(name) > 1:
            raise BadRequest(f"The request has more than one {shown} header.", hint="Send one.")
    if scope.get("http_version") == "1.1" and b"host" not in names:
        raise BadRequest("The request has no Host header, which HTTP/1.1 demands.", hint="Send one: Host: NAME:PORT.")


def _check_query(scope: Scope) -> None:
    """Raises BadRequest for a query of more parameters than any call has, which takes long to read: before anybody has
    been asked for a key. What a session serves reads its queries itself."""
    if "site" in scope["state"] or _PROXY.match(scope["path"]):
        return
    if scope.get("query_string", b"").count(b"&") > _MOST_PARAMETERS:
        raise BadRequest(
            f"The query has more than {_MOST_PARAMETERS} parameters.", hint="See /docs for those of this call."
        )


def _take_slash_off(scope: Scope) -> None:
    """Take the slash off the end of a request's path, where that means nothing. In the scope itself, so that what is
    around the guard sees which route it took."""
    path, raw_path = scope["path"], scope["raw_path"]
    if path == "/" or not raw_path.endswith(b"/") or _SLASH_COUNTS.match(path):
        return
    if scope["method"] not in ("GET", "HEAD", "POST") and _COLLECTIONS.fullmatch(path):
        return
    scope.update(path=path[:-1], raw_path=raw_path[:-1])


def _account(scope: Scope) -> Account:
    """Return the account that pays for a request: that of its owner and session, or else of the address that it comes
    from. Health checks have an account of their own, so they don't wait for other calls from the same address."""
    if "caller" in scope["state"]:
        caller = scope["state"]["caller"]
        named = _SESSION.match(scope["path"])
        return known_account(caller.owner, caller.sandbox or (named[1] if named else ""))
    address = (scope.get("client") or ("",))[0]
    is_open = _OPEN_NAMES.match(scope["path"]) is not None and "site" not in scope["state"]
    return account(f"@{address}", is_open)


def _owner(scope: Scope) -> str:
    """Whose request this is, "" where nobody knows."""
    caller = scope["state"].get("caller")
    return "" if caller is None else str(caller.owner)


def _bounded(
    receive: Receive, headers: dict[bytes, bytes], bound: int | None, idle_seconds: float, room: Room | None = None
) -> Receive:
    """Wrap `receive` to bound the body: TooLarge beyond `bound` bytes (None: no bound), TooSlow after a pause. With
    `room` it is held in memory until the request is let go; Unavailable where there is no room for it.

    Only the time spent in waiting for the client counts. A route that is slow to take the body doesn't make it stalled.
    """
    declared = headers.get(b"content-length", b"0")
    if bound is not None and declared.isdigit() and int(declared) > bound:
        raise TooLarge(f"The body is {int(declared)} bytes, {bound} are allowed.")
    received, more = 0, True

    async def receive_bounded() -> Message:
        nonlocal received, more
        if more:
            if room is not None and bound is not None:
                expected = bound if received + _PIECE_BYTES > SMALL_BYTES else 0
                await room.take((declared.isdigit() and int(declared)) or expected, idle_seconds)
            try:
                async with asyncio.timeout(idle_seconds):
                    message = await receive()
            except TimeoutError:
                raise TooSlow(
                    f"Nothing of the body came for {idle_seconds:g} seconds.",
                    hint="Send it again, at any pace but without such a pause. Nothing was kept of it.",
                ) from None
            more = message.get("more_body", False)
            if room is not None and not more:
                room.complete(received + len(message.get("body", b"")))
        else:
            message = await receive()  # waits for the caller to hang up
        received += len(message.get("body", b""))
        if bound is not None and received > bound:
            raise TooLarge(f"The body is over {bound} bytes.")
        return message

    return receive_bounded


async def _refuse(error: EraError, request_id: str, scope: Scope, send: Send) -> None:
    """Send an error as the whole answer."""
    scope["state"]["refusal"] = (error.code, error.message)
    body = json.dumps(error_body(error, request_id), ensure_ascii=False).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error)}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


SMALL_BYTES = 128 << 10
"""What a body may have without any room. One caller may have thousands of them under way."""

MOST_BYTES = 256 << 20


class Room:
    """The room of one body."""

    def __init__(self, all_: LargeBodies, holder: str) -> None:
        self._all, self._holder = all_, holder
        self._taken = 0
        self.is_passed_on = False
        """Another request holds the body once it is complete, here or at another host."""

    async def take(self, size: int, seconds: float) -> None:
        """Wait until there is room for a body of this size, if it has none yet. Raises Unavailable where there is none
        within so many seconds."""
        if self._taken or size <= SMALL_BYTES:
            return
        try:
            async with asyncio.timeout(seconds):
                while not self._all.shares.take(self._holder, size):
                    await self._all.given_back.wait()
        except TimeoutError:
            raise Unavailable("There are too many large bodies at a time.") from None
        self._taken = size

    def complete(self, size: int) -> None:
        """The body is complete, and has this size: it holds no more than that."""
        self._keep(0 if self.is_passed_on or size <= SMALL_BYTES else size)

    def give_back(self) -> None:
        """The request is let go."""
        self._keep(0)

    def _keep(self, size: int) -> None:
        if self._taken > size:
            self._all.shares.give_back(self._holder, self._taken - size)
            self._taken = size
            self._all.given_back.set()
            self._all.given_back = asyncio.Event()


class LargeBodies:
    """The room of all bodies of a service."""

    def __init__(self) -> None:
        self.shares: Shares[str] = Shares(MOST_BYTES)
        self.given_back = asyncio.Event()
        """Set once some room is given back; another one takes its place then."""

    @contextmanager
    def room(self, holder: str) -> Iterator[Room]:
        """For one body, within the block. `holder` is the owner who sends it."""
        room = Room(self, holder)
        try:
            yield room
        finally:
            room.give_back()
