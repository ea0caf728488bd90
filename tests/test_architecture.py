"""The rules that keep the code as ARCHITECTURE.md draws it, and the documents true to the code."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from pydantic import AliasChoices

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
MAX_LINES = 600

ADAPTERS = {"store", "drivers", "network", "packages"}
PLUGINS = {"era.guest.lib.era_matplotlib": "matplotlib"}
"""Modules of the guest that only this package of the user's imports."""

FRAMEWORKS = {"alembic", "fastapi", "httpx", "pydantic", "pydantic_settings", "sqlalchemy", "starlette", "uvicorn"}

# What of era each part may import; a part that isn't named may import all but the adapters and the app.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "languages": set(),
    "core": {"errors", "languages"},
    **{adapter: {"core", "errors", "languages"} for adapter in ADAPTERS},
    "guest": set(),
    "wire": {"core", "errors", "languages"},
    "api": {"core", "errors", "languages", "wire", "settings"},
}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name."""

    name: str
    line: int
    relative: bool
    at_once: bool
    """It is loaded as soon as the importing file is, not only when a function is called."""


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """What `module` imports, relative imports resolved, `from era import x` taken as `era.x`."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, False, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *base.split(".")]).rstrip(".")
            names = [f"era.{alias.name}" for alias in node.names] if base == "era" else [base]
            yield from (Import(name, node.lineno, node.level > 0, at_once) for name in names)
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_once and not later)

    return visit(ast.parse(source), at_once=True)


def broken_rules(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The import rules that a module breaks, one sentence each."""
    part = module.split(".")[1] if "." in module else ""
    guests = {path.stem for path in (SRC / "era" / "guest").rglob("*.py")}
    found = []
    for item in imports(source, module, is_package=is_package):
        top, _, rest = item.name.partition(".")
        target = rest.partition(".")[0]
        wrong = ""
        if part == "guest":
            if top == "era" and not (item.relative and target == "guest"):
                wrong = "the guest can't import era: inside a sandbox there is none"
            elif top not in {"era", PLUGINS.get(module)} | sys.stdlib_module_names | guests:
                wrong = "the guest has the standard library only"
        elif top in FRAMEWORKS and part in {"core", "errors"}:
            wrong = "the core knows no frameworks"
        elif top == "era" and target not in {"", "__version__", part}:
            if target in MAY_IMPORT.get(part, {target}):
                if target in ADAPTERS and part != "app":
                    wrong = "only era.app knows adapters"
                elif target == "app" and part not in {"client", ""}:
                    wrong = "only era.client.cli starts era.app"
                elif target == "app" and item.at_once:
                    wrong = "era.app is imported inside the command that needs it, so that the others start fast"
            else:
                wrong = f"era.{part} may import of era only {sorted(MAY_IMPORT[part] | {part})}"
        if wrong:
            found.append(f"{module}:{item.line} imports {item.name}: {wrong}")
    return found


def test_imports_point_inward() -> None:
    found = []
    for path in sorted(SRC.rglob("*.py")):
        is_package = path.name == "__init__.py"
        name = path.parent if is_package else path.with_suffix("")
        module = ".".join(name.relative_to(SRC).parts)
        found += broken_rules(path.read_text(), module, is_package=is_package)
    assert found == []


def test_no_module_imports_itself_in_a_circle() -> None:
    """Imports for type checkers count, too: a circle of them is a circle in the head of who reads."""
    sources = {path: ".".join(path.relative_to(SRC).with_suffix("").parts) for path in SRC.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in sources.values()}
    imported: dict[str, set[str]] = {}
    for path, name in sources.items():
        module = name.removesuffix(".__init__")
        found = {item.name for item in imports(path.read_text(), module, is_package=module != name)}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        imported[module] = (found & modules) - {module}
    while leaves := {module for module, others in imported.items() if not others & imported.keys()}:
        for module in leaves:
            del imported[module]
    assert sorted(imported) == [], "each of these is in a circle, or leads to one"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("era.core.runs", "import era.store.sqlite"),
        ("era.core.runs", "from era import wire"),
        ("era.core.runs", "def f():\n    from sqlalchemy import text"),
        ("era.store.blobs", "from era.drivers import fake"),
        ("era.core.pool", "from ..drivers.fake import Fake"),
        ("era.drivers.fake", "import era.api.http"),
        ("era.guest.supervisor", "from era.errors import EraError"),
        ("era.guest.supervisor", "import httpx"),
        ("era.api.http", "from era.store.blobs import LocalBlobs"),
        ("era.mcp", "import era.store"),
        ("era.mcp", "def f():\n    import era.app"),
        ("era.client.cli", "from era import app"),
    ],
)
def test_import_rules_bite(module: str, source: str) -> None:
    assert len(broken_rules(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("era.core.runs", "from era.core.models import Session\nfrom era import errors"),
        ("era.store.sqlite", "import sqlalchemy\nfrom era.core.ports import MetadataStore"),
        ("era.guest.supervisor", "import os, json\nfrom . import runner"),
        ("era.api.http", "import fastapi\nfrom era.wire.runs import RunBody\nfrom era.settings import Settings"),
        ("era.app", "import era.store, era.drivers, era.network, era.api"),
        ("era.client.cli", "import cyclopts\ndef serve():\n    from era.app import serve"),
    ],
)
def test_import_rules_let_pass(module: str, source: str) -> None:
    assert broken_rules(source, module) == []


def test_no_source_file_is_too_long() -> None:
    files = [path for path in SRC.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    lengths = {str(path.relative_to(ROOT)): path.read_bytes().count(b"\n") for path in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@cache
def committed_files() -> list[Path]:
    """What is committed or about to be."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_project_stands_alone() -> None:
    """No file speaks of where it was written; none written by hand says which registry to use."""
    workplace = ["../" + "shared", "." + "library", "/work/" + "main"]
    registries = ["pypi" + ".org", "python" + "hosted", "registry." + "npmjs", "deb." + "debian"]
    found = []
    for path in committed_files():
        text = path.read_text(errors="replace")
        words = workplace if path.name == "uv.lock" else workplace + registries
        found += [f"{path.relative_to(ROOT)}: {word}" for word in words if word in text]
    assert found == []


def test_readme_names_only_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = re.findall(r"```.*?```|`[^`\n]+`", (ROOT / "README.md").read_text(), re.DOTALL)
    named = {target for piece in code for target in re.findall(r"\bmake ([a-z][a-z-]*)", piece)}
    assert named <= targets


def test_every_setting_is_described_and_documented() -> None:
    if not (SRC / "era" / "settings.py").exists():
        pytest.skip("era.settings is not written yet")
    settings = importlib.import_module("era.settings").Settings
    document = ROOT / "docs" / "settings.md"
    documented = set(re.findall(r"\bERA_[A-Z0-9_]+", document.read_text())) if document.exists() else set()
    fields = settings.model_fields
    assert [name for name, field in fields.items() if not field.description] == []
    names = {f"ERA_{name.upper()}" for name in fields}
    for field in fields.values():  # settings that had another name once
        if isinstance(field.validation_alias, AliasChoices):
            names |= {str(name) for name in field.validation_alias.choices if str(name).startswith("ERA_")}
    assert sorted(names - documented) == [], "missing in docs/settings.md"
    assert sorted(documented - names) == [], "docs/settings.md names settings that don't exist"
