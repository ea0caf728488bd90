"""The shortcut of `POST /api/sessions/{session_id}/run`, the one call that is made more often than all others together.

FastAPI finds out anew for each request which route it is for, what its parameters and dependencies are, and in which
order to call them; for this call that costs more than the rest of the API. So a middleware answers those of these calls
that are as nearly all are. Whatever is unusual about a request, such as a header that matters or an invalid body, is
left to the route in runs.py, which the request reaches as if nothing had happened. So no error is told here, and the
two can't differ in what they refuse.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable

from fastapi import Request, Response
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era.api.context import Context
from era.api.runs import run_request
from era.api.streaming import run_response
from era.core import jsontext
from era.core.models import OwnedId
from era.errors import EraError
from era.wire.runs import RunBody, run_answer
from era.wire.sessions import SESSION_ID

ROUTE = "/api/sessions/{session_id}/run"
_PATH = re.compile(rf"/api/sessions/({SESSION_ID[1:-1]})/run")


class HotRun:
    """ASGI middleware, for requests that have passed the guard."""

    def __init__(
        self, app: ASGIApp, *, context: Context, failed: Callable[[Request, Exception], Awaitable[Response]]
    ) -> None:
        """`failed` makes the answer to an EraError."""
        self._app = app
        self._context = context
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if path is None or "site" in scope.get("state", ()) or scope["query_string"] or not _is_plain(scope["headers"]):
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = _parsed(messages)
        if body is None or body.background or body.secrets:
            await self._app(scope, _again(messages, receive), send)
            return
        request = Request(scope)
        request.state.route = ROUTE
        try:
            caller = scope["state"]["caller"]
            session_id = OwnedId(caller.owner, path[1], caller.key_id)
            done = await self._context.runs.run(session_id, run_request(body, request, self._context, None))
            answer = await run_response(done, run_answer)
        except EraError as error:
            answer = await self._failed(request, error)
        await answer(scope, receive, send)


def _is_plain(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request has JSON, and no header that matters besides."""
    kinds = [value for name, value in headers if name in (b"content-type", b"idempotency-key")]
    return kinds == [b"application/json"]


def _parsed(messages: list[Message]) -> RunBody | None:
    """The body of a request whose messages these are, None if it isn't valid or didn't come whole."""
    if messages[-1]["type"] != "http.request":
        return None
    try:
        return RunBody.model_validate(jsontext.loads(b"".join(message.get("body", b"") for message in messages)))
    except (jsontext.JsonProblem, ValidationError):
        return None


def _again(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives these messages once more, and then goes on."""
    given = iter(messages)

    async def receive_again() -> Message:
        message = next(given, None)
        return await receive() if message is None else message

    return receive_again
