"""Calls of the HTTP API, as the tools make them: answers as plain values, errors as sentences for a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
import httpx

from era.common.urls import file_path

MOST_BYTES = 16 << 20
"""Of content, which is in memory as a whole: that of the service, where its own tools are used."""

_STOP_SECONDS = 5.0

_STOPPING: set[asyncio.Task[None]] = set()
"""Tasks that stop runs whose calls were cancelled before they began. asyncio itself holds tasks only weakly."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)

_HINTS = {
    "GET /api/sessions lists the sessions there are.": "era_list_sessions lists them, era_create_session makes one.",
    "GET /api/sessions/{id}/files lists those there are.": "era_list_files lists those there are.",
    "GET /api/sessions/{id}/processes lists": "era_list_processes lists",
}
"""Hints of the API that name its calls, and what they are with tools."""

_HINTS_BY_CODE = {
    "precondition_failed": "It was changed meanwhile: read it again, then edit it.",
    "no_code": "Give 'code' or a 'command'.",
    "no_input": "Start one with 'stdin': true.",
    "unauthorized": "Whoever set this tool up has to give it the server's key: as ERA_API_KEY, or as a bearer token.",
}


class CallFailed(Exception):
    """A call was refused or could not be made. The message is for the model: what is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a file."""

    data: bytes
    media_type: str
    etag: str


async def _tell_nobody(_: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls of one caller: `client` knows the server, `headers` are those that say who is calling."""

    client: httpx.AsyncClient
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    progress: Callable[[str], Awaitable[None]] = _tell_nobody
    """Gets what a program has just written."""

    async def call(self, method: str, path: str, body: Any = None, **query: Any) -> dict[str, Any]:
        """The answer of a call with this JSON body, None for none. Raises CallFailed."""
        async with self._response(method, path, body=body, params=_query(query)) as response:
            return _checked(response, await response.aread())

    async def send(self, method: str, path: str, content: bytes, *, if_match: str | None = None) -> dict[str, Any]:
        """Send raw bytes, and return the answer. With `if_match` they replace a file only if it has this ETag. Raises
        CallFailed."""
        headers = {} if if_match is None else {"If-Match": if_match}
        async with self._response(method, path, headers, content=content) as response:
            return _checked(response, await response.aread())

    async def content(self, path: str) -> Content:
        """What a GET of raw bytes answers, up to MOST_BYTES. Raises CallFailed."""
        async with self._response("GET", path) as response:
            if response.status_code not in (200, 206):
                _checked(response, await response.aread())
            data = bytearray()
            async for piece in response.aiter_bytes():
                data += piece
                if len(data) > MOST_BYTES:
                    over = f"That has over {MOST_BYTES >> 20} MiB, too much for a tool."
                    raise CallFailed(f"{over} Read a part of it with a program in the session.")
            media_type = response.headers.get("content-type", "application/octet-stream").partition(";")[0]
            return Content(bytes(data), media_type, response.headers.get("etag", ""))

    async def events(self, path: str, body: Any) -> AsyncGenerator[dict[str, Any]]:
        """The events of a run that a POST to this path begins: that of a session's `/stream`, or of `/api/execute`. A
        caller that is cancelled stops the run. Raises CallFailed, also where the service failed in the middle."""
        in_session = path.endswith("/stream")
        async with AsyncExitStack() as stack:
            opened = self._response("POST", path, {"Accept": "text/event-stream"}, body=body)
            opening = asyncio.ensure_future(opened.__aenter__())
            try:
                response = await (asyncio.shield(opening) if in_session else opening)
            except anyio.get_cancelled_exc_class():
                if in_session:  # the run may wait for its turn, and would still begin
                    stopping = asyncio.create_task(self._stop_begun(opening, opened, path))
                    _STOPPING.add(stopping)
                    stopping.add_done_callback(_STOPPING.discard)
                raise
            stack.push_async_exit(opened)
            if response.status_code != 200:
                _checked(response, await response.aread())
            try:
                async for line in _lines(response):
                    if line.startswith(b"data: "):
                        event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                        if event["type"] == "error":
                            raise CallFailed(_sentence(event))
                        yield event
            except (anyio.get_cancelled_exc_class(), GeneratorExit):
                with anyio.move_on_after(_STOP_SECONDS, shield=True):
                    await self._stop(response, path)
                raise

    async def _stop_begun(
        self, opening: asyncio.Future[httpx.Response], opened: AbstractAsyncContextManager[httpx.Response], path: str
    ) -> None:
        """Stop a run as soon as it has begun."""
        with suppress(CallFailed, httpx.HTTPError):
            response = await opening
            try:
                await self._stop(response, path)
            finally:
                await opened.__aexit__(None, None, None)

    async def _stop(self, response: httpx.Response, path: str) -> None:
        """Stop the run that this answer is about. One without a session ends when its caller hangs up."""
        if run_id := response.headers.get("x-era-run"):
            await self.client.delete(f"{path.removesuffix('/stream')}/runs/{run_id}", headers=self.headers)

    async def output(self, path: str, after: int) -> AsyncGenerator[tuple[int, dict[str, Any]]]:
        """Yield the events of a process behind this byte of its output, each with the number of its last byte. Raises
        CallFailed."""
        async with self._response("GET", path, {"Accept": "text/event-stream"}, params={"after": after}) as response:
            if response.status_code != 200:
                _checked(response, await response.aread())
            event: dict[str, Any] = {}
            async for line in _lines(response):
                if line.startswith(b"data: "):
                    event = json.loads(line.removeprefix(b"data: "))
                    if event["type"] == "error":
                        raise CallFailed(_sentence(event))
                elif line.startswith(b"id: "):
                    yield int(line.removeprefix(b"id: ")), event

    @asynccontextmanager
    async def _response(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: Any = None, **options: Any
    ) -> AsyncIterator[httpx.Response]:
        headers = {**self.headers, **(headers or {})}
        if body is not None:
            # In a thread: arguments may be a MiB of small values.
            options["content"] = await anyio.to_thread.run_sync(_json, body)
            headers["Content-Type"] = "application/json"
        try:
            async with self.client.stream(method, path, headers=headers, **options) as response:
                yield response
        except httpx.ConnectError as error:
            why = f"can't be reached ({error})" if str(error) else "can't be reached"
            raise CallFailed(
                f"The ERA server at {self.client.base_url} {why}. Is it running? ERA_SERVER names it."
            ) from None
        except httpx.TransportError as error:
            raise CallFailed(f"The ERA server hung up before its answer was complete ({error}).") from None


def given_file_path(session_id: str, path: str) -> str:
    """The path of a session's file, as a model names it: a leading `/workspace/` or `./` is the working directory."""
    return file_path(session_id, path.removeprefix("/workspace/").removeprefix("./"))


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of a stream of events. httpx would end lines at characters that may be in a program's output, too."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line


def _json(body: Any) -> bytes:
    """A body as JSON, encoded in steps, between which Python may switch threads."""
    return "".join(_ENCODER.iterencode(body)).encode()


def _query(query: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in query.items() if value is not None}


def _checked(response: httpx.Response, body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise CallFailed(f"The server answered {response.status_code}, and not as an ERA server.")
    if response.is_error:
        raise CallFailed(_sentence(answer))
    return answer


def _sentence(error: Mapping[str, Any]) -> str:
    """An error of the API's for a model: hints that name calls name the tools for them."""
    hint = error.get("hint") or ""
    for calls, tools in _HINTS.items():
        hint = hint.replace(calls, tools)
    hint = _HINTS_BY_CODE.get(error.get("code", "")) or hint
    return f"{error.get('error', 'The call failed.')} {hint}".strip()
