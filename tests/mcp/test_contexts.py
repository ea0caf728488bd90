"""Cells of contexts by the tools for models: variables that stay, values, pictures, and what is said of their loss."""

from __future__ import annotations

import base64
from typing import Any

import anyio
import httpx
from mcp.client import Client

from era.mcp.results import MOST_CHARACTERS, MOST_IMAGES, run_result, shown_pictures
from tests.conftest import Server
from tests.mcp.clients import text_of, used

PICTURE = base64.b64encode(b"\x89PNG and so on").decode()


def test_cells_share_variables_and_show_pictures(server: Server, client: httpx.Client) -> None:
    async def work(connected: Client) -> None:
        await connected.call_tool("era_create_session", {"session_id": "book"})

        async def cell(code: str, **given: Any) -> Any:
            arguments = {"session_id": "book", "context": "main", "code": code, **given}
            result = await connected.call_tool("era_run_in_session", arguments)
            assert not result.is_error, text_of(result)
            return result

        assert text_of(await cell("numbers = [1, 2, 3]")) == "[no output]"
        summed = await cell("print(len(numbers))\nsum(numbers)")
        assert text_of(summed) == "3\n6"
        assert summed.structured_content["results"] == "6"
        assert (summed.structured_content["context"], summed.structured_content["execution_count"]) == ("main", 2)
        shown = f"from base64 import b64decode\nfrom IPython.display import Image\nImage(b64decode({PICTURE!r}))"
        drawn = await cell(shown)
        (picture,) = (part for part in drawn.content if part.type == "image")
        assert (base64.b64decode(picture.data), picture.mime_type) == (base64.b64decode(PICTURE), "image/png")
        assert PICTURE not in str(drawn.structured_content)
        failed = await cell("numbers.nothing")
        assert "AttributeError" in text_of(failed)
        assert failed.structured_content["status"] == "failed"
        client.post("/api/sessions/book/stop").raise_for_status()
        assert text_of(await cell("'numbers' in globals()")) == (
            "False\n[variables of earlier cells are gone: The session was stopped.]"
        )
        for wrong in ({"command": "ls"}, {"code": "1", "atomic": True}, {"code": "1", "args": ["x"]}):
            arguments = {"session_id": "book", "context": "main", **wrong}
            refused = await connected.call_tool("era_run_in_session", arguments)
            assert refused.is_error
            assert "context" in text_of(refused)

    used(server, "http", work)


def test_a_cell_that_is_cancelled_is_interrupted_and_its_variables_stay(server: Server) -> None:
    async def work(connected: Client) -> None:
        where = {"session_id": "long", "context": "main"}
        await connected.call_tool("era_create_session", {"session_id": "long"})
        began = anyio.Event()

        async def progress(progress: float, total: float | None, message: str | None) -> None:
            began.set()

        async with anyio.create_task_group() as group:

            async def call() -> None:
                code = "import time\nx = 7\nprint('on', flush=True)\ntime.sleep(600)"
                arguments = {**where, "code": code, "timeout": 600}
                await connected.call_tool("era_run_in_session", arguments, progress_callback=progress)

            group.start_soon(call)
            await began.wait()
            group.cancel_scope.cancel()
        # It waits for the turn of the cell before it, which ends when that is interrupted.
        after = await connected.call_tool("era_run_in_session", {**where, "code": "x", "timeout": 300})
        assert text_of(after) == "7"

    used(server, "http", work)


def answered(results: list[dict[str, Any]]) -> dict[str, Any]:
    outcome = {"exit_code": 0, "status": "ok", "duration": "0.1s", "stdout": "", "stderr": ""}
    told = {"stdout_truncated": False, "stderr_truncated": False, "memory": {"kept": True, "reason": None}}
    shown = [{"data": data, "metadata": {}, "main": False} for data in results]
    return {**outcome, **told, "results": shown, "results_truncated": False, "execution_count": 1, "context": "main"}


def test_what_is_shown_is_bounded_and_what_is_left_out_is_told() -> None:
    answer = answered([{"image/png": PICTURE, "text/plain": "<Figure>"}] * (MOST_IMAGES + 2))
    shown = shown_pictures(answer["results"])
    assert len(shown) == MOST_IMAGES
    text = text_of(run_result(answer, shown_images=shown, in_session=True))
    assert text.startswith("<Figure>\n<Figure>\n")
    assert "[of its pictures 2 are left out" in text
    long = text_of(run_result(answered([{"text/plain": "x" * MOST_CHARACTERS * 2}]), in_session=True))
    assert len(long) < MOST_CHARACTERS + 100
    assert f"{MOST_CHARACTERS:,} characters are left out here" in long
    best = answered([{"text/plain": "<Markdown object>", "text/markdown": "# A title"}, {"application/json": {}}])
    assert text_of(run_result(best, in_session=True)) == "# A title\n<application/json>"


def test_what_only_says_to_be_a_picture_is_none() -> None:
    """A cell can say anything of itself."""
    answer = answered([{"image/png": value} for value in ("not base64!", "é", "", 7, None, ["x"], {"a": 1})])
    assert shown_pictures(answer["results"]) == []
    assert "[of its pictures 7 are left out" in text_of(run_result(answer, in_session=True))
