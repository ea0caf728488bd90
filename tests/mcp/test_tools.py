"""The tools for models, called by the official client: over HTTP in both forms of the protocol, and by `era mcp`."""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import ssl
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from mcp.client import Client
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError
from mcp_types import TextResourceContents
from starlette.applications import Starlette

from era.api.routes.mcp import Mcp
from era.network.issuer import Issuer
from tests.api.owners import Owners, new_key
from tests.api.told import TELLS_ITS_END, has_ended
from tests.conftest import Server
from tests.mcp.clients import WAYS, text_of, used
from tests.sdk.scripted import serving

TOOLS = {
    *("era_python", "era_node", "era_typescript", "era_deno", "era_shell", "era_execute_code", "era_create_session"),
    *("era_run_in_session", "era_list_sessions", "era_get_session", "era_delete_session", "era_update_session"),
    *("era_upload_file", "era_read_file", "era_list_files", "era_edit_file", "era_start_process"),
    *("era_list_processes", "era_read_process", "era_send_input", "era_end_process", "era_get_url"),
}


everyway = pytest.mark.parametrize("way", WAYS)


@everyway
def test_the_tools_are_described(server: Server, way: str) -> None:
    async def work(client: Client) -> tuple[str, list[Any]]:
        return str(client.protocol_version), (await client.list_tools()).tools

    version, tools = used(server, way, work)
    assert version == ("2025-11-25" if way == "http with a handshake" else "2026-07-28")
    assert {tool.name for tool in tools} == TOOLS
    for tool in tools:
        assert len(tool.description) > 10
        assert tool.annotations is not None
        assert tool.input_schema["additionalProperties"] is False
        for name, field in tool.input_schema["properties"].items():
            assert "description" in field or name in ("language", "encoding"), (tool.name, name)


@pytest.mark.parametrize(
    ("tool", "code", "expected"),
    [
        ("era_python", "import sys; print(sys.argv[1:], sys.stdin.read())", "['a b'] given"),
        ("era_node", "console.log(process.argv.slice(2), fs.readFileSync(0, 'utf8'))", "[ 'a b' ] given"),
        ("era_typescript", "const x: number = 42; console.log(x)", "42"),
        ("era_deno", "console.log(Deno.args)", '[ "a b" ]'),
    ],
)
def test_a_runner_of_each_language(server: Server, tool: str, code: str, expected: str) -> None:
    code = code.replace("fs.", "require('fs').")

    async def work(client: Client) -> Any:
        return await client.call_tool(tool, {"code": code, "args": ["a b"], "stdin": "given"})

    result = used(server, "http", work)
    assert (text_of(result), result.is_error) == (expected, False)
    assert result.structured_content["stdout"] == expected + "\n"


def test_code_in_any_language_and_a_line_of_shell(server: Server) -> None:
    async def work(client: Client) -> list[str]:
        code = {"language": "shell", "code": "cat note; echo $WHO", "files": {"note": "hi\n"}, "env": {"WHO": "Ada"}}
        line = {"command": "cat note; tr a-z A-Z", "files": {"note": "hi\n"}, "stdin": "loud"}
        return [
            text_of(await client.call_tool(name, given))
            for name, given in (("era_execute_code", code), ("era_shell", line))
        ]

    assert used(server, "http", work) == ["hi\nAda", "hi\nLOUD"]


@everyway
def test_work_in_a_session(server: Server, way: str) -> None:
    async def work(client: Client) -> None:
        async def call(name: str, **given: Any) -> Any:
            result = await client.call_tool(f"era_{name}", given)
            assert not result.is_error, text_of(result)
            return result

        where = {"session_id": "worked"}
        await call("create_session", data={"n": 1}, metadata={"for": "models"}, **where)
        code = "import json; d = json.load(open('.session_data.json')); d['n'] += 1\n"
        code += "json.dump(d, open('.session_data.json', 'w')); print(open('in/given.txt').read(), d['n'])"
        made = await call("upload_file", path="in/given.txt", content="süß", **where)
        assert made.structured_content["size"] == 5
        ran = await call("run_in_session", code=code, **where)
        assert (text_of(ran), ran.structured_content["data"]) == ("süß 2", {"n": 2})
        assert ran.structured_content["state"]["committed"]
        line = await call("shell", command="wc -c < given.txt > ../count; cat ../count", **where, stdin="")
        assert line.structured_content["status"] == "failed"  # it begins in the working directory
        await call("run_in_session", command="wc -c < given.txt > ../count", cwd="in", **where)
        assert text_of(await call("read_file", path="count", **where)) == "5\n"
        assert text_of(await call("read_file", path="/workspace/in/given.txt", offset=1, limit=1, **where)) == (
            "ü\n[1 characters follow: offset=2]"
        )
        listed = text_of(await call("list_files", **where)).split()
        assert listed == ["2", "count", "5", "in/given.txt"]
        await call("update_session", data={"n": 40}, default_timeout=5, **where)
        got = await call("get_session", **where)
        assert (got.structured_content["data"], got.structured_content["default_timeout"]) == ({"n": 40}, 5)
        assert json.loads(text_of(got))["metadata"] == {"for": "models"}
        assert "worked  python" in text_of(await call("list_sessions"))
        await call("delete_session", **where)
        assert "no sessions" in text_of(await call("list_sessions", language="python"))

    used(server, way, work)


