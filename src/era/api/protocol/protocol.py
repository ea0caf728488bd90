"""The HTTP/1.1 protocol of a connection: uvicorn's, with bounds that it lacks, errors in the contract's shape, and
tunnels for WebSockets.

A WebSocket request to a public URL, a session's site, a process or a terminal reaches the application as an ordinary
HTTP request. Each request's scope has this protocol as the extension `era.connection`, by which exchange.py and
terminals.py turn the connection into a tunnel. Such a connection carries no second request: after the first one come
only the WebSocket's bytes.

Requests are parsed by httptools. Only heads of answers are written here, of which every part is ours.

A caller decides how many pieces its bytes are, and how many requests. So bytes are parsed a few KiB at a time, at the
cost of an account (core/concurrency/meter.py). Where that owes something the rest waits, with reading paused, and so
does whatever follows a request that has to wait for the one before.

Whatever isn't read is held here, or holds what makes it. So each connection is looked at now and then, whatever it
carries: one whose other end takes nothing of what waits for it is cut.

Whoever can connect can open connections on which no request ever arrives, without any key. They end when their time is
up, but in that time there could be more than the service has descriptors. So callers share the number of connections
(core/concurrency/shares.py), by the addresses that they come from. A caller who may have no more loses the oldest of
those that are *half-open*: whose request isn't there yet, unless it came with a key. Only if there is none, the new one
is refused. So who floods the service harms himself, and even from his own address requests that come at once, as all
ordinary ones do, are answered. Uploads of those with a key are never cut off, however slow they are.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import re
import termios
from array import array
from collections.abc import Callable, Iterable
from ipaddress import ip_address, ip_network
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from era.api.protocol.answers import error_body, error_headers
from era.api.protocol.dead_peers import acknowledged
from era.core.concurrency.meter import Account, charged, current, owes, turn
from era.core.concurrency.shares import Shares
from era.core.telemetry import new_request_id
from era.errors import BadRequest, EraError, HeadersTooLarge, TooSlow, Unavailable

MAX_HEAD_BYTES = 64 << 10
MAX_FIELDS = 500
"""Header fields of a request. 16,000, as many as fit, would take the event loop 30 ms here and in the application."""

HEAD_SECONDS = 30.0
REUSED_SECONDS = 2.0
"""For which a host of a cluster may send another call by a connection that has carried one."""

UNREAD_SECONDS = 150.0
"""Between two looks at whether the other end takes anything. Kernels hold some megabytes for one that is only slow, and
acknowledge nothing until a good part of that was read."""

_LOOK_SECONDS = 0.1
_ON_ITS_WAY_SECONDS = 0.5
"""What a call that another host has sent takes to arrive at most, as far as ends of connections are concerned."""

_MAX_EARLY_BYTES = 64 << 10
"""How much is buffered of what a caller sends before its WebSocket is accepted."""

_LEAST_AT_ONCE, _MOST_AT_ONCE = 1 << 10, 16 << 10
"""Bytes between two looks at the account: few where they may be many requests, more in a body of large pieces."""

_SOCKETS = re.compile(rb"/proxy/|/api/sessions/[^/?]+/(terminal|processes/[^/?]+/attach)/?(\?|$)")
"""Targets at which a WebSocket may be opened."""


class _Flow(FlowControl):
    """uvicorn's flow control, which can be held: then nothing is read, whoever would resume that."""

    def __init__(self, transport: asyncio.Transport, resumed: Callable[[], None]) -> None:
        """`resumed` is called when reading is resumed, but held."""
        super().__init__(transport)
        self._resumed = resumed
        self.held = False

    def hold(self) -> None:
        if not self.held and not self.read_paused:
            self._transport.pause_reading()
        self.held = True

    def release(self) -> None:
        if self.held and not self.read_paused:
            self._transport.resume_reading()
        self.held = False

    def pause_reading(self) -> None:
        if self.held:
            self.read_paused = True
        else:
            super().pause_reading()

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()
        elif self.read_paused:
            self.read_paused = False
            self._resumed()


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds on the size of a request's head, on the time that it may take, and on the number
    of connections.

    Without them, whoever can connect could fill the memory with one endless header, or use up all descriptors with
    requests that never end.
    """

    is_site: Callable[[str], bool] = staticmethod(lambda _: False)
    """Whether a Host header is the name of a session's site, where every path is public."""

    callers: Callers | None = None
    """Counts the connections; None for those that are counted elsewhere."""

    _head_bytes = 0
    """Bytes received since the last complete head or piece of a body."""

    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _taken: int | None = None
    """How much the other end had taken at the last look; None where nothing waited for it."""

    _tunnel: asyncio.StreamReader | None = None
    """Bytes that follow the head of a WebSocket request."""

    upgrading = False
    """Whether the current request asks for a WebSocket where there may be one."""

    of_host = False
    """Whether another host of the cluster passes calls on by it."""

    _stopping = False
    _idle_since: float | None = None

    _at_once = _LEAST_AT_ONCE
    _unparsed = b""
    """Bytes received that wait for this connection's turn."""

    _going_on: asyncio.Task[None] | None = None
    """Waits for the turn."""

    _in_head = False
    """Whether the head of a request is being parsed."""

    flow: _Flow

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lost = asyncio.Event()
        self.leave = asyncio.Event()
        """Set when the caller's WebSocket, if it is passed on, is to end, for the caller to connect anew elsewhere."""

        self.account = Account("", object())
        """Pays for what is parsed, until it is known who calls."""

        self.left: asyncio.Event | None = None
        """Of a WebSocket that is passed on: set once its caller was told to leave, or it has ended."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # not any transport
        super().connection_made(transport)
        self.flow = _Flow(transport, self._await_turn)
        self._unread_timer = self.loop.call_later(UNREAD_SECONDS, self.look_whether_read)
        if self.client is not None:
            self.pays_for(self.client[0])
        if self.callers is not None and not self.callers.opened(self, self.client[0] if self.client else ""):
            self._refuse(Unavailable("There are too many connections from your address at a time."))
        else:
            self._expect_head()

    def pays_for(self, address: str) -> None:
        """Have the connection pay in turn with others of this address."""
        self.account = Account(f"@{address}", object())

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_received()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        if self.callers is not None:
            self.callers.closed(self)
        super().connection_lost(exc)
        self._lost.set()
        if self._tunnel is not None:
            self._tunnel.feed_eof()

    def look_whether_read(self) -> None:
        """Cut the connection if something has waited for the other end since the last look, of which it took nothing.

        What counts is what it has acknowledged: whoever reads a little at a time, or is far away, goes on. A connection
        that is closed already is cut as well, since that would wait for ever for what is left to be taken."""
        taken = acknowledged(self.transport) if self.transport.get_write_buffer_size() else None
        if taken is not None and taken == self._taken:
            self.transport.abort()
            return
        self._taken = taken
        self._unread_timer = self.loop.call_later(UNREAD_SECONDS, self.look_whether_read)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        if not self._unparsed and not self._has_unread_bytes():
            super().timeout_keep_alive_handler()

    def _has_unread_bytes(self) -> bool:
        """Whether a request has arrived that isn't read yet, because the event loop stood still: timers come before
        that, and if one closes the connection, the caller finds it reset."""
        if self.transport.is_closing():
            return False
        count = array("i", [0])
        fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, count)
        return count[0] > 0

    def shutdown(self) -> None:
        """The server stops: uvicorn calls this once. Another host may be sending a call at this moment, by a connection
        that it has no reason to take for one that ends: it gets an answer, and is told by that."""
        self.leave.set()
        if not self.of_host:
            super().shutdown()
            return
        self._stopping = True
        if not self._is_idle and not self.cycle.response_started:
            self.cycle.keep_alive = False
        self._close_once_unused()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _close_once_unused(self) -> None:
        """Close it when it has carried nothing for longer than other hosts keep one for their next call."""
        now = self.loop.time()
        self._idle_since = (self._idle_since or now) if self._is_idle else None
        is_unused = self._idle_since is not None and now - self._idle_since > REUSED_SECONDS + _ON_ITS_WAY_SECONDS
        if is_unused and not self._has_unread_bytes():
            self.transport.close()
        if not self.transport.is_closing():
            self.loop.call_later(_LOOK_SECONDS, self._close_once_unused)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._at_once = _LEAST_AT_ONCE
        self._in_head = True
        self.scope["extensions"] = {"era.connection": self}  # type: ignore[dict-item]  # a value may be any object

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) >= MAX_HEAD_BYTES:  # the parser of URLs would call it malformed
            self._refuse(HeadersTooLarge(f"The request's URL is over {MAX_HEAD_BYTES - 1} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header. Trailers, which come after the body, are dropped: merged with the headers they could
        authenticate the request or replace what a proxy has checked (RFC 9110, 6.5.1)."""
        if not self._in_head or self.transport.is_closing():
            return
        if len(self.headers) == MAX_FIELDS:
            self._refuse(HeadersTooLarge(f"The request has more than {MAX_FIELDS} header fields."))
            return
        super().on_header(name, value.strip(b" \t"))  # blanks are no part of it (RFC 9110, 5.5); the parser keeps some

    def data_received(self, data: bytes) -> None:
        """Parse data, as uvicorn's method does, with the bounds; in a tunnel, pass it on unparsed."""
        if self._tunnel is not None:
            self._tunnel.feed_data(data)  # it pauses the transport when its buffer is full
            return
        if self.flow.held:  # it was on its way before reading was paused
            self._unparsed += data
        else:
            charged(self.account, self._parse, data)

    def _parse(self, data: bytes, *, in_turn: bool = False) -> None:
        """Parse data until the account owes, and no further than to a second request that waits for the first. With
        `in_turn` it has just had its turn, so some of it is parsed in any case."""
        if self.cycle is not None and self.cycle.response_complete:
            self._expect_head()
        self._unset_keepalive_if_required()
        view = memoryview(data)
        while view and not self.transport.is_closing() and self._tunnel is None:
            if self.pipeline or (not in_turn and owes(begins=True)):  # thousands may have something at once
                self._unparsed = bytes(view)
                self.flow.hold()
                if self.pipeline:
                    self.flow.pause_reading()  # which the end of the response resumes
                self._await_turn()
                return
            in_turn = False
            piece, view = view[: self._at_once], view[self._at_once :]
            self._at_once = min(2 * self._at_once, _MOST_AT_ONCE)
            self._parse_piece(piece, view)
        self._unparsed = b""
        if not self.transport.is_closing():
            self.flow.release()

    def _await_turn(self) -> None:
        """Go on to parse at this connection's turn, unless what was parsed is still to be taken."""
        if self._going_on is None and not self.flow.read_paused:
            self._going_on = self.loop.create_task(self._parse_rest())

    async def _parse_rest(self) -> None:
        current.set(self.account)
        await turn(begins=True)
        self._going_on = None
        if not self._lost.is_set():
            self._parse(self._unparsed, in_turn=True)

    def _parse_piece(self, data: memoryview, rest: memoryview) -> None:
        """Parse `data`; after that comes `rest`."""
        self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserInvalidURLError:
            self._refuse(
                BadRequest(
                    "This request's URL has a character that can't stand there unescaped.",
                    hint="Begin the path with '/', and escape what isn't ASCII as UTF-8 in %XX: '%C3%BC' for 'ü'.",
                )
            )
            return
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        except httptools.HttpParserUpgrade as upgrade:
            if self.upgrading:
                self.flow.release()  # from now on the stream pauses reading
                self._tunnel = asyncio.StreamReader(_MAX_EARLY_BYTES, self.loop)
                self._tunnel.set_transport(self.transport)
                self._tunnel.feed_data(bytes(data[upgrade.args[0] :]) + rest)
            return
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(HeadersTooLarge(f"The request's headers are over {MAX_HEAD_BYTES} bytes."))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._head_received()
        self.upgrading = (
            self.parser.get_http_version() == "1.1"
            and self.parser.get_method() == b"GET"
            and self._get_upgrade() == b"websocket"
            and (_SOCKETS.match(self.url) is not None or self.is_site(self._host()))
        )
        super().on_headers_complete()
        if self.upgrading or self._stopping:
            self.cycle.keep_alive = False  # no more HTTP on this connection, whatever the answer

    def _host(self) -> str:
        return next((value.decode("latin-1") for name, value in self.headers if name == b"host"), "")

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0  # so that heads, trailers and chunk headers are bounded, and bodies aren't
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequest("These bytes are no HTTP/1.1 request.", hint="Speak plain HTTP/1.1 to this address."))

    @property
    def is_half_open(self) -> bool:
        """Whether a request is still awaited, or its body, from somebody unknown."""
        if self._is_idle:
            return True
        return self.cycle.more_body and "caller" not in self.cycle.scope["state"]

    def give_up(self) -> None:
        """Close it to make room for another one. A caller who was about to send a request is told why."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
        elif self._head_bytes:
            self._refuse(Unavailable("There were too many connections from your address when this request came."))
        else:
            self.transport.close()

    def open_tunnel(self, headers: Iterable[tuple[bytes, bytes]]) -> asyncio.StreamReader:
        """Answer 101 with these headers. Returns the stream of bytes that the caller sends from then on.

        Raises ConnectionError where the caller has gone.
        """
        if self._tunnel is None or self.transport.is_closing():
            raise ConnectionError("The caller has gone.")
        lines = [STATUS_LINE[101], *(b"%b: %b\r\n" % pair for pair in headers), b"\r\n"]
        self.transport.write(b"".join(lines))
        return self._tunnel

    async def send_raw(self, piece: bytes) -> None:
        """Send bytes unchanged and wait until there is room for more. Raises ConnectionError where the caller has
        gone."""
        if self.transport.is_closing():
            raise ConnectionError("The caller has gone.")
        self.transport.write(piece)
        await self.flow.drain()

    async def hang_up(self) -> None:
        """Close the connection once everything has been sent."""
        self.transport.close()
        await self._lost.wait()

    async def cut(self) -> None:
        """Reset the connection, so that the caller can't take what it got for a complete answer."""
        self.transport.abort()
        await self._lost.wait()

    def _expect_head(self) -> None:
        """Start the timer for a request's head, unless it runs."""
        if self._head_timer is None:
            error = TooSlow(f"The request's headers took more than {HEAD_SECONDS:g} seconds.")
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._refuse, error)
            if self.callers is not None:
                self.callers.waits(self)

    def _head_received(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: EraError) -> None:
        """Answer with an error, without the application, and close the connection."""
        if self.transport.is_closing():
            return
        request_id = new_request_id()
        body = json.dumps(error_body(error, request_id)).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": request_id,
            **error_headers(error),
            "Connection": "close",
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[error.status] + head.encode() + b"\r\n" + body)
        self.transport.close()


