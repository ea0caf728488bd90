"""What a model is told of runs that are not all there. The tools themselves are tested with each framework."""

from __future__ import annotations

from era.adapters.session_tools import MAX_CHARACTERS, _shown
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


def test_an_output_that_was_cut_off_is_not_called_whole() -> None:
    long = "a" * MAX_CHARACTERS + "b"
    cut, whole = (
        _shown(RunResult(CUT_OFF | {"stdout": long, "stdout_truncated": truncated})) for truncated in (True, False)
    )
    assert "what was kept is the output of run_1_a" in cut
    assert "the whole is the output of" not in cut
    assert "the whole is the output of run_1_a" in whole
