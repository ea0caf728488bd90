"""The HTTP application: routers, the guard before them, and every error in the contract's shape."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Lifespan

from era import __version__
from era.api import description
from era.api.guard import Guard
from era.api.hosts.home_forwarding import HomeForwarding, session_in
from era.api.hosts.other_hosts import answers
from era.api.observing import Observing
from era.api.protocol.answers import Answer, error_body, error_headers
from era.api.routes import (
    archives,
    files,
    health,
    inbox,
    links,
    owners,
    pages,
    processes,
    proxy,
    runs,
    sessions,
    storage,
    terminals,
    versions,
    webhooks,
)
from era.api.routes.mcp import Mcp
from era.api.routing.context import Context, active_here
from era.api.routing.foreign_calls import path_hint, session_path_hint
from era.api.routing.validation import invalid
from era.common.spelling import nearest
from era.core.concurrency.tasks import computing
from era.errors import (
    BadRequest,
    EraError,
    Fenced,
    MethodNotAllowed,
    NoSession,
    NotFound,
    QuotaReached,
    RateReached,
    SessionMoved,
)
from era.settings import Settings

_COMPARED = 200
"""How many of the caller's newest sessions are looked through for one whose id was misspelt."""

_LONGEST_COMPARED = 40
"""Characters of an id that is compared. Those that the server makes up have fewer."""

_NEARLY_THE_SAME = 0.8
"""How much of two ids must be the same. Those that the server makes up have more than half in common."""

_LONGEST_PATH = 300
"""Characters of a path for which another one is looked for."""


_ROUTERS = (
    runs.router,
    sessions.router,
    sessions.setup,
    versions.router,
    processes.router,
    terminals.router,
    files.watching,
    files.router,
    archives.router,
    links.router,
    runs.records,
    archives.capsules,
    processes.contexts,
    proxy.router,
    inbox.router,
    storage.router,
    owners.keys,
    owners.audit,
    owners.router,
    webhooks.router,
    health.router,
    health.strict,
    pages.router,
    links.public,
    storage.resources,
    runs.all_runs,
)
"""All routes. They are tried in this order, so the busiest come first."""


def build(settings: Settings, context: Context) -> FastAPI:
    """The application that serves `context`."""
    mcp = Mcp()
    app = application(_ROUTERS, lifespan=mcp.lifespan)
    app.state.context = context
    app.state.storage = context.storage
    app.router.routes.insert(0, proxy.SiteUrls())
    app.router.routes.extend([*mcp.routes(), proxy.PublicUrls()])
    names = [settings.host, urlsplit(settings.public_url or "").hostname or settings.host]
    bounds = {("POST", archives.IMPORT_PATH): context.rules.maxima.disk_bytes}
    hops, moves = None, context.moves
    if context.homes is not None and context.other_hosts is not None and moves is not None:
        hops = context.other_hosts.hops
        app.add_middleware(
            HomeForwarding,
            homes=context.homes,
            session_of_site=context.sites.session_key,
            session_of_link=context.links.session_id,
            drain_seconds=settings.drain_seconds,
            other_hosts=context.other_hosts,
            moves=moves,
            answers=answers(
                context.homes,
                moves,
                lambda owner: active_here(owner, context),
                context.quotas.in_use_here,
                lambda: health.state_of_this(context),
                context.setups.kick,
            ),
        )
    app.add_middleware(
        Guard,
        keys=context.api_keys,
        tickets=context.tickets,
        names=names,
        bounds=bounds,
        site=context.sites.name,
        hops=hops,
    )
    app.add_middleware(Observing, note=context.note, trace=context.trace)
    return app


def application(
    routers: Iterable[APIRouter], *, described: bool = True, lifespan: Lifespan[FastAPI] | None = None
) -> FastAPI:
    """An application with these routes and errors in the contract's shape, but without the guard.

    `described` adds /openapi.json. `lifespan` is entered at the start, and left at the end.
    """
    routers = list(routers)
    # The guard takes a needless slash off the end of a path, and knows where it isn't needless: no redirects.
    app = _Application(
        title="ERA",
        version=__version__,
        openapi_url="/openapi.json" if described else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=description.operation_id,
        lifespan=lifespan,
    )
    app.state.routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(EraError, _era_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _hung_up)
    app.add_exception_handler(Exception, _bug)
    return app


class _Application(FastAPI):
    def setup(self) -> None:
        """Add the route of the description; ERA has pages of its own that show it."""
        self._deriving = asyncio.Lock()
        if self.openapi_url:
            self.add_route(self.openapi_url, self._describe, include_in_schema=False)

    def openapi(self) -> dict[str, Any]:
        """FastAPI's description, made whole (description.py)."""
        if self.openapi_schema is None:
            self.openapi_schema = description.completed(super().openapi(), self.state.routes)
        return self.openapi_schema

    async def _describe(self, request: Request) -> Response:
        """The description, which takes a second to derive once: in a thread, as all others would wait for it."""
        async with self._deriving:
            return Answer(await asyncio.to_thread(self.openapi))


def _answer(request: Request, error: EraError, extra: dict[str, str] | None = None) -> Response:
    request.state.refusal = (error.code, error.message)
    body = error_body(error, request.state.request_id)
    return Answer(body, error.status, headers={**error_headers(error), **(extra or {})})


