"""What a model is told of runs that are not all there. The tools themselves are tested with each framework."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from era.adapters.session_tools import MAX_CHARACTERS, SessionTools, _shown
from era.mcp.results import run_result
from era.sdk.answers import RunResult
from tests.adapters.answers import CUT_OFF, NOTES
from tests.mcp.clients import text_of


def test_what_is_missing_is_said() -> None:
    assert _shown(RunResult(CUT_OFF)) == "\n".join(["out", "[stderr]", "err", *NOTES])
    result = run_result(CUT_OFF, in_session=True)
    assert text_of(result) == "\n".join(["out", "[stderr]", "err", *NOTES]), "the tools of MCP say the same"
    assert result.structured_content is not None
    assert result.structured_content["results_truncated"] is True


async def test_a_file_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is behind it isn't read at all: the model is told how to see parts."""
    monkeypatch.setattr("era.adapters.session_tools._MAX_BYTES", 2 << 20)
    read: list[int] = []

    class Files:
        async def pieces(self, path: str) -> AsyncIterator[bytes]:
            for size in (1 << 20,) * (2 if path == "fits" else 1000):
                read.append(size)
                yield b"x" * size

    tools = SessionTools(SimpleNamespace(files=Files()))  # type: ignore[arg-type]  # all that is used of a session
    assert "characters are left out here; run_command can show parts of fits" in await tools.read_file("fits")
    assert len(read) == 2
    told = await tools.read_file("large")
    assert told == "large has over 2 MiB, too much for this tool. run_command can show parts of it."
    assert len(read) == 2 + 3


def test_an_output_that_was_cut_off_is_not_called_whole() -> None:
    long = "a" * MAX_CHARACTERS + "b"
    cut, whole = (
        _shown(RunResult(CUT_OFF | {"stdout": long, "stdout_truncated": truncated})) for truncated in (True, False)
    )
    assert "what was kept is the output of run_1_a" in cut
    assert "the whole is the output of" not in cut
    assert "the whole is the output of run_1_a" in whole
