"""The tools: a table, in which each is one or a few calls of the HTTP API."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
from mcp_types import CallToolResult, ImageContent, ToolAnnotations

from era.common.run_notes import GAP
from era.common.urls import file_path, quoted, session_path
from era.mcp import arguments as given
from era.mcp.calls import CallFailed, Calls, given_file_path
from era.mcp.results import (
    IMAGES,
    MOST_IMAGE_BYTES,
    MOST_IMAGES,
    RunResult,
    Shortened,
    image,
    run_result,
    shown_pictures,
    text_result,
)

_MOST_READ = 2 << 20
"""Bytes of a process's output that one call reads: all that is kept (1 MiB), and as much that comes meanwhile."""

type Answered = Awaitable[CallToolResult]


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool. `answer` raises CallFailed with a message for the model."""

    name: str
    title: str
    description: str
    arguments: type[given.Arguments]
    answer: Callable[[Calls, Any], Answered]
    annotations: ToolAnnotations
    output: type[RunResult] | None = None

    input_schema: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_schema", self.arguments.model_json_schema())


def _call(
    method: str,
    path: Callable[[Any], str],
    says: Callable[[Any, dict[str, Any]], str],
    *,
    sends: Callable[[Any], dict[str, Any] | None] = lambda given: None,
    query: Callable[[Any], dict[str, Any]] = lambda given: {},
) -> Callable[[Calls, Any], Answered]:
    """Return the `answer` of a tool that is one call of the API.

    Args:
        method: The method of the call.
        path: Makes the call's path of the tool's arguments.
        says: Makes the text for the model of the arguments and the call's answer.
        sends: Makes the call's JSON body of the arguments.
        query: Makes its query parameters; those that are None are left out.
    """

    async def answer(calls: Calls, body: given.Arguments) -> CallToolResult:
        answered = await calls.call(method, path(body), sends(body), **query(body))
        return text_result(says(body, answered), answered)

    return answer


def _session(body: Any) -> str:
    return session_path(body.session_id)


# -- runs -----------------------------------------------------------------------------------------------------------


async def _once(calls: Calls, body: given.Once, language: str | None = None) -> CallToolResult:
    fields = body.model_dump(exclude_none=True)
    fields |= {"language": language} if language else {}
    return await _execute(calls, fields)


async def _command(calls: Calls, body: given.Command) -> CallToolResult:
    fields = body.model_dump(exclude_none=True, exclude={"session_id", "files"})
    if body.session_id is not None:
        if body.files:
            raise CallFailed("'files' are for a run without a session. Put them there with era_upload_file.")
        return await _run(calls, body.session_id, fields)
    fields |= {"language": "shell", "files": body.files}
    return await _execute(calls, fields)


async def _run_in_session(calls: Calls, body: given.RunInSession) -> CallToolResult:
    fields = body.model_dump(exclude_defaults=True, exclude={"session_id"})
    return await _run(calls, body.session_id, fields)


async def _execute(calls: Calls, body: Mapping[str, Any]) -> CallToolResult:
    """A run without a session."""
    answer, missing = await _followed(calls, "/api/execute", body, "Nothing of it is kept.")
    return run_result(answer, unread=missing, in_session=False)


async def _run(calls: Calls, session_id: str, body: Mapping[str, Any]) -> CallToolResult:
    """A run in a session, with the pictures that it shows or leaves."""
    path = f"{session_path(session_id)}/stream"
    answer, missing = await _followed(calls, path, body, "See era_get_session for what was kept.")
    shown = shown_pictures(answer.get("results") or [])
    left, unread = await _pictures(calls, session_id, answer["artifacts"], MOST_IMAGES - len(shown))
    return run_result(answer, shown_images=shown, left_images=left, unread=missing + unread, in_session=True)


async def _followed(calls: Calls, path: str, body: Mapping[str, Any], advice: str) -> tuple[dict[str, Any], list[str]]:
    """The answer of a run that is told as it goes on, and a line where output of it is missing. `advice` is what to do
    where it breaks off."""
    written = {"stdout": Shortened(), "stderr": Shortened()}
    answer: dict[str, Any] = {}
    missing: list[str] = []
    async with aclosing(calls.events(path, body)) as events:
        async for event in events:
            if event["type"] in written:
                written[event["type"]].add(event["content"])
                await calls.progress(event["content"])
            elif event["type"] == "gap":
                missing = [GAP]
            elif event["type"] == "done":
                answer = event
    if not answer:
        raise CallFailed(f"The ERA server hung up before the run was over. {advice}")
    return answer | written, missing


async def _pictures(
    calls: Calls, session_id: str, artifacts: list[dict[str, Any]], most: int
) -> tuple[list[ImageContent], list[str]]:
    """The first small pictures that a run has left, and a line about each that can't be had."""
    small = [item["path"] for item in artifacts if item["type"] in IMAGES and item["size"] <= MOST_IMAGE_BYTES]
    pictures, unread = [], []
    for path in small[:most]:
        try:
            content = await calls.content(file_path(session_id, path))
        except CallFailed as error:  # The run is over: without its answer the model would run it again.
            unread.append(f"[{path} can't be shown: {error}]")
            continue
        pictures.append(image(content.data, content.media_type))
    return pictures, unread