def test_any_character_may_be_printed_and_be_in_data(server: Server) -> None:
    """Some of them end lines elsewhere."""
    odd = "a\u2028b\u2029c\u0085d\x0be"

    async def work(client: Client) -> Any:
        await client.call_tool("era_create_session", {"session_id": "odd", "data": {"odd": odd}})
        return await client.call_tool("era_run_in_session", {"session_id": "odd", "code": f"print({odd!r})"})

    result = used(server, "http", work)
    assert text_of(result) == odd
    assert result.structured_content["data"] == {"odd": odd}


def test_what_is_too_large_for_a_tool_is_not_read(server: Server) -> None:
    code = f"open('f', 'w').truncate({(16 << 20) + 1}); open('g', 'w').truncate({16 << 20})"

    async def work(client: Client) -> list[Any]:
        await client.call_tool("era_create_session", {"session_id": "large"})
        await client.call_tool("era_run_in_session", {"session_id": "large", "code": code})
        return [await client.call_tool("era_read_file", {"session_id": "large", "path": path}) for path in "fg"]

    refused, read = used(server, "http", work)
    assert (refused.is_error, read.is_error) == (True, False), text_of(read)[:300]
    assert "over 16 MiB" in text_of(refused)
    assert text_of(read).startswith("\0" * 20_000 + "\n[16,757,216 characters follow")


def test_a_program_that_fails_is_no_failure_of_the_tool(server: Server) -> None:
    async def work(client: Client) -> list[Any]:
        await client.call_tool("era_create_session", {"session_id": "fails"})
        missed = text_of(await client.call_tool("era_get_session", {"session_id": "failz"}))
        assert "There is no session 'failz'. Did you mean 'fails'? era_list_sessions lists them" in missed
        code = "print('so far')\nraise ValueError('mine')"
        return [
            await client.call_tool("era_python", {"code": code}),
            await client.call_tool("era_run_in_session", {"session_id": "fails", "code": code}),
            await client.call_tool(
                "era_run_in_session", {"session_id": "fails", "code": "while True: pass", "timeout": 0.3}
            ),
            await client.call_tool(
                "era_run_in_session", {"session_id": "fails", "code": "open('.session_data.json', 'w').write('{')"}
            ),
        ]

    *failed, timed_out, broke = used(server, "http", work)
    for result in failed:
        assert not result.is_error
        assert text_of(result).startswith("so far\n[stderr]\nTraceback")
        assert "ValueError: mine\n[failed: exit code 1 after" in text_of(result)
        assert (result.structured_content["exit_code"], result.structured_content["status"]) == (1, "failed")
    assert "[timeout: exit code 124" in text_of(timed_out)
    assert "[nothing was kept of this run" in text_of(broke)


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("era_python", {"cod": "1"}, ["'code'", "no argument 'cod'", "Did you mean 'code'?", "code (required)"]),
        ("era_python", {}, ["'code': field required"]),
        ("era_python", {"code": "1", "timeout": "soon"}, ["'timeout'"]),
        ("era_python", {"code": "1", "timeout": 10**9}, ["ERA_MAX_TIMEOUT"]),
        ("era_execute_code", {"code": "1", "language": "cobol"}, ["'language'", "python"]),
        ("era_run_in_session", {"session_id": "gone", "code": "1"}, ["'gone'", "era_create_session"]),
        ("era_run_in_session", {"session_id": "here"}, ["Give 'code' or a 'command'"]),
        ("era_run_in_session", {"session_id": "here", "code": "1", "command": "ls"}, ["both"]),
        ("era_create_session", {"session_id": "here"}, ["already exists"]),
        ("era_create_session", {"session_id": "a/b"}, ["session_id"]),
        ("era_update_session", {"session_id": "here"}, ["nothing to change"]),
        ("era_read_file", {"session_id": "here", "path": "missing.txt"}, ["missing.txt", "era_list_files"]),
        ("era_read_file", {"session_id": "here", "path": "../../etc/passwd"}, ["path"]),
        ("era_read_file", {"session_id": "here", "path": "noise.bin"}, ["not text"]),
        ("era_upload_file", {"session_id": "here", "path": "x", "content": "?", "encoding": "base64"}, ["base64"]),
        ("era_upload_file", {"session_id": "here", "path": "", "content": "x"}, ["path"]),
        ("era_shell", {"command": "ls", "session_id": "here", "files": {"a": "b"}}, ["era_upload_file"]),
    ],
)
def test_what_can_not_be_done_is_told_with_the_way_out(
    server: Server, tool: str, arguments: dict[str, Any], words: list[str]
) -> None:
    async def work(client: Client) -> Any:
        await client.call_tool("era_create_session", {"session_id": "here"})
        noise = base64.b64encode(bytes(range(256))).decode()
        given = {"session_id": "here", "path": "noise.bin", "content": noise, "encoding": "base64"}
        await client.call_tool("era_upload_file", given)
        return await client.call_tool(tool, arguments)

    result = used(server, "http", work)
    assert result.is_error
    for word in words:
        assert word in text_of(result), text_of(result)
    assert "GET /api" not in text_of(result)


