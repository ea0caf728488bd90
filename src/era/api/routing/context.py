"""What routers share: the core's services, strict JSON bodies, ids and cursors, checks, answers.

Dependencies that FastAPI calls are coroutines even where they await nothing: it would run a plain function on a thread.
"""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Query, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import request_params_to_args
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.convertors import Convertor, register_url_convertor
from starlette.types import ASGIApp

from era import languages
from era.api.hosts.other_hosts import OtherHosts
from era.api.protocol.answers import Answer
from era.api.routing.validation import body_hint, check_query, invalid, query_names
from era.cluster.host_tls import HostTls
from era.common.spelling import did_you_mean
from era.core import jsontext
from era.core.capsules.service import Capsules
from era.core.cluster.homes import Homes
from era.core.cluster.moves import Moves
from era.core.concurrency.turns import Turns
from era.core.files.archives import Archives
from era.core.files.current_files import CurrentFiles
from era.core.files.links import Links
from era.core.files.watching import Watching
from era.core.limits import Rules
from era.core.live.checkpoints import Checkpoints
from era.core.live.contexts import Contexts
from era.core.live.live_sessions import LiveSessions
from era.core.live.session_processes import SessionProcesses
from era.core.metadata import MetadataStore
from era.core.models import Claim, Finding, JsonObject, Language, OwnedId, Route, Session, SettingInForce, Snapshot
from era.core.operation.readiness import Readiness
from era.core.owners.api_keys import ApiKeys, Caller, Tickets
from era.core.owners.api_keys import Scope as KeyScope
from era.core.owners.audit import Audit
from era.core.owners.quotas import Quotas
from era.core.owners.usage import Usage
from era.core.owners.webhooks import Webhooks
from era.core.public.inbox_worker import Inbox
from era.core.public.live_servers import LiveServers
from era.core.public.sites import Sites
from era.core.runs.outputs import History
from era.core.runs.runs import Runs
from era.core.secrets import Secret, secret
from era.core.sessions.idempotency import IdempotencyKeys, Once
from era.core.sessions.sessions import Sessions, check_long_body
from era.core.sessions.versions import Versions
from era.core.setup.setups import Setups
from era.core.storage.storage import Storage
from era.core.telemetry import Note, Trace
from era.core.trees.edits import FileEntry
from era.errors import BadRequest, NoLanguage, NotFound, TooLarge
from era.settings import Settings
from era.wire.base import ErrorAnswer
from era.wire.runs import SecretBody
from era.wire.sessions import SESSION_ID, session_answer
from era.wire.setup import SetupBody, requested_setup
from era.wire.versions import MAX_VERSION

_MAX_ENV_BYTES = 1 << 20
_MAX_VARIABLE_BYTES = 128 << 10  # Linux: MAX_ARG_STRLEN, the bound of one string of an environment


