"""What a program leaves to be seen without writing files itself: tables and figures, as files of the session.

A file goes into the working directory under the next number that is free: table-1.html, figure-1.png. What is there
already, whoever made it, stays.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from itertools import count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ROWS = (500, 50, 5)
"""How many of a table are kept: the first of these with which it is not too large."""
COLUMNS = 50
CELL = 200
"""Characters of a value."""
LARGE = 1 << 20
"""Characters of a file."""

_PAGE = """<!doctype html>
<meta charset="utf-8">
<style>
body {{ font: 14px sans-serif }}
table {{ border-collapse: collapse }}
th, td {{ padding: 2px 8px; text-align: right; border-bottom: 1px solid #ddd }}
</style>
{}
"""


def keep(value: Any) -> None:
    """Leave a file of a table or figure of pandas, polars or matplotlib; of anything else nothing."""
    if _is_a(value, "pandas", "Series"):
        value = value.to_frame("" if value.name is None else value.name)
    if _is_a(value, "pandas", "DataFrame"):
        _keep_table(lambda rows: _of_pandas(value, rows))
    elif _is_a(value, "polars", "DataFrame", "Series"):
        _keep_table(lambda rows: _of_polars(value, rows))
    else:
        _keep_figure_of(value)


def write(stem: str, ending: str, content: bytes) -> None:
    """A new file in the working directory."""
    for number in count(1):
        with suppress(FileExistsError), open(f"{stem}-{number}.{ending}", "xb") as file:
            file.write(content)
            return


def _is_a(value: Any, module: str, *names: str) -> bool:
    """Whether it is of one of the classes that a module has, if that is loaded."""
    classes = [getattr(sys.modules.get(module), name, None) for name in names]
    return isinstance(value, tuple(one for one in classes if isinstance(one, type)))


def _keep_table(html: Callable[[int], str]) -> None:
    for rows in ROWS:
        table = html(rows)
        if len(table) <= LARGE:
            write("table", "html", _PAGE.format(table).encode(errors="replace"))
            return
    raise ValueError(f"the table has {len(table)} characters with {rows} rows")


def _of_pandas(frame: Any, rows: int) -> str:
    with sys.modules["pandas"].option_context("display.max_colwidth", CELL):
        made: str = frame.to_html(max_rows=rows, max_cols=COLUMNS, show_dimensions=True, border=0)
    return made


def _of_polars(frame: Any, rows: int) -> str:
    with sys.modules["polars"].Config(tbl_rows=rows, tbl_cols=COLUMNS, fmt_str_lengths=CELL):
        made: str = frame._repr_html_()
    return made


def _keep_figure_of(value: Any) -> None:
    """The figure that it is or is part of: `plot()` of many libraries gives axes, lines, or lists of what it drew."""
    for _ in range(2):  # hist() gives a tuple that ends with a tuple
        if isinstance(value, list | tuple) and value:
            value = value[-1]
    if not _is_a(value, "matplotlib.artist", "Artist"):
        return
    import era_matplotlib

    figure = value.get_figure()  # or a part of one, which names the whole
    if figure is not None and sys.modules["matplotlib"].get_backend() == f"module://{era_matplotlib.__name__}":
        era_matplotlib.save(figure.figure)
