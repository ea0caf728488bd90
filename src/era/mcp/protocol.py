"""The MCP server: tools and resources in the protocol's terms, for whichever transport.

The SDK speaks both forms of the protocol: 2026-07-28, in which each request stands alone, and 2025-11-25 with its
handshake, which isn't demanded. Nothing is remembered between requests, so any number of clients cost nothing.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote, unquote

import mcp_types as types
from mcp.server.context import CallNext, HandlerResult, ServerMiddleware, ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.shared.exceptions import MCPError
from mcp_types.methods import validate_client_request
from pydantic import ValidationError

from era.common.spelling import did_you_mean
from era.common.urls import session_path
from era.mcp.calls import CallFailed, Calls
from era.mcp.results import failure
from era.mcp.tools import TOOLS, Tool

type RequestContext = ServerRequestContext[Any, Any]

INSTRUCTIONS = (
    "ERA runs code in sandboxes. For one program, use era_python, era_node or another runner. For work that goes on, "
    "make a session with era_create_session, and run in it with era_run_in_session: its files, packages and state "
    "stay, and with a context its variables, too. Start servers and other programs that go on with era_start_process."
)
_SCHEME = "session://"
_BELOW = re.compile(r"files(/(?!\.{1,2}(/|$))[^/]+)*|runs/[\w-]+/(stdout|stderr)")
"""Paths below a session's that are resources: none that leads out of it."""

_MOST_RESOURCES = 100
_MOST_PROBLEMS = 5
"""Of a call's arguments that are told. For each unknown one the nearest name is looked for, which takes time."""

_LONGEST_NAME = 200