@dataclass(frozen=True)
class Context:
    """The core's services, put together by app.py."""

    settings: Settings
    rules: Rules
    sessions: Sessions
    runs: Runs
    live_sessions: LiveSessions
    checkpoints: Checkpoints
    contexts: Contexts
    processes: SessionProcesses
    watching: Watching
    tickets: Tickets
    live_servers: LiveServers
    sites: Sites
    inbox: Inbox
    history: History
    idempotency: IdempotencyKeys
    api_keys: ApiKeys
    audit: Audit
    quotas: Quotas
    usage: Usage
    webhooks: Webhooks
    versions: Versions
    setups: Setups
    files: CurrentFiles
    archives: Archives
    links: Links
    capsules: Capsules
    storage: Storage
    turns: Turns
    readiness: Readiness
    store: MetadataStore
    homes: Homes | None
    """This host's part in a cluster; None outside of one."""

    moves: Moves | None
    """Which sessions move to another host; None outside of a cluster."""

    other_hosts: OtherHosts | None
    """The other hosts of the cluster; None outside of one."""

    list_snapshot: Callable[[Snapshot, OwnedId], AsyncIterator[Sequence[FileEntry]]]
    """All files and links of a snapshot."""

    isolation: Callable[[], JsonObject]
    """The isolation that sandboxes get here, as /health shows it."""

    pool_counts: Callable[[], Mapping[str, int]]
    """How many sandboxes there are, by use."""

    at_a_time: Callable[[], Mapping[str, int]]
    """How many runs may work, and how many sandboxes sessions may have, at a time."""

    places: Callable[[], Mapping[str, int]]
    """How many sandboxes sessions may have, have and wait for, as /ready shows it."""

    limits: Sequence[SettingInForce]
    """The settings that bound something."""

    findings: Callable[[HostTls | None], Iterable[Finding]]
    """What this machine has and lacks, and for how long this host's certificate is good."""

    end_background: Callable[[float], Coroutine[Any, Any, None]]
    """End background runs and commit them, within this many seconds."""

    end_runs: Callable[[], Awaitable[None]]
    """Kill every run and start no more."""

    note: Note
    """Takes note of each request."""

    trace: Callable[[str | None], Trace | None]
    """Where a request with this header `traceparent` is in a trace; None where there are no traces."""

    metrics: Callable[[], Awaitable[bytes]]
    """The metrics, in Prometheus' text format."""

    serves_at: Callable[[int, int | None, ASGIApp], Awaitable[None]]
    """Called once this service listens, with its port, that for other hosts, if it is another one, and its
    application."""

    @property
    def hosts_tls(self) -> HostTls | None:
        """TLS between the hosts of the cluster, as it was read at the start; None where they talk plain."""
        return None if self.other_hosts is None else self.other_hosts.connections.tls

    async def tell_hosts(self) -> None:
        """Have the other hosts of the cluster read what all know alike, as something of that was changed here."""
        if self.other_hosts is not None:
            await self.other_hosts.tell_changed()


async def context(request: Request) -> Context:
    """The application's context."""
    context: Context = request.app.state.context
    return context


UseContext = Annotated[Context, Depends(context)]


async def read_json(text: bytes) -> Any:
    """Parse a JSON body. Raises JsonProblem; TooLarge for `data` or `metadata` that no session can have."""
    if len(text) <= jsontext.MAX_DATA_BYTES:
        return await jsontext.loads_aside(text)
    return await jsontext.aside(_read_long, text)


def _read_long(text: bytes) -> Any:
    value = jsontext.loads(text)
    check_long_body(value)
    return value


class _RestOfPath(Convertor[str]):
    """The path converter `rest`: the rest of a path, any characters. Starlette's own `path` stops at a newline."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("rest", _RestOfPath())


class StrictRoute(APIRoute):
    """A route that calls its function itself, by what FastAPI has found out of it.

    FastAPI's own handling of a request takes longer than the rest of the API
    (docs/decisions/0044-hot-routes.md). The function is a coroutine that returns a Response, and so are its
    dependencies. JSON bodies are read by core.jsontext: the same values are refused as in a state file. They are taken
    whatever their type says if no browser can have sent them. Query parameters that the route doesn't have are refused.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        queries = query_names(self.dependant)
        field = self.body_field
        body = None if field is None else field.field_info.annotation

        async def handle(request: Request) -> Response:
            if request.scope["query_string"]:
                check_query(request.query_params, queries)
            value = None if body is None else await _body_of(request, body)
            values, problems = await _arguments(self.dependant, request)
            if field is not None:
                if value is _MISSING and not field.field_info.is_required():
                    checked = field.default
                elif value is _MISSING:
                    problems.append({"type": "missing", "loc": ("body",), "msg": "Field required", "input": None})
                else:
                    checked, wrong = field.validate(value, {}, loc=("body",))
                    problems += wrong
                del value  # as a run may wait for long
            if problems:
                raise invalid(RequestValidationError(problems), body)
            if field is not None:
                values[field.name] = checked
                del checked
            answer: Response = await self.endpoint(**values)
            return answer

        return handle


_MISSING: Any = object()
"""The value of a body that is empty."""