async def _era_error(request: Request, error: Exception) -> Response:
    """The answer to an error that ERA raised on purpose."""
    if not isinstance(error, EraError):
        raise error
    if isinstance(error, SessionMoved | Fenced):
        note_moved(request)
    if isinstance(error, NoSession) and (caller := getattr(request.state, "caller", None)):
        context: Context = request.app.state.context
        newest = await context.store.newest_ids(caller.owner, _COMPARED)
        if found := await _nearest_id(caller.owner, error.session_id, newest):
            error.hint = f"Did you mean '{found}'? {error.hint}"
    is_strangers = isinstance(error, QuotaReached | RateReached) and getattr(request.state, "caller", None) is None
    answer = _answer(request, _of_somebody_elses_quota(error) if is_strangers else error)
    request.state.refusal = (error.code, error.message)  # for the log, whoever was told what
    return answer


async def _nearest_id(owner: str, missing: str, own: Iterable[str]) -> str | None:
    """The id of an owner's own that was probably meant. To compare two takes the product of their lengths, in a thread,
    as all others would wait for it."""
    if len(missing) > _LONGEST_COMPARED:
        return None
    short = [each for each in own if len(each) <= _LONGEST_COMPARED]
    return await computing(owner, nearest, missing, short, _NEARLY_THE_SAME)


def _of_somebody_elses_quota(error: EraError) -> EraError:
    """What somebody who has no key, but a public URL or a link, is told of a quota: neither the owner's numbers nor the
    ids of the owner's sessions, by which anybody could call those."""
    told = type(error)("This session's owner has no room for that.", hint="Send it again later.")
    told.retry_after = error.retry_after
    return told


def note_moved(request: Request) -> None:
    """See to it that the next call for this session looks where it is at home."""
    context: Context = request.app.state.context
    if context.homes is not None and (session_id := session_in(request.url.path)) is not None:
        context.homes.moved(session_id)
        request.state.moved = True  # what home_forwarding.py looks at


async def _invalid(request: Request, error: Exception) -> Response:
    """The answer to a request that doesn't fit its route, where the route has not said more about it itself."""
    if not isinstance(error, RequestValidationError):
        raise error
    return _answer(request, invalid(error))


async def _http_error(request: Request, error: Exception) -> Response:
    """The answer to an HTTPException of FastAPI's or Starlette's."""
    if not isinstance(error, HTTPException):
        raise error
    path = request.url.path
    if error.status_code == 405:
        there = _methods(request) or (error.headers or {}).get("Allow", "").split(", ")
        named = " and ".join(filter(None, [", ".join(there[:-1]), *there[-1:]]))
        message = f"{request.method} is not a method of this path; {named} {'are' if len(there) > 1 else 'is'}."
        problem = MethodNotAllowed(message, hint=session_path_hint(path[:_LONGEST_PATH]))
        return _answer(request, problem, {"Allow": ", ".join(there)})
    if error.status_code == 404:
        hint = "See /docs for the paths there are."
        if path.endswith("/"):
            hint = f"A name is missing behind its last slash. If you mean {path[:-1][-80:]}, leave the slash out."
        elif elsewhere := session_path_hint(path[:_LONGEST_PATH]):
            hint = elsewhere
        elif meant := _meant(request):
            hint = f"Did you mean {meant}? {hint}"
        elif elsewhere := path_hint(path[:_LONGEST_PATH]):
            hint = elsewhere
        return _answer(request, NotFound("There is nothing at this path.", hint=hint))
    return _answer(request, BadRequest(f"The request could not be read: {error.detail}."))


def _meant(request: Request) -> str | None:
    """The path that was probably meant, where a route's path has one other word, or `/api` before it."""
    path: str = request.scope["path"]
    if len(path) > _LONGEST_PATH:
        return None
    given = path.split("/")
    routes: list[APIRoute] = request.app.state.routes
    for words in (given, ["", "api", *given[1:]]):
        near = dict[int, set[str]]()
        for route in routes:
            template = route.path.split("/")
            if len(template) != len(words):
                continue
            fixed = [not name.startswith("{") for name in template]
            wrong = [at for at, name in enumerate(words) if (name != template[at] if fixed[at] else not name)]
            if not wrong:
                return "/".join(words)
            if len(wrong) == 1 and fixed[wrong[0]]:
                near.setdefault(wrong[0], set()).add(template[wrong[0]])
        for at, names in near.items():
            if found := nearest(words[at], sorted(names)):
                return "/".join([*words[:at], found, *words[at + 1 :]])
    return None


def _methods(request: Request) -> list[str]:
    """Return the methods of a request's path, in alphabetical order. Where routes have this very path, such as
    /api/sessions/import, only they count, not those with a parameter in its place."""
    path, routes = request.scope["path"], request.app.state.routes
    matching: list[APIRoute] = [route for route in routes if route.path_regex.match(path)]
    named = [route for route in matching if route.path == path] or matching
    return sorted(set().union(*(route.methods or set() for route in named)))


async def _hung_up(request: Request, error: Exception) -> Response:
    """What is counted where a client hangs up in the midst of its body: it is no failure of the service."""
    return _answer(request, BadRequest("The body ended before it was complete."))


async def _bug(request: Request, error: Exception) -> Response:
    """The answer to an unexpected exception. Its details go to the log only (observing.py)."""
    # It is made outside of the guard, which gives all other answers their id.
    return _answer(request, EraError("The service failed."), {"X-Request-Id": request.state.request_id})
