"""An installer for tests, with a data directory of its own."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest

from era import languages
from era.core.setup.commands import Build
from era.core.setup.package_sets import PackageSet, SetupFailed
from era.core.setup.requirements import packages_of
from era.languages.go import GO
from era.languages.node import NODE
from era.languages.python import base_executable, installation_directory
from era.packages.installer import PackageInstaller
from era.store.blobs.blobs import LocalBlobs
from tests.drivers.sandboxes import Sandboxes, Weakness
from tests.packages.registry import Registry

CANARY = Path(f"/tmp/era-canary-{os.getpid()}")


"""A file that hostile code makes if it runs. Everybody may write there, also a tool's user."""


class Nowhere:
    """A Build without any sandbox."""

    owner = "1"

    def __init__(self, session_owner: str = "own") -> None:
        self.session_owner = session_owner

    def sandbox(self, language: str) -> AbstractAsyncContextManager[Any]:
        raise SetupFailed("nowhere to build")


class Lab:
    """An installer in a directory that is closed to others, as a data directory is."""

    def __init__(self, directory: Path, registry: Registry, shared: Path | None = None, **options: Any) -> None:
        """`shared` is the directory that it shares with others, as hosts of a cluster do."""
        self.directory = directory / "data"
        self.directory.mkdir(mode=0o700, parents=True)
        self.shared = shared or self.directory
        sizes = {"seconds": 30.0, "most_bytes": 64 << 20, "most_files": 1000, **options}
        self.blobs = LocalBlobs(self.shared / "blobs", "" if shared is None else f"{directory.name}.")
        with patch("era.store.blobs.blobs.sync"):  # which takes a second
            self.blobs.open()
        self.build = cast(Build, Nowhere())
        self.runner: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run
        self.installer = PackageInstaller(
            self.directory,
            self.blobs,
            shared=self.shared,
            python=str(base_executable()),
            python_prefix=installation_directory(),
            runtimes={
                "node": languages.runtime("node").mounts[NODE],
                "go": languages.runtime("go").mounts[GO],
            },
            variables={**os.environ, **registry.environment()},
            **sizes,
        )
        self.installer.open()

    def make(self, *, anew: bool = False, **setup: Any) -> PackageSet:
        """Install the packages of a setup."""
        made: PackageSet = self.run(self.installer.make(packages_of(setup), self.build, anew=anew))
        return made

    def run(self, job: Coroutine[Any, Any, Any]) -> Any:
        """What the installer returns, once nothing goes on in its background any more."""

        async def settled() -> Any:
            try:
                return await job
            finally:
                tasks = [*self.installer._compiling, *self.installer._clearing]
                await self.installer.finish_background()
                await asyncio.gather(*tasks)  # what fails is only logged

        return self.runner(settled())

    def find_installed(self, **setup: Any) -> PackageSet | None:
        found: PackageSet | None = self.run(self.installer.find_installed(packages_of(setup), self.build.owner))
        return found

    def archives(self) -> set[str]:
        """The digests in the blob store."""
        return {path.name for path in (self.directory / "blobs").rglob("*") if path.is_file()}

    def failure(self, **setup: Any) -> str:
        """The message of an installation that fails, and leaves nothing."""
        with pytest.raises(SetupFailed) as caught:
            self.make(**setup)
        assert self.installer.digests() == set()
        assert list((self.directory / "environments" / "making").iterdir()) == []
        return str(caught.value)

    def files(self, made: PackageSet) -> dict[str, os.stat_result]:
        """Everything in a package set, by path."""
        top = self.directory / "environments" / made.digest
        return {str(path.relative_to(top)): path.lstat() for path in top.rglob("*")}

    def site(self, made: PackageSet) -> set[str]:
        """The names in the site directory of a package set."""
        (site,) = (self.directory / "environments" / made.digest).glob("python/lib/*/site-packages")
        return {path.name for path in site.iterdir()}


def assert_sound(lab: Lab, made: PackageSet) -> None:
    """It has directories, plain files and links that stay within, which everybody may read and only we may write."""
    top = lab.directory / "environments" / made.digest
    for path, status in lab.files(made).items():
        assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid()), path
        if stat.S_ISLNK(status.st_mode):
            assert (top / path).resolve().is_relative_to(top), path
        else:
            assert stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode), path
            assert stat.S_IMODE(status.st_mode) in (0o755, 0o644), path


def run_in_a_sandbox(lab: Lab, made: PackageSet, code: str, weakness: Weakness | None = None) -> str:
    """What a program writes that has these packages."""
    sandboxes = Sandboxes(lab.directory, weakness or Weakness(), self_tested=())
    try:
        with sandboxes._weakened():
            sandbox = sandboxes._runner.run(sandboxes.driver.create("python", sandboxes.driver.limits, made.digest))
        result = sandboxes.run(sandbox, code)
        sandboxes.close(sandbox)
        return result.stdout + result.stderr
    finally:
        sandboxes.stop()
