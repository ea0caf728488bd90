"""The examples of the TypeScript client's documents: each `ts` block is a program, checked by the compiler, which
prints the `text` block below it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.conftest import Server
from tests.documents import DEFAULT_URL, matches
from tests.sdk.typescript import ROOT, SOURCE, App, app, tsc

__all__ = ["app"]  # a fixture

DOCUMENTS = [
    SOURCE / "README.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if "```ts\n" in path.read_text()),
]


def programs(document: Path) -> list[tuple[str, str]]:
    """The document's programs, each with what it must print."""
    fences = [token for token in MarkdownIt().parse(document.read_text()) if token.type == "fence"]
    following = zip(fences, [*fences[1:], None], strict=True)
    return [(token.content, after.content) for token, after in following if token.info == "ts" and after is not None]


@pytest.fixture(scope="module")
def compiled(app: App, shared_server: Server) -> Path:
    """The folder with the programs of each document, which the compiler has nothing to say about."""
    root = app.directory / "documents"
    for document in DOCUMENTS:
        folder = root / document.stem
        folder.mkdir(parents=True)
        for number, (program, _) in enumerate(programs(document)):
            (folder / f"example{number}.ts").write_text(program.replace(DEFAULT_URL, shared_server.url))
    settings = {
        "extends": str(SOURCE / "tests" / "tsconfig.json"),
        "compilerOptions": {
            "rootDir": "/",
            "typeRoots": [str(SOURCE / "node_modules" / "@types")],
            "paths": {},
            "noPropertyAccessFromIndexSignature": False,  # process.env.NAME
        },
        "include": [str(root / "*" / "*.ts")],
    }
    (root / "tsconfig.json").write_text(json.dumps(settings))
    tsc(root)
    return root


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_examples_compile_and_print_what_stands_below_them(
    app: App, server: Server, compiled: Path, document: Path
) -> None:
    examples = programs(document)
    folder = compiled / document.stem
    mark = "console.log('@@');"
    (folder / "all.mjs").write_text("".join(f"await import('./example{n}.ts'); {mark}\n" for n in range(len(examples))))
    done = app.run("node", folder / "all.mjs", ERA_URL=server.url)
    assert done.returncode == 0, done.stderr
    printed = re.split(r"^@@\n", done.stdout, flags=re.MULTILINE)[:-1]
    for (program, expected), output in zip(examples, printed, strict=True):
        assert matches(expected.strip(), output.strip()), f"{program}\nprints\n{output}"


def test_every_example_is_a_program_with_its_output() -> None:
    for document in DOCUMENTS:
        blocks = [token for token in MarkdownIt().parse(document.read_text()) if token.type == "fence"]
        examples = [token for token in blocks if token.info == "ts"]
        assert len(programs(document)) == len(examples) > 0
        assert all(re.search(r'^import .* from "era-sessions";$', token.content, re.MULTILINE) for token in examples)
