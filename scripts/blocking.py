#!/usr/bin/env python3
"""blocking.py [--check]: make src/era/sdk/sync of src/era/sdk/aio. With --check, only say whether it is up to date.

Coroutines become functions, and the names of what waits become those of its blocking counterparts. Only Python's tokens
are replaced, so texts stay as they are.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TARGET = ROOT / "src/era/sdk/aio", ROOT / "src/era/sdk/sync"

NAMES = {
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "AsyncIterator": "Iterator",
    "aio": "sync",
    "async_finished": "finished",
    "async_in_thread": "in_thread",
    "async_opened": "opened",
    "async_sleep": "sleep",
    "waiting": "blocking",
}
MARK = "# Made by scripts/blocking.py of {name}: change that one.\n"


def blocking(source: str) -> str:
    """The blocking form of a module."""
    lines = source.splitlines(keepends=True)
    edits: list[tuple[int, int, int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.NAME:
            continue
        (row, start), (_, end) = token.start, token.end
        if token.string in ("async", "await"):
            end += len(lines[row - 1]) > end and lines[row - 1][end] == " "
            edits.append((row, start, end, ""))
        elif token.string in NAMES:
            edits.append((row, start, end, NAMES[token.string]))
        elif re.match("Async[A-Z]", token.string):
            edits.append((row, start, end, token.string.removeprefix("Async")))
    for row, start, end, text in reversed(edits):
        line = lines[row - 1]
        lines[row - 1] = line[:start] + text + line[end:]
    return "".join(lines)


def made(path: Path) -> str:
    """A module of the blocking client, formatted."""
    source = path.read_text()
    if path.name == "__init__.py":
        source = source.replace("for asyncio: what a program that uses many sessions at a time calls", "that blocks")
        source = re.sub(r" `era\.sdk\.sync` is made from it\.", "", source)
    text = MARK.format(name=path.relative_to(ROOT)) + blocking(source)
    ruff = Path(sys.executable).parent / "ruff"
    first_party = ["--config", "lint.isort.known-first-party=['era']"]
    for command in (["check", "--fix", "--quiet", "--select", "I", *first_party], ["format", "--quiet"]):
        name = ["--stdin-filename", str(TARGET / path.name), "-"]
        text = subprocess.run([ruff, *command, *name], input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> int:
    texts = {TARGET / path.name: made(path) for path in sorted(SOURCE.glob("*.py"))}
    old = [path for path in TARGET.glob("*.py") if path not in texts]
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if "--check" not in sys.argv:
        TARGET.mkdir(exist_ok=True)
        for path in stale:
            path.write_text(texts[path])
        for path in old:
            path.unlink()
        return 0
    for path in [*stale, *old]:
        print(f"{path.relative_to(ROOT)} is not what scripts/blocking.py makes")
    return bool(stale or old)


if __name__ == "__main__":
    sys.exit(main())