async def _arguments(dependant: Dependant, request: Request) -> tuple[dict[str, Any], list[Any]]:
    """The arguments of a function besides the body, and what is wrong with the request's parameters."""
    values: dict[str, Any] = {}
    problems: list[Any] = []
    for below in dependant.dependencies:
        arguments, wrong = await _arguments(below, request)
        problems += wrong
        if not wrong and below.call is not None:
            found = await below.call(**arguments)
            if below.name is not None:
                values[below.name] = found
    for fields, given in (
        (dependant.path_params, request.path_params),
        (dependant.query_params, request.query_params),
        (dependant.header_params, request.headers),
    ):
        if fields:
            found, wrong = request_params_to_args(fields, given)
            values |= found
            problems += wrong
    if dependant.request_param_name is not None:
        values[dependant.request_param_name] = request
    return values, problems


async def _body_of(request: Request, body_type: Any) -> Any:
    """The value of a request's JSON body; its bytes if it isn't JSON by its type; _MISSING for an empty one. Raises
    EraError for what can't be read as JSON."""
    content = bytearray()
    async for piece in request.stream():  # Starlette would keep the pieces until it is whole
        content += piece
    text = bytes(content)
    del content
    if not text and not getattr(body_type, "may_be_empty", False):
        return _MISSING
    if not _is_json(request):
        return text
    try:
        return await read_json(text or b"{}")
    except jsontext.JsonTooLarge as error:
        raise TooLarge(f"The body {error}.") from None
    except jsontext.JsonProblem as error:
        raise BadRequest(f"The body {error}.", hint=body_hint(body_type), code="invalid_json") from None


def _is_json(request: Request) -> bool:
    """Whether a body is taken as JSON: by its type, or whatever that is if no browser can have sent it. Pages of other
    sites can send other types unasked. A browser says where a request comes from (Origin, Sec-Fetch-Site), and asks
    before it sends a bearer token."""
    headers = request.headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return True
    from_browser = "origin" in headers or "sec-fetch-site" in headers
    return not from_browser or headers.get("authorization", "").lower().startswith("bearer ")


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that document its errors.

    400, 401, 403, 431 and 503 are on every route; 410 (an expired session) wherever 404 is.
    """
    return {
        status: {"model": ErrorAnswer}
        for status in sorted({400, 401, 403, 431, 503, *statuses, *({410} if 404 in statuses else ())})
    }


def caller_of(request: Request) -> Caller:
    """The caller that the guard has authenticated."""
    caller: Caller = request.state.caller
    return caller


def until_barred(context: Context, request: Request, scope: KeyScope) -> Callable[[], Coroutine[Any, Any, None]]:
    """What waits until the caller's key is good no more for calls that need this scope: for what has no end itself."""
    return partial(context.api_keys.until_barred, caller_of(request), scope)


async def owner_of(request: Request) -> str:
    """The caller's owner: only what belongs to this owner is visible to the call."""
    return caller_of(request).owner


def possible_id(session_id: str) -> str:
    """`session_id` itself. Raises NotFound for what can't be a session's id, so no store ever sees it."""
    if not re.fullmatch(SESSION_ID[1:-1], session_id):
        raise NotFound("No session has such an id.")
    return session_id


async def owned_id(session_id: str, request: Request) -> OwnedId:
    """The session id in the path, together with the caller's owner. Raises NotFound for what can't be an id."""
    caller = caller_of(request)
    return OwnedId(caller.owner, possible_id(session_id), caller.key_id)


async def caller_id(request: Request) -> OwnedId:
    """The caller's owner and key, for calls that name no session: an id that is empty."""
    caller = caller_of(request)
    return OwnedId(caller.owner, "", caller.key_id)


Owner = Annotated[str, Depends(owner_of)]
CallerId = Annotated[OwnedId, Depends(caller_id)]
SessionId = Annotated[OwnedId, Depends(owned_id)]
Number = Annotated[int, Path(ge=1, le=MAX_VERSION)]
Include = Annotated[str | None, Query(pattern="^files$", description="`files` adds the list of files: 10,000 at most.")]
WithData = Annotated[bool, Query(alias="data", description="`false` leaves `data` out of the answer.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Items per page.")]
Cursor = Annotated[str | None, Query(max_length=64, description="`next_cursor` of the page before.")]


