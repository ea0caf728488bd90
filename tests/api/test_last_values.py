"""The last value of a Python program: a table or figure is kept as a file, as a notebook would show it.

With the real packages. They are large, so all tests share one setup, which is installed once.
"""

from __future__ import annotations

import httpx
import pytest

from tests.api.answers import artifact_paths
from tests.api.setups import make, settled
from tests.conftest import MakeSession, Run

NOTEBOOK = """\
import pandas as pd
import matplotlib.pyplot as plt

frame = pd.DataFrame({"city": ["Köln", "<b>Ulm</b>"], "people": [1_100_000, 130_000]})
frame.plot.bar(x="city", y="people")
plt.show()
frame.sort_values("people")
"""


@pytest.fixture
def where(client: httpx.Client) -> str:
    """A session with pandas and matplotlib."""
    where = make(client, {"pip": ["pandas", "matplotlib"]}, default_timeout=60)
    settled(client, where)
    return where


def test_a_notebooks_script_keeps_its_figure_and_table(client: httpx.Client, where: str, run: Run) -> None:
    outcome = run(where, NOTEBOOK)
    assert (outcome["exit_code"], outcome["stdout"], outcome["stderr"]) == (0, "", ""), outcome
    assert [(each["path"], each["type"]) for each in outcome["artifacts"]] == [
        ("figure-1.png", "image/png"),
        ("table-1.html", "text/html"),
    ]
    table = client.get(f"/api/sessions/{where}/files/table-1.html").text
    assert table.index("&lt;b&gt;Ulm&lt;/b&gt;") < table.index("Köln")
    assert "2 rows × 2 columns" in table
    assert client.get(f"/api/sessions/{where}/files/figure-1.png").content.startswith(b"\x89PNG")
    # Plot functions return what they drew, whose figure is kept; files that exist are left alone.
    assert artifact_paths(run(where, "import matplotlib.pyplot as plt\nplt.hist([1, 2, 2])")) == ["figure-2.png"]


def test_programs_run_as_without_such_packages(where: str, session: MakeSession, run: Run) -> None:
    """Although the packages are installed and the program ends with an expression."""
    code = "import sys; print(*sorted({*sys.modules} - {'pwd'}), sys.displayhook is sys.__displayhook__, "
    code += "sys.gettrace(), sys.getprofile(), [sys.monitoring.get_tool(n) for n in range(6)], "
    code += "dir(__builtins__), sorted(globals()))"
    # Where there are packages, Python need not ask for the user's home to look for some.
    assert run(where, code)["stdout"].split() == run(session(), code)["stdout"].split()
    code = """\
from __future__ import annotations
import atexit, inspect, multiprocessing, sys

def double(n: Unknown) -> int: return 2 * n

if __name__ == "__main__":
    atexit.register(print, "at exit")
    print(__file__, __loader__.get_source("__main__").count("\\n"), inspect.getsource(double).strip())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [1, 2]), double.__annotations__)
    sys.exit(3) if len(sys.argv) > 1 else (1 + double(None) + 2)
"""
    outcome = run(where, code)
    lines = len(code.splitlines())
    assert outcome["stdout"].splitlines() == [
        f"/workspace/main.py {lines} def double(n: Unknown) -> int: return 2 * n",
        "[2, 4] {'n': 'Unknown', 'return': 'int'}",
        "at exit",
    ]
    assert outcome["stderr"].splitlines() == [
        "Traceback (most recent call last):",
        f'  File "/workspace/main.py", line {lines}, in <module>',
        "    sys.exit(3) if len(sys.argv) > 1 else (1 + double(None) + 2)",
        "                                               ~~~~~~^^^^^^",
        '  File "/workspace/main.py", line 4, in double',
        "    def double(n: Unknown) -> int: return 2 * n",
        "                                          ~~^~~",
        "TypeError: unsupported operand type(s) for *: 'int' and 'NoneType'",
    ]
    assert outcome["exit_code"] == 1
    where_it_is = '  File "/workspace/main.py", line 1\n    frame.\n          ^\nSyntaxError: invalid syntax\n'
    assert run(where, "frame.\n")["stderr"] == where_it_is
    assert run(where, "import sys\nsys.exit(4)")["exit_code"] == 4
    # A process that is started cold keeps no last value.
    assert artifact_paths(run(where, "import pandas\npandas.Series([1])", env={"PYTHONHASHSEED": "1"})) == []
