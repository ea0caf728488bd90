"""Packages made to do harm, from a registry on loopback: they harm nothing, and none of their code runs on the host."""

from __future__ import annotations

import re
import stat
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from era.core.setup.package_sets import SetupFailed
from era.packages import installer, tools
from tests.packages.lab import CANARY, Lab, assert_sound, run_in_a_sandbox
from tests.packages.registry import Registry, put_evil_npm, tarball, wheel
from tests.soaking import soak_the_rest


@pytest.fixture(autouse=True)
def no_canary() -> Iterator[None]:
    CANARY.unlink(missing_ok=True)
    yield
    CANARY.unlink(missing_ok=True)


AT_START = f"import os; open({str(CANARY)!r}, 'w').close()"
HOOKS = {"evil.pth": AT_START, "sitecustomize.py": AT_START, "usercustomize.py": AT_START, "evil.py": "x = 1"}


def test_nothing_of_a_package_runs_at_a_start(lab: Lab, registry: Registry) -> None:
    registry.put_python("evil", "evil-1.0-py3-none-any.whl", wheel("evil", HOOKS))
    made = lab.make(pip=["evil"])
    assert lab.site(made) & HOOKS.keys() == {"evil.py"}
    assert "evil.pth" in made.stdout
    assert_sound(lab, made)
    result = run_in_a_sandbox(lab, made, ASK_A_CHILD)
    assert result == "1\n"


ASK_A_CHILD = """
import subprocess, sys, os, evil
print(evil.x)
subprocess.run(['python3', '-c', 'pass'])
if os.path.exists(%r): print('it ran')
""" % str(CANARY)  # noqa: UP031 - it has braces


def test_it_would_run_if_it_were_kept(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "_RUN_AT_START", re.compile("(?!)"))
    registry.put_python("evil", "evil-1.0-py3-none-any.whl", wheel("evil", HOOKS))
    assert run_in_a_sandbox(lab, lab.make(pip=["evil"]), ASK_A_CHILD) == "1\nit ran\n"


LINK = stat.S_IFLNK | 0o777

HOSTILE_ENTRIES = {
    "a link to a file of the host": {"evil/link": (LINK, "/etc/passwd")},
    "a link upwards": {"evil/link": (LINK, "../../../../../../etc/passwd")},
    "a link to a directory, and a file in it": {
        "evil/link": (LINK, str(CANARY.parent)),
        f"evil/link/{CANARY.name}": (0o100644, "x"),
    },
    "a path upwards": {f"../../../../../../../../{CANARY}": (0o100644, "x")},
    "a path from the root": {str(CANARY): (0o100644, "x")},
    "data for a path upwards": {f"evil-1.0.data/data/../../../../../../../..{CANARY}": (0o100644, "x")},
    "a setuid program": {"evil/program": (0o106777, "#!/bin/sh")},
    "a pipe": {"evil/pipe": (stat.S_IFIFO | 0o666, "")},
}


@pytest.mark.parametrize("entries", HOSTILE_ENTRIES.values(), ids=HOSTILE_ENTRIES)
def test_hostile_wheels(lab: Lab, registry: Registry, entries: Mapping[str, tuple[int, str]]) -> None:
    content = wheel("evil", {"evil/__init__.py": ""}, entries)
    registry.put_python("evil", "evil-1.0-py3-none-any.whl", content)
    try:
        made = lab.make(pip=["evil"])
    except SetupFailed:
        assert lab.installer.digests() == set()
    else:
        assert_sound(lab, made)
    assert not CANARY.exists()
    assert list((lab.directory / "environments" / "making").iterdir()) == []


BACKEND = f"open({str(CANARY)!r}, 'w').close()"
SDIST = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n",
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "backend.py": BACKEND,
}


def test_what_would_have_to_be_built_is_not(lab: Lab, registry: Registry) -> None:
    registry.put_python("evil", "evil-1.0.tar.gz", tarball(SDIST, "evil-1.0"))
    assert "nowhere to build" in lab.failure(pip=["evil"])
    assert not CANARY.exists()


