"""ERA's server with the tools and resources that the conformance suite wants of a server, beside ERA's own:
`python -m tests.mcp.suite_server serve`. Of what ERA doesn't offer (prompts, completions, tools that ask back) it has
what scenarios of the transport need.

Only what answers is added. Calls come through ERA's HTTP server and guard, the transport of era.api.routes.mcp and the
server object of era.mcp.protocol, as all do.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sys
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import mcp_types as types
from mcp.server.lowlevel import Server
from mcp.shared.exceptions import MCPDeprecationWarning, MCPError

from era.mcp import protocol
from era.mcp.results import failure

type Params = types.CallToolRequestParams
type ToolAnswer = types.CallToolResult | types.InputRequiredResult
type Tool = Callable[[protocol.RequestContext, Params], Awaitable[ToolAnswer]]

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
WAV = base64.b64encode(b"RIFF$\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0@\x1f\0\0@\x1f\0\0\1\0\x08\0data\0\0\0\0").decode()

NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
SCHEMA_2020_12 = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}
IN_A_HEADER = {"type": "object", "properties": {"region": {"type": "string", "x-mcp-header": "Region"}}}
SCHEMAS: dict[str, dict[str, Any]] = {"json_schema_2020_12_tool": SCHEMA_2020_12, "test_headers": IN_A_HEADER}

TOOLS: dict[str, Tool] = {}


def tool(function: Tool) -> Tool:
    """A tool whose name is the function's behind `test_`, as the suite has it."""
    TOOLS[f"test_{function.__name__}"] = function
    return function


def says(text: str, *more: types.ContentBlock) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(text=text), *more])


def resource(uri: str, text: str, kind: str = "text/plain") -> types.EmbeddedResource:
    return types.EmbeddedResource(resource=types.TextResourceContents(uri=uri, mime_type=kind, text=text))


IMAGE = types.ImageContent(data=PNG, mime_type="image/png")


# -- tools that answer ----------------------------------------------------------------------------------------------


@tool
async def simple_text(_: protocol.RequestContext, __: Params) -> ToolAnswer:
    return says("This is a simple text response for testing.")


@tool
async def image_content(_: protocol.RequestContext, __: Params) -> ToolAnswer:
    return types.CallToolResult(content=[IMAGE])


@tool
async def audio_content(_: protocol.RequestContext, __: Params) -> ToolAnswer:
    return types.CallToolResult(content=[types.AudioContent(data=WAV, mime_type="audio/wav")])


@tool
async def embedded_resource(_: protocol.RequestContext, __: Params) -> ToolAnswer:
    return types.CallToolResult(content=[resource("test://embedded-resource", "This is an embedded resource content.")])


@tool
async def multiple_content_types(_: protocol.RequestContext, __: Params) -> ToolAnswer:
    more = resource("test://mixed-content-resource", '{"test":"data","value":123}', "application/json")
    return says("Multiple content types test:", IMAGE, more)


@tool
async def error_handling(_: protocol.RequestContext, __: Params) -> ToolAnswer:
    return failure("This tool intentionally returns an error for testing")


@tool
async def tool_with_progress(context: protocol.RequestContext, _: Params) -> ToolAnswer:
    for progress in (0, 50, 100):
        await context.session.report_progress(progress, 100)
        await asyncio.sleep(0.05)
    return says("Done.")


@tool
async def tool_with_logging(context: protocol.RequestContext, _: Params) -> ToolAnswer:
    for text in ("Tool execution started", "Tool processing data", "Tool execution completed"):
        with warnings.catch_warnings(category=MCPDeprecationWarning, action="ignore"):
            await context.session.send_log_message("info", text, related_request_id=context.request_id)
        await asyncio.sleep(0.05)
    return says("Done.")


@tool
async def logging_tool(context: protocol.RequestContext, params: Params) -> ToolAnswer:
    return await tool_with_logging(context, params)


@tool
async def headers(_: protocol.RequestContext, params: Params) -> ToolAnswer:
    return says(json.dumps(params.arguments))


TOOLS["json_schema_2020_12_tool"] = headers  # its schema is what the suite looks at


