"""The shortcut of the routes that are called most: to run code, to start and follow a process, to make a session, to
read and write a file.

FastAPI finds out anew for each request which route it is for, what its parameters and dependencies are, and in which
order to call them; for these calls that costs more than the rest of the API. So a middleware calls the very functions
of these routes for requests that are as nearly all are. Whatever is unusual about a request, such as a query or an
invalid body, is left to FastAPI, which the request reaches as if nothing had happened. So there are no checks of their
own here, and the two can't differ in what they refuse.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era.api import context as dependencies
from era.api import files, processes, runs, sessions
from era.api.context import Context
from era.api.event_stream import resumed_after
from era.core import jsontext
from era.errors import EraError
from era.wire.sessions import SESSION_ID

HOT: Sequence[Callable[..., Any]] = (
    runs.run,
    runs.stream,
    processes.start_process,
    processes.follow_process,
    sessions.create_session,
    sessions.get_session,
    files.put_file,
    files.get_file,
)
"""The functions of these routes."""

type _Resolver = Callable[[Request, Context, Mapping[str, str]], Awaitable[Any]]


async def _from_the_start(*_: object) -> int:
    return 0


_DEPENDENCIES: Mapping[Callable[..., Any] | None, _Resolver] = {
    dependencies.context: lambda request, context, path: dependencies.context(request),
    dependencies.owned_id: lambda request, context, path: dependencies.owned_id(path["session_id"], request),
    dependencies.caller_id: lambda request, context, path: dependencies.caller_id(request),
    dependencies.idempotency_key: lambda request, context, path: dependencies.idempotency_key(request),
    resumed_after: _from_the_start,
    files.path_in_url: lambda request, context, path: files.path_in_url(request),
}
"""How the dependencies of these routes are had without FastAPI."""

_UNUSUAL = b"last-event-id"
"""The header that `_from_the_start` can do without: requests that have it are left to FastAPI."""

_PARAMETER = re.compile(r"\{(\w+)(:rest)?\}")


class _HotRoute:
    """One route, as FastAPI has taken it from its function."""

    def __init__(self, route: APIRoute) -> None:
        """Raises KeyError for a route with a dependency that isn't known here."""
        self.template = route.path
        self.function = route.endpoint
        self.pattern = re.compile(_PARAMETER.sub(_pattern, route.path))
        body: Any = None if route.body_field is None else route.body_field.field_info.annotation
        self.body: type[BaseModel] | None = body
        dependant = route.dependant
        self._request = dependant.request_param_name
        self._of_path = [field.name for field in dependant.path_params]
        self._dependencies = [(each.name, _DEPENDENCIES[each.call]) for each in dependant.dependencies]

    async def answer(
        self, request: Request, context: Context, path: Mapping[str, str], body: BaseModel | None
    ) -> Response:
        """What the function answers. Raises EraError."""
        arguments: dict[str, Any] = {name: path[name] for name in self._of_path}
        for name, resolve in self._dependencies:
            arguments[str(name)] = await resolve(request, context, path)
        if self._request is not None:
            arguments[self._request] = request
        if body is not None:
            arguments["body"] = body
        response: Response = await self.function(**arguments)
        return response


class HotRoutes:
    """ASGI middleware, for requests that have passed the guard."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Iterable[APIRoute],
        context: Context,
        failed: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        """`routes` are all of the application's; `failed` makes the answer to an EraError."""
        self._app = app
        self._context = context
        self._failed = failed
        self._routes: dict[str, list[_HotRoute]] = {}
        for route in routes:
            if route.endpoint in HOT:
                for method in (route.methods or set()) - {"HEAD"}:
                    self._routes.setdefault(method, []).append(_HotRoute(route))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = path = body = None
        if scope["type"] == "http" and not scope["query_string"] and "site" not in scope.get("state", ()):
            for route in self._routes.get(scope["method"], ()):
                if (path := route.pattern.fullmatch(scope["path"])) is not None:
                    break
        if route is None or path is None or not _is_plain(scope["headers"], route):
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["route"] = route.template  # whatever is raised while its body comes
        if route.body is not None:
            message = await whole_body(receive)
            body = await _parsed(message, route.body, scope["state"])
            if body is None:
                receive = again(message, receive)
                del message  # which is let go once it has been read again
                await self._app(scope, receive, send)
                return
            del message  # as a run may wait for long
        request = Request(scope, receive)
        try:
            answer = await route.answer(request, self._context, path.groupdict(), body)
        except EraError as error:
            answer = await self._failed(request, error)
        await answer(scope, receive, send)


def _pattern(parameter: re.Match[str]) -> str:
    """The pattern of what can be in the place of a parameter of a path, such that no route refuses it."""
    if parameter[2]:
        return f"(?P<{parameter[1]}>(?s:.*))"
    return f"(?P<{parameter[1]}>{SESSION_ID[1:-1] if parameter[1] == 'session_id' else '[^/]{1,128}'})"


def _is_plain(headers: Iterable[tuple[bytes, bytes]], route: _HotRoute) -> bool:
    """Whether a request has JSON where its route takes that, and no header that matters besides."""
    kinds = []
    for name, value in headers:
        if name == _UNUSUAL:
            return False
        if name == b"content-type":
            kinds.append(value)
    return route.body is None or kinds == [b"application/json"]


async def whole_body(receive: Receive) -> Message:
    """The body of a request in one message, or the last message where the client hangs up. The client decides how many
    pieces its bytes come in, and a message takes far more memory than a byte: so no more than one is kept."""
    message, content = await receive(), bytearray()
    while message.get("more_body"):
        content += message.get("body", b"")
        message = await receive()
    if not content or message["type"] != "http.request":
        return message
    return {**message, "body": bytes(content + message.get("body", b""))}


async def _parsed(message: Message, model: type[BaseModel], state: dict[str, Any]) -> BaseModel | None:
    """Validate the body in this message; return None if it isn't valid or didn't come whole. The state of a request
    whose body isn't valid keeps what was parsed, so that FastAPI doesn't parse it again."""
    if message["type"] != "http.request":
        return None
    try:
        value = await dependencies.read_json(message.get("body", b""), dependencies.names_of(model))
    except (jsontext.JsonProblem, EraError) as error:
        if message.get("body"):  # an empty body may stand for an object without fields
            state[dependencies.READ_JSON] = error
        return None
    try:
        return model.model_validate(value)
    except ValidationError:
        state[dependencies.READ_JSON] = value
        return None


def again(message: Message, receive: Receive) -> Receive:
    """A `receive` that gives this message once more, lets go of it, and then goes on."""
    kept = [message]

    async def receive_again() -> Message:
        return kept.pop() if kept else await receive()

    return receive_again