def test_an_unknown_tool(server: Server) -> None:
    async def work(client: Client) -> Any:
        with pytest.raises(MCPError, match="Did you mean 'era_python'"):
            await client.call_tool("era_pyhton", {"code": "1"})

    used(server, "http", work)


def test_long_output_is_cut_in_the_middle_and_all_of_it_can_be_read(server: Server) -> None:
    async def work(client: Client) -> tuple[Any, str]:
        await client.call_tool("era_create_session", {"session_id": "long", "persistent": False})
        code = "for i in range(20_000): print('line', i)"
        result = await client.call_tool("era_run_in_session", {"session_id": "long", "code": code})
        (link,) = (part for part in result.content if part.type == "resource_link")
        whole = await client.read_resource(link.uri)
        assert isinstance(whole.contents[0], TextResourceContents)
        return result, whole.contents[0].text

    result, whole = used(server, "http", work)
    shown = result.structured_content["stdout"]
    assert result.structured_content["stdout_truncated"]
    assert len(shown) < 21_000
    assert shown.startswith("line 0\n")
    assert shown.endswith("line 19999\n")
    assert f"{len(whole) - 20_000:,} characters are left out here" in shown
    assert whole == "".join(f"line {i}\n" for i in range(20_000))


def _png() -> bytes:
    """A picture of one point."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def test_pictures_come_as_pictures(server: Server) -> None:
    async def work(client: Client) -> list[Any]:
        await client.call_tool("era_create_session", {"session_id": "drawn"})
        code = f"open('chart.png', 'wb').write({_png()!r})"
        ran = await client.call_tool("era_run_in_session", {"session_id": "drawn", "code": code})
        read = await client.call_tool("era_read_file", {"session_id": "drawn", "path": "chart.png"})
        return [ran, read]

    for result in used(server, "http", work):
        (picture,) = (part for part in result.content if part.type == "image")
        assert (base64.b64decode(picture.data), picture.mime_type) == (_png(), "image/png")
        assert "chart.png" in text_of(result)


def test_resources(server: Server) -> None:
    async def work(client: Client) -> None:
        await client.call_tool("era_create_session", {"session_id": "res", "data": {"n": 7}})
        code = "open('notes.md', 'w').write('# hi'); open('b', 'wb').write(b'\\xff\\0'); print('said')"
        ran = await client.call_tool("era_run_in_session", {"session_id": "res", "code": code})
        assert [str(resource.uri) for resource in (await client.list_resources()).resources] == ["session://res"]
        templates = (await client.list_resource_templates()).resource_templates
        assert {template.uri_template for template in templates} >= {"session://{id}", "session://{id}/files"}

        async def read(uri: str) -> Any:
            return (await client.read_resource(uri)).contents[0]

        assert json.loads((await read("session://res")).text)["data"] == {"n": 7}
        assert [item["path"] for item in json.loads((await read("session://res/files")).text)["files"]] == [
            "b",
            "notes.md",
        ]
        assert (await read("session://res/files/notes.md")).text == "# hi"
        assert base64.b64decode((await read("session://res/files/b")).blob) == b"\xff\0"
        run = ran.structured_content["run_id"]
        assert (await read(f"session://res/runs/{run}/stdout")).text == "said\n"

    used(server, "http", work)


@pytest.mark.parametrize(
    "uri",
    [
        *("session://gone", "session://res/files/missing", "session://", "file:///etc/passwd", "session://res/nothing"),
        *("session://res/../other", "session://res/../../../health", "session://res/files/../../other"),
        *("session://res/files/%2e%2e/%2e%2e/other", "session://..%2F..%2Fhealth", "session://res/files?limit=1"),
        *("session://res/runs/../files/x", "session://res/code", "session://res/capsule"),
    ],
)
def test_no_resource_leads_out_of_its_session(server: Server, client: httpx.Client, uri: str) -> None:
    for name in ("res", "other"):
        client.post("/api/sessions", json={"language": "python", "session_id": name}).raise_for_status()
    client.put("/api/sessions/res/code", json={"code": "1"}).raise_for_status()

    async def work(connected: Client) -> None:
        with pytest.raises(MCPError):
            await connected.read_resource(uri)

    used(server, "http", work)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("era_delete_session", {"session_id": "."}),
        ("era_delete_session", {"session_id": ".."}),
        ("era_get_session", {"session_id": "."}),
        ("era_list_files", {"session_id": ".."}),
        ("era_upload_file", {"session_id": "one", "path": "../../other/files/x", "content": "x"}),
        ("era_upload_file", {"session_id": "one", "path": "./../../other/files/x", "content": "x"}),
        ("era_edit_file", {"session_id": "one", "path": "../../other/files/note", "old": "canary", "new": ""}),
        ("era_read_process", {"session_id": "one", "process": "../files/note"}),
        ("era_end_process", {"session_id": "one", "process": "../../other"}),
        ("era_end_process", {"session_id": "one", "process": ".."}),
        ("era_read_file", {"session_id": "one", "path": "../../other/files/note"}),
        ("era_read_file", {"session_id": "one", "path": "../../other"}),
    ],
)
def test_no_name_leads_to_other_calls(
    server: Server, client: httpx.Client, tool: str, arguments: dict[str, Any]
) -> None:
    for name in ("one", "other"):
        client.post("/api/sessions", json={"language": "python", "session_id": name}).raise_for_status()
    client.put("/api/sessions/other/files/note", content=b"canary").raise_for_status()
    result = used(server, "http", lambda connected: connected.call_tool(tool, arguments))
    assert result.is_error, text_of(result)
    assert "canary" not in text_of(result)
    assert {session["id"] for session in client.get("/api/sessions").json()["sessions"]} == {"one", "other"}
    assert [file["path"] for file in client.get("/api/sessions/other/files").json()["files"]] == ["note"]


@everyway
def test_progress_comes_while_the_program_runs(server: Server, client: httpx.Client, way: str) -> None:
    async def work(connected: Client) -> None:
        await connected.call_tool("era_create_session", {"session_id": "told"})

        async def progress(progress: float, total: float | None, message: str | None) -> None:
            if "ready" in (message or ""):  # only then the program gets what it waits for
                await anyio.to_thread.run_sync(lambda: client.put("/api/storage/kv/told/go", json={"value": "now"}))

        code = """import era_storage, time