# -- sessions -------------------------------------------------------------------------------------------------------


async def _create(calls: Calls, body: given.CreateSession) -> CallToolResult:
    session = await calls.call("POST", "/api/sessions", _given(body))
    waits = " Its packages are being installed; the first run waits for them." if session.get("setup_status") else ""
    return text_result(f"Session {session['id']} ({session['language']}) is there.{waits}", session)


def _given(body: given.CreateSession | given.UpdateSession) -> dict[str, Any]:
    """The arguments that there are, as they are: pydantic would copy each value in `data`."""
    return {name: value for name, value in body if value is not None}


async def _get(calls: Calls, body: given.OneSession) -> CallToolResult:
    """Show a session as the API writes it: its data may be a MiB of small values, and to write those takes long."""
    session = await calls.content(_session(body))
    return text_result(session.data.decode(), json.loads(session.data))


async def _update(calls: Calls, body: given.UpdateSession) -> CallToolResult:
    changes = _given(body)
    del changes["session_id"]
    if not changes:
        raise CallFailed("There is nothing to change: give data, metadata or a setting.")
    answer = await calls.call("PATCH", session_path(body.session_id), changes)
    return text_result(f"Session {body.session_id} is changed: {', '.join(changes)}.", answer)


def _sessions_text(_: Any, answer: Mapping[str, Any]) -> str:
    lines = [
        f"{session['id']}  {session['language']}  {session['file_count']} files  last run: {session['last_run_at']}"
        for session in answer["sessions"]
    ]
    if answer.get("next_cursor"):
        lines.append(f"There are more: cursor={answer['next_cursor']}")
    return "\n".join(lines) or "There are no sessions. Make one with era_create_session."


# -- files ----------------------------------------------------------------------------------------------------------


async def _upload(calls: Calls, body: given.UploadFile) -> CallToolResult:
    try:
        content = base64.b64decode(body.content, validate=True) if body.encoding == "base64" else body.content.encode()
    except (binascii.Error, ValueError):
        raise CallFailed("'content' is not base64. For text, leave 'encoding' out.") from None
    answer = await calls.send("PUT", given_file_path(body.session_id, body.path), content)
    return text_result(f"{answer['path']}: {answer['size']} bytes.", answer)


async def _read(calls: Calls, body: given.ReadFile) -> CallToolResult:
    content = await calls.content(given_file_path(body.session_id, body.path))
    size = len(content.data)
    if content.media_type in IMAGES and size <= MOST_IMAGE_BYTES:
        shown = text_result(f"{body.path}: {content.media_type}, {size} bytes.", {"path": body.path, "size": size})
        return shown.model_copy(update={"content": [*shown.content, image(content.data, content.media_type)]})
    try:
        text = content.data.decode()
    except UnicodeDecodeError:
        raise CallFailed(
            f"{body.path} is not text ({content.media_type}, {size} bytes). Read it with a program in the session."
        ) from None
    part = text[body.offset : body.offset + body.limit]
    end = body.offset + len(part)
    more = f"\n[{len(text) - end:,} characters follow: offset={end}]" if end < len(text) else ""
    structured = {"path": body.path, "content": part, "offset": body.offset, "characters": len(text)}
    return text_result(part + more, structured)


def _files_text(_: Any, answer: Mapping[str, Any]) -> str:
    lines = [f"{item['size']:>10}  {item['path']}" for item in answer["files"]]
    if answer["count"] < answer["total_count"]:
        lines.append(f"[{answer['total_count'] - answer['count']} more]")
    return "\n".join(lines) or "The session has no files."