def test_building_would_run_its_code(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = tools.pip_command
    weak = lambda *given: [word for word in sound(*given) if word not in ("--only-binary", ":all:")]  # noqa: E731
    monkeypatch.setattr(tools, "pip_command", weak)
    registry.put_python("evil", "evil-1.0.tar.gz", tarball(SDIST, "evil-1.0"))
    lab.failure(pip=["evil"])
    assert CANARY.exists()


SCRIPTS = dict.fromkeys(("preinstall", "install", "postinstall", "prepare"), f"echo > {CANARY}")


def test_npm_scripts_are_not_run(lab: Lab, registry: Registry) -> None:
    put_evil_npm(registry, {"scripts": SCRIPTS})
    assert "nowhere to build" in lab.failure(npm=["evil"])
    put_evil_npm(registry, {}, {"binding.gyp": "{}"})
    assert "nowhere to build" in lab.failure(npm=["evil"])
    assert not CANARY.exists()


def test_npm_scripts_would_do_harm(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = tools.npm_command
    weak = lambda *given: [word for word in sound(*given) if word != "--ignore-scripts"]  # noqa: E731
    monkeypatch.setattr(tools, "npm_command", weak)
    put_evil_npm(registry, {"scripts": SCRIPTS})
    lab.failure(npm=["evil"])
    assert CANARY.exists()


HOSTILE_TARBALLS: list[Mapping[str, Any]] = [
    {"link": (tarfile.SYMTYPE, "/tmp"), f"link/{CANARY.name}": "x"},
    {"link": (tarfile.LNKTYPE, "/etc/passwd")},
    {f"../../../../../../../../..{CANARY}": "x"},
    {"link": (tarfile.SYMTYPE, "/etc/passwd")},
    {"link": (tarfile.SYMTYPE, "../../../../../../etc/passwd")},
    {str(CANARY): "x"},
    {"pipe": (tarfile.FIFOTYPE, "")},
]


@pytest.mark.parametrize("more", soak_the_rest(HOSTILE_TARBALLS, 3))
def test_hostile_tarballs(lab: Lab, registry: Registry, more: Mapping[str, Any]) -> None:
    put_evil_npm(registry, {}, more)
    try:
        made = lab.make(npm=["evil"])
    except SetupFailed:
        assert lab.installer.digests() == set()
    else:
        assert_sound(lab, made)
        assert not any(stat.S_ISLNK(status.st_mode) for status in lab.files(made).values())
    assert not CANARY.exists()


@pytest.mark.parametrize(
    "where",
    soak_the_rest(["file:../../../../etc", "URL/internal.tgz", "file:/etc", "git+ssh://127.0.0.1/x"], 2),
)
def test_npm_packages_cannot_depend_on_what_is_in_no_registry(lab: Lab, registry: Registry, where: str) -> None:
    put_evil_npm(registry, {"dependencies": {"more": where.replace("URL", registry.url)}})
    assert "isn't in the registry" in lab.failure(npm=["evil"])
    assert not [path for path in registry.asked if "internal" in path], "it is not even asked for"


# -- bounds -----------------------------------------------------------------------------------------------------


def test_packages_of_too_many_files(tmp_path: Path, registry: Registry) -> None:
    lab = Lab(tmp_path, registry, most_files=100)
    files = {f"many/f{number}": "" for number in range(200)}
    registry.put_python("many", "many-1.0-py3-none-any.whl", wheel("many", files))
    assert "more than 100 files" in lab.failure(pip=["many"])


@pytest.mark.parametrize("files", [1, 40], ids=["one large file", "many files"])
def test_packages_of_too_many_bytes(tmp_path: Path, registry: Registry, files: int) -> None:
    lab = Lab(tmp_path, registry, most_bytes=8 << 20)
    large = {f"large/f{number}": "x" * ((40 << 20) // files) for number in range(files)}
    registry.put_python("large", "large-1.0-py3-none-any.whl", wheel("large", large))
    assert "ERA_DISK_MB" in lab.failure(pip=["large"])
