"""The HTTP application: routers, the guard before them, and every error in the contract's shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from era import __version__
from era.api import (
    api_keys,
    archives,
    capsules,
    files,
    health,
    history,
    inbox,
    languages,
    pages,
    proxy,
    runs,
    sessions,
    setup,
    storage,
    versions,
)
from era.api.context import Answer, BodyProblem, Context
from era.api.guard import Guard, error_body, error_headers
from era.api.hot_run import HotRun
from era.errors import BadRequest, EraError, MethodNotAllowed, NotFound
from era.settings import Settings

log = structlog.get_logger()


def build(settings: Settings, context: Context) -> FastAPI:
    """The application that serves `context`."""
    # Routes are tried in order, so the busiest come first.
    modules = (
        runs,
        sessions,
        setup,
        versions,
        files,
        archives,
        history,
        capsules,
        proxy,
        inbox,
        storage,
        api_keys,
        health,
        languages,
        pages,
    )
    app = application([*(module.router for module in modules), storage.resources])
    app.state.context = context
    app.state.storage = context.storage
    app.router.routes.append(proxy.PublicUrls())
    names = [settings.host, urlsplit(settings.public_url or "").hostname or settings.host]
    bounds = {("POST", capsules.IMPORT_PATH): settings.import_mb << 20}
    app.add_middleware(HotRun, context=context, failed=_era_error)
    app.add_middleware(
        Guard, keys=context.api_keys, names=names, idle_seconds=settings.body_idle_seconds, bounds=bounds
    )
    return app


def application(routers: Iterable[APIRouter], *, described: bool = True) -> FastAPI:
    """An application with these routes and errors in the contract's shape, but without the guard.

    `described` adds /openapi.json.
    """
    # No redirect of /api/sessions/ to /api/sessions: `DELETE /api/sessions/$ID` with an empty $ID must not delete all.
    app = _Application(
        title="ERA",
        version=__version__,
        openapi_url="/openapi.json" if described else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(EraError, _era_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    return app


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """FastAPI's description, without the 422 that it adds to every route: invalid bodies get a 400 here."""
        is_cached = self.openapi_schema is not None
        schema = super().openapi()
        if not is_cached:
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        return schema


def _answer(request: Request, error: EraError, extra: dict[str, str] | None = None) -> Response:
    body = error_body(error, request.state.request_id)
    return Answer(body, error.status, headers={**error_headers(error), **(extra or {})})


async def _era_error(request: Request, error: Exception) -> Response:
    """The answer to an error that ERA raised on purpose. The server's own failures are logged."""
    if not isinstance(error, EraError):
        raise error
    if error.status >= 500:
        log.error("request_failed", path=request.url.path, code=error.code, error=error.message)
    return _answer(request, error)


async def _invalid(request: Request, error: Exception) -> Response:
    """The answer to a request that doesn't fit its model: the first problem in words, all in `details`."""
    if not isinstance(error, RequestValidationError):
        raise error
    problems = [_problem(item) for item in error.errors()]
    return _answer(
        request, BadRequest(problems[0][0], hint=problems[0][1], code="invalid_field", details=_details(error))
    )


def _details(error: RequestValidationError) -> list[dict[str, str]]:
    """The problems of an invalid body, by field. Never the value: it might be a secret of `env`."""
    return [{"field": _field(item), "problem": item["msg"]} for item in error.errors()]


def _field(item: dict[str, Any]) -> str:
    """The dotted name of the field that one of pydantic's errors is about."""
    return ".".join(str(part)[:80] for part in item["loc"][1:])


def _problem(item: dict[str, Any]) -> tuple[str, str]:
    """The message and the hint for one of pydantic's errors."""
    field = _field(item)
    if not field or item["loc"] == ("body",):
        return "The body must be a JSON object.", "Send it with the header 'Content-Type: application/json'."
    if item["type"] == "extra_forbidden":
        return f"'{field}' is not a field of this call.", "Leave it out; /docs lists the fields that this server knows."
    if item["type"] == "missing":
        return f"'{field}' is missing.", "See /docs for the fields of this call."
    problem = item["msg"].removeprefix("Value error, ")
    return f"'{field}' is not valid: {problem}.", "See /docs for the fields of this call."


async def _http_error(request: Request, error: Exception) -> Response:
    """The answer to an HTTPException of FastAPI's or Starlette's."""
    if isinstance(error, BodyProblem):
        return _answer(request, error.error)
    if not isinstance(error, HTTPException):
        raise error
    if isinstance(error.__cause__, EraError):  # raised while FastAPI read the body
        return _answer(request, error.__cause__)
    if error.status_code == 405:
        return _answer(
            request,
            MethodNotAllowed(f"{request.method} is not a method of this path."),
            {"Allow": (error.headers or {}).get("allow", (error.headers or {}).get("Allow", ""))},
        )
    if error.status_code == 404:
        return _answer(request, NotFound("There is nothing at this path.", hint="See /docs for the paths there are."))
    return _answer(request, BadRequest(f"The request could not be read: {error.detail}."))


async def _bug(request: Request, error: Exception) -> Response:
    """The answer to an unexpected exception. Its details go to the log only."""
    log.error("bug", path=request.url.path, request_id=request.state.request_id, exc_info=error)
    return _answer(request, EraError("The service failed."))
