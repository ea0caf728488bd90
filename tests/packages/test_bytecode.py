"""Bytecode of package sets: what it may take to compile them, and that they do without."""

from __future__ import annotations

import asyncio
import os
import tarfile
from pathlib import Path
from unittest.mock import patch

import pytest

from era.core.setup.package_sets import PackageSet, SetupFailed
from era.core.setup.requirements import Packages
from era.packages import bytecode, installer, trees
from tests.packages.lab import Lab, assert_sound
from tests.packages.registry import Registry, wheel

GREEDY = f"x = [{f'{"[" * 90}{"]" * 90},' * 3000}]\n"
"""A source of half a megabyte, for whose compiling Python takes several hundred."""


def put(registry: Registry) -> None:
    """Serve a package with a greedy module among modest ones."""
    files = {"a/__init__.py": "x = 1", "a/greedy.py": GREEDY, "z.py": "x = 1"}
    registry.put_python("a", "a-1.0-py3-none-any.whl", wheel("a", files))


def compiled(lab: Lab, made: PackageSet) -> set[str]:
    """The modules that have bytecode."""
    return {Path(path).name.partition(".")[0] for path in lab.files(made) if path.endswith(".pyc")}


@pytest.mark.parametrize("many", [0, 16 << 20], ids=["before", "afterwards"])
def test_sources_that_take_much_memory_are_left(
    lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    put(registry)
    monkeypatch.setattr(installer, "_MANY_BYTES", many)
    with monkeypatch.context() as context:
        context.setattr(bytecode, "_MOST_MEMORY", 200 << 20)
        made = lab.make(pip=["a"])
    assert_sound(lab, made)
    assert compiled(lab, made) == {"__init__", "z"}, "one file costs the others nothing"
    assert "uncompiled" not in lab.files(made), "no start tries that again"
    lab.installer.open()
    assert lab.installer.is_here(made.digest)


def test_greedy_sources_would_be_compiled_without_the_bound(
    lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(registry)
    monkeypatch.setattr(bytecode, "_MOST_MEMORY", None)
    assert compiled(lab, lab.make(pip=["a"])) == {"__init__", "greedy", "z"}


@pytest.mark.parametrize("problem", [SetupFailed("too large"), OSError("the disk is full")])
def test_a_set_that_can_t_be_compiled_is_tried_again_only_where_that_may_help(
    lab: Lab, registry: Registry, problem: Exception
) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    with patch.object(lab.installer, "_compile", side_effect=problem):
        made = lab.make(pip=["one"])
    assert compiled(lab, made) == set()
    assert_sound(lab, made)
    lab.installer.open()  # which has it made again where it is to be compiled
    assert lab.installer.is_here(made.digest) == isinstance(problem, SetupFailed)


def archived(lab: Lab, made: PackageSet) -> list[str]:
    """The names in the archive of a package set."""
    with os.fdopen(lab.blobs.open_blob(made.digest), "rb") as file, tarfile.open(fileobj=file) as archive:
        return archive.getnames()


def test_a_package_s_own_bytecode_is_left_out(lab: Lab, registry: Registry) -> None:
    files = {"one.py": "x = 1", "__pycache__/one.pyc": "", "a/__pycache__/b/c.pyc": "", "a/__init__.py": ""}
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", files))
    made = lab.make(pip=["one"])
    assert not [name for name in archived(lab, made) if "__pycache__" in name]
    assert compiled(lab, made) == {"one", "__init__"}


@pytest.mark.parametrize("by", ["variable", "file"])
def test_uv_makes_no_bytecode_though_it_is_told_to(
    lab: Lab, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """It would be of strangers' sources without bounds, and with times, so that equal packages were different sets."""
    (tmp_path / "uv.toml").write_text("[pip]\ncompile-bytecode = true\n")
    more = {"UV_COMPILE_BYTECODE": "1"} if by == "variable" else {"UV_CONFIG_FILE": str(tmp_path / "uv.toml")}
    monkeypatch.setattr(trees, "drop_bytecode", lambda _: None)
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    with patch.object(lab.installer, "_variables", {**lab.installer._variables, **more}):
        made = lab.make(pip=["one"])
    assert not [name for name in archived(lab, made) if "__pycache__" in name]


def test_one_set_is_compiled_at_a_time(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most, run = 0, 0, lab.installer._processes.run

    async def counted(command: list[str], *given: object, **named: object) -> object:
        nonlocal under_way, most
        is_compiler = "compileall" in command
        under_way += is_compiler
        most = max(most, under_way)
        try:
            return await run(command, *given, **named)  # type: ignore[arg-type]  # whatever it is given
        finally:
            under_way -= is_compiler

    monkeypatch.setattr(lab.installer._processes, "run", counted)
    for name in "abc":
        registry.put_python(name, f"{name}-1.0-py3-none-any.whl", wheel(name, {f"{name}.py": "x = 1"}))
    made = [lab.make(pip=[name]) for name in "abc"]
    for each in made:
        lab.installer._drop(lab.directory / "environments" / each.digest)
    most = 0

    async def restored() -> None:
        await asyncio.gather(*(lab.installer.ensure(each.digest) for each in made))

    lab.run(restored())
    assert most == 1
    assert all(compiled(lab, each) for each in made)


def test_who_waits_too_long_for_the_compiler_is_served_before_it(
    lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    monkeypatch.setattr(installer, "_MANY_BYTES", 0)
    monkeypatch.setattr(installer, "_PATIENCE_SECONDS", 0.05)

    async def made_beside() -> PackageSet:
        async with lab.installer._compiler.turn():
            made = await lab.installer.make(Packages(pip=("one",)), lab.build, anew=False)
            assert compiled(lab, made) == set()
            assert_sound(lab, made)
        await asyncio.gather(*lab.installer._compiling)
        return made

    assert compiled(lab, lab.run(made_beside())) == {"one"}