class Callers:
    """All connections, of whom each is, and which of them is given up when there are too many."""

    def __init__(self, most: int) -> None:
        self._shares: Shares[str] = Shares(most)
        self._holders: dict[Protocol, str] = {}
        """Whose each one is. The connections that have waited longest come first."""

        self._of: dict[str, dict[Protocol, None]] = {}
        """The same by holder."""

    def __len__(self) -> int:
        return len(self._holders)

    def opened(self, connection: Protocol, address: str) -> bool:
        """Count a connection from this address in, or return False where there is no room for it."""
        holder = _holder(address)
        if not self._shares.take(holder):
            # Who has none yet doesn't suffer from others who have all.
            candidates: Iterable[Protocol] = self._of.get(holder, {}) or self._holders
            oldest = next((each for each in candidates if each.is_half_open), None)
            if oldest is None:
                return False
            self._shares.hand_over(self._holders[oldest], holder)
            self._forget(oldest)
            oldest.give_up()
        self._holders[connection] = holder
        self._of.setdefault(holder, {})[connection] = None
        return True

    def waits(self, connection: Protocol) -> None:
        """A connection awaits another request."""
        if (holder := self._holders.pop(connection, None)) is not None:
            self._holders[connection] = holder
            self._of[holder][connection] = self._of[holder].pop(connection)

    def closed(self, connection: Protocol) -> None:
        if (holder := self._holders.get(connection)) is not None:
            self._shares.give_back(holder)
            self._forget(connection)

    def _forget(self, connection: Protocol) -> None:
        holder = self._holders.pop(connection)
        del self._of[holder][connection]
        if not self._of[holder]:
            del self._of[holder]


def _holder(address: str) -> str:
    """Who counts as one caller: an IPv4 address, or the /64 network of an IPv6 address, which is what one is given."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4:
        return str(parsed)
    return str(parsed.ipv4_mapped or ip_network((int(parsed), 64), strict=False))