async def idempotency_key(
    request: Request,
    _documented: Annotated[
        str | None,
        Header(alias="Idempotency-Key", description="The same key and body again give the first answer again."),
    ] = None,
) -> str | None:
    """The request's idempotency key, None without one. Raises BadRequest for what can't be a key."""
    values = request.headers.getlist("idempotency-key")
    if not values:
        return None
    if len(values) > 1 or not re.fullmatch("[ -~]{1,255}", values[0]):
        raise BadRequest(
            "The header Idempotency-Key is no key.",
            hint="A key is 1 to 255 printable ASCII characters.",
            code="bad_key",
        )
    return values[0]


IdempotencyKey = Annotated[str | None, Depends(idempotency_key)]
REPLAY = {"Idempotent-Replay": "true"}


async def claim_of(context: Context, route: Route, key: str | None, body: BaseModel) -> Claim | None:
    """The idempotency claim of a request, None without a key. Raises TooLarge for what is nested too deeply.

    The values of `env` and `secrets` are passed separately: nothing made from them may be stored.
    """
    if key is None:
        return None
    fields = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in body}
    env, secrets = fields.pop("env", {}), fields.pop("secrets", {})
    if secrets:
        fields["secrets"] = {
            name: [secret.hosts, "plain_http"] if secret.plain_http else secret.hosts
            for name, secret in secrets.items()
        }
    values = {name: secret.value for name, secret in secrets.items()}
    try:
        return await context.idempotency.claim_aside(route, key, fields, [env, values])
    except RecursionError:
        raise TooLarge(f"The body is nested deeper than {jsontext.MAX_DEPTH} levels.") from None


def status_of(session: Session, context: Context) -> str:
    """What a present session that is at home here does now."""
    if context.turns.taken(session.owned_id):
        return "running"
    return "idle" if context.live_sessions.get(session.key) is None else "live"


def session_view(session: Session, context: Context) -> dict[str, Any]:
    """The session object, as clients get it now, of a session that is at home here."""
    return _view(session, context, status_of(session, context), _processes(session.key, context))


async def session_views(sessions: Sequence[Session], context: Context) -> list[dict[str, Any]]:
    """The same of many sessions, at whatever host they are at home. `idle` stands for what a home doesn't tell."""
    states = await states_of(sessions, context)
    shown = [(session, *(states[session.key] or ("idle", 0))) for session in sessions]
    return [_view(session, context, status, processes) for session, status, processes in shown]


async def states_of(sessions: Sequence[Session], context: Context) -> Mapping[int, tuple[str, int] | None]:
    """What present sessions of one owner do now and how many processes they have, by key; None where the home doesn't
    tell."""
    states: dict[int, tuple[str, int] | None] = {}
    for each in sessions:
        states[each.key] = status_of(each, context), _processes(each.key, context)
    if context.other_hosts is not None:
        states |= await context.other_hosts.active(sessions)
    return states


def active_here(owner: str, context: Context) -> JsonObject:
    """What those of an owner's sessions do that are active here, by id, for another host (other_hosts.py)."""
    live = {each.session.id: len(each.processes.running) for each in context.live_sessions.of_owner(owner)}
    taken = [each.id for each in context.turns.all_taken() if isinstance(each, OwnedId) and each.owner == owner]
    active = {name: ["live", processes] for name, processes in live.items()}
    return active | {name: ["running", live.get(name, 0)] for name in taken}


async def active_of(owner: str, context: Context) -> Mapping[str, str]:
    """Return the status of an owner's sessions that aren't idle (`running` or `live`), by id, of all hosts that
    answer."""
    found: dict[str, str] = {}
    others = () if context.other_hosts is None else await context.other_hosts.active_of_owner(owner)
    for answer in (*others, active_here(owner, context)):
        found |= {session_id: str(status) for session_id, (status, _) in answer.items()}
    return found


def _processes(session_key: int, context: Context) -> int:
    live = context.live_sessions.get(session_key)
    return 0 if live is None else len(live.processes.running)


def _view(session: Session, context: Context, status: str, processes: int) -> dict[str, Any]:
    return session_answer(session, status, context.rules.in_api_units(session.limits), processes)