async def _edit(calls: Calls, body: given.EditFile) -> CallToolResult:
    path = given_file_path(body.session_id, body.path)
    content = await calls.content(path)
    try:
        text = content.data.decode()
    except UnicodeDecodeError:
        raise CallFailed(f"{body.path} is not text. Change it with a program in the session.") from None
    if (count := text.count(body.old)) != 1:
        found = f"{count} times" if count else "nowhere"
        advice = "Give more of the text around it." if count else "Read the file again, and give it exactly."
        raise CallFailed(f"'old' is {found} in {body.path}. {advice} Nothing was changed.")
    new = text.replace(body.old, body.new).encode()
    answer = await calls.send("PUT", path, new, if_match=content.etag)
    return text_result(f"{answer['path']} is changed: {answer['size']} bytes.", answer)


# -- processes and ports --------------------------------------------------------------------------------------------


def _processes(body: Any) -> str:
    return f"{_session(body)}/processes"


def _process(body: Any) -> str:
    return f"{_processes(body)}/{quoted(body.process)}"


def _line_of(process: Mapping[str, Any]) -> str:
    """Describe a process in a line."""
    command = process["command"]
    ended = f" (exit code {process['exit_code']})" if process["exit_code"] is not None else ""
    named = f"  {process['tag']}" if process["tag"] else ""
    words = command if isinstance(command, str) else " ".join(command)
    return f"{process['process_id']}{named}  {process['status']}{ended}  {words[:200]}"


def _processes_text(_: Any, answer: Mapping[str, Any]) -> str:
    return "\n".join(map(_line_of, answer["processes"])) or "The session has no processes."


async def _read_process(calls: Calls, body: given.ReadProcess) -> CallToolResult:
    path = _process(body)
    there: int = (await calls.call("GET", path))["output_bytes"] or 0
    written, at, gone = Shortened(), body.after, 0
    async with aclosing(calls.output(f"{path}/events", body.after)) as events:
        with anyio.CancelScope() as waiting:
            if at >= there:
                waiting.deadline = anyio.current_time() + body.wait
            async for number, event in events:
                if event["type"] == "exit":
                    break
                if event["type"] == "gap":
                    gone += event["to"] - event["from"] + 1
                else:
                    written.add(_text_of_piece(event))
                if at < there <= number:
                    waiting.deadline = anyio.current_time() + body.wait
                at = number
                if at - body.after - gone > _MOST_READ:
                    break
    process = await calls.call("GET", path)
    output = written.text()
    notes = [f"[{gone:,} bytes aren't kept any more]"] if gone else []
    notes += [f"[{_line_of(process)}]", f"[after={at} reads on from here]"]
    text = "\n".join([*([output.rstrip("\n")] if output else []), *notes])
    structured = {"output": output, "output_truncated": not written.is_whole or gone > 0, "after": at}
    return text_result(text, {**process, **structured})


def _text_of_piece(event: Mapping[str, Any]) -> str:
    content: str = event["content"]
    return content if event["encoding"] == "utf-8" else base64.b64decode(content).decode(errors="replace")


async def _send_input(calls: Calls, body: given.SendInput) -> CallToolResult:
    if not body.input and not body.close:
        raise CallFailed("There is nothing to send: give 'input', or 'close'.")
    path = f"{_process(body)}/stdin"
    answer: dict[str, Any] = {"bytes": 0}
    if body.input:
        answer = await calls.send("POST", path, body.input.encode())
    if body.close:
        answer |= await calls.call("DELETE", path)
    closed = " Its standard input has ended." if body.close else ""
    return text_result(f"{answer['bytes']} bytes are sent.{closed}", answer)


# -- the list -------------------------------------------------------------------------------------------------------

_RUNS = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=True)
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_CHANGES = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False)
_EDITS = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=False)
_DESTROYS = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False)


def _runner(name: str, title: str, language: str) -> Tool:
    description = (
        f"Run {title} code once, in a sandbox that is gone afterwards. Nothing is remembered: for state or files that "
        "last, make a session with era_create_session. Answers what the program wrote and how it ended."
    )
    answer = partial(_once, language=language)
    return Tool(name, f"Run {title}", description, given.Once, answer, _RUNS, RunResult)


