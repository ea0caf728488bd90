"""The documentation's examples are run, and its links and the files that it names exist.

The convention: a block tagged `bash` is run, all of a document's blocks in order in one shell that stops at the first
failure, in an empty directory, with http://127.0.0.1:8787 replaced by the test's server. A `json` or `text` block right
after it is what it must print: JSON that is a part of its last JSON value, or its whole text. `…` stands for anything.
A `python` block that imports from era or mcp is a program of a client, and is run in the same way. Blocks that aren't
run (starting a server, installing) are tagged `console`, or by their language.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.conftest import Server
from tests.documents import DEFAULT_URL, FRAMEWORKS, ROOT, is_part, last_json, matches, prints
from tests.soaking import soak_the_rest

SOURCE = ROOT / "src" / "era"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
INDEX = ROOT / "docs" / "decisions" / "index.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").glob("*.md")])
NOT_RUN = {
    "",
    "console",
    "ini",
    "json",
    "python",
    "text",
    "ts",
    "yaml",
}  # ts: tests/sdk/test_typescript_docs.py runs them
CALLS = re.compile(r"^ *(curl|(\.venv/bin/)?era|python3 - <<'PROGRAM') ?", re.MULTILINE)
WEBSOCKETS = {"GET /api/sessions/{id}/terminal", "GET /api/sessions/{id}/processes/{process}/attach"}
SDK = re.compile(r"^from (era|mcp)[. ]", re.MULTILINE)
DELETES_ALL = re.compile(r"delete\b[^\n]*/api/sessions(?![/\w])", re.IGNORECASE)
CODE = re.compile(r"`([^`\n]+)`")
PLACED = re.compile(r"`(?:\w+\.)?(\w+)` in `([\w/]+\.py)`")
PATH = re.compile(r"(?:\w[\w.-]*/)+[a-z0-9_.-]+\.(?:py|js|cjs|sh|md)")


@dataclass
class Example:
    """A block that is run."""

    line: int
    commands: str
    kind: str | None = None
    """`json` or `text` if its output is in the block below it."""

    expected: str = ""


@cache
def tokens(document: Path) -> list[Token]:
    """The document as Markdown has it."""
    return MarkdownIt().enable("table").parse(document.read_text())


@cache
def examples(document: Path) -> list[Example]:
    """The document's blocks that are run, in order."""
    blocks: list[Example] = []
    before = None
    for token in tokens(document):
        if token.type == "fence" and token.info == "bash" and token.map:
            blocks.append(Example(token.map[0] + 1, token.content))
        elif _is_program(token) and token.map:
            blocks.append(Example(token.map[0] + 1, f"python3 - <<'PROGRAM'\n{token.content}PROGRAM"))
        elif token.type == "fence" and token.info in ("json", "text") and before == "run":
            blocks[-1].kind, blocks[-1].expected = token.info, token.content
        before = "run" if token.type == "fence" and (token.info == "bash" or _is_program(token)) else None
    return blocks


def _is_program(token: Token) -> bool:
    """Whether a token is a block with a program of a client in Python."""
    return token.type == "fence" and token.info == "python" and SDK.search(token.content) is not None


ADAPTERS = ROOT / "docs" / "adapters.md"
DOCUMENTS_WITH_EXAMPLES = [path for path in DOCUMENTS if examples(path)]


