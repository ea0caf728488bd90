"""A newcomer's first result by each way to a server, from the documents alone. tests/newcomer.py measures them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Server
from tests.documents import FRAMEWORKS
from tests.newcomer import WAYS, Way, example, first_result
from tests.sdk.typescript import TOOLS

# tests/test_docs.py and tests/sdk/test_typescript_docs.py run the examples of these, too, and they take long to install
# or to import.
LONG = {"TypeScript SDK", "Model Context Protocol", "framework of agents"}


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, id=way.name, marks=[pytest.mark.soak] if way.name in LONG else []) for way in WAYS],
)
def test_a_first_result(way: Way, server: Server, tmp_path: Path) -> None:
    if way.language == "ts" and not (TOOLS / "typescript").exists():
        pytest.skip("needs the TypeScript client's tools, which scripts/setup --dev installs where it can")
    if way.page == "adapters.md" and not FRAMEWORKS.exists():
        pytest.skip("needs frameworks of agents, which scripts/setup --test installs where it can")
    seconds = first_result(way, server.url, tmp_path)
    print(f"{way.name}: {seconds:.1f} s")


def test_each_way_has_its_example() -> None:
    assert all(program and expected for program, _, expected in map(example, WAYS))
    with pytest.raises(LookupError, match="has no ts"):
        example(Way("none", "cli.md", "The command", "ts"))
