#!/usr/bin/env python3
"""error_reference.py [--check]: write the table of docs/errors.md, of the codes that the server's sources name.
With --check, only say whether it is up to date."""

from __future__ import annotations

import sys
from http import HTTPStatus
from pathlib import Path

from era import errors

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
MARK = "<!-- Made by scripts/error_reference.py from here on. -->\n"

sys.path.insert(0, str(ROOT / "clients" / "typescript"))
from generate import codes  # noqa: E402  the one place that finds them


def hints() -> dict[str, str]:
    """What to do, by code, where a class of errors always says the same."""
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    return {each.code: each.hint for each in classes if issubclass(each, errors.EraError) and "hint" in vars(each)}


def reference() -> str:
    by_status: dict[int, list[str]] = {}
    for code, statuses in codes().items():
        for status in statuses:
            by_status.setdefault(status, []).append(code)
    known = hints()
    lines = []
    for status in sorted(by_status):
        lines += [f"## {status} {HTTPStatus(status).phrase}", "", "| code | what to do |", "| --- | --- |"]
        lines += [f"| `{code}` | {known.get(code, '').replace('|', '\\|')} |" for code in by_status[status]]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    before, _, _ = PAGE.read_text().partition(MARK)
    text = f"{before}{MARK}\n{reference()}"
    if "--check" not in sys.argv:
        PAGE.write_text(text)
    elif text != PAGE.read_text():
        sys.exit("docs/errors.md isn't what the server's sources say: run scripts/error_reference.py")


if __name__ == "__main__":
    main()