async def made_answer(made: Once[Session], request: Request, context: Context, **how: str) -> Answer:
    """The answer to a request that makes a session, which is recorded; for a repeated idempotency key, the first answer
    again. `how` it was made is recorded, too."""
    if made.replayed:
        answer = session_answer(made.value, "idle", context.rules.in_api_units(made.value.limits))
        return Answer(answer, 201, headers=REPLAY)
    public = made.value.allow_public
    await context.audit.record(caller_of(request), "session.create", made.value.id, public=public, **how)
    return Answer(session_view(made.value, context), 201)


def cursor_of(last: str) -> str:
    """Encode a pagination cursor: the key, path or number of the last item of a page."""
    return base64.urlsafe_b64encode(last.encode("utf-8", "surrogateescape")).decode().rstrip("=")


def last_of(cursor: str, name: str = "next_cursor", errors: str = "strict") -> str:
    """Decode a pagination cursor, with `errors` as for `bytes.decode`. Raises BadRequest for what `cursor_of` didn't
    make; the answer of the page before has the cursor as `name`."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        return base64.b64decode(padded, altchars=b"-_", validate=True).decode("utf-8", errors)
    except ValueError:
        raise bad_cursor(name) from None


def bad_cursor(name: str = "next_cursor") -> BadRequest:
    return BadRequest("'cursor' is not one of ours.", hint=f"Use the {name} of the page before, or none.")


def key_of(cursor: str | None) -> int | None:
    """The key of the row behind which a page begins, None for the first page. Raises BadRequest."""
    if not cursor:
        return None
    last = last_of(cursor)
    if not re.fullmatch("[0-9]{1,19}", last) or not 0 < int(last) < 1 << 63:
        raise bad_cursor()
    return int(last)


def moment(field: str, value: str) -> int:
    """Microseconds since 1970 of a time in RFC 3339. Raises BadRequest, which names `field`."""
    # A `+` in a query that nobody has escaped is a space.
    with suppress(ValueError, OverflowError):
        parsed = datetime.fromisoformat(value.strip().replace(" ", "+") if "T" in value else value)
        if parsed.tzinfo is not None and "T" in value.upper():
            return int(parsed.timestamp() * 1_000_000)
    raise BadRequest(
        f"'{field}' is not a time with its zone.", hint="Write it as 2026-01-31T12:00:00Z.", code="invalid_field"
    )


def language(name: str, *, to_run: bool = False) -> Language:
    """The canonical name of a language from a name or an alias.

    Raises BadRequest for an unknown one; with `to_run`, NoLanguage where this machine lacks its runtime.
    """
    canonical = languages.canonical(name)
    if canonical is None:
        raise BadRequest(
            f"'{name[:40]}' is not a language of this server.",
            hint=did_you_mean(name, languages.LANGUAGES, f"Use {languages.in_words()}."),
            code="unknown_language",
        )
    if to_run:
        try:
            languages.runtime(canonical)
        except languages.Missing as missing:
            raise NoLanguage(f"This server can't run {canonical}: {missing.reason}", hint=missing.hint) from None
    return canonical


def check_timeout(timeout: float | None, settings: Settings, field: str = "timeout") -> None:
    """Raises BadRequest, which names `field`, for a timeout (seconds) over the server's maximum."""
    if timeout is not None and timeout > settings.max_timeout:
        raise BadRequest(
            f"'{field}' is {timeout:g} seconds, at most {settings.max_timeout:g} are allowed.",
            hint="The server's ERA_MAX_TIMEOUT sets the bound.",
        )


def setup_of(body: SetupBody | None) -> dict[str, Any] | None:
    """A setup as the client sent it. Raises BadRequest or TooLarge for impossible variables."""
    check_env((body and body.envs) or {})
    return requested_setup(body)


def secrets_of(secrets: Mapping[str, SecretBody], env: Mapping[str, str]) -> list[Secret]:
    """The secrets of a request. Raises BadRequest for invalid ones."""
    return [secret(name, body.value, body.hosts, env, plain_http=body.plain_http) for name, body in secrets.items()]


def check_env(env: Mapping[str, str]) -> None:
    """Raises BadRequest or TooLarge for variables that no process can have. Never quotes a value: it may be secret."""
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
