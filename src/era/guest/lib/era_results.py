"""Keeps tables and figures as files of the session, for people to look at, where a program doesn't write them itself.

A file goes into the working directory under the next number that is free: table-1.html, figure-1.png. Existing files,
whoever made them, stay.
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
"""Rows of a table that are kept: the first of these numbers with which the file isn't too large."""
COLUMNS = 50
CELL = 200
"""Characters of a value that are kept."""
LARGE = 1 << 20
"""Characters that a file may have."""

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
    """Write a file of a table or figure of pandas, polars or matplotlib. Any other value is left alone."""
    if _is_a(value, "pandas", "Series"):
        value = value.to_frame("" if value.name is None else value.name)
    if _is_a(value, "pandas", "DataFrame"):
        _keep_table(lambda rows: _of_pandas(value, rows))
    elif _is_a(value, "polars", "DataFrame", "Series"):
        _keep_table(lambda rows: _of_polars(value, rows))
    else:
        _keep_figure_of(value)


def write(stem: str, ending: str, content: bytes) -> None:
    """Write a new file into the working directory: STEM-NUMBER.ENDING."""
    for number in count(1):
        with suppress(FileExistsError), open(f"{stem}-{number}.{ending}", "xb") as file:
            file.write(content)
            return


def _is_a(value: Any, module: str, *names: str) -> bool:
    """Whether `value` is of one of the named classes of a module, if that is loaded."""
    classes = [getattr(sys.modules.get(module), name, None) for name in names]
    return isinstance(value, tuple(known for known in classes if isinstance(known, type)))


def _keep_table(html: Callable[[int], str]) -> None:
    """Write a table, which `html` makes with a number of rows. Raises ValueError if it is too large with few."""
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
    """Save the figure that a value is or is part of: `plot()` returns axes, lines, or lists of what it drew."""
    for _ in range(2):  # hist() gives a tuple that ends with a tuple
        if isinstance(value, list | tuple) and value:
            value = value[-1]
    if _is_a(value, "numpy", "ndarray") and value.size:  # of axes, as hist() of a table and subplots() give
        value = value.flat[0]
    is_artist = _is_a(value, "matplotlib.artist", "Artist")
    if not is_artist and isinstance(getattr(type(value), "figure", None), property):  # as seaborn's grids have it
        value = value.figure
        is_artist = _is_a(value, "matplotlib.artist", "Artist")
    if not is_artist:
        return
    import era_matplotlib

    figure = value.get_figure()  # or a part of one, which names the whole
    if figure is not None and sys.modules["matplotlib"].get_backend() == f"module://{era_matplotlib.__name__}":
        era_matplotlib.save(figure.figure)