def mcp_server(
    version: str,
    calls_of: Callable[[RequestContext], Calls],
    long_arguments: Callable[[RequestContext], Mapping[str, Any] | None] = lambda _: None,
) -> Server[Any]:
    """A server whose requests are answered by the HTTP API; `calls_of` says with whose rights. `long_arguments` are
    those of a call whose message has none, as they were taken out of it."""

    async def list_tools(_: RequestContext, __: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[_described(tool) for tool in TOOLS.values()])

    async def call_tool(context: RequestContext, params: types.CallToolRequestParams) -> types.CallToolResult:
        arguments = long_arguments(context) or params.arguments or {}
        return await _call_tool(calls_of(context), context, params.name, arguments)

    async def list_resources(
        context: RequestContext, _: types.PaginatedRequestParams | None
    ) -> types.ListResourcesResult:
        try:
            answer = await calls_of(context).call(
                "GET", "/api/sessions", None, limit=_MOST_RESOURCES, fields="id,language"
            )
        except CallFailed as error:
            raise MCPError(code=types.INTERNAL_ERROR, message=str(error)) from None
        return types.ListResourcesResult(
            resources=[
                types.Resource(
                    uri=f"{_SCHEME}{session['id']}",
                    name=session["id"],
                    description=f"A session of {session['language']}.",
                    mime_type="application/json",
                )
                for session in answer["sessions"]
            ]
        )

    async def list_templates(
        _: RequestContext, __: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        return types.ListResourceTemplatesResult(resource_templates=_TEMPLATES)

    async def read_resource(
        context: RequestContext, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        return await _read_resource(calls_of(context), str(params.uri))

    server: Server[Any] = Server(
        "era",
        version=version,
        title="ERA",
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        on_list_resources=list_resources,
        on_list_resource_templates=list_templates,
        on_read_resource=read_resource,
        get_tool_input_schema=lambda name: TOOLS[name].input_schema if name in TOOLS else None,
    )
    server.middleware.append(_keeping_tool_list())
    return server


# -- tools ----------------------------------------------------------------------------------------------------------


def _keeping_tool_list() -> ServerMiddleware[Any]:
    """Make a middleware that keeps the answer to `tools/list`, as the library shapes it, for each protocol version.

    To make it takes 6 ms of the event loop.
    """
    shaped: dict[str, HandlerResult] = {}

    async def keeping(ctx: RequestContext, call_next: CallNext) -> HandlerResult:
        version = ctx.protocol_version
        if ctx.method != "tools/list":
            return await call_next(ctx)
        if version not in shaped:
            shaped[version] = await call_next(ctx)  # which checks the parameters, too
        else:
            validate_client_request(ctx.method, version, ctx.params)
        return shaped[version]

    return keeping


def _described(tool: Tool) -> types.Tool:
    return types.Tool(
        name=tool.name,
        title=tool.title,
        description=tool.description,
        input_schema=tool.input_schema,
        output_schema=None if tool.output is None else tool.output.model_json_schema(),
        annotations=tool.annotations,
    )


async def _call_tool(
    calls: Calls, context: RequestContext, name: str, given: Mapping[str, Any]
) -> types.CallToolResult:
    tool = TOOLS.get(name)
    if tool is None:
        raise MCPError(code=types.INVALID_PARAMS, message=_no_such("tool", name, TOOLS))
    try:
        arguments = tool.arguments.model_validate(given)
    except ValidationError as error:
        return failure(_wrong_arguments(tool, error))
    pieces = 0

    async def progress(text: str) -> None:
        nonlocal pieces
        pieces += 1
        await context.session.report_progress(pieces, message=text)

    try:
        return await tool.answer(replace(calls, progress=progress), arguments)
    except CallFailed as error:
        return failure(str(error))


def _wrong_arguments(tool: Tool, error: ValidationError) -> str:
    """What is wrong with arguments, the first few of it, and which ones there are. Never their values, which may be
    secret."""
    names = list(tool.arguments.model_fields)
    problems = []
    for item in error.errors(include_input=False, include_url=False)[:_MOST_PROBLEMS]:
        name = ".".join(map(str, item["loc"]))[:_LONGEST_NAME] or "arguments"
        if item["type"] == "extra_forbidden":
            problems.append(_no_such("argument", name, names))
        else:
            problems.append(f"'{name}': {item['msg'][0].lower()}{item['msg'][1:]}.")
    fields = tool.arguments.model_fields.items()
    takes = ", ".join(f"{name} (required)" if field.is_required() else name for name, field in fields)
    return f"{' '.join(problems)} {tool.name} takes: {takes}."


def _no_such(kind: str, name: str, names: Iterable[str]) -> str:
    return f"There is no {kind} '{name[:80]}'. {did_you_mean(name, names, '')}".rstrip()


# -- resources ------------------------------------------------------------------------------------------------------

_TEMPLATES = [
    types.ResourceTemplate(
        uri_template=f"{_SCHEME}{{id}}",
        name="session",
        description="A session: its state and settings.",
        mime_type="application/json",
    ),
    types.ResourceTemplate(
        uri_template=f"{_SCHEME}{{id}}/files",
        name="files",
        description="The list of a session's files.",
        mime_type="application/json",
    ),
    types.ResourceTemplate(
        uri_template=f"{_SCHEME}{{id}}/files/{{+path}}", name="file", description="A file of a session."
    ),
    types.ResourceTemplate(
        uri_template=f"{_SCHEME}{{id}}/runs/{{run_id}}/{{stream}}",
        name="output",
        description="All that a run wrote to stdout or stderr.",
        mime_type="text/plain",
    ),
]


async def _read_resource(calls: Calls, uri: str) -> types.ReadResourceResult:
    """The content behind one of our URIs: that of the API's path. Raises MCPError."""
    session_id, _, rest = (unquote(part) for part in uri.removeprefix(_SCHEME).partition("/"))
    if not uri.startswith(_SCHEME) or not session_id or {"?", "#"} & set(uri):
        raise _no_resource(uri, f"'{uri[:200]}' is no resource: they are {_SCHEME}ID and below.")
    if rest and not _BELOW.fullmatch(rest):
        raise _no_resource(uri, f"A session has files and runs/ID/stdout, no '{rest[:200]}'.")
    path = session_path(session_id) + (f"/{quote(rest)}" if rest else "")
    try:
        content = await calls.content(path)
    except CallFailed as error:
        raise _no_resource(uri, str(error)) from None
    try:
        text = types.TextResourceContents(uri=uri, mime_type=content.media_type, text=content.data.decode())
    except UnicodeDecodeError:
        blob = base64.b64encode(content.data).decode()
        return types.ReadResourceResult(
            contents=[types.BlobResourceContents(uri=uri, mime_type=content.media_type, blob=blob)]
        )
    return types.ReadResourceResult(contents=[text])


def _no_resource(uri: str, message: str) -> MCPError:
    return MCPError(code=types.INVALID_PARAMS, message=message, data={"uri": uri})
