"""What the routers need, and what they share: the core's services, strict JSON, paths and answers."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, HTTPException, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.types import ASGIApp

from era import languages
from era.core import jsontext
from era.core.api_keys import ApiKeys, Caller
from era.core.capsules.service import Capsules
from era.core.files.archives import Archives
from era.core.files.edits import Listed
from era.core.files.session_files import SessionFiles
from era.core.idempotency import IdempotencyKeys, Made
from era.core.limits import Rules
from era.core.metadata import MetadataStore
from era.core.models import Claim, JsonObject, Language, OwnedId, Route, Session, Snapshot
from era.core.outputs import History
from era.core.public.inbox import Deliveries, Inbox
from era.core.public.live_servers import LiveServers
from era.core.runs import Runs
from era.core.secrets import Secret, secret
from era.core.sessions import Sessions
from era.core.setup.setups import Setups
from era.core.storage import Storage
from era.core.turns import Turns
from era.core.versions import Versions
from era.errors import BadRequest, EraError, NoLanguage, NotFound, TooLarge
from era.settings import Settings
from era.wire.base import ErrorAnswer
from era.wire.runs import SecretBody
from era.wire.sessions import SESSION_ID, session_answer
from era.wire.setup import SetupBody, wanted_setup

_MAX_ENV_BYTES = 1 << 20
_MAX_VARIABLE_BYTES = 128 << 10  # the kernel's bound for one string of an environment


@dataclass(frozen=True, slots=True)
class Context:
    """The core's services, put together by app.py."""

    settings: Settings
    rules: Rules
    sessions: Sessions
    runs: Runs
    live_servers: LiveServers
    inbox: Inbox
    deliveries: Deliveries
    history: History
    keys: IdempotencyKeys
    api_keys: ApiKeys
    versions: Versions
    setups: Setups
    session_files: SessionFiles
    archives: Archives
    capsules: Capsules
    storage: Storage
    turns: Turns
    store: MetadataStore
    files: Callable[[Snapshot], Awaitable[Sequence[Listed]]]
    isolation: Callable[[], JsonObject]
    pool_counts: Callable[[], Mapping[str, int]]
    end_background: Callable[[float], Coroutine[Any, Any, None]]
    """End what runs in the background, and commit it, in as many seconds."""

    end_runs: Callable[[], Awaitable[None]]
    """Kill what runs and start nothing any more."""

    serves_at: Callable[[int, ASGIApp], None]
    """To be called once this service listens, with its port and its application."""


async def context(request: Request) -> Context:  # not async, it would take a hop through a thread
    found: Context = request.app.state.context
    return found


UseContext = Annotated[Context, Depends(context)]


class BodyProblem(HTTPException):
    """Carries an EraError through FastAPI's reading of a body, which replaces any other exception."""

    def __init__(self, error: EraError) -> None:
        super().__init__(error.status, error.message)
        self.error = error


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return jsontext.loads(await self.body())
        except jsontext.JsonTooLarge as error:
            raise BodyProblem(TooLarge(f"The body {error}.")) from None
        except jsontext.JsonProblem as error:
            raise BodyProblem(BadRequest(f"The body {error}.", code="invalid_json")) from None


class StrictRoute(APIRoute):
    """A route whose body is JSON as jsontext reads it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle: Callable[[Request], Awaitable[Response]] = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class Answer(Response):
    """JSON from plain values, without validating them again."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How a route's errors are documented. Every route may answer 400, 401, 403 and 503, and 410
    where it may answer 404: that is a session which has expired."""
    return {
        status: {"model": ErrorAnswer}
        for status in sorted({400, 401, 403, 503, *statuses, *({410} if 404 in statuses else ())})
    }


def base_url(request: Request, settings: Settings) -> str:
    """The server's URL as the caller reached it, or the one it was told."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    return f"{request.url.scheme}://{request.headers.get('host') or request.url.netloc}"


def caller_of(request: Request) -> Caller:
    """Who calls, as the guard has found."""
    found: Caller = request.state.caller
    return found


async def owner_of(request: Request) -> str:  # not async, it would take a hop through a thread
    """Whose all is that this call may see."""
    return caller_of(request).owner


def possible_id(session_id: str) -> str:
    """Raises NotFound for what can't be a session's id, so no store ever sees it."""
    if not re.fullmatch(SESSION_ID[1:-1], session_id):
        raise NotFound("No session has such an id.")
    return session_id


async def existing_id(session_id: str, request: Request) -> OwnedId:
    """A session id from a path, as the caller's. Raises NotFound."""
    return OwnedId(await owner_of(request), possible_id(session_id))


