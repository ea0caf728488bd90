"""What commands print: tables and colours for people, JSON for programs, failures, progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from era.errors import EraError

_NEXT = {
    "unauthorized": "Set ERA_API_KEY, or remember the server's key with `era login URL`.",
    "connection_lost": "It may have been done: look before you try again. `era runs list SESSION` shows its runs.",
    "server_away": "Start one with `era serve`, or name another with --server, ERA_SERVER or `era login`.",
}
"""What to do about an error, where the command knows better than the API."""


class Failure(Exception):
    """A command can't do what was asked. The message is for the user; `era` prints it and leaves with exit code 2."""

    def __init__(self, message: str, code: str = "usage") -> None:
        super().__init__(message)
        self.code = code


def told(error: Failure | EraError, *, as_json: bool) -> str:
    """What is printed of an error: a line and what to do, or an object like the API's."""
    if isinstance(error, Failure):
        message, _, hint = str(error).partition("\n")
        fields: dict[str, Any] = {"error": message, "code": error.code, "hint": hint.strip()}
    else:
        fields = {"error": error.message, "code": error.code, "hint": _NEXT.get(error.code, error.hint)}
        if error.details is not None:
            fields["details"] = error.details
        if error.request_id:
            fields["request_id"] = error.request_id
    if as_json:
        from json import dumps

        return dumps(fields, ensure_ascii=False)
    return f"era: {fields['error']}\n     {fields['hint']}".rstrip()


_COLOURS = {
    **dict.fromkeys(("ok", "done", "completed", "running"), "32"),
    **dict.fromkeys(("failed", "timeout", "oom", "killed", "disk_full", "lost", "deleted", "expired"), "31"),
    "pending": "33",
}

type Advance = Callable[[int], None]
"""Moves a progress bar on by a number of bytes."""


def print_json(value: Any) -> None:
    from json import dumps

    print(dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns. Terminals get the columns' names and colours, programs get neither."""
    people = sys.stdout.isatty()
    texts = [["" if each is None else _one_line(str(each)) for each in row] for row in rows]
    head = [[name.upper() for name in names]] if people and rows else []
    widths = [max(map(len, column)) for column in zip(*head, *texts, strict=True)] if texts else []
    for number, row in enumerate([*head, *texts]):
        cells = [
            _coloured(cell, cell.ljust(width)) if people and number else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


def pairs(values: dict[str, object]) -> None:
    """Print names and values, one pair a line."""
    table(("field", "value"), list(values.items()))


def print_text(text: str) -> None:
    """Print lines of untrusted text. Characters that could control a terminal are replaced, tabs are kept."""
    for line in text.removesuffix("\n").replace("\r\n", "\n").split("\n"):
        print("\t".join(map(_one_line, line.split("\t"))))


def exit_code(code: int | None, *, ok: bool = False) -> int:
    """What to leave with for something that ended with `code`. None is that of what was lost, unless it is `ok`."""
    if code is None:
        return 0 if ok else 1
    return code


def notice(text: str) -> None:
    """Say something beside the output."""
    print(f"era: {text}", file=sys.stderr)


def _one_line(text: str) -> str:
    """A text that can do nothing to a terminal: control characters are what programs may have put there."""
    return "".join(each if each.isprintable() else "\ufffd" for each in text)


def _coloured(text: str, padded: str) -> str:
    colour = _COLOURS.get(text)
    return padded if colour is None or os.environ.get("NO_COLOR") else f"\x1b[{colour}m{padded}\x1b[0m"


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Advance]:
    """A progress bar of `total` bytes (None: unknown) on standard error, or nothing if that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,  # or what is printed meanwhile would go to standard error, too
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)
