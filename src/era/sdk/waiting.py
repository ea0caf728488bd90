"""Requests over httpx, for asyncio: the counterpart of blocking.py."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx

from era.sdk import keepalive
from era.sdk.blocking import EVENTS_SECONDS, is_event_stream, parsed
from era.sdk.calls import Body, Call
from era.sdk.errors import AnswerTimeout, ConnectionLost, ServerAway

_IDLE_SECONDS = 2.0
"""How long a connection waits for another request. The server closes one after some more."""

async_sleep = asyncio.sleep

AsyncInterruption = asyncio.CancelledError
"""Raised in a call whose caller is interrupted."""

_going_on: set[asyncio.Task[Any]] = set()


async def async_in_thread[T](function: Callable[..., T], *arguments: Any) -> T:
    """Call a function that waits for the disk in a thread."""
    return await asyncio.to_thread(function, *arguments)


async def async_finished[T](work: Coroutine[Any, Any, T]) -> T:
    """Wait for a coroutine. It goes on if the caller is cancelled meanwhile."""
    task = asyncio.create_task(work)
    _going_on.add(task)
    task.add_done_callback(_going_on.discard)
    return await asyncio.shield(task)


class AsyncAnswer:
    """An answer whose body is still to be read. Whoever has it must read it to its end or close it."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._response = response

    async def read(self) -> bytes:
        """All of the body. Raises ConnectionLost."""
        try:
            return await self._response.aread()
        except httpx.TimeoutException:
            raise AnswerTimeout("The rest of the answer didn't come in time.") from None
        except httpx.TransportError as error:
            raise ConnectionLost(f"The connection broke within the answer: {error}.") from None

    async def json(self) -> Any:
        """The body as JSON. Raises NotEra where it is none."""
        return parsed(self.status, await self.read())

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises ConnectionLost."""
        try:
            async for piece in self._response.aiter_bytes():
                yield piece
        except httpx.TimeoutException:
            raise AnswerTimeout("The rest of the answer didn't come in time.") from None
        except httpx.TransportError as error:
            raise ConnectionLost(f"The connection broke within the answer: {error}.") from None
        finally:
            await self.close()

    async def close(self) -> None:
        """Give up what wasn't read."""
        await self._response.aclose()


class AsyncTransport:
    """Sends requests to one server. One event loop at a time may use it."""

    def __init__(self, url: str, headers: dict[str, str], connect_seconds: float) -> None:
        self._url = url
        self._connect_seconds = connect_seconds
        verify: ssl.SSLContext | bool = ssl.create_default_context() if url.startswith("https:") else False
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=_IDLE_SECONDS)
        self._client = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            transport=httpx.AsyncHTTPTransport(
                verify=verify, trust_env=False, limits=limits, socket_options=keepalive.OPTIONS
            ),
            trust_env=False,
            timeout=None,  # each request has its own
        )

    async def open(self, call: Call, seconds: float | None) -> AsyncAnswer:
        """Send a request, and wait so many seconds for the answer to begin and for each piece of it; None: for ever.

        Raises ServerAway, ConnectionLost or AnswerTimeout.
        """
        body = call.body
        headers = call.headers
        if isinstance(body, Body) and body.size is not None:
            headers = {**headers, "Content-Length": str(body.size)}
        content = _pieces(body) if isinstance(body, Body) else body
        timeout = httpx.Timeout(seconds, connect=self._connect_seconds)
        request = self._client.build_request(
            call.method, call.target, content=content, headers=headers, timeout=timeout
        )
        try:
            response = await self._client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ServerAway(f"No server answers at {self._url}: {error}.") from None
        except httpx.TimeoutException:
            raise AnswerTimeout(f"{self._url} didn't answer in {seconds:g} seconds.") from None
        except httpx.TransportError as error:
            raise ConnectionLost(f"{self._url} hung up: {error or type(error).__name__}.") from None
        if seconds is not None and is_event_stream(response.headers.get("content-type")):
            # The body is read with what stands here.
            request.extensions["timeout"]["read"] = max(seconds, EVENTS_SECONDS)
        return AsyncAnswer(response)

    async def close(self) -> None:
        await self._client.aclose()


async def _pieces(body: Body) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(body.piece):
        yield piece
