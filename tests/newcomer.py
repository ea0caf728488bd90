"""newcomer.py [URL]: how long it takes to a first result at a running server, by each way that there is to it.

What is done for each is the first example below a heading of the documents, as it stands there, from its start to what
the page says that it prints. The server is one without sessions. Packages are there already, as scripts/setup --test
installs them; for TypeScript, building and installing the client's package is part of the time. Exit code 1: a way
needed more than two minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from markdown_it import MarkdownIt

from tests.documents import DEFAULT_URL, FRAMEWORKS, ROOT, prints
from tests.sdk.typescript import build

MOST_SECONDS = 120


@dataclass(frozen=True)
class Way:
    """One way to use a server, and where a newcomer finds it."""

    name: str
    page: str
    heading: str
    language: str
    """What its example's block is tagged with."""


WAYS = [
    Way("curl", "tutorial.md", "A first program", "bash"),
    Way("Python SDK", "tutorial.md", "A first program", "python"),
    Way("TypeScript SDK", "tutorial.md", "A first program", "ts"),
    Way("command", "cli.md", "The command", "bash"),
    Way("Model Context Protocol", "mcp.md", "Connecting", "python"),
    Way("framework of agents", "adapters.md", "Pydantic AI", "python"),
]


def example(way: Way) -> tuple[str, str, str]:
    """A way's program, and the kind and text of the block below it. Raises LookupError."""
    under = program = None
    tokens = MarkdownIt().parse((ROOT / "docs" / way.page).read_text())
    for before, token in zip([None, *tokens], tokens, strict=False):
        if before is not None and before.type == "heading_open":
            under = token.content
        elif token.type == "fence" and under == way.heading:
            if program is not None:
                return program, token.info, token.content
            if token.info == way.language:
                program = token.content
    raise LookupError(f"{way.page} has no {way.language} with what it prints below '{way.heading}'.")


def first_result(way: Way, url: str, directory: Path) -> float:
    """Do in an empty directory what the documents say. Returns how many seconds it took to be there; raises
    AssertionError if it prints something else."""
    program, kind, expected = example(way)
    program = program.replace(DEFAULT_URL, url)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
    environment |= {"ERA_SERVER": url, "NO_PROXY": "*", "NO_COLOR": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    if way.page == "adapters.md":
        environment["PYTHONPATH"] = str(FRAMEWORKS)
    start = monotonic()
    command = {"bash": ["bash", "-euc", program], "python": [sys.executable, "-c", program]}.get(way.language)
    if command is None:
        app = build(directory)
        directory = app.directory
        (directory / "first.ts").write_text(program)
        command = app.command("node", directory / "first.ts")
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)
    seconds = monotonic() - start
    assert done.returncode == 0, done.stderr
    assert prints(kind, expected, done.stdout), f"{way.name}:\n{program}\nprints\n{done.stdout}"
    return seconds


def main() -> int:
    url = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_URL
    slow = 0
    for way in WAYS:
        with TemporaryDirectory() as directory:
            seconds = first_result(way, url, Path(directory))
        slow += seconds > MOST_SECONDS
        print(f"{seconds:7.1f} s  {way.name}: docs/{way.page}, {way.heading}", flush=True)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
