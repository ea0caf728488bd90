"""The middleware around all others: it notes each request, once, when its answer has ended.

It is also where a request's origin begins (core/telemetry.py), by which what the request brings about is known to be
its. The id itself is the guard's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era.api.protocol.answers import HUNG_UP
from era.core.owners.api_keys import Caller
from era.core.telemetry import Note, Origin, RequestEnded, Trace, new_request_id, origin
from era.wire.sessions import SESSION_ID

_SESSION = re.compile(rf"/(?:api/sessions|proxy)/({SESSION_ID[1:-1]})(?:/|$)")


class Observing:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, note: Note, trace: Callable[[str | None], Trace | None]) -> None:
        """`trace` gets the header `traceparent`, if there is one, and says where the request is in a trace; None where
        nobody asked for traces."""
        self._app = app
        self._note = note
        self._trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        began_at, began = time.time(), time.monotonic()
        request_id = new_request_id()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        trace = self._trace(_traceparent(scope))
        token = origin.set(Origin(request_id, trace))
        status = 0
        failure: BaseException | None = None

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception as error:
            failure, status = error, 500
            raise
        finally:
            origin.reset(token)
            caller: Caller | None = state.get("caller")
            code, message = state.get("refusal", (None, None))
            found = _SESSION.match(scope["path"])
            status = state.get("broke_off") or status or HUNG_UP  # what was to be sent, where that broke off
            self._note(
                RequestEnded(
                    state["request_id"],  # or that of the host which passes the request on
                    scope["method"],
                    route_of(scope),
                    status,
                    began_at,
                    time.monotonic() - began,
                    owner=caller.owner if caller else None,
                    key_id=caller.key_id if caller else None,
                    session_id=found[1] if found else None,
                    code=code,
                    message=message if status >= 500 else None,
                    failure=failure,
                    trace=trace,
                )
            )


def _traceparent(scope: Scope) -> str | None:
    """The header `traceparent`, None where there is none, or more than one."""
    values = [value for name, value in scope["headers"] if name == b"traceparent"]
    return values[0].decode("latin-1") if len(values) == 1 else None


def route_of(scope: Scope) -> str:
    """The pattern of the route that a request took: one of a few, whatever its path was."""
    state = scope["state"]
    if "site" in state:
        return "site"
    path = getattr(scope.get("route"), "path", None)
    if path:
        return str(path)
    for prefix in ("/proxy", "/mcp"):
        if scope["path"].startswith(prefix):
            return prefix
    return "other"