print('ready', flush=True)
while not (value := era_storage.kv.get('told', 'go')): time.sleep(0.05)
print(value)
"""
        arguments = {"session_id": "told", "code": code, "timeout": 60}
        result = await connected.call_tool("era_run_in_session", arguments, progress_callback=progress)
        assert text_of(result) == "ready\nnow"

    used(server, way, work)


def test_progress_and_cancellation_without_a_session(server: Server, client: httpx.Client) -> None:
    async def work(connected: Client) -> None:
        said: list[str] = []

        async def progress(progress: float, total: float | None, message: str | None) -> None:
            said.append(message or "")
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            await connected.call_tool("era_python", {"code": TELLS_ITS_END, "timeout": 300}, progress_callback=progress)
        assert said == ["on\n"]

    used(server, "http", work)
    assert has_ended(client)


def test_a_key_opens_its_owner_s_sessions_and_no_others(owners: Owners) -> None:
    alice, mallory = (new_key(owners.server, name)["key"] for name in ("model-a", "model-m"))

    async def make(client: Client) -> Any:
        return await client.call_tool("era_create_session", {"session_id": "private", "data": {"secret": 1}})

    async def look(client: Client) -> list[str]:
        answers = [await client.call_tool("era_list_sessions", {})]
        answers += [await client.call_tool(f"era_{name}", {"session_id": "private"}) for name in ("get_session",)]
        return [text_of(answer) for answer in answers]

    async def make_and_look(client: Client) -> tuple[Any, list[str]]:
        return await make(client), await look(client)

    for way in ("http", "stdio"):
        made, seen = used(owners.server, way, make_and_look, key=alice)
        assert made.is_error == (way == "stdio")  # the second finds it there
        assert "private" in seen[0]
        listed, got = used(owners.server, way, look, key=mallory)
        assert "private" not in listed
        assert "no session 'private'" in got
    keyless = text_of(used(owners.server, "stdio", make))
    assert "ERA_API_KEY" in keyless
    answer = httpx.post(f"{owners.server.url}/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


def test_of_many_wrong_arguments_the_first_few_are_told(server: Server) -> None:
    """For each unknown one the nearest name is looked for."""

    async def work(client: Client) -> Any:
        return await client.call_tool("era_python", {"code": "", **{f"cod{n}": 1 for n in range(2000)}})

    told = text_of(used(server, "http", work))
    assert told.count("There is no argument") == 5
    assert "Did you mean 'code'?" in told
    assert "code (required)" in told


def test_plain_json_rpc_is_enough(client: httpx.Client) -> None:
    """No handshake, no Accept, no Content-Type, as the simplest clients send it."""
    for path in ("/mcp", "/mcp/", "/mcp/v1", "/mcp/v1/"):
        call = {"name": "era_python", "arguments": {"code": "print(6 * 7)"}}
        body = json.dumps({"jsonrpc": "2.0", "id": 5, "method": "tools/call", "params": call})
        answer = client.post(path, content=body, headers={"Accept": "*/*", "Content-Type": "text/plain"})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json"), answer.text
        assert answer.json()["result"]["content"][0]["text"] == "42"
    for accept, kind in (
        ("application/json, text/event-stream;q=0", "application/json"),
        ("Application/JSON, Text/Event-Stream", "text/event-stream"),
        ("text/event-stream", "text/event-stream"),
    ):
        answer = client.post("/mcp", content=body, headers={"Accept": accept})
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind), accept
    assert client.get("/mcp").status_code == 405
    assert client.post("/mcp", content="{").json()["error"]["code"] == -32700
    answer = client.post("/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "no/such"})
    assert answer.json()["error"]["code"] == -32601


def test_a_page_of_another_site_can_not_call_tools(client: httpx.Client) -> None:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
    for headers in (
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
        {"Referer": f"{client.base_url}/proxy/x/80/"},
    ):
        answer = client.post("/mcp", content=body, headers={"Content-Type": "text/plain", **headers})
        assert answer.status_code == 403, headers


def test_a_server_that_is_away(server: Server) -> None:
    class Away:
        url = "http://127.0.0.1:9"

    async def work(client: Client) -> Any:
        assert {tool.name for tool in (await client.list_tools()).tools} == TOOLS
        return await client.call_tool("era_python", {"code": "1"})

    result = used(Away(), "stdio", work)  # type: ignore[arg-type]  # only its URL is used
    assert result.is_error
    assert "can't be reached" in text_of(result)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_server_with_a_certificate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trusted: bool) -> None:
    """What the machine trusts counts, as for other commands; and why one isn't trusted is told."""
    issuer = Issuer("tests")
    key, certificate = issuer.issue(["127.0.0.1"], timedelta(days=1))
    (tmp_path / "server").write_bytes(key + certificate)
    (tmp_path / "authority").write_bytes(issuer.certificate)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "server")
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority"))

    class Away:
        url = ""

    async def work(client: Client) -> str:
        return text_of(await client.call_tool("era_list_sessions", {}))

    with serving() as scripted:
        scripted.socket = context.wrap_socket(scripted.socket, server_side=True)
        scripted.script = [(200, {}, b'{"sessions": [], "count": 0}')]
        Away.url = scripted.url.replace("http:", "https:")
        told = used(Away(), "stdio", work)  # type: ignore[arg-type]  # only its URL is used
    assert ("There are no sessions" if trusted else "CERTIFICATE_VERIFY_FAILED") in told


async def test_a_library_that_fails_to_start_fails_the_call_and_not_those_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It isn't waited for."""
    failures = [OSError(errno.EMFILE, "Too many open files")]
    run = StreamableHTTPSessionManager.run

    @asynccontextmanager
    async def failing(self: StreamableHTTPSessionManager) -> AsyncIterator[None]:
        if failures:
            raise failures.pop()
        async with run(self):
            yield

    monkeypatch.setattr(StreamableHTTPSessionManager, "run", failing)
    transport = httpx.ASGITransport(Starlette(routes=(mcp := Mcp()).routes()))
    ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    async with mcp.lifespan(None), httpx.AsyncClient(transport=transport, base_url="http://era:8787") as client:
        async with asyncio.timeout(60):
            with pytest.raises(OSError, match="Too many open files"):
                await client.post("/mcp", json=ping)
            assert (await client.post("/mcp", json=ping)).json()["result"] == {}
