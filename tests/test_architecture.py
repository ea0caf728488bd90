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

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
MAX_LINES = 600

VALUES = {"core", "core/concurrency", "errors"}
"""Modules that every folder of the core may import."""

CORE_MAY_IMPORT = {
    "core": set(),
    "core/concurrency": set(),
    "core/owners": set(),
    "core/trees": set(),
    "core/execution": {"core/trees"},
    "core/pool": {"core/trees", "languages"},
    "core/sessions": {"core/owners", "core/pool", "core/trees"},
    "core/setup": {"core/execution", "core/pool", "core/sessions", "core/trees"},
    "core/storage": {"core/execution", "core/owners", "core/trees"},
    "core/live": {
        "core/execution",
        "core/owners",
        "core/pool",
        "core/sessions",
        "core/setup",
        "core/trees",
        "languages",
    },
    "core/runs": {"core/execution", "core/live", "core/owners", "core/pool", "core/sessions", "core/trees"},
    "core/files": {"core/live", "core/owners", "core/sessions", "core/trees"},
    "core/public": {"core/execution", "core/live", "core/owners", "core/pool", "core/runs"},
    "core/capsules": {
        "core/execution",
        "core/runs",
        "core/sessions",
        "core/setup",
        "core/trees",
        "languages",
    },
    "core/cluster": {"core/live", "core/pool", "core/setup"},
    "core/operation": {"core/setup", "core/trees"},
}
"""The folders of the core, each after those that it may import besides VALUES."""

CORE = CORE_MAY_IMPORT.keys()
STORE = {"store", "store/blobs", "store/d1", "store/engine"}
ADAPTERS = STORE | {"drivers", "network", "packages"}
API = {"api", "api/hosts", "api/protocol", "api/routes", "api/routing"}
PLUGINS = {
    "era.guest.lib.era_matplotlib": {"matplotlib"},
    "era.guest.ipython_shell": {"IPython", "traitlets"},
}
"""Modules of the guest that are loaded only where there are such packages: of the session's, or of contexts."""

FRAMEWORKS = {"alembic", "fastapi", "httpx", "pydantic", "pydantic_settings", "sqlalchemy", "starlette", "uvicorn"}

MODELS = {("core/capsules", "pydantic")}
"""Where the core reads documents that others wrote."""

MAY_IMPORT: dict[str, set[str]] = {
    **{folder: VALUES | others for folder, others in CORE_MAY_IMPORT.items()},
    "core": {"errors"},
    "wire": CORE | {"common", "errors", "languages"},
    "drivers": VALUES | {"languages"},
    "guest": set(),
    "guest/lib": set(),
    "languages": set(),
    "packages": VALUES | {"core/setup", "core/trees", "languages"},
    "network": VALUES | {"core/owners"},
    "telemetry": VALUES
    | {"core/cluster", "core/live", "core/operation", "core/owners", "core/pool", "core/public", "core/sessions"},
    "store/engine": VALUES | {"store/migrations"},
    "store/blobs": VALUES | {"core/trees", "store/engine"},
    "store/d1": VALUES | {"core/trees", "store/blobs", "store/engine"},
    "store": CORE | STORE | {"errors", "store/migrations"},
    "store/migrations": {"errors", "store/engine"},
    "store/migrations/versions": {"store/engine"},
    "operation": {"core", "core/trees", "errors", "store", "store/blobs", "store/engine", "store/migrations"},
    "api/protocol": VALUES | {"settings"},
    "api/hosts": VALUES | {"api/protocol", "cluster", "core/cluster", "core/owners", "core/public", "settings", "wire"},
    "api/routing": CORE | {"api/hosts", "api/protocol", "cluster", "common", "errors", "languages", "settings", "wire"},
    "api/routes": CORE | {"api/protocol", "api/routing", "common", "errors", "languages", "mcp", "wire"},
    "api": CORE | API | {"common", "errors", "settings", "wire"},
    "mcp": {"common"},
    "web": set(),
    "sdk": {"common", "errors", "sdk/generated"},
    "sdk/generated": {"sdk"},
    "sdk/aio": {"common", "errors", "sdk"},
    "sdk/sync": {"common", "errors", "sdk"},
    "adapters": {"common", "errors", "sdk", "sdk/aio", "sdk/sync"},
    "cluster": {"errors", "network", "settings", "store"},
    "client": {
        "app",
        "cluster",
        "common",
        "errors",
        "mcp",
        "operation",
        "sdk",
        "sdk/sync",
        "server",
        "settings",
    },
    "common": set(),
    "server": VALUES
    | {
        "api",
        "api/hosts",
        "api/protocol",
        "api/routing",
        "cluster",
        "common",
        "core/owners",
        "languages",
        "settings",
        "store/blobs",
    },
    # files beside the folders
    "__init__": {"errors", "sdk", "sdk/aio", "sdk/sync"},
    "app": CORE | ADAPTERS | API | {"choices", "errors", "languages", "parts", "server", "settings", "telemetry"},
    "choices": CORE | ADAPTERS | {"languages", "server", "settings"},
    "parts": CORE | ADAPTERS | API | {"choices", "languages", "server", "settings", "telemetry"},
    "errors": set(),
    "settings": set(),
}
"""What each folder of src/era, and each file beside them, may import of era besides itself. It is also the list of
places where code may be; ARCHITECTURE.md's map says what each folder is for."""

