"""Sessions whose data has very many small values: it is parsed and written beside the event loop, for which others
wait."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from era.core import jsontext
from era.mcp import tools
from era.mcp.arguments import OneSession
from tests.unit.core import Core

ONES = {"n": [1] * 300_000}


@pytest.fixture
def on_the_loop(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What long JSON the thread of the event loop parses and writes."""
    seen, loop_thread = list[str](), threading.current_thread()
    decode, encode, iterencode = json.JSONDecoder.decode, json.JSONEncoder.encode, json.JSONEncoder.iterencode

    def noted(what: str, size: int) -> None:
        if size > jsontext.IN_THREAD and threading.current_thread() is loop_thread:
            seen.append(what)

    def decoded(self: json.JSONDecoder, text: str, *given: Any) -> Any:
        noted("parsed", len(text))
        return decode(self, text, *given)

    def encoded(self: json.JSONEncoder, value: Any) -> str:
        text = encode(self, value)
        noted("written", len(text))
        return text

    def encoded_in_pieces(self: json.JSONEncoder, value: Any, *given: Any, **named: Any) -> Any:
        size = 0
        for piece in iterencode(self, value, *given, **named):
            size += len(piece)
            yield piece
        noted("written in pieces", size)

    monkeypatch.setattr(json.JSONDecoder, "decode", decoded)
    monkeypatch.setattr(json.JSONEncoder, "encode", encoded)
    monkeypatch.setattr(jsontext._ENCODER, "iterencode", encoded_in_pieces.__get__(jsontext._ENCODER), raising=False)
    return seen


@pytest.mark.parametrize("changes", [False, True])
async def test_a_run_reads_and_writes_large_data_beside_the_event_loop(
    core: Core, on_the_loop: list[str], changes: bool
) -> None:
    await core.session("s", data=jsontext.compact(ONES))
    on_the_loop.clear()
    code = "import json\ntext = open('.session_data.json').read()\nprint(len(json.loads(text)['n']))\n"
    if changes:
        code += "open('.session_data.json', 'w').write(text.replace('1', '2'))"
    claim = core.claim("k")
    ran = await core.run(code, claim=claim)
    assert (ran.result.status, ran.stdout) == ("ok", b"300000\n")
    data = ran.result.data
    assert data == {"n": [2 if changes else 1] * 300_000}
    assert on_the_loop == []


async def test_what_is_written_large_on_the_loop_would_be_seen(on_the_loop: list[str]) -> None:
    """The test above finds what it is for."""
    text = json.dumps(ONES, indent=2)
    assert json.loads(text) == ONES
    assert "written" in on_the_loop
    assert "parsed" in on_the_loop


async def test_a_tool_shows_large_data_beside_the_event_loop(on_the_loop: list[str]) -> None:
    class OneAnswer:
        async def call(self, *_: Any, **__: Any) -> Any:
            return {"id": "s", "data": ONES}

    calls: Any = OneAnswer()
    progress: Any = None
    result = await tools._get(calls, OneSession(session_id="s"), progress)
    assert result.structured_content == {"id": "s", "data": ONES}
    assert on_the_loop == []


async def test_what_a_cell_answered_is_kept_and_read_beside_the_event_loop(core: Core, on_the_loop: list[str]) -> None:
    deep: Any = {"a": "Ä"}
    for _ in range(63):  # as deep as a result may be
        deep = {"a": deep}
    cell = {"context": "c", "results": [{"data": {"application/json": ONES, "text/plain": "\0"}, "metadata": deep}]}
    kept = await core.outputs.keep(core.outputs.new(), cell)
    assert kept is not None
    assert await core.outputs.cell(kept) == cell
    assert on_the_loop == []
