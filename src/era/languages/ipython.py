"""IPython and what it needs, for Python contexts: taken from the server's own installation, compiled once a machine.

Sandboxes see exactly these packages of the server's, in a directory of their own, which contexts look into last
(guest/python_kernel.py). Completion (jedi) is left out: nothing in a context asks for it, and it is larger than all the
rest.
"""

from __future__ import annotations

import asyncio
import compileall
import hashlib
import importlib.metadata
import py_compile
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from era.languages.base import Missing
from era.languages.preparation import READY, Preparation

MOUNT = "/opt/ipython"
PACKAGES = f"{MOUNT}/{READY}"
"""Where contexts find the packages."""

_ROOTS = ("ipython", "matplotlib-inline")
_LEFT_OUT = frozenset({"jedi", "parso"})
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_FORMAT = "1"
"""To be counted up where `stage` does something else."""


@cache
def packages() -> Preparation:
    """The packages, to be staged. Raises Missing where the server was installed without them."""
    versions = " ".join(f"{each.name}={each.version}" for each in _distributions())
    digest = hashlib.sha256(f"{_FORMAT} {sys.version} {versions}".encode()).hexdigest()[:16]

    def command(directory: Path) -> tuple[Sequence[str], Mapping[str, str]]:
        code = f"import pathlib, sys; from {__name__} import stage; stage(pathlib.Path(sys.argv[1]))"
        return (sys.executable, "-I", "-c", code, str(directory)), {}

    return Preparation(f"ipython-{digest}", "IPython, for contexts,", MOUNT, command)


def is_ready() -> bool:
    """Whether the packages have been staged on this machine."""
    return packages().ready_place() is not None


def prepare() -> None:
    """Stage them now, if that hasn't been done. Takes a few seconds. Raises Missing, PreparationFailed, OSError."""
    if not is_ready():
        preparation = packages()
        asyncio.run(preparation.run(preparation.make_place()))


def stage(directory: Path) -> None:
    """Copy the packages into a directory, and compile them. Raises OSError, Missing."""
    for distribution in _distributions():
        for file in distribution.files or ():
            if ".." in file.parts or file.suffix == ".pyc":
                continue  # commands and manual pages
            to = directory / file
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), to)
    # The files can't be changed, so nobody has to compare times.
    compileall.compile_dir(
        directory,
        quiet=2,
        stripdir=str(directory),
        prependdir=PACKAGES,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def _distributions() -> Sequence[importlib.metadata.Distribution]:
    """What has to be installed for _ROOTS, themselves included. Raises Missing."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = list(_ROOTS)
    while wanted:
        name = wanted.pop()
        if name in found or name in _LEFT_OUT:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise Missing(f"The package {name} is not installed.", f"On the server: pip install {name}") from None
        wanted += _required(found[name])
    return [found[name] for name in sorted(found)]


def _required(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    """The names of what a distribution needs here: what it needs elsewhere, or for extras, isn't installed."""
    for requirement in distribution.requires or ():
        name, _, condition = requirement.partition(";")
        match = _NAME.match(name)
        if match is None or "extra" in condition:
            continue
        plain = re.sub(r"[-_.]+", "-", match[0]).lower()
        if not condition or _is_installed(plain):
            yield plain


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
