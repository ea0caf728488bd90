"""The description of the API at /openapi.json: what FastAPI derives from the routes, made whole.

FastAPI knows parameters, bodies and answers. What is the same for many routes is said here once: who may call, the
headers of answers, what parameters of paths mean. Event streams are text whose `data` lines have the schema that
`contentSchema` names, since OpenAPI 3.1 has no word for streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Any

from fastapi.routing import APIRoute

from era import __version__
from era.api.routing.event_stream import EVENTS

type Json = dict[str, Any]

INFO: Json = {
    "summary": "Run untrusted code in sessions that remember.",
    "description": (
        "Sessions keep JSON data and files from run to run. An answer is sent once what it tells of is durable. A "
        "program that fails, times out or runs out of memory is no error: it is an answer 200 with an outcome.\n\n"
        "Every error has the same shape, with a `code` for programs and a `hint` for people. Unknown fields and query "
        "parameters are refused. Event streams number their events, so a broken one can be resumed.\n\n"
        "Models use the same server at `/mcp`, which is described by the Model Context Protocol itself."
    ),
    "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
}
SERVERS = [{"url": "/", "description": "The server that shows this."}]

_KEY = "api_key"
_SCHEMES = {
    _KEY: {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key. A server without a key takes calls from its own machine without this header.",
    }
}

TAGS = {
    "runs": "Run code in a session or once, follow it, and read what became of it.",
    "sessions": "Make, list, change, copy and delete sessions.",
    "contexts": "Interpreters that stay between runs.",
    "code": "The code that a run without code runs.",
    "processes": (
        "Processes beside runs, with input and output. Their WebSockets are "
        "`/api/sessions/{session_id}/processes/{process}/attach` and `/api/sessions/{session_id}/terminal`."
    ),
    "setup": "Packages, commands and variables that a session has before its first run.",
    "versions": "What data and files were after each run, and the way back.",
    "files": "Files of a session, one by one or as an archive, and links to them.",
    "capsules": "A whole session as one file, and back.",
    "public URL": (
        "Where anybody may call a session: `/proxy/{session_id}/{port}/{path}` takes any method and WebSockets. "
        "It is answered by a server in the session or by its stored code."
    ),
    "inbox": "Deliveries of webhooks: `POST /proxy/{session_id}/inbox/{path}` stores them, and the stored code runs.",
    "storage": "Values, objects and SQL databases that the sessions of an owner share.",
    "keys": "API keys and their owners, for the operator.",
    "audit": "Who did what.",
    "quotas": "How much owners may use, and how much they have used.",
    "webhooks": "Where owners are told what happens to their sessions.",
    "health": "Whether and how the server works.",
}

_PARAMETERS = {
    "session_id": "The session's id.",
    "run_id": "The run's id.",
    "webhook_id": "The webhook's id.",
    "process": "A process's id or tag.",
    "path": "A path below the session's working directory, separated by `/`.",
    "number": "The version's number.",
    "delivery_id": "The delivery's id.",
    "key_id": "The API key's id.",
    "namespace": "The namespace.",
    "key": "The key, which may hold `/` and `:`.",
    "stream": "Which of the two.",
    "token": "The link's own part, which stands for all that it allows.",
}

_ERRORS = {
    "400": "Something in the request can't be right.",
    "401": "An API key is needed, and this is none.",
    "403": "This server refuses the request to everybody, or to all but its operator.",
    "404": "There is no such thing, or it is another owner's.",
    "408": "The request did not arrive in time.",
    "409": "It exists already, or its state doesn't allow this.",
    "410": "The session has expired, and can still be restored.",
    "412": "The file isn't as If-Match or If-None-Match demands.",
    "413": "Something is over its limit.",
    "416": "The range lies beyond the end.",
    "429": "Too many wait already.",
    "431": "The URL has 64 KiB or more, or the headers are too large.",
    "503": "The server can't do it now.",
}


def _header(description: str, kind: str = "string") -> Json:
    return {"description": description, "schema": {"type": kind}}


_REQUEST_ID = {"X-Request-Id": _header("Names the request, also in the server's log.")}
_ERROR_HEADERS = {
    "401": {"WWW-Authenticate": _header("`Bearer`.")},
    "429": {"Retry-After": _header("Seconds after which to try again.", "integer")},
    "503": {"Retry-After": _header("Seconds after which to try again, where that can help.", "integer")},
    "416": {"Content-Range": _header("The size, as `bytes */SIZE`.")},
}
_REPLAY_HEADERS = {"Idempotent-Replay": _header("`true` where this repeats the answer to an earlier request.")}


def operation_id(route: APIRoute) -> str:
    """The name of a route's function, which is unlike all others."""
    return route.name


def completed(schema: Json, routes: Iterable[APIRoute]) -> Json:
    """FastAPI's description, changed in place and returned."""
    schema["info"] |= INFO | {"version": __version__}
    schema["servers"] = SERVERS
    components = schema["components"]
    components["securitySchemes"] = _SCHEMES
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    for name, adapter in EVENTS.items():
        events = adapter.json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
        components["schemas"] |= {**events.pop("$defs", {}), name: events}
    known = {route.path_format for route in routes}
    used: set[str] = set()
    for path, operation in _operations(schema):
        if path not in known:
            continue
        used |= set(operation["tags"])
        operation["security"] = [{_KEY: []}, {}] if path.startswith("/api/") else []
        _complete_parameters(path, operation)
        _complete_responses(operation)
    schema["tags"] = [{"name": name, "description": text} for name, text in TAGS.items() if name in used]
    components["schemas"] = dict(sorted(components["schemas"].items()))
    return schema


def _operations(schema: Json) -> Iterator[tuple[str, Json]]:
    for path, item in schema["paths"].items():
        for operation in item.values():
            yield path, operation


def _complete_parameters(path: str, operation: Json) -> None:
    """Describe all parameters, also those of the path that a route reads by itself."""
    parameters: list[Json] = operation.setdefault("parameters", [])
    there = {each["name"] for each in parameters if each["in"] == "path"}
    for part in path.split("/"):
        name = part[1:-1]
        if part.startswith("{") and name not in there:
            parameters.insert(0, {"name": name, "in": "path", "required": True, "schema": {"type": "string"}})
    for parameter in parameters:
        if "description" not in parameter:
            named = parameter["schema"].pop("description", None)
            parameter["description"] = named or _PARAMETERS.get(parameter["name"], "")
        parameter["schema"].pop("title", None)
    if not parameters:
        del operation["parameters"]


def _complete_responses(operation: Json) -> None:
    """Describe the answers: invalid bodies get a 400 here and no 422, and every answer has headers."""
    responses: Json = operation["responses"]
    responses.pop("422", None)
    takes_key = any(each["name"] == "Idempotency-Key" for each in operation.get("parameters", ()))
    for status, response in responses.items():
        is_error = status >= "400"
        if is_error:
            response["description"] = _ERRORS[status]
        elif response["description"] == "Successful Response":
            response["description"] = HTTPStatus(int(status)).phrase + "."
        headers = _REQUEST_ID | _ERROR_HEADERS.get(status, {})
        if takes_key and not is_error:
            headers = headers | _REPLAY_HEADERS
        response["headers"] = {**headers, **response.get("headers", {})}
        for media_type, content in response.get("content", {}).items():
            if not content.get("schema"):
                is_text = media_type.startswith("text/")
                content["schema"] = {"type": "string"} if is_text else {"type": "string", "format": "binary"}