# -- tools that ask back --------------------------------------------------------------------------------------------


@tool
async def input_required_result_elicitation(_: protocol.RequestContext, params: Params) -> ToolAnswer:
    answers = {name: answer.model_dump(by_alias=True) for name, answer in (params.input_responses or {}).items()}
    if "user_name" in answers:
        return says(f"Hello, {answers['user_name']['content']['name']}!")
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    form = types.ElicitRequestFormParams(message="What is your name?", requested_schema=schema)
    return types.InputRequiredResult(input_requests={"user_name": types.ElicitRequest(params=form)})


@tool
async def missing_capability(context: protocol.RequestContext, _: Params) -> ToolAnswer:
    needed = types.ClientCapabilities(sampling=types.SamplingCapability())
    if context.session.check_client_capability(needed):
        return says("Sampling is there.")
    raise MCPError(
        code=types.MISSING_REQUIRED_CLIENT_CAPABILITY,
        message="This tool needs a client that samples.",
        data={"requiredCapabilities": {"sampling": {}}},
    )


@tool
async def streaming_elicitation(context: protocol.RequestContext, params: Params) -> ToolAnswer:
    return await input_required_result_elicitation(context, params)


# -- prompts and resources ------------------------------------------------------------------------------------------


async def list_prompts(_: protocol.RequestContext, __: Any) -> types.ListPromptsResult:
    return types.ListPromptsResult(prompts=[types.Prompt(name="test_simple_prompt", description="One of the suite's.")])


def content_of(uri: str) -> types.TextResourceContents | types.BlobResourceContents | None:
    """The content of one of the suite's resources."""
    if uri == "test://static-text":
        text = "This is the content of the static text resource."
        return types.TextResourceContents(uri=uri, mime_type="text/plain", text=text)
    if uri == "test://static-binary":
        return types.BlobResourceContents(uri=uri, mime_type="image/png", blob=PNG)
    if match := re.fullmatch("test://template/([^/]+)/data", uri):
        text = json.dumps({"id": match[1], "templateTest": True, "data": f"Data for ID: {match[1]}"})
        return types.TextResourceContents(uri=uri, mime_type="application/json", text=text)
    return None


# -- the server -----------------------------------------------------------------------------------------------------


def extended(server: Server[Any]) -> Server[Any]:
    """ERA's server object with all of this beside its own."""

    def own(method: str) -> Any:
        entry = server.get_request_handler(method)
        assert entry is not None
        return entry.handler

    list_tools, call_tool, read_resource = map(own, ("tools/list", "tools/call", "resources/read"))
    own_schema = server.get_tool_input_schema
    assert own_schema is not None
    server.get_tool_input_schema = lambda name: SCHEMAS.get(name) or own_schema(name)

    async def list_all_tools(context: protocol.RequestContext, params: Any) -> types.ListToolsResult:
        listed: types.ListToolsResult = await list_tools(context, params)
        more = [
            types.Tool(name=name, description="One of the suite's.", input_schema=SCHEMAS.get(name, NOTHING))
            for name in TOOLS
        ]
        return listed.model_copy(update={"tools": [*listed.tools, *more]})

    async def call_any_tool(context: protocol.RequestContext, params: Params) -> Any:
        return await TOOLS.get(params.name, call_tool)(context, params)

    async def read_any_resource(context: protocol.RequestContext, params: types.ReadResourceRequestParams) -> Any:
        content = content_of(str(params.uri))
        return types.ReadResourceResult(contents=[content]) if content else await read_resource(context, params)

    add = server.add_request_handler
    add("tools/list", types.PaginatedRequestParams, list_all_tools)
    add("tools/call", types.CallToolRequestParams, call_any_tool)
    add("resources/read", types.ReadResourceRequestParams, read_any_resource)
    add("prompts/list", types.PaginatedRequestParams, list_prompts)
    return server


if __name__ == "__main__":
    from era.client.cli import main

    made = protocol.mcp_server
    protocol.mcp_server = lambda *given: extended(made(*given))
    sys.argv[0] = "era"
    main()