ONLY_WHEN_CALLED = {
    "api/routes": {"mcp"},
    "client": {"app", "cluster", "mcp", "operation", "server", "settings"},
}
"""Imports allowed only inside functions, or for type checkers, so that commands that don't serve start fast and need no
server library."""


def purposes() -> dict[str, str]:
    """Each folder's purpose, from the map in ARCHITECTURE.md: a line each, indented below the folder that it is in."""
    block = re.search(r"```\nsrc/era/\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    found: dict[str, str] = {}
    parents: list[str] = []
    for indent, name, purpose in re.findall(r"^((?:  )+)([\w-]+)/ +(\S.*)$", block[1] if block else "", re.MULTILINE):
        parents = [*parents[: len(indent) // 2 - 1], name]
        found["/".join(parents)] = purpose
    return found


def place_of(module: str, *, is_package: bool = False) -> str:
    """The folder that a module is in, or its own name if it is beside the folders."""
    *folders, name = module.split(".")[1:] or ["__init__"]
    if is_package and module != "era":
        folders.append(name)
    return "/".join(folders) or name


def target_of(name: str) -> str:
    """The folder or file of era that an imported name is in: the longest that a rule names."""
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        if "/".join(parts[:length]) in MAY_IMPORT:
            return "/".join(parts[:length])
    return parts[0] if parts else "__init__"


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name."""

    name: str
    line: int
    relative: bool
    at_once: bool
    """It is loaded as soon as the importing file is, not only when a function is called, or for type checkers."""


def is_folder(module: str) -> bool:
    return module.startswith("era.") and "/".join(module.split(".")[1:]) in MAY_IMPORT


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def imports(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    """What `module` imports, relative imports resolved, `from era import x` taken as `era.x`."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, False, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *base.split(".")]).rstrip(".")
            below = [f"{base}.{alias.name}" for alias in node.names]
            names = below if base == "era" else sorted({name if is_folder(name) else base for name in below})
            yield from (Import(name, node.lineno, node.level > 0, at_once) for name in names)
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_once and not later)

    return list(visit(parsed(source), at_once=True))


def broken_rules(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The rules that a module breaks, one sentence each: about its place, and about its imports."""
    place = place_of(module, is_package=is_package)
    if place not in MAY_IMPORT:
        folders = [f"{folder + '/':<16} {purpose}" for folder, purpose in purposes().items()]
        advice = "Put it into the folder that it belongs to:"
        return ["\n  ".join([f"{module} is in a place that no rule names. {advice}", *folders])]
    guests = {path.stem for path in (SRC / "era" / "guest").rglob("*.py")}
    broken = []
    for item in imports(source, module, is_package=is_package):
        top = item.name.partition(".")[0]
        target = target_of(item.name) if top == "era" else ""
        wrong = ""
        if place.partition("/")[0] == "guest":
            if top == "era" and not (item.relative and target.partition("/")[0] == "guest"):
                wrong = "the guest can't import era: inside a sandbox there is none"
            elif top not in {"era"} | PLUGINS.get(module, set()) | sys.stdlib_module_names | guests:
                wrong = "the guest has the standard library only"
        elif top in FRAMEWORKS and place in CORE | {"errors"} and (place, top) not in MODELS:
            wrong = "the core knows no frameworks"
        elif top == "era" and target not in {place, "__init__", "__version__"}:
            if target not in MAY_IMPORT[place]:
                wrong = f"{place} may import of era only {sorted(MAY_IMPORT[place] | {place})}"
            elif item.at_once and target in ONLY_WHEN_CALLED.get(place, ()):
                wrong = f"{place} may import {target} only inside the function that needs it"
        if wrong:
            broken.append(f"{module}:{item.line} imports {item.name}: {wrong}")
    return broken


def test_imports_point_inward() -> None:
    found = []
    for path in sorted(SRC.rglob("*.py")):
        is_package = path.name == "__init__.py"
        name = path.parent if is_package else path.with_suffix("")
        module = ".".join(name.relative_to(SRC).parts)
        found += broken_rules(path.read_text(), module, is_package=is_package)
    assert not found, "\n".join(found)


def test_no_module_imports_itself_in_a_circle() -> None:
    """Imports for type checkers count, too: a circle of them is a circle in the head of who reads."""
    sources = {path: ".".join(path.relative_to(SRC).with_suffix("").parts) for path in SRC.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in sources.values()}
    imported: dict[str, set[str]] = {}
    for path, name in sources.items():
        module = name.removesuffix(".__init__")
        found = {item.name for item in imports(path.read_text(), module, is_package=module != name)}
        for node in ast.walk(parsed(path.read_text())):
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
        ("era.core.runs.runs", "import era.store.sqlite"),
        ("era.core.runs.runs", "from era import wire"),
        ("era.core.runs.runs", "def f():\n    from sqlalchemy import text"),
        ("era.core.sessions.sessions", "from era.core.public.inbox import Inbox"),
        ("era.core.trees.trees", "from era.store.blobs.blobs import LocalBlobs"),
        ("era.core.trees.trees", "from era.core import setup"),
        ("era.core.models", "from era.core.concurrency.tasks import Threads"),
        ("era.core.live.context", "from era.core.runs.runs import Runs"),
        ("era.api.protocol.tunnel", "from era.api.guard import Guard"),
        ("era.store.engine.database", "from era.store.homes import HomeRows"),
        ("era.core.public.relay", "from era.core.trees.pins import Pins"),
        ("era.core.capsules.format", "import sqlalchemy"),
        ("era.core.trees.trees", "import pydantic"),
        ("era.store.blobs.blobs", "from era.drivers import fake"),
        ("era.core.pool.pool", "from ...drivers.fake import Fake"),
        ("era.drivers.fake", "import era.api.http"),
        ("era.guest.supervisor", "from era.errors import EraError"),
        ("era.guest.supervisor", "import httpx"),
        ("era.api.http", "from era.store.blobs.blobs import LocalBlobs"),
        ("era.wire.runs", "from era.api.routing.context import Context"),
        ("era.wire.runs", "from era.settings import Settings"),
        ("era.client.cli", "from era import app"),
        ("era.client.cli", "from era.core.models import Session"),
        ("era.agents", ""),
        ("era.core.users.accounts", ""),
        ("era.mcp.tools", "from era.core.models import Session"),
        ("era.api.routes.mcp", "from era.mcp import tools"),
        ("era.sdk.calls", "from era.client.output import Failure"),
        ("era.sdk.aio.client", "from era.sdk.sync.client import Era"),
    ],
)
def test_rules_bite(module: str, source: str) -> None:
    assert len(broken_rules(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("era.core.runs.runs", "from era.core.models import Session\nfrom era import errors"),
        ("era.core.capsules.exports", "from era.core.trees import pack\nfrom era.core import jsontext"),
        ("era.store.sqlite", "import sqlalchemy\nfrom era.core.ports import MetadataStore"),
        ("era.guest.supervisor", "import os, json\nfrom . import runner"),
        ("era.api.http", "import fastapi\nfrom era.wire.runs import RunBody\nfrom era.settings import Settings"),
        ("era.app", "import era.store, era.drivers, era.network, era.api"),
        ("era.client.cli", "import argparse\ndef serve():\n    from era.app import serve"),
        ("era.client.cli", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from era.app import serve"),
    ],
)
def test_rules_let_pass(module: str, source: str) -> None:
    assert broken_rules(source, module) == []


def test_a_file_in_the_wrong_place_is_told_where_it_belongs() -> None:
    (problem,) = broken_rules("", "era.core.users.accounts")
    for folder, purpose in purposes().items():
        assert f"{folder}/" in problem
        assert purpose in problem


def test_every_folder_has_a_rule_a_purpose_and_a_docstring() -> None:
    files = [path for path in (SRC / "era").rglob("*.*") if path.is_file() and "__pycache__" not in path.parts]
    built = {SRC / "era/web/dashboard", SRC / "era/web/guide"}
    paths = {path.parent for path in files if built.isdisjoint(path.parents)}
    folders = {str(path.relative_to(SRC / "era")) for path in paths} - {"."}
    assert folders <= MAY_IMPORT.keys()
    assert folders - {"store/migrations/versions"} == purposes().keys(), "ARCHITECTURE.md, the map"
    packages = [path / "__init__.py" for path in paths if (path / "__init__.py").exists()]
    assert [path for path in packages if not ast.get_docstring(ast.parse(path.read_text()))] == []


@cache
def committed_files() -> list[Path]:
    """What is committed or about to be."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_is_too_long() -> None:
    """Of the code, tests and benchmarks included."""
    folders = {"src", "tests", "bench", "scripts", "web"}
    code = [path for path in committed_files() if path.relative_to(ROOT).parts[0] in folders]
    code = [path for path in code if path.name != "package-lock.json"]
    lengths = {str(path.relative_to(ROOT)): path.read_bytes().count(b"\n") for path in code}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


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
    assert len(fields) <= 50, "a constant lives beside its use, or is derived"
    assert [name for name, field in fields.items() if not field.description] == []
    names = {f"ERA_{name.upper()}" for name in fields}
    assert sorted(names - documented) == [], "missing in docs/settings.md"
    assert sorted(documented - names) == [], "docs/settings.md names settings that don't exist"


def test_migrations_follow_one_another() -> None:
    """Two changes that were made at the same time may both have brought the next one."""
    directory = SRC / "era" / "store" / "migrations"
    revisions = dict[str, str]()
    for path in sorted((directory / "versions").glob("v*.py")):
        text = path.read_text()
        revision, before = re.findall(r'^(?:down_)?revision = (?:"(\w+)"|None)', text, re.MULTILINE)
        assert path.name.startswith(f"{revision}_")
        assert revision not in revisions, f"{path.name} has the number of another migration: take the next one"
        assert before == max(revisions, default=""), f"{path.name} doesn't follow the one before"
        revisions[revision] = path.name
    assert f'HEAD = "{max(revisions)}"' in (directory / "__init__.py").read_text()
