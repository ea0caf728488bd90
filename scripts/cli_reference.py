#!/usr/bin/env python3
"""cli_reference.py [--check]: write the reference of the command's words in docs/cli.md, from the parsers themselves.
With --check, only say whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from era.client.grammar import GROUPS, commands_below, parser_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
MARK = "<!-- Made by scripts/cli_reference.py from here on. -->\n"
EVERYWHERE = {"help", "server", "json"}
"""Options that all commands have, which the page explains once."""


def reference() -> str:
    lines: list[str] = []
    for title, commands in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in commands:
            for parser in leaves(parser_of(name)):
                lines += section(parser)
    return "\n".join(lines).rstrip() + "\n"


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    groups = commands_below(parser)
    if groups is None:
        yield parser
    for below in (groups or {}).values():
        yield from leaves(below)


def section(parser: argparse.ArgumentParser) -> list[str]:
    actions = [a for a in parser._actions if a.dest not in EVERYWHERE and a.help != argparse.SUPPRESS]
    places = [place(action) for action in actions if not action.option_strings]
    text = " ".join((parser.description or "").split())
    lines = [f"### `{' '.join([parser.prog, *places])}`", "", *wrapped(text), ""]
    rows = [(words(action), action.help) for action in actions if action.help]
    if rows:
        lines += ["| | |", "| --- | --- |", *(f"| {left} | {cell(right)} |" for left, right in rows), ""]
    examples = (parser.epilog or "").splitlines()[1:]
    return [*lines, "```console", *(f"$ {line.strip()}" for line in examples), "```", ""]


def place(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest.upper())
    return {"?": f"[{name}]", "*": f"[{name}…]", "+": f"{name}…"}.get(str(action.nargs), name)


def words(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest.upper()}`"
    value = action.metavar or (",".join(map(str, action.choices)) if action.choices else action.dest.upper())
    takes = "" if action.nargs == 0 else f" {value}"
    *others, last = action.option_strings
    return ", ".join([*(f"`{option}`" for option in others), f"`{last}{takes}`"])


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def main() -> int:
    old = PAGE.read_text()
    new = old.partition(MARK)[0] + MARK + "\n" + reference()
    if "--check" in sys.argv:
        if old != new:
            print("docs/cli.md is not what scripts/cli_reference.py makes")
        return int(old != new)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
