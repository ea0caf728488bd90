"""A Python context whose program has damaged its own interpreter: cells say so on stderr, and how to restart it."""

from __future__ import annotations

import pytest

from tests.core.interpreters import Cells

RESTART = "POST /api/sessions/{id}/contexts/{name}/restart gives it a new interpreter, without its variables.\n"


@pytest.mark.parametrize(
    ("code", "damage"),
    [
        ("import sys; sys.stdout = None", "sys.stdout can't be written to"),
        ("import sys; sys.stdout = object()", "sys.stdout can't be written to"),
        ("import sys; sys.stderr.close()", "sys.stderr can't be written to"),
        ("import os; os.close(1)", "descriptor 1 (stdout) is closed"),
    ],
)
async def test_damage_of_output_is_reported_by_its_cell_and_the_next(cells: Cells, code: str, damage: str) -> None:
    for cell in (code, "1"):
        outcome, written = await cells.run(cell)
        assert outcome.lost is None
        assert written.stderr.endswith(f"era: this context is damaged: {damage}. {RESTART}")


async def test_a_shell_that_fails_is_reported(cells: Cells) -> None:
    await cells.run("get_ipython().run_cell = None")
    outcome, written = await cells.run("1")
    assert outcome.exit_code == 1
    assert written.stderr.endswith(
        f"era: this context is damaged: IPython fails outside the cell's own code. {RESTART}"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import io, sys; sys.stdout = io.StringIO()",
        "class Both:\n  write = lambda *_: 0\n  flush = lambda *_: 0\nimport sys; sys.stdout = Both()",
        "1 / 0",
        "import sys; sys.exit(3)",
        "exit()",
        "import os; os.kill(os.getpid(), 2)",
    ],
)
async def test_a_sound_interpreter_is_not_reported(cells: Cells, code: str) -> None:
    _, written = await cells.run(code)
    assert "damaged" not in written.stderr