TOOLS = {
    tool.name: tool
    for tool in (
        _runner("era_python", "Python", "python"),
        _runner("era_node", "JavaScript (Node)", "node"),
        _runner("era_typescript", "TypeScript", "typescript"),
        _runner("era_deno", "TypeScript (Deno)", "deno"),
        Tool(
            "era_shell",
            "Run a command",
            "Run a line of shell, once in a sandbox of its own or in a session, with its files and packages.",
            given.Command,
            _command,
            _RUNS,
            RunResult,
        ),
        Tool(
            "era_execute_code",
            "Run code in any language",
            "Run code once, in a sandbox that is gone afterwards: Python, Node, TypeScript, Deno, Go or shell.",
            given.OnceInLanguage,
            _once,
            _RUNS,
            RunResult,
        ),
        Tool(
            "era_create_session",
            "Make a session",
            "Make a session: a state (JSON), files and installed packages that stay from run to run. Run code in it "
            "with era_run_in_session.",
            given.CreateSession,
            _create,
            _RUNS,
        ),
        Tool(
            "era_run_in_session",
            "Run in a session",
            "Run code or a command in a session. It finds the session's files in its working directory and the state "
            "in .session_data.json; what it changes there is kept. Variables are kept only by runs with a 'context'.",
            given.RunInSession,
            _run_in_session,
            _RUNS,
            RunResult,
        ),
        Tool(
            "era_list_sessions",
            "List sessions",
            "List sessions.",
            given.ListSessions,
            _call("GET", lambda _: "/api/sessions", _sessions_text, query=lambda given: given.model_dump()),
            _READS,
        ),
        Tool(
            "era_get_session",
            "Look at a session",
            "Get a session's state, settings, and how its setup went.",
            given.OneSession,
            _get,
            _READS,
        ),
        Tool(
            "era_delete_session",
            "Delete a session",
            "Delete a session with its state and files.",
            given.OneSession,
            _call("DELETE", _session, lambda given, _: f"Session {given.session_id} is deleted."),
            _DESTROYS,
        ),
        Tool(
            "era_update_session",
            "Change a session",
            "Replace a session's state or labels, or change its settings. What is left out stays.",
            given.UpdateSession,
            _update,
            _CHANGES,
        ),
        Tool(
            "era_upload_file",
            "Write a file",
            "Write a file into a session; one that is there is replaced.",
            given.UploadFile,
            _upload,
            _CHANGES,
        ),
        Tool(
            "era_read_file",
            "Read a file",
            "Read a file of a session: text, or a picture.",
            given.ReadFile,
            _read,
            _READS,
        ),
        Tool(
            "era_list_files",
            "List files",
            "List a session's files.",
            given.OneSession,
            _call("GET", lambda given: f"{_session(given)}/files", _files_text),
            _READS,
        ),
        Tool(
            "era_edit_file",
            "Edit a file",
            "Replace a text that a session's file has exactly once. The rest of the file stays as it is.",
            given.EditFile,
            _edit,
            _EDITS,
        ),
        Tool(
            "era_start_process",
            "Start a process",
            "Start a program that goes on beside runs, such as a development server. Read what it writes with "
            "era_read_process.",
            given.StartProcess,
            _call(
                "POST",
                _processes,
                lambda _, process: _line_of(process),
                sends=lambda given: given.model_dump(exclude_none=True, exclude={"session_id"}),
            ),
            _RUNS,
        ),
        Tool(
            "era_list_processes",
            "List processes",
            "List a session's processes: those that run, and those that ended last.",
            given.OneSession,
            _call("GET", _processes, _processes_text),
            _READS,
        ),
        Tool(
            "era_read_process",
            "Read a process's output",
            "Read what a process has written, and whether it still runs.",
            given.ReadProcess,
            _read_process,
            _READS,
        ),
        Tool(
            "era_send_input",
            "Send input to a process",
            "Write to the standard input of a process that was started with 'stdin'.",
            given.SendInput,
            _send_input,
            _RUNS,
        ),
        Tool(
            "era_end_process",
            "End a process",
            "End a process: SIGTERM, two seconds later SIGKILL.",
            given.OneProcess,
            _call("DELETE", _process, lambda _, process: _line_of(process)),
            _DESTROYS,
        ),
        Tool(
            "era_get_url",
            "Get a port's URL",
            "Get the public URL of a session's port. Anybody may call the server that listens on it.",
            given.GetUrl,
            _call(
                "GET",
                lambda given: f"{_session(given)}/host",
                lambda _, answer: f"{answer['url']}/\nAs a site of its own: {answer['site_url']}",
                query=lambda given: {"port": given.port},
            ),
            _READS,
        ),
    )
}
