"""Interrupts that come before the first line of a Python cell is executed."""

from __future__ import annotations

from tests.core.interpreters import Cells


async def test_what_runs_before_a_cell_s_first_line_is_interrupted_too(cells: Cells) -> None:
    await cells.run(
        "import time\n"
        "def hook(*_):\n"
        "    get_ipython().events.unregister('pre_run_cell', hook)\n"
        "    time.sleep(60)\n"
        "get_ipython().events.register('pre_run_cell', hook)"
    )
    outcome, _ = await cells.run("x = 1", timeout=3)
    assert (outcome.cause, outcome.lost) == ("timeout", None)
    assert await cells.value("'x' in globals()") == "False"


async def test_an_interrupt_before_a_cell_s_first_line_is_not_lost(cells: Cells) -> None:
    """IPython ignores exceptions of what it calls before."""
    await cells.run(
        "import os, signal, time\n"
        "def interrupt():\n"
        "    get_ipython().events.unregister('pre_execute', interrupt)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "get_ipython().events.register('pre_execute', interrupt)"
    )
    outcome, written = await cells.run("print('in', flush=True)\ntime.sleep(20)", timeout=10)
    assert (outcome.cause, outcome.exit_code, written.stdout) == ("exit", 1, ""), outcome
    assert outcome.error is not None
    assert outcome.error["name"] == "KeyboardInterrupt"
    assert await cells.value("signal.getsignal(signal.SIGINT).__name__") == "'default_int_handler'"