Owner = Annotated[str, Depends(owner_of)]
SessionId = Annotated[OwnedId, Depends(existing_id)]
Include = Annotated[str | None, Query(pattern="^files$", description="`files` adds the list of files.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="How many a page.")]
Cursor = Annotated[str | None, Query(max_length=64, description="`next_cursor` of the page before.")]


async def idempotency_key(  # not async, it would take a hop through a thread
    request: Request,
    _documented: Annotated[
        str | None,
        Header(alias="Idempotency-Key", description="The same key and body again give the first answer again."),
    ] = None,
) -> str | None:
    """The request's key, if it has one. Raises BadRequest for what can't be a key."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1 or not re.fullmatch("[ -~]{1,255}", given[0]):
        raise BadRequest(
            "The header Idempotency-Key is no key.",
            hint="A key is 1 to 255 printable ASCII characters.",
            code="bad_key",
        )
    return given[0]


IdempotencyKey = Annotated[str | None, Depends(idempotency_key)]
REPLAY = {"Idempotent-Replay": "true"}


def claim_of(context: Context, route: Route, key: str | None, body: BaseModel) -> Claim | None:
    """The claim of a request. Its `env` and the values of its `secrets` are kept apart."""
    if key is None:
        return None
    known = body.model_dump()
    env, secrets = known.pop("env", {}), known.pop("secrets", {})
    if secrets:
        known["secrets"] = {name: one["hosts"] for name, one in secrets.items()}
    return context.keys.claim(route, key, known, [env, {name: one["value"] for name, one in secrets.items()}])


def shown(session: Session, context: Context) -> dict[str, Any]:
    """The session object."""
    status = "running" if context.turns.taken(session.owned_id) else "idle"
    return session_answer(session, status, context.rules.shown(session.limits))


def made_answer(made: Made, context: Context) -> Answer:
    """The answer to a request that makes a session: the first time, or once more as it was."""
    if made.replayed:
        answer = session_answer(made.session, "idle", context.rules.shown(made.session.limits))
        return Answer(answer, 201, headers=REPLAY)
    return Answer(shown(made.session, context), 201)


def cursor_of(key: int) -> str:
    """What leads to the rows after the one with this key."""
    return base64.urlsafe_b64encode(str(key).encode()).decode().rstrip("=")


def key_of(cursor: str) -> int:
    """The reverse. Raises BadRequest for what `cursor_of` didn't make."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        key = int(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, binascii.Error):
        key = -1
    if not 0 < key < 1 << 63:
        raise BadRequest("'cursor' is not one of ours.", hint="Use the next_cursor of the page before, or none.")
    return key


def language(name: str, *, to_run: bool = False) -> Language:
    """The language that a client means. Raises BadRequest where there is none, NoLanguage where it is `to_run` and this
    machine can't."""
    found = languages.canonical(name)
    if found is None:
        raise BadRequest(
            f"'{name[:40]}' is not a language of this server.",
            hint=f"Use {languages.in_words()}.",
            code="unknown_language",
        )
    if to_run:
        try:
            languages.runtime(found)
        except languages.Missing as missing:
            raise NoLanguage(f"This server can't run {found}: {missing.reason}", hint=missing.hint) from None
    return found


def check_timeout(timeout: float | None, settings: Settings, field: str = "timeout") -> None:
    if timeout is not None and timeout > settings.max_timeout:
        raise BadRequest(
            f"'{field}' is {timeout:g} seconds, at most {settings.max_timeout:g} are allowed.",
            hint="The server's ERA_MAX_TIMEOUT sets the bound.",
        )


def setup_of(body: SetupBody | None) -> dict[str, Any] | None:
    """A setup as the client gave it. Raises BadRequest or TooLarge for variables that can't be."""
    check_env((body and body.envs) or {})
    return wanted_setup(body)


def secrets_of(secrets: Mapping[str, SecretBody], env: Mapping[str, str]) -> list[Secret]:
    """Secrets as the client gave them. Raises BadRequest for what can't be any."""
    return [secret(name, one.value, one.hosts, env) for name, one in secrets.items()]


def check_env(env: Mapping[str, str]) -> None:
    """Raises BadRequest for what no process can have in its environment. Never quotes a value."""
    total = 0
    for name, value in env.items():
        if not name or "=" in name or "\0" in name:
            raise BadRequest(f"'env' has a name no variable can have: {name[:40]!r}.")
        if "\0" in value:
            raise BadRequest(f"'env.{name[:40]}' has a NUL character.")
        size = len(name.encode()) + len(value.encode())
        total += size
        if size > _MAX_VARIABLE_BYTES or total > _MAX_ENV_BYTES:
            raise TooLarge("'env' is too large: 128 KiB a variable and 1 MiB in all are allowed.")
