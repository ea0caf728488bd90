"""Requests over http.client, on connections that are kept for the next. Any thread may use it."""

from __future__ import annotations

import os
import select
import ssl
import time
from collections import deque
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from json import loads
from socket import socket
from typing import Any
from urllib.parse import urlsplit

from era.sdk import keepalive
from era.sdk.calls import Body, Call
from era.sdk.errors import AnswerTimeout, ConnectionLost, NotEra, ServerAway

_IDLE_SECONDS = 2.0
"""How long a connection waits for another request. The server closes one after some more."""

EVENTS_SECONDS = 45.0
"""How long the next piece of an event stream is waited for at least. The server sends a heartbeat every 15 seconds."""

_PIECE = 64 << 10

sleep = time.sleep

Interruption = KeyboardInterrupt
"""Raised in a call whose caller is interrupted."""


def in_thread[T](function: Any, *arguments: Any) -> Any:
    """Call a function. Its counterpart for asyncio does that in a thread."""
    return function(*arguments)


def finished[T](result: T) -> T:
    """Return a result. Its counterpart for asyncio waits for it."""
    return result


class Answer:
    """An answer whose body is still to be read. Whoever has it must read it to its end or close it."""

    def __init__(self, transport: Transport, connection: HTTPConnection, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self._transport = transport
        self._connection = connection
        self._response = response
        self._complete = False

    def read(self) -> bytes:
        """All of the body. Raises ConnectionLost."""
        try:
            content = self._response.read()
        except TimeoutError:
            self.close()
            raise AnswerTimeout("The rest of the answer didn't come in time.") from None
        except (OSError, HTTPException) as error:
            self.close()
            raise ConnectionLost(f"The connection broke within the answer: {error or type(error).__name__}.") from None
        self._end()
        return content

    def json(self) -> Any:
        """The body as JSON. Raises NotEra where it is none."""
        return parsed(self.status, self.read())

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes. Raises ConnectionLost."""
        try:
            while piece := self._response.read1(_PIECE):
                yield piece
            if self._response.length:  # read1 doesn't tell an early end from a regular one
                raise ConnectionLost("The connection broke within the answer.")
            self._end()
        except TimeoutError:
            raise AnswerTimeout("The rest of the answer didn't come in time.") from None
        except (OSError, HTTPException) as error:
            raise ConnectionLost(f"The connection broke within the answer: {error or type(error).__name__}.") from None
        finally:
            self.close()

    def _end(self) -> None:
        """All was read, so the connection can be used again."""
        self._complete = True
        self._transport.keep(self._connection, self._response)

    def close(self) -> None:
        """Give up what wasn't read, and with it the connection."""
        if not self._complete:
            self._complete = True
            self._connection.close()
            self._response.close()


class Transport:
    """Sends requests to one server."""

    def __init__(self, url: str, headers: dict[str, str], connect_seconds: float) -> None:
        parts = urlsplit(url)
        self._url = url
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._prefix = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = headers
        self._connect_seconds = connect_seconds
        self._idle: deque[tuple[float, int, HTTPConnection]] = deque()

    def open(self, call: Call, seconds: float | None) -> Answer:
        """Send a request, and wait so many seconds for the answer to begin and for each piece of it; None: for ever.

        Raises ServerAway, ConnectionLost or AnswerTimeout.
        """
        connection = self._connection()
        if connection.sock is not None:  # it is connected, which the types don't say
            connection.sock.settimeout(seconds)
        body, chunked = call.body, False
        headers = {**self._headers, **call.headers}
        if isinstance(body, Body):
            chunked = body.size is None
            if chunked:
                headers["Transfer-Encoding"] = "chunked"
            else:
                headers["Content-Length"] = str(body.size)
        try:
            try:
                pieces = body.pieces() if isinstance(body, Body) else body
                connection.request(call.method, self._prefix + call.target, pieces, headers, encode_chunked=chunked)
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise
                # The server may have refused a long body before it was complete: its answer says why.
            sock = connection.sock  # which the connection hasn't any more if it ends with the answer
            response = connection.getresponse()
            if seconds is not None and is_event_stream(response.headers["content-type"]):
                sock.settimeout(max(seconds, EVENTS_SECONDS))
        except TimeoutError:
            connection.close()
            raise AnswerTimeout(f"{self._url} didn't answer in {seconds:g} seconds.") from None
        except (OSError, HTTPException) as error:
            connection.close()
            raise ConnectionLost(f"{self._url} hung up: {error or type(error).__name__}.") from None
        except BaseException:
            connection.close()
            raise
        return Answer(self, connection, response)

    def keep(self, connection: HTTPConnection, response: HTTPResponse) -> None:
        """Keep the connection of an answer that was read to its end for another request."""
        if response.will_close or connection.sock is None:
            connection.close()
        else:
            self._idle.append((time.monotonic(), os.getpid(), connection))

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[2].close()

    def _connection(self) -> HTTPConnection:
        """A connection, one that was used before if there is one. Raises ServerAway."""
        while self._idle:
            try:
                since, owner, connection = self._idle.pop()
            except IndexError:
                break  # another thread has taken it
            sock = connection.sock
            # Something to read where nothing was asked is the end of the connection. A process that this one was forked
            # from still uses its connections.
            fresh = sock is not None and owner == os.getpid() and time.monotonic() - since < _IDLE_SECONDS
            if fresh and not _is_readable(sock):
                return connection
            connection.close()
        if self._tls is None:
            connection = HTTPConnection(self._host, self._port, timeout=self._connect_seconds)
        else:
            connection = HTTPSConnection(self._host, self._port, timeout=self._connect_seconds, context=self._tls)
        try:
            connection.connect()
            for option in keepalive.OPTIONS:
                connection.sock.setsockopt(*option)
        except OSError as error:
            connection.close()
            raise ServerAway(f"No server answers at {self._url}: {error.strerror or error}.") from None
        return connection


def is_event_stream(content_type: str | None) -> bool:
    return (content_type or "").startswith("text/event-stream")


def _is_readable(sock: socket) -> bool:
    poll = select.poll()  # not `select`, which takes no descriptor above 1023
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def parsed(status: int, content: bytes) -> Any:
    """The JSON of an answer. Raises NotEra where it is none."""
    try:
        return loads(content)
    except ValueError:
        error = NotEra(f"The answer is a {status} without JSON: {content[:80]!r}.")
        error.status = status
        raise error from None
