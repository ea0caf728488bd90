"""Tools for processes beside runs, for the addresses of ports, and for edits of files."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from mcp.client import Client

from era.mcp.arguments import EditFile
from era.mcp.calls import CallFailed, Calls
from era.mcp.tools import TOOLS
from tests.conftest import Server, eventually
from tests.mcp.clients import WAYS, text_of, used
from tests.soaking import soak_the_rest

type Call = Callable[..., Awaitable[Any]]


def _in_session(server: Server, way: str, work: Callable[[Call], Awaitable[None]]) -> None:
    """Do `work` with a function that calls a tool in a new session."""

    async def connected(client: Client) -> None:
        async def call(name: str, *, fails: bool = False, **given: Any) -> Any:
            result = await client.call_tool(f"era_{name}", {"session_id": "lively"} | given)
            assert result.is_error == fails, text_of(result)
            return text_of(result) if fails else result.structured_content

        await call("create_session")
        await work(call)

    used(server, way, connected)


@pytest.mark.parametrize("way", soak_the_rest(WAYS, ("http", "stdio")))
def test_process_is_started_read_written_to_and_ended(server: Server, way: str) -> None:
    async def work(call: Call) -> None:
        program = "echo begun; while read -r line; do echo got $line; done; echo over >&2"
        process = (await call("start_process", command=program, stdin=True, tag="echo", env={"A": "1"}))["process_id"]
        read: dict[str, Any] = {"output": "", "after": 0}
        while not read["output"]:
            read = await call("read_process", process="echo", after=read["after"])
        assert (read["output"], read["after"], read["status"]) == ("begun\n", 6, "running")
        assert (await call("send_input", process="echo", input="süß\n"))["bytes"] == 6
        read = await call("read_process", process=process, after=6, wait=30)
        assert read["output"].startswith("got")
        (listed,) = (await call("list_processes"))["processes"]
        assert (listed["process_id"], listed["status"]) == (process, "running")
        await call("send_input", process="echo", close=True)
        whole = await call("read_process", process=process, wait=60)
        assert (whole["output"], whole["status"], whole["exit_code"]) == ("begun\ngot süß\nover\n", "ended", 0)
        assert "has ended" in await call("send_input", process=process, input="x", fails=True)
        await call("start_process", command="exec sleep 300", tag="sleeps")
        ended = await call("end_process", process="sleeps")
        assert (ended["status"], ended["signal"]) == ("ended", "TERM")
        assert "era_list_processes" in await call("read_process", process="nosuch", fails=True)

    _in_session(server, way, work)


def test_output_of_a_process_is_bounded(server: Server) -> None:
    """The answer says how many bytes aren't kept any more, and how much is left out in the middle."""

    async def work(call: Call) -> None:
        await call("start_process", command="seq 1 300000; printf '\\377'", tag="long")
        read = await call("read_process", process="long", wait=60)
        while read["status"] == "running":
            read = await call("read_process", process="long", wait=60)
        read = await call("read_process", process="long")
        assert read["output_truncated"]
        assert len(read["output"]) < 21_000
        assert read["output"].endswith("300000\n\ufffd")
        assert read["output_bytes"] == read["after"]
        again = await call("read_process", process="long", after=read["after"] - 8)
        assert (again["output"], again["output_truncated"]) == ("300000\n\ufffd", False)

    _in_session(server, "http", work)


def test_running_process_is_read_without_waiting_for_its_end(server: Server) -> None:
    async def work(call: Call) -> None:
        await call("start_process", command="echo begun; exec sleep 300", tag="waits")
        read: dict[str, Any] = {"after": 0}
        while read["after"] < 6:
            read = await call("read_process", process="waits", wait=1)
        with anyio.fail_after(120):
            read = await call("read_process", process="waits", wait=0)
        assert (read["output"], read["status"]) == ("begun\n", "running")

    _in_session(server, "http", work)


def test_url_of_a_port_leads_to_its_server(server: Server) -> None:
    async def work(call: Call) -> None:
        await call("upload_file", path="index.html", content="hello")
        program = "import http.server\nhttp.server.test(http.server.SimpleHTTPRequestHandler, port=3000)"
        await call("upload_file", path="serve.py", content=program)
        await call("start_process", command="python3 serve.py")
        urls = await call("get_url", port=3000)
        assert urls["url"].startswith(f"{server.url}/proxy/lively/3000")
        assert ".localhost" in urls["site_url"]
        assert await anyio.to_thread.run_sync(eventually, lambda: httpx.get(urls["url"] + "/").text == "hello")
        assert "65535" in await call("get_url", port=70000, fails=True)

    _in_session(server, "http", work)


def test_edit_replaces_a_text_that_is_there_once(server: Server) -> None:
    async def work(call: Call) -> None:
        await call("upload_file", path="in/a.py", content="x = 1\r\ny = 1\nü = 'x'\n")
        await call("run_in_session", command="chmod 755 in/a.py")
        edit = {"path": "in/a.py"}
        assert "2 times" in await call("edit_file", old=" = 1", new="", fails=True, **edit)
        assert "nowhere" in await call("edit_file", old="x = 1\ny", new="", fails=True, **edit)
        assert "era_list_files" in await call("edit_file", path="in/b.py", old="x", new="", fails=True)
        assert "'old'" in await call("edit_file", old="", new="x", fails=True, **edit)
        await call("edit_file", old="x = 1\r\n", new="x = '\\1'\r\n", **edit)
        await call("edit_file", old="ü = 'x'\n", new="", **edit)
        read = await call("read_file", **edit)
        assert read["content"] == "x = '\\1'\r\ny = 1\n"
        assert (await call("run_in_session", command="stat -c %a in/a.py"))["stdout"] == "755\n"
        await call("run_in_session", command="printf 'a\\377' > bytes")
        assert "not text" in await call("edit_file", path="bytes", old="a", new="b", fails=True)

    _in_session(server, "http", work)


async def test_edit_does_not_overwrite_what_was_written_meanwhile() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, headers={"ETag": '"first"'}, content=b"one two")
        assert (request.headers["if-match"], request.content) == ('"first"', b"one 2")
        error = {"error": "It isn't.", "hint": "…", "code": "precondition_failed"}
        return httpx.Response(412, json=error)

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://era") as client:
        given = EditFile(session_id="s", path="f", old="two", new="2")
        with pytest.raises(CallFailed, match="read it again"):
            await TOOLS["era_edit_file"].answer(Calls(client), given)