@pytest.mark.parametrize(
    "document",
    soak_the_rest(DOCUMENTS_WITH_EXAMPLES, [path for path in DOCUMENTS_WITH_EXAMPLES if path != ADAPTERS]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_examples_print_what_stands_below_them(document: Path, server: Server, tmp_path: Path) -> None:
    run_examples(document, examples(document), server, tmp_path)


def test_the_example_of_a_framework_prints_what_stands_below_it(server: Server, tmp_path: Path) -> None:
    """Of one that takes little to import."""
    quickest = [example for example in examples(ADAPTERS) if "from pydantic_ai import" in example.commands]
    run_examples(ADAPTERS, quickest, server, tmp_path)


def run_examples(document: Path, blocks: list[Example], server: Server, tmp_path: Path) -> None:
    """Run these, of one document, and compare what each prints."""
    assert blocks
    script = "set -euo pipefail\n"
    for number, example in enumerate(blocks):  # a mark after each separates its output from the next
        script += f"{example.commands.replace(DEFAULT_URL, server.url)}\nprintf '\\n@@ {number} @@\\n'\n"
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
    environment |= {"ERA_SERVER": server.url, "NO_PROXY": "*"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or each program would compile its imports again
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    if document == ADAPTERS:
        if not FRAMEWORKS.exists():
            pytest.skip("needs frameworks of agents, which scripts/setup --test installs where it can")
        environment["PYTHONPATH"] = str(FRAMEWORKS)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    outputs = re.split(r"\n@@ \d+ @@\n", done.stdout)
    stopped_at = blocks[min(len(outputs), len(blocks)) - 1].line
    assert done.returncode == 0, f"{document.name}:{stopped_at} fails:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert len(outputs) == len(blocks) + 1
    for example, output in zip(blocks, outputs, strict=False):
        where = f"{document.relative_to(ROOT)}:{example.line} prints\n{output}"
        assert example.kind is None or prints(example.kind, example.expected, output), where


def test_most_examples_call_the_server_and_are_compared() -> None:
    by_name = {str(path.relative_to(ROOT)): examples(path) for path in DOCUMENTS}
    for name, least in {"README.md": 4, "docs/api.md": 13, "docs/concepts.md": 7, "docs/languages.md": 4}.items():
        assert len(by_name[name]) >= least, name
    every = [example for blocks in by_name.values() for example in blocks]
    assert [example.commands for example in every if not CALLS.search(example.commands)] == []
    assert sum(example.kind is not None for example in every) >= 0.8 * len(every)
    for path in DOCUMENTS:
        for token in tokens(path):
            if token.type == "fence":
                assert token.info in NOT_RUN | {"bash"}, f"{path.name} has a block of {token.info}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_example_deletes_every_session(document: Path) -> None:
    """A reader may run an example on a server with sessions that are needed."""
    blocks = [token.content for token in tokens(document) if token.type == "fence"]
    assert [block for block in blocks if DELETES_ALL.search(block)] == []


def test_deletions_of_all_are_recognised() -> None:
    assert DELETES_ALL.search("curl -X DELETE http://127.0.0.1:8787/api/sessions")
    assert DELETES_ALL.search('curl -X DELETE "$ERA_SERVER/api/sessions?language=go"')
    assert DELETES_ALL.search('httpx.delete("http://127.0.0.1:8787/api/sessions")')
    assert not DELETES_ALL.search("curl -X DELETE http://127.0.0.1:8787/api/sessions/demo")
    assert not DELETES_ALL.search('curl -X DELETE "http://127.0.0.1:8787/api/sessions/demo?purge=true"')


def test_placeholders_and_parts() -> None:
    assert is_part({"a": "x…", "b": [{"c": 1}]}, {"a": "xyz", "b": [{"c": 1, "d": 2}], "e": None})
    assert not is_part({"a": 1}, {"a": True})
    assert not is_part({"a": []}, {"a": [1]})
    assert not is_part({"a": "x"}, {"a": "xy"})
    assert last_json('{"a": 1}{"a": 2}\n') == {"a": 2}
    assert matches("one\n…\nfour", "one\ntwo\nthree\nfour")


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def anchors(document: Path) -> set[str]:
    parsed = tokens(document)
    return {slug(parsed[at + 1].content) for at, token in enumerate(parsed) if token.type == "heading_open"}


@cache
def links(document: Path) -> list[str]:
    """Targets of the document's links."""
    targets = []
    for token in tokens(document):
        targets += [str(child.attrs["href"]) for child in token.children or [] if child.type == "link_open"]
    return targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        path, _, anchor = link.partition("#")
        if path.startswith(DEFAULT_URL):
            continue
        assert "://" not in path, f"{link} leads out of the documents"
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def test_readme_leads_to_every_document() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md") if "://" not in link}
    assert sorted(set(DOCUMENTS) - linked - {ROOT / "README.md"} - set(DECISIONS)) == []


def test_index_leads_to_every_decision() -> None:
    linked = [INDEX.parent / link for link in links(INDEX) if link[0].isdigit()]
    assert linked == DECISIONS


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda path: path.name)
def test_decision_has_a_number_a_status_and_three_parts(decision: Path) -> None:
    lines = decision.read_text().splitlines()
    assert lines[0].startswith(f"# {decision.name[:4]} ")
    assert re.fullmatch(r"Status: (accepted|superseded( by \[\d{4}\]\(.*\))?)", lines[2])
    assert [line for line in lines if line.startswith("## ")] == ["## Context", "## Decision", "## Consequences"]
    assert len(lines) <= 40


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(document: Path) -> None:
    """In `code`, relative to the project or to src/era. Superseded decisions may name what is gone."""
    if "\nStatus: superseded" in document.read_text():
        return
    named = [code for code in CODE.findall(document.read_text()) if PATH.fullmatch(code)]
    assert [path for path in named if not (ROOT / path).exists() and not (SOURCE / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_that_documents_place_in_files_are_there(document: Path) -> None:
    """`name` or `Class.name` in a `file.py`, written like this. Superseded decisions may name what is gone."""
    text = document.read_text()
    missing = []
    for name, file in [] if "\nStatus: superseded" in text else PLACED.findall(text):
        path = next((top / file for top in (ROOT, SOURCE) if (top / file).exists()), None)
        if path and not re.search(rf"^ *(async def |def |class |type )?{name}\b", path.read_text(), re.MULTILINE):
            missing.append(f"{name} in {file}")
    assert missing == []


def test_every_call_is_documented(shared_server: Server) -> None:
    with shared_server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    calls = {
        f"{method.upper()} {path.replace('{session_id}', '{id}')}"
        for path, operations in paths.items()
        for method in operations
    }
    text = (ROOT / "docs" / "api.md").read_text()
    described = set(re.findall(r"^### `([A-Z]+ /\S*)`$", text, re.MULTILINE))
    assert described == calls | {"POST /mcp", *WEBSOCKETS}  # which the description of an API has no words for
