"""Events of a Python cell: what it shows, between its output."""

from __future__ import annotations

from pathlib import Path

from era.core.models import JsonObject
from tests.core.interpreters import Cells
from tests.unit.core import until

IN_ORDER = """
import sys, warnings
from IPython.display import clear_output, display
print('a'); display('b'); print('c', end=''); sys.stderr.write('d\\n')
handle = display('e', display_id='one'); print('f'); handle.update('g'); clear_output(); print('h')
'i'
"""


async def test_events_are_in_the_order_of_the_writes(cells: Cells) -> None:
    def text(value: str) -> JsonObject:
        return {"data": {"text/plain": repr(value)}, "metadata": {}}

    outcome, written = await cells.run(IN_ORDER)
    on_stdout = [event for event in written.events if event["type"] != "stderr"]
    assert on_stdout == [
        {"type": "stdout", "content": "a\n"},
        {"type": "display", **text("b")},
        {"type": "stdout", "content": "c"},
        {"type": "display", **text("e"), "display_id": "one"},
        {"type": "stdout", "content": "f\n"},
        {"type": "update_display", **text("g"), "display_id": "one"},
        {"type": "clear_output", "wait": False},
        {"type": "stdout", "content": "h\n"},
        {"type": "result", **text("i"), "execution_count": outcome.execution_count},
    ]
    kinds = [event["type"] for event in written.events]
    assert kinds.index("stderr") in (2, 3)
    assert written.stdout == "a\ncf\nh\n"
    assert [result["data"]["text/plain"] for result in outcome.results] == ["'i'"]


async def test_error_event_comes_last(cells: Cells) -> None:
    outcome, written = await cells.run("display(1)\n1 / 0")
    assert [event["type"] for event in written.events] == ["display", "stderr", "cell_error"]
    assert written.events[-1] == {"type": "cell_error", **(outcome.error or {})}


async def test_displays_of_threads_among_much_output(cells: Cells) -> None:
    code = """
import threading
def show(name):
    for number in range(50):
        print(f"{name} {number} " + "x" * 5000); display(f"{name} {number}")
threads = [threading.Thread(target=show, args=(name,)) for name in "ab"]
for each in threads: each.start()
for each in threads: each.join()
"""
    outcome, written = await cells.run(code, output_bytes=1 << 22)
    assert len(outcome.results) == 100
    assert written.stdout.count("x") == 100 * 5000  # one thread's text may stand in the middle of the other's
    assert "\0" not in written.stdout
    for name in "ab":
        seen = ""
        numbers = []
        for event in written.events:
            if event["type"] == "stdout":
                seen += event["content"]
            elif (shown := event["data"]["text/plain"].strip("'")).startswith(name):
                numbers.append(shown)
                assert f"{shown} x" in seen, "what was printed before comes before"
        assert numbers == [f"{name} {number}" for number in range(50)]


async def test_display_of_a_fork_that_outlives_its_cell_leaves_no_mark(cells: Cells, tmp_path: Path) -> None:
    go, shown = tmp_path / "go", tmp_path / "shown"
    code = f"""
import os, time
if os.fork() == 0:
    while not os.path.exists({str(go)!r}): time.sleep(0.02)
    display("late"); open({str(shown)!r}, "w"); os._exit(0)
"""
    await cells.run(code)
    go.touch()
    await until(shown.exists)
    _, written = await cells.run("print('next')")
    assert written.stdout == "next\n"
